"""Writing Hugging Face files: the published ones restored byte for byte, or split anew as transformers would."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ..store.local import Pool
from ..store.publish import NOBODYS
from ..store.store import AnyFile
from ..store.writable import Transaction
from .manifest import Listed
from .source_kinds import Source
from .target import Digests, Finished, Other, Target


@dataclass(frozen=True, kw_only=True)
class FilesTarget(Target):
    """Hugging Face files, for all ranks at once; nothing in them records digests. `mtimes` in ns."""

    mtimes: dict[str, int] = field(default_factory=dict)

    @property
    def digested(self) -> bool:
        return False

    @property
    def last(self) -> str:
        return "config.json"

    @property
    def reserved(self) -> set[str]:
        return self.names

    def kept(self, source: Source) -> int:
        return 0

    def seal(
        self,
        to: Transaction,
        source: Source,
        engine: str | None,
        carried: Sequence[Listed],
        digests: Digests,
        reader: Pool,
    ) -> str | None:
        for name, mtime in self.mtimes.items():
            to.date(name, mtime)
        return None

    def lacks_sha256(self, out: Path) -> set[str]:
        return set()

    def recognise(
        self, out: Path, source: Source, engine: str | None, intact: Callable[[], None] | None, checksum: bool
    ) -> Finished:
        """There are no digests to check `out` by: where that was asked for, all of its content is to be compared."""
        wanted = self.sizes | {name: len(data) for name, data in self.whole.items()}
        wanted |= {file.name: file.size for file in source.carried}
        stale = {}
        for name, size in wanted.items():
            path = out / name
            if not path.is_file():
                raise Other(f"it lacks {name}")
            status = path.stat()
            if status.st_size != size:
                raise Other(f"its {name} has {status.st_size} bytes, this job would write {size}")
            if status.st_mtime_ns != (mtime := self.mtimes.get(name, status.st_mtime_ns)):
                stale[path] = mtime
        extra = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - wanted.keys()
        extra = {name for name in extra if name.split("/")[0] not in NOBODYS}
        if extra:
            raise Other(f"it also holds {min(extra)}")
        self._same_bytes(out, source)
        all_of_it = intact is not None or checksum or bool(stale)
        return Finished("content" if all_of_it else "sample", all_of_it, stale)

    def _same_bytes(self, out: Path, source: Source) -> None:
        """Whatever is no tensor is what this job would write."""
        with closing(Pool(stamps=source.stamps)) as pool:

            def check(name: str, offset: int, place: AnyFile | bytes, at: int, length: int, what: str) -> None:
                mine, theirs = pool.chunks(place, at, length), pool.chunks(out / name, offset, length)
                if any(one != other for one, other in zip(mine, theirs, strict=True)):
                    raise Other(f"{what} {name} differs from the source")

            for name, literals in self.literals.items():
                for offset, data in literals:
                    check(name, offset, data, 0, len(data), "the header of its")
            for name, data in self.whole.items():
                check(name, 0, data, 0, len(data), "its")
            for name, extents in self.moved.items():
                for offset, length, place, at in extents:
                    check(name, offset, place, at, length, "the header or a buffer of its")
            for file in source.carried:
                check(file.name, 0, file.path, 0, file.size, "its")


def restored(source: Source) -> FilesTarget:
    """The published files, byte for byte: their tensors from the plan, everything else from the residue."""
    names = [original.name for original in source.originals]
    layout = source.published()
    aside = set(layout.model.aside)
    return FilesTarget(
        layout=layout,
        sizes={original.name: original.size for original in source.originals},
        entries={(0, name): (names[at], entry) for name, (at, entry) in source.tensors.items() if name not in aside},
        moved={original.name: list(source.residue(original)) for original in source.originals},
        mtimes={original.name: original.mtime_ns for original in source.originals},
    )


def split_anew(source: Source, max_file_size: int) -> FilesTarget:
    """Files as transformers would write them with this limit, in bytes: without buffers that an engine recomputes."""
    from . import hf_split

    layout = source.published()
    aside = set(layout.model.aside)
    stored = {name: entry for name, (_, entry) in source.tensors.items() if name not in aside}
    order = hf_split.loaded_order(stored)
    files, index = hf_split.resplit([(name, stored[name].dtype, stored[name].shape) for name in order], max_file_size)
    whole = {"model.safetensors.index.json": index} if index is not None else {}
    newest = max((original.mtime_ns for original in source.originals), default=0)
    return FilesTarget(
        layout=layout,
        sizes={file.name: len(file.header) + sum(entry.nbytes for _, entry in file.tensors) for file in files},
        entries={(0, name): (file.name, entry) for file in files for name, entry in file.tensors},
        literals={file.name: [(0, file.header)] for file in files},
        whole=whole,
        mtimes=dict.fromkeys([*(file.name for file in files), *whole], newest),
    )
