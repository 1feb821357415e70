"""Publishing: a directory appears whole or not at all. One writer per destination; a killed job leaves nothing under
its name.

OUT absent          work grows next to it; one rename publishes
OUT there           (often a mounted volume) work grows inside it; entries are renamed up, the commit point last
OUT to be replaced  directories are exchanged, or the old entries are set aside and restored on failure

What is published is on the device before its name is (`sync`), and the old is deleted after that. What a killed job
left is mended by the next one (`recover`): before its commit point the old is restored, after it the new is kept. Knows
nothing about what is published.
"""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import PlaceError, failed
from ..threads import each
from . import workfolder, writable
from .digest import Buffer, Hasher
from .local import FileUpload, Pool
from .workfolder import WorkFolder, beside, inside, names
from .writable import Stretch, Transaction

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# names that do not make a directory occupied, and that are never published or replaced
NOBODYS = (workfolder.INSIDE, "lost+found")


class Publication(Transaction):
    """A place to work in that becomes `out` on `commit` and vanishes otherwise.

    With `durable`, what was published survives a power cut from then on.
    """

    def __init__(self, out: Path, last: str, *, replace: bool = False, durable: bool = True) -> None:
        self.out = real(out)
        self.last, self.replace, self.durable = last, replace, durable
        self._pool = Pool(os.O_RDWR)
        self._lock: int | None = None
        self._parents: list[Path] = []  # directories that had to be made for OUT
        self._inside = self.out.is_dir() and (
            not replace or _mounted(self.out) or not os.access(self.out.parent, os.W_OK)
        )
        self._folder = inside(self.out) if self._inside else beside(self.out)
        self.work = self._folder.new

    def __enter__(self) -> "Publication":
        writable.published = None
        try:
            self._parents = [parent for parent in self.out.parents if not parent.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._folder.take()
            _settle(self._folder)
            self._check_vacant()
            self._folder.begin(self._lock)
        except OSError as error:
            self._withdraw()
            raise failed("preparing", self.out, error) from error
        except BaseException:
            self._withdraw()
            raise
        return self

    def create(self, name: str, size: int, stretches: Iterable[Stretch]) -> FileUpload:
        with self._new(name) as file:
            file.truncate(size)
        return FileUpload(self._pool, self.work / name)

    def write(self, name: str, size: int, pieces: Iterable[Buffer], mtime_ns: int | None = None) -> str:
        state = Hasher()
        with self._new(name) as file:
            for piece in pieces:
                state.update(piece)
                file.write(piece)
        if mtime_ns is not None:
            self.date(name, mtime_ns)
        return state.hexdigest()

    def _new(self, name: str) -> BinaryIO:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return path.open("xb")
        except FileExistsError:
            raise PlaceError(
                f"{name}: another file was written under this name: the file system takes upper and lower case for the "
                f"same",
                "choose a destination that tells them apart",
            ) from None

    def date(self, name: str, mtime_ns: int) -> None:
        os.utime(self.work / name, ns=(mtime_ns, mtime_ns))

    def commit(self, threads: int = 1) -> None:
        """Publish everything in the work directory; inside an existing directory the entry named `last` is renamed
        last.

        Signals wait until that is done: it moves names, not bytes. When it raises, OUT is what it was.
        """
        self._pool.close()
        if self.durable:
            self._sync_work(threads)
        try:
            with undisturbed():
                if self._inside:
                    self._commit_inside(self.last)
                elif self.replace and self.out.exists():
                    self._exchange()
                else:
                    self._check_vacant()
                    self._move(lambda: self.work.rename(self.out), lambda: self.out.rename(self.work))
                self._parents = []
                writable.published = self.out
                with suppress(OSError):  # what cannot be deleted now is deleted by the next job
                    self._folder.clear()
                self._unlock()
        except OSError as error:
            raise failed("publishing", self.out, error) from error

    def _sync_work(self, threads: int) -> None:
        """Have everything in the work directory on the device, files before the directories that name them."""
        folders, files = [self.work], []
        for base, inner, found in os.walk(self.work):
            # A link is a name, and on the device with its directory.
            folders += [path for name in inner if not (path := Path(base, name)).is_symlink()]
            files += [path for name in found if not (path := Path(base, name)).is_symlink()]
        try:
            each(files, _sync, threads)
            for folder in reversed(folders):
                _sync(folder)
        except OSError as error:
            raise failed("writing", self.out, error) from error

    def _check_vacant(self) -> None:
        """What was not there when the job was planned is not replaced by it."""
        there = occupied(self.out) if self._inside else os.path.lexists(self.out)
        if there and not self.replace:
            raise PlaceError(f"{self.out}: appeared while the job ran", "choose another destination, or --overwrite")

    def _commit_inside(self, last: str) -> None:
        folder, out = self._folder, self.out
        self._check_vacant()
        entries = sorted(names(self.work), key=lambda name: name == last)
        try:
            folder.listing.write_text(json.dumps(entries))
            folder.old.mkdir()
            self._sync(folder.listing, folder.path)  # it must be there whenever anything was moved
            # The commit point goes first and comes last, so that a reader never takes a mixture for a whole.
            theirs = (name for name in names(out) if name not in NOBODYS)
            for name in sorted(theirs, key=lambda name: name != last):
                (out / name).rename(folder.old / name)
            for name in entries:
                if name == last:
                    self._sync(folder.old, out)
                (self.work / name).rename(out / name)
            self._sync(out)
        except BaseException:
            if not folder.waiting() and os.path.lexists(out / last):
                (out / last).rename(self.work / last)  # published, but not for sure
            _settle(folder)
            raise

    def _exchange(self) -> None:
        if _rename_exchange(self.work, self.out):
            self._move(lambda: None, lambda: _rename_exchange(self.work, self.out))
            return
        old = self._folder.old
        self.out.rename(old)
        try:
            self._move(lambda: self.work.rename(self.out), lambda: self.out.rename(self.work))
        except BaseException:
            old.rename(self.out)
            raise

    def _move(self, publish: Callable[[], object], undo: Callable[[], object]) -> None:
        """Publish, for good or not at all."""
        publish()
        try:
            self._sync(self._folder.path, self.out.parent, *(parent.parent for parent in self._parents))
        except BaseException:
            undo()
            raise

    def _sync(self, *paths: Path) -> None:
        for path in paths if self.durable else ():
            _sync(path)

    def _withdraw(self) -> None:
        """Remove the work, and the directories that were made for it."""
        with undisturbed():
            if self._lock is not None:
                with suppress(OSError):
                    _settle(self._folder)  # where that fails, it holds what OUT was: the next job tries again
                    self._folder.clear()
                self._unlock()
            for parent in self._parents:
                try:
                    parent.rmdir()
                except OSError:
                    break  # somebody else uses it by now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(PlaceError):  # it is lost with the work
                self._pool.close()
            self._withdraw()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with suppress(OSError):  # nothing was written through it
                os.close(lock)


def _sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems know no such thing of directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def occupied(out: Path) -> bool:
    """Whether there is anything in a destination that is not the leavings of a job."""
    return out.is_dir() and any(name not in NOBODYS for name in names(out))


def recover(out: Path) -> None:
    """Mend what a killed job left at a destination and remove its work.

    Raises PlaceError while another job is at it, ReshardError where a work folder's name is taken by something that is
    not reshard's.
    """
    out = real(out)
    for folder in (beside(out), inside(out)):
        if not os.path.lexists(folder.path):
            continue
        try:
            lock = folder.take()
            try:
                with undisturbed():
                    _settle(folder)
                    folder.clear()
            finally:
                os.close(lock)
        except OSError as error:
            raise failed("clearing up after a killed job in", out, error) from error


def _settle(folder: WorkFolder) -> None:
    """End a commit that was begun: all entries are in their place, or none is and the old ones are back.

    It may itself be killed at any point and done again: what was published goes back to the work, then the old entries
    come back.
    """
    out, old = folder.out, folder.old
    if not folder.inside:  # where directories could not be exchanged in one step
        if old.is_dir() and not out.exists():
            old.rename(out)
        return
    entries, waiting = folder.entries(), folder.waiting()
    if waiting or not entries:
        for name in reversed(entries):
            if name not in waiting and os.path.lexists(out / name):
                (out / name).rename(folder.new / name)
        for name in sorted(names(old), key=lambda name: entries[-1:] == [name]):
            (old / name).rename(out / name)


def real(path: Path) -> Path:
    """Absolute, without links: what is published replaces a directory, never the link that led to it."""
    return Path(os.path.realpath(path))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals to stop wait until the end: what must not be torn is not torn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {kind: signal.signal(kind, lambda number, _: waiting.append(number)) for kind in STOPS}
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler if handler is not None else signal.SIG_DFL)
        for number in waiting:
            signal.raise_signal(number)


def _mounted(path: Path) -> bool:
    """Whether a directory is a mount point; also one of a directory of the same file system, which only the kernel's
    list tells.
    """
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    return os.fsencode(path) in {line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines}


def _rename_exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step where the file system can (renameat2, Linux 3.15)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)
