"""A directory that is being read, and that another job may replace meanwhile: what was read is of one conversion, or is
refused.

A descriptor is held on the directory and on its commit point, so that neither's identity can be given to another one;
whoever has read something asks whether both are still what its path leads to. An exchanged directory and one whose
files were renamed in place are noticed alike, and nobody has to wait. Knows nothing about what is in it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from weakref import finalize

from ..errors import Replaced
from .workfolder import check_whole

T = TypeVar("T")

COMMIT_POINTS = ("manifest.json", "config.json")  # what is published last and taken away first
_WAITS = (0.01, 0.05)  # seconds, before it is read again


class Directory:
    """A directory as it is now. Raises OSError where there is none, PlaceError where one is being published at this
    moment.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as undo:
            try:
                self._descriptor = _hold(path, None)
            except FileNotFoundError:
                check_whole(path)  # it may be about to be there, or again
                raise
            undo.callback(os.close, self._descriptor)
            self._points: list[tuple[str, int, os.stat_result]] = []
            for name in COMMIT_POINTS:
                with suppress(FileNotFoundError):
                    held = _hold(Path(name), self._descriptor)
                    undo.callback(os.close, held)
                    self._points.append((name, held, os.fstat(held)))
            check_whole(path)
            finalize(self, undo.pop_all().close)

    def check(self) -> None:
        """Raise Replaced where the path leads to another directory by now, or to another conversion in this one."""
        check_whole(self.path)
        if not self._same():
            raise Replaced(self.path)

    def _same(self) -> bool:
        try:
            if _which(self.path.stat()) != _which(os.fstat(self._descriptor)):
                return False
            return all(_still(before, os.fstat(held), (self.path / name).stat()) for name, held, before in self._points)
        except FileNotFoundError:
            return False


def _hold(path: Path, folder: int | None) -> int:
    return os.open(path, getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK) | os.O_CLOEXEC, dir_fd=folder)


def _which(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _still(before: os.stat_result, held: os.stat_result, now: os.stat_result) -> bool:
    """Whether a name still leads to the file that it led to, and has done so all the time.

    Renamed away and back, as when a commit fails, a file has another change time. One that was written to is not meant
    here.
    """
    return _which(now) == _which(held) and (
        now.st_ctime_ns == before.st_ctime_ns or now.st_mtime_ns != before.st_mtime_ns
    )


@contextmanager
def unchanged(*directories: Directory | None, finally_too: bool = True) -> Iterator[None]:
    """Where an error is raised inside because a directory was replaced, Replaced is raised in its place;
    and at the end, if it was.
    """
    try:
        yield
    except Exception:
        _check(directories)
        raise
    if finally_too:
        _check(directories)


def _check(directories: Iterable[Directory | None]) -> None:
    for directory in directories:
        if directory is not None:
            directory.check()


def reading(path: Path, read: Callable[[Directory], T]) -> T:
    """What `read` makes of a directory; done anew where that was replaced meanwhile, and given up after a few times."""
    for wait in (*_WAITS, None):
        try:
            directory = Directory(path)
            with unchanged(directory):
                return read(directory)
        except Replaced:
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError
