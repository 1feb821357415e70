"""A source: anything reshard can read tensors from, behind one interface: published checkpoints, shard directories, an engine's own.

Knows where every stored tensor is and what the original files were; reads headers, no tensor.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..containers import safetensors
from ..containers.safetensors import Entry, extent
from ..engine.worker import Key
from ..errors import MismatchError, ReshardError, failed
from ..inputs import decode, limits
from ..layout.cut import Layout, lay_out
from ..layout.mesh import Mesh
from ..model.understand import Config
from ..store.digest import of_file
from ..store.directory import Directory, reading
from ..store.local import Pool, Stamp
from ..store.workfolder import check_whole
from ..tables import families, formats
from ..tables.families import Family
from ..tables.formats import Format
from . import companions, manifest
from .companions import Carried, Left
from .manifest import Manifest
from .published import Origin, Original, Published, Tally, merge, open_published, read_json, stamps_of, understood
from .published import index_map as parse_index
from .shards import Shards

if TYPE_CHECKING:
    from .engine_shards import Foreign

Extent = tuple[int, int, Path | bytes, int]  # offset in the original file, length, where those bytes are now, offset there


@dataclass(frozen=True)
class Source:
    """Where tensors are read from. `originals` and `tensors` describe the published files, whatever is being read.

    Where those are nowhere to be found, but what transformers would write, `residues` has their bytes that are no tensors.
    `stamps`: what every file that is read was like when it was opened first.
    """

    where: str
    root: Path | None
    config: Config
    layout: Layout
    places: dict[Key, tuple[Path, Entry]]
    originals: tuple[Original, ...]
    tensors: dict[str, tuple[int, Entry]]  # of the originals: name → (index, entry)
    carried: tuple[Carried, ...] = ()
    left: tuple[Left, ...] = ()
    origin: Origin = field(default_factory=Origin)
    manifest: Manifest | None = None
    residues: dict[str, bytes] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)  # SHA-256 of files carried along, as far as they are known
    directory: Directory | None = field(default=None, compare=False)  # `root` as it was when it was opened

    def locate(self, key: Key) -> tuple[Path, Entry]:
        return self.places[key]

    @property
    def bytes(self) -> int:
        """Size in bytes of everything stored in tensors that the layout knows."""
        return sum(entry.nbytes for _, entry in self.places.values())

    def residue(self, original: Original) -> Iterator[Extent]:
        """The bytes of an original file that no row claims, wherever they are now (on the Hub, where there is no root)."""
        at, root = 0, self.root or Path()
        for low, high in original.residue():
            if original.name in self.residues:
                yield low, high - low, self.residues[original.name], at
            elif self.manifest is None:
                yield low, high - low, root / original.name, low
            else:
                yield low, high - low, manifest.residue_path(root, original.name), at
            at += high - low

    def buffer(self, name: str) -> tuple[Entry, Extent]:
        """A tensor that is kept aside, and where its bytes are now."""
        at, entry = self.tensors[name]
        length = extent(entry)
        for low, size, place, start in self.residue(self.originals[at]):
            if low <= entry.offset and entry.offset + length <= low + size:
                return entry, (entry.offset, length, place, start + entry.offset - low)
        raise MismatchError(f"{self.where}: {name} is not in the residue of {self.originals[at].name}", "convert again")

    def published(self) -> Layout:
        """The layout of the original files."""
        model = self.layout.model
        return lay_out(model.family.published, model, Mesh(), model.active)


def open_source(path: Path, family: Family | None = None) -> Source:
    """Open a local directory: shards if it has a manifest, an engine's shards by their file names, else a published checkpoint."""
    check_whole(path)
    if not path.exists():
        raise ReshardError(f"{path}: no such file or directory", "a path to a checkpoint directory, or a Hub id such as org/name")
    if not path.is_dir():
        raise ReshardError(f"{path}: is a file; a checkpoint is a directory", f"give the directory: {path.parent}")
    try:
        return reading(path, lambda directory: replace(_open(path, family), directory=directory))
    except OSError as error:
        raise failed("reading", path, error) from error


def _open(path: Path, family: Family | None) -> Source:
    if manifest.present(path):
        return _open_shards(path)
    from . import engine_shards

    if (table := engine_shards.recognised(path)) is not None:
        return _from_foreign(engine_shards.open_shards(path, table, family))
    manifest.check_lost(path)
    return from_published(open_published(path), family)


