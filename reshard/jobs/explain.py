"""Explaining: what an element of a stored tensor is, where it came from, and everything that holds it. Nothing is
stored for that.

    3:layers.7.attn.qkv[700,12]                     an element of a rank's tensor
    model.layers.7.self_attn.k_proj.weight[3,4]     an element of the original, by its published name
    attn.k[7,0,3,4]                                 a logical element, its axes in the order of the family table
    3:layers.7.attn.qkv[700]  3:layers.7.attn.qkv   fewer indices: the whole row, the whole tensor

Arithmetic on a layout, and reads of single elements; knows nothing about plans or conversions.
"""

import difflib
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from ..checkpoints.source import Source
from ..containers.dtypes import BITS, DTYPES
from ..containers.entry import Entry
from ..containers.values import decode
from ..errors import ReshardError
from ..inputs.decode import about
from ..layout.cut import Layout, Piece, Point, Slot
from ..layout.mesh import Range
from ..store.local import Pool
from ..tables.notation import fold
from ..tables.row import Constant
from ..text.units import folded, runs
from .json_result import as_json

MOST = 64  # holders that `lines` lists
WIDTH = 80  # columns

Array = np.ndarray[Any, np.dtype[Any]]
Box = dict[str, Range]
Value = float | int | bool | str | None
Kind = Literal["element", "box", "constant", "buffer"]
Locate = Callable[[int, str], tuple[str, Path | None, Entry]]  # rank, name → file, where to read it, entry


# --- as JSON ----------------------------------------------------------------------------------------------------------


class HoldingResult(Struct, frozen=True, kw_only=True):
    """A box in stored tensors: from element `first` of `tensor` to element `last` of it or of `last_tensor`."""

    rank: Annotated[int | UnsetType, about("Not of an original file.")] = UNSET
    tensor: str
    first: tuple[int, ...]
    tensors: Annotated[int | UnsetType, about("Where there is more than one.")] = UNSET
    last_tensor: str | UnsetType = UNSET
    last: tuple[int, ...]
    elements: int
    file: Annotated[str, about("Relative to the directory.")]
    byte: Annotated[int, about("Of the first element, from the start of the file.")]
    bits: Annotated[Range | UnsetType, about("From that byte on, where bytes hold parts of several elements.")] = UNSET
    box: Annotated[Box | UnsetType, about("Of the logical tensor: axis to [first, one after the last).")] = UNSET
    value: Annotated[Value | UnsetType, about("The first element, where the file was read.")] = UNSET
    raw: Annotated[str | UnsetType, about("Every byte that it touches, in hexadecimal.")] = UNSET


class PartResult(Struct, frozen=True):
    """A box of one logical tensor: who holds it, and what it came from."""

    tensor: str
    box: Annotated[Box, about("Axis to [first, one after the last).")]
    of: Annotated[dict[str, int], about("Axis to its size in the whole tensor.")]
    elements: int
    held: tuple[HoldingResult, ...]
    origins: tuple[HoldingResult, ...]


class ExplainResult(Struct, frozen=True, kw_only=True):
    """reshard explain --json, version 1."""

    where: str
    asked: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    elements: int
    padding: Annotated[int, about("How many of the elements no logical tensor has.")]
    here: Annotated[HoldingResult | UnsetType, about("The stored tensor that was asked about.")] = UNSET
    constant: Annotated[Value | UnsetType, about("What the table says.")] = UNSET
    kept: Annotated[HoldingResult | UnsetType, about("Where the bytes of a buffer are now.")] = UNSET
    parts: tuple[PartResult, ...]
    notes: tuple[str, ...]


