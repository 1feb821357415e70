"""What `--to` names: a format of shards, or Hugging Face files. With a source and a mesh it gives the target."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..errors import ReshardError
from ..layout.cut import lay_out
from ..layout.mesh import Mesh
from ..tables import formats
from ..tables.formats import Format
from .source_kinds import Source
from .target import Target
from .target_files import restored, split_anew
from .target_shards import ShardTarget


@dataclass(frozen=True)
class Form(ABC):
    """`max_file_size`: of Hugging Face files, in bytes; None restores the published ones."""

    max_file_size: int | None

    @abstractmethod
    def target(self, source: Source, mesh: Mesh) -> Target:
        """Raises ReshardError where the mesh does not fit the model or the form, or there is no such format."""

    @abstractmethod
    def smallest_mesh(
        self, source: Source, memory: int | None, context: int | None, batch: int, ep: int, pp: int | None
    ) -> Mesh:
        """The smallest mesh whose ranks each fit a device of so many bytes; see `capacity.smallest`.

        Raises ReshardError where there is none, or where the form has no meshes.
        """

    @abstractmethod
    def explained(self, error: ReshardError, source: Source, mesh: Mesh) -> ReshardError:
        """A refusal of `target`, its hint naming the meshes that would work."""


@dataclass(frozen=True)
class HuggingFace(Form):
    """`--to hf`"""

    def target(self, source: Source, mesh: Mesh) -> Target:
        if mesh != Mesh():
            raise ReshardError(
                f"--to hf writes one checkpoint for all ranks, not for {mesh}",
                "leave out --tp, --pp, --ep and --split",
            )
        return restored(source) if self.max_file_size is None else split_anew(source, self.max_file_size)

    def smallest_mesh(
        self, source: Source, memory: int | None, context: int | None, batch: int, ep: int, pp: int | None
    ) -> Mesh:
        raise ReshardError("--to hf writes one checkpoint for all ranks: there is no mesh to choose", "leave out --tp")

    def explained(self, error: ReshardError, source: Source, mesh: Mesh) -> ReshardError:
        return error


@dataclass(frozen=True)
class Sharded(Form):
    """`--to FORMAT`"""

    name: str

    def target(self, source: Source, mesh: Mesh) -> Target:
        if self.max_file_size is not None:
            raise ReshardError(
                "--max-file-size only goes with --to hf",
                "a rank's file is mapped whole; its size follows from the mesh",
            )
        table, model = self._table(source), source.layout.model
        return ShardTarget.of(lay_out(table, model, mesh, tied=_stored_twice(source, table, mesh)))

    def smallest_mesh(
        self, source: Source, memory: int | None, context: int | None, batch: int, ep: int, pp: int | None
    ) -> Mesh:
        from ..layout.capacity import smallest
        from ..text.units import binary

        if memory is None:
            raise ReshardError(
                "--tp auto needs to know the memory of a device", "add --device-memory 24GiB (and --context, --batch)"
            )
        table = self._table(source)
        mesh = smallest(source.layout.model, source.config, table, memory, context, batch, ep=ep, pp=pp)
        if mesh is None:
            raise ReshardError(
                f"no mesh of this model fits {binary(memory)} per device", "use devices with more memory"
            )
        return mesh

    def explained(self, error: ReshardError, source: Source, mesh: Mesh) -> ReshardError:
        from ..layout.capacity import explain_refusal

        return explain_refusal(error, self._table(source), source.layout.model, mesh)

    def _table(self, source: Source) -> Format:
        return formats.load(self.name).for_family(source.layout.model.family.plain)


def form_of(to: str, max_file_size: int | None = None) -> Form:
    """The form that `--to` names: "hf", or a format. That there is such a format is checked where it is needed."""
    return HuggingFace(max_file_size) if to == "hf" else Sharded(max_file_size, to)


def _stored_twice(source: Source, table: Format, mesh: Mesh) -> dict[str, str]:
    """Tensors that the source has twice (Qwen3-0.6B does) and an engine wants once: config.json says they are tied."""
    model = source.layout.model
    says = source.config.with_defaults(model.family.defaults).says
    pairs = model.family.tied
    if not table.engine or not table.tied or mesh.pp > 1 or not says("tie_word_embeddings"):
        return {}
    twice = model.tensors.keys() - {*model.alias, *model.alias.values()}
    return {name: other for name, other in pairs.items() if {name, other} <= twice}
