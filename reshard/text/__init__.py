"""Words for people: sizes and durations, progress, control characters made visible.

Imports nothing of reshard.
"""