# --- what is found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """A box in stored tensors: from element `first` of `tensor` to element `last` of `last_tensor`, which is another
    only if `tensors` > 1.

    `rank` is None for an original file. `bits`: of the first element, from the start of `file`, which is relative to
    the directory; a byte's lowest is its first, as kernels take two F4. `box`: the part of the logical tensor. `value`:
    the first element as it is stored, `raw`: every byte that it touches; None where the file is not at hand.
    """

    rank: int | None
    tensor: str
    first: tuple[int, ...]
    last_tensor: str
    last: tuple[int, ...]
    tensors: int
    elements: int
    file: str
    bits: Range
    box: Box = field(default_factory=dict)
    value: Value = None
    raw: str | None = None

    @property
    def text(self) -> str:
        """As `explain` takes it."""
        prefix = "" if self.rank is None else f"{self.rank}:"
        return f"{prefix}{self.tensor}{bracketed(self.first)}"

    @property
    def byte(self) -> int:
        return self.bits[0] // 8

    @property
    def shares(self) -> bool:
        """The first element is smaller than a byte: its neighbours have bits of the same ones."""
        return any(bit % 8 for bit in self.bits)

    @property
    def place(self) -> str:
        """`byte 12 of FILE`, or where that is shared `bits 6 to 7 of byte 12 and bits 0 to 3 of byte 13 of FILE`."""
        low, high = self.bits
        found = [f"byte {self.byte}"]
        if self.shares and self.elements == 1:
            starts = range(low // 8 * 8, high, 8)
            found = [f"bits {max(low - at, 0)} to {min(high - at, 8) - 1} of byte {at // 8}" for at in starts]
        return f"{' and '.join(found)} of {self.file}"

    @property
    def code(self) -> int | None:
        """The bits of the first element, without those of its neighbours."""
        low, high = self.bits
        return (
            None
            if self.raw is None
            else int.from_bytes(bytes.fromhex(self.raw), "little") >> low % 8 & (1 << high - low) - 1
        )

    @property
    def result(self) -> "HoldingResult":
        several, read = self.tensors > 1, self.raw is not None
        low, high = self.bits
        return HoldingResult(
            rank=UNSET if self.rank is None else self.rank,
            tensor=self.tensor,
            first=self.first,
            tensors=self.tensors if several else UNSET,
            last_tensor=self.last_tensor if several else UNSET,
            last=self.last,
            elements=self.elements,
            file=self.file,
            byte=self.byte,
            bits=(low - 8 * self.byte, high - 8 * self.byte) if self.shares else UNSET,
            box=self.box or UNSET,
            value=self.value if read else UNSET,
            raw=self.raw or UNSET,
        )


@dataclass(frozen=True)
class Part:
    """A box of one logical tensor: who holds it, and the original's tensors that it came from. `sizes`:
    the whole tensor's.
    """

    tensor: str
    box: Box
    sizes: dict[str, int]
    elements: int
    held: tuple[Holding, ...]
    origins: tuple[Holding, ...]

    @property
    def result(self) -> "PartResult":
        held, origins = (tuple(one.result for one in holdings) for holdings in (self.held, self.origins))
        return PartResult(self.tensor, self.box, self.sizes, self.elements, held, origins)


@dataclass(frozen=True)
class Explanation:
    """What was asked about, and what it is.

    `kind`: "element", "box", "constant", or "buffer" for what is kept aside and given to no rank. `here`: the stored
    tensor that was asked about, None if it was a logical one. `padding`: how many of its elements no logical tensor
    has. `kept`: where the bytes of a buffer are now. `constant`: what the table says, in the table's precision.
    """

    where: str
    asked: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    here: Holding | None = None
    parts: tuple[Part, ...] = ()
    padding: int = 0
    constant: Value = None
    kept: Holding | None = None
    notes: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        return self.elements == 1

    @property
    def elements(self) -> int:
        return self.here.elements if self.here else sum(part.elements for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """As ExplainResult."""
        found: dict[str, Any] = as_json(
            ExplainResult(
                where=self.where,
                asked=self.asked,
                kind=self.kind,
                dtype=self.dtype,
                shape=self.shape,
                elements=self.elements,
                padding=self.padding,
                here=self.here.result if self.here else UNSET,
                constant=UNSET if self.constant is None else self.constant,
                kept=self.kept.result if self.kept else UNSET,
                parts=tuple(part.result for part in self.parts),
                notes=self.notes,
            )
        )
        return found

    def lines(self) -> list[str]:
        """What a person wants to know, in at most 80 columns."""
        found = list(wrapped(f"{self.asked}{self._worth()}"))
        found += wrapped(
            f"{self.dtype} tensor of shape {list(self.shape)}" if self.shape else f"{self.dtype} scalar", 2
        )
        if self.here is not None:
            found += self._place(self.here)
        if self.constant is not None:
            there = self.here.value if self.here is not None else None
            differs = there not in (None, self.constant)
            what = f"{self.constant} (by the table; here it is {there})" if differs else self.constant
            found += wrapped(f"is the constant {what}, which the engine expects and no checkpoint has")
        if self.kind == "buffer":
            found += wrapped("is a buffer that engines recompute: skipped, no rank stores it")
            if self.kept is not None and self.here is not None and self.kept.file != self.here.file:
                found += wrapped(f"its bytes are in the residue: {self.kept.place}", 2)
        if self.padding:
            what = (
                "is padding"
                if self.padding == self.elements
                else f"has padding: {self.padding} of its {self.elements} elements"
            )
            found += wrapped(f"{what}, part of no logical tensor")
        for part in self.parts:
            found += self._part(part)
        for note in self.notes:
            found += wrapped(note)
        return found

    def _worth(self) -> str:
        known = self.here if self.here is not None and self.here.raw is not None else None
        known = known or next(
            (holding for part in self.parts for holding in part.held if holding.raw is not None), None
        )
        if not self.single or known is None:
            return ""
        return f" = {known.value} (bytes {known.raw})" if known.value is not None else f" (bytes {known.raw})"

    def _place(self, here: Holding) -> Iterator[str]:
        whose = "the original" if here.rank is None else f"rank {here.rank}"
        count = (
            "" if self.single else f"{here.elements} elements, from {bracketed(here.first)} to {bracketed(here.last)}, "
        )
        yield from wrapped(f"{whose}: {count}{here.place}", 2)

    def _part(self, part: Part) -> Iterator[str]:
        yield from wrapped(f"{'is' if self.single else 'holds'} {part.tensor}: {in_words(part.box, part.sizes)}")
        if part.origins and not (self.here is not None and self.here.rank is None):
            yield "came from"
            yield from self._holdings(part, part.origins)
        here = self.here
        others = [
            holding
            for holding in part.held
            if here is None or (holding.rank, holding.tensor) != (here.rank, here.tensor)
        ]
        if others:
            yield "also held by" if len(others) < len(part.held) else "held by"
            yield from self._holdings(part, others)

    def _holdings(self, part: Part, holdings: Sequence[Holding]) -> Iterator[str]:
        for holding in holdings[:MOST]:
            to = "" if holding.elements == 1 or holding.tensors > 1 else f" to {bracketed(holding.last)}"
            more = f" to {holding.last_tensor} ({holding.tensors} tensors)" if holding.tensors > 1 else ""
            yield from wrapped(f"{holding.text}{to}{more}", 2)
            less = {axis: span for axis, span in holding.box.items() if span != part.box[axis]}
            yield from wrapped(f"{holding.place}{f': {in_words(less)}' if less else ''}", 4)
        if len(holdings) > MOST:
            yield f"  … and {len(holdings) - MOST} more; --json has all"


def bracketed(indices: Sequence[int]) -> str:
    return f"[{','.join(map(str, indices))}]" if indices else ""


def in_words(box: Mapping[str, Range], sizes: Mapping[str, int] | None = None) -> str:
    """`layer 7, kv 0-3 of 4`: inclusive, as people count; the size where it says more than the range."""

    def word(axis: str, low: int, high: int) -> str:
        span = str(low) if high == low + 1 else f"{low}-{high - 1}"
        return f"{axis} {span}" + (f" of {sizes[axis]}" if sizes is not None and high != low + 1 else "")

    return ", ".join(word(axis, low, high) for axis, (low, high) in box.items()) or "a scalar"


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of at most 80 columns; a name that is longer is broken."""
    first, rest = " " * indent, " " * (indent + 2)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [first]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def inside(piece: Piece, start: int, pitch: int = 1) -> Box | None:
    """What a piece has among elements [start, start + pitch) of its stored tensor, along the axes that are laid out;
    None if nothing.

    `pitch` is a product of trailing dimensions and `start` a multiple of it. Strides are nested: each is at least what
    all smaller ones reach together, so that an axis' index is a quotient and what is left belongs to the others.
    """
    spans = zip(piece.tensor.axes, piece.box, piece.strides, strict=True)
    laid_out = [(axis, span, stride) for axis, span, stride in spans if stride is not None]
    if pitch < 1 or any(low >= high for _, (low, high), _ in laid_out):
        return None
    found: Box = {}
    rest = start - piece.offset // pitch * pitch
    for axis, (low, high), stride in sorted(laid_out, key=lambda item: -item[2]):
        if stride < pitch or high - low == 1:
            found[axis] = (low, high)
            continue
        at = low + rest // stride
        if not low <= at < high:
            return None
        rest -= (at - low) * stride
        found[axis] = (at, at + 1)
    return found if rest == 0 else None


