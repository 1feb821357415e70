"""Casts: what becomes of a stored tensor before a model gets it, another dtype or another device."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reshard.containers.dtypes import wide

from .dtypes import DTYPES

if TYPE_CHECKING:
    from reshard.layout.cut import Layout
    from reshard.model.understand import Model
    from reshard.tables.row import Row

# Used in float32 whatever the other weights are (routers, recurrences, residual streams), as in transformers.
WIDE = (
    "moe.router",
    "moe.score_bias",
    "lin.",
    "ssm.",
    "attn.sinks",
    "attn.pool_pos",
    "streams.",
    "mtp.streams",
    "mtp_streams",
    "head_streams",
)


class Cast:
    """Casts a stored tensor for the model: to another dtype, to another device.

    Without `dtype`, a checkpoint of several dtypes is cast to that of most weights, except for what is WIDE.
    """

    def __init__(
        self, layout: "Layout", rank: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.main = main_dtype(layout.model)
        self.dtype, self.device = dtype or self.main, device
        parts = tuple(f"_{part}" for part in layout.model.family.parts)
        self.scales = _named(layout, rank, lambda row: _of_parts(row, parts))
        self.wide = _named(layout, rank, lambda row: any(leaf.startswith(WIDE) for leaf in row.leaves))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if self.dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 and name not in self.scales:
            wider = name in self.wide and self.main is not None and dtype.itemsize > self.main.itemsize
            dtype = torch.promote_types(dtype, self.dtype) if wider else self.dtype
        return tensor.to(device=self.device, dtype=dtype)


def _of_parts(row: "Row", parts: tuple[str, ...]) -> bool:
    """Whether a row stores scales: a part of quantised matrices, or, of tables that spell them out, blocks."""
    blocks = any("/" in axis for path in row.pattern.axes for axis in path)
    return blocks or any(leaf.partition("@")[0].endswith(parts) for leaf in row.leaves)


def main_dtype(model: "Model") -> torch.dtype | None:
    """The dtype of most floating-point weights of a checkpoint; None if all of them have 8 bits or fewer."""
    elements: Counter[str] = Counter()
    for tensor in model.tensors.values():
        for dtype in tensor.dtypes:  # one, or one per layer
            elements[dtype] += tensor.elements // len(tensor.dtypes)
    floating = {name: count for name, count in elements.items() if wide(name)}
    return DTYPES[max(floating, key=floating.__getitem__)] if floating else None


def _named(layout: "Layout", rank: int, chosen: "Callable[[Row], bool]") -> set[str]:
    """The stored names on a rank that belong to the chosen rows."""
    from reshard.tables.row import Row

    slots = [slot for slot in layout.by_rank[rank] if isinstance(slot.template, Row) and chosen(slot.template)]
    return {slot.name(point) for slot in slots for point in slot.points()}
