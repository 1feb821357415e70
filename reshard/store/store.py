"""What a place that holds files has to offer: `Store`, and reading from one by offset.

A byte's address is (store, name, offset, length). Local directories are read by descriptors, in `local`; any other
place is a `Store` in a module of its own, with a row in `location.SCHEMES`. Writing is in `writable`. Knows nothing
about what the bytes are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import PlaceError
from ..inputs import decode
from ..text.progress import Progress


class File(NamedTuple):
    """What a store says of a file: bytes, and digests as far as they are known without reading it."""

    size: int
    sha256: str | None = None
    blob: str | None = None  # the id that git gives it


@dataclass(frozen=True, kw_only=True)
class Store(ABC):
    """The files of one place, in one state: whoever opens a store fixes which (a commit, an etag of each file).

    `where`: what messages call it. `files`: every path in it. Whatever is refused raises ReshardError; PlaceError is
    raised where the store or the way to it fails, and where a file is no longer what `files` says of it.
    """

    where: str
    files: Mapping[str, File]

    @abstractmethod
    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly the bytes from `offset` on, which lie within the file; called by several threads at once.

        Retries by itself what may be different in a moment. Of a server that sends more, no more than a bounded excess
        is received.
        """

    def whole(self, name: str, most: int) -> bytes:
        """A file of at most `most` bytes; a larger one is refused unread."""
        size = self.files[name].size
        decode.fits(size, most, f"{self.where}/{name}")
        return self.read(name, 0, size) if size else b""

    def fetch(self, names: list[str], progress: Progress) -> Path | None:
        """A local directory that holds these files from now on, where the store keeps a cache of them; None:
        they are read by range.
        """
        return None

    @property
    def origin(self) -> tuple[str | None, str | None, str | None]:
        """What is known of the files' provenance: a model's id, commit and licence."""
        return None, None, None


class Ahead:
    """A file of a store that is read like a local one: a request brings `ahead` bytes at least, and no byte is asked
    for twice.
    """

    def __init__(self, store: Store, name: str, ahead: int) -> None:
        self.store, self.name, self.size, self.ahead = store, name, store.files[name].size, ahead
        self.known: list[tuple[int, bytes]] = []  # offset, bytes from there on

    def __call__(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset` on; fewer at the end of the file."""
        at, end = offset, min(offset + length, self.size)
        parts = []
        while at < end:
            found = next(((low, data) for low, data in self.known if low <= at < low + len(data)), None)
            if found is None:
                wanted = end if at > offset else max(end, at + self.ahead)
                high = min(wanted, min((low for low, _ in self.known if low > at), default=self.size))
                found = at, exactly(self.store, self.name, at, high - at)
                self.known.append(found)
            low, data = found
            parts.append(data[at - low : end - low])
            at += len(parts[-1])
        return b"".join(parts)


@dataclass(frozen=True)
class Address:
    """Where a file of a store is. `local.Pool` reads it as it reads a local path."""

    store: Store = field(hash=False)  # it has a mapping
    name: str

    def __str__(self) -> str:
        return self.name


AnyFile = Path | Address


def short(file: AnyFile) -> str:
    """A file as messages name it: its own name and that of its folder."""
    return "/".join(PurePosixPath(str(file)).parts[-2:])


def exactly(store: Store, name: str, offset: int, length: int) -> bytes:
    """So many bytes of a file, or PlaceError."""
    data = store.read(name, offset, length)
    if len(data) != length:
        raise PlaceError(
            f"{store.where}/{name}: expected {length} bytes at offset {offset}, got {len(data)}",
            "it is truncated, or was changed while it was being read",
        )
    return data
