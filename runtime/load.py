"""Load a model: this rank's part of it, from a directory of any layout.

    load_shard(out, rank)     {stored name: tensor}, views of the mapped file: no copies, pages are read when touched
    load_model(out)           this rank's part of the model; a directory for another number of ranks, or in another
                              format, is resharded on load, each rank reading only the bytes that it needs

Knows nothing about what a model computes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from reshard.checkpoints import manifest
from reshard.checkpoints.manifest import Manifest
from reshard.errors import ReshardError, failed
from reshard.store.directory import Directory, reading, unchanged
from reshard.store.location import local
from reshard.store.workfolder import check_whole

from .cast import Cast
from .mapped import State, check_verify, load_shard
from .resharded import Reader

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source
    from reshard.layout.cut import Layout
    from reshard.layout.mesh import Mesh
    from reshard.tables.config import Config
    from reshard.tables.families import Family

    from .comm.collectives import World
    from .model.decoder import Decoder

__all__ = ["Opened", "load_model", "load_shard", "open_for", "with_facts"]

NATIVE = "native"  # the format whose names and fusions the decoder uses


def load_model(
    out: "str | os.PathLike[str] | Source",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    mesh: "Mesh | None" = None,
    world: "World | None" = None,
    verify: str | None = None,
    reshard_on_load: bool = True,
    timeout: float = 60.0,
) -> "Decoder":
    """This rank's part of the model in a shard directory, a published checkpoint, or an open source; all ranks call it.

    The job is `world`, or torch.distributed's initialised process group, or this process alone; collectives time out
    after `timeout` seconds. `mesh` is how the job splits the model: by default as the directory, if that is for as many
    ranks, else tensor parallel. A native directory for that mesh is mapped; from any other each rank reads what it
    needs (with `reshard_on_load=False` it is refused). `dtype` casts floating-point weights, one tensor at a time, by
    default to the dtype of most of them. Block-scaled FP8 and its scales are not cast; what is WIDE is not narrowed.
    Raises ReshardError, and Lost if another rank fails or has another checkpoint.
    """
    check_verify(verify)
    world = world or _world(timeout)
    world.phase = "load"
    with world.failing():
        opened = open_for(out, mesh, world, reshard_on_load)
        world.agree(opened.facts | {"dtype": str(dtype)})
        with unchanged(opened.directory):  # no rank continues unless all have mapped what they agreed on
            decoder = opened.decoder(world)
            state = opened.state(world.rank, dtype, device, verify, world.check)
            decoder.load_state_dict(state, strict=True, assign=True)
        world.meet("all ranks are loaded")
    return decoder.eval()


def with_facts(family: "Family") -> "Family":
    """A family table with `[model]`: the shipped one, if a directory was converted with one that had none."""
    from reshard.tables import families

    return family if family.model or family.name not in families.shipped() else families.load(family.name)


def _world(timeout: float) -> "World":
    """torch.distributed's process group, or a job of one rank."""
    from torch import distributed

    from .comm.processes import Processes
    from .comm.threads import alone

    if distributed.is_available() and distributed.is_initialized():
        return Processes(timeout=timeout)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ReshardError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but no process group is initialised",
            'call torch.distributed.init_process_group("gloo") first, or run `python -m reshard.runtime`',
        )
    return alone()


def open_out(path: str | os.PathLike[str]) -> "Source":
    """Any directory that reshard reads."""
    from reshard.checkpoints.source import open_source

    return open_source(local(path, "a model to load"))


