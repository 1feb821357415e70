"""The sink of a conversion: stored tensors are written where they belong, hashed, and settled when they are whole."""

from collections.abc import Iterable
from functools import partial
from typing import Protocol

from ..containers.entry import Entry, extent
from ..store.digest import BlockHasher, Buffer
from ..store.writable import Upload
from .worker import Key


class Written(Protocol):
    """Where the stored tensors of a destination are being written."""

    def locate(self, key: Key) -> tuple[Upload, Entry]: ...


class Writer:
    """Writes stored tensors, and hashes them as they arrive if they are `hashed`; `digests` collects each tensor's
    block digests, none of one that is not.
    """

    def __init__(self, destination: Written, digests: dict[Key, list[bytes]], hashed: bool = True) -> None:
        self.destination, self.digests, self.hashed = destination, digests, hashed
        self._hashers: dict[Key, BlockHasher] = {}

    def put(self, key: Key, offset: int, data: memoryview) -> None:
        file, entry = self.destination.locate(key)
        file.write(entry.offset + offset, data)
        if self.hashed:
            hasher = self._hashers.get(key)
            if hasher is None:
                hasher = self._hashers[key] = BlockHasher(entry.nbytes)
            hasher.update(offset, data)

    def done(self, keys: Iterable[Key]) -> None:
        for key in keys:
            file, entry = self.destination.locate(key)
            blocks: list[bytes] = []
            if self.hashed:
                hasher = self._hashers.pop(key, None) or BlockHasher(entry.nbytes)
                blocks = hasher.blocks(partial(_part, file, entry.offset))
            self.digests[key] = blocks
            file.settle(entry.offset, extent(entry))


def _part(file: Upload, start: int, at: int, length: int) -> Buffer:
    return file.read(start + at, length)
