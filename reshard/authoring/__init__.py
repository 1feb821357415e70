"""Writing a table: drafts, names that are similar elsewhere, synthetic checkpoints, and mutations that show what
nothing would notice.

Knows nothing about conversions.
"""
