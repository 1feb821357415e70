"""Fingerprints: a line per logical tensor and one for the model, the same in whatever layout the weights lie.

    tensor = sum over its elements e of  K(e) · (c + v(e))   mod p = 2^31 - 1, in four independent lanes, 128 bits
                                                             printed
    K(e)   = product over the named axes of  m[axis][index of e on that axis]
    v(e)   = the element's bits: one number of up to 16 bits, or u[0]·(lowest 16 bits) + u[1]·(next 16 bits) + …
    model  = xxh3-128 over the sorted lines

m, u and c are drawn from 1 … p - 1 by SHAKE-128 of (seed, axis, index), c by the name of the dtype. A sum needs no
order and no neighbours, so that a rank hashes the boxes that it holds, on its own node, and the shares of all ranks add
up to the model's (`combine`). Of each box that several ranks hold (norms, repeated KV heads) the copy on the lowest of
them counts: a fingerprint says nothing about the other copies, `verify` does. Padding, constants and buffers kept aside
do not count.

What it detects. The difference of two contents of one tensor is a polynomial in the multipliers, linear in each, of
degree d: the number of axes, one more for elements of over 16 bits (d ≤ 6). It is not zero as a polynomial if any bit
differs, for a difference of two numbers of 16 bits is not zero modulo p. So by Schwartz and Zippel any two given
contents have one fingerprint with probability at most (d / (p - 1))^4 < 2^-113 over the choice of the seed, be it one
bit, elements exchanged, rows permuted, axes transposed or values moved to another layer. A change of a single element
of up to 16 bits is always seen: no multiplier is zero. Because of c a zero counts at its place: that it is missing is
seen, and so is another dtype with equal bits. What it is not: cryptographic. The seed is public, and who knows it can
make, by solving linear equations, two contents of one fingerprint; against that only a seed drawn after the contents
helps.

Names have no part in a tensor's sum, so that equal tensors have equal lines, and two that were exchanged show each
other's; names of axes have. Tied tensors: every logical name has its line, a name of which nothing is stored that of
the tensor which it is tied to; so it makes no difference whether a layout stores one or both of two equal tensors.

Speed: elements become float64 and go through BLAS with the multipliers of the innermost axes, 256 at a time: |v| ≤ 2^15
and |m| < 2^30 make sums of at most 2^53, so every one is exact and in whatever order. The rest, a 64th, is integers.

Knows nothing about the command line, engines or torch.
"""

import hashlib
import json
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct, field, structs
from numpy.lib.stride_tricks import as_strided

from ..checkpoints import manifest, source
from ..checkpoints.source import Source
from ..containers.dtypes import BITS, BY_TORCH
from ..containers.entry import Entry, extent
from ..engine.worker import Key
from ..errors import MismatchError, ReshardError
from ..inputs import decode, limits
from ..inputs.decode import about
from ..layout import identity
from ..layout.cut import Layout, Piece, Point, Slot
from ..store.digest import Digest, of
from ..store.directory import unchanged
from ..store.local import Pool
from ..store.store import AnyFile
from ..text.progress import Progress, Silent
from ..threads import each
from .json_result import as_json

VERSION = "1"
P = 2**31 - 1
LANES = 4
RANKS = 65536  # of a layout, at most; as in `Mesh`
MOST = 2**63 - 1  # elements of a tensor
TILE = 4 << 20  # bytes read at a time
FLOATS = 1 << 18  # elements turned into float64 at a time
BLOCK = 256  # products of 15 and 30 bits that a float64 adds up exactly
ROWS = 128  # rows that go through BLAS together: small enough that it starts no threads of its own
NARROW = 64  # elements: inner axes are joined until they are as long
WIDE = 1 << 16  # elements: but not beyond this

Array = np.ndarray[Any, Any]
Sums = tuple[int, ...]  # one per lane
Dim = tuple[str, int, int, int]  # axis, low, high, stride in elements
Read = Callable[[int, int], Array]  # bytes [low, high) of a stored tensor's data


# --- multipliers ------------------------------------------------------------------------------------------------------


