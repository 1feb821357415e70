"""Companions: the files and folders beside the weights, which of them are copied as they are, and which are left out,
and why.

Names and sizes decide, so that a directory and the Hub's list of its files come out alike. Small files are copied,
whole folders of them too; weights in other forms, nested checkpoints, large files and hidden folders are left out.
Knows nothing about tensors.
"""

import errno
import os
import re
import stat
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from msgspec import Struct

from ..containers.container import CONTAINERS
from ..errors import MismatchError, ReshardError, failed
from ..inputs import decode, limits
from ..store.store import AnyFile
from ..text.escapes import in_line

FOLDER_MAX = 1000  # files in a folder
MODULES = "modules.json"  # of sentence-transformers: which folders are parts of the model, weights and all
_MODULES_MAX = 1 << 20  # bytes

# Weights in any form, read here or not, and indexes of them.
_READ = "|".join(re.escape(suffix) for container in CONTAINERS for suffix in container.suffixes)
WEIGHTS = re.compile(rf"({_READ}|\.(ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|tflite|npz|ot|distcp|index\.json))$")
_SINGLE = "|".join(re.escape(container.single) for container in CONTAINERS)
_SPLIT = "|".join(re.escape(Path(container.single).suffix) for container in CONTAINERS)
# Files of a published checkpoint, by their names: what --overwrite may delete, and what may be a link to a file of its
# name elsewhere.
CHECKPOINT = re.compile(
    rf"([^/]*\.safetensors|(pytorch_)?model[^/]*({_SPLIT}))(\.index\.json)?"
    r"|([^/]*_)?config\.json|tokenizer\.[^/]*|[^/]*\.tiktoken"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.[^/]*|merges\.txt|spiece\.model|chat_template\.[^/]*|modules\.json"
    r"|README\.md|LICENSE[^/]*|NOTICE[^/]*|\.gitattributes"
    rf"|additional_chat_templates/[^/]*\.jinja|[0-9]+_[A-Z][A-Za-z0-9_]*/(config\.json|{_SINGLE})"
)
# Names in a shard directory that are its own, whatever a file system makes of upper and lower case.
_OURS = re.compile(r"source|rank-[0-9]+|manifest\.json", re.IGNORECASE)

_HIDDEN, _NO_FILE, _ELSEWHERE = "hidden folder", "not a regular file", "link out of the checkpoint"

# path → size in bytes, or why it is left out, or what reading it would raise
Found = Mapping[str, int | str | ReshardError]


class Carried(NamedTuple):
    """A small file that is copied as it is."""

    name: str
    path: AnyFile
    size: int
    mtime_ns: int


class Left(Struct, frozen=True, order=True):
    """A file, or a folder (its name ends with "/", its size is 0), that is left out."""

    name: str
    size: int
    why: str


def inside(name: str) -> bool:
    """Whether a name leads to a file in the directory that it counts from, spelled in the one plain way."""
    path = PurePosixPath(name)
    odd = path.is_absolute() or ".." in path.parts or not path.name or str(path) != name
    return not odd and re.search(r"[\\\0-\x1f\ud800-\udfff]", name) is None


def objection(name: str) -> str | None:
    """Why a file is never copied, judged by its name alone; None if it may be."""
    *folders, _ = name.split("/")
    if not inside(name):
        return "name that cannot be stored"
    if any(folder.startswith(".") for folder in folders):
        return _HIDDEN
    if folders and _OURS.fullmatch(folders[0]):
        return "name of a folder that shard directories use themselves"
    return "other weights" if not folders and WEIGHTS.search(name) else None


