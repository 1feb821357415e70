"""The engine moves bytes as numpy would: any shapes, strides, dtypes and offsets, with tiles so small that every path
is taken.
"""

import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import xxhash
from hypothesis import assume, event, given
from hypothesis import strategies as st
from strategies import law

from reshard.containers.dtypes import BITS
from reshard.containers.entry import Entry
from reshard.engine import worker as engine
from reshard.engine.items import in_items
from reshard.engine.worker import Key, Worker, split
from reshard.engine.writer import Writer
from reshard.errors import PlaceError, ReshardError
from reshard.layout.join import Copy, collapse
from reshard.store import digest, local
from reshard.store.local import FileUpload, Pool

Array = np.ndarray[Any, Any]


@dataclass
class Store:
    """Files with stored tensors at odd offsets. `values`: a number per element of the storage, as wide as the dtype."""

    folder: Path
    entries: dict[Key, tuple[Path, Entry]] = field(default_factory=dict)
    storages: dict[Key, Array] = field(default_factory=dict)

    def add(
        self,
        key: Key,
        dtype: str,
        shape: Sequence[int],
        storage: Array,
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        path = self.folder / f"{key[0]}-{key[1]}"
        bits = BITS[dtype]
        path.write_bytes(b"\xa5" * offset + packed(storage, bits) + b"\x5a" * 5)
        nbytes = math.prod(shape) * bits // 8
        self.entries[key] = (path, Entry(dtype, tuple(shape), offset, nbytes, strides))
        self.storages[key] = storage

    def locate(self, key: Key) -> tuple[Path, Entry]:
        return self.entries[key]

    def tensor(self, key: Key) -> Array:
        """The elements as the entry describes them."""
        _, entry = self.entries[key]
        strides = entry.strides if entry.strides is not None else row_major(entry.shape)
        storage = self.storages[key]
        return np.lib.stride_tricks.as_strided(
            storage, entry.shape, [s * storage.itemsize for s in strides], writeable=False
        )


@dataclass
class Uploads:
    """The same, being written through a pool."""

    store: Store
    pool: Pool

    def locate(self, key: Key) -> tuple[FileUpload, Entry]:
        path, entry = self.store.locate(key)
        return FileUpload(self.pool, path), entry


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def packed(elements: Array, bits: int) -> bytes:
    """Elements as bytes, those of less than a byte one after another, low bits first."""
    if bits >= 8:
        return elements.astype(f"<u{bits // 8}").tobytes()
    spread = (elements.reshape(-1, 1) >> np.arange(bits, dtype=np.uint64)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def drawn(rng: np.random.Generator, count: int, bits: int) -> Array:
    return rng.integers(0, 1 << bits, count, dtype=np.uint64)


def as_plan(*jobs: Sequence[Copy]) -> Any:
    """What `run` needs of a plan: each of the jobs a component with a single point."""
    return SimpleNamespace(
        components=[SimpleNamespace(points=lambda: [{}], copies=lambda at, job=job: iter(job)) for job in jobs]
    )


def slot(rank: int) -> Any:
    return SimpleNamespace(rank=rank)


def copy_of(
    src: Key,
    src_shape: Sequence[int],
    box: Sequence[slice],
    order: Sequence[int],
    dst: Key,
    dst_offset: int,
    dst_strides: Any,
) -> Copy:
    """The copy of a box of a source, its axes in another order, to a place in the destination."""
    strides = row_major(src_shape)
    offset = sum(span.start * stride for span, stride in zip(box, strides, strict=True))
    dims = [(box[a].stop - box[a].start, strides[a], d) for a, d in zip(order, dst_strides, strict=True)]
    return Copy(
        slot(src[0]), src[1], offset, slot(dst[0]), dst[1], dst_offset, collapse(dim for dim in dims if dim[0] > 1)
    )


@dataclass
class Case:
    """Sources, destinations filled with zeros, the copies between them, and what the destinations must then hold."""

    source: Store
    target: Store
    copies: list[Copy]
    wanted: dict[Key, Array]


def strided(
    draw: Any, rng: np.random.Generator, shape: Sequence[int], bits: int
) -> tuple[Array, tuple[int, ...] | None]:
    """A storage and strides for it: row-major, axes in another order, with gaps, repeated (stride 0),
    or overlapping windows.
    """
    kind = draw(st.sampled_from(["plain", "plain", "transposed", "gaps", "expanded", "windows"]))
    if kind == "plain" or not shape:
        return drawn(rng, math.prod(shape), bits), None
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        if kind == "expanded" and draw(st.booleans()):
            strides[axis] = 0
            continue
        if kind == "windows" and draw(st.booleans()):
            step += draw(st.integers(0, 2))
            continue
        step *= shape[axis] + (draw(st.integers(0, 2)) if kind == "gaps" else 0)
    return drawn(rng, 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 3, bits), tuple(strides)


@st.composite
def cases(draw: Any, folder: Path, dtypes: Sequence[str], views: bool = False) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(list(dtypes)))
    bits = BITS[dtype]
    case = Case(Store(folder), Store(folder), [], {})
    rank = draw(st.integers(0, 4))
    extents = [draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16] if bits < 8 else [1, 2, 3, 5, 8, 17])) for _ in range(rank)]
    shapes = []
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(n + draw(st.sampled_from([0, 0, 1, 2, 5] if bits >= 8 else [0, 0, 4])) for n in extents)
        storage, strides = strided(draw, rng, shape, bits) if views else (drawn(rng, math.prod(shape), bits), None)
        assume(math.prod(shape) * bits % 8 == 0)  # safetensors knows only whole bytes
        case.source.add((number, f"s{number}"), dtype, shape, storage, draw(st.integers(0, 9)), strides)
        shapes.append(shape)
    for number in range(draw(st.integers(1, 4))):
        key = (number, f"d{number}")
        order = draw(st.permutations(range(rank)))
        parts = draw(st.lists(st.integers(0, len(shapes) - 1), min_size=1, max_size=3))
        joined = draw(st.integers(0, rank))  # where the parts lie side by side
        most = [min(shapes[one][a] for one in parts) for a in range(rank)]
        taken = [draw(st.sampled_from([n, m, 1] if bits >= 8 else [n, m])) for n, m in zip(extents, most, strict=True)]
        moved = [taken[a] for a in order]
        shape = (*moved[:joined], len(parts), *moved[joined:])
        strides = row_major(shape)
        rest = (*strides[:joined], *strides[joined + 1 :])
        wanted = np.zeros(shape, np.uint64)
        for at, one in enumerate(parts):
            starts = [draw(st.integers(0, have - n)) for have, n in zip(shapes[one], taken, strict=True)]
            box = [slice(a, a + n) for a, n in zip(starts, taken, strict=True)]
            src = (one, f"s{one}")
            case.copies.append(copy_of(src, shapes[one], box, order, key, at * strides[joined], rest))
            wanted[(slice(None),) * joined + (at,)] = case.source.tensor(src)[tuple(box)].transpose(order)
        assume(math.prod(shape) * bits % 8 == 0)
        case.target.add(key, dtype, shape, np.zeros(math.prod(shape), np.uint64), draw(st.integers(0, 9)))
        case.wanted[key] = wanted
    return case


