"""Checkpoints as they are published: config.json, one weights file or an index of several, and what lies beside them.

config.json or the index decides which files count; nothing is ever globbed, because repositories also hold
`consolidated.safetensors`, `original/`, adapters and variants. Headers only: no tensor is read here. Knows nothing
about shards or meshes.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from ..containers.container import CONTAINERS, of_file
from ..containers.entry import Entry, extent
from ..containers.reading import of_descriptor
from ..errors import ReshardError, failed
from ..inputs import decode, limits
from ..inputs.limits import DIGITS
from ..layout.mesh import Range
from ..model.naming import settle
from ..model.quantized import plain_names
from ..model.understand import Config, Model, understand
from ..store.local import Stamp
from ..store.store import Address, AnyFile, Store
from ..tables import families, wrappers
from ..tables.families import Family
from ..tables.notation import fold
from ..text.escapes import in_line
from . import companions
from .companions import Carried, Left, beside, inside

# What transformers looks for, in its order: (file, its index).
WEIGHTS = tuple((container.single, container.index) for container in CONTAINERS)


class Original(NamedTuple):
    """A file of the published checkpoint. `holes`: the byte ranges that rows claim; everything else is its residue."""

    name: str
    size: int
    container: str  # its name, or "plain" for an index
    mtime_ns: int
    sha256: str | None = None
    holes: tuple[Range, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it holds no tensors."""
        return self.container == "plain"

    def residue(self) -> list[Range]:
        """The byte ranges between the holes."""
        ends = [0, *(high for _, high in self.holes)]
        starts = [*(low for low, _ in self.holes), self.size]
        return [(low, high) for low, high in zip(ends, starts, strict=True) if high > low]


class Origin(Struct, frozen=True):
    """Where a checkpoint came from, as far as it is known."""

    id: str | None = None
    commit: str | None = None
    license: str | None = None


class _Index(Struct):
    weight_map: dict[str, str]


class Tally:
    """What the headers of a checkpoint hold, file by file, within the limits of all of them together."""

    def __init__(self) -> None:
        self.tensors = self.names = 0

    def checked(self, entries: dict[str, Entry], where: str) -> dict[str, Entry]:
        """The same tensors of one more file. Raises ReshardError for too many, too long a name, too many dimensions."""
        self.tensors += len(entries)
        self.names += sum(map(len, entries))
        _fits(self.tensors, limits.TENSORS, "tensors", where)
        _fits(self.names, limits.NAMES, "characters of tensors' names", where)
        for name, entry in entries.items():
            if len(name) > limits.NAME:
                raise ReshardError(
                    f"{where}: {name[:40]}… has a name of {len(name)} characters, at most {limits.NAME} are read"
                )
            if len(entry.shape) > limits.DIMENSIONS:
                raise ReshardError(
                    f"{where}: {name} has {len(entry.shape)} dimensions, at most {limits.DIMENSIONS} are read"
                )
        return entries


def _fits(count: int, most: int, what: str, where: str) -> None:
    if count > most:
        said = f"{where}: with this file the headers hold {count} {what}, at most {most} are read"
        raise ReshardError(said, "is one file there under several names?")


@dataclass(frozen=True)
class Published:
    """A checkpoint's headers and config, not yet understood. `tensors`: name → (index into `originals`, entry)."""

    where: str
    root: Path | None
    config: Config
    originals: tuple[Original, ...]
    tensors: dict[str, tuple[int, Entry]]
    carried: tuple[Carried, ...] = ()
    left: tuple[Left, ...] = ()
    origin: Origin = field(default_factory=Origin)
    stamps: dict[Path, Stamp] = field(default_factory=dict)  # of every file that was read, or is going to be
    store: Store | None = None  # what holds the files, where there is no `root`

    @property
    def bytes(self) -> int:
        """Size of all weights files."""
        return sum(original.size for original in self.originals if not original.plain)

    def path(self, original: Original) -> AnyFile:
        if self.store is not None:
            return Address(self.store, original.name)
        assert self.root is not None
        return self.root / original.name