def from_published(published: Published, family: Family | None = None) -> Source:
    """A published checkpoint, understood."""
    model, originals = understood(published, family)
    layout = lay_out(model.family.published, model, Mesh(), model.active)
    root = published.root or Path()
    paths = [root / original.name for original in originals]
    aside = set(model.aside)
    return Source(
        published.where,
        published.root,
        published.config,
        layout,
        {(0, name): (paths[at], entry) for name, (at, entry) in published.tensors.items() if name not in aside},
        originals,
        published.tensors,
        published.carried,
        published.left,
        published.origin,
        stamps=published.stamps,
    )


def _from_foreign(found: "Foreign") -> Source:
    published = found.published
    return Source(
        published.where,
        published.root,
        published.config,
        found.layout,
        found.places,
        published.originals,
        published.tensors,
        published.carried,
        published.left,
        published.origin,
        residues=found.residues,
        stamps=published.stamps,
    )


# --- shard directories -------------------------------------------------------------------------------------------------------


def _open_shards(root: Path) -> Source:
    known = manifest.load(root)
    stamps = stamps_of(root / file.name for file in known.files())
    check_small_files(root, known)
    return replace(_opened(root, known, range(len(known.ranks))), stamps=stamps)


def open_rank(root: Path, rank: int) -> Source:
    """A shard directory of which only one rank's files are there, and manifest.json, the carried files and source/."""

    def open_now(directory: Directory) -> Source:
        known = manifest.load(root)
        if not 0 <= rank < len(known.ranks):
            raise ReshardError(f"{root}: there is no rank {rank}, ranks are 0 to {len(known.ranks) - 1}")
        check_small_files(root, replace(known, ranks=known.ranks[rank : rank + 1]))
        return replace(_opened(root, known, [rank]), directory=directory)

    return reading(root, open_now)


def _opened(root: Path, known: Manifest, ranks: Iterable[int]) -> Source:
    """The layout follows from manifest.json, config.json and source/; the files of these ranks begin as it says."""
    originals = manifest.load_originals(root)
    _check_carried(root, known)
    config = Config(read_json(root / "config.json", missing="the shard directory is damaged: convert again"))
    family, format_table = _tables(root, known)
    tensors = _original_tensors(root, originals)
    where = str(root)
    published = Published(where, root, config, originals, tensors, origin=known.origin)
    model, again = understood(published, family)
    for original, wanted in zip(originals, again, strict=True):
        if original.holes != wanted.holes:
            raise MismatchError(
                f"{root / manifest.FILES}: the holes of {original.name} are not where its header has the tensors", "convert again"
            )
    pairs = family.tied.items()
    tied = {name: other for name, other in pairs if known.tied.get(name) == other and {name, other} <= model.tensors.keys()}
    layout = lay_out(format_table.for_family(family.name), model, known.mesh, tied=tied)
    shards = Shards(layout)
    if shards.digest != known.plan:
        raise MismatchError(
            f"{root}: the plan of manifest.json is {known.plan}, its tables and config.json make {shards.digest}",
            "config.json or the manifest were edited: restore them, or convert again",
        )
    places: dict[Key, tuple[Path, Entry]] = {}
    for rank in ranks:
        shard, path = shards.shard(rank), root / known.ranks[rank][0].name
        check_prologue(path, shard.prologue, shard.size)
        places.update({(rank, name): (path, entry) for name, entry in shard.header.entries.items()})
    carried = []
    for file in known.carried:
        status = (root / file.name).stat()
        carried.append(Carried(file.name, root / file.name, status.st_size, status.st_mtime_ns))
    sums = manifest.load_sums(root, known)
    left = manifest.load_left(root)
    return Source(where, root, config, layout, places, originals, tensors, tuple(carried), left, known.origin, known, sums=sums)


def _check_carried(root: Path, known: Manifest) -> None:
    """What a manifest lists as copied is what a conversion would copy: merging puts it in the place of the user's choice."""
    names = [file.name for file in known.carried]
    if "config.json" not in names:
        raise MismatchError(f"{root / manifest.NAME}: does not list config.json", "it was edited or damaged: convert again")
    for name in names:
        why = companions.objection(name) or ("its own name" if name == manifest.NAME else "it is listed twice" * (names.count(name) > 1))
        if why:
            raise MismatchError(f"{root / manifest.NAME}: lists {name} as a file to copy: {why}", "do not use this directory")