def carry_out(case: Case, workers: int, tile: int, block: int) -> dict[Key, list[bytes]]:
    digests: dict[Key, list[bytes]] = {}
    with (
        patch.multiple(engine, TILE=tile, RUN=max(8, tile // 8), NARROW=max(8, tile // 16), STRIPE=max(2, tile // 64)),
        patch.object(digest, "BLOCK", block),
    ):
        pool, reader = Pool(os.O_RDWR), Pool()
        try:
            engine.run(
                as_plan(case.copies),
                case.source,
                case.target,
                lambda: Writer(Uploads(case.target, pool), digests),
                workers=workers,
                pool=reader,
            )
        finally:
            pool.close()
            reader.close()
    return digests


def check(case: Case, digests: dict[Key, list[bytes]], block: int) -> None:
    for key, wanted in case.wanted.items():
        path, entry = case.target.locate(key)
        data = path.read_bytes()
        content = packed(wanted, BITS[entry.dtype])
        assert data[entry.offset : entry.offset + entry.nbytes] == content, key
        assert data[: entry.offset] == b"\xa5" * entry.offset and data[entry.offset + entry.nbytes :] == b"\x5a" * 5, (
            f"{key}: written beside"
        )
        assert digests[key] == [
            xxhash.xxh3_128_digest(content[at : at + block]) for at in range(0, len(content), block)
        ], key


@given(
    data=st.data(),
    tile=st.sampled_from([64, 96, 256, 4096]),
    workers=st.integers(1, 3),
    block=st.sampled_from([16, 40, 1 << 20]),
)
@law(150)
def test_strided_copies_give_what_numpy_gives_and_digests_are_those_of_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tile: int, workers: int, block: int
) -> None:
    case = data.draw(cases(tmp_path_factory.mktemp("case"), ["U8", "BF16", "F32", "I64"]))
    check(case, carry_out(case, workers, tile, block), block)


@given(data=st.data(), tile=st.sampled_from([64, 96, 256, 4096]))
@law(150)
def test_views_of_a_storage_are_read_as_numpy_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tile: int
) -> None:
    """Transposed, with gaps, expanded (stride 0) and overlapping tensors, as `.bin` files hold them."""
    case = data.draw(cases(tmp_path_factory.mktemp("case"), ["U8", "F16", "F64"], views=True))
    check(case, carry_out(case, 1, tile, 1 << 20), 1 << 20)


