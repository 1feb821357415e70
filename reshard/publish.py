"""Publishing: a directory appears whole or not at all. One writer per destination; a killed job leaves nothing under its name.

OUT absent          work grows beside it, in .OUT.reshard; one rename publishes
OUT there           (often a mounted volume) work grows inside it, in .reshard-work; entries are renamed up, the commit point last
OUT to be replaced  directories are exchanged, or the old entries are set aside and restored on failure

What a killed job left is mended by the next one (`recover`): before its commit point the old is restored, after it the new is kept.
Knows nothing about what is published.
"""

import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from .errors import PlaceError, ReshardError
from .files import failed
from .units import decimal

_WORK, _OLD, _LIST = ".reshard-work", ".reshard-old", ".reshard-entries"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOBODYS = (_WORK, _OLD, "lost+found")  # names that do not make a directory occupied, and that are never published or replaced

published: Path | None = None  # by the last job of this process that did: whoever interrupts it after that is told so


class Publication:
    """A place to work in that becomes `out` on `commit` and vanishes otherwise. Use as a context manager."""

    def __init__(self, out: Path, *, replace: bool = False) -> None:
        self.out = _real(out)
        self.replace = replace
        self._lock: int | None = None
        self._parents: list[Path] = []  # directories that had to be made for OUT
        self._inside = self.out.is_dir() and (not replace or _mounted(self.out) or not os.access(self.out.parent, os.W_OK))
        self.work = self.out / _WORK if self._inside else _beside(self.out)[0]

    def __enter__(self) -> "Publication":
        global published
        published = None
        try:
            self._parents = [parent for parent in self.out.parents if not parent.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.work, self.out)
            for child in self.work.iterdir():  # what a killed job left
                _remove(child)
            self._check_vacant()
        except OSError as error:
            self._withdraw()
            raise failed("preparing", self.out, error) from error
        except BaseException:
            self._withdraw()
            raise
        return self

    def commit(self, last: str) -> None:
        """Publish everything in the work directory; inside an existing directory the entry named `last` is renamed last.

        Signals wait until it is done: it moves names, not bytes.
        """
        global published
        try:
            with undisturbed():
                if self._inside:
                    self._commit_inside(last)
                elif self.replace and self.out.exists():
                    self._exchange()
                else:
                    self._check_vacant()
                    self.work.rename(self.out)
                self._parents = []
                published = self.out
                self._unlock()
        except OSError as error:
            raise failed("publishing", self.out, error) from error

    def _check_vacant(self) -> None:
        """What was not there when the job was planned is not replaced by it."""
        there = occupied(self.out) if self._inside else os.path.lexists(self.out)
        if there and not self.replace:
            raise PlaceError(f"{self.out}: appeared while the job ran", "choose another destination, or --overwrite")

    def _commit_inside(self, last: str) -> None:
        old = self.out / _OLD
        self._check_vacant()
        entries = sorted(_names(self.work), key=lambda name: name == last)
        try:
            old.mkdir()
            (old / _LIST).write_text(json.dumps(entries))
            # The commit point goes first and comes last, so that a reader never takes a mixture for a whole.
            theirs = (name for name in _names(self.out) if name not in NOBODYS)
            for name in sorted(theirs, key=lambda name: name != last):
                (self.out / name).rename(old / name)
            for name in entries:
                (self.work / name).rename(self.out / name)
        except BaseException:
            _settle(self.out)
            raise
        self.work.rmdir()
        shutil.rmtree(old)

    def _exchange(self) -> None:
        if _rename_exchange(self.work, self.out):
            shutil.rmtree(self.work)
            return
        aside = _beside(self.out)[1]
        self.out.rename(aside)
        try:
            self.work.rename(self.out)
        except BaseException:
            aside.rename(self.out)
            raise
        shutil.rmtree(aside)

    def _withdraw(self) -> None:
        """Remove the work, and the directories that were made for it."""
        with undisturbed():
            if self._lock is not None:
                shutil.rmtree(self.work, ignore_errors=True)
                self._unlock()
            for parent in self._parents:
                try:
                    parent.rmdir()
                except OSError:
                    break  # somebody else uses it by now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._withdraw()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def occupied(out: Path) -> bool:
    """Whether there is anything in a destination that is not the leavings of a job."""
    return out.is_dir() and any(name not in NOBODYS for name in _names(out))


