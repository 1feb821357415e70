"""Where bytes live: files by offset, directories that others may replace, publishing, digests.

Knows nothing about what the bytes are.
"""
