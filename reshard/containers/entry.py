"""An entry: where one stored tensor lies in its file, whatever the container; and a header: all entries of a file.

Knows nothing about how a container says so.
"""

from typing import NamedTuple

from .dtypes import BITS


class Entry(NamedTuple):
    """Where one stored tensor lies. `offset` in its file and `nbytes` in bytes, `strides` in elements."""

    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None  # None: row-major, as safetensors always is; in .bin files they may differ


class Header(NamedTuple):
    """What one file holds: its tensors in its own order, its free-text metadata, and the byte at which data starts."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def extent(entry: Entry) -> int:
    """Bytes from a tensor's first to its last element in its file, which is more than `nbytes` where it is strided."""
    if entry.strides is None or not entry.nbytes:
        return entry.nbytes
    reach = 1 + sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))
    return reach * BITS[entry.dtype] // 8
