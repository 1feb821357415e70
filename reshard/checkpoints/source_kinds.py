"""What tensors are read from, behind one interface: a published checkpoint, a shard directory, an engine's shards.

A source knows where every stored tensor is and what the published files are or were. It has read headers, no tensor.
What differs between the three kinds is answered here; nobody else asks which one it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..containers.entry import Entry, extent
from ..engine.worker import Key
from ..errors import MismatchError
from ..layout.cut import Layout, lay_out
from ..layout.mesh import Mesh
from ..model.understand import Config
from ..store.directory import Directory
from ..store.local import Stamp
from ..store.store import AnyFile
from ..tables.families import Family
from . import manifest
from .companions import Carried, Left
from .manifest import Manifest
from .published import Origin, Original, Published, understood

# offset in the published file, length, where those bytes are now, offset there
Extent = tuple[int, int, AnyFile | bytes, int]


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where tensors are read from. `originals` and `tensors` describe the published files, whatever is being read.

    `root`: the local directory; None in a store. `stamps`: what every file that is read was
    like when it was first opened. `directory`: `root` as it was then.
    """

    where: str
    root: Path | None
    config: Config
    layout: Layout
    places: Mapping[Key, tuple[AnyFile, Entry]]
    originals: tuple[Original, ...]
    tensors: dict[str, tuple[int, Entry]]  # of the published files: name → (index into `originals`, entry)
    carried: tuple[Carried, ...] = ()
    left: tuple[Left, ...] = ()
    origin: Origin = field(default_factory=Origin)
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)  # SHA-256 of files copied as is, as far as known
    directory: Directory | None = field(default=None, compare=False)

    # What differs between the kinds

    @abstractmethod
    def published(self) -> Layout:
        """The layout of the published files; the source's own where it consists of those."""

    @abstractmethod
    def address(self, key: Key) -> str:
        """The name of a stored tensor as `reshard explain` takes it."""

    @abstractmethod
    def _kept(self, original: Original, offset: int, at: int) -> tuple[AnyFile | bytes, int]:
        """Where a stretch of residue is now: at `offset` of the published file, at byte `at` of all its residue."""

    @property
    @abstractmethod
    def weights_size(self) -> int:
        """Bytes of all files that hold stored tensors, headers included."""

    @property
    def published_paths(self) -> Mapping[str, Path]:
        """The published weights files and their index, as far as they are on this machine: name → path."""
        return {}

    @property
    def root_digest(self) -> str | None:
        """The digest over all files, where a manifest has one."""
        return None

    @property
    def keeps_residues(self) -> bool:
        """Whether what is no tensor in the published files is kept, so that they can be restored."""
        return False

    @property
    def zero_padding(self) -> bool:
        """Whether padding is zero and constants are the table's; an engine saves what was in its memory."""
        return False

    @property
    def originals_known(self) -> bool:
        """Whether `originals` are known; otherwise they are what transformers would write."""
        return True

    # What is the same

    def locate(self, key: Key) -> tuple[AnyFile, Entry]:
        return self.places[key]

    def relative(self, file: AnyFile) -> str:
        """A file as it is shown: relative to `root`, where it is below that."""
        if self.root is not None and isinstance(file, Path) and file.is_relative_to(self.root):
            return str(file.relative_to(self.root))
        return str(file)

    def local(self, place: AnyFile | bytes) -> Path | None:
        """The file to read some bytes from; None where they are in no file of this machine."""
        return place if isinstance(place, Path) else None

    @property
    def bytes(self) -> int:
        """Size in bytes of all stored tensors that the layout knows."""
        return sum(entry.nbytes for _, entry in self.places.values())

    def sha256(self) -> dict[str, str]:
        """The SHA-256 of published files and of files copied as is, as far as known."""
        return {original.name: original.sha256 for original in self.originals if original.sha256} | self.sums

    def residue(self, original: Original) -> Iterator[Extent]:
        """The bytes of a published file that no row claims, wherever they are now."""
        at = 0
        for low, high in original.residue():
            yield low, high - low, *self._kept(original, low, at)
            at += high - low

    def buffer(self, name: str) -> tuple[Entry, Extent]:
        """A buffer that no rank gets, and where its bytes are now; MismatchError where the residue does not hold it."""
        at, entry = self.tensors[name]
        length = extent(entry)
        for low, size, place, start in self.residue(self.originals[at]):
            if low <= entry.offset and entry.offset + length <= low + size:
                return entry, (entry.offset, length, place, start + entry.offset - low)
        raise MismatchError(f"{self.where}: {name} is not in the residue of {self.originals[at].name}", "convert again")