def check_prologue(path: Path, prologue: bytes, size: int) -> None:
    """A shard begins with exactly the header that its manifest implies and has its size: not truncated, exchanged or stray."""
    try:
        if path.exists() and not path.is_file():
            raise MismatchError(f"{path}: is not a regular file", "fetch the file again, or convert again")
        with path.open("rb") as file:
            found, actual = os.fstat(file.fileno()).st_size, file.read(len(prologue))
    except FileNotFoundError:
        raise MismatchError(f"{path}: is missing; it should have {size} bytes", "fetch the file again, or convert again") from None
    except OSError as error:
        raise failed("reading", path, error) from error
    if found != size:
        raise MismatchError(
            f"{path}: has {found} bytes, the manifest says {size}", "it is truncated or of another conversion: fetch it again"
        )
    if actual != prologue:
        raise MismatchError(
            f"{path}: its header is not that of this rank of this manifest{_whose(actual, prologue)}",
            "files were exchanged or damaged: fetch the file again, or convert again",
        )


def _whose(actual: bytes, wanted: bytes) -> str:
    pattern = re.compile(rb'"reshard\.rank":"([0-9]+)"')
    one, other = pattern.search(actual), pattern.search(wanted)
    return f": it says rank {one[1].decode()}, wanted is rank {other[1].decode()}" if one and other and one[1] != other[1] else ""


def check_small_files(root: Path, known: Manifest) -> None:
    """Digests of everything but weights and residues: cheap, and wrong ones would mislead."""
    for file in [*(tensors for _, tensors in known.ranks), *known.carried, *known.source]:
        path = root / file.name
        try:
            size = path.stat().st_size
            same = size == file.size and (file.name.endswith(".residue") or of_file(path) == file.digest)
        except FileNotFoundError:
            raise MismatchError(f"{path}: is missing, the manifest lists it", "fetch the file again, or convert again") from None
        if not same:
            raise MismatchError(
                f"{path}: is not the file that the manifest lists ({size} bytes, {file.size} were written)",
                "it was edited or damaged: restore it, or convert again",
            )


def _tables(root: Path, known: Manifest) -> tuple[Family, Format]:
    def texts(kind: str) -> Callable[[str], str]:
        def text(name: str) -> str:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise MismatchError(f"{root / manifest.NAME}: {name!r} is no name of a table")
            path = root / "source" / kind / f"{name}.toml"
            try:
                return decode.read(path, limits.TABLE, MismatchError, "convert again").decode()
            except UnicodeDecodeError as error:
                raise MismatchError(f"{path}: is named by the manifest and cannot be read: {error}", "convert again") from None

        return text

    family, layout = texts("families"), texts("formats")
    model = families.parse(family(known.family), known.family, family)
    return model, formats.parse(layout(known.format), known.format, layout, model.leaves())


def _original_tensors(root: Path, originals: tuple[Original, ...]) -> dict[str, tuple[int, Entry]]:
    """The headers of the original files, read from their residues."""
    pool = Pool()
    found, tally = [], Tally()
    index = None
    index_name = "the index"
    try:
        for original in originals:
            entries: dict[str, Entry] = {}
            view = _View(original, manifest.residue_path(root, original.name), pool)
            if original.container == "safetensors":
                n = safetensors.length(view(8, 0), original.size, original.name)
                entries = safetensors.parse(view(n, 8), original.size, original.name).entries
            elif original.container == "torch":
                from ..containers import torch_zip

                entries = torch_zip.read(view, original.size, original.name)
            elif original.name.endswith(".index.json"):
                decode.fits(original.size, limits.INDEX, original.name, MismatchError)
                index, index_name = parse_index(view(original.size, 0), original.name), original.name
            found.append(tally.checked(entries, str(view.path)))
    finally:
        pool.close()
    return merge([original.name for original in originals], found, index, index_name)


class _View:
    """An original file as far as its residue goes; the holes read as zeros."""

    def __init__(self, original: Original, path: Path, pool: Pool) -> None:
        self.size, self.path, self.pool = original.size, path, pool
        self.parts: list[tuple[int, int, int]] = []  # low, high, offset in the residue
        at = 0
        for low, high in original.residue():
            self.parts.append((low, high, at))
            at += high - low

    def __call__(self, length: int, offset: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        data = bytearray(length)
        for low, high, at in self.parts:
            start, stop = max(low, offset), min(high, offset + length)
            if start < stop:
                self.pool.read_into(self.path, at + start - low, memoryview(data)[start - offset : stop - offset])
        return bytes(data)
