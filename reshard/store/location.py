"""Locations: where a user's words say that files are: local paths, and stores by the scheme of a URL.

A URL is not a path: taken for one, `s3://bucket/out` would be a folder `s3:` here.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ReshardError

if TYPE_CHECKING:
    from .store import Store
    from .writable import Destination

Location = str | os.PathLike[str]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_STRIPPED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")  # what pathlib makes of a URL
_MOUNT = "a bucket that is mounted works (mountpoint-s3, gcsfuse, blobfuse2, rclone mount), and so does a local copy"
_HINTS = {
    "file": "give the path alone",
    "http": "download it, then give the local directory; a model on the Hub is org/name",
    "https": "download it, then give the local directory; a model on the Hub is org/name",
    "hf": "the Hub can be a source, hf://org/name; elsewhere a local directory is needed: hf download, hf upload",
}


def _hub(text: str, revision: str | None, keep: bool) -> "Store | Path":
    from . import hub

    return hub.opened(text, revision, keep=keep)


class Scheme(NamedTuple):
    """How URLs are opened. Each function imports its module itself.

    `source` takes the URL, `--revision`, and whether a conversion needs the files, so that a cache pays; it gives a
    store, or a local directory that stands for it. `destination` takes the URL; None: it is only read from.
    """

    source: "Callable[[str, str | None, bool], Store | Path]"
    destination: "Callable[[str], Destination] | None" = None


SCHEMES = {"hf": Scheme(_hub)}


def scheme(given: Location) -> str | None:
    """The scheme of a URL, which has a row in SCHEMES; None for a path, or a Hub id without one."""
    found = _URL.match(given) if isinstance(given, str) else None
    return found[1] if found and found[1] in SCHEMES else None


def opened(text: str, revision: str | None, *, keep: bool) -> "Store | Path":
    """The store that a text names; one that is neither a URL nor a path here is read as a Hub id. Raises as the store
    does.
    """
    return SCHEMES[scheme(text) or "hf"].source(text, revision, keep)


def destination(given: Location) -> "Destination":
    """Where a conversion is written. Raises ReshardError for the URL of what is not written to."""
    row = SCHEMES.get(scheme(given) or "")
    if row is not None and row.destination is not None:
        return row.destination(os.fspath(given))
    from .destination import LocalDestination

    return LocalDestination(local(given, "a destination"))


def local(given: Location, what: str) -> Path:
    """The local path that is meant; `what` it is for, in an error. Raises ReshardError for a URL, which is named."""
    text = os.fspath(given)
    found = _URL.match(text)
    if (
        found is None
        and not isinstance(given, str)
        and (found := _STRIPPED.match(text))
        and Path(f"{found[1]}:").exists()
    ):
        found = None  # a path, as its spelling no longer tells: a folder of that name is here
    if found is None:
        return Path(text)
    scheme = found[1].lower()
    raise ReshardError(
        f"{text}: {scheme}:// locations are not supported for {what}, only local paths",
        f"{_HINTS.get(scheme, _MOUNT)}; a folder named {found[1]}: here is ./{found[1]}:/…",
    )


def source(given: Location) -> str:
    """The local path, URL or Hub id of a source, as it was given. Raises ReshardError for a scheme that has no row."""
    if scheme(given) is None:
        local(given, "a source")
    return os.fspath(given)