def open_published(root: Path, where: str | None = None) -> Published:
    """Read config.json, the index and every header of a local checkpoint.

    Raises ReshardError for whatever is missing, truncated, contradictory or outside the directory.
    """
    where = where or str(root)
    stamps = stamps_of([root / "config.json"])  # before they are read: what changes in between must not go unnoticed
    config = Config(read_json(root / "config.json", missing="every checkpoint has one; is this the right directory?"))
    top = [path.name for path in root.iterdir()]
    config = config.with_quantization(quantization_of(config, top, partial(_read, root, stamps), str(root)))
    names, index, index_map = choose(top, str(root), partial(_read, root, stamps), config.weights)
    originals, found, tally = [], [], Tally()
    for file in names:
        original, entries, stamps[root / file] = _headers(root, file, index, tally)
        originals.append(original)
        found.append(entries)
    tensors = merge(names, found, index_map, index or names[0])
    if not tensors:
        raise ReshardError(f"{where}: the weights files hold no tensors", "is the download complete?")
    if index is not None:
        originals.append(_plain(root, index))
    carried, left = beside(root, {original.name for original in originals})
    stamps = stamps_of(root / file.name for file in carried) | stamps
    return Published(where, root, config, tuple(originals), tensors, carried, left, origin_of(root), stamps)


def understood(published: Published, table: Family | None = None) -> tuple[Model, tuple[Original, ...]]:
    """The model, and the originals with their holes; the family is `table`, or what config.json names."""
    stored = {name: entry for name, (_, entry) in published.tensors.items()}
    model = understand(table or family_table(published), published.config, stored, published.where)
    aside = set(model.aside)
    holes: list[list[Range]] = [[] for _ in published.originals]
    for name, (at, entry) in published.tensors.items():
        if name not in aside and entry.nbytes:
            holes[at].append((entry.offset, entry.offset + extent(entry)))
    originals = tuple(
        Original(o.name, o.size, o.container, o.mtime_ns, o.sha256, tuple(_union(spans)))
        for o, spans in zip(published.originals, holes, strict=True)
    )
    return model, originals


def family_table(published: Published) -> Family:
    """The shipped table for a checkpoint; unknown families are refused with what was seen, folded."""
    config = published.config
    table = families.family_of(config.model_type, config.architectures) or wrappers.wrapper_of(config)
    if table is None and (inner := families.family_of(config.inner_type, ())) is not None:
        table = inner if _spelled_as(inner, published) else wrappers.wrapper_of(config, "*")
    if table is not None:
        return families.base(table) if _is_base(table, published) and table.name in families.shipped() else table
    kinds: dict[str, list[str]] = {}
    for name in published.tensors:
        kinds.setdefault(in_line(fold(name)[0]), []).append(name)
    lines = [
        f"  {len(names):>6} × {kind}  {list(published.tensors[names[0]][1].shape)}"
        for kind, names in list(kinds.items())[:40]
    ]
    said = f'no table for model_type "{config.model_type}"' if config.model_type else "config.json has no model_type"
    if len(kinds) > 40:
        lines.append(f"  … and {len(kinds) - 40} more")
    raise ReshardError(
        "\n".join([f"{published.where}: {said}; it holds", *lines]),
        f"`reshard inspect {published.where} --draft-table > my.toml` writes a table to start from, --family "
        f"my.toml takes it\n"
        f"(docs/notation.md); {families.nearest(config.model_type or '')}",
    )


def _is_base(family: Family, published: Published) -> bool:
    """Whether the names of a family's tensors lack the `model.` that they begin with in its table."""
    if family.prefixes or any(name.startswith("model.") for name in published.tensors):
        return False
    return not {f"model.{fold(name)[0]}" for name in published.tensors}.isdisjoint(family.claimed())


