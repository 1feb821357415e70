"""Loading: the tensors of one rank, mapped from its own file, or read through the plan from any other directory; and a model of them.

    load_shard(out, rank)     {stored name: tensor}, views of the mapped file: nothing is copied, pages come as they are touched
    load_model(out)           this rank's part of the model; a directory for another number of ranks, or of another format, is
                              resharded on the way, each rank reading the bytes that it needs

Everything is checked before it is mapped: a truncated file under mmap kills the process, or reads as zeros within its last page.
Knows nothing about what a model computes.
"""

import json
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reshard.checkpoints import manifest
from reshard.checkpoints.manifest import Manifest
from reshard.checkpoints.shards import FORMAT_VERSION
from reshard.containers import safetensors
from reshard.containers.safetensors import BITS, Entry
from reshard.errors import MismatchError, PlaceError, ReshardError, failed
from reshard.store.directory import Directory, reading, unchanged
from reshard.store.location import local
from reshard.store.workfolder import check_whole

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source
    from reshard.engine.worker import Key
    from reshard.layout.cut import Layout, Point
    from reshard.layout.join import Component, Copy, Plan
    from reshard.layout.mesh import Mesh
    from reshard.model.understand import Model
    from reshard.tables.config import Config
    from reshard.tables.families import Family
    from reshard.tables.row import Row

    from .comm.collectives import World
    from .model.decoder import Decoder

State = dict[str, Tensor]

NATIVE = "native"  # the format whose names and fusions the decoder knows

# safetensors' name of a dtype → torch's, as safetensors.torch has them; what is missing is handed out as raw bytes.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, spelling) for name, spelling in _NAMES.items() if hasattr(torch, spelling)}

_DIRECT = 128  # bytes: the shortest run worth a system call of its own; shorter ones are read with what lies between them
_HUGE = 2 << 20  # bytes
# So that a shard larger than the machine's memory can be mapped writable; Python names the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().machine in ("x86_64", "aarch64") else 0)


# --- one rank, mapped ------------------------------------------------------------------------------------------------------------


def load_shard(out: str | os.PathLike[str], rank: int, verify: str | None = None, root: str | None = None) -> State:
    """The tensors of one rank of a shard directory by stored name, mapped from its file without a copy.

    The mapping is private: writing to a tensor changes no file. Types that torch does not have come as raw bytes (uint8), with the packed
    axis last. `verify="hash"` reads everything and compares it with the digests. Needs manifest.json and the rank's own folder.
    Ranks that are to be of one conversion give its root digest, `root`, as `convert` tells it: any other is refused.
    Raises ReshardError for a wrong version, rank, size, header or digest, before anything is mapped where it can be told; PlaceError for
    another root, and where `out` is being replaced again and again.
    """
    _known(verify)
    path = local(out, "shards to load")

    def load(_: Directory) -> State:
        known = _manifest(path)
        if type(rank) is not int or not 0 <= rank < len(known.ranks):
            raise ReshardError(
                f"{path}: has ranks 0 to {len(known.ranks) - 1}, rank {rank!r} is wanted", "shards are for exactly that many ranks"
            )
        if root is not None and known.root != root:
            raise PlaceError(
                f"{path}: has root digest {known.root}, wanted is {root}: it was replaced by another conversion",
                "start all ranks again, with the root that it has now",
            )
        memory, entries = _mapped(path, known, rank)
        if verify is not None:
            _check_digests(path, known, rank, memory)
        return {name: _tensor(memory, entry) for name, entry in entries.items()}

    check_whole(path)
    if not path.is_dir():
        raise ReshardError(f"{path}: no such directory", "give the directory that `reshard convert` wrote")
    try:
        return reading(path, load)
    except OSError as error:
        raise failed("reading", path, error) from error


def _known(verify: str | None) -> None:
    if verify not in (None, "hash"):
        raise ReshardError(f"verify={verify!r} is unknown", 'verify="hash" compares digests; None checks sizes and headers')


