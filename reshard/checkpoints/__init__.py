"""What lies in a directory or on the Hub: published checkpoints, shards with their manifest, engines' own shards;
sources and targets.

Knows nothing about commands, and copies no tensor.
"""
