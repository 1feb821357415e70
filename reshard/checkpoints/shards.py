"""Shard directories: which tensors each rank's file holds, in which order, behind which header. Computed, never
measured.

    rank-00000/model.safetensors   header padded so that data starts at 4096; tensors of whole 64-byte lines first, so
                                   each is aligned
    rank-00000/tensors.json        the same tensors for people and engines: segments, what repeats and pads, digests

Knows nothing about where a directory is, or what is in its tensors.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, to_builtins

from ..containers.container import of_file
from ..containers.dtypes import BITS, DTYPES
from ..containers.entry import Entry, Header
from ..inputs.decode import Size, about
from ..layout import identity
from ..layout.cut import Layout, Piece, Point, Slot
from ..store.digest import BLOCK, Digest, of, of_blocks
from ..tables.row import Constant, Row

FORMAT_VERSION = "1.1"  # of what is written; VERSIONS has those that are read
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


def _by_text(layout: Layout) -> dict[str, Any]:
    """What version 1.0 took for the identity of tables: their texts, comments and all."""
    return {"format": layout.format.texts, "family": layout.model.family.texts}


def _by_rows(layout: Layout) -> dict[str, Any]:
    """The rows in use, and what is named for its table."""
    return {
        "format": layout.format.name,
        "family": layout.model.family.name,
        "files": [shard_name(layout, rank) for rank in range(layout.mesh.world)],
        "published": identity.published(layout.model),
        "stored": identity.stored(layout),
    }


VERSIONS = {"1.0": _by_text, "1.1": _by_rows}


class Shards:
    """The files of a sharded layout, in a format version that reshard writes or has written.

    Of a later MINOR of ours nothing is known: its files are taken to be as ours are.
    """

    def __init__(self, layout: Layout, version: str = FORMAT_VERSION) -> None:
        self.layout = layout
        self.version = version if version in VERSIONS else FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """The digest of the plan: rows in use, sizes, dtypes and mesh; equal for every route to this directory."""
        layout, model = self.layout, self.layout.model
        facts = VERSIONS[self.version](layout) | {
            "version": self.version,
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
                tensors.append(
                    ((not whole, 0 if whole else -BITS[dtype], *place), slot.name(point), dtype, slot, point)
                )
        tensors.sort(key=lambda tensor: tensor[0])
        file, stored = shard_name(layout, rank), ((name, dtype, slot.shape) for _, name, dtype, slot, _ in tensors)
        prologue, head = of_file(file).build(stored, self._metadata(rank), align=ALIGN)
        return Shard(rank, file, tuple((name, slot, point) for _, name, _, slot, point in tensors), prologue, head)

    def _metadata(self, rank: int) -> dict[str, str]:
        mesh = self.layout.mesh
        return {
            "format": "pt",
            "reshard.version": self.version,
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


class Segment(Struct, frozen=True):
    """The box of a logical tensor that lies in a stored one."""

    tensor: Annotated[str, about("Logical name: docs/vocabulary.md.")]
    offset: Annotated[Size, about("Element of the stored tensor at which the box begins.")]
    box: Annotated[
        dict[str, tuple[Size, Size]],
        about("Axis to the range of it that is here, [first, one after the last), counted in the whole model."),
    ]
    of: Annotated[dict[str, Size], about("Axis to its size in the whole model.")]
    strides: Annotated[
        dict[str, Size], about("Axis to the step in elements from one index to the next in the stored tensor.")
    ]


class Regular(Struct, frozen=True):
    """A regular set of stored tensors."""

    name: Annotated[str, about("The tensors' name, with {axis} where they are numbered.")]
    shape: tuple[Size, ...]
    constant: Annotated[
        float | UnsetType,
        about("The value of a scalar that the engine wants and the checkpoint has not; then no segments."),
    ] = UNSET
    segments: Annotated[
        tuple[Segment, ...] | UnsetType,
        about("The logical tensors in it, in the order in which they lie there. The rest is zero."),
    ] = UNSET


_Several = Annotated[tuple[Digest, ...], Meta(min_length=2, description="Digest of each block, where there are some.")]


class Stored(Struct, frozen=True, gc=False):
    """A tensor of the file."""

    name: str
    dtype: Annotated[str, about("As safetensors spells it: BF16, F32, F8_E4M3, ...")]
    shape: tuple[Size, ...]
    offset: Annotated[Size, about("Bytes from the start of the file (not of its data).")]
    nbytes: Size
    row: Annotated[Size, about("Index into rows.")]
    digest: Annotated[Digest, about("xxh3-128 over the digests of its blocks.")]
    blocks: _Several | UnsetType = UNSET


class Described(Struct, frozen=True):
    """rank-NNNNN/tensors.json of a reshard shard directory, format version 1."""

    rank: Size
    tp_rank: Size
    pp_rank: Size
    ep_rank: Size
    file: Annotated[str, about("The weights of this rank, below the directory.")]
    block: Annotated[Size, about("Bytes that one block digest covers; the last block of a tensor may be short.")]
    rows: Annotated[
        tuple[Regular, ...], about("What regular sets of tensors hold. A tensor points to its row by number.")
    ]
    tensors: Annotated[tuple[Stored, ...], about("Every tensor of the file, in the order in which they lie there.")]


def described(shard: Shard, layout: Layout, digests: Mapping[str, list[bytes]]) -> Described:
    """What tensors.json says of a shard. `digests`: of each tensor's blocks."""
    mesh, slots = layout.mesh, dict.fromkeys(slot for _, slot, _ in shard.tensors)
    rows = {slot: number for number, slot in enumerate(slots)}
    entries = shard.header.entries
    return Described(
        rank=shard.rank,
        tp_rank=shard.rank % mesh.tp,
        pp_rank=shard.rank // mesh.tp,
        ep_rank=shard.rank % mesh.tp // mesh.etp,
        file=shard.file,
        block=BLOCK,
        rows=tuple(_regular(slot, layout) for slot in rows),
        tensors=tuple(_stored(name, slot, entries[name], rows[slot], digests[name]) for name, slot, _ in shard.tensors),
    )


