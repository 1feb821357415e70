"""A local directory as a destination: what is refused before anything is written to it. Publishing is in `publish`."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import PlaceError, ReshardError, failed
from ..text.units import decimal
from .publish import Publication, occupied, real, recover
from .workfolder import in_words, left_by_killed
from .writable import Destination


class LocalDestination(Destination):
    """A local directory, which need not be there yet. Raises as `Destination` does."""

    given: Path

    def __init__(self, path: Path) -> None:
        self.given = path

    def check(self, source: Path | None, files: Iterable[Path]) -> None:
        check_destination(self.given, source, files)
        recover(self.given)

    def occupied(self) -> bool:
        return occupied(self.given)

    def existing(self) -> Path:
        return self.given

    def check_space(self, needed: int) -> None:
        check_space(self.given, needed)

    def transaction(self, last: str, *, replace: bool, durable: bool) -> Publication:
        return Publication(self.given, last, replace=replace, durable=durable)

    def notes(self) -> tuple[str, ...]:
        return tuple(map(in_words, left_by_killed(real(self.given).parent)))


def check_destination(out: Path, source: Path | None, files: Iterable[Path] = ()) -> None:
    """Refuse a destination that is a file, or lies in the source, or holds it, or one of its `files`, which may be
    links.

    Directories are the same where the file system says so: a bind mount gives one of them two paths.
    """
    if out.exists() and not out.is_dir():
        raise ReshardError(f"{out}: is a file; a directory is written", "choose another destination")
    above = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
    if not above.is_dir():
        raise ReshardError(f"{out}: {above} is a file, not a directory", "choose another destination")
    if out.is_symlink() and not out.exists():
        raise ReshardError(f"{out}: is a link to {out.readlink()}, which does not exist", "choose another destination")
    if source is None:
        return
    here, there = _Above(out), _Above(source)
    if here.itself == there.itself:
        raise ReshardError(f"{out}: is the source itself", "choose another destination")
    if there.itself in here.parents:
        raise ReshardError(f"{out}: lies inside the source {source}", "choose a destination outside of it")
    if here.itself in there.parents:
        raise ReshardError(f"{out}: holds the source {source}", "choose a destination that does not contain it")
    for file in {real(file).parent: file for file in files}.values():  # one for each directory
        if here.itself in _Above(file).parents:
            what = f"{out}: holds {file.name} of the source {source}, which is a link to it"
            raise ReshardError(what, "choose a destination that does not contain it")


class _Above:
    """What a path leads to, and the directories above it: each by device and inode,
    or by path where there is none yet.
    """

    def __init__(self, path: Path) -> None:
        itself = real(path)
        self.itself, *self.parents = (_identity(each) for each in (itself, *itself.parents))


def _identity(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else path


def check_replaceable(out: Path) -> None:
    """Refuse to replace what cannot be deleted: a directory in it is read-only."""
    for base, _, _ in os.walk(out):
        if not os.access(base, os.W_OK | os.X_OK):
            raise PlaceError(
                f"{base}: is read-only, --overwrite would delete what is in it",
                "chmod -R u+w, or choose another destination",
            )


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
