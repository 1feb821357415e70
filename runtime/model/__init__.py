"""One decoder for all families, on one rank: attention, experts, caches, and the facts that make them differ.

Knows no family, and opens no file.
"""
