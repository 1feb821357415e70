"""Locations: where a user's words say that files are. Only local paths, and on the Hub the checkpoints that are read, are within reach.

A URL is not a path: taken for one, `s3://bucket/out` would be a folder `s3:` here.
"""

import os
import re
from pathlib import Path

from ..errors import ReshardError

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


def local(given: Location, what: str) -> Path:
    """The local path that is meant; `what` it is for, in an error. Raises ReshardError for a URL, which is named."""
    text = os.fspath(given)
    found = _URL.match(text)
    if found is None and not isinstance(given, str) and (found := _STRIPPED.match(text)) and Path(f"{found[1]}:").exists():
        found = None  # a path, as its spelling no longer tells: a folder of that name is here
    if found is None:
        return Path(text)
    scheme = found[1].lower()
    raise ReshardError(
        f"{text}: {scheme}:// locations are not supported for {what}, only local paths",
        f"{_HINTS.get(scheme, _MOUNT)}; a folder named {found[1]}: here is ./{found[1]}:/…",
    )


def source(given: Location) -> str:
    """The local path or Hub id of a source, as it was given. Raises ReshardError for a URL other than hf://."""
    text = os.fspath(given)
    if not (isinstance(given, str) and text.startswith("hf://")):
        local(given, "a source")
    return text
