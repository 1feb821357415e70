"""Reading and writing files by offset: a bounded pool of descriptors, whole transfers or a clear error. Never maps a
file.

Files of other stores are read through it too.
"""

import errno
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import PlaceError, failed
from .digest import Buffer
from .store import Address, AnyFile, exactly
from .writable import Upload

Views = Sequence[memoryview]
Batch = tuple[Views, int]  # what one system call fills, and how many bytes that are

# Bytes per write: ext4 answers larger ones with folios so large that filling them misses every cache, at four times the
# CPU.
PIECE = 1 << 20

VIEWS = os.sysconf("SC_IOV_MAX")  # buffers that one system call fills

_OTHERS = 24  # descriptors that a process has beside those of its pools

CHUNK = 4 << 20  # bytes: residues and carried files are moved in such pieces


class Stamp(NamedTuple):
    """Tells one state of a file from another. Size and mtime can be the same by intent or by chance (`cp -p`, image
    layers that set every time to 1970); ctime and inode cannot be chosen."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def check_stamp(path: Path, stamp: Stamp, status: os.stat_result | None) -> None:
    """Raise PlaceError if a file is not what it was when it was opened first; `status` is None if it is gone."""
    found = None if status is None else Stamp.of(status)
    if found != stamp:
        if found is None:
            what = "it is gone"
        elif found[:2] != stamp[:2]:
            what = f"it had {stamp.size} bytes, now {found.size}" if found.size != stamp.size else "its mtime changed"
        else:
            what = "another file has taken its place" if found.inode != stamp.inode else "its ctime changed"
        raise PlaceError(
            f"{path}: was changed while it was being read: {what}", "convert again once nothing writes to it"
        )


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise PlaceError if a file that was read is not what it was when it was opened first."""
    for path, stamp in stamps.items():
        try:
            status = path.stat()
        except FileNotFoundError:
            status = None
        check_stamp(path, stamp, status)


def buffer(size: int) -> memoryview:
    """So many bytes of memory, of which no page is taken before it is written to."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def batches(buffers: Views) -> list[Batch]:
    """Many buffers as system calls take them; to be kept where they are filled again, since counting takes as long as a
    call.
    """
    parts = [buffers[first : first + VIEWS] for first in range(0, len(buffers), VIEWS)]
    return [(part, sum(map(len, part))) for part in parts]


class Pool:
    """Open descriptors by path, closed in the order of least recent use when there are too many; safe among threads.

    An `Address` is read from its store.

    A path that has one of the `stamps` must still be that file when it is opened: PlaceError otherwise.
    """

    def __init__(self, flags: int = os.O_RDONLY, most: int = 128, stamps: Mapping[Path, Stamp] | None = None) -> None:
        self._flags, self._stamps = flags | os.O_CLOEXEC, stamps or {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 63)  # -1 is none
        self._most = min(most, max(1, (limit - _OTHERS) // 2))  # there are two pools, mostly
        self._open: OrderedDict[Path, tuple[int, list[int]]] = OrderedDict()  # path → (descriptor, [users])
        self._lock = threading.Lock()

    def read_into(self, path: AnyFile, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from `offset` on."""
        self._transfer(path, offset, (buffer,), len(buffer), os.preadv, "reading")

    def scatter(self, path: AnyFile, offset: int, batches: Iterable[Batch]) -> None:
        """Fill many buffers, one after another, from `offset` on."""
        for buffers, size in batches:
            self._transfer(path, offset, buffers, size, os.preadv, "reading")
            offset += size

    def read(self, path: AnyFile | bytes, offset: int, length: int) -> bytearray:
        """Bytes of a file, or of bytes that are at hand."""
        if isinstance(path, bytes):
            return bytearray(path[offset : offset + length])
        data = bytearray(length)
        self.read_into(path, offset, memoryview(data))
        return data

    def chunks(self, path: AnyFile | bytes, offset: int, length: int) -> Iterator[bytearray]:
        """The same, in pieces of CHUNK bytes."""
        for at in range(0, length, CHUNK):
            yield self.read(path, offset + at, min(CHUNK, length - at))

    def write(self, path: Path, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        for at in range(0, len(view), PIECE):
            piece = view[at : at + PIECE]
            self._transfer(path, offset + at, (piece,), len(piece), os.pwritev, "writing")

    def _transfer(
        self, path: AnyFile, offset: int, buffers: Views, left: int, call: Callable[[int, Views, int], int], doing: str
    ) -> None:
        """All of the buffers, which are `left` bytes."""
        if isinstance(path, Address):
            data, at = exactly(path.store, path.name, offset, left), 0
            for buffer in buffers:
                buffer[:] = data[at : at + len(buffer)]
                at += len(buffer)
            return
        descriptor, users = self._take(path)
        try:
            while left:
                done = call(descriptor, buffers, offset)
                if done == 0:
                    size = os.fstat(descriptor).st_size
                    raise PlaceError(
                        f"{path}: expected {left} bytes at offset {offset}, the file ends at {size}",
                        "it is truncated, or was changed while it was being read",
                    )
                offset += done
                left -= done
                if left:
                    buffers = _after(buffers, done)
        except OSError as error:
            raise failed(doing, path, error) from error
        finally:
            with self._lock:
                users[0] -= 1

    def _take(self, path: Path) -> tuple[int, list[int]]:
        with self._lock:
            found = self._open.get(path)
            if found is None:
                while len(self._open) >= self._most and self._evict():
                    pass
                while found is None:
                    try:
                        found = (os.open(path, self._flags), [0])
                    except OSError as error:
                        if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict():
                            raise failed("opening", path, error) from error
                if (stamp := self._stamps.get(path)) is not None:
                    try:
                        check_stamp(path, stamp, os.fstat(found[0]))
                    except BaseException:
                        os.close(found[0])
                        raise
                self._open[path] = found
            self._open.move_to_end(path)
            found[1][0] += 1
            return found

    def _evict(self) -> bool:
        for path, (descriptor, users) in self._open.items():
            if not users[0]:
                del self._open[path]
                try:
                    os.close(descriptor)
                except OSError as error:
                    if self._flags & os.O_ACCMODE != os.O_RDONLY:
                        raise failed("closing", path, error) from error
                return True
        return False

    def close(self) -> None:
        """Close everything. Raises PlaceError where a file that was written to fails to close: it may lack what was
        written last.
        """
        problem = None
        with self._lock:
            while self._open:
                path, (descriptor, _) = self._open.popitem()
                try:
                    os.close(descriptor)
                except OSError as error:
                    problem = problem or failed("closing", path, error)
        if problem is not None and self._flags & os.O_ACCMODE != os.O_RDONLY:
            raise problem


class FileUpload(Upload):
    """A local file that is being written, through a pool that opens for reading and writing."""

    __slots__ = ("path", "pool")

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool, self.path = pool, path

    def write(self, offset: int, data: Buffer) -> None:
        self.pool.write(self.path, offset, data)

    def read(self, offset: int, length: int) -> bytearray:
        return self.pool.read(self.path, offset, length)

    def settle(self, offset: int, length: int) -> None:
        """It is where it belongs."""


def _after(buffers: Views, done: int) -> Views:
    """What is left of the buffers when so many bytes of them are done."""
    for n, buffer in enumerate(buffers):
        if done < len(buffer):
            return (buffer[done:], *buffers[n + 1 :])
        done -= len(buffer)
    return ()
