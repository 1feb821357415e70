"""File formats that hold tensors: safetensors, and the ZIP files and pickles of torch.save. Which tensors, and where each lies.

Knows nothing about checkpoints or models.
"""
