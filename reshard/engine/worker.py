"""The engine: carries out a plan. Bytes in, bytes out; knows files and offsets, nothing about models.

    pread into a small buffer that stays in cache → gather → hash → pwrite at an offset known beforehand

Each source byte is read once and each output byte written once: copies that read the same stretch of a source (the
ranks of a row-parallel weight, replicas) advance together, window by window. Memory is two buffers of TILE bytes per
worker.

numpy is imported by the first worker that has to gather (row-parallel weights, transpositions), while the others
already move bytes.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from ..containers.entry import Entry
from ..layout.join import Copy, Dim, Plan, collapse
from ..store.local import Batch, Pool, batches, buffer
from ..store.store import AnyFile
from ..threads import together
from .items import in_items

# bytes read at a time, and gathered at a time: as small as a shared cache likes, as large as system calls like
TILE = 4 << 20
RUN = 64 << 10  # a contiguous stretch of a source worth a read of its own
STRIPE = 256  # bytes: the shortest piece of a row that a system call should lay down by itself
NARROW = 1 << 10  # bytes: the narrowest column window of a transposition

Key = tuple[int, str]  # rank, stored name


class Place(Protocol):
    """Where the stored tensors of a layout are: the source's or the destination's files."""

    def locate(self, key: Key) -> tuple[AnyFile, Entry]: ...


class Form(Protocol):
    """How the stored tensors of a destination lie in its files, wherever those are."""

    def locate(self, key: Key) -> tuple[object, Entry]: ...


class Sink(Protocol):
    """What happens to bytes that belong at `offset` of a stored tensor."""

    def put(self, key: Key, offset: int, data: memoryview) -> None: ...
    def done(self, keys: Iterable[Key]) -> None: ...


class Target(NamedTuple):
    """Where one footprint of the source goes: offsets and strides in items."""

    key: Key
    offset: int
    dims: tuple[Dim, ...]


class Read(NamedTuple):
    """A strided box of one source tensor and everything that it feeds; `dims` are (extent, stride), outermost first."""

    offset: int
    dims: tuple[tuple[int, int], ...]
    targets: tuple[Target, ...]

    @property
    def end(self) -> int:
        return self.offset + sum((n - 1) * stride for n, stride in self.dims) + 1

    @property
    def run(self) -> int:
        """Items that stand together at the innermost."""
        run = 1
        for n, stride in reversed(self.dims):
            if stride != run:
                break
            run *= n
        return run

    @property
    def transposed(self) -> bool:
        """Whether some target's innermost dimension is not the source's."""
        return any(target.dims and target.dims[-1][1] != min(s for _, s, _ in target.dims) for target in self.targets)

    def part(self, level: int, start: int, stop: int) -> "Read":
        """The same box with dimension `level` restricted to [start, stop)."""
        n, stride = self.dims[level]
        dims = (*self.dims[:level], (stop - start, stride), *self.dims[level + 1 :])
        targets = []
        for target in self.targets:
            at = next(i for i, (m, s, _) in enumerate(target.dims) if (m, s) == (n, stride))
            d = target.dims[at][2]
            cut = (*target.dims[:at], (stop - start, stride, d), *target.dims[at + 1 :])
            targets.append(Target(target.key, target.offset + start * d, cut))
        return Read(self.offset + start * stride, dims, tuple(targets))


def run(
    plan: Plan,
    source: Place,
    destination: Form,
    sink: Callable[[], Sink],
    *,
    workers: int,
    pool: Pool,
    progress: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Carry out every copy of a plan with `workers` threads; the first failure stops them all and is raised.

    `progress` is called with numbers of bytes read, from any thread.
    """
    jobs = _Jobs(plan, source)
    halt = stop or threading.Event()

    def work() -> None:
        worker = Worker(source, destination, sink(), pool, progress)
        for copies in jobs:
            if halt.is_set():
                return
            worker.job(copies)

    together(work, workers, halt)


class _Jobs:
    """Independent jobs in the order of their bytes in the source, split as finely as shared bytes allow;
    safe among threads.
    """

    def __init__(self, plan: Plan, source: Place) -> None:
        self._lock = threading.Lock()
        starts = []
        files: dict[AnyFile, int] = {}
        for number, component in enumerate(plan.components):
            for point in component.points():
                first = next(component.copies(point), None)
                if first is None:
                    continue
                path, entry = source.locate((first.src.rank, first.src_name))
                starts.append((files.setdefault(path, len(files)), entry.offset, number, tuple(point.items())))
        starts.sort()
        self._jobs = self._generate(plan, starts)

    def _generate(
        self, plan: Plan, starts: list[tuple[int, int, int, tuple[tuple[str, int], ...]]]
    ) -> Iterator[list[Copy]]:
        for _, _, number, point in starts:
            yield from split(list(plan.components[number].copies(dict(point))))

    def __iter__(self) -> "Iterator[list[Copy]]":
        return self

    def __next__(self) -> list[Copy]:
        with self._lock:
            return next(self._jobs)


