"""Rules as data: family and format tables, their notation, config.json as they read it.

Knows nothing about checkpoints, sizes or meshes.
"""