def _spelled_as(family: Family, published: Published) -> bool:
    """Whether every tensor has a name of the family's own: nothing stands around the language model."""
    stored = {name: entry for name, (_, entry) in published.tensors.items()}
    names = settle(family, stored, {}).claimed()
    return all(fold(name)[0] in names or name in names for name in plain_names(published.config, stored))


def merge(
    files: Sequence[str], found: Sequence[Mapping[str, Entry]], index: Mapping[str, str] | None, index_name: str
) -> dict[str, tuple[int, Entry]]:
    """The tensors of all files under one roof; where two files hold one name,
    the index decides which of them counts.
    """
    tensors: dict[str, tuple[int, Entry]] = {}
    for at, (file, entries) in enumerate(zip(files, found, strict=True)):
        for name, entry in entries.items():
            said = index.get(name) if index is not None else None
            if said is not None and said != file:
                continue
            if name in tensors:
                raise ReshardError(
                    f"{name} is in both {files[tensors[name][0]]} and in {file}",
                    f"{index_name} must say which one counts",
                )
            tensors[name] = (at, entry)
    lost = [name for name in index or () if name not in tensors]
    if lost:
        assert index is not None
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ReshardError(
            f"{index_name}: says that {lost[0]}{more} is in {index[lost[0]]}, which does not hold it",
            "the index and the files do not belong together: download both again",
        )
    return tensors


def read_json(path: Path, missing: str | None = None, most: int = limits.CONFIG) -> dict[str, Any]:
    """A JSON object from a file of at most `most` bytes; ReshardError if it is none."""
    return parse_json(decode.read(path, most, hint=missing), str(path), most)


def parse_json(text: bytes, where: str, most: int = limits.CONFIG) -> dict[str, Any]:
    data = decode.json_of(text, most, where)
    if not isinstance(data, dict):
        raise ReshardError(f"{where}: expected a JSON object, found a {type(data).__name__}")
    return data


def index_map(text: bytes, where: str) -> dict[str, str]:
    """The weight map of an index, each file name checked to lie inside the directory; without the "./" that some begin
    with.
    """
    found: _Index = decode.json_of(text, limits.INDEX, where, _Index, keys=limits.INDEX_KEYS)
    weights = found.weight_map
    if not weights:
        raise ReshardError(f"{where}: its weight_map is empty: an empty checkpoint")
    plain = {file: file.removeprefix("./") for file in set(weights.values())}
    for name, file in weights.items():
        if not inside(plain[file]):
            raise ReshardError(
                f"{where}: {name} is said to be in {file!r}, outside of the directory", "do not use this checkpoint"
            )
    return {name: plain[file] for name, file in weights.items()}


def choose(
    names: Collection[str], where: str, read: Callable[[str], bytes], said: str | None = None
) -> tuple[list[str], str | None, dict[str, str] | None]:
    """The weights files of a checkpoint, and the index that names them and what it says, if there is one.

    As transformers chooses: what config.json names (`said`: its transformers_weights), one file before several.
    `names`: what is in the top directory; `read` gives the bytes of an index. Raises ReshardError if there are no
    weights.
    """
    pairs = ((said, said),) if said is not None else WEIGHTS
    for single, index in pairs:
        if index in names and index.endswith(".index.json"):
            named = index_map(read(index), f"{where}/{index}")
            files = sorted(set(named.values()), key=natural)
            if single not in names or single == index or files == [single]:
                return files, index, named
        if single in names:
            return [single], None, None
    if said is not None:
        raise ReshardError(f"{where}: config.json says that the weights are in {said}, which does not exist")
    others = sorted(name for name in names if companions.WEIGHTS.search(name))
    seen = f"; there are {', '.join(others[:5])}" if others else ""
    raise ReshardError(
        f"{where}: no weights: none of {', '.join(name for pair in WEIGHTS for name in pair)} is there{seen}",
        f"several files need their index; a single one is named {' or '.join(single for single, _ in WEIGHTS)}",
    )


