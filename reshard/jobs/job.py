"""A conversion, planned: what is read and written, and which bytes go where. What can be refused is refused here."""

from dataclasses import dataclass

from ..checkpoints.form import form_of
from ..checkpoints.source import Source
from ..checkpoints.target import Target
from ..containers.dtypes import BITS
from ..engine.items import in_items
from ..errors import ReshardError
from ..layout.join import Plan, plan
from ..layout.mesh import Mesh
from ..tables.formats import Format
from ..threads import count


@dataclass(frozen=True)
class Options:
    """How to convert, apart from what to what."""

    workers: int = 0  # 0: one per CPU that this process may use, at most 8
    overwrite: bool = False
    checksum: bool = False
    sha256: bool = False
    fsync: bool = True
    pad: bool = True
    repeat: bool = True
    engine_version: str | None = None
    check: bool = True  # a re-run: that OUT is whole

    @property
    def threads(self) -> int:
        return count(self.workers)


@dataclass(frozen=True)
class Job:
    """A conversion, planned and checked, not begun."""

    source: Source
    target: Target
    plan: Plan
    engine: str | None

    @property
    def towers(self) -> tuple[str, ...]:
        """Components next to the language model that are not cut among several ranks."""
        rows = self.source.layout.model.family.rows if self.target.layout.mesh.world > 1 else ()
        return tuple(dict.fromkeys(row.tower for row in rows if row.tower))

    @property
    def reads(self) -> int:
        """Bytes of tensors that will be read, each once."""
        model = self.source.layout.model
        return sum(
            tensor.elements * BITS[tensor.dtypes[0]] // 8
            if len(tensor.dtypes) == 1
            else sum(tensor.elements // len(tensor.dtypes) * BITS[dtype] // 8 for dtype in tensor.dtypes)
            for name, tensor in model.tensors.items()
            if name not in self.source.layout.alias
        )


def prepare(source: Source, to: str, mesh: Mesh, options: Options, max_file_size: int | None = None) -> Job:
    """Everything that can be refused is refused here, before anything is written."""
    out = form_of(to, max_file_size).target(source, mesh)
    engine_name = _engine(to, out.layout.format, options.engine_version)
    if not options.pad and out.layout.padding:
        axis, (size, padded) = next(iter(out.layout.padding.items()))
        raise ReshardError(
            f"--no-pad: axis {axis} of {size} would be padded to {padded}",
            "choose a size that divides it, or leave out --no-pad",
        )
    if not options.repeat and out.layout.repeats:
        axis, times = next(iter(out.layout.repeats.items()))
        size = out.layout.model.sizes[axis]
        raise ReshardError(
            f"--no-repeat: each of the {size} of axis {axis} would be stored {times} times",
            f"choose --tp {size} or less, or leave out --no-repeat",
        )
    joined = plan(source.layout, out.layout)
    if any(BITS[dtype] % 8 for tensor in out.layout.model.tensors.values() for dtype in tensor.dtypes):
        for copy in joined.copies():
            in_items(
                copy, source.locate((copy.src.rank, copy.src_name))[1], out.entries[copy.dst.rank, copy.dst_name][1]
            )
    return Job(source, out, joined, engine_name)


def _engine(to: str, table: Format, version: str | None) -> str | None:
    """The engine and version that a format is written for; versions that no table describes are refused by name."""
    known = table.engine
    if not known:
        if version is not None:
            raise ReshardError(
                f'--engine-version {version}: format "{to}" is not for a particular engine', "leave it out"
            )
        return None
    versions = [str(v) for v in known["versions"]]
    wanted, name = version or versions[-1], known["name"]
    if not any(wanted == v or wanted.startswith(f"{v}.") for v in versions):
        raise ReshardError(
            f"--engine-version {wanted}: untested with {name} {wanted}",
            f"supported: {name} {', '.join(versions)}",
        )
    return f"{name} {next(v for v in versions if wanted == v or wanted.startswith(f'{v}.'))}"