@dataclass(frozen=True, kw_only=True)
class PublishedSource(Source):
    """A published checkpoint: its files are what is read."""

    files: dict[str, AnyFile]

    def published(self) -> Layout:
        return self.layout

    def address(self, key: Key) -> str:
        return key[1]

    def _kept(self, original: Original, offset: int, at: int) -> tuple[AnyFile | bytes, int]:
        return self.files[original.name], offset

    @property
    def weights_size(self) -> int:
        return sum(original.size for original in self.originals if not original.plain)

    @property
    def published_paths(self) -> Mapping[str, Path]:
        return {name: file for name, file in self.files.items() if isinstance(file, Path)}


@dataclass(frozen=True, kw_only=True)
class ShardSource(Source):
    """A shard directory of ours: `source/` has what is needed to restore the published files. `root` is a directory."""

    manifest: Manifest

    def published(self) -> Layout:
        return _published(self.layout)

    def address(self, key: Key) -> str:
        return f"{key[0]}:{key[1]}"

    def _kept(self, original: Original, offset: int, at: int) -> tuple[AnyFile | bytes, int]:
        return manifest.residue_path(self.root or Path(), original.name), at

    @property
    def weights_size(self) -> int:
        return sum(rank.weights.size for rank in self.manifest.ranks)

    @property
    def root_digest(self) -> str | None:
        return self.manifest.root

    @property
    def keeps_residues(self) -> bool:
        return True

    @property
    def zero_padding(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class EngineSource(Source):
    """Shards that an engine wrote. Nothing says what the published files were: they are assumed to be as transformers
    writes them.

    `residues`: name → the bytes of such a file that are no tensors.
    """

    places: Mapping[Key, tuple[Path, Entry]]
    residues: dict[str, bytes]

    def published(self) -> Layout:
        return _published(self.layout)

    def address(self, key: Key) -> str:
        return f"{key[0]}:{key[1]}"

    def _kept(self, original: Original, offset: int, at: int) -> tuple[AnyFile | bytes, int]:
        return self.residues[original.name], at

    @property
    def weights_size(self) -> int:
        return sum(self.stamps[path].size for path in {path for path, _ in self.places.values()})

    @property
    def originals_known(self) -> bool:
        return False


def _published(layout: Layout) -> Layout:
    model = layout.model
    return lay_out(model.family.published, model, Mesh(), model.active)


def from_published(found: Published, family: Family | None = None) -> PublishedSource:
    """A published checkpoint, understood; by the table `family`, or that which config.json names.

    Raises ReshardError where no table fits, naming what was found.
    """
    model, originals = understood(found, family)
    paths = [found.path(original) for original in originals]
    aside = set(model.aside)
    return PublishedSource(
        where=found.where,
        root=found.root,
        config=found.config,
        layout=lay_out(model.family.published, model, Mesh(), model.active),
        places={(0, name): (paths[at], entry) for name, (at, entry) in found.tensors.items() if name not in aside},
        originals=originals,
        tensors=found.tensors,
        carried=found.carried,
        left=found.left,
        origin=found.origin,
        stamps=found.stamps,
        files={original.name: path for original, path in zip(originals, paths, strict=True)},
    )
