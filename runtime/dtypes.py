"""Dtypes: torch's for each that a safetensors file can name."""

import torch

from reshard.containers.dtypes import ROWS

# safetensors' name of a dtype → torch's; tensors of others, and of those that torch counts otherwise, are raw bytes.
DTYPES: dict[str, torch.dtype] = {
    row.name: getattr(torch, row.torch)
    for row in ROWS
    if row.name and row.torch and row.together == 1 and hasattr(torch, row.torch)
}
