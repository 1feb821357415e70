"""What a checkpoint holds: logical tensors and sizes, understood from a family table, config.json and headers.

Opens no file, knows no mesh.
"""
