"""File formats that hold tensors, and the one table of dtypes: which tensors a file holds, and where each lies.

Knows nothing about checkpoints or models.
"""
