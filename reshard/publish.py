"""Publishing: a directory appears whole or not at all. One writer per destination; a killed job leaves nothing under its name.

OUT absent          work grows beside it, in .OUT.reshard; one rename publishes
OUT there           (often a mounted volume) work grows inside it, in .reshard-work; entries are renamed up, the commit point last
OUT to be replaced  directories are exchanged, or the old entries are set aside and restored on failure

Knows nothing about what is published.
"""

import ctypes
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from .errors import PlaceError, ReshardError
from .files import failed

_WORK, _OLD = ".reshard-work", ".reshard-old"


class Publication:
    """A place to work in that becomes `out` on `commit` and vanishes otherwise. Use as a context manager."""

    def __init__(self, out: Path, *, replace: bool = False) -> None:
        self.out = out.absolute()
        self.replace = replace
        self._lock: int | None = None
        self._inside = self.out.is_dir() and (not replace or os.path.ismount(self.out) or not os.access(self.out.parent, os.W_OK))
        self.work = self.out / _WORK if self._inside else self.out.parent / f".{self.out.name}.reshard"

    def __enter__(self) -> "Publication":
        try:
            if not self._inside:
                self.out.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            for child in self.work.iterdir():  # what a killed job left
                _remove(child)
            if self._inside and (self.out / _OLD).is_dir():
                self._restore()
        except OSError as error:
            raise failed("preparing", self.out, error) from error
        return self

    def _acquire(self) -> None:
        """Take the lock on the work directory; it goes with the process, however that ends."""
        for _ in range(100):
            self.work.mkdir(exist_ok=True)
            descriptor = os.open(self.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise PlaceError(
                    f"{self.out}: another job is writing it", "wait until it has finished, or choose another destination"
                ) from None
            try:
                same = self.work.stat().st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                same = False
            if same:
                self._lock = descriptor
                return
            os.close(descriptor)
        raise PlaceError(f"{self.out}: its work directory keeps changing", "is another job writing it?")

    def commit(self, last: str) -> None:
        """Publish everything in the work directory; inside an existing directory the entry named `last` is renamed last."""
        try:
            if self._inside:
                self._commit_inside(last)
            elif self.replace and self.out.exists():
                self._exchange()
            else:
                if self.out.exists():
                    raise PlaceError(f"{self.out}: appeared while the job ran", "choose another destination, or --overwrite")
                self.work.rename(self.out)
        except OSError as error:
            raise failed("publishing", self.out, error) from error

    def _commit_inside(self, last: str) -> None:
        old = self.out / _OLD
        if self.replace:
            old.mkdir(exist_ok=True)
            # The commit point goes first, so that a reader never takes a mixture for a whole.
            for child in sorted(self.out.iterdir(), key=lambda path: path.name != last):
                if child.name not in (_WORK, _OLD):
                    child.rename(old / child.name)
        moved: list[Path] = []
        try:
            for child in sorted(self.work.iterdir(), key=lambda path: path.name == last):
                target = self.out / child.name
                child.rename(target)
                moved.append(target)
        except BaseException:
            for target in moved:
                _remove(target)
            if self.replace:
                self._restore()
            raise
        self.work.rmdir()
        if self.replace:
            shutil.rmtree(old)

    def _restore(self) -> None:
        """Bring back what was set aside by a commit that did not finish."""
        old = self.out / _OLD
        for child in self.out.iterdir():
            if child.name not in (_WORK, _OLD):
                _remove(child)
        for child in old.iterdir():
            child.rename(self.out / child.name)
        old.rmdir()

    def _exchange(self) -> None:
        if _rename_exchange(self.work, self.out):
            shutil.rmtree(self.work)
            return
        aside = self.out.parent / f".{self.out.name}.reshard-old"
        self.out.rename(aside)
        try:
            self.work.rename(self.out)
        except BaseException:
            aside.rename(self.out)
            raise
        shutil.rmtree(aside)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _rename_exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step where the file system can (renameat2, Linux 3.15)."""
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
    if out.exists() and not out.is_dir():
        raise ReshardError(f"{out}: is a file; a directory is written", "choose another destination")
    if source is None:
        return
    here, there = out.resolve(), source.resolve()
    if here == there:
        raise ReshardError(f"{out}: is the source itself", "choose another destination")
    if there in here.parents:
        raise ReshardError(f"{out}: lies inside the source {source}", "choose a destination outside of it")
    if here in there.parents:
        raise ReshardError(f"{out}: holds the source {source}", "choose a destination that does not contain it")


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
            f"{out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free ({needed} and {free} bytes)",
            "free some space, or choose another destination",
        )