def test_a_transposed_view_beside_one_that_repeats_elements(tmp_path: Path) -> None:
    case = Case(Store(tmp_path), Store(tmp_path), [], {})
    case.source.add((0, "s"), "F64", (7, 2, 3), drawn(np.random.default_rng(1), 21, 64), 0, (1, 0, 7))
    for name, box in (("d", [slice(4, 5), slice(0, 2), slice(0, 3)]), ("e", [slice(0, 7), slice(0, 1), slice(0, 3)])):
        case.wanted[0, name] = found = case.source.tensor((0, "s"))[tuple(box)]
        case.target.add((0, name), "F64", found.shape, np.zeros(found.size, np.uint64), 0)
        case.copies.append(copy_of((0, "s"), (7, 2, 3), box, (0, 1, 2), (0, name), 0, row_major(found.shape)))
    check(case, carry_out(case, 1, 96, 1 << 20), 1 << 20)


@given(data=st.data())
@law(150)
def test_elements_of_less_than_a_byte_move_in_whole_bytes_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    case = data.draw(cases(tmp_path_factory.mktemp("case"), [dtype for dtype, bits in BITS.items() if bits < 8]))
    try:
        digests = carry_out(case, 2, 96, 40)
    except ReshardError as error:
        event("refused")
        assert "tearing a byte" in error.message
        assert any(
            torn(copy, BITS[case.source.locate((copy.src.rank, copy.src_name))[1].dtype]) for copy in case.copies
        )
    else:
        check(case, digests, 40)


def torn(copy: Copy, bits: int) -> bool:
    """Whether some byte of the destination is not one whole byte of the source: every bit followed by hand."""
    src, dst = np.full((), copy.src_offset), np.full((), copy.dst_offset)
    for n, a, b in copy.dims:
        src, dst = src[..., None] + np.arange(n) * a, dst[..., None] + np.arange(n) * b
    into, out_of = ((at.reshape(-1, 1) * bits + np.arange(bits)).ravel().tolist() for at in (dst, src))
    pairs = sorted(zip(into, out_of, strict=True))
    return len(pairs) % 8 > 0 or any(
        [bit % 8 for bit, _ in pairs[at : at + 8]] != list(range(8))
        or [bit for _, bit in pairs[at : at + 8]] != list(range(pairs[at][1], pairs[at][1] + 8))
        or pairs[at][1] % 8
        for at in range(0, len(pairs), 8)
    )


