"""How the ranks of a job reach each other: collectives, shared memory, heartbeats, launching.

Knows nothing about models.
"""
