"""Shard directories as a source: opened whole or for one rank, and refused where files are not those of their manifest.

Reads manifest.json, the small files and headers; digests of weights are `verify`'s.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from ..containers.container import NAMED
from ..containers.entry import Entry
from ..engine.worker import Key
from ..errors import MismatchError, ReshardError, failed
from ..inputs import decode, limits
from ..layout.cut import lay_out
from ..model.understand import Config
from ..store.digest import of_file
from ..store.directory import Directory, reading
from ..store.local import Pool
from ..tables import families, formats
from ..tables.families import Family
from ..tables.formats import Format
from . import companions, manifest
from .companions import Carried
from .manifest import Manifest
from .published import Original, Published, Tally, merge, read_json, stamps_of, understood
from .published import index_map as parse_index
from .shards import Shards
from .source_kinds import ShardSource


def open_shards(root: Path) -> ShardSource:
    """A shard directory that has a manifest. Raises MismatchError where its files do not match the manifest."""
    known = manifest.load(root)
    stamps = stamps_of(root / file.name for file in known.files())
    check_small_files(root, known)
    return replace(_opened(root, known, range(len(known.ranks))), stamps=stamps)


def open_rank(root: Path, rank: int) -> ShardSource:
    """A shard directory of which only one rank's files are there, and manifest.json, the carried files and source/."""

    def open_now(directory: Directory) -> ShardSource:
        known = manifest.load(root)
        if not 0 <= rank < len(known.ranks):
            raise ReshardError(f"{root}: there is no rank {rank}, ranks are 0 to {len(known.ranks) - 1}")
        check_small_files(root, structs.replace(known, ranks=known.ranks[rank : rank + 1]))
        return replace(_opened(root, known, [rank]), directory=directory)

    return reading(root, open_now)


def _opened(root: Path, known: Manifest, ranks: Iterable[int]) -> ShardSource:
    """The layout follows from manifest.json, config.json and source/; the files of these ranks begin as it says."""
    originals = manifest.load_originals(root)
    _check_carried(root, known)
    config = Config(read_json(root / "config.json", missing="the shard directory is damaged: convert again"))
    family, format_table = tables(root, known)
    tensors = _original_tensors(root, originals)
    where = str(root)
    published = Published(where, root, config, originals, tensors, origin=known.origin)
    model, again = understood(published, family)
    for original, wanted in zip(originals, again, strict=True):
        if original.holes != wanted.holes:
            raise MismatchError(
                f"{root / manifest.FILES}: the holes of {original.name} are not where its header has the tensors",
                "convert again",
            )
    pairs = family.tied.items()
    tied = {
        name: other for name, other in pairs if known.tied.get(name) == other and {name, other} <= model.tensors.keys()
    }
    layout = lay_out(format_table.for_family(family.plain), model, known.mesh, tied=tied)
    shards = Shards(layout, known.version)
    if shards.digest != known.plan:
        raise MismatchError(
            f"{root}: the plan of manifest.json is {known.plan}, its tables and config.json make {shards.digest}",
            "config.json or the manifest were edited: restore them, or convert again"
            if known.version == shards.version
            else f"it is of format version {known.version}, this reshard knows {shards.version}: install a newer one",
        )
    places: dict[Key, tuple[Path, Entry]] = {}
    for rank in ranks:
        shard, path = shards.shard(rank), root / known.ranks[rank].weights.name
        check_prologue(path, shard.prologue, shard.size)
        places.update({(rank, name): (path, entry) for name, entry in shard.header.entries.items()})
    carried = []
    for file in known.carried:
        status = (root / file.name).stat()
        carried.append(Carried(file.name, root / file.name, status.st_size, status.st_mtime_ns))
    sums = manifest.load_sums(root, known)
    return ShardSource(
        where=where,
        root=root,
        config=config,
        layout=layout,
        places=places,
        originals=originals,
        tensors=tensors,
        carried=tuple(carried),
        left=manifest.load_left(root),
        origin=known.origin,
        sums=sums,
        manifest=known,
    )


