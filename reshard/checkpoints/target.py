"""What a conversion is going to write, behind one interface: shards for a mesh, or Hugging Face files.

Every offset is known before the first byte is written. What differs between the kinds is answered here; nobody else
asks which one it is.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from ..containers.entry import Entry, extent
from ..engine.worker import Key
from ..layout.cut import Layout
from ..store.local import Pool
from ..store.writable import Stretch, Transaction
from .manifest import Listed
from .source_kinds import Extent, Source

F = TypeVar("F")

Literal = tuple[int, bytes]  # offset, bytes
Digests = Mapping[Key, list[bytes]]  # of stored tensors: the digest of each block


class Other(Exception):
    """The destination holds something else than would be written; the text says what."""


@dataclass(frozen=True)
class Finished:
    """Why nothing is to be written.

    `by`: what showed that the source is the same: sha256, commit, sample or content, the weakest of them. `checked`:
    whether the destination was read, too. `times`: mtimes of its files that let the next re-run do without reading all.
    """

    by: str
    checked: bool
    times: dict[Path, int]

    def remember(self) -> None:
        """Set the times: the content is equal, the next re-run need not read it. Skipped where OUT is read-only."""
        for path, mtime in self.times.items():
            with suppress(OSError):
                os.utime(path, ns=(mtime, mtime))


@dataclass(frozen=True)
class Files(Generic[F]):
    """The files of a target where they are: paths, or uploads while they are being written."""

    entries: dict[Key, tuple[str, Entry]]
    files: dict[str, F]

    def locate(self, key: Key) -> tuple[F, Entry]:
        name, entry = self.entries[key]
        return self.files[name], entry


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """The files to be written. `entries`: stored tensor → its file and where it lies in that.

    `constants`: those of them that no source has. What is no tensor: `literals`, bytes of ours in the files of tensors;
    `moved`, stretches that come from the source; `whole`, small files; and what `seal` adds. Files that are copied as
    is are no part of a target.
    """

    layout: Layout
    sizes: dict[str, int]  # of the files of tensors
    entries: dict[Key, tuple[str, Entry]]
    constants: dict[Key, bytes] = field(default_factory=dict)
    literals: dict[str, list[Literal]] = field(default_factory=dict)
    moved: dict[str, list[Extent]] = field(default_factory=dict)
    whole: dict[str, bytes] = field(default_factory=dict)

    @property
    @abstractmethod
    def digested(self) -> bool:
        """Whether `seal` needs the digests of what is written."""

    @property
    @abstractmethod
    def last(self) -> str:
        """The file without which nothing opens the directory: it must appear last."""

    @property
    @abstractmethod
    def reserved(self) -> set[str]:
        """Names at the top, of files or folders, that no file copied as is may take."""

    @abstractmethod
    def kept(self, source: Source) -> int:
        """Bytes of the source's files, other than tensors and files copied as is, that `seal` stores."""

    @abstractmethod
    def seal(
        self,
        to: Transaction,
        source: Source,
        engine: str | None,
        carried: Sequence[Listed],
        digests: Digests,
        reader: Pool,
    ) -> str | None:
        """Write what follows from the rest: digests, residues, tables, the manifest, times.

        The digest over all files, None if none is recorded. `engine`: name and version of that which the format is for.
        `digests`: of all stored tensors, where they are `digested`. Raises as `to` does, and PlaceError where the
        source has changed.
        """

    @abstractmethod
    def recognise(
        self, out: Path, source: Source, engine: str | None, intact: Callable[[], None] | None, checksum: bool
    ) -> Finished:
        """Decide by names, sizes, times and what is no tensor that `out` holds this target, made from this source.

        Weights are left to the caller, by what `Finished.by` says: "content" is to be compared whole, "sample" in part.
        `intact` checks `out` against its own digests, None if that was not asked for; with `checksum` nothing but
        content counts. Raises Other where something else is there, MismatchError where it is damaged.
        """

    @abstractmethod
    def lacks_sha256(self, out: Path) -> set[str]:
        """Files of the source, published or copied as is, whose SHA-256 `out` has room for and does not record."""

    @property
    def names(self) -> set[str]:
        """All files but those that `seal` adds."""
        return {*self.sizes, *self.whole}

    @property
    def bytes(self) -> int:
        """Size in bytes of these files."""
        return sum(self.sizes.values()) + sum(map(len, self.whole.values()))

    def below(self, root: Path) -> Files[Path]:
        return Files(self.entries, {name: root / name for name in self.sizes})

    def stretches(self, name: str) -> Iterator[Stretch]:
        """Of one file of tensors: all that is written to it. Tensors of a `.bin` file may share a storage."""
        yield from ((offset, len(data)) for offset, data in self.literals.get(name, ()))
        yield from ((offset, length) for offset, length, _, _ in self.moved.get(name, ()))
        yield from self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, list[Stretch]]:
        found: dict[str, list[Stretch]] = {name: [] for name in self.sizes}
        for name, entry in self.entries.values():
            found[name].append((entry.offset, extent(entry)))
        return found
