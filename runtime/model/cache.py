"""The cache of a generation: some tensors per layer, and the position of the token in each column.

Linear attention layers keep two tensors of fixed size (`states`) instead.
"""

import torch
from torch import Tensor

from reshard.errors import ReshardError


class Cache:
    """Room for `length` columns in each of `batch` rows; a column is a token, or padding (position -1)."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.length, self.used = length, 0
        self.positions = torch.full((batch, length), -1, dtype=torch.long, device=device)
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, positions: Tensor) -> Tensor:
        """Allocate columns for new tokens; returns the positions of all columns in use, [batch, columns]."""
        batch, seq = positions.shape
        if batch != self.positions.shape[0] or self.used + seq > self.length:
            raise ReshardError(
                f"the cache has room for {self.positions.shape[0]} × {self.length} tokens, "
                f"{batch} × {self.used + seq} are needed",
                "allocate a larger one: new_cache(batch, length)",
            )
        self.positions[:, self.used : self.used + seq] = positions
        self.used += seq
        return self.positions[:, : self.used]

    def write(self, layer: int, *newest: Tensor) -> tuple[Tensor, ...]:
        """Store [batch, heads, seq, features] of the new tokens; returns everything stored for this layer."""
        if layer not in self.kept:
            self.kept[layer] = tuple(x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in newest)
        for room, x in zip(self.kept[layer], newest, strict=True):
            room[:, :, self.used - x.shape[2] : self.used] = x
        return self.read(layer)

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """Everything stored for a layer."""
        return tuple(room[:, :, : self.used] for room in self.kept[layer])