def _manifest(root: Path) -> Manifest:
    if not manifest.present(root):
        raise ReshardError(
            f"{root}: has no manifest.json, so it is no shard directory", f"convert it first: reshard convert {root} OUT --tp N"
        )
    return manifest.load(root)


def _mapped(root: Path, known: Manifest, rank: int) -> tuple[mmap.mmap, dict[str, Entry]]:
    """A rank's file in memory, and where each tensor is in it."""
    path, size = root / known.ranks[rank][0].name, known.ranks[rank][0].size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not to wait for the other end of a pipe
    except FileNotFoundError:
        raise MismatchError(f"{path}: is missing; it should have {size} bytes", "fetch the file again, or convert again") from None
    except OSError as error:
        raise failed("opening", path, error) from error
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise MismatchError(
                f"{path}: has {found} bytes, the manifest says {size}", "it is truncated or of another conversion: fetch it again"
            )
        head, _ = safetensors.read(descriptor, size, str(path))
        _check_metadata(path, head.metadata, known, rank)
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE  # torch wants to be able to write
        return mmap.mmap(descriptor, size, flags, access), head.entries
    except OSError as error:
        raise failed("mapping", path, error) from error
    finally:
        os.close(descriptor)


def _check_metadata(path: Path, metadata: Mapping[str, str], known: Manifest, rank: int) -> None:
    """The file says itself whose it is: a stray or exchanged one is noticed."""
    mesh = known.mesh
    wanted = {
        "reshard.plan": known.plan,
        "reshard.rank": str(rank),
        "reshard.world": str(mesh.world),
        "reshard.mesh": f"tp={mesh.tp} pp={mesh.pp} ep={mesh.ep}",
    }
    version = metadata.get("reshard.version", "none")
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise MismatchError(
            f"{path}: its header says format version {version}, this reshard reads {FORMAT_VERSION}", "fetch the file again"
        )
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise MismatchError(
                f"{path}: its header says {key.removeprefix('reshard.')} {metadata.get(key, 'nothing')}, wanted is {value}",
                "files were exchanged, or are of another conversion: fetch the file again, or convert again",
            )


def _check_digests(root: Path, known: Manifest, rank: int, memory: mmap.mmap) -> None:
    """Every block of a mapped file has the digest that tensors.json gives it, and that has the manifest's."""
    from reshard.checkpoints.blocks import Blocks
    from reshard.store.digest import of

    weights, tensors = known.ranks[rank]
    try:
        text = (root / tensors.name).read_bytes()
    except OSError as error:
        raise failed("reading", root / tensors.name, error) from error
    if of(text) != tensors.digest:
        raise MismatchError(f"{root / tensors.name}: has digest {of(text)}, the manifest says {tensors.digest}", "fetch the file again")
    blocks, view = Blocks.read(root, weights, tensors), memoryview(memory)
    for failure in blocks.contradictions():
        raise MismatchError(f"{root}: {failure}", "fetch the file again, or convert again")
    for block in blocks:
        if (found := block.found(view[block.offset : block.offset + block.size])) != block.digest:
            raise MismatchError(f"{root / block.file}: {block.where} have digest {found}, {block.digest} was written", "fetch it again")


def _tensor(memory: mmap.mmap | None, entry: Entry, offset: int | None = None) -> Tensor:
    """A view of memory as the stored tensor that lies there; raw bytes where torch has no such type."""
    dtype, shape = DTYPES.get(entry.dtype), entry.shape
    if dtype is None:
        dtype, shape = torch.uint8, _packed(entry)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset if offset is None else offset).view(shape)


def _packed(entry: Entry) -> tuple[int, ...]:
    """The shape in bytes of a tensor of sub-byte elements: the last axis shrinks, or all do where it holds no whole bytes."""
    if entry.shape and entry.shape[-1] * BITS[entry.dtype] % 8 == 0:
        return *entry.shape[:-1], entry.shape[-1] * BITS[entry.dtype] // 8
    return (entry.nbytes,)


