"""manifest.json and source/files.json: what a shard directory is, and what it takes to restore the original files.

Canonical: the same bytes by any route, any worker count, on any machine. No times, host names or paths. docs/format.md is the contract.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..containers.container import NAMED
from ..errors import MismatchError, PlaceError, ReshardError, failed
from ..inputs import decode, limits
from ..layout.cut import Layout
from ..layout.mesh import Mesh
from ..store.digest import of
from ..store.digest import root as root_digest
from .companions import Left, check_links, inside
from .published import Origin, Original
from .shards import FORMAT_VERSION

NAME = "manifest.json"
FILES = "source/files.json"
LEFT = "source/left.json"  # what was left out; not listed, since it depends on the copy of the checkpoint and not on the model
SUMS = "source/SHA256SUMS"  # of the files carried along, where they were asked for; as sha256sum writes and checks it
NOTATION = 1
_LEFT_MAX = 1 << 20  # bytes
_ANY_NAME = re.compile("(?s).*")  # of a file that was left out, perhaps because its name is not valid Unicode

SIZE = range(2**63)
DIGEST = re.compile("[0-9a-f]{32}")
_FILE = {"file": str, "size": SIZE, "digest": DIGEST}
_TEXT = (str, None)
_MANY = (None, [range(1, 2**31)])
_FORM: decode.Form = {
    "format": str,
    "family": str,
    "engine?": _TEXT,
    "mesh": {"tp": int, "pp": int, "ep": int, "split?": _MANY, "pp_layers?": _MANY},
    "model?": (None, {"id?": _TEXT, "commit?": _TEXT, "license?": _TEXT}),
    "exact?": bool,
    "plan": str,
    "ranks": [{"weights": _FILE, "tensors": _FILE}],
    "carried": [_FILE],
    "source": [_FILE],
    "root": str,
    "tied?": (None, {"": str}),
}
_ORIGINAL: decode.Form = {
    "name": str,
    "size": SIZE,
    "container": re.compile("|".join((*NAMED, "plain"))),
    "sha256?": (None, re.compile("[0-9a-f]{64}")),
    "holes": [[SIZE]],
}


class Listed(NamedTuple):
    """A file of the directory: its path, size in bytes and digest."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """A manifest as read. `ranks`: (weights, tensors.json) per rank."""

    format: str
    family: str
    engine: str | None
    mesh: Mesh
    origin: Origin
    exact: bool
    plan: str
    ranks: tuple[tuple[Listed, Listed], ...]
    carried: tuple[Listed, ...]
    source: tuple[Listed, ...]
    root: str
    version: str = FORMAT_VERSION
    tied: dict[str, str] = field(default_factory=dict)

    def files(self) -> Iterable[Listed]:
        """Every file of the directory but the manifest."""
        for weights, tensors in self.ranks:
            yield weights
            yield tensors
        yield from self.carried
        yield from self.source


def dump(
    layout: Layout,
    *,
    engine: str | None,
    origin: Origin,
    plan: str,
    ranks: Iterable[tuple[Listed, Listed]],
    carried: Iterable[Listed],
    source: Iterable[Listed],
) -> tuple[bytes, str]:
    """The text of manifest.json and the root digest."""
    mesh = layout.mesh
    pairs, along, kept = list(ranks), sorted(carried, key=_name), sorted(source, key=_name)
    every = [*(file for pair in pairs for file in pair), *along, *kept]
    text: dict[str, Any] = {
        "reshard": FORMAT_VERSION,
        "notation": NOTATION,
        "format": layout.format.name,
        "engine": engine,
        "family": layout.model.family.name,
        "model": {"id": origin.id, "commit": origin.commit, "license": origin.license},
        "exact": True,
        "mesh": {
            "tp": mesh.tp,
            "pp": mesh.pp,
            "ep": mesh.ep,
            "split": list(mesh.weights) if mesh.weights else None,
            "pp_layers": list(mesh.layers) if mesh.layers else None,
            "stages": [list(stage) for stage in layout.stages],
        },
        "sizes": dict(sorted(layout.model.sizes.items())),
        "repeats": dict(sorted(layout.repeats.items())),
        "tied": _tied(layout),
        "padding": {axis: list(sizes) for axis, sizes in sorted(layout.padding.items())},
        "plan": plan,
        "ranks": [{"rank": rank, "weights": _listed(w), "tensors": _listed(t)} for rank, (w, t) in enumerate(pairs)],
        "carried": [_listed(file) for file in along],
        "source": [_listed(file) for file in kept],
        "root": "",
    }
    root = _root(_text(text), every)
    return _text(text | {"root": root}), root


def _text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _root(unsigned: bytes, files: Iterable[Listed]) -> str:
    """The digest over all files, the manifest with an empty `root` among them."""
    return root_digest([(NAME, len(unsigned), of(unsigned)), *((file.name, file.size, file.digest) for file in files)])


def root_of(directory: Path, manifest: "Manifest") -> str:
    """The root digest that the manifest of a directory should have, from its own text and the digests that it lists."""
    text = (directory / NAME).read_bytes()
    return _root(text.replace(f'"root": {json.dumps(manifest.root)}'.encode(), b'"root": ""'), manifest.files())


def _name(file: Listed) -> str:
    return file.name


def _listed(file: Listed) -> dict[str, Any]:
    return {"file": file.name, "size": file.size, "digest": file.digest}


def present(directory: Path) -> bool:
    """Whether a directory has a manifest of ours; a checkpoint may hold a file of that name that is none.

    Raises PlaceError where it cannot be read.
    """
    path = directory / NAME
    try:
        if path.is_file():
            with path.open("rb") as file:
                return b'"reshard"' in file.read(4096)
    except OSError as error:
        raise failed("reading", path, error) from error
    return False


def remains(directory: Path) -> bool:
    """Whether something that only a conversion writes lies in a directory, whatever its manifest says."""
    return (directory / FILES).is_file() or (directory / "rank-00000").is_dir()


def broken(directory: Path) -> bool:
    """Whether a directory is a conversion whose manifest is missing, empty or torn, as a power cut may leave it."""
    path, there = directory / NAME, [(directory / FILES).is_file(), (directory / "rank-00000").is_dir()]
    if not any(there):
        return False
    if not path.is_file():  # a pipe would be waited for
        return all(there)
    try:
        return not decode.json_file(path, limits.MANIFEST, {})  # {} is no manifest either
    except PlaceError:
        raise
    except ReshardError:
        return True


def check_lost(directory: Path) -> None:
    """Raise MismatchError where a directory without a manifest holds shards of ours."""
    if broken(directory):
        there = " and ".join(name for name in ("rank-00000", FILES) if (directory / name).exists())
        raise MismatchError(f"{directory / NAME}: is missing or damaged, next to {there}", "fetch it again, or convert again: --overwrite")


def load(directory: Path) -> Manifest:
    """Read manifest.json; unknown keys are ignored, an unknown major version is refused."""
    path = directory / NAME
    data = decode.json_file(path, limits.MANIFEST, {}, MismatchError)
    version = data.get("reshard")
    if not isinstance(version, str):
        raise ReshardError(f"{path}: is no manifest of reshard", "is this the right directory?")
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise ReshardError(f"{path}: format version {version}, this reshard reads {FORMAT_VERSION}", "install a newer reshard")
    decode.check(data, _FORM, str(path), MismatchError, "it was edited or damaged: convert again")
    mesh, model = data["mesh"], data.get("model") or {}
    try:
        whole = Mesh(*(mesh[axis] for axis in ("tp", "pp", "ep")), *(tuple(mesh.get(key) or ()) or None for key in ("split", "pp_layers")))
    except ReshardError as error:
        raise MismatchError(f"{path}: {error.message}", "it was edited or damaged: convert again") from None
    manifest = Manifest(
        format=data["format"],
        family=data["family"],
        engine=data.get("engine"),
        mesh=whole,
        origin=Origin(*(model.get(key) for key in ("id", "commit", "license"))),
        exact=data.get("exact", False),
        plan=data["plan"],
        ranks=tuple((_file(rank["weights"], path, 2**63 - 1), _file(rank["tensors"], path, limits.TENSORS_JSON)) for rank in data["ranks"]),
        carried=tuple(_file(file, path, limits.COPIED) for file in data["carried"]),
        source=tuple(_file(file, path, 2**63 - 1 if file["file"].endswith(".residue") else limits.FILES) for file in data["source"]),
        root=data["root"],
        version=version,
        tied=data.get("tied") or {},
    )
    if len(manifest.ranks) != manifest.mesh.world:
        raise MismatchError(f"{path}: lists {len(manifest.ranks)} ranks, its mesh {manifest.mesh} has {manifest.mesh.world}")
    check_links(directory, (file.name for file in (*manifest.carried, *manifest.source)))
    return manifest


def _tied(layout: Layout) -> dict[str, str]:
    """Name → the name that it is tied to, as the family says it, whichever of the two the original stores."""
    pairs = layout.model.family.tied
    one = {frozenset(pair) for pair in layout.alias.items()}
    return {name: other for name, other in sorted(pairs.items()) if {name, other} in one}


def _file(entry: Mapping[str, Any], path: Path, most: int) -> Listed:
    name, size, digest = entry["file"], entry["size"], entry["digest"]
    if not inside(name):
        raise MismatchError(f"{path}: lists {name!r}, which is no file of this directory", "do not use this directory")
    decode.fits(size, most, f"{path}: {name}", MismatchError, "do not use this directory: no conversion writes such a file")
    return Listed(name, size, digest)


def dump_originals(originals: Iterable[Original]) -> bytes:
    """The text of source/files.json: the original files, and which byte ranges of each are in the shards (`holes`)."""
    lines = [
        json.dumps(
            {"name": o.name, "size": o.size, "container": o.container}
            | ({"sha256": o.sha256} if o.sha256 else {})
            | {"holes": [list(hole) for hole in o.holes]},
            ensure_ascii=False,
        )
        for o in originals
    ]
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def load_originals(directory: Path) -> tuple[Original, ...]:
    """Read source/files.json; modification times are those of the residues."""
    path = directory / FILES
    damaged = "the shard directory is damaged: convert again"
    entries = decode.json_file(path, limits.FILES, [_ORIGINAL], MismatchError, damaged)
    try:
        return tuple(_original(directory, entry) for entry in entries)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{path}: cannot be read: {error}", damaged) from None


def _original(directory: Path, entry: Mapping[str, Any]) -> Original:
    name, size, holes = entry["name"], entry["size"], tuple(map(tuple, entry["holes"]))
    ends = [0, *(end for hole in holes for end in hole), size]
    if not inside(name) or any(len(hole) != 2 for hole in holes) or ends != sorted(ends):
        raise ValueError(f"{name!r} of size {size!r} with holes {holes!r:.200} is no original file")
    residue = residue_path(directory, name).stat()
    original = Original(name, size, entry["container"], residue.st_mtime_ns, entry.get("sha256"), holes)
    if residue.st_size != (kept := sum(high - low for low, high in original.residue())):
        raise ValueError(f"{name}: {kept} bytes are outside of its holes, its residue has {residue.st_size}")
    return original


def dump_sums(sums: Mapping[str, str]) -> bytes:
    """The text of source/SHA256SUMS: file → SHA-256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def load_sums(directory: Path, known: Manifest) -> dict[str, str]:
    """Read source/SHA256SUMS, if there is one."""
    if SUMS not in {file.name for file in known.source}:
        return {}
    try:
        text = decode.read(directory / SUMS, limits.FILES, MismatchError, "the shard directory is damaged: convert again").decode()
        lines = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text.splitlines()]
        return {line[2]: line[1] for line in lines if line is not None}
    except UnicodeDecodeError as error:
        raise MismatchError(f"{directory / SUMS}: cannot be read: {error}", "the shard directory is damaged: convert again") from None


def dump_left(left: Iterable[Left]) -> bytes:
    """The text of source/left.json: what lay beside the weights and was not copied."""
    return (json.dumps([entry._asdict() for entry in left], indent=1, ensure_ascii=True) + "\n").encode()


def load_left(directory: Path) -> tuple[Left, ...]:
    """Read source/left.json, if there is one."""
    path, hint = directory / LEFT, "it only says what was not copied, and may be deleted"
    if not path.exists():
        return ()
    entries = decode.json_file(path, _LEFT_MAX, [{"name": _ANY_NAME, "size": int, "why": str}], MismatchError, hint)
    return tuple(Left(entry["name"], entry["size"], entry["why"]) for entry in entries)


def residue_path(directory: Path, name: str) -> Path:
    """Where the bytes of an original file that no row claims are kept."""
    return directory / "source" / f"{name}.residue"