def sort_out(found: Found, taken: Collection[str], read: Callable[[], bytes]) -> tuple[list[str], tuple[Left, ...]]:
    """Which files are copied, and what is left out, a folder as one; `taken` are those of the weights, `read` gives
    modules.json.

    Raises what is found in the place of the size of a file that would be copied.
    """
    carried, left = [], []
    folders: dict[str, list[str]] = defaultdict(list)  # "" is the directory itself
    for name in sorted(found.keys() - set(taken)):
        top, slash, _ = name.partition("/")
        folders[top if slash else ""].append(name)
    modules: set[str] | None = None
    for top, names in sorted(folders.items()):
        weights = {name.rpartition("/")[0] for name in names if WEIGHTS.search(name)} if top else set()
        if weights and modules is None:
            modules = _modules(found, read)
        if top and (why := _unfit(top, names, weights - (modules or set()), taken)):
            left.append(Left(f"{top}/", 0, why))
            continue
        for name in names:
            entry, why = found[name], objection(name)
            size = entry if isinstance(entry, int) else 0
            if top and why is None and WEIGHTS.search(name) and name.rpartition("/")[0] not in (modules or set()):
                why = "other weights"
            if why is None and isinstance(entry, ReshardError):
                raise entry
            if isinstance(entry, str):
                why = entry
            elif why is None and size > limits.COPIED:
                why = f"over {limits.COPIED >> 20} MiB"
            if why is None:
                carried.append(name)
            else:
                left.append(Left(_hidden_part(name) if why == _HIDDEN else name, size if why != _HIDDEN else 0, why))
    return carried, tuple(dict.fromkeys(sorted(left)))


def _unfit(top: str, names: Collection[str], weights: Collection[str], taken: Collection[str]) -> str | None:
    """Why a folder is left out as a whole, if it is; one with weights that count is not."""
    if top.startswith("."):
        return _HIDDEN
    if why := objection(f"{top}/file"):
        return why
    if len(names) > FOLDER_MAX:
        return f"over {FOLDER_MAX} files"
    return "other weights" if weights and not any(name.startswith(f"{top}/") for name in taken) else None


def _hidden_part(name: str) -> str:
    parts = name.split("/")
    at = next(at for at, part in enumerate(parts) if part.startswith("."))
    return "/".join(parts[: at + 1]) + "/"


def _modules(found: Found, read: Callable[[], bytes]) -> set[str]:
    """The folders that modules.json names; none where there is no such file, or it says something else."""
    size = found.get(MODULES)
    if not isinstance(size, int) or size > _MODULES_MAX:
        return set()
    text = read()
    try:
        said = decode.json_of(text, _MODULES_MAX, MODULES)
    except ReshardError:
        return set()
    paths = [part.get("path") for part in said if isinstance(part, dict)] if isinstance(said, list) else []
    return {path.removeprefix("./").rstrip("/") for path in paths if isinstance(path, str)} - {""}


