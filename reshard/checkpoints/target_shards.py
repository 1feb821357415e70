"""Writing a shard directory: next to the weights what describes them and what restores the published files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..engine.worker import Key
from ..errors import MismatchError
from ..layout.cut import Layout
from ..store.digest import of_blocks, of_pieces
from ..store.local import Pool
from ..store.writable import Transaction
from ..tables.families import Family
from ..tables.row import Constant
from . import manifest
from .manifest import Listed, Manifest, RankFiles
from .published import Original
from .shard_directory import check_small_files, tables
from .shards import FORMAT_VERSION, Shard, Shards, described, dump, scalar, shard_digest
from .source_kinds import Source
from .target import Digests, Finished, Other, Target


@dataclass(frozen=True, kw_only=True)
class ShardTarget(Target):
    """Shards for a mesh. `plan`: the digest of rows in use, sizes, dtypes and mesh."""

    shards: tuple[Shard, ...]
    plan: str

    @classmethod
    def of(cls, layout: Layout) -> "ShardTarget":
        shards = Shards(layout)
        files = tuple(shards)
        entries = {
            (shard.rank, name): (shard.file, entry) for shard in files for name, entry in shard.header.entries.items()
        }
        constants: dict[Key, bytes] = {}
        for slot in layout.constants:
            assert isinstance(slot.template, Constant)
            constants |= {(slot.rank, slot.name(point)): scalar(slot.template) for point in slot.points()}
        return cls(
            layout=layout,
            sizes={shard.file: shard.size for shard in files},
            entries=entries,
            constants=constants,
            literals={shard.file: [(0, shard.prologue)] for shard in files},
            shards=files,
            plan=shards.digest,
        )

    @property
    def digested(self) -> bool:
        return True

    @property
    def last(self) -> str:
        return manifest.NAME

    @property
    def reserved(self) -> set[str]:
        return {manifest.NAME, "source", *(shard.folder for shard in self.shards), *self.names}

    def kept(self, source: Source) -> int:
        return sum(high - low for original in source.originals for low, high in original.residue())

    def seal(
        self,
        to: Transaction,
        source: Source,
        engine: str | None,
        carried: Sequence[Listed],
        digests: Digests,
        reader: Pool,
    ) -> str | None:
        ranks = []
        for shard in self.shards:
            mine = {name: digests[shard.rank, name] for name, _, _ in shard.tensors}
            text = dump(described(shard, self.layout, mine))
            of_tensors = (of_blocks(mine[name]) for name, _, _ in shard.tensors)
            weights = Listed(shard.file, shard.size, shard_digest(shard.prologue, of_tensors))
            ranks.append(RankFiles(shard.rank, weights, _put(to, f"{shard.folder}/tensors.json", text)))
        made = manifest.made(
            self.layout,
            engine=engine,
            origin=source.origin,
            plan=self.plan,
            ranks=ranks,
            carried=carried,
            source=self._keep_source(to, source, reader),
        )
        to.put(manifest.NAME, manifest.dump(made))
        return made.root

    def _keep_source(self, to: Transaction, source: Source, reader: Pool) -> list[Listed]:
        """The folder `source`: residues, which get the times of the files that they are from, tables, files.json."""
        kept = []
        for original in source.originals:
            name = str(manifest.residue_path(Path(), original.name))
            size = sum(high - low for low, high in original.residue())
            digest = to.write(name, size, _residue(source, original, reader), original.mtime_ns)
            kept.append(Listed(name, size, digest))
        texts = table_texts(self.layout) | original_texts(source)
        kept += [_put(to, name, content) for name, content in texts.items()]
        if source.left:
            to.put(manifest.LEFT, manifest.dump_left(source.left))
        return kept

    def lacks_sha256(self, out: Path) -> set[str]:
        known = manifest.load(out)
        lacking = {original.name for original in manifest.load_originals(out) if not original.sha256}
        return lacking if manifest.load_sums(out, known) else lacking | {file.name for file in known.carried}

    # A re-run

    def recognise(
        self, out: Path, source: Source, engine: str | None, intact: Callable[[], None] | None, checksum: bool
    ) -> Finished:
        if not manifest.present(out):
            manifest.check_lost(out)
            raise Other("it holds no shards")
        try:
            known = manifest.load(out)
        except MismatchError as error:
            manifest.check_lost(out)
            raise Other(error.message) from None
        if manifest.root_of(out, known) != known.root:
            raise MismatchError(f"{manifest.NAME}: its root digest is not that of what it says")
        if known.version != FORMAT_VERSION:
            raise Other(f"it is of format version {known.version}, and {FORMAT_VERSION} would be written")
        if known.plan != self.plan or known.engine != engine:
            raise Other(f"it holds another conversion ({known.family}, {known.format}, {known.mesh})")
        check_small_files(out, known)
        _same_facts(self.layout.model.family, tables(out, known)[0])
        for weights in (rank.weights for rank in known.ranks):
            if not (path := out / weights.name).is_file() or path.stat().st_size != weights.size:
                raise MismatchError(f"{weights.name} is missing or has another size than its manifest says")
        earlier = {original.name: original for original in manifest.load_originals(out)}
        stale = _same_files(source, out, known, earlier)
        if intact is not None:
            intact()
        _same_digests(source, known)
        by = "content" if checksum else _evidence(source, out, known, earlier, stale)
        return Finished(by, intact is not None, stale)


def _put(to: Transaction, name: str, text: bytes) -> Listed:
    return Listed(name, len(text), to.put(name, text))


def table_texts(layout: Layout) -> dict[str, bytes]:
    """The tables of the folder `source`, by name."""
    texts = {f"source/families/{name}.toml": text for name, text in layout.model.family.texts.items()}
    texts |= {f"source/formats/{name}.toml": text for name, text in layout.format.texts.items()}
    return {name: text.encode() for name, text in texts.items()}


def original_texts(source: Source) -> dict[str, bytes]:
    """What the folder `source` says of the files that were there, by name."""
    data = {manifest.FILES: manifest.dump_originals(source.originals)}
    if source.sums:
        data[manifest.SUMS] = manifest.dump_sums(source.sums)
    return data


def _residue(source: Source, original: Original, reader: Pool) -> Iterator[bytearray]:
    for _, length, place, at in source.residue(original):
        yield from reader.chunks(place, at, length)


def _same_facts(family: Family, earlier: Family) -> None:
    """The table that the destination keeps says the same beside its rows, of which the plan is."""
    for section, mine in family.said.items():
        there = earlier.said[section]
        if odd := min((key for key in mine.keys() | there if mine.get(key) != there.get(key)), default=None):
            raise Other(
                f"its table of {family.name} says {section}.{odd} = {there.get(odd)!r}, "
                f"that of this conversion {mine.get(odd)!r}"
            )


def _same_files(source: Source, out: Path, known: Manifest, earlier: dict[str, Original]) -> dict[Path, int]:
    """The source has the files that the destination was made from, by names, sizes and what is known of them.

    Those whose mtimes are others: the residue that has it in the destination → what it should be.
    """
    stale, gone = {}, dict(earlier)
    if source.origin.commit and known.origin.commit and source.origin.commit != known.origin.commit:
        raise Other(f"it was made from commit {known.origin.commit}, the source is {source.origin.commit}")
    for original in source.originals:
        other = gone.pop(original.name, None)
        if other is None:
            raise Other(f"{original.name} was not among its source files")
        if other.size != original.size:
            raise Other(f"{original.name} has {original.size} bytes, it was made from {other.size}")
        if other.holes != original.holes:
            raise Other(f"{original.name} has its tensors at other places than the file that it was made from")
        if other.sha256 and original.sha256 and other.sha256 != original.sha256:
            raise Other(f"{original.name} has SHA-256 {original.sha256}, it was made from {other.sha256}")
        if other.mtime_ns != original.mtime_ns:
            stale[manifest.residue_path(out, original.name)] = original.mtime_ns
    if gone:
        raise Other(f"{next(iter(gone))} was among its source files and is gone")
    mine, there = ({file.name: file.size for file in files} for files in (source.carried, known.carried))
    for name in sorted(mine.keys() ^ there.keys()):
        raise Other(
            f"{name} was not there when it was made" if name in mine else f"{name}, which it was made with, is gone"
        )
    for name in sorted(mine):
        if mine[name] != there[name]:
            raise Other(f"{name} has {mine[name]} bytes, it was made with {there[name]}")
    return stale


def _same_digests(source: Source, known: Manifest) -> None:
    """Whatever of the source is no tensor has the digests that the destination has of it."""
    digests = {file.name: file.digest for file in (*known.carried, *known.source)}
    with closing(Pool(stamps=source.stamps)) as pool:
        for file in source.carried:
            if of_pieces(pool.chunks(file.path, 0, file.size)) != digests[file.name]:
                raise Other(f"{file.name} is not the file that it was made with: it has other contents")
        for original in source.originals:
            if (
                of_pieces(_residue(source, original, pool))
                != digests[str(manifest.residue_path(Path(), original.name))]
            ):
                raise Other(
                    f"{original.name} is not the file that it was made from: its header or its buffers are others"
                )


def _evidence(source: Source, out: Path, known: Manifest, earlier: dict[str, Original], stale: dict[Path, int]) -> str:
    """What shows, without reading all of them, that the weights are the same: the weakest over all files."""
    commit = source.origin.commit is not None and source.origin.commit == known.origin.commit
    found = set()
    for original in source.originals:
        if original.plain:
            continue  # all of it is residue
        if original.sha256 and earlier[original.name].sha256 == original.sha256:
            found.add("sha256")
        elif source.root is None or manifest.residue_path(out, original.name) in stale:  # of a store, no time is known
            found.add("content")
        else:
            found.add("commit" if commit else "sample")
    return next(by for by in ("content", "sample", "commit", "sha256") if by in found)