def recover(out: Path) -> None:
    """Mend what a killed job left at a destination and remove its work; PlaceError while another job is at it."""
    out = _real(out)
    beside, aside = _beside(out)
    for work, old in ((beside, aside), (out / _WORK, out / _OLD)):
        try:
            if not work.is_dir() and not old.is_dir():
                continue
            lock = _lock(work, out)
            try:
                with undisturbed():
                    if old.is_dir():
                        _settle(out) if old.parent == out else _take_back(out, aside)
                    shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)
        except OSError as error:
            raise failed("clearing up after a killed job in", out, error) from error


def _settle(out: Path) -> None:
    """End a commit inside `out` that was begun: all entries are in their place, or none is and the old ones are back.

    It may itself be killed at any point and done again: what was published goes back to the work, then the old entries come back.
    """
    work, old = out / _WORK, out / _OLD
    waiting = set(_names(work))
    try:
        entries = json.loads((old / _LIST).read_text())
    except (FileNotFoundError, ValueError):
        entries = []  # nothing had been moved yet
    if waiting or not entries:
        for name in reversed(entries):
            if name not in waiting and os.path.lexists(out / name):
                (out / name).rename(work / name)
        for name in sorted((name for name in _names(old) if name != _LIST), key=lambda name: entries[-1:] == [name]):
            (old / name).rename(out / name)
    shutil.rmtree(old)


def _take_back(out: Path, aside: Path) -> None:
    """The same beside `out`, where directories could not be exchanged in one step."""
    if out.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(out)


def _real(path: Path) -> Path:
    """Absolute, without links: what is published replaces a directory, never the link that led to it."""
    return Path(os.path.realpath(path))


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _beside(out: Path) -> tuple[Path, Path]:
    """Where work grows beside a destination, and where the old directory waits."""
    return out.parent / f".{out.name}.reshard", out.parent / f".{out.name}.reshard-old"


def _lock(work: Path, out: Path) -> int:
    """Make the work directory and take its lock, a descriptor; it goes with the process, however that ends."""
    for _ in range(100):
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if work.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise PlaceError(f"{out}: another job is writing it", "wait until it has finished, or choose another destination") from None
        except FileNotFoundError:
            pass  # the job that had it has just ended
        except OSError as error:
            os.close(descriptor)
            raise PlaceError(
                f"{work}: the file system cannot lock it: {error.strerror}",
                "without a lock two jobs could write one destination: choose another one, or mount it with locks",
            ) from error
        os.close(descriptor)
    raise PlaceError(f"{out}: its work directory keeps changing", "is another job writing it?")


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
    """Whether a directory is a mount point; also one of a directory of the same file system, which only the kernel's list tells."""
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_destination(out: Path, source: Path | None) -> None:
    """Refuse a destination that is a file, or lies in the source, or holds it."""
    if "\0" in str(out):
        raise ReshardError(f"{str(out)!r}: a name cannot hold a null byte", "choose another destination")
    if out.exists() and not out.is_dir():
        raise ReshardError(f"{out}: is a file; a directory is written", "choose another destination")
    above = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
    if not above.is_dir():
        raise ReshardError(f"{out}: {above} is a file, not a directory", "choose another destination")
    if out.is_symlink() and not out.exists():
        raise ReshardError(f"{out}: is a link to {out.readlink()}, which is not there", "choose another destination")
    if source is None:
        return
    here, there = _real(out), _real(source)
    if here == there:
        raise ReshardError(f"{out}: is the source itself", "choose another destination")
    if there in here.parents:
        raise ReshardError(f"{out}: lies inside the source {source}", "choose a destination outside of it")
    if here in there.parents:
        raise ReshardError(f"{out}: holds the source {source}", "choose a destination that does not contain it")


def check_replaceable(out: Path) -> None:
    """Refuse to replace what cannot be deleted: a directory in it is read-only."""
    for base, _, _ in os.walk(out):
        if not os.access(base, os.W_OK | os.X_OK):
            raise PlaceError(f"{base}: is read-only, --overwrite would delete what is in it", "chmod -R u+w, or choose another destination")


def check_space(out: Path, needed: int) -> None:
    """Refuse if the file system of `out` has less than `needed` bytes free."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError as error:
        raise failed("looking at", place, error) from error
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise PlaceError(
            f"{out}: {decimal(needed)} are needed, {decimal(free)} are free ({needed} and {free} bytes)",
            "free some space, or choose another destination",
        )
