"""What somebody else wrote: read within limits, and checked to be of a form before anything looks into it.

Knows nothing about checkpoints.
"""
