"""An output: the files that a conversion is going to write, every offset known before the first byte is.

Three kinds: a shard directory, the original files restored, and Hugging Face files split anew. Nothing is written here.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..containers.safetensors import Entry
from ..engine.worker import Key
from ..errors import ReshardError
from ..layout.cut import Layout, lay_out
from ..layout.mesh import Mesh
from ..tables import formats
from ..tables.formats import Format
from .shards import Shard, Shards
from .source import Source

Literal = tuple[int, bytes]  # offset, bytes
Moved = tuple[int, int, Path | bytes, int]  # offset, length, file they come from (or the bytes themselves), offset there


@dataclass
class Output:
    """Where each stored tensor will be, below `root`; what else each file holds (`literals`, `moved`)."""

    layout: Layout
    sizes: dict[str, int]
    entries: dict[Key, tuple[str, Entry]]
    literals: dict[str, list[Literal]] = field(default_factory=dict)
    moved: dict[str, list[Moved]] = field(default_factory=dict)
    mtimes: dict[str, int] = field(default_factory=dict)  # of Hugging Face files: those restored keep their time
    whole: dict[str, bytes] = field(default_factory=dict)  # small files written as they are
    shards: tuple[Shard, ...] = ()
    plan: str = ""
    root: Path = Path()
    paths: dict[str, Path] = field(default_factory=dict)  # of the files of tensors, once there is a place for them

    def below(self, root: Path) -> None:
        """Say where the files are going to be."""
        self.root = root
        self.paths = {name: root / name for name in self.sizes}

    def locate(self, key: Key) -> tuple[Path, Entry]:
        name, entry = self.entries[key]
        return self.paths[name], entry

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values()) + sum(map(len, self.whole.values()))


def sharded(layout: Layout) -> Output:
    """A shard directory."""
    shards = Shards(layout)
    files = tuple(shards)
    return Output(
        layout,
        {shard.file: shard.size for shard in files},
        {(shard.rank, name): (shard.file, entry) for shard in files for name, entry in shard.header.entries.items()},
        {shard.file: [(0, shard.prologue)] for shard in files},
        shards=files,
        plan=shards.digest,
    )


def restored(source: Source) -> Output:
    """The original files, byte for byte: their tensors from the plan, everything else from the residue."""
    names = [original.name for original in source.originals]
    aside = set(source.layout.model.aside)
    return Output(
        source.published(),
        {original.name: original.size for original in source.originals},
        {(0, name): (names[at], entry) for name, (at, entry) in source.tensors.items() if name not in aside},
        moved={original.name: list(source.residue(original)) for original in source.originals},
        mtimes={original.name: original.mtime_ns for original in source.originals},
    )


def split_anew(source: Source, max_file_size: int) -> Output:
    """Hugging Face files as transformers would write them with this limit; buffers kept aside are not written, as it would not."""
    layout = source.published()
    aside = set(layout.model.aside)
    stored = {name: entry for name, (_, entry) in source.tensors.items() if name not in aside}
    from . import hf_split

    order = hf_split.loaded_order(stored)
    files, index = hf_split.resplit([(name, stored[name].dtype, stored[name].shape) for name in order], max_file_size)
    whole = {"model.safetensors.index.json": index} if index is not None else {}
    newest = max((original.mtime_ns for original in source.originals), default=0)
    return Output(
        layout,
        {file.name: len(file.header) + sum(entry.nbytes for _, entry in file.tensors) for file in files},
        {(0, name): (file.name, entry) for file in files for name, entry in file.tensors},
        {file.name: [(0, file.header)] for file in files},
        mtimes=dict.fromkeys([*(file.name for file in files), *whole], newest),
        whole=whole,
    )


def outputs(source: Source, to: str, mesh: Mesh, max_file_size: int | None) -> Output:
    """The output that a request names: `to` is "hf", or a format."""

    if to == "hf":
        if mesh != Mesh():
            raise ReshardError(
                f"--to hf writes one checkpoint for all ranks, {mesh} was asked for", "leave out --tp, --pp, --ep and --split"
            )
        return restored(source) if max_file_size is None else split_anew(source, max_file_size)
    if max_file_size is not None:
        raise ReshardError("--max-file-size only goes with --to hf", "a rank's file is mapped whole; its size follows from the mesh")
    table = formats.load(to).for_family(source.layout.model.family.name)
    return sharded(lay_out(table, source.layout.model, mesh, tied=_stored_twice(source, table, mesh)))


def _stored_twice(source: Source, table: Format, mesh: Mesh) -> dict[str, str]:
    """Tensors that an engine, told by config.json that they are tied, wants once where the original has both (Qwen3-0.6B does)."""
    model = source.layout.model
    says = source.config.with_defaults(model.family.defaults).says
    pairs = model.family.tied
    if not table.engine or not table.tied or mesh.pp > 1 or not says("tie_word_embeddings"):
        return {}
    twice = model.tensors.keys() - {*model.alias, *model.alias.values()}
    return {name: other for name, other in pairs.items() if {name, other} <= twice}