# --- a model ---------------------------------------------------------------------------------------------------------------------


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
    """This rank's part of the model in a shard directory, in a published one, or in a source opened before; called by all ranks of a job.

    The job is `world`, or the initialised process group of torch.distributed, or this process alone; collectives give up after `timeout`
    seconds. `mesh` is how the job cuts the model: by default the directory's own if it is for as many ranks, else tensor parallel.
    At its own mesh a native directory is mapped; from any other each rank reads what it needs, or is refused with
    `reshard_on_load=False`. `dtype` casts floating weights, one tensor at a time; by default to what most of them are in. Block-scaled FP8
    and its scales stay as they are, and what is WIDE stays as wide as it is. Raises ReshardError, and Lost where another rank fails or has
    another checkpoint.
    """
    _known(verify)
    world = world or _world(timeout)
    world.phase = "load"
    with world.failing():
        opened = open_for(out, mesh, world, reshard_on_load)
        world.agree(opened.facts | {"dtype": str(dtype)})
        with unchanged(opened.directory):  # what all have agreed on is what was mapped, on every rank before any goes on
            decoder = opened.decoder(world)
            state = opened.state(world.rank, dtype, device, verify, world.check)
            decoder.load_state_dict(state, strict=True, assign=True)
        world.meet("all ranks are loaded")
    return decoder.eval()


def with_facts(family: "Family") -> "Family":
    """A family table that says how to run the model: the shipped one where a directory was converted by one that did not say."""
    from reshard.tables import families

    return family if family.model or family.name not in families.shipped() else families.load(family.name)


def _world(timeout: float) -> "World":
    """The process group that there is, or a job of one."""
    from torch import distributed

    from .comm.collectives import Processes, alone

    if distributed.is_available() and distributed.is_initialized():
        return Processes(timeout=timeout)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ReshardError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but no process group is initialised",
            'call torch.distributed.init_process_group("gloo") first, or leave it to `python -m reshard.runtime`',
        )
    return alone()


def open_out(path: str | os.PathLike[str]) -> "Source":
    """Any directory that reshard reads, all of it."""
    from reshard.checkpoints.source import open_source

    return open_source(local(path, "a model to load"))


class Opened:
    """A directory opened for one job: the model's layout among its ranks, and how to get the tensors of one.

    `facts` must be the same on every rank.
    """

    def __init__(
        self, directory: Directory | None, root: Path, config: "Config", layout: "Layout", known: Manifest | None, source: "Source | None"
    ) -> None:
        from reshard.checkpoints.shards import Shards
        from reshard.store.digest import of

        self.directory = directory
        self.root, self.config, self.layout, self.known, self.source = root, config, layout, known, source
        self.read = 0  # bytes of tensors read from a source; nothing is read where a file is mapped
        self.facts = {
            "manifest": known.root if known else "none",
            "config.json": of(json.dumps(config.data, sort_keys=True).encode()),
            "mesh": str(layout.mesh),
            "plan": "the manifest's" if source is None else Shards(layout).digest,  # a rank may know the layers of its own stage only
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
        """The rank's tensors of the language model, or some `only`: mapped, or read. `check` is called now and then, from any thread, and
        may raise."""
        from .model.local_shapes import language

        cast, own = Cast(self.layout, rank, dtype, device), {slot.name(at) for slot in language(self.layout, rank) for at in slot.points()}
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


def open_for(out: "str | os.PathLike[str] | Source", mesh: "Mesh | None", world: "World", reshard_on_load: bool = True) -> Opened:
    """Open a directory for a job: to be mapped where it is native and for the job's mesh, else to be read through a plan.

    A source that was opened before is always read.
    """
    from reshard.checkpoints.source import Source

    root = (out.root or Path()) if isinstance(out, Source) else local(out, "a model to load")
    if isinstance(out, Source):
        return _open_for(out, out.directory, root, mesh, world, reshard_on_load)
    check_whole(root)
    if not root.exists():
        return _open_for(out, None, root, mesh, world, reshard_on_load)  # which says so
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
                f'{root}: is for {have}; this job has {world.size} ranks ({wanted}) and wants format "{NATIVE}"',
                f"start {known.mesh.world} processes, convert it for {wanted}, or allow reshard_on_load",
            )
    else:
        wanted = mesh or Mesh(world.size)
        if not reshard_on_load and root.is_dir():
            raise ReshardError(f"{root}: has no manifest.json, so it is no shard directory for {world.size} ranks", "allow reshard_on_load")
    if wanted.world != world.size:
        raise ReshardError(f"the mesh {wanted} has {wanted.world} ranks, the job {world.size}", f"start {wanted.world} processes")
    if known is not None and known.mesh == wanted and known.format == NATIVE and not isinstance(out, Source):
        config, layout = _open_rank(root, known, world.rank)
        return Opened(directory, root, config, layout, known, None)
    source = out if isinstance(out, Source) else open_out(root)
    model = source.layout.model
    table = formats.load(NATIVE).for_family(model.family.name)
    try:
        layout = lay_out(table, model, wanted)
    except ReshardError as error:
        raise explain_refusal(error, table, model, wanted) from None
    return Opened(directory, root, source.config, layout, known, source)


