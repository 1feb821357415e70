"""The files that a conversion would write as streams of bytes, in order, without writing them: to be hashed.

    window of the file  ←  the plan's copies into each stored tensor, clipped to the window; the rest from the residue

Memory is little more than a window per stream, whatever the size of a tensor. Knows files and offsets, nothing about
models.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ..containers.dtypes import BITS
from ..containers.entry import Entry, extent
from ..engine.items import in_items
from ..engine.worker import Key, Place
from ..errors import MismatchError
from ..layout.cut import Point
from ..layout.join import Copy, Dim, Plan, collapse
from ..store.local import Batch, Pool, batches, buffer
from ..store.store import AnyFile
from .target import Target

WINDOW = 4 << 20  # bytes
PIECE = 512 << 10  # bytes read at once of what is not contiguous: they stay in cache until they are where they belong
SPARSE = 4  # a stretch of a source is read at once if no more than this many times the bytes wanted lie in it
ROW = 1 << 10  # bytes: the shortest row that a system call should lay down by itself
KEPT = 32 << 10  # parts of rows that a thread keeps
NEAR = 64 << 10  # bytes of a source that are read at once anyway

Box = tuple[int, int, tuple[Dim, ...]]  # offset in the source's file, offset in the destination's, dims; all in bytes


class Streams:
    """The files of a target. `plan` leads from `source` to it; safe among threads, each with a file of its own."""

    def __init__(self, plan: Plan, source: Place, target: Target, pool: Pool) -> None:
        self.plan, self.source, self.target, self.pool = plan, source, target, pool
        self._rooms: list[_Room] = []  # those that are free
        self._jobs: dict[Key, tuple[int, Point]] = {}
        for number, component in enumerate(plan.components):
            for point in component.points():
                for copy in component.copies(point):
                    self._jobs[copy.dst.rank, copy.dst_name] = number, point
        self._entries: dict[str, list[tuple[int, int, Key, Entry]]] = defaultdict(list)
        for key, (name, entry) in target.entries.items():
            if entry.nbytes:
                self._entries[name].append((entry.offset, entry.offset + extent(entry), key, entry))
        for entries in self._entries.values():
            entries.sort(key=lambda known: known[0])

    def windows(self, name: str) -> Iterator[memoryview]:
        """The bytes of one file, in order; each window is good until the next is asked for."""
        room = self._rooms.pop() if self._rooms else _Room()
        try:
            yield from self._filled(name, room)
        finally:
            self._rooms.append(room)

    def _filled(self, name: str, room: "_Room") -> Iterator[memoryview]:
        entries, at = self._entries.get(name, []), 0
        active: list[_Stored] = []
        for low, high in self._cuts(name):
            window = room.window[: high - low]
            covered = self._beside(name, window, low, high)
            while at < len(entries) and entries[at][0] < high:
                active.append(_Stored(self, *entries[at]))
                at += 1
            for stored in active:
                stored.fill(room, low, high)
            covered += _union([(max(stored.low, low), min(stored.high, high)) for stored in active])
            if covered != high - low:
                raise MismatchError(f"{name}: {covered} of the bytes {low} to {high} are known", "convert again")
            active = [stored for stored in active if stored.high > high]
            yield window

    def _cuts(self, name: str) -> Iterator[tuple[int, int]]:
        """Where the windows of a file begin and end: at whole rows of a large tensor, so that they are alike."""
        at = 0
        for start, stop, _, entry in self._entries.get(name, ()):
            if stop - start > WINDOW and start >= at:
                row = max(BITS[entry.dtype] * entry.shape[-1] // 8, 1)
                yield from _steps(at, start, WINDOW)
                yield from _steps(start, stop, WINDOW // row * row or WINDOW)
                at = stop
        yield from _steps(at, self.target.sizes[name], WINDOW)

    def copies(self, key: Key) -> list[Copy]:
        """Those that make up one stored tensor."""
        number, point = self._jobs[key]
        return [copy for copy in self.plan.components[number].copies(point) if (copy.dst.rank, copy.dst_name) == key]

    def _beside(self, name: str, window: memoryview, low: int, high: int) -> int:
        """Lay what is no tensor into a window; how many bytes that were."""
        covered = 0
        for offset, data in self.target.literals.get(name, ()):
            covered += _lay(window, low, high, offset, data)
        for offset, length, place, at in self.target.moved.get(name, ()):
            start, stop = max(offset, low), min(offset + length, high)
            if start >= stop:
                continue
            if isinstance(place, bytes):
                window[start - low : stop - low] = place[at + start - offset : at + stop - offset]
            else:
                self.pool.read_into(place, at + start - offset, window[start - low : stop - low])
            covered += stop - start
        return covered


def _steps(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(low, high, step):
        yield at, min(at + step, high)


def _lay(window: memoryview, low: int, high: int, offset: int, data: bytes) -> int:
    start, stop = max(offset, low), min(offset + len(data), high)
    if start < stop:
        window[start - low : stop - low] = data[start - offset : stop - offset]
    return max(0, stop - start)


def _union(ranges: Sequence[tuple[int, int]]) -> int:
    """Numbers in at least one of some ranges: tensors of a `.bin` file may share a storage."""
    total, reach = 0, -1
    for low, high in sorted(ranges):
        total += max(0, high - max(low, reach))
        reach = max(reach, high)
    return total


class _Room:
    """What one thread fills: a window of a file, and a buffer for what is not contiguous."""

    def __init__(self) -> None:
        self.window, self.scratch = buffer(WINDOW), buffer(PIECE)
        self._rows: dict[tuple[int, int, int, int], list[Batch]] = {}
        self._kept = 0

    def rows(self, start: int, count: int, length: int, pitch: int) -> list[Batch]:
        """Parts of so many rows of the window, `pitch` bytes apart; kept, as the next window wants the same."""
        key = start, count, length, pitch
        if key not in self._rows:
            self._kept += count
            if self._kept > KEPT:
                self._rows.clear()
                self._kept = count
            self._rows[key] = batches(
                [self.window[at : at + length] for at in range(start, start + count * pitch, pitch)]
            )
        return self._rows[key]


class _Stored:
    """One stored tensor of a file, between bytes `low` and `high` of it, and the boxes that it is made of."""

    def __init__(self, streams: Streams, low: int, high: int, key: Key, entry: Entry) -> None:
        self.low, self.high, self.pool = low, high, streams.pool
        self.boxes: list[tuple[int, int, AnyFile, Box]] = []  # where each begins and ends in the file
        for copy in streams.copies(key):
            path, source = streams.source.locate((copy.src.rank, copy.src_name))
            offset, to, dims, item = in_items(copy, source, entry)
            scaled = collapse([*((n, s * item, d * item) for n, s, d in dims), (item, 1, 1)])
            start = low + to * item
            self.boxes.append((start, start + _span(scaled), path, (source.offset + offset * item, start, scaled)))

    def fill(self, room: _Room, low: int, high: int) -> None:
        for start, stop, path, box in self.boxes:
            if start < high and low < stop:
                for part in clip(box, low, high):
                    self._read(path, part, room, low)

    def _read(self, path: AnyFile, box: Box, room: _Room, low: int) -> None:
        """One box into the window: by one read where its bytes are close, else split at the widest dimension."""
        offset, to, dims = box
        if len(dims) == 1 and dims[0][1:] == (1, 1):
            self.pool.read_into(path, offset, room.window[to - low : to - low + dims[0][0]])
            return
        # rows that follow each other in the source
        if len(dims) == 2 and dims[0][1] == dims[1][0] >= ROW and dims[1][1:] == (1, 1):
            self.pool.scatter(path, offset, room.rows(to - low, *dims[0]))
            return
        count = math.prod(n for n, _, _ in dims)
        span = sum((n - 1) * s for n, s, _ in dims) + 1
        if span > max(SPARSE * count, NEAR) or span > PIECE:
            at = max(range(len(dims)), key=lambda level: dims[level][1])
            n, s, d = dims[at]
            step = max(1, min(n // 2, PIECE // s)) if span <= SPARSE * count else 1
            for i in range(0, n, step):
                taken = min(step, n - i)
                rest = (*dims[:at], *([(taken, s, d)] if taken > 1 else []), *dims[at + 1 :])
                self._read(path, (offset + i * s, to + i * d, rest), room, low)
            return
        import numpy as np

        *outer, (run, step, _) = dims
        unit = math.gcd(run, 8) if step == 1 else 1
        kind = np.dtype(f"u{unit}")
        view = [*outer, (run // unit, step * unit, dims[-1][2] * unit)]
        self.pool.read_into(path, offset, room.scratch[:span])
        shape = tuple(n for n, _, _ in view)
        found = np.ndarray(shape, kind, room.scratch, 0, tuple(s for _, s, _ in view))
        np.copyto(np.ndarray(shape, kind, room.window, to - low, tuple(d for _, _, d in view)), found)


def _span(dims: Sequence[Dim]) -> int:
    """Bytes of a destination from the first to the last of a box."""
    return sum((n - 1) * d for n, _, d in dims) + 1


def clip(box: Box, low: int, high: int) -> Iterator[Box]:
    """The parts of a box whose destination lies in [low, high), as few boxes as may be.

    >>> list(clip((0, 0, ((4, 10, 3), (3, 1, 1))), 4, 9))
    [(11, 4, ((2, 1, 1),)), (20, 6, ((3, 1, 1),))]
    """
    offset, to, dims = box
    span = _span(dims)
    if to >= high or to + span <= low:
        return
    if low <= to and to + span <= high:
        yield box
        return
    (n, s, d), inner = dims[0], dims[1:]
    width = sum((m - 1) * e for m, _, e in inner) + 1
    reach = max(0, -(-(low - width + 1 - to) // d)), min(n, -(-(high - to) // d))  # those that reach into the window
    # those that lie in it
    start, stop = max(reach[0], -(-(low - to) // d)), min(reach[1], (high - width - to) // d + 1)
    if start >= stop:
        start = stop = reach[1]
    for i in (*range(reach[0], start), *range(stop, reach[1])):
        yield from clip((offset + i * s, to + i * d, inner), low, high)
    if stop > start:
        yield (
            offset + start * s,
            to + start * d,
            ((stop - start, s, d), *inner) if stop - start > 1 else inner or ((1, 1, 1),),
        )
