"""Shard directories: which tensors each rank's file holds, in which order, behind which header. Computed, never measured.

    rank-00000/model.safetensors   header padded so that data starts at 4096; tensors of whole 64-byte lines first, so each is aligned
    rank-00000/tensors.json        the same tensors for people and engines: segments, what repeats and pads, digests

Knows nothing about where a directory is, or what is in its tensors.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..containers.container import of_file
from ..containers.dtypes import BITS, DTYPES
from ..containers.entry import Entry, Header
from ..layout.cut import Layout, Piece, Point, Slot
from ..store.digest import BLOCK, of, of_blocks
from ..tables.row import Constant, Row

FORMAT_VERSION = "1.0"
ALIGN = 4096  # bytes: where data starts in a shard
LINE = 64  # bytes


@dataclass(frozen=True)
class Shard:
    """One rank's file: `tensors` in stored order, each with its slot and point."""

    rank: int
    file: str
    tensors: tuple[tuple[str, Slot, Point], ...]
    prologue: bytes  # the length word and the header
    header: Header

    @property
    def size(self) -> int:
        return len(self.prologue) + sum(entry.nbytes for entry in self.header.entries.values())

    @property
    def folder(self) -> str:
        return folder(self.rank)


def folder(rank: int) -> str:
    """Where a rank's tensors.json is, whatever the format calls its weights."""
    return f"rank-{rank:05}"


def shard_name(layout: Layout, rank: int) -> str:
    """The weights file of a rank, as the format names it."""
    mesh, files = layout.mesh, layout.format.files
    text = files["staged"] if mesh.pp > 1 and "staged" in files else files["shard"]
    return text.format(rank=rank, tp=rank % mesh.tp, pp=rank // mesh.tp, part=0)


class Shards:
    """The files of a sharded layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @cached_property
    def digest(self) -> str:
        """The digest of the plan: tables, sizes, dtypes and mesh; equal for every route to this directory."""
        layout, model = self.layout, self.layout.model
        facts = {
            "version": FORMAT_VERSION,
            "format": layout.format.texts,
            "family": model.family.texts,
            "mesh": [layout.mesh.tp, layout.mesh.pp, layout.mesh.ep, layout.mesh.weights, layout.mesh.layers],
            "tensors": {name: [t.axes, t.sizes, t.dtypes, t.layers] for name, t in sorted(model.tensors.items())},
            "alias": model.alias,
        }
        return of(json.dumps(facts, sort_keys=True).encode())

    def __iter__(self) -> Iterator[Shard]:
        return (self.shard(rank) for rank in range(self.layout.mesh.world))

    def shard(self, rank: int) -> Shard:
        """The file of one rank, laid out."""
        layout = self.layout
        tensors = []
        for slot in layout.by_rank[rank]:
            for point in slot.points():
                dtype = layout.dtype(slot, point)
                nbytes = slot.elements * BITS[dtype] // 8
                whole = nbytes % LINE == 0
                place = _place(slot, point)
                tensors.append(((not whole, 0 if whole else -BITS[dtype], *place), slot.name(point), dtype, slot, point))
        tensors.sort(key=lambda tensor: tensor[0])
        file, stored = shard_name(layout, rank), ((name, dtype, slot.shape) for _, name, dtype, slot, _ in tensors)
        prologue, head = of_file(file).build(stored, self._metadata(rank), align=ALIGN)
        return Shard(rank, file, tuple((name, slot, point) for _, name, _, slot, point in tensors), prologue, head)

    def _metadata(self, rank: int) -> dict[str, str]:
        mesh = self.layout.mesh
        return {
            "format": "pt",
            "reshard.version": FORMAT_VERSION,
            "reshard.layout": self.layout.format.name,
            "reshard.rank": str(rank),
            "reshard.world": str(mesh.world),
            "reshard.mesh": f"tp={mesh.tp} pp={mesh.pp} ep={mesh.ep}",
            "reshard.plan": self.digest,
        }


def _place(slot: Slot, point: Point) -> tuple[int, ...]:
    """Embeddings, then layer by layer in the order of the table, then what only the last stage has."""
    layer = point.get("layer", -1 if not isinstance(slot.template, Row) or slot.template.stage != "last" else 1 << 30)
    return layer, slot.row, *(at for axis, at in point.items() if axis != "layer")


def tensors_json(shard: Shard, layout: Layout, digests: Mapping[str, list[bytes]]) -> bytes:
    """The text of tensors.json: one line per row (what its rows are) and one per tensor (where it is, its digests)."""
    rows: dict[Slot, int] = {}
    for _, slot, _ in shard.tensors:
        rows.setdefault(slot, len(rows))
    mesh = layout.mesh
    head = {
        "rank": shard.rank,
        "tp_rank": shard.rank % mesh.tp,
        "pp_rank": shard.rank // mesh.tp,
        "ep_rank": shard.rank % mesh.tp // mesh.etp,
        "file": shard.file,
        "block": BLOCK,
    }
    lines = ["{"]
    lines += [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append(' "rows": [')
    lines += _joined(f"  {json.dumps(row_json(slot, layout))}" for slot in rows)
    lines += [" ],", ' "tensors": [']
    lines += _joined(
        f"  {json.dumps(_tensor_json(name, slot, shard.header.entries[name], rows[slot], digests[name]))}"
        for name, slot, _ in shard.tensors
    )
    lines += [" ]", "}", ""]
    return "\n".join(lines).encode()


def _joined(lines: Iterator[str]) -> list[str]:
    items = list(lines)
    return [line + "," for line in items[:-1]] + items[-1:]


def row_json(slot: Slot, layout: Layout) -> dict[str, Any]:
    """What a regular set of stored tensors holds: each leaf's box of its logical tensor, and where it lies, in elements."""
    text: dict[str, Any] = {"name": slot.template.name.text, "shape": list(slot.shape)}
    if isinstance(slot.template, Constant):
        return text | {"constant": slot.template.value}
    pieces = [piece for leaf in slot.template.leaves for piece in layout.pieces.get(leaf, ()) if piece.slot is slot]
    return text | {"segments": [_segment(piece) for piece in pieces]}


def _segment(piece: Piece) -> dict[str, Any]:
    axes = list(zip(piece.tensor.axes, piece.box, piece.tensor.sizes, piece.strides, strict=True))
    axes = [entry for entry in axes if entry[0] != "layer" or entry[3] is not None]  # its name says which layer a tensor is of
    return {
        "tensor": piece.tensor.name,
        "offset": piece.offset,
        "box": {axis: list(span) for axis, span, _, _ in axes},
        "of": {axis: size for axis, _, size, _ in axes},
        "strides": {axis: stride for axis, _, _, stride in axes if stride is not None},
    }


def _tensor_json(name: str, slot: Slot, entry: Entry, row: int, blocks: list[bytes]) -> dict[str, Any]:
    text: dict[str, Any] = {
        "name": name,
        "dtype": entry.dtype,
        "shape": list(slot.shape),
        "offset": entry.offset,
        "nbytes": entry.nbytes,
        "row": row,
        "digest": of_blocks(blocks),
    }
    if len(blocks) > 1:
        text["blocks"] = [block.hex() for block in blocks]
    return text


def scalar(constant: Constant) -> bytes:
    """The bytes of a constant."""
    return struct.pack(f"<{DTYPES[constant.dtype].code}", constant.value)


def shard_digest(prologue: bytes, tensors: Iterable[str]) -> str:
    """The digest of a rank's file: over its header's and its tensors' digests, in stored order."""
    return of(b"".join(map(bytes.fromhex, [of(prologue), *tensors])))
