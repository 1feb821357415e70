"""The work folder: where a conversion works until it publishes. Nothing that is not reshard's own is ever touched in
it.

    .OUT.reshard/        next to OUT, where OUT is absent or can be exchanged; else OUT/.reshard-work/
      reshard.marker     whose folder this is: without it a folder that holds anything is refused
      new/               what will be published
      old/               what OUT held, while a commit moves entries one by one
      entries.json       that such a commit was begun, and what it publishes, the commit point last

A job holds a lock on the folder, which goes with its process: a folder without a lock is that of a killed job.
Knows nothing about what is published.
"""

import errno
import fcntl
import hashlib
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from ..errors import PlaceError, Replaced, ReshardError
from ..inputs import decode, limits
from ..text.units import decimal

INSIDE = ".reshard-work"
_MARKER, _NEW, _OLD, _LIST = "reshard.marker", "new", "old", "entries.json"
_Entry = Annotated[str, Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\0]+\Z")]  # a name in OUT itself, and no way out of it
_LONGEST = 255  # bytes of a name, on every file system of Linux
_TRIES, _WAIT = 6, 0.02  # seconds: somebody who only asks whether a folder is locked holds the lock for a moment


@dataclass(frozen=True)
class WorkFolder:
    """The work folder at `path`, of conversions to `out`; it need not be there."""

    path: Path
    out: Path

    @cached_property
    def new(self) -> Path:
        return self.path / _NEW

    @cached_property
    def old(self) -> Path:
        return self.path / _OLD

    @cached_property
    def listing(self) -> Path:
        return self.path / _LIST

    @property
    def inside(self) -> bool:
        return self.path.parent == self.out

    def take(self) -> int:
        """Make the folder if it is not there, and lock it: a descriptor.

        Raises ReshardError where something else has its name, PlaceError where another job has it.
        """
        for _ in range(100):
            with suppress(FileExistsError):
                self.path.mkdir()
            descriptor = self._open()
            if descriptor is None:
                continue  # the job that had it has just ended
            try:
                self._lock(descriptor)
                if self.path.lstat().st_ino == os.fstat(descriptor).st_ino:
                    self._check_names(descriptor)
                    return descriptor
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise PlaceError(f"{self.out}: its work folder keeps changing", "is another job writing it?")

    def begin(self, descriptor: int) -> None:
        """Mark a folder that was taken as reshard's, and have an empty `new` in it."""
        text = (
            f"reshard works here on {self.out.name}, or was killed. Converting to {self.out.name} again "
            f"clears this folder.\n"
        )
        marker = os.open(_MARKER, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=descriptor)
        try:
            os.write(marker, os.fsencode(text))
        finally:
            os.close(marker)
        self._empty()
        self.new.mkdir()

    def clear(self) -> None:
        """Remove a folder that was taken. The marker goes last but one: killed at any point, what is left is known as
        reshard's.
        """
        self._empty()
        (self.path / _MARKER).unlink(missing_ok=True)
        self.path.rmdir()

    def _empty(self) -> None:
        _remove(self.old)
        self.listing.unlink(missing_ok=True)  # only now: it says what `new` and `old` mean
        _remove(self.new)

    def waiting(self) -> set[str]:
        """The entries that are still to be published."""
        return set(names(self.new))

    def entries(self) -> list[str]:
        """What a commit that was begun publishes; empty: none was begun. Anything else that it says was not written by
        reshard.
        """
        try:
            if not stat.S_ISREG(self.listing.lstat().st_mode):
                return []
            found = decode.json_file(self.listing, limits.FILES)  # a name may not be valid Unicode
            names: list[str] = decode.typed(found, list[_Entry], str(self.listing))
            return names
        except PlaceError:
            raise
        # killed while it was written: nothing had been moved
        except (FileNotFoundError, NotADirectoryError, ReshardError):
            return []

    def torn(self) -> bool:
        """Whether OUT is neither what it was nor what it shall be: a commit was begun and has not ended."""
        if not self.inside:
            return self.old.is_dir() and not self.out.exists()
        entries, waiting = self.entries(), self.waiting()
        return bool(entries and waiting) and (len(waiting) < len(entries) or bool(names(self.old)))

    def marked(self) -> bool:
        """Whether it is there and reshard's."""
        marker = self.path / _MARKER
        return not self.path.is_symlink() and not marker.is_symlink() and marker.is_file()

    def locked(self) -> bool:
        """Whether a job is at work in it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        finally:
            os.close(descriptor)
        return False

    def size(self) -> int:
        """Bytes on the device."""
        found = 0
        for base, _, files in os.walk(self.path):
            for name in files:
                with suppress(OSError):
                    found += os.lstat(Path(base, name)).st_blocks * 512
        return found

    def _open(self) -> int | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise self._foreign("is a link" if self.path.is_symlink() else "is a file") from None
            raise
        owner = os.fstat(descriptor).st_uid
        if owner not in (os.geteuid(), self.path.parent.stat().st_uid):
            os.close(descriptor)
            raise self._foreign(f"belongs to another user (uid {owner})")
        return descriptor

    def _lock(self, descriptor: int) -> None:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not left:
                    raise PlaceError(
                        f"{self.out}: another job is writing it",
                        "wait until it has finished, or choose another destination",
                    ) from None
                time.sleep(_WAIT)
            except OSError as error:
                raise PlaceError(
                    f"{self.path}: the file system cannot lock it: {error.strerror}",
                    "without a lock two jobs could write one destination: choose another one, or mount it with locks",
                ) from error

    def _check_names(self, descriptor: int) -> None:
        """An empty folder is one that was just made; one with anything else in it must be marked, and hold nothing but
        ours.
        """
        found = sorted(os.listdir(descriptor))
        odd = [name for name in found if not _ours(name, descriptor)] if _MARKER in found else found
        if odd:
            raise self._foreign(f"holds {odd[0]}, which reshard did not put there")

    def _foreign(self, what: str) -> ReshardError:
        return ReshardError(
            f"{self.path}: {what}; conversions to {self.out} use a folder of that name while they work",
            "move it away, or choose another destination; nothing in it was touched",
        )


def _ours(name: str, folder: int) -> bool:
    """Whether an entry of a work folder is one that reshard makes: a link of such a name would lead it to somebody
    else's files.
    """
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if name in (_NEW, _OLD):
        return stat.S_ISDIR(status.st_mode)
    return name in (_MARKER, _LIST) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def beside(out: Path) -> WorkFolder:
    """Next to a destination. Of a name so long that nothing fits around it, the beginning and a digest stand for it."""
    name, most = os.fsencode(out.name), _LONGEST - len("..reshard")
    if len(name) > most:
        digest = hashlib.sha256(name).hexdigest()[:16].encode()
        name = name[: most - len(digest) - 1] + b"-" + digest
    return WorkFolder(out.parent / f".{os.fsdecode(name)}.reshard", out)


def inside(out: Path) -> WorkFolder:
    """In a destination that stays: a mounted volume, an existing directory."""
    return WorkFolder(out / INSIDE, out)


def check_whole(path: Path) -> None:
    """Raise PlaceError where a directory is being published at this moment, or where a killed job left it half
    published.
    """
    out = Path(os.path.realpath(path))
    for folder in (inside(out), beside(out)):
        if not folder.marked():
            continue
        if folder.torn():
            if folder.locked():
                raise Replaced(path, "is being replaced at this moment")
            raise PlaceError(
                f"{path}: a conversion was killed while it replaced this directory; what was there before is "
                f"in {folder.old}",
                f"start a conversion to {path} again: it restores that first",
            )
        if not folder.inside and not out.exists():
            raise _missing(path, folder)


def _missing(path: Path, folder: WorkFolder) -> PlaceError:
    if folder.locked():
        return PlaceError(f"{path}: does not exist yet: a conversion is writing it", "wait until it has finished")
    return PlaceError(
        f"{path}: does not exist: the conversion to it was killed, and left {decimal(folder.size())} in {folder.path}",
        f"start it again, or remove what it left: rm -r {folder.path}",
    )


def left_by_killed(place: Path) -> list[WorkFolder]:
    """The folders of killed conversions in a directory: to it, and to others next to each other in it."""
    try:
        found = sorted(path for path in place.iterdir() if path.name.startswith(".") and path.name.endswith(".reshard"))
    except OSError:
        return []
    folders = [WorkFolder(path, place / path.name[1 : -len(".reshard")]) for path in found if path.name != ".reshard"]
    return [folder for folder in (inside(place), *folders) if folder.marked() and not folder.locked()]


def in_words(folder: WorkFolder) -> str:
    """What a person should know of the folder of a killed conversion."""
    if folder.torn():
        return (
            f"a conversion to {folder.out} was killed while publishing; the next one to it restores what "
            f"was there from {folder.old}"
        )
    size = decimal(folder.size())
    return (
        f"a killed conversion to {folder.out} left {size} in {folder.path}; the next one to it, or rm -r, removes that"
    )


def names(directory: Path) -> list[str]:
    """What is in a directory; nothing if it is not there."""
    try:
        return [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: Path) -> None:
    """Delete a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