@given(data=st.data(), tile=st.sampled_from([64, 256]))
@law(150)
def test_a_strided_destination_gets_what_a_strided_source_has(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tile: int
) -> None:
    """Merging back into a `.bin` file: both sides are views, of the same shape but of other strides;
    gaps are left alone.
    """
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    folder = tmp_path_factory.mktemp("case")
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    storage, strides = strided(data.draw, rng, shape, 16)
    source, target = Store(folder), Store(folder)
    source.add((0, "s"), "BF16", shape, storage, 3, strides)
    order = data.draw(st.permutations(range(len(shape))))
    wider = [shape[a] + data.draw(st.integers(0, 2)) for a in order]
    steps = row_major(wider)
    to = tuple(steps[order.index(a)] for a in range(len(shape)))
    target.add((0, "d"), "BF16", shape, np.zeros(math.prod(wider), np.uint64), 5, to)
    copies = [copy_of((0, "s"), shape, [slice(0, n) for n in shape], range(len(shape)), (0, "d"), 0, row_major(shape))]
    with patch.multiple(engine, TILE=tile, RUN=16, NARROW=8, STRIPE=4):
        pool, reader = Pool(os.O_RDWR), Pool()
        engine.run(
            as_plan(copies),
            source,
            target,
            lambda: Writer(Uploads(target, pool), {}, hashed=False),
            workers=1,
            pool=reader,
        )
        pool.close()
        reader.close()
    path, _ = target.locate((0, "d"))
    found = np.frombuffer(path.read_bytes()[5 : 5 + 2 * math.prod(wider)], "<u2").reshape(wider)
    wanted = np.zeros(wider, np.uint16)
    wanted[tuple(slice(0, shape[a]) for a in order)] = source.tensor((0, "s")).transpose(order)
    assert np.array_equal(found, wanted)


# What is read and written