def _check_carried(root: Path, known: Manifest) -> None:
    """What a manifest lists as copied is what a conversion would copy: merging writes it where the user says."""
    names = [file.name for file in known.carried]
    if "config.json" not in names:
        raise MismatchError(
            f"{root / manifest.NAME}: does not list config.json", "it was edited or damaged: convert again"
        )
    for name in names:
        why = companions.objection(name) or (
            "its own name" if name == manifest.NAME else "it is listed twice" * (names.count(name) > 1)
        )
        if why:
            raise MismatchError(
                f"{root / manifest.NAME}: lists {name} as a file to copy: {why}", "do not use this directory"
            )


def check_prologue(path: Path, prologue: bytes, size: int) -> None:
    """A shard has exactly the header and size that its manifest implies: not truncated, exchanged or stray."""
    try:
        if path.exists() and not path.is_file():
            raise MismatchError(f"{path}: is not a regular file", "fetch the file again, or convert again")
        with path.open("rb") as file:
            found, actual = os.fstat(file.fileno()).st_size, file.read(len(prologue))
    except FileNotFoundError:
        raise MismatchError(
            f"{path}: is missing; it should have {size} bytes", "fetch the file again, or convert again"
        ) from None
    except OSError as error:
        raise failed("reading", path, error) from error
    if found != size:
        raise MismatchError(
            f"{path}: has {found} bytes, the manifest says {size}",
            "it is truncated, or from another conversion: fetch it again",
        )
    if actual != prologue:
        raise MismatchError(
            f"{path}: its header is not that of this rank of this manifest{_whose(actual, prologue)}",
            "files were swapped or damaged: fetch the file again, or convert again",
        )


def _whose(actual: bytes, wanted: bytes) -> str:
    pattern = re.compile(rb'"reshard\.rank":"([0-9]+)"')
    one, other = pattern.search(actual), pattern.search(wanted)
    return (
        f": it says rank {one[1].decode()}, wanted is rank {other[1].decode()}"
        if one and other and one[1] != other[1]
        else ""
    )


def check_small_files(root: Path, known: Manifest) -> None:
    """Digests of everything but weights and residues: cheap, and wrong ones would mislead."""
    for file in [*(rank.tensors for rank in known.ranks), *known.carried, *known.source]:
        path = root / file.name
        try:
            size = path.stat().st_size
            same = size == file.size and (file.name.endswith(".residue") or of_file(path) == file.digest)
        except FileNotFoundError:
            raise MismatchError(
                f"{path}: is missing, the manifest lists it", "fetch the file again, or convert again"
            ) from None
        if not same:
            raise MismatchError(
                f"{path}: is not the file that the manifest lists ({size} bytes, {file.size} were written)",
                "it was edited or damaged: restore it, or convert again",
            )


def tables(root: Path, known: Manifest) -> tuple[Family, Format]:
    """The tables that the directory was made by, as far as they are about this family."""

    def texts(kind: str) -> Callable[[str], str]:
        def text(name: str) -> str:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise MismatchError(f"{root / manifest.NAME}: {name!r} is not the name of a table")
            path = root / "source" / kind / f"{name}.toml"
            try:
                return decode.read(path, limits.TABLE, MismatchError, "convert again").decode()
            except UnicodeDecodeError as error:
                raise MismatchError(
                    f"{path}: is named by the manifest and cannot be read: {error}", "convert again"
                ) from None

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
            if original.container in NAMED:
                entries = tally.checked(
                    NAMED[original.container].read(view, original.size, original.name).entries, original.name
                )
            elif original.name.endswith(".index.json"):
                decode.fits(original.size, limits.INDEX, original.name, MismatchError)
                index, index_name = parse_index(view(original.size, 0), original.name), original.name
            found.append(entries)
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