def dump(described: Described) -> bytes:
    """The text of tensors.json: a line per row and per tensor."""
    lines = ["{"]
    for key, value in to_builtins(described).items():
        if isinstance(value, list | tuple):
            lines += [f' "{key}": [', ",\n".join(f"  {json.dumps(each)}" for each in value), " ],"]
        else:
            lines.append(f' "{key}": {json.dumps(value)},')
    return "\n".join([*lines[:-1], " ]", "}", ""]).encode()


def _regular(slot: Slot, layout: Layout) -> Regular:
    name, shape = slot.template.name.text, slot.shape
    if isinstance(slot.template, Constant):
        return Regular(name, shape, constant=slot.template.value)
    pieces = (piece for leaf in slot.template.leaves for piece in layout.pieces.get(leaf, ()) if piece.slot is slot)
    return Regular(name, shape, segments=tuple(map(_segment, pieces)))


def _segment(piece: Piece) -> Segment:
    axes = list(zip(piece.tensor.axes, piece.box, piece.tensor.sizes, piece.strides, strict=True))
    # its name says which layer a tensor is of
    axes = [entry for entry in axes if entry[0] != "layer" or entry[3] is not None]
    return Segment(
        tensor=piece.tensor.name,
        offset=piece.offset,
        box={axis: span for axis, span, _, _ in axes},
        of={axis: size for axis, _, size, _ in axes},
        strides={axis: stride for axis, _, _, stride in axes if stride is not None},
    )


def _stored(name: str, slot: Slot, entry: Entry, row: int, blocks: list[bytes]) -> Stored:
    several = tuple(block.hex() for block in blocks) if len(blocks) > 1 else UNSET
    return Stored(name, entry.dtype, slot.shape, entry.offset, entry.nbytes, row, of_blocks(blocks), several)


def scalar(constant: Constant) -> bytes:
    """The bytes of a constant."""
    return struct.pack(f"<{DTYPES[constant.dtype].code}", constant.value)


def shard_digest(prologue: bytes, tensors: Iterable[str]) -> str:
    """The digest of a rank's file: over its header's and its tensors' digests, in stored order."""
    return of(b"".join(map(bytes.fromhex, [of(prologue), *tensors])))