class Counted(Pool):
    """A pool that adds up what passes through it."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        super().__init__(flags)
        self.read_bytes = self.written = self.calls = 0

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        self.read_bytes += len(buffer)
        self.calls += 1
        super().read_into(path, offset, buffer)

    def scatter(self, path: Path, offset: int, batches: Iterable[local.Batch]) -> None:
        batches = list(batches)
        self.read_bytes += sum(len(buffer) for buffers, _ in batches for buffer in buffers)
        self.calls += 1
        super().scatter(path, offset, batches)

    def write(self, path: Path, offset: int, data: Any) -> None:
        self.written += len(data)
        super().write(path, offset, data)


def matrix(folder: Path, rows: int, columns: int) -> tuple[Store, Store, Array]:
    source = Store(folder)
    values = np.random.default_rng(0).integers(0, 1 << 16, rows * columns, dtype=np.uint64)
    source.add((0, "s"), "BF16", (rows, columns), values, 1)
    return source, Store(folder), values.reshape(rows, columns)


def move(source: Store, target: Store, copies: list[Copy]) -> tuple[Counted, Counted]:
    reader, writer = Counted(), Counted(os.O_RDWR)
    with patch.multiple(engine, TILE=1024, RUN=256, NARROW=32, STRIPE=8):
        engine.run(as_plan(copies), source, target, lambda: Writer(Uploads(target, writer), {}), workers=1, pool=reader)
    reader.close()
    writer.close()
    return reader, writer


def test_a_matrix_cut_by_columns_among_ranks_is_read_once(tmp_path: Path) -> None:
    """A row-parallel weight, far larger than a tile: eight ranks and two replicas of the first are fed from one
    pass over its rows.
    """
    source, target, values = matrix(tmp_path, 96, 80)
    copies = []
    for rank in range(10):
        column = rank % 8 * 10
        target.add((rank, "d"), "BF16", (96, 10), np.zeros(960, np.uint64), 0)
        copies.append(
            copy_of((0, "s"), (96, 80), [slice(0, 96), slice(column, column + 10)], (0, 1), (rank, "d"), 0, (10, 1))
        )
    reader, writer = move(source, target, copies)
    assert reader.read_bytes == 96 * 80 * 2
    assert writer.written == 10 * 96 * 10 * 2
    for rank in range(10):
        want = values[:, rank % 8 * 10 :][:, :10]
        assert np.array_equal(np.frombuffer((tmp_path / f"{rank}-d").read_bytes()[:1920], "<u2").reshape(96, 10), want)


def test_columns_that_go_to_one_rank_each_are_laid_apart_by_the_read_itself(tmp_path: Path) -> None:
    """No gathering; also where ranks are unequal, where a call fills fewer buffers than there are pieces,
    and where it reads too little.
    """
    source, target, values = matrix(tmp_path, 96, 80)
    copies, starts = [], [0, 30, 50, 70, 80]
    for rank, (a, b) in enumerate(pairwise(starts)):
        target.add((rank, "d"), "BF16", (96, b - a), np.zeros(96 * (b - a), np.uint64), 0)
        copies.append(copy_of((0, "s"), (96, 80), [slice(0, 96), slice(a, b)], (0, 1), (rank, "d"), 0, (b - a, 1)))
    short = Mock(
        wraps=lambda descriptor, views, at, real=os.preadv: real(descriptor, [views[0][:7]] if at % 5 else views, at)
    )
    with (
        patch.object(engine.Worker, "_gather", side_effect=AssertionError("gathered")),
        patch.object(local, "VIEWS", 7),
        patch.object(os, "preadv", short),
    ):
        reader, writer = move(source, target, copies)
    assert short.called
    assert reader.read_bytes == writer.written == 96 * 80 * 2
    for rank, (a, b) in enumerate(pairwise(starts)):
        found = np.frombuffer((tmp_path / f"{rank}-d").read_bytes()[: 96 * (b - a) * 2], "<u2").reshape(96, b - a)
        assert np.array_equal(found, values[:, a:b])


def test_a_transposed_matrix_is_read_once_and_written_in_long_runs(tmp_path: Path) -> None:
    """Tile by tile: not one element per call on either side."""
    source, target, values = matrix(tmp_path, 96, 80)
    target.add((0, "d"), "BF16", (80, 96), np.zeros(96 * 80, np.uint64), 0)
    reader, writer = move(
        source, target, [copy_of((0, "s"), (96, 80), [slice(0, 96), slice(0, 80)], (1, 0), (0, "d"), 0, (96, 1))]
    )
    assert reader.read_bytes == writer.written == 96 * 80 * 2
    assert reader.calls <= 96 * 80 / 8
    assert np.array_equal(np.frombuffer((tmp_path / "0-d").read_bytes()[:-5], "<u2").reshape(80, 96), values.T)


def test_a_truncated_source_ends_all_workers_with_an_error_that_names_the_file(tmp_path: Path) -> None:
    source, target, _ = matrix(tmp_path, 96, 80)
    (tmp_path / "0-s").write_bytes((tmp_path / "0-s").read_bytes()[:9000])
    copies = []
    for rank in range(8):
        target.add((rank, "d"), "BF16", (12, 80), np.zeros(960, np.uint64), 0)
        copies.append(
            copy_of(
                (0, "s"), (96, 80), [slice(12 * rank, 12 * rank + 12), slice(0, 80)], (0, 1), (rank, "d"), 0, (80, 1)
            )
        )
    pool, reader = Pool(os.O_RDWR), Pool()
    with pytest.raises(ReshardError, match=r"0-s: expected \d+ bytes at offset \d+, the file ends at 9000"):
        engine.run(
            as_plan(*[[copy] for copy in copies]),
            source,
            target,
            lambda: Writer(Uploads(target, pool), {}),
            workers=3,
            pool=reader,
        )
    for thread in threading.enumerate():  # a worker is done a moment before its thread has ended
        if thread.name.startswith("reshard-"):
            thread.join()
    pool.close()
    reader.close()


def test_a_source_that_cannot_be_opened_is_a_failure_of_the_machine(tmp_path: Path) -> None:
    source, target, _ = matrix(tmp_path, 4, 4)
    (tmp_path / "0-s").unlink()
    target.add((0, "d"), "BF16", (4, 4), np.zeros(16, np.uint64), 0)
    copy = copy_of((0, "s"), (4, 4), [slice(0, 4), slice(0, 4)], (0, 1), (0, "d"), 0, (4, 1))
    with pytest.raises(PlaceError, match="0-s"):
        engine.run(
            as_plan([copy]),
            source,
            target,
            lambda: Writer(Uploads(target, Pool(os.O_RDWR)), {}),
            workers=2,
            pool=Pool(),
        )


def test_nothing_is_done_after_a_stop(tmp_path: Path) -> None:
    source, target, _ = matrix(tmp_path, 4, 4)
    target.add((0, "d"), "BF16", (4, 4), np.zeros(16, np.uint64), 0)
    copy = copy_of((0, "s"), (4, 4), [slice(0, 4), slice(0, 4)], (0, 1), (0, "d"), 0, (4, 1))
    stop = threading.Event()
    stop.set()
    pool = Pool(os.O_RDWR)
    engine.run(
        as_plan([copy]), source, target, lambda: Writer(Uploads(target, pool), {}), workers=1, pool=Pool(), stop=stop
    )
    assert not any((tmp_path / "0-d").read_bytes()[:32])


def test_progress_adds_up_to_the_bytes_read(tmp_path: Path) -> None:
    source, target, _ = matrix(tmp_path, 96, 80)
    target.add((0, "d"), "BF16", (96, 80), np.zeros(96 * 80, np.uint64), 0)
    seen: list[int] = []
    pool = Pool(os.O_RDWR)
    copy = copy_of((0, "s"), (96, 80), [slice(0, 96), slice(0, 80)], (0, 1), (0, "d"), 0, (80, 1))
    with patch.object(engine, "TILE", 1024):
        engine.run(
            as_plan([copy]),
            source,
            target,
            lambda: Writer(Uploads(target, pool), {}, hashed=False),
            workers=1,
            pool=Pool(),
            progress=seen.append,
        )
    assert sum(seen) == 96 * 80 * 2 and len(seen) > 8


# Pieces


def flat(src: str, low: int, high: int, dst: str, at: int = 0) -> Copy:
    return Copy(slot(0), src, low, slot(0), dst, at, ((high - low, 1, 1),))


def test_copies_that_share_a_destination_or_source_bytes_stay_in_one_job_and_the_rest_part() -> None:
    a, b = flat("q", 0, 8, "qkv"), flat("k", 0, 8, "qkv", 8)
    c, d = flat("w", 0, 8, "r0"), flat("w", 4, 12, "r1")
    e, f = flat("w", 12, 20, "r2"), flat("x", 0, 4, "r3")
    assert sorted(map(len, split([a, c, b, e, d, f]))) == [1, 1, 2, 2]
    assert [a, b] in list(split([a, c, b, e, d, f]))
    assert [c, d] in list(split([a, c, b, e, d, f]))


def test_a_copy_between_tensors_of_different_dtypes_is_refused_by_name() -> None:
    with pytest.raises(ReshardError, match="qkv: dtype F16 is wanted, q is BF16"):
        in_items(flat("q", 0, 4, "qkv"), Entry("BF16", (4,), 0, 8), Entry("F16", (4,), 0, 8))


@pytest.mark.parametrize(
    ("dtype", "offset", "n", "items"),
    [
        ("F4", 2, 4, (1, 2, 1)),
        ("F4", 0, 2, (0, 1, 1)),
        ("F6_E2M3", 4, 4, (3, 3, 1)),
        ("BF16", 3, 5, (3, 5, 2)),
        ("C64", 1, 2, (1, 2, 8)),
    ],
)
def test_items_are_elements_or_bytes(dtype: str, offset: int, n: int, items: tuple[int, int, int]) -> None:
    entry = Entry(dtype, (64,), 0, 64 * BITS[dtype] // 8)
    start, _, dims, size = in_items(Copy(slot(0), "a", offset, slot(0), "b", 0, ((n, 1, 1),)), entry, entry)
    assert (start, math.prod(m for m, _, _ in dims), size) == items


@pytest.mark.parametrize(("dtype", "offset", "n"), [("F4", 1, 2), ("F4", 0, 3), ("F6_E3M2", 2, 4), ("F6_E2M3", 0, 3)])
def test_a_torn_byte_is_refused(dtype: str, offset: int, n: int) -> None:
    entry = Entry(dtype, (64,), 0, 64 * BITS[dtype] // 8)
    with pytest.raises(ReshardError, match=f"a: {dtype} elements of {BITS[dtype]} bits"):
        in_items(Copy(slot(0), "a", offset, slot(0), "b", 0, ((n, 1, 1),)), entry, entry)


def test_a_worker_allocates_two_tiles_and_no_more(tmp_path: Path) -> None:
    worker = Worker(
        Store(tmp_path), Store(tmp_path), Writer(Uploads(Store(tmp_path), Pool()), {}), Pool(), lambda _: None
    )
    assert worker._in.nbytes + worker._out.nbytes == 2 * engine.TILE <= 8 << 20
