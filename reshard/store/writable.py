"""What a place that is written to has to offer: a `Destination`; the `Transaction` of one conversion; its `Upload`s.

    destination.check → transaction: create each file, write at any offset, settle, write small files → commit

A local directory is one in `publish`, by a work folder and renames. A store of objects is one by `objects`, which asks
it for less: parts, small files, deletion. Knows nothing about what the bytes are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from .digest import Buffer, Hasher

Stretch = tuple[int, int]  # offset, length

published: object = None  # by the last job of this process that did: whoever interrupts it after that is told so


class Upload(ABC):
    """A file that is being written: of known size, zero where nothing is written. Several threads use it at once, each
    for stretches of its own.

    Raises PlaceError where the place or the way to it fails; it retries by itself what may be different in a moment.
    """

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`: in any order, but nothing to what is settled. The buffer is
        the caller's again afterwards.
        """

    @abstractmethod
    def read(self, offset: int, length: int) -> Buffer:
        """What stands there now, of a stretch that is not settled: a digest needs again what came out of order."""

    @abstractmethod
    def settle(self, offset: int, length: int) -> None:
        """A stretch that `create` was told of is final, and may be sent away. Called once for each of them."""


class Transaction(ABC):
    """The files of one conversion, which appear together or not at all. A context manager: entering it claims the
    destination, leaving it without a commit removes all that it wrote.

    Entering raises PlaceError while another job is at the destination, and where something appeared there since it was
    checked. Everything else raises PlaceError, or the OSError of a local file system, where the place fails.
    """

    @abstractmethod
    def __enter__(self) -> "Transaction": ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def create(self, name: str, size: int, stretches: Iterable[Stretch]) -> Upload:
        """A new file of `size` bytes. Each of the `stretches`, which may overlap, is going to be settled; outside of
        them nothing is written.

        Raises PlaceError where the place takes the name for that of another file.
        """

    def write(self, name: str, size: int, pieces: Iterable[Buffer], mtime_ns: int | None = None) -> str:
        """A new file, piece after piece, and its digest. Raises as `create` does, and whatever `pieces` raises."""
        upload, state, at = self.create(name, size, [(0, size)]), Hasher(), 0
        for piece in pieces:
            upload.write(at, piece)
            state.update(piece)
            at += len(piece)
        upload.settle(0, size)
        return state.hexdigest()

    def put(self, name: str, data: bytes) -> str:
        """A new small file, and its digest. Raises as `create` does."""
        return self.write(name, len(data), (data,))

    @abstractmethod
    def date(self, name: str, mtime_ns: int) -> None:
        """Give a file that was written its time, where the place keeps times."""

    @abstractmethod
    def commit(self, threads: int = 1) -> None:
        """Let all files appear, the `last` one last: without it nothing opens the rest. For good where `durable`.

        When it raises, the destination is what it was. Signals to stop wait while it is decided; `published` tells.
        """


class Destination(ABC):
    """A place that a conversion is written to. `given`: what the user calls it."""

    given: Path | str

    @abstractmethod
    def check(self, source: Path | None, files: Iterable[Path]) -> None:
        """Mend what a killed job left, and refuse what cannot be written to without harm to the source: its directory,
        and `files` that belong to it.

        Raises ReshardError for what is refused, PlaceError while another job is at it.
        """

    @abstractmethod
    def occupied(self) -> bool:
        """Whether anything is there that is not the work of a job."""

    @abstractmethod
    def existing(self) -> Path:
        """The directory that is there, for a re-run or to be replaced. Raises ReshardError where it can be neither."""

    @abstractmethod
    def check_space(self, needed: int) -> None:
        """Raise PlaceError where less than so many bytes are known to be free."""

    @abstractmethod
    def transaction(self, last: str, *, replace: bool, durable: bool) -> Transaction:
        """Of the next conversion, not begun. `replace`: what is there gives way on commit, and not before."""

    def notes(self) -> tuple[str, ...]:
        """What a person should know of its surroundings: the leavings of killed jobs."""
        return ()
