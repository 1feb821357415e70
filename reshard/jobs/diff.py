"""Differences of two checkpoints of any layouts, logical tensor by logical tensor: the plan from one to the other,
comparing.

Elements are equal if their bits are. Where they are not, floating-point values are decoded to float64, as they are
stored: scales of block-quantised weights are tensors of their own. Of replicas the one on the lowest rank is read;
`verify` is for the others.
"""

import dataclasses
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Struct, UnsetType, field

from ..checkpoints.source import Source
from ..containers.dtypes import BITS
from ..containers.entry import Entry
from ..containers.values import decode, floating
from ..engine import worker
from ..engine.worker import Key
from ..errors import ReshardError
from ..inputs.decode import about
from ..layout.cut import Piece
from ..layout.join import plan
from ..model.understand import Tensor
from ..store.local import Pool
from ..text.progress import Progress, Silent, until
from ..text.units import folded
from .explain import bracketed, inside, unravel, wrapped
from .json_result import as_json

MOST = 20  # differences that `lines` lists
CHUNK = 256 << 10  # bytes decoded at a time: float64 is up to eight times as large, and there are several of them

Array = np.ndarray[Any, np.dtype[Any]]
Status = Literal["equal", "differs", "shape", "dtype", "only in A", "only in B"]
Number = float | str | None  # a text where JSON has no number: infinity


@dataclass(frozen=True)
class Row:
    """One logical tensor in one layer (None: it has no layers), or one buffer that is kept aside.

    `status`: "equal", "differs", "shape", "dtype", "only in A" or "only in B"; `a` and `b` say what it is there.
    `differing`: elements whose bits differ; `odd`: those of them that are infinite or no number on either side.
    `largest`: the largest difference of the others, and `rms` over all `elements`, the odd ones left out; both None
    unless floating point. `side`, `worst`: in which checkpoint, and where, the first odd element or else the largest
    difference is, as `explain` takes it.
    """

    tensor: str
    layer: int | None
    status: Status
    a: str = ""
    b: str = ""
    elements: int = 0
    differing: int = 0
    largest: float | None = None
    rms: float | None = None
    odd: int = 0
    side: str = ""
    worst: str = ""
    buffer: bool = False

    @property
    def name(self) -> str:
        return self.tensor if self.layer is None else f"{self.tensor} layer {self.layer}"

    @property
    def result(self) -> "RowResult":
        differs, compared = self.status == "differs", self.status in ("equal", "differs")
        return RowResult(
            tensor=self.tensor,
            layer=self.layer,
            status=self.status,
            buffer=self.buffer or UNSET,
            elements=self.elements if compared else UNSET,
            a=UNSET if compared else self.a,
            b=UNSET if compared else self.b,
            differing=self.differing if differs else UNSET,
            max=_number(self.largest) if differs else UNSET,
            rms=_number(self.rms) if differs else UNSET,
            odd=self.odd if differs else UNSET,
            worst=Worst(self.side, self.worst) if differs else UNSET,
        )


class Worst(Struct, frozen=True):
    """Where the largest difference is, or the first element that is infinite or no number."""

    side: Annotated[str, about("A, B; empty where elements have no values.")] = field(name="in")
    at: Annotated[str, about("As `reshard explain` takes it.")]


class RowResult(Struct, frozen=True, kw_only=True):
    """One logical tensor in one layer. `a` and `b`: what it is there, where it cannot be compared."""

    tensor: str
    layer: Annotated[int | None, about("null: it has no layers.")]
    status: Status
    buffer: Annotated[bool | UnsetType, about("A buffer that engines recompute.")] = UNSET
    elements: int | UnsetType = UNSET
    a: str | UnsetType = UNSET
    b: str | UnsetType = UNSET
    differing: Annotated[int | UnsetType, about("Elements whose bits differ.")] = UNSET
    max: Annotated[Number | UnsetType, about("The largest difference; null unless floating point.")] = UNSET
    rms: Annotated[Number | UnsetType, about("Over all elements, without the odd ones.")] = UNSET
    odd: Annotated[int | UnsetType, about("Differing elements that are infinite or no number.")] = UNSET
    worst: Worst | UnsetType = UNSET