def words(left: Iterable[Left], width: int, most: int = 6) -> list[str]:
    """What was left out, for people: by reason, so many names of each."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for entry in left:
        reasons[in_line(entry.why)].append(in_line(entry.name))
    parts = [
        f"{', '.join(names[:most])}{f' and {len(names) - most} more' * (len(names) > most)} ({why})"
        for why, names in reasons.items()
    ]
    text = f"left behind: {'; '.join(parts)}"
    return (
        textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        if parts
        else []
    )


# --- local files ------------------------------------------------------------------------------------------------------


def beside(root: Path, taken: Collection[str]) -> tuple[tuple[Carried, ...], tuple[Left, ...]]:
    """What of a directory is copied beside the weights `taken`, and what is left out.

    Raises ReshardError for a link that leads nowhere, or elsewhere, where a file of the checkpoint should be;
    PlaceError for what cannot be read.
    """
    listing = _Listing(root, taken)
    carried, left = sort_out(listing.found, taken, lambda: decode.read(root / MODULES, _MODULES_MAX))
    for name in carried:
        if not os.access(root / name, os.R_OK):
            raise failed("opening", root / name, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return tuple(Carried(name, root / name, *listing.stamps[name]) for name in carried), left


class _Listing:
    """What is in a directory and in the folders below it. Hidden folders are not entered, nor are links that lead
    elsewhere.
    """

    def __init__(self, root: Path, taken: Collection[str]) -> None:
        self.root, self.taken = root, set(taken)
        self.homes = homes(root)
        self.found: dict[str, int | str | ReshardError] = {}
        self.stamps: dict[str, tuple[int, int]] = {}  # of files: size, modification time in ns
        self.counts: Counter[str] = Counter()  # what was found below each entry of the directory
        for name, entry in self._entries(""):
            self._look(name, entry, [os.path.realpath(root)])

    def _entries(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(self.root / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise failed("reading", self.root / folder, error) from error
        return ((folder + entry.name, entry) for entry in found)

    def _look(self, name: str, entry: os.DirEntry[str], above: list[str]) -> None:
        """Note what an entry is; `above` are the folders that lead to it, without links."""
        path = self.root / name
        if name in self.taken:
            return
        try:
            if entry.is_symlink() and (why := self._astray(name, path)) is not None:
                self._note(name, why)
                return
            status = path.stat()
        except FileNotFoundError:
            if entry.is_symlink():  # else it was gone before it could be looked at
                said = f"{path}: is a link to {path.readlink()}, which does not exist"
                self._note(name, ReshardError(said, "the download is not complete: fetch it again; or delete the link"))
            return
        except OSError as error:
            self._note(name, failed("looking at", path, error))
            return
        if stat.S_ISDIR(status.st_mode):
            self._enter(name, entry.name, above)
        elif stat.S_ISREG(status.st_mode):
            self.stamps[name] = status.st_size, status.st_mtime_ns
            self._note(name, status.st_size)
        else:
            odd = ReshardError(f"{path}: {_NO_FILE}", "fetch the file again, or delete what is there in its place")
            self._note(name, odd if _of_a_checkpoint(name) else _NO_FILE)

    def _note(self, name: str, what: int | str | ReshardError) -> None:
        self.found[name] = what
        self.counts[name.partition("/")[0]] += 1

    def _enter(self, name: str, base: str, above: list[str]) -> None:
        real = os.path.realpath(self.root / name)
        if base.startswith(".") or base == "lost+found":
            self._note(f"{name}/", _HIDDEN)
            return
        if real in above:
            self._note(f"{name}/", "link to a folder above it")
            return
        top = name.partition("/")[0]
        for below, entry in self._entries(f"{name}/"):
            self._look(below, entry, [*above, real])
            if self.counts[top] > FOLDER_MAX:
                return  # enough to know that it is left out

    def _astray(self, name: str, path: Path) -> str | ReshardError | None:
        """What is said of a link that leads out of the checkpoint: one of the files that make a checkpoint may,
        to a file of its name.
        """
        if (target := astray(path, self.homes)) is None:
            return None
        if not _of_a_checkpoint(name):
            return _ELSEWHERE
        if _of_that_name(path, target):
            return None
        return ReshardError(
            f"{path}: is a link to {target}, which is outside of the checkpoint and has another name",
            "if it belongs to the checkpoint, put a copy in the place of the link: cp --remove-destination",
        )


def astray(path: Path, homes: Iterable[Path]) -> Path | None:
    """Where a path leads, if links lead it out of all of these directories; None if it stays."""
    target = Path(os.path.realpath(path))
    return None if any(target.is_relative_to(home) for home in homes) else target


def check_links(root: Path, names: Iterable[str]) -> None:
    """Raises MismatchError for a file of a shard directory, copied as it is or kept of the source, that is a link to
    somebody else's.

    The directory's own (`source/…`) and files of a known name may be links to files of the same name, as on shared
    storage.
    """
    places = homes(root)
    for name in names:
        path = root / name
        if (target := astray(path, places)) is None:
            continue
        if not ((_of_a_checkpoint(name) or _OURS.fullmatch(name.partition("/")[0])) and _of_that_name(path, target)):
            raise MismatchError(
                f"{path}: leads to {target}, which is outside of the directory", "do not use this directory"
            )


def _of_a_checkpoint(name: str) -> bool:
    return "/" not in name and CHECKPOINT.fullmatch(name) is not None


def _of_that_name(path: Path, target: Path) -> bool:
    """Whether a link leads to a file of its own name; what a blob of the Hub's cache is called says nothing."""
    return target.name == path.name or (
        target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    )


def homes(root: Path) -> list[Path]:
    """Where links may lead: the checkpoint itself; from a snapshot in the Hub's cache the blobs of the same
    model, too.
    """
    real = Path(os.path.realpath(root))
    repo = real.parent.parent
    return [real, repo / "blobs"] if real.parent.name == "snapshots" and repo.name.startswith("models--") else [real]
