"""manifest.json and source/files.json: what a shard directory is, and what it takes to restore the original files.

Canonical: the same bytes by any route, any worker count, on any machine. No times, host names or paths. docs/format.md
is the contract.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field, to_builtins
from msgspec.structs import replace

from ..containers.container import NAMED
from ..errors import MismatchError, PlaceError, ReshardError, failed
from ..inputs import decode, limits
from ..inputs.decode import Size, about
from ..layout.cut import Layout
from ..layout.mesh import Mesh
from ..store.digest import Digest, of
from ..store.digest import root as root_digest
from .companions import Left, check_links, inside
from .published import Origin, Original
from .shards import FORMAT_VERSION

NAME = "manifest.json"
FILES = "source/files.json"
# what was left out; not listed, since it depends on the copy of the checkpoint and not on the model
LEFT = "source/left.json"
SUMS = "source/SHA256SUMS"  # of the files carried along, where they were asked for; as sha256sum writes and checks it
NOTATION = 1
_LEFT_MAX = 1 << 20  # bytes

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Range = tuple[Size, Size]
_MAJOR = FORMAT_VERSION.partition(".")[0]


class Listed(Struct, frozen=True):
    """A file of the directory: its path, size in bytes and digest."""

    name: Annotated[str, about("Path below the directory, with forward slashes.")] = field(name="file")
    size: Annotated[Size, about("Bytes.")]
    digest: Digest


class RankFiles(Struct, frozen=True):
    """The two files of a rank. The digest of the weights is made of others, see format.md."""

    rank: Size
    weights: Listed
    tensors: Listed


class Cut(Struct, frozen=True):
    """World size is tp * pp; rank = pp_rank * tp + tp_rank; ep divides tp."""

    tp: _Count
    pp: _Count
    ep: _Count
    split: Annotated[
        tuple[_Count, ...] | None,
        about("Weights of unequal tensor parallel ranks (--split); null when they are equal."),
    ]
    pp_layers: Annotated[tuple[_Count, ...] | None, about("Layers of each stage, where they were given (--pp-layers).")]
    stages: Annotated[
        tuple[_Range, ...],
        Meta(
            min_length=1,
            description="Of each pipeline stage the first layer and the one after the last; with multi-token "
            "prediction layers.",
        ),
    ]


class Manifest(Struct, frozen=True, kw_only=True):
    """manifest.json of a reshard shard directory, format version 1."""

    version: Annotated[
        str,
        Meta(
            pattern=rf"^{_MAJOR}\.[0-9]+$",
            description="Format version, MAJOR.MINOR. A reader refuses an unknown MAJOR and ignores unknown keys.",
        ),
    ] = field(name="reshard")
    notation: Annotated[_Count, about("Version of the table notation of the texts in source/.")]
    format: Annotated[str, about("Name of the format table: native, vllm, ...")]
    engine: Annotated[str | None, about("Engine and version that the format is written for.")]
    family: Annotated[str, about("Name of the family table.")]
    origin: Annotated[Origin, about("Where the checkpoint came from, as far as it is known.")] = field(name="model")
    exact: Annotated[bool, about("Every stored element is an element of the original, bit for bit.")]
    cut: Cut = field(name="mesh")
    sizes: Annotated[dict[str, Size], about("Size of each named axis of the whole model, in elements.")]
    repeats: Annotated[
        dict[str, _Count],
        about("Axes with fewer indices than ranks: axis to how many consecutive ranks hold the same index."),
    ]
    tied: Annotated[dict[str, str], about("Tied tensors: logical name to the logical name whose bytes are its own.")]
    padding: Annotated[
        dict[str, _Range], about("Axes padded with zeros at their end: axis to its size and its stored size.")
    ]
    plan: Annotated[
        Digest, about("Identifies the rows in use, sizes, dtypes and mesh. Opaque: compare it, do not compute it.")
    ]
    ranks: Annotated[tuple[RankFiles, ...], Meta(min_length=1, description="One entry per rank, in order.")]
    carried: Annotated[tuple[Listed, ...], about("Files taken over untouched: config.json, tokenizer, ...")]
    source: Annotated[tuple[Listed, ...], about("What restoring the original files takes.")]
    root: Annotated[Digest, about("One digest over all files listed here.")]

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.cut.tp, self.cut.pp, self.cut.ep, self.cut.split or None, self.cut.pp_layers or None)

    def files(self) -> Iterable[Listed]:
        """Every file of the directory but the manifest."""
        for rank in self.ranks:
            yield rank.weights
            yield rank.tensors
        yield from self.carried
        yield from self.source


class _Kept(Struct, frozen=True, kw_only=True):
    """An original file, as source/files.json has it."""

    name: str
    size: Size
    container: Annotated[str, Meta(pattern=rf"^({'|'.join((*NAMED, 'plain'))})\Z")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)] | UnsetType = UNSET
    holes: tuple[_Range, ...]


class _Version(Struct):
    reshard: Any = None


def made(
    layout: Layout,
    *,
    engine: str | None,
    origin: Origin,
    plan: str,
    ranks: Iterable[RankFiles],
    carried: Iterable[Listed],
    source: Iterable[Listed],
) -> Manifest:
    """The manifest of a conversion."""
    mesh = layout.mesh
    unsigned = Manifest(
        version=FORMAT_VERSION,
        notation=NOTATION,
        format=layout.format.name,
        engine=engine,
        family=layout.model.family.name,
        origin=origin,
        exact=True,
        cut=Cut(mesh.tp, mesh.pp, mesh.ep, mesh.weights, mesh.layers, tuple(layout.stages)),
        sizes=dict(sorted(layout.model.sizes.items())),
        repeats=dict(sorted(layout.repeats.items())),
        tied=_tied(layout),
        padding=dict(sorted(layout.padding.items())),
        plan=plan,
        ranks=tuple(replace(files, rank=rank) for rank, files in enumerate(ranks)),
        carried=tuple(sorted(carried, key=_name)),
        source=tuple(sorted(source, key=_name)),
        root="",
    )
    return replace(unsigned, root=_root(dump(unsigned), unsigned.files()))


def dump(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    return (json.dumps(to_builtins(manifest), indent=1, ensure_ascii=False) + "\n").encode()


def _root(unsigned: bytes, files: Iterable[Listed]) -> str:
    """The digest over all files, the manifest with an empty `root` among them."""
    return root_digest([(NAME, len(unsigned), of(unsigned)), *((file.name, file.size, file.digest) for file in files)])


def root_of(directory: Path, manifest: "Manifest") -> str:
    """The root digest that the manifest of a directory should have, from its own text and the digests that it lists."""
    text = (directory / NAME).read_bytes()
    return _root(text.replace(f'"root": {json.dumps(manifest.root)}'.encode(), b'"root": ""'), manifest.files())


def _name(file: Listed) -> str:
    return file.name


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
        return not decode.json_file(path, limits.MANIFEST, dict[str, Any])  # {} is no manifest either
    except PlaceError:
        raise
    except ReshardError:
        return True


def check_lost(directory: Path) -> None:
    """Raise MismatchError where a directory without a manifest holds shards of ours."""
    if broken(directory):
        there = " and ".join(name for name in ("rank-00000", FILES) if (directory / name).exists())
        raise MismatchError(
            f"{directory / NAME}: is missing or damaged, next to {there}",
            "fetch it again, or convert again: --overwrite",
        )


def load(directory: Path) -> Manifest:
    """Read manifest.json; unknown keys are ignored, an unknown major version is refused."""
    path, edited = directory / NAME, "it was edited or damaged: convert again"
    text = decode.read(path, limits.MANIFEST, MismatchError)
    version = decode.json_of(text, limits.MANIFEST, str(path), _Version, MismatchError).reshard
    if not isinstance(version, str):
        raise ReshardError(f"{path}: is not a reshard manifest", "is this the right directory?")
    if version.partition(".")[0] != _MAJOR:
        raise ReshardError(
            f"{path}: format version {version}, this reshard reads {FORMAT_VERSION}", "install a newer reshard"
        )
    manifest: Manifest = decode.json_of(text, limits.MANIFEST, str(path), Manifest, MismatchError, edited)
    try:
        mesh = manifest.mesh
    except ReshardError as error:
        raise MismatchError(f"{path}: {error.message}", edited) from None
    if len(manifest.ranks) != mesh.world:
        raise MismatchError(f"{path}: lists {len(manifest.ranks)} ranks, its mesh {mesh} has {mesh.world}")
    small = {rank.tensors: limits.TENSORS_JSON for rank in manifest.ranks}
    small |= dict.fromkeys(manifest.carried, limits.COPIED)
    small |= {file: limits.FILES for file in manifest.source if not file.name.endswith(".residue")}
    for file in manifest.files():
        if not inside(file.name):
            raise MismatchError(
                f"{path}: lists {file.name!r}, which is not a file in this directory", "do not use this directory"
            )
        hint = "do not use this directory: no conversion writes such a file"
        decode.fits(file.size, small.get(file, file.size), f"{path}: {file.name}", MismatchError, hint)
    check_links(directory, (file.name for file in (*manifest.carried, *manifest.source)))
    return manifest


def _tied(layout: Layout) -> dict[str, str]:
    """Name → the name that it is tied to, as the family says it, whichever of the two the original stores."""
    pairs = layout.model.family.tied
    one = {frozenset(pair) for pair in layout.alias.items()}
    return {name: other for name, other in sorted(pairs.items()) if {name, other} in one}


def dump_originals(originals: Iterable[Original]) -> bytes:
    """The text of source/files.json: the original files, and which byte ranges of each are in the shards (`holes`)."""
    kept = (
        _Kept(name=o.name, size=o.size, container=o.container, sha256=o.sha256 or UNSET, holes=o.holes)
        for o in originals
    )
    return ("[\n" + ",\n".join(json.dumps(to_builtins(each), ensure_ascii=False) for each in kept) + "\n]\n").encode()


def load_originals(directory: Path) -> tuple[Original, ...]:
    """Read source/files.json; modification times are those of the residues."""
    path = directory / FILES
    damaged = "the shard directory is damaged: convert again"
    entries = decode.json_file(path, limits.FILES, list[_Kept], MismatchError, damaged)
    try:
        return tuple(_original(directory, entry) for entry in entries)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{path}: cannot be read: {error}", damaged) from None


def _original(directory: Path, entry: _Kept) -> Original:
    name, size, holes = entry.name, entry.size, entry.holes
    ends = [0, *(end for hole in holes for end in hole), size]
    if not inside(name) or ends != sorted(ends):
        raise ValueError(f"{name!r} of size {size!r} with holes {holes!r:.200} is not an original file")
    residue = residue_path(directory, name).stat()
    original = Original(name, size, entry.container, residue.st_mtime_ns, entry.sha256 or None, holes)
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
        text = decode.read(
            directory / SUMS, limits.FILES, MismatchError, "the shard directory is damaged: convert again"
        ).decode()
        lines = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text.splitlines()]
        return {line[2]: line[1] for line in lines if line is not None}
    except UnicodeDecodeError as error:
        raise MismatchError(
            f"{directory / SUMS}: cannot be read: {error}", "the shard directory is damaged: convert again"
        ) from None


def dump_left(left: Iterable[Left]) -> bytes:
    """The text of source/left.json: what lay beside the weights and was not copied."""
    return (json.dumps(to_builtins(list(left)), indent=1, ensure_ascii=True) + "\n").encode()


def load_left(directory: Path) -> tuple[Left, ...]:
    """Read source/left.json, if there is one."""
    path, hint = directory / LEFT, "it only says what was not copied, and may be deleted"
    if not path.exists():
        return ()
    entries = decode.json_file(path, _LEFT_MAX, kind=MismatchError, hint=hint)  # a name may not be valid Unicode
    return decode.typed(entries, tuple[Left, ...], str(path), MismatchError, hint)  # type: ignore[no-any-return]


def residue_path(directory: Path, name: str) -> Path:
    """Where the bytes of an original file that no row claims are kept."""
    return directory / "source" / f"{name}.residue"
