"""Copies in whole items: elements, or bytes where those are smaller; by the strides that both tensors are stored with.

Knows entries and dtypes, nothing about files.
"""

from collections.abc import Iterator, Sequence

from ..containers.dtypes import BITS
from ..containers.entry import Entry
from ..errors import ReshardError
from ..layout.join import Copy, Dim, collapse


def in_items(copy: Copy, src: Entry, dst: Entry) -> tuple[int, int, tuple[Dim, ...], int]:
    """A copy in whole items: (source offset, destination offset, dims, bytes per item).

    An item is an element, or a byte where elements are smaller; strided storages of `.bin` files are resolved here.
    """
    bits = BITS[src.dtype]
    if src.dtype != dst.dtype:
        raise ReshardError(f"{copy.dst_name}: dtype {dst.dtype} is wanted, {copy.src_name} is {src.dtype}")
    offset, to_offset, dims = copy.src_offset, copy.dst_offset, list(copy.dims)
    if src.strides is not None:
        offset, dims = _strided(offset, dims, src, 1)
    if dst.strides is not None:
        to_offset, dims = _strided(to_offset, dims, dst, 2)
    if src.strides is not None or dst.strides is not None:
        dims = list(collapse(dims))
    if bits % 8 == 0:
        return offset, to_offset, tuple(dims), bits // 8
    n, s, d = dims.pop() if dims and dims[-1][1] == dims[-1][2] == 1 else (1, 1, 1)
    places = [offset, to_offset, n, *(stride for dim in dims for stride in dim[1:])]
    if any(place * bits % 8 for place in places):
        raise ReshardError(
            f"{copy.src_name}: {src.dtype} elements of {bits} bits cannot be cut or moved here without tearing a byte",
            "choose a size that keeps whole bytes together",
        )
    scaled = [(count, a * bits // 8, b * bits // 8) for count, a, b in dims]
    return offset * bits // 8, to_offset * bits // 8, (*scaled, (n * bits // 8, s, d)), 1


def _strided(offset: int, dims: Sequence[Dim], entry: Entry, side: int) -> tuple[int, list[Dim]]:
    """Row-major offset and strides of one side (1 source, 2 destination) as they are in a strided storage."""
    assert entry.strides is not None
    pitches: list[int] = []
    pitch = 1
    for size in reversed(entry.shape):
        pitches.insert(0, pitch)
        pitch *= max(size, 1)
    real = sum(
        offset // pitch % size * stride for pitch, size, stride in zip(pitches, entry.shape, entry.strides, strict=True)
    )
    found: list[Dim] = []
    for dim in dims:
        found += _resolve(list(dim), side, pitches, entry)
    return real, found


def _resolve(dim: list[int], side: int, pitches: Sequence[int], entry: Entry) -> Iterator[Dim]:
    """One dimension, split where it runs over several stored dimensions."""
    n, step = dim[0], dim[side]
    done = 1
    for at in reversed(range(len(pitches))):
        pitch, size = pitches[at], entry.shape[at]
        if done == n or step * done >= pitch * size or step * done < pitch:
            continue
        here = min(n // done, pitch * size // (step * done))
        assert entry.strides is not None
        part = [here, dim[1] * done, dim[2] * done]
        part[side] = step * done // pitch * entry.strides[at]
        yield (part[0], part[1], part[2])
        done *= here