def _open_rank(root: Path, known: Manifest, rank: int) -> "tuple[Config, Layout]":
    """The layout of a native directory, checked against what one rank needs of it: other ranks' files may be elsewhere."""
    from reshard.checkpoints.source import check_small_files, open_rank

    if not (root / "source").exists():
        from .described import described

        check_small_files(root, replace(known, ranks=known.ranks[rank : rank + 1], source=()))
        return described(root, known, rank)
    found = open_rank(root, rank)
    return found.config, found.layout


def _threads() -> int:
    """Threads that read for this rank: its share of the CPUs of this machine, at most 4."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


# What is used in float32 whatever the rest is in (routers, recurrences, residual streams), as transformers keeps it: stays as it is stored.
WIDE = (
    "moe.router",
    "moe.score_bias",
    "lin.",
    "ssm.",
    "attn.sinks",
    "attn.pool_pos",
    "streams.",
    "mtp.streams",
    "mtp_streams",
    "head_streams",
)


class Cast:
    """What becomes of a stored tensor before the model gets it: another dtype, another device.

    Without `dtype` a checkpoint of several becomes one of that which most of it is in, but for what is WIDE.
    """

    def __init__(self, layout: "Layout", rank: int, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.main = main_dtype(layout.model)
        self.dtype, self.device = dtype or self.main, device
        self.scales = _named(layout, rank, lambda row: any("/" in axis for path in row.pattern.axes for axis in path))
        self.wide = _named(layout, rank, lambda row: any(leaf.startswith(WIDE) for leaf in row.leaves))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if self.dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 and name not in self.scales:
            wider = name in self.wide and self.main is not None and dtype.itemsize > self.main.itemsize
            dtype = torch.promote_types(dtype, self.dtype) if wider else self.dtype
        return tensor.to(device=self.device, dtype=dtype)


def main_dtype(model: "Model") -> torch.dtype | None:
    """What most floating weights of a checkpoint are stored in; None where all of them are of 8 bits or fewer."""
    elements: Counter[str] = Counter()
    for tensor in model.tensors.values():
        for dtype in tensor.dtypes:  # one, or one per layer
            elements[dtype] += tensor.elements // len(tensor.dtypes)
    floating = {name: count for name, count in elements.items() if name in ("F64", "F32", "F16", "BF16")}
    return DTYPES[max(floating, key=floating.__getitem__)] if floating else None


def _named(layout: "Layout", rank: int, chosen: "Callable[[Row], bool]") -> set[str]:
    """The stored names on a rank that some rows have."""
    from reshard.tables.row import Row

    slots = [slot for slot in layout.by_rank[rank] if isinstance(slot.template, Row) and chosen(slot.template)]
    return {slot.name(point) for slot in slots for point in slot.points()}


# --- through the plan ------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads the tensors of one rank of a layout from any source, straight into place, tensor by tensor; `read` counts bytes."""

    def __init__(
        self, source: "Source", layout: "Layout", rank: int, cast: Cast, check: Callable[[], None], only: Callable[[str], bool]
    ) -> None:
        from reshard.checkpoints.shards import Shards

        self.source, self.layout, self.rank, self.cast, self.check, self.only = source, layout, rank, cast, check, only
        self.shard = Shards(layout).shard(rank)
        self.entries = self.shard.header.entries
        self.read = 0
        self._state: State = {}
        self._lock = threading.Lock()
        self._filled: dict[str, memoryview] = {}
        self._memory: dict[str, mmap.mmap] = {}

    def run(self, threads: int) -> State:
        """Everything, by so many threads."""
        from reshard.layout.join import plan
        from reshard.store.local import Pool

        joined: Plan = plan(self.source.layout, self.layout, ranks=[self.rank])
        self._pool: Pool = Pool()
        self._own = threading.local()
        stop = threading.Event()

        def work(component: "Component", at: "Point") -> None:
            if not stop.is_set():
                try:
                    self.check()
                    self._job([copy for copy in component.copies(at) if self.only(copy.dst_name)])
                except BaseException:
                    stop.set()
                    raise

        try:
            with ThreadPoolExecutor(threads, "load") as executor:
                jobs = [executor.submit(work, component, at) for component in joined.components for at in component.points()]
                try:
                    for job in jobs:
                        job.result()
                finally:
                    stop.set()
        finally:
            self._pool.close()
        names = [name for name, _, _ in self.shard.tensors if self.only(name)]
        self._finish(name for name in names if name not in self._state)  # padding alone, empty tensors
        return {name: self._state[name] for name in names}

    def _job(self, copies: "list[Copy]") -> None:
        """All copies into some tensors: long runs directly, the rest through the engine's buffers."""
        from reshard.engine.worker import Worker

        rest = [copy for copy in copies if not self._direct(copy)]
        if rest:
            worker = getattr(self._own, "worker", None)
            if worker is None:
                worker = self._own.worker = Worker(self.source, self, self, self._pool, self._count)
            worker.job(rest)
        self._finish(dict.fromkeys(copy.dst_name for copy in copies))

    def _direct(self, copy: "Copy") -> bool:
        from reshard.engine.worker import in_items

        path, entry = self.source.locate((copy.src.rank, copy.src_name))
        start, to, dims, item = in_items(copy, entry, self.entries[copy.dst_name])
        *outer, (run, src, dst) = dims or ((1, 1, 1),)
        if (src, dst) != (1, 1) or (run * item < _DIRECT and outer):
            return False
        buffer = self._buffer(copy.dst_name)
        for at in product(*(range(n) for n, _, _ in outer)):
            offset = start + sum(i * s for i, (_, s, _) in zip(at, outer, strict=True))
            place = (to + sum(i * d for i, (_, _, d) in zip(at, outer, strict=True))) * item
            self._pool.read_into(path, entry.offset + offset * item, buffer[place : place + run * item])
        self._count(math.prod(n for n, _, _ in dims) * item)
        return True

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.read += nbytes

    def _buffer(self, name: str) -> memoryview:
        """Zeros to be filled: whole pages that the system gives when they are touched."""
        with self._lock:
            if name not in self._memory:
                memory = self._memory[name] = mmap.mmap(-1, self.entries[name].nbytes)
                if len(memory) >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
                    memory.madvise(mmap.MADV_HUGEPAGE)
                self._filled[name] = memoryview(memory)
            return self._filled[name]

    def _finish(self, names: Iterable[str]) -> None:
        for name in names:
            entry = self.entries[name]
            if entry.nbytes:
                self._buffer(name)
            with self._lock:
                memory = self._memory.pop(name, None)
                self._filled.pop(name, None)
            self._state[name] = self.cast(name, _tensor(memory, entry, 0))

    # What the engine's worker asks for.

    def locate(self, key: "Key") -> tuple[Path, Entry]:
        return Path(), self.entries[key[1]]

    def put(self, key: "Key", offset: int, data: memoryview) -> None:
        self._buffer(key[1])[offset : offset + len(data)] = data

    def done(self, keys: Any) -> None:
        """Tensors are finished by the job, when the direct reads are done too."""