def unravel(offset: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The indices of element number `offset`, row-major."""
    indices: list[int] = []
    for size in reversed(shape):
        offset, at = divmod(offset, size)
        indices.insert(0, at)
    return tuple(indices)


def bits_of(entry: Entry, indices: Sequence[int]) -> Range:
    """The bits of an element, from the start of its file."""
    if entry.strides is not None:
        at = sum(i * stride for i, stride in zip(indices, entry.strides, strict=True))
    else:
        at = 0
        for i, size in zip(indices, entry.shape, strict=True):
            at = at * size + i
    bits = BITS[entry.dtype]
    return entry.offset * 8 + at * bits, entry.offset * 8 + (at + 1) * bits


# --- asking -----------------------------------------------------------------------------------------------------------


def explain(source: Source, text: str) -> Explanation:
    """What an element, a row or a tensor of a directory is, by arithmetic on its layout.

    Raises ReshardError: malformed text, a rank, name or index that there is not.
    """
    rank, name, indices = _parse(text)
    with closing(Pool()) as pool:
        asking = _Asking(source, text, pool)
        if rank is not None:
            return asking.stored(rank, name, indices)
        if name in source.layout.model.aside:
            return asking.buffer(name, indices)
        if name in source.tensors:
            return asking.original(name, indices)
        if name in source.layout.model.tensors:
            return asking.logical(name, indices)
        raise asking.unknown(name)


_TEXT = re.compile(
    r"\s*(?:([0-9]{1,18})\s*:\s*)?(?!\s|[0-9]+\s*:)([^\[\]]*[^\[\]\s:])\s*(?:\[\s*([0-9]{1,18}(?:\s*,\s*[0-9]{1,18})*)?\s*\])?\s*"
)


def _parse(text: str) -> tuple[int | None, str, tuple[int, ...]]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ReshardError(
            f"{text!r} is not an element: expected RANK:NAME[I,J] or NAME[I,J], with indices from 0",
            "for example 3:layers.7.attn.qkv[700,12]; fewer indices select a whole row, none the whole tensor",
        )
    rank, name, indices = match.groups()
    return None if rank is None else int(rank), name, tuple(map(int, indices.split(","))) if indices else ()


class _Asking:
    """One question to one directory."""

    def __init__(self, source: Source, asked: str, pool: Pool) -> None:
        self.source, self.asked, self.pool = source, asked, pool
        self.originals = source.published()
        pairs = source.layout.alias.items()
        self.same = {
            name: [name, *(b for a, b in pairs if a == name), *(a for a, b in pairs if b == name)]
            for name in self.tensors
        }

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.layout.model.tensors

    def stored(self, rank: int, name: str, indices: tuple[int, ...]) -> Explanation:
        """A stored tensor of a rank."""
        layout = self.source.layout
        if rank >= layout.mesh.world:
            last = layout.mesh.world - 1
            ranks = "only rank 0" if last == 0 else f"ranks 0 to {last}"
            raise ReshardError(f"{self.asked}: there is no rank {rank}, {self.source.where} has {ranks}")
        found = _find(layout.by_rank[rank], name)
        if found is None:
            raise self._elsewhere(rank, name)
        return self._slot(layout, *found, indices, self._locate)

    def original(self, name: str, indices: tuple[int, ...]) -> Explanation:
        """A tensor of the original files, by its published name."""
        found = _find(self.originals.by_rank[0], name)
        if found is None:
            raise self.unknown(name)
        return self._slot(self.originals, *found, indices, self._locate_original)

    def buffer(self, name: str, indices: tuple[int, ...]) -> Explanation:
        """A tensor of the original files that is kept aside."""
        at, entry = self.source.tensors[name]
        count = self._checked(name, indices, entry.shape)
        first, last = _ends(indices, entry.shape)
        file, kept = self.source.originals[at].name, None
        here = Holding(None, name, first, name, last, 1, count, file, bits_of(entry, first))
        _, (begin, _, place, start) = self.source.buffer(name)
        if (path := self.source.local(place)) is not None:
            low, high = (bit + 8 * (start - begin) for bit in here.bits)
            kept = self._read(replace(here, file=self.source.relative(path), bits=(low, high)), path, entry.dtype)
        return self._explanation(
            "buffer",
            entry.dtype,
            entry.shape,
            here=replace(here, value=kept.value, raw=kept.raw) if kept else here,
            kept=kept,
        )

    def logical(self, name: str, indices: tuple[int, ...]) -> Explanation:
        """A logical tensor, its axes in the order of the family table."""
        tensor = self.tensors[name]
        count = self._checked(name, indices, tensor.sizes)
        box = {axis: (0, size) for axis, size in zip(tensor.axes, tensor.sizes, strict=True)}
        box |= {axis: (at, at + 1) for axis, at in zip(tensor.axes, indices, strict=False)}
        low, high = box.get("layer", (0, 0))
        if "layer" in box and tensor.layers is not None and not any(low <= at < high for at in tensor.layers):
            there = ", ".join(in_words({"layer": (low, high + 1)}) for low, high in runs(tensor.layers))
            raise ReshardError(f"{self.asked}: {name} does not exist in layer {low}", f"it exists in {there}")
        dtypes = (
            tensor.dtypes
            if "layer" not in box or not indices
            else (tensor.dtype({"layer": indices[tensor.axes.index("layer")]}),)
        )
        part = self._part(name, box, count == 1)
        return self._explanation(
            "element" if count == 1 else "box", "/".join(sorted(set(dtypes))), tensor.sizes, parts=(part,)
        )

    def _slot(
        self,
        layout: Layout,
        slot: Slot,
        point: Point,
        indices: tuple[int, ...],
        locate: Locate,
    ) -> Explanation:
        name = slot.name(point)
        count = self._checked(name, indices, slot.shape)
        first, last = _ends(indices, slot.shape)
        file, path, entry = locate(slot.rank, name)
        rank = None if layout is self.originals else slot.rank
        here = Holding(rank, name, first, name, last, 1, count, file, bits_of(entry, first))
        if path is not None and count:
            here = self._read(here, path, entry.dtype)
        if isinstance(slot.template, Constant):
            wanted = np.asarray(slot.template.value, f"<{DTYPES[slot.template.dtype].code}")
            return self._explanation("constant", entry.dtype, slot.shape, here=here, constant=_plain(wanted))
        start = 0
        for at, size in zip(first, slot.shape, strict=True):
            start = start * size + at
        parts = []
        for leaf in dict.fromkeys(slot.template.leaves):
            for piece in layout.pieces.get(leaf, ()):
                if piece.slot is slot and (found := inside(piece, start, count)) is not None:
                    found |= {axis: (at, at + 1) for axis, at in point.items()}
                    parts.append(self._part(leaf, {axis: found[axis] for axis in piece.tensor.axes}, count == 1))
        padding = count - sum(part.elements for part in parts)
        return self._explanation(
            "element" if count == 1 else "box", entry.dtype, slot.shape, here=here, parts=tuple(parts), padding=padding
        )

    def _part(self, name: str, box: Box, single: bool) -> Part:
        tensor = self.tensors[name]
        held = tuple(self._holdings(self.source.layout, name, box, self._locate, single))
        elsewhere = self.originals is not self.source.layout  # else the published files are what holds it
        origins = tuple(self._holdings(self.originals, name, box, self._locate_original, single)) if elsewhere else ()
        count = tensor.count([box[axis] for axis in tensor.axes])
        return Part(name, box, dict(zip(tensor.axes, tensor.sizes, strict=True)), count, held, origins)

    def _holdings(self, layout: Layout, name: str, box: Box, locate: Locate, single: bool) -> Iterator[Holding]:
        """Everything in a layout that holds some of a box of a logical tensor, or of one that it is tied to;
        rank by rank.
        """
        pieces = [piece for same in self.same[name] for piece in layout.pieces.get(same, ())]
        for piece in sorted(pieces, key=lambda piece: piece.slot.rank):
            held = _intersection(piece, box)
            points = list(_points(piece, held)) if held is not None else []
            if held is None or not points:
                continue
            slot, first, last = piece.slot, piece.offset, piece.offset
            for axis, (low, _), stride in zip(piece.tensor.axes, piece.box, piece.strides, strict=True):
                first += (held[axis][0] - low) * (stride or 0)
                last += (held[axis][1] - 1 - low) * (stride or 0)
            names = slot.name(points[0]), slot.name(points[-1])
            file, path, entry = locate(slot.rank, names[0])
            rank = None if layout is self.originals else slot.rank
            start, end = unravel(first, slot.shape), unravel(last, slot.shape)
            count = piece.tensor.count([held[axis] for axis in piece.tensor.axes])
            found = Holding(rank, names[0], start, names[1], end, len(points), count, file, bits_of(entry, start), held)
            yield self._read(found, path, entry.dtype) if single and path is not None else found

    def _locate(self, rank: int, name: str) -> tuple[str, Path | None, Entry]:
        path, entry = self.source.locate((rank, name))
        return self.source.relative(path), self.source.local(path), entry

    def _locate_original(self, _: int, name: str) -> tuple[str, Path | None, Entry]:
        at, entry = self.source.tensors[name]
        file = self.source.originals[at].name
        return file, self.source.published_paths.get(file), entry

    def _read(self, holding: Holding, path: Path, dtype: str) -> Holding:
        data = self.pool.read(path, holding.byte, -(-holding.bits[1] // 8) - holding.byte)
        values = decode(dtype, data)
        return replace(holding, value=_plain(values[0]) if values is not None else None, raw=data.hex(" "))

    def _checked(self, name: str, indices: tuple[int, ...], shape: tuple[int, ...]) -> int:
        """The number of elements that are meant."""
        if len(indices) > len(shape):
            given = _counted(len(indices), "index", "indices")
            raise ReshardError(f"{self.asked}: {given}, {name} has {_counted(len(shape), 'dimension')}: {list(shape)}")
        for dimension, (at, size) in enumerate(zip(indices, shape, strict=False)):
            if at >= size:
                words = (
                    f"{self.asked}: index {at} is out of range for dimension {dimension} of {name}, which "
                    f"has size {size}"
                )
                raise ReshardError(words, f"its shape is {list(shape)}")
        return math.prod(shape[len(indices) :])

    def _explanation(self, kind: Kind, dtype: str, shape: tuple[int, ...], **given: Any) -> Explanation:
        found = Explanation(self.source.where, self.asked.strip(), kind, dtype, tuple(shape), **given)
        notes, layout = [], self.source.layout
        for part in found.parts if found.single else ():
            codes = {holding.code for holding in part.held} - {None}
            notes += ["the copies differ: reshard verify reports which are damaged"] * (len(codes) > 1)
        if found.padding:
            axes = {axis for piece in self._pieces(found) for axis in piece.tensor.axes} & layout.padding.keys()
            padded = [(axis, *layout.padding[axis]) for axis in sorted(axes)]
            notes += [f"{axis} has {size}, {stored} are stored, over all ranks" for axis, size, stored in padded]
        if not self.source.originals_known and any(part.origins for part in found.parts):
            notes.append("the original files are not known: shown as transformers would write them")
        return replace(found, notes=tuple(notes))

    def _pieces(self, found: Explanation) -> list[Piece]:
        here = found.here
        slot = _find(self.source.layout.by_rank[here.rank or 0], here.tensor) if here is not None else None
        leaves = getattr(slot[0].template, "leaves", ()) if slot is not None else ()
        return [piece for leaf in leaves for piece in self.source.layout.pieces.get(leaf, ())[:1]]

    # Errors

    def _elsewhere(self, rank: int, name: str) -> ReshardError:
        layout = self.source.layout
        ranks = [other for other in range(layout.mesh.world) if _find(layout.by_rank[other], name) is not None]
        if ranks:
            who = f"rank {folded(ranks)} has it" if len(ranks) == 1 else f"ranks {folded(ranks)} have it"
            return ReshardError(f"{self.asked}: rank {rank} has no {name}", who)
        names = [slot.name(point) for slot in layout.by_rank[rank] for point in slot.points()]
        hint = _nearest(name, names)
        if name in self.source.tensors:
            hint = f"the original has a tensor of that name: {name} without {rank}:"
        return ReshardError(f"{self.asked}: rank {rank} has no tensor {name}", hint)

    def unknown(self, name: str) -> ReshardError:
        layout = self.source.layout
        ranks = [rank for rank in range(layout.mesh.world) if _find(layout.by_rank[rank], name) is not None]
        if ranks:
            words = f"{self.asked}: {name} is stored by {_counted(len(ranks), 'rank')}: which one?"
            return ReshardError(words, f"for example {ranks[0]}:{self.asked.strip()}")
        for tied, same in self.same.items():  # a tied name that the original does not store
            row = next((row for row in layout.model.family.rows if row.leaves == (tied,)), None)
            if row is not None and row.name.text == name and len(same) > 1:
                return ReshardError(
                    f"{self.asked}: the original does not store {name}", f"it is tied to {same[1]}: ask for {same[1]}"
                )
        stored = {f"{slot.rank}:{slot.name(point)}" for slot in layout.by_rank[0] for point in slot.points()}
        hint = _nearest(name, [*self.source.tensors, *self.tensors]) or _nearest(f"0:{name}", sorted(stored))
        return ReshardError(f"{self.asked}: {self.source.where} has no tensor {name}", hint)


def _find(slots: Sequence[Slot], name: str) -> tuple[Slot, Point] | None:
    """The slot and the point of a stored name."""
    for slot in slots:
        text = slot.template.name.text
        if name.startswith(text.split("{")[0]) and name.endswith(text.split("}")[-1]):
            for point in slot.points():
                if slot.name(point) == name:
                    return slot, point
    return None


def _nearest(name: str, names: Sequence[str]) -> str | None:
    """A hint with the nearest names. Compared without their numbers, there being tens of thousands;
    those with the same numbers win.
    """
    kinds: dict[str, dict[tuple[int, ...], str]] = {}
    for other in names:
        kind, numbers = fold(other)
        kinds.setdefault(kind, {})[numbers] = other
    kind, numbers = fold(name)
    close = difflib.get_close_matches(kind, kinds, 3, 0.6)
    found = [kinds[other][min(kinds[other], key=lambda those: _apart(those, numbers))] for other in close]
    return f"the nearest {'name is' if len(found) == 1 else 'names are'} {', '.join(found)}" if found else None


def _apart(these: Sequence[int], those: Sequence[int]) -> tuple[int, int]:
    """How far apart the numbers of two names are."""
    return abs(len(these) - len(those)), sum(abs(a - b) for a, b in zip(these, those, strict=False))


def _counted(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _ends(indices: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first and the last element under leading indices."""
    rest = shape[len(indices) :]
    return (*indices, *(0 for _ in rest)), (*indices, *(max(0, size - 1) for size in rest))


def _intersection(piece: Piece, box: Box) -> Box | None:
    found = {}
    for axis, (low, high) in zip(piece.tensor.axes, piece.box, strict=True):
        found[axis] = max(low, box[axis][0]), min(high, box[axis][1])
        if found[axis][0] >= found[axis][1]:
            return None
    return found


def _points(piece: Piece, box: Box) -> Iterator[Point]:
    """The points of the enumerated axes at which a slot has a tensor."""
    axes = [axis for axis, stride in zip(piece.tensor.axes, piece.strides, strict=True) if stride is None]
    there = piece.tensor.layers if piece.slot.layers is None else piece.slot.layers
    ranges = [[at for at in range(*box[axis]) if axis != "layer" or there is None or at in there] for axis in axes]
    for numbers in product(*ranges):
        yield dict(zip(axes, numbers, strict=True))


def _plain(value: Any) -> Value:
    """A value as JSON and people have it; what JSON has no number for is a text."""
    plain = value.item()
    if isinstance(plain, complex) or (isinstance(plain, float) and not math.isfinite(plain)):
        return str(plain)
    return plain  # type: ignore[no-any-return]