class Keys:
    """The multipliers of every axis, made when first asked for; safe among threads. `seed`: any text."""

    def __init__(self, seed: str = "") -> None:
        self.seed = seed
        self._lock = threading.Lock()
        self._axes: dict[str, Array] = {}
        self._panels: dict[tuple[tuple[str, int, int], ...], Array] = {}

    def axis(self, name: str, n: int) -> Array:
        """[at least n, LANES] numbers from 1 to P - 1. Those of an index do not depend on n."""
        found = self._axes.get(name)
        if found is None or len(found) < n:
            with self._lock:
                raw = hashlib.shake_128(
                    f"reshard fingerprint {VERSION}\0{self.seed}\0{name}".encode(errors="surrogateescape")
                ).digest(8 * LANES * n)
                numbers = np.frombuffer(raw, "<u8").reshape(n, LANES) % np.uint64(P - 1)
                found = self._axes[name] = numbers.astype(np.int64) + 1
        return found

    def constant(self, dtype: str) -> Array:
        """[LANES]: c of a dtype."""
        return np.asarray(self.axis(f"\0dtype {dtype}", 1)[0])

    def outer(self, dims: Iterable[tuple[str, int, int]]) -> Array:
        """[product of the extents, LANES]: the products of the multipliers of a box, in row-major order."""
        product = np.ones((1, LANES), np.int64)
        for name, low, high in dims:
            product = (product[:, None] * self.axis(name, high)[None, low:high] % P).reshape(-1, LANES)
        return product

    def panel(self, dims: tuple[tuple[str, int, int], ...]) -> Array:
        """The same as float64 of either sign, [blocks, BLOCK, LANES], zeros at the end; the last few are kept."""
        found = self._panels.get(dims)
        if found is None:
            product = self.outer(dims)
            found = np.zeros((-(-len(product) // BLOCK), BLOCK, LANES))
            found.reshape(-1, LANES)[: len(product)] = np.where(product > P // 2, product - P, product)
            with self._lock:
                while self._panels and sum(map(len, self._panels.values())) > (8 << 20) // (BLOCK * LANES * 8):
                    del self._panels[next(iter(self._panels))]
                self._panels[dims] = found
        return found


# --- sums -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Box:
    """A strided box of a stored tensor that counts towards logical tensor `into`. `dims` by falling stride;
    `factor`: what K has beside.
    """

    into: int
    offset: int  # elements
    dims: tuple[Dim, ...]
    factor: Array

    @property
    def end(self) -> int:
        return self.offset + sum((high - low - 1) * stride for _, low, high, stride in self.dims) + 1

    def part(self, start: int, stop: int, keys: Keys) -> "Box":
        """The box with its first dimension restricted to [start, stop) of its extent."""
        (axis, low, _, stride), rest = self.dims[0], self.dims[1:]
        offset = self.offset + start * stride
        if stop - start == 1:
            return Box(self.into, offset, rest, self.factor * keys.axis(axis, low + stop)[low + start] % P)
        return Box(self.into, offset, ((axis, low + start, low + stop, stride), *rest), self.factor)


def tiles(boxes: Sequence[Box], most: int, keys: Keys) -> Iterator[list[Box]]:
    """The boxes in groups whose stretches are at most `most` elements: those that overlap (gate and up by turns) are
    read together.
    """
    for cluster in _clusters(boxes):
        low, high = cluster[0].offset, max(box.end for box in cluster)
        if high - low <= most:
            yield cluster
            continue
        outermost = {(b.dims[0][2] - b.dims[0][1], b.dims[0][3]) if b.dims else (1, 0) for b in cluster}
        if len(outermost) > 1:
            for box in cluster:
                yield from tiles([box], most, keys)
            continue
        ((count, stride),) = outermost
        step = max(1, (most - (high - low - (count - 1) * stride)) // stride + 1)
        for start in range(0, count, step):
            yield from tiles([box.part(start, min(start + step, count), keys) for box in cluster], most, keys)


def _clusters(boxes: Iterable[Box]) -> Iterator[list[Box]]:
    cluster: list[Box] = []
    reach = -1
    for box in sorted(boxes, key=lambda box: box.offset):
        if cluster and box.offset >= reach:
            yield cluster
            cluster = []
        cluster.append(box)
        reach = max(reach, box.end)
    if cluster:
        yield cluster


class Summer:
    """One thread's buffers, and how it sums a box."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.bytes = np.empty(TILE + 64, np.uint8)
        self._floats = np.empty(FLOATS)

    def tile(self, dtype: str, boxes: Sequence[Box], read: Read) -> Iterator[tuple[int, Array]]:
        """(into, [LANES] sum of K·v) of each box of a tile; c is not in it."""
        bits, low, high = BITS[dtype], boxes[0].offset, max(box.end for box in boxes)
        whole = 8 // math.gcd(bits, 8)  # elements that fill whole bytes together
        low, high = low // whole * whole, -(-high // whole) * whole
        values = _values(read(low * bits // 8, high * bits // 8), bits)
        parts = max(1, bits // 16)
        for box in boxes:
            dims = [(axis, start, stop, stride * parts) for axis, start, stop, stride in box.dims]
            if parts > 1:
                dims.append(("\0part", 0, parts, 1))
            yield box.into, self._box(values[(box.offset - low) * parts :], dims) * box.factor % P

    def _box(self, values: Array, dims: Sequence[Dim]) -> Array:
        extents = [high - low for _, low, high, _ in dims]
        level, width = len(dims), 1
        while level and (width == 1 or (width < NARROW and width * extents[level - 1] <= WIDE)):
            level -= 1
            width *= extents[level]
        ranges = tuple((axis, low, high) for axis, low, high, _ in dims)
        strided = as_strided(
            values, tuple(extents), tuple(stride * values.itemsize for *_, stride in dims), writeable=False
        )
        rows = self._rows(strided.reshape(-1, width), self.keys.panel(ranges[level:]))
        return np.asarray((rows * self.keys.outer(ranges[:level]) % P).sum(axis=0) % P)

    def _rows(self, matrix: Array, panel: Array) -> Array:
        """[rows, width] values times [width, LANES] multipliers, modulo P."""
        count, width = matrix.shape
        total = np.zeros((count, LANES), np.int64)
        whole, rest = divmod(width, BLOCK)
        step = min(count, ROWS)
        most = min(FLOATS // (step * BLOCK), BLOCK)  # blocks: their sums are 2^53 each, far from 2^63
        for row in range(0, count, step):
            here, sums = matrix[row : row + step], total[row : row + step]
            n = len(here)
            for block in range(0, whole, most):
                m = min(most, whole - block)
                floats = self._floats[: n * m * BLOCK].reshape(n, m, BLOCK)
                np.copyto(floats, here[:, block * BLOCK : (block + m) * BLOCK].reshape(n, m, BLOCK))
                sums += np.matmul(floats.transpose(1, 0, 2), panel[block : block + m]).astype(np.int64).sum(axis=0)
                sums %= P
            if rest:
                last = self._floats[: n * rest].reshape(n, rest)
                np.copyto(last, here[:, whole * BLOCK :])
                sums += np.matmul(last, panel[whole, :rest]).astype(np.int64)
        total %= P
        return total


def _values(data: Array, bits: int) -> Array:
    """Bytes as numbers: signed of 16 bits, several to a wide element, lowest first; one of at most 8 bits to a narrow
    one.
    """
    if bits >= 16:
        return data.view("<i2")
    if bits == 8:
        return data
    one = np.unpackbits(data, bitorder="little").reshape(-1, bits)
    return np.packbits(one, axis=1, bitorder="little").reshape(-1)


# --- what counts where ------------------------------------------------------------------------------------------------


_Number = Annotated[int, Meta(ge=0, le=MOST)]


class Line(Struct, frozen=True):
    """The sum of one logical tensor, or a share of it."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    sizes: Annotated[tuple[_Number, ...], about("Of each axis all that there is; of `layer` the layers that exist.")]
    elements: Annotated[_Number, about("Those that were counted.")]
    value: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{8 * LANES}}}$", max_length=8 * LANES)] = field(name="fingerprint")

    @property
    def sums(self) -> Sums:
        return tuple(int(self.value[at : at + 8], 16) for at in range(0, len(self.value), 8))

    @property
    def tensor(self) -> str:
        """What it is, in words."""
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.sizes, strict=True))
        return f"{self.dtype:<8} {self.name} [{sizes}]"

    @property
    def text(self) -> str:
        return f"{self.value}  {self.tensor}"


class Share(Struct, frozen=True, kw_only=True):
    """reshard fingerprint --rank --json, version 1."""

    version: Annotated[str, about("Of fingerprints: only equal ones compare.")] = field(
        name="fingerprint", default=VERSION
    )
    seed: str
    ranks: tuple[_Number, ...]
    world: Annotated[int, Meta(ge=1, le=RANKS)]
    facts: Annotated[str, about("A digest of model, layout and mesh, equal for all ranks.")]
    lines: tuple[Line, ...] = field(name="tensors")

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = as_json(self)
        return found


class Fingerprint(Struct, frozen=True, kw_only=True):
    """reshard fingerprint --json, version 1."""

    version: Annotated[str, about("Of fingerprints: only equal ones compare.")] = field(
        name="fingerprint", default=VERSION
    )
    seed: str
    model: Annotated[Digest, about("Over the seed and the lines of all tensors.")]
    lines: Annotated[tuple[Line, ...], about("The logical tensors by name.")] = field(name="tensors")

    def text(self) -> str:
        """A line per logical tensor, and one for the model."""
        return "\n".join([*(line.text for line in self.lines), f"{self.model}  model"])

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = as_json(self)
        return found


class _Version(Struct):
    fingerprint: Any


def read_share(path: Path) -> Share:
    """A share from a file, as `Share.to_json` wrote it."""
    text = decode.read(path, limits.SHARE, hint="give files of shares, one for each rank")
    where, hint = f"{path}: is not a share of a fingerprint", "give the output of `reshard fingerprint PATH --rank N`"
    version = decode.json_of(text, limits.SHARE, where, _Version, hint=hint).fingerprint
    if version != VERSION:
        raise ReshardError(
            f"{where}: fingerprint version {version!r}, this is version {VERSION}", "use one version for all ranks"
        )
    share: Share = decode.json_of(text, limits.SHARE, where, Share, hint=hint)
    if odd := next((rank for rank in share.ranks if rank >= share.world), None):
        raise ReshardError(f"{where}: rank {odd} of a world of {share.world}", hint)
    if problem := next(_problems(share.lines), None):
        raise ReshardError(f"{where}: {problem}", hint)
    return share


def _problems(lines: Sequence[Line]) -> Iterator[str]:
    """What types do not say of lines that somebody may have edited."""
    for line in lines:
        if len(line.axes) != len(line.sizes):
            yield f"{line.name}: {len(line.axes)} axes have {len(line.sizes)} sizes"
        if max(line.sums) >= P:
            yield f"{line.name}: {line.value} is not a fingerprint: its numbers must be below {P:#x}"
    for one, other in pairwise(lines):
        if one.name >= other.name:
            yield f"tensor {other.name} follows {one.name}: names must be sorted and unique"


def _line(name: str, dtype: str, axes: tuple[str, ...], sizes: tuple[int, ...], elements: int, sums: Sums) -> Line:
    return Line(name, dtype, axes, sizes, elements, "".join(f"{number:08x}" for number in sums))


def combine(shares: Iterable[Share]) -> Fingerprint:
    """The fingerprint of the model from the shares of all ranks, in any order.

    Raises ReshardError if they are not of one model, layout, mesh and seed, or a rank is missing or there twice;
    MismatchError if elements are.
    """
    shares = list(shares)
    if not shares:
        raise ReshardError("no shares to combine", "give the files of all ranks")
    first = shares[0]
    seen: dict[int, Share] = {}
    for share in shares:
        if (share.facts, share.world, share.seed) != (first.facts, first.world, first.seed):
            one, other = (
                f"ranks {_folded(s.ranks)} of {s.world}, facts {s.facts}, seed {s.seed!r}" for s in (first, share)
            )
            raise ReshardError(
                f"the shares are of different models, layouts or seeds: {one}; {other}",
                "combine the ranks of one directory",
            )
        for line, beside in zip_longest(first.lines, share.lines):
            if line is None or beside is None or _subject(line) != _subject(beside):
                one, other = (
                    f"ranks {_folded(s.ranks)} have {at.tensor if at else 'no more'}"
                    for s, at in ((first, line), (share, beside))
                )
                raise ReshardError(
                    f"the shares have different tensors: {one}; {other}",
                    "compute the shares again, and do not edit them",
                )
        for rank in share.ranks:
            if rank in seen:
                raise ReshardError(f"the share of rank {rank} was given twice", "give each rank's share once")
            seen[rank] = share
    missing = sorted(set(range(first.world)) - seen.keys())
    if missing:
        raise ReshardError(
            f"{len(missing)} of {first.world} ranks are missing: {_folded(missing)}", "give the shares of all ranks"
        )
    lines = []
    for parts in zip(*(share.lines for share in shares), strict=True):
        line, elements = parts[0], sum(part.elements for part in parts)
        if elements != math.prod(line.sizes):
            raise MismatchError(
                f"{line.name}: the shares have {elements} elements, the tensor has {math.prod(line.sizes)}"
            )
        sums = tuple(sum(numbers) % P for numbers in zip(*(part.sums for part in parts), strict=True))
        lines.append(_line(line.name, line.dtype, line.axes, line.sizes, elements, sums))
    text = "".join(f"{line.text}\n" for line in lines)
    model = of(f"reshard fingerprint {VERSION} {first.seed}\n{text}".encode())
    return Fingerprint(seed=first.seed, model=model, lines=tuple(lines))


def _subject(line: Line) -> Line:
    """What a line is about, whatever was counted."""
    return structs.replace(line, elements=0, value="")


def _folded(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown}, …" if len(ranks) > 8 else shown


class _Owned:
    """Which boxes of which stored tensors some ranks have to count, and the sums as they grow."""

    def __init__(self, layout: Layout, ranks: Sequence[int], keys: Keys) -> None:
        self.layout, self.ranks, self.keys = layout, tuple(ranks), keys
        self.into: dict[str, int] = {}  # logical tensor → its sum; tied names that are stored once share one
        self.by_slot: dict[Slot, list[tuple[int, tuple[str, ...], Piece]]] = defaultdict(list)
        found: dict[tuple[int, tuple[str, ...]], int] = {}
        mine = set(self.ranks)
        for name, tensor in sorted(layout.model.tensors.items()):
            key = (id(layout.holding(name)), tensor.axes) if layout.holding(name) else (len(found), tensor.axes)
            if key in found:
                self.into[name] = found[key]
                continue
            into = self.into[name] = found[key] = len(found)
            for piece in layout.distinct(name):
                if piece.slot.rank in mine:
                    self.by_slot[piece.slot].append((into, tensor.axes, piece))
        self.sums = np.zeros((len(found), LANES), np.int64)  # of K·v, added by whoever is done with a tile
        self.constants = np.zeros((len(found), LANES), np.int64)  # of K·c, by whoever draws the next tensor
        self.elements = [0] * len(found)

    def stored(self) -> Iterator[tuple[Key, Slot, Point, str]]:
        """Every stored tensor of which something counts: key, slot, point, dtype."""
        for slot in self.by_slot:
            for point in slot.points():
                yield (slot.rank, slot.name(point)), slot, point, self.layout.dtype(slot, point)

    def boxes(self, slot: Slot, point: Point, dtype: str) -> list[Box]:
        """What counts of one stored tensor; its constants are counted here, once."""
        boxes = []
        for into, axes, piece in self.by_slot[slot]:
            factor, dims, elements = np.ones(LANES, np.int64), [], 1
            for axis, own, (low, high), stride in zip(axes, piece.tensor.axes, piece.box, piece.strides, strict=True):
                if stride is None:
                    low, high = max(low, point[own]), min(high, point[own] + 1)
                elements *= max(0, high - low)
                if high - low == 1:
                    factor = factor * self.keys.axis(axis, high)[low] % P
                elif high > low:
                    assert stride is not None
                    dims.append((axis, low, high, stride))
            if not elements:
                continue
            every = factor * self.keys.constant(dtype) % P
            for axis, low, high, _ in dims:
                every = every * (self.keys.axis(axis, high)[low:high].sum(axis=0) % P) % P
            self.constants[into] = (self.constants[into] + every) % P
            self.elements[into] += elements
            boxes.append(Box(into, piece.offset, tuple(sorted(dims, key=lambda dim: -dim[3])), factor))
        return boxes

    def share(self) -> Share:
        lines, totals = [], (self.sums + self.constants) % P
        for name, into in self.into.items():
            tensor = self.layout.model.tensors[name]
            sizes = tuple(
                len(tensor.layers) if axis == "layer" and tensor.layers is not None else size
                for axis, size in zip(tensor.axes, tensor.sizes, strict=True)
            )
            dtype = ",".join(dict.fromkeys(tensor.dtypes))
            lines.append(_line(name, dtype, tensor.axes, sizes, self.elements[into], tuple(map(int, totals[into]))))
        return Share(
            seed=self.keys.seed,
            ranks=self.ranks,
            world=self.layout.mesh.world,
            facts=_facts(self.layout),
            lines=tuple(lines),
        )


def _facts(layout: Layout) -> str:
    mesh, model = layout.mesh, layout.model
    facts = {
        "format": layout.format.name,
        "mesh": [mesh.tp, mesh.pp, mesh.ep, mesh.weights, mesh.layers],
        "tensors": {name: [t.axes, t.sizes, t.dtypes, t.layers] for name, t in sorted(model.tensors.items())},
        "stored": identity.stored(layout),
    }
    return of(json.dumps(facts, sort_keys=True).encode())


def _run(
    owned: _Owned,
    jobs: Iterable[tuple[Slot, Point, str, Callable[[Summer], Read]]],
    threads: int,
    advance: Callable[[int], None],
) -> Share:
    """Sum every tile of every stored tensor with so many threads; each has its own buffers."""
    local, lock = threading.local(), threading.Lock()

    def work() -> Iterator[tuple[str, list[Box], Callable[[Summer], Read]]]:
        for slot, point, dtype, reader in jobs:
            for tile in tiles(owned.boxes(slot, point, dtype), TILE * 8 // BITS[dtype], owned.keys):
                yield dtype, tile, reader

    def one(task: tuple[str, list[Box], Callable[[Summer], Read]]) -> None:
        dtype, boxes, reader = task
        if not hasattr(local, "summer"):
            local.summer = Summer(owned.keys)
        found = list(local.summer.tile(dtype, boxes, reader(local.summer)))
        with lock:
            for into, sums in found:
                owned.sums[into] = (owned.sums[into] + sums) % P
        advance((max(box.end for box in boxes) - boxes[0].offset) * BITS[dtype] // 8)

    each(work(), one, threads)
    return owned.share()


# --- directories and live tensors -------------------------------------------------------------------------------------


def of_source(
    found: Source,
    ranks: Iterable[int] | None = None,
    *,
    seed: str = "",
    threads: int = 2,
    progress: Progress | None = None,
) -> Share:
    """The share of some ranks of a source, of all without `ranks`; reads what counts of their tensors, once.

    Raises ReshardError for a rank that there is not, PlaceError where the storage fails.
    """
    chosen, progress = _chosen(found.layout, ranks, found.where), progress or Silent()
    keys = Keys(seed)
    owned = _Owned(found.layout, chosen, keys)
    stored = sorted(
        ((*found.locate(key), slot, point) for key, slot, point, _ in owned.stored()),
        key=lambda t: (str(t[0]), t[1].offset),
    )
    progress.start("fingerprinting", sum(entry.nbytes for _, entry, _, _ in stored))
    with unchanged(found.directory), closing(Pool()) as pool:
        jobs = ((slot, point, entry.dtype, _reader(pool, path, entry)) for path, entry, slot, point in stored)
        share = _run(owned, jobs, threads, progress.advance)
    progress.finish()
    return share


def of_rank(out: Path, rank: int, *, seed: str = "", threads: int = 2, progress: Progress | None = None) -> Share:
    """One rank's share of a directory, of which nothing of the other ranks need be there if reshard wrote it.

    That is manifest.json, the carried files, source/ and the rank's own files. Raises as `of_source` and `open_source`
    do.
    """
    found = source.open_rank(out, rank) if manifest.present(out) else source.open_source(out)
    return of_source(found, [rank], seed=seed, threads=threads, progress=progress)


def of_tensors(
    layout: Layout | Path | str, rank: int, tensors: Mapping[str, Any], *, seed: str = "", threads: int = 2
) -> Share:
    """The share of one rank from tensors in memory: `tensors` maps stored names to numpy arrays, torch tensors or
    buffers of bytes.

    `layout` may be a directory that reshard wrote for as many ranks. Tensors that the layout does not know are left
    alone, those of which the rank counts nothing may be missing. Tensors on a device are copied to the host one at a
    time. Raises ReshardError for one that is missing, or of another shape, size or dtype.
    """
    if not isinstance(layout, Layout):
        path = Path(layout)
        layout = (source.open_rank(path, rank) if manifest.present(path) else source.open_source(path)).layout
    owned = _Owned(layout, _chosen(layout, [rank], layout.format.name), Keys(seed))

    def jobs() -> Iterator[tuple[Slot, Point, str, Callable[[Summer], Read]]]:
        for (_, name), slot, point, dtype in owned.stored():
            if name not in tensors:
                raise ReshardError(
                    f"rank {rank}: {name} is not among the {len(tensors)} tensors given",
                    "give tensors by their stored names",
                )
            data = _bytes(tensors[name], name, slot.shape, dtype)
            yield slot, point, dtype, lambda _, data=data: lambda low, high: data[low:high]  # type: ignore[misc]

    return _run(owned, jobs(), threads, lambda _: None)


def of_directory(path: Path, *, seed: str = "", threads: int = 2, progress: Progress | None = None) -> Fingerprint:
    """The fingerprint of a local directory in any layout."""
    return combine([of_source(source.open_source(path), seed=seed, threads=threads, progress=progress)])


def _chosen(layout: Layout, ranks: Iterable[int] | None, where: str) -> list[int]:
    world = layout.mesh.world
    chosen = list(range(world)) if ranks is None else sorted(set(ranks))
    for rank in chosen:
        if not 0 <= rank < world:
            raise ReshardError(f"{where}: there is no rank {rank}, ranks are 0 to {world - 1}")
    return chosen


def _reader(pool: Pool, path: AnyFile, entry: Entry) -> Callable[[Summer], Read]:
    if entry.strides is not None:
        data = _packed(pool, path, entry)
        return lambda _: lambda low, high: data()[low:high]

    def bound(summer: Summer) -> Read:
        def read(low: int, high: int) -> Array:
            buffer = summer.bytes[: high - low]
            pool.read_into(path, entry.offset + low, buffer.data)
            return buffer

        return read

    return bound


def _packed(pool: Pool, path: AnyFile, entry: Entry) -> Callable[[], Array]:
    """The bytes of a tensor of a .bin file in row-major order, when first asked for: whole, because few files have
    strided ones.
    """
    lock = threading.Lock()
    found: list[Array] = []

    def data() -> Array:
        with lock:
            if not found:
                item = BITS[entry.dtype] // 8
                raw = np.frombuffer(pool.read(path, entry.offset, extent(entry)), np.dtype((np.void, item)))
                strides = tuple(stride * item for stride in entry.strides or ())
                found.append(np.ascontiguousarray(as_strided(raw, entry.shape, strides)).reshape(-1).view(np.uint8))
            return found[0]

    return data


def _bytes(tensor: Any, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    """The bytes of a tensor in memory, row-major; no copy where they lie so."""
    torch = sys.modules.get("torch")  # whoever has a tensor of it has imported it
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.is_meta:
            raise ReshardError(f"{name}: is on the meta device, where tensors have no bytes", "load the weights first")
        row = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
        said = row.name if row else None
        if said != dtype and said != "U8":  # bytes may be anything
            raise ReshardError(f"{name}: is {tensor.dtype} in memory, the layout says {dtype}")
        packed = said != dtype or (row is not None and row.together > 1)
        if not packed and tuple(tensor.shape) != shape:
            raise ReshardError(f"{name}: has shape {tuple(tensor.shape)} in memory, {shape} in the layout")
        tensor = tensor.detach().cpu()
        if tensor.dtype.itemsize == 1:
            tensor = tensor.view(torch.uint8)  # older versions of torch cannot copy all of these types
        data: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()  # numpy knows neither bfloat16 nor FP8
    elif isinstance(tensor, np.ndarray):
        row = BY_TORCH.get(tensor.dtype.name)  # numpy's name is torch's where it has the dtype
        said = (row.name if row else None) or dtype
        if said != dtype and not said.startswith("U"):  # numpy has no bfloat16: bits come as unsigned numbers
            raise ReshardError(f"{name}: is {tensor.dtype} in memory, the layout says {dtype}")
        if tensor.dtype.itemsize * 8 == BITS[dtype] and tensor.shape != shape:
            raise ReshardError(f"{name}: has shape {tensor.shape} in memory, {shape} in the layout")
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    else:
        data = np.frombuffer(memoryview(tensor).cast("B"), np.uint8)
    if (wanted := math.prod(shape) * BITS[dtype] // 8) != len(data):
        raise ReshardError(f"{name}: has {len(data)} bytes in memory, {dtype} of shape {shape} has {wanted}")
    return data