class DiffResult(Struct, frozen=True):
    """reshard diff --json, version 1."""

    a: str
    b: str
    equal: Annotated[bool, about("The exit code: whether nothing differs.")]
    counts: Annotated[dict[Status, int], about("Rows of each status.")]
    rows: Annotated[tuple[RowResult, ...], about("The worst first, those that are equal last.")]
    notes: Annotated[tuple[str, ...], about("What does not count as a difference.")]


def _number(value: float | None) -> Number:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints: a row for each logical tensor and layer; `notes`: what does not count."""

    a: str
    b: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs. The exit code of the command is 1 if anything does."""
        return all(row.status == "equal" for row in self.rows)

    @property
    def worst_first(self) -> list[Row]:
        """The rows that differ: what cannot be compared, then by falling largest difference."""
        order = ("only in A", "only in B", "shape", "dtype", "differs")

        def place(row: Row) -> tuple[Any, ...]:
            share = row.differing / max(1, row.elements)
            largest = math.inf if row.odd else row.largest or 0.0
            return (
                order.index(row.status),
                -largest,
                -(row.largest or 0.0),
                -share,
                row.tensor,
                -1 if row.layer is None else row.layer,
            )

        return sorted((row for row in self.rows if row.status != "equal"), key=place)

    def to_json(self) -> dict[str, Any]:
        """As DiffResult."""
        counts = dict(sorted(Counter(row.status for row in self.rows).items()))
        same = (row for row in self.rows if row.status == "equal")
        rows = tuple(row.result for row in (*self.worst_first, *same))
        found: dict[str, Any] = as_json(DiffResult(self.a, self.b, self.equal, counts, rows, self.notes))
        return found

    def lines(self) -> list[str]:
        """What a person wants to know, in at most 80 columns: equal tensors are counted, others listed,
        the worst first.
        """
        same = sum(row.status == "equal" for row in self.rows)
        lines = [*wrapped(f"A  {self.a}"), *wrapped(f"B  {self.b}")]
        shown: list[list[str]] = [
            *self._folded(),
            *(_differs(row) for row in self.worst_first if row.status == "differs"),
        ]
        for words in shown[:MOST]:
            lines += words
        if len(shown) > MOST:
            lines.append(f"… and {len(shown) - MOST} more; --json has all")
        for note in self.notes:
            lines += wrapped(note)
        elements = sum(row.elements for row in self.rows)
        if self.equal:
            verdict = f"equal: all {same} tensors, {elements:,} elements, bit by bit"
        else:
            differing = sum(row.differing for row in self.rows)
            verdict = (
                f"{len(self.rows) - same} of {len(self.rows)} tensors differ, {differing:,} of "
                f"{elements:,} elements compared"
            )
        return [
            *lines,
            *wrapped(verdict),
            *(["(a tensor is counted once per layer)"] if any(row.layer is not None for row in self.rows) else []),
        ]

    def _folded(self) -> Iterator[list[str]]:
        """What cannot be compared, equal layers together."""
        groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
        for row in self.worst_first:
            if row.status != "differs":
                groups[row.tensor, row.status, row.a, row.b] += [row.layer] if row.layer is not None else []
        for (tensor, status, a, b), layers in groups.items():
            name = f"{tensor} layer{'s' if len(layers) > 1 else ''} {folded(sorted(layers))}" if layers else tensor
            yield wrapped(
                f"{name}  {status}: {a or b}"
                if status.startswith("only")
                else f"{name}  {status}: A has {a}, B has {b}"
            )


def _differs(row: Row) -> list[str]:
    text = f"{row.name}  {row.differing:,} of {row.elements:,} elements differ"
    if row.largest is not None and row.rms is not None:
        text += f", max {row.largest:.6g}, rms {row.rms:.6g}"
    if row.odd:
        text += f"; {row.odd:,} are infinite or NaN"
    return [*wrapped(text), *(wrapped(f"worst in {row.side} at {row.worst}", 2) if row.worst else [])]


# --- what can be compared ---------------------------------------------------------------------------------------------