class Opened:
    """A directory opened for one job: the model's layout on its ranks, and access to the tensors of one.

    `facts` must be equal on all ranks.
    """

    def __init__(
        self,
        directory: Directory | None,
        root: Path,
        config: "Config",
        layout: "Layout",
        known: Manifest | None,
        source: "Source | None",
    ) -> None:
        from reshard.checkpoints.shards import Shards
        from reshard.store.digest import of

        self.directory = directory
        self.root, self.config, self.layout, self.known, self.source = root, config, layout, known, source
        self.read = 0  # bytes of tensors read from a source; mapped files do not count
        self.facts = {
            "manifest": known.root if known else "none",
            "config.json": of(json.dumps(config.data, sort_keys=True).encode()),
            "mesh": str(layout.mesh),
            # Of the tables, `plan` has the rows alone.
            "table": of(json.dumps(with_facts(layout.model.family).said, sort_keys=True).encode()),
            # Of a mapped directory a rank may know only the layers of its own stage.
            "plan": "the manifest's" if source is None else Shards(layout).digest,
        }

    def decoder(self, world: "World") -> "Decoder":
        """This rank's part of the model, without its weights."""
        from .model.decoder import Decoder
        from .model.spec import Spec

        model = self.layout.model
        return Decoder(Spec.of(with_facts(model.family), self.config, model), model, self.layout, world.rank, world)

    def state(
        self,
        rank: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        verify: str | None = None,
        check: Callable[[], None] = lambda: None,
        only: Callable[[str], bool] | None = None,
    ) -> State:
        """The rank's tensors of the language model, or those that `only` selects: mapped, or read.

        `check` is called now and then, from any thread, and may raise.
        """
        from .model.local_shapes import language

        cast, own = (
            Cast(self.layout, rank, dtype, device),
            {slot.name(at) for slot in language(self.layout, rank) for at in slot.points()},
        )
        wanted = own.__contains__ if only is None else lambda name: name in own and only(name)
        if self.source is None:
            state = load_shard(self.root, rank, verify, self.known.root if self.known else None)
            for name in list(state):
                check()
                tensor = state.pop(name)
                if wanted(name):
                    state[name] = cast(name, tensor)
            return state
        if verify is not None and self.known is not None:
            for other in range(len(self.known.ranks)):
                load_shard(self.root, other, verify, self.known.root)
        reader = Reader(self.source, self.layout, rank, cast, check, wanted)
        state = reader.run(_threads())
        self.read = reader.read
        return state


def open_for(
    out: "str | os.PathLike[str] | Source", mesh: "Mesh | None", world: "World", reshard_on_load: bool = True
) -> Opened:
    """Open a directory for a job: it is mapped if it is native and for the job's mesh, else read through a plan.

    A source that is already open is always read.
    """
    from reshard.checkpoints.source import Source

    root = (out.root or Path()) if isinstance(out, Source) else local(out, "a model to load")
    if isinstance(out, Source):
        return _open_for(out, out.directory, root, mesh, world, reshard_on_load)
    check_whole(root)
    if not root.exists():
        return _open_for(out, None, root, mesh, world, reshard_on_load)  # raises
    try:
        return reading(root, lambda directory: _open_for(out, directory, root, mesh, world, reshard_on_load))
    except OSError as error:
        raise failed("reading", root, error) from error


def _open_for(
    out: "str | os.PathLike[str] | Source",
    directory: Directory | None,
    root: Path,
    mesh: "Mesh | None",
    world: "World",
    reshard_on_load: bool,
) -> Opened:
    from reshard.checkpoints.source import Source
    from reshard.layout.capacity import explain_refusal
    from reshard.layout.cut import lay_out
    from reshard.layout.mesh import Mesh
    from reshard.tables import formats

    known = manifest.load(root) if manifest.present(root) else None
    if known is not None:
        wanted = mesh or (known.mesh if known.mesh.world == world.size else Mesh(world.size))
        if not reshard_on_load and (known.mesh != wanted or known.format != NATIVE):
            have = f'{known.mesh.world} ranks ({known.mesh}) in format "{known.format}"'
            raise ReshardError(
                f'{root}: is for {have}; this job has {world.size} ranks ({wanted}) and needs format "{NATIVE}"',
                f"start {known.mesh.world} processes, convert it for {wanted}, or allow reshard_on_load",
            )
    else:
        wanted = mesh or Mesh(world.size)
        if not reshard_on_load and root.is_dir():
            raise ReshardError(
                f"{root}: not a shard directory for {world.size} ranks: there is no manifest.json",
                "allow reshard_on_load",
            )
    if wanted.world != world.size:
        raise ReshardError(
            f"the mesh {wanted} has {wanted.world} ranks, the job {world.size}", f"start {wanted.world} processes"
        )
    if known is not None and known.mesh == wanted and known.format == NATIVE and not isinstance(out, Source):
        config, layout = _open_rank(root, known, world.rank)
        return Opened(directory, root, config, layout, known, None)
    source = out if isinstance(out, Source) else open_out(root)
    model = source.layout.model
    table = formats.load(NATIVE).for_family(model.family.plain)
    try:
        layout = lay_out(table, model, wanted)
    except ReshardError as error:
        raise explain_refusal(error, table, model, wanted) from None
    return Opened(directory, root, source.config, layout, known, source)


def _open_rank(root: Path, known: Manifest, rank: int) -> "tuple[Config, Layout]":
    """The layout of a native directory, checked as far as one rank needs it: other ranks' files may be elsewhere."""
    from reshard.checkpoints.source import check_small_files, open_rank

    if not (root / "source").exists():
        from .described import described

        check_small_files(root, structs.replace(known, ranks=known.ranks[rank : rank + 1], source=()))
        return described(root, known, rank)
    found = open_rank(root, rank)
    return found.config, found.layout


def _threads() -> int:
    """Reader threads of this rank: its share of the machine's CPUs, at most 4."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