# Files that say how weights are quantised where config.json does not, and the key that what they say stands under.
_QUANTIZATION = {"hf_quant_config.json": "quantization", "quantize_config.json": "", "quant_config.json": ""}


def quantization_of(
    config: Config, names: Collection[str], read: Callable[[str], bytes], where: str
) -> dict[str, Any] | None:
    """What a file next to config.json says of a quantisation of which config.json says nothing."""
    name = next((name for name in _QUANTIZATION if name in names), None)
    if name is None or config.quantization:
        return None
    found = parse_json(read(name), f"{where}/{name}")
    if not (key := _QUANTIZATION[name]):  # GPTQ wrote such a file before any of them named its method
        return {"quant_method": "awq" if "w_bit" in found or "q_group_size" in found else "gptq"} | found
    inner = found.get(key)
    return inner if isinstance(inner, dict) else None


def natural(name: str) -> list[object]:
    """A key that sorts file names by the numbers in them."""
    return [
        (int(part), "") if at % 2 else (-1, part) for at, part in enumerate(re.split(f"([0-9]{{1,{DIGITS}}})", name))
    ]


def origin_of(root: Path) -> Origin:
    """What the path and the model card tell: the Hub's cache keeps id and commit in its directory names."""
    parts = root.absolute().parts
    name = commit = None
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        name, commit = parts[-3][len("models--") :].replace("--", "/"), parts[-1]
    card, found = root / "README.md", None
    try:
        if card.is_file():  # a pipe would be waited for
            with card.open(encoding="utf-8", errors="replace") as text:
                found = re.match(r"---\n(?:.*\n)*?license:\s*([\w.-]+)\s*\n", text.read(65536))
    except FileNotFoundError:
        pass  # deleted in between
    except OSError as error:
        raise failed("reading", card, error) from error
    return Origin(name, commit, found[1] if found else None)


# --- local files ------------------------------------------------------------------------------------------------------


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of files, as far as they are there: whoever reads them says what is missing."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = Stamp.of(path.stat())
    return found


def _read(root: Path, stamps: dict[Path, Stamp], name: str) -> bytes:
    _check_link(root / name)
    stamps |= stamps_of([root / name])
    return decode.read(root / name, limits.INDEX)


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ReshardError(
            f"{path}: is a link to {path.readlink()}, which does not exist",
            "the download is not complete: fetch it again",
        )


def _headers(root: Path, name: str, index: str | None, tally: Tally) -> tuple[Original, dict[str, Entry], Stamp]:
    path = root / name
    if index is None:
        _check_link(path)
    try:
        entries, stamp = read_header(path, name, tally)
    except FileNotFoundError:
        said = f"{index} names {name}, which does not exist" if index else f"{path}: no such file"
        raise ReshardError(
            f"{root}: {said}" if index else said, "the download is not complete: fetch the missing file"
        ) from None
    return Original(name, stamp.size, of_file(name).name, stamp.mtime_ns, _known_sha256(path)), entries, stamp


def read_header(path: Path, where: str, tally: Tally) -> tuple[dict[str, Entry], Stamp]:
    """The tensors of a local file, which messages call `where`, and its stamp as they were read.

    Raises FileNotFoundError; PlaceError where it cannot be opened, ReshardError where it is no such file.
    """
    try:
        # not to wait for the other end of a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failed("opening", path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ReshardError(f"{path}: is not a regular file")
        entries = of_file(path.name).read(of_descriptor(descriptor, where), status.st_size, where).entries
        return tally.checked(entries, str(path)), Stamp.of(status)
    finally:
        os.close(descriptor)


def _known_sha256(path: Path) -> str | None:
    """The Hub's cache names large files by their SHA-256: snapshots/<commit>/<name> → ../../blobs/<sha256>."""
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name) else None


def _plain(root: Path, name: str) -> Original:
    status = (root / name).stat()
    return Original(name, status.st_size, "plain", status.st_mtime_ns)


def _union(spans: list[Range]) -> list[Range]:
    merged: list[Range] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