def difference(a: Source, b: Source, threads: int, progress: Progress | None = None) -> Difference:
    """Compare two checkpoints, logical tensor by logical tensor; memory is the engine's.

    Tensors that are missing on one side or have another shape or dtype there are reported, the rest is compared. Raises
    ReshardError if they have no tensor in common.
    """
    progress = progress or Silent()
    mine, theirs = a.layout.model.tensors, b.layout.model.tensors
    if not mine.keys() & theirs.keys():
        one, other = a.layout.model.family.name, b.layout.model.family.name
        raise ReshardError(
            f"{a.where} is a {one} model with {len(mine)} kinds of tensors, {b.where} is a {other} model with "
            f"{len(theirs)}: "
            "they have none in common",
            "compare two checkpoints of the same architecture",
        )
    rows: list[Row] = []
    alike: dict[str, list[int | None]] = {}
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name in a.layout.pieces or name in b.layout.pieces or not (name in mine and name in theirs):
            for row in _compared(name, mine.get(name), theirs.get(name)):
                if row.status == "equal":
                    alike.setdefault(name, []).append(row.layer)
                else:
                    rows.append(row)
    forward = {name: layers for name, layers in alike.items() if name in b.layout.pieces}
    # in B only under the name that it is tied to
    backward = {name: layers for name, layers in alike.items() if name not in forward}
    total = sum(mine[name].elements * BITS[mine[name].dtypes[0]] // 8 for name in alike)
    progress.start("comparing", total)
    with closing(Pool()) as pool:
        rows += _run(a, b, forward, "B", pool, threads, progress)
        rows += _run(b, a, backward, "A", pool, threads, progress)
        rows += _buffers(a, b, pool)
    progress.finish()
    return Difference(a.where, b.where, tuple(rows), tuple(_notes(a, b)))


def _compared(name: str, a: Tensor | None, b: Tensor | None) -> Iterator[Row]:
    """A row for each layer; "equal" is what can be compared."""
    layers = sorted(
        {layer for tensor in (a, b) if tensor for layer in _layers(tensor)},
        key=lambda layer: -1 if layer is None else layer,
    )
    for layer in layers:
        one, other = (tensor if tensor is not None and layer in _layers(tensor) else None for tensor in (a, b))
        if one is None or other is None:
            yield Row(name, layer, "only in B" if one is None else "only in A", _said(one, layer), _said(other, layer))
            continue
        status: Status = "equal"
        if sorted(_shape(one)) != sorted(_shape(other)) or (layer is None) != ("layer" not in one.axes):
            status = "shape"
        elif _dtype(one, layer) != _dtype(other, layer):
            status = "dtype"
        yield Row(name, layer, status, _said(one, layer), _said(other, layer))


def _layers(tensor: Tensor) -> Sequence[int | None]:
    return tensor.layers or () if "layer" in tensor.axes else (None,)


def _shape(tensor: Tensor) -> list[tuple[str, int]]:
    return [(axis, size) for axis, size in zip(tensor.axes, tensor.sizes, strict=True) if axis != "layer"]


def _dtype(tensor: Tensor, layer: int | None) -> str:
    return tensor.dtype({} if layer is None else {"layer": layer})


def _said(tensor: Tensor | None, layer: int | None) -> str:
    if tensor is None:
        return ""
    return f"{_dtype(tensor, layer)} ({', '.join(f'{axis} {size}' for axis, size in _shape(tensor))})"


def _restricted(pieces: Iterable[Piece], layers: Sequence[int | None]) -> tuple[Piece, ...]:
    """The same pieces, of which a plan sees only some layers; the axes in one order, families may have others."""
    there = tuple(layer for layer in layers if layer is not None)
    return tuple(_piece(piece, there) for piece in pieces)


def _piece(piece: Piece, layers: tuple[int, ...]) -> Piece:
    tensor = piece.tensor
    order = sorted(range(len(tensor.axes)), key=lambda at: tensor.axes[at])
    axes, sizes = tuple(tensor.axes[at] for at in order), tuple(tensor.sizes[at] for at in order)
    seen = replace(tensor, axes=axes, sizes=sizes, layers=layers or tensor.layers)
    return replace(
        piece, tensor=seen, box=tuple(piece.box[at] for at in order), strides=tuple(piece.strides[at] for at in order)
    )


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass
class _Count:
    """What differs in the part of a logical tensor that one stored tensor holds."""

    differing: int = 0
    largest: float = 0.0
    squares: list[float] = dataclasses.field(default_factory=list)
    odd: int = 0
    at: int = 0  # element of the stored tensor
    odd_at: int | None = None

    def add(self, dtype: str, one: Array, other: Array, offset: int) -> None:
        """Bytes of the same elements on both sides, the first of them at byte `offset` of the stored tensor."""
        bits = BITS[dtype]
        if bits < 8:  # several elements a byte, little-endian
            places = np.flatnonzero(np.unpackbits(np.bitwise_xor(one, other).view(np.uint8), bitorder="little"))
            elements = np.unique((offset * 8 + places) // bits)
            if len(elements) and not self.differing:
                self.at = int(elements[0])
            self.differing += len(elements)
            return
        kind = f"u{bits // 8}"
        places = np.flatnonzero(one.view(kind) != other.view(kind))
        if not len(places):
            return
        first = offset * 8 // bits
        if not self.differing:
            self.at = first + int(places[0])
        self.differing += len(places)
        if floating(dtype):
            self._measure(dtype, one.view(kind)[places], other.view(kind)[places], first, places)

    def _measure(self, dtype: str, one: Array, other: Array, first: int, places: Array) -> None:
        with np.errstate(all="ignore"):
            x, y = decode(dtype, one.tobytes()), decode(dtype, other.tobytes())
            if x is None or y is None:
                return
            numbers = np.isfinite(x) & np.isfinite(y)
            apart = np.abs(x - y)[numbers]
            self.odd += len(places) - len(apart)
            if self.odd_at is None and len(apart) < len(places):
                self.odd_at = first + int(places[np.argmin(numbers)])
            if not len(apart):
                return
            largest = float(apart.max())
            if largest > self.largest:
                self.largest, self.at = largest, first + int(places[numbers][np.argmax(apart)])
            self.squares.append(float(np.square(apart).sum()))
        if len(self.squares) > 1000:
            self.squares = [math.fsum(self.squares)]


class _Comparer:
    """A sink that reads what the other side has and counts what differs."""

    def __init__(
        self, place: Source, held: Mapping[Key, list[Piece]], pool: Pool, counts: dict[tuple[str, Key], _Count]
    ) -> None:
        self.place, self.held, self.pool, self.counts = place, held, pool, counts
        self._buffer = np.empty(worker.TILE, np.uint8)

    def put(self, key: Key, offset: int, data: memoryview) -> None:
        path, entry = self.place.locate(key)
        found, wanted = self._buffer[: len(data)], np.frombuffer(data, np.uint8)
        self.pool.read_into(path, entry.offset + offset, found.data)
        count = None
        for at in range(0, len(data), CHUNK):
            one, other = wanted[at : at + CHUNK], found[at : at + CHUNK]
            if np.array_equal(one, other):
                continue
            # one copy is of one logical tensor, and of each stored tensor one thread at a time has a part
            if count is None:
                count = self.counts.setdefault((self._tensor(key, entry, offset), key), _Count())
            count.add(entry.dtype, one, other, offset + at)

    def _tensor(self, key: Key, entry: Entry, offset: int) -> str:
        pieces = self.held[key]
        if len(pieces) > 1:
            start = _row_major(entry, offset * 8 // BITS[entry.dtype])
            pieces = [piece for piece in pieces if inside(piece, start) is not None]
        return pieces[0].tensor.name

    def done(self, keys: Iterable[Key]) -> None:
        """Nothing is written."""


def _row_major(entry: Entry, at: int) -> int:
    """The number of an element in its tensor, given its place in storage."""
    if entry.strides is None:
        return at
    indices = dict.fromkeys(range(len(entry.shape)), 0)
    for stride, axis in sorted(
        ((stride, axis) for axis, stride in enumerate(entry.strides) if entry.shape[axis] > 1), reverse=True
    ):
        indices[axis], at = divmod(at, stride) if stride else (0, at)
    number = 0
    for axis, size in enumerate(entry.shape):
        number = number * size + indices[axis]
    return number


def _run(
    src: Source,
    dst: Source,
    alike: Mapping[str, list[int | None]],
    side: str,
    pool: Pool,
    threads: int,
    progress: Progress,
) -> list[Row]:
    """Rows of what both have, alike in shape and dtype, and `dst`, which is `side`, under its own name."""
    wanted = {name: _restricted(dst.layout.distinct(name), layers) for name, layers in alike.items()}
    there = {name: _restricted(src.layout.holding(name), layers) for name, layers in alike.items()}
    held: dict[Key, list[Piece]] = defaultdict(list)
    layer_of: dict[Key, int | None] = {}
    for pieces in wanted.values():
        for piece in pieces:
            for point in piece.slot.points():
                key = piece.slot.rank, piece.slot.name(point)
                held[key].append(piece)
                layer_of[key] = point.get("layer")
    counts: dict[tuple[str, Key], _Count] = {}
    if wanted:
        joined = plan(replace(src.layout, pieces=there), replace(dst.layout, pieces=wanted))
        halt = threading.Event()
        sink: Callable[[], _Comparer] = lambda: _Comparer(dst, held, pool, counts)  # noqa: E731
        advance = until(halt, progress.advance)
        worker.run(joined, src, dst, sink, workers=threads, pool=pool, progress=advance, stop=halt)
    found: dict[tuple[str, int | None], list[tuple[Key, _Count]]] = defaultdict(list)
    for (name, key), count in sorted(counts.items(), key=lambda item: item[0]):
        found[name, layer_of[key]].append((key, count))
    rows = []
    for name, layers in alike.items():
        tensor = dst.layout.model.tensors[name]
        elements = math.prod(size for _, size in _shape(tensor))
        stacked = "layer" in tensor.axes and any(
            piece.strides[piece.tensor.axes.index("layer")] is not None for piece in wanted[name]
        )
        if stacked:  # all layers in one stored tensor: one row
            rows.append(
                _row(dst, name, None, elements * len(layers), found[name, None], side, _dtype(tensor, layers[0]))
            )
            continue
        rows += [_row(dst, name, layer, elements, found[name, layer], side, _dtype(tensor, layer)) for layer in layers]
    return rows


def _row(
    dst: Source, name: str, layer: int | None, elements: int, counts: list[tuple[Key, _Count]], side: str, dtype: str
) -> Row:
    if not counts:
        return Row(name, layer, "equal", elements=elements)
    differing = sum(count.differing for _, count in counts)
    odd = sum(count.odd for _, count in counts)
    key, worst = next(
        (item for item in counts if item[1].odd_at is not None), max(counts, key=lambda item: item[1].largest)
    )
    at = worst.at if worst.odd_at is None else worst.odd_at
    entry = dst.locate(key)[1]
    text = f"{dst.address(key)}{bracketed(unravel(_row_major(entry, at), entry.shape))}"
    largest = rms = None
    if floating(dtype):
        largest = max(count.largest for _, count in counts)
        rms = math.sqrt(math.fsum(square for _, count in counts for square in count.squares) / elements)
    return Row(name, layer, "differs", "", "", elements, differing, largest, rms, odd, side, text)


# --- what is kept aside -----------------------------------------------------------------------------------------------


def _buffers(a: Source, b: Source, pool: Pool) -> Iterator[Row]:
    """Buffers that both keep aside."""
    for name in a.layout.model.aside:
        if name not in b.layout.model.aside:
            continue
        (one, (_, n, path, start)), (other, (_, m, place, there)) = a.buffer(name), b.buffer(name)
        elements, count = math.prod(one.shape), _Count()
        if (one.dtype, one.shape, one.strides, n) != (other.dtype, other.shape, other.strides, m):
            said, also = (
                f"{entry.dtype} {list(entry.shape)}{' strided' if entry.strides else ''}" for entry in (one, other)
            )
            yield Row(name, None, "dtype" if one.dtype != other.dtype else "shape", said, also, buffer=True)
            continue
        for at in range(0, n, CHUNK):
            size = min(CHUNK, n - at)
            x, y = (
                np.frombuffer(pool.read(file, begin + at, size), np.uint8)
                for file, begin in ((path, start), (place, there))
            )
            if not np.array_equal(x, y):
                count.add(one.dtype, x, y, at)
        if not count.differing:
            yield Row(name, None, "equal", elements=elements, buffer=True)
            continue
        largest = count.largest if floating(one.dtype) else None
        rms = math.sqrt(math.fsum(count.squares) / elements) if floating(one.dtype) else None
        at = count.at if count.odd_at is None else count.odd_at
        worst = f"{name}{bracketed(unravel(_row_major(other, at), other.shape))}"
        yield Row(name, None, "differs", "", "", elements, count.differing, largest, rms, count.odd, "B", worst, True)


def _notes(a: Source, b: Source) -> Iterator[str]:
    """What is no difference of weights."""
    for one, other, side in ((a, b, "A"), (b, a, "B")):
        alone = [name for name in one.layout.model.aside if name not in other.layout.model.aside]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            yield (
                f"buffers that an engine recomputes are only in {side}, which does not count as a "
                f"difference: {alone[0]}{more}"
            )
