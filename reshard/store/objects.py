"""Writing to a store of objects, which cannot rename: files are sent in parts as they are filled, and the one without
which nothing opens the rest appears last, unless somebody else's is there by then.

    claim → begin, send parts in any order … → finish all files → put the last one → remove the claim

Of a file no more is held in memory than the parts that are not settled. Knows nothing about any particular store: it
asks for what `Objects` lists.
"""

import os
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ..errors import PlaceError, ReshardError
from ..threads import each
from . import workfolder, writable
from .digest import Buffer, of
from .publish import undisturbed
from .writable import Destination, Stretch, Transaction, Upload

SMALL = 8 << 20  # bytes of a file that is put at once
CLAIM = f"{workfolder.INSIDE}/claim"  # there while a job is at work, and after it was killed


class Parts(Protocol):
    """The upload of one file, begun: nothing of it is there before it is finished. `size`: bytes of each part but the
    last. All of its state is the store's, so that any process that has these values may send parts.

    Raises PlaceError where the store fails; it retries by itself what may be different in a moment.
    """

    size: int

    def send(self, number: int, data: Buffer) -> None:
        """Part `number`, from 0 on: in any order, by several threads at once. A part that is sent again is replaced."""

    def finish(self) -> None:
        """All parts are there: the file appears. Raises PlaceError where the store tells another size or digest."""

    def abort(self) -> None:
        """Forget all parts; of one that is finished, nothing is done."""


class Objects(Destination):
    """A store of objects as a destination; it must be empty. A module of a store implements these four."""

    given: str

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Of all files there. Raises ReshardError where that is refused, PlaceError where the store fails."""

    @abstractmethod
    def begin(self, name: str, size: int) -> Parts:
        """The upload of a new file of `size` bytes, at least one. Raises as `names` does."""

    @abstractmethod
    def put(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """A small file, at once and whole. With `new`, False where there is one of that name and of other bytes: it is
        decided by the store, so that of two jobs one succeeds. Raises as `names` does.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is removed. Raises as `names` does."""

    def check(self, source: Path | None, files: Iterable[Path]) -> None:
        """A local source cannot be harmed, and only a person can tell whether the job that claimed it was killed."""

    def occupied(self) -> bool:
        return any(True for _ in self.names())

    def existing(self) -> Path:
        raise ReshardError(
            f"{self.given}: is not empty; what is in a store is neither compared nor replaced",
            f"choose another destination, or delete what is there; {CLAIM} is of a job at work, or a killed one",
        )

    def check_space(self, needed: int) -> None:
        """A store does not tell."""

    def transaction(self, last: str, *, replace: bool, durable: bool) -> Transaction:
        return _Transaction(self, last)


class _Transaction(Transaction):
    def __init__(self, place: Objects, last: str) -> None:
        self._place, self._last = place, last
        self._filling: dict[str, Filling] = {}
        self._there: list[str] = []  # files that appeared
        self._opener: bytes | None = None  # what the last file will be

    def __enter__(self) -> "Transaction":
        writable.published = None
        with undisturbed():
            # Its bytes tell this job's claim from another's where the store's answer is lost and it asks again.
            if not self._place.put(CLAIM, os.urandom(16).hex().encode(), new=True):
                raise PlaceError(
                    f"{self._place.given}: another job is writing it, or was killed",
                    f"wait until it has finished; if there is none, delete what is there, {CLAIM} last",
                )
            self._there.append(CLAIM)
        try:
            if any(name != CLAIM for name in self._place.names()):
                raise PlaceError(f"{self._place.given}: appeared while the job ran", "choose another destination")
        except BaseException:
            self._withdraw()
            raise
        return self

    def create(self, name: str, size: int, stretches: Iterable[Stretch]) -> Upload:
        filling = self._filling[name] = Filling(self._place.begin(name, size), size, stretches)
        return filling

    def write(self, name: str, size: int, pieces: Iterable[Buffer], mtime_ns: int | None = None) -> str:
        if size > SMALL and name != self._last:
            return super().write(name, size, pieces, mtime_ns)
        data = b"".join(pieces)
        if name == self._last:
            self._opener = data
        else:
            self._there.append(name)
            self._place.put(name, data)
        return of(data)

    def date(self, name: str, mtime_ns: int) -> None:
        """A store keeps no times that a re-run could go by."""

    def commit(self, threads: int = 1) -> None:
        def finish(name: str) -> None:
            self._there.append(name)
            self._filling[name].finish()

        each(list(self._filling), finish, threads)
        assert self._opener is not None
        with undisturbed():
            self._there.append(self._last)
            if not self._place.put(self._last, self._opener, new=True):
                self._there.remove(self._last)
                raise PlaceError(f"{self._place.given}: {self._last} appeared while the job ran", "is another at work?")
            writable.published = self._place.given
            self._filling, self._there = {}, [CLAIM]
            self._withdraw()

    def _withdraw(self) -> None:
        """Remove what appeared, first what opens the rest, last the claim. What cannot be removed stays claimed."""
        for filling in self._filling.values():
            with suppress(ReshardError):
                filling.parts.abort()
        with suppress(ReshardError):
            while self._there:
                self._place.delete(self._there[-1])
                self._there.pop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            self._withdraw()


class Filling(Upload):
    """A file that is assembled from whatever order its bytes come in, part by part. A part is sent by whoever settles
    the last stretch that reaches into it.
    """

    def __init__(self, parts: Parts, size: int, stretches: Iterable[Stretch]) -> None:
        self.parts, self._size, self._lock = parts, size, threading.Lock()
        self._waits = dict.fromkeys(range(-(-size // parts.size)), 0)  # part, not sent → stretches that are not settled
        self._held: dict[int, memoryview] = {}
        for offset, length in stretches:
            for number, _, _ in self._cut(offset, length):
                self._waits[number] += 1

    def _cut(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(part, offset in it, length) of each piece of a stretch."""
        end = offset + length
        while offset < end:
            number, start = divmod(offset, self.parts.size)
            piece = min(self.parts.size - start, end - offset)
            yield number, start, piece
            offset += piece

    def _part(self, number: int) -> memoryview:
        with self._lock:
            found = self._held.get(number)
            if found is None:
                assert number in self._waits, "written to what is settled"
                length = min(self.parts.size, self._size - number * self.parts.size)
                found = self._held[number] = memoryview(bytearray(length))
            return found

    def write(self, offset: int, data: Buffer) -> None:
        view, at = memoryview(data), 0
        for number, start, length in self._cut(offset, len(view)):
            self._part(number)[start : start + length] = view[at : at + length]
            at += length

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self._part(number)[start : start + n] for number, start, n in self._cut(offset, length))

    def settle(self, offset: int, length: int) -> None:
        for number, _, _ in self._cut(offset, length):
            with self._lock:
                self._waits[number] -= 1
                if self._waits[number]:
                    continue
            self._send(number)

    def finish(self) -> None:
        """Send what nothing is ever written to, and let the file appear."""
        assert not any(self._waits.values()), "finished before all is settled"
        for number in list(self._waits):
            self._send(number)
        self.parts.finish()

    def _send(self, number: int) -> None:
        data = self._part(number)
        self.parts.send(number, data)
        with self._lock:
            del self._waits[number], self._held[number]
