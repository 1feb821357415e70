"""The identity of a layout: what the rows in use place where, as data to be hashed.

Of parsed rows, and only of those that hold a tensor of this checkpoint. Comments, the order of keys, how compounds,
defaults and `like` are spelled, and rows for other checkpoints leave it as it is; whatever moves a byte changes it. So
the tables that a conversion stores have, when they are read again, the identity of those that it was made by.
"""

import json
from collections import defaultdict
from typing import Any

from ..model.understand import Model
from ..tables.notation import Template
from ..tables.row import Constant
from .cut import Layout, Piece, Slot


def published(model: Model) -> list[Any]:
    """The rows of the published files, in no order of their own: name, dimensions, logical tensors and layers."""
    rows = ((model.family.rows[at], layers) for at, layers in model.active.items())
    return sorted(([_name(row.name), row.pattern.dims, row.leaves, layers] for row, layers in rows), key=json.dumps)


def stored(layout: Layout) -> list[Any]:
    """The rows of a layout, in the order in which a file has their tensors, each with what it stores on every rank."""
    pieces: dict[Slot, list[Piece]] = defaultdict(list)
    for held in layout.pieces.values():
        for piece in held:
            pieces[piece.slot].append(piece)
    ranks: dict[int, list[Slot]] = defaultdict(list)
    for slot in (*layout.slots, *layout.constants):
        ranks[slot.row].append(slot)
    return [[*_row(slots[0]), [_on_rank(slot, pieces[slot]) for slot in slots]] for _, slots in sorted(ranks.items())]


def _row(slot: Slot) -> list[Any]:
    row = slot.template
    own = [row.dtype, row.value] if isinstance(row, Constant) else row.stage == "last"  # stands after all layers
    return [_name(row.name), own, slot.layers]


def _name(name: Template) -> list[Any]:
    return [name.text, name.axes, name.base, name.compounds, name.sizes]


def _on_rank(slot: Slot, pieces: list[Piece]) -> list[Any]:
    boxes = sorted([piece.tensor.name, piece.box, piece.offset, piece.strides] for piece in pieces)
    return [slot.rank, slot.shape, slot.box, boxes]