def split(copies: list[Copy]) -> Iterator[list[Copy]]:
    """Copies that share a destination tensor, or overlapping bytes of a source, stay together; the rest part."""
    group: dict[int, int] = {}

    def root(n: int) -> int:
        while group.setdefault(n, n) != n:
            group[n] = n = group[group[n]]
        return n

    by_dst: dict[Key, int] = {}
    by_src: dict[Key, list[tuple[int, int, int]]] = defaultdict(list)
    for n, copy in enumerate(copies):
        group[root(n)] = root(by_dst.setdefault((copy.dst.rank, copy.dst_name), n))
        end = copy.src_offset + sum((extent - 1) * stride for extent, stride, _ in copy.dims) + 1
        by_src[copy.src.rank, copy.src_name].append((copy.src_offset, end, n))
    for spans in by_src.values():
        spans.sort()
        reach, last = -1, -1
        for start, end, n in spans:
            if start < reach:
                group[root(n)] = root(last)
            if end > reach:
                reach, last = end, n
    parts: dict[int, list[Copy]] = defaultdict(list)
    for n, copy in enumerate(copies):
        parts[root(n)].append(copy)
    yield from parts.values()


class Worker:
    """One thread's buffers, and how it carries out one job after another."""

    def __init__(
        self, source: Place, destination: Form, sink: Sink, pool: Pool, progress: Callable[[int], None]
    ) -> None:
        self.source, self.destination, self.sink, self.pool, self.progress = source, destination, sink, pool, progress
        self._in, self._out = buffer(TILE), buffer(TILE)
        self._dealt: tuple[tuple[int, tuple[int, ...]], tuple[list[Batch], list[memoryview]]] = (0, ()), ([], [])

    def job(self, copies: Sequence[Copy]) -> None:
        """All copies of one job, sources in the order in which the destination wants them."""
        by_source: dict[Key, list[Copy]] = defaultdict(list)
        for copy in sorted(copies, key=lambda copy: (copy.dst_offset, copy.dst.rank)):
            by_source[copy.src.rank, copy.src_name].append(copy)
        for key, group in by_source.items():
            self._source(key, group)
        self.sink.done({(copy.dst.rank, copy.dst_name): None for copy in copies})

    def _source(self, key: Key, copies: Sequence[Copy]) -> None:
        path, entry = self.source.locate(key)
        reads: dict[tuple[int, tuple[tuple[int, int], ...]], list[Target]] = defaultdict(list)
        size = 0
        for copy in copies:
            dst_key = (copy.dst.rank, copy.dst_name)
            _, to = self.destination.locate(dst_key)
            offset, to_offset, dims, size = in_items(copy, entry, to)
            shape = tuple(sorted(((n, s) for n, s, _ in dims), key=lambda dim: -dim[1]))
            reads[offset, shape].append(Target(dst_key, to_offset, dims))
        self._process(
            path, entry.offset, size, [Read(offset, shape, tuple(to)) for (offset, shape), to in reads.items()]
        )

    def _process(self, path: AnyFile, base: int, item: int, reads: Iterable[Read]) -> None:
        for cluster in _clusters(reads):
            low, high = min(read.offset for read in cluster), max(read.end for read in cluster)
            if (high - low) * item <= TILE:
                self._window(path, base, item, cluster, low, 1, high - low, high - low)
            elif len(cluster) > 1 and (all(read.run * item >= RUN for read in cluster) or not _aligned(cluster, low)):
                for read in cluster:
                    self._process(path, base, item, [read])
            else:
                self._rows(path, base, item, cluster, low)

    def _rows(self, path: AnyFile, base: int, item: int, cluster: list[Read], low: int) -> None:
        """Window by window along the outermost dimension of the source; rows wider than a tile one by one."""
        pitch = max(read.dims[0][1] for read in cluster if read.dims)
        count = max((read.end - 1 - low) // pitch for read in cluster) + 1
        if step := _tiled(cluster, low, pitch, item):
            rows = min(count, TILE // NARROW, TILE // (step * item))
            width = max(1, TILE // (rows * item) // step) * step
            for row in range(0, count, rows):
                self._columns(
                    path, base, item, _rows_of(cluster, low, pitch, row, row + rows), low + row * pitch, width, pitch
                )
            return
        rows = TILE // (pitch * item) if _aligned(cluster, low) else 0  # overlapping rows of an odd view: one by one
        for row in range(0, count, rows or 1):
            taken = _rows_of(cluster, low, pitch, row, row + (rows or 1))
            if rows and taken:
                start = min(read.offset for read in taken)
                self._window(path, base, item, taken, start, 1, max(read.end for read in taken) - start, pitch)
            else:
                self._process(path, base, item, taken)

    def _columns(
        self, path: AnyFile, base: int, item: int, reads: list[Read], low: int, width: int, pitch: int
    ) -> None:
        """A transposition, tile by tile: the same columns of many rows, so that both sides move long runs."""
        height = reads[0].dims[0][0] if len(reads[0].dims) > 1 else 1
        for column in range(0, pitch, width):
            part = [c for read in reads if (c := _columns_of(read, low, pitch, column, column + width)) is not None]
            if part:
                first = min(read.offset for read in part)
                wide = max(read.end - 1 - (height - 1) * pitch for read in part) + 1 - first
                self._window(path, base, item, part, first, height, wide, pitch)

    def _window(
        self, path: AnyFile, base: int, item: int, reads: Iterable[Read], low: int, height: int, width: int, pitch: int
    ) -> None:
        """Read `height` stretches of `width` items, `pitch` apart, from item `low` on,
        and hand each target its part.
        """
        if height == 1 and (columns := _columns_apart(reads, low, width, item)):
            self._deal(path, base + low * item, item, columns)
            return
        for row in range(height):
            at = row * width * item
            self.pool.read_into(path, base + (low + row * pitch) * item, self._in[at : at + width * item])
        self.progress(height * width * item)
        for read in reads:
            for target in read.targets:
                dims = [(n, width if height > 1 and s == pitch else s, d) for n, s, d in target.dims]
                self._scatter(target, read.offset - low, collapse(dims), item)

    def _deal(self, path: AnyFile, at: int, item: int, columns: Sequence[tuple[int, Target]]) -> None:
        """Rows whose every column goes to one target: the system call itself lays each row's pieces into the
        targets' own buffers.
        """
        rows, widths = columns[0][1].dims[0][0], tuple(width * item for width, _ in columns)
        views, parts = self._views(rows, widths)
        self.pool.scatter(path, at, views)
        self.progress(rows * sum(widths))
        for (_, target), part in zip(columns, parts, strict=True):
            self.sink.put(target.key, target.offset * item, part)

    def _views(self, rows: int, widths: tuple[int, ...]) -> tuple[list[Batch], list[memoryview]]:
        """Buffers of `rows` pieces each, as pieces in the order of the source's rows, and whole; kept for the next
        window of the shape.
        """
        if (rows, widths) != self._dealt[0]:
            starts = [rows * start for start in accumulate(widths, initial=0)]
            buffer = self._out
            views = [
                buffer[at + row * n : at + (row + 1) * n]
                for row in range(rows)
                for at, n in zip(starts, widths, strict=False)
            ]
            self._dealt = (rows, widths), (batches(views), [buffer[a:b] for a, b in pairwise(starts)])
        return self._dealt[1]

    def _scatter(self, target: Target, start: int, dims: tuple[Dim, ...], item: int) -> None:
        """From the window in the buffer to the destination: gathered into destination order, then put run by run."""
        level, run = len(dims), 1
        while level and dims[level - 1][2] == run:
            level -= 1
            run *= dims[level][0]
        outer, inner = dims[:level], dims[level:]
        if not inner or (len(inner) == 1 and inner[0][1] == 1):
            data, at, pitches = self._in, start * item, [s * item for _, s, _ in outer]
        elif (size := math.prod(n for n, _, _ in dims) * item) > TILE:  # stride 0: a destination larger than the window
            n, s, d = dims[0]
            step = max(1, n * TILE // size)
            for i in range(0, n, step):
                part = ((min(step, n - i), s, d), *dims[1:]) if step > 1 else dims[1:]
                self._scatter(Target(target.key, target.offset + i * d, part), start + i * s, part, item)
            return
        else:
            self._gather(start, dims, item)
            data, at, pitches, pitch = self._out, 0, [], run * item
            for n, _, _ in reversed(outer):
                pitches.insert(0, pitch)
                pitch *= n
        steps = [(n, pitch, d * item) for (n, _, d), pitch in zip(outer, pitches, strict=True)]
        self._put(target.key, target.offset * item, data, at, steps, run * item)

    def _gather(self, start: int, dims: tuple[Dim, ...], item: int) -> None:
        """The strided box at `start` of the window, packed in destination order into the other buffer."""
        import numpy as np

        kind = np.dtype(f"u{item}")
        shape = tuple(n for n, _, _ in dims)
        view = np.ndarray(shape, kind, self._in, start * item, tuple(s * item for _, s, _ in dims))
        np.copyto(np.ndarray(shape, kind, self._out), view)

    def _put(
        self, key: Key, offset: int, data: memoryview, at: int, outer: list[tuple[int, int, int]], nbytes: int
    ) -> None:
        if not outer:
            self.sink.put(key, offset, data[at : at + nbytes])
            return
        (n, src, dst), rest = outer[0], outer[1:]
        for i in range(n):
            self._put(key, offset + i * dst, data, at + i * src, rest, nbytes)


def _clusters(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Reads whose stretches overlap, together; in the order given where they do not."""
    order = sorted(reads, key=lambda read: read.offset)
    cluster: list[Read] = []
    reach = -1
    for read in order:
        if cluster and read.offset >= reach:
            yield cluster
            cluster = []
        cluster.append(read)
        reach = max(reach, read.end)
    if cluster:
        yield cluster


def _columns_apart(reads: Iterable[Read], low: int, width: int, item: int) -> list[tuple[int, Target]]:
    """(width, target) of each column if a window of whole rows is dealt out to contiguous targets, each item to one;
    else nothing.
    """
    columns: list[tuple[int, int, Target]] = []
    for read in reads:
        if len(read.targets) != 1 or len(read.dims) != 2:
            return []
        target = read.targets[0]
        (_, pitch, apart), (run, step, packed) = target.dims
        if (step, packed, apart) != (1, 1, run) or run * item < STRIPE:
            return []
        columns.append((read.offset - low, run, target))
    columns.sort(key=lambda column: column[0])
    ends = [start + run for start, run, _ in columns]
    rows = {read.dims[0] for read in reads}
    if len(rows) != 1 or [start for start, _, _ in columns] != [0, *ends[:-1]]:
        return []
    ((count, pitch),) = rows
    return [(run, target) for _, run, target in columns] if ends[-1] == pitch and count * pitch == width else []


def _aligned(cluster: Sequence[Read], low: int) -> bool:
    """Whether all reads advance by one common pitch, each within its own stretch of a row."""
    pitch = max(read.dims[0][1] if read.dims else 1 for read in cluster)
    for read in cluster:
        inner = read.dims[1:] if read.dims and read.dims[0][1] == pitch else read.dims
        if (read.offset - low) % pitch + sum((n - 1) * s for n, s in inner) >= pitch:
            return False
    return True


def _tiled(cluster: Sequence[Read], low: int, pitch: int, item: int) -> int:
    """The widest column step if all reads are the same rows of one matrix, each with one dimension along them,
    and one is transposed.
    """
    shapes = {(read.dims[:1], (read.offset - low) // pitch, len(read.dims)) for read in cluster}
    if len(shapes) > 1 or len(cluster[0].dims) != 2 or cluster[0].dims[0][1] != pitch or not _aligned(cluster, low):
        return 0
    steps = [read.dims[1][1] for read in cluster]
    step = max(steps) if min(steps) else 0  # 0: an element of a view that stands for many
    return step if step * item <= TILE and any(read.transposed for read in cluster) else 0


def _rows_of(cluster: Iterable[Read], low: int, pitch: int, start: int, stop: int) -> list[Read]:
    return [part for read in cluster if (part := _row(read, low, pitch, start, stop)) is not None]


def _row(read: Read, low: int, pitch: int, start: int, stop: int) -> Read | None:
    """The part of a read in rows [start, stop) of its cluster."""
    first = (read.offset - low) // pitch
    if not read.dims or read.dims[0][1] != pitch:
        return read if start <= first < stop else None
    a, b = max(start - first, 0), min(stop - first, read.dims[0][0])
    if a >= b:
        return None
    return _thin(read.part(0, a, b))


def _thin(read: Read) -> Read:
    """Without dimensions of extent one."""
    if all(n > 1 for n, _ in read.dims):
        return read
    targets = tuple(Target(t.key, t.offset, tuple(dim for dim in t.dims if dim[0] > 1)) for t in read.targets)
    return Read(read.offset, tuple(dim for dim in read.dims if dim[0] > 1), targets)


def _columns_of(read: Read, low: int, pitch: int, start: int, stop: int) -> Read | None:
    """The part of a read in columns [start, stop) of its rows; at most one dimension runs along a row."""
    offset = (read.offset - low) % pitch
    if not read.dims or read.dims[-1][1] == pitch:
        return read if start <= offset < stop else None
    n, stride = read.dims[-1]
    a, b = max(0, -(-(start - offset) // stride)), min(n, -(-(stop - offset) // stride))
    return read.part(len(read.dims) - 1, a, b) if a < b else None
