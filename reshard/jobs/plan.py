"""The report of `reshard plan`: what a conversion will read, write and need, as data for programs and as text for
people.

Built from two layouts without enumerating a single copy. Sizes of files are decimal (GB), sizes of memory binary (GiB),
never mixed in a row. Opens no file and prints nothing.
"""

import math
import re
import shlex
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ..checkpoints.source import Source
from ..containers.dtypes import BITS
from ..layout import capacity
from ..layout.capacity import listed
from ..layout.cut import Layout, Piece, Slot
from ..layout.join import Join, plan
from ..layout.mesh import Mesh
from ..model.understand import Config, Model
from ..tables.notation import Product, block_of
from ..tables.row import Row
from ..text.units import binary, decimal, folded
from .json_result import as_json

MEMORY_BASE = 48 << 20  # bytes that a convert keeps: the interpreter and what is always there …
MEMORY_WORKER = 8 << 20  # … each worker's buffers …
MEMORY_TENSOR = 1536  # … and the books kept per source tensor


def memory(workers: int, tensors: int) -> int:
    """Peak memory of a convert, in bytes: the bound that it keeps."""
    return MEMORY_BASE + workers * MEMORY_WORKER + MEMORY_TENSOR * tensors


class SourceFacts(Struct, frozen=True):
    """What a report says of the source and layouts do not know. `nbytes`: of the weight files; `dtypes`:
    tensors of each dtype.
    """

    name: str  # directory or Hub id, as the user gave it
    files: int
    nbytes: int
    tensors: int
    dtypes: Mapping[str, int]
    commit: str | None = None
    carried: int = 0  # bytes of the files that are carried over untouched
    options: tuple[str, ...] = ()  # what else the next command must say: --family my.toml, --revision abc


class Ranks(Struct, frozen=True):
    """Ranks that hold equally much: `ranks` folded (`0-7`), the tensors and bytes that each of them stores,
    its bytes of KV cache.
    """

    ranks: str
    count: int
    tensors: int
    nbytes: int
    cache: int | None


class StoredAs(Struct, frozen=True):
    """What one row of the target format is on a rank. `least`, `shape`: per dimension the least and the most that any
    rank has.
    """

    name: str
    logical: tuple[str, ...]
    least: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    count: int  # stored tensors per layer and rank, more than one where experts are tensors of their own
    nbytes: int  # of them together, on the rank that has most
    cut: tuple[str, ...]  # "column by heads", "row by inter", "by experts"; empty: every rank has the whole
    repeated: dict[str, int]  # axis → ranks that share an index of it
    padded: dict[str, int]  # axis → its size with the zeros
    gathered: bool  # transposed or interleaved on the way
    stage: str  # pipeline stages that have it: "first", "last" or "every"
    zero: bool  # content on the first tensor parallel rank, zeros on the others
    tower: str = ""  # the component that it belongs to, if that is not the language model


class LayerKind(Struct, frozen=True):
    """Layers that are stored alike; `layers` folded, empty for what stands outside the layers."""

    layers: str
    count: int
    kinds: tuple[str, ...]  # of the family's `one_of`: dense, moe, mtp
    rows: tuple[StoredAs, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one such layer on the rank that has most of each row."""
        return sum(row.nbytes for row in self.rows)


class Device(Struct, frozen=True):
    """Whether the worst rank's weights and cache fit a device, all in bytes. `smallest`: a mesh that does."""

    memory: int
    reserve: int
    usable: int
    worst: int  # weights + cache of the rank that needs most
    fits: bool
    smallest: Mesh | None


class Report(Struct, frozen=True):
    """Everything that `reshard plan` says, exact; `text` rounds, `to_json` does not."""

    source: SourceFacts
    family: str
    around: str  # the family of its language model, where it has other components; or nothing
    layers: int
    extra_layers: int
    came_from: str  # "published", or the format and mesh of a sharded directory
    format: str  # as `--to` names it
    published: bool  # the destination: Hugging Face files, not shards
    mesh: Mesh
    ranks: tuple[Ranks, ...]
    logical: int
    stored: int
    padding: int
    constants: int
    repeated_bytes: dict[str, int]  # logical tensor → bytes stored beyond the first copy
    repeats: dict[str, tuple[int, int]]  # axis → its size, and the ranks that share an index of it
    kinds: tuple[LayerKind, ...]
    disk: int
    disk_exact: bool
    memory: int
    workers: int
    sizes: tuple[int, ...]  # TP sizes that this format allows this model; empty for the published form
    cache: capacity.Cache | None
    context: int | None
    batch: int
    device: Device | None
    command: tuple[str, ...]

    @property
    def replicated(self) -> int:
        """Bytes that ranks store beyond the first copy: norms, routers, repeated KV heads, tied embeddings of several
        stages.
        """
        return sum(self.repeated_bytes.values())

    @property
    def balance(self) -> float:
        """Bytes of the largest rank over the mean."""
        most = max(group.nbytes for group in self.ranks)
        return most * self.mesh.world / self.stored if self.stored else 1.0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values: bytes as integers, nothing rounded but the balance."""
        of_model = {
            "family": self.family,
            "layers": self.layers,
            "extra_layers": self.extra_layers,
            "layout": self.came_from,
        }
        if self.around:
            of_model["around"] = self.around
        return {
            "source": as_json(self.source) | of_model,
            "format": self.format,
            "mesh": _mesh(self.mesh),
            "ranks": as_json(self.ranks),
            "balance": round(self.balance, 6),
            "bytes": {
                "stored": self.stored,
                "logical": self.logical,
                "replicated": self.replicated,
                "padding": self.padding,
                "constants": self.constants,
            },
            "replicated": dict(self.repeated_bytes),
            "repeats": {axis: {"size": size, "ranks": n} for axis, (size, n) in self.repeats.items()},
            "kinds": [as_json(kind) | {"nbytes": kind.nbytes} for kind in self.kinds],
            "disk": {"bytes": self.disk, "exact": self.disk_exact},
            "memory": {"bytes": self.memory, "workers": self.workers},
            "tp_sizes": list(self.sizes),
            "cache": as_json(self.cache),
            "device": self.device and as_json(self.device) | {"smallest": _mesh(self.device.smallest)},
            "next": list(self.command),
        }

    def text(self, width: int = 80) -> str:
        """The report for people, lines of at most `width` columns; the last line is the next command."""
        return "\n".join(line.rstrip() for line in _text(self, width))


def build(
    src: Layout,
    dst: Layout,
    *,
    config: Config,
    source: SourceFacts,
    workers: int,
    device_memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    out: str = "OUT",
    disk: int | None = None,
) -> Report:
    """The report of a conversion from one layout to another.

    `device_memory` in bytes, `context` in tokens; without a context no cache is counted. `disk`: bytes that the output
    takes, where the caller knows them; otherwise they are estimated. Raises ReshardError where the source does not
    cover the destination.
    """
    model, mesh = dst.model, dst.mesh
    published = not dst.format.cut
    to = "hf" if published else dst.format.name
    logical = dst.logical_bytes()
    held: dict[str, int] = dict.fromkeys(logical, 0)
    for name, pieces in dst.pieces.items():
        held[dst.alias.get(name, name)] += sum(map(capacity.piece_bytes, pieces))
    weights = capacity.weight_bytes(dst)
    stored, constants = sum(weights), sum(capacity.slot_bytes(dst, slot) for slot in dst.constants)
    kept = capacity.cache(dst, config, context, batch) if context else None
    device = None
    if device_memory is not None:
        worst = max(capacity.needed(dst, config, context, batch))
        usable = capacity.usable(device_memory)
        device = Device(
            memory=device_memory,
            reserve=device_memory - usable,
            usable=usable,
            worst=worst,
            fits=worst <= usable,
            smallest=None if published else capacity.smallest(model, config, dst.format, device_memory, context, batch),
        )
    return Report(
        source=source,
        family=model.family.name,
        around=model.family.around,
        layers=model.main_layers,
        extra_layers=model.sizes.get("layer", model.main_layers) - model.main_layers,
        came_from=f"{src.format.name}, {src.mesh}" if src.format.cut else "published",
        format=to,
        published=published,
        mesh=mesh,
        ranks=_ranks(dst, weights, kept),
        logical=sum(logical.values()),
        stored=stored,
        padding=stored - constants - sum(held.values()),
        constants=constants,
        repeated_bytes={name: held[name] - once for name, once in logical.items() if held[name] > once},
        repeats={axis: (model.sizes[axis], n) for axis, n in dst.repeats.items()},
        kinds=_kinds(src, dst),
        disk=_disk(src, dst, source, stored) if disk is None else disk,
        disk_exact=disk is not None,
        memory=memory(workers, source.tensors),
        workers=workers,
        sizes=() if published else capacity.sizes_that_work(dst.format, model, mesh),
        cache=kept,
        context=context,
        batch=batch,
        device=device,
        command=_command(source, out, None if published else mesh, to),
    )


# --- gathering --------------------------------------------------------------------------------------------------------


def _ranks(dst: Layout, weights: Sequence[int], kept: capacity.Cache | None) -> tuple[Ranks, ...]:
    groups: dict[tuple[int, int, int | None], list[int]] = defaultdict(list)
    for rank, slots in enumerate(dst.by_rank):
        tensors = sum(slot.count() for slot in slots)
        groups[tensors, weights[rank], kept.ranks[rank] if kept else None].append(rank)
    return tuple(Ranks(folded(ranks), len(ranks), *key) for key, ranks in groups.items())


def _disk(src: Layout, dst: Layout, source: SourceFacts, stored: int) -> int:
    """What the output takes: weights, carried files, headers and digests (a generous guess), and the residue of
    published files.
    """
    tensors = sum(slot.count() for slot in (*dst.slots, *dst.constants))
    books = 640 * tensors + 36 * (stored >> 23) + (16 << 10) * dst.mesh.world
    residue = max(0, source.nbytes - sum(capacity.weight_bytes(src))) if not src.format.cut and dst.format.cut else 0
    return stored + source.carried + books + residue


def _command(source: SourceFacts, out: str, mesh: Mesh | None, to: str) -> tuple[str, ...]:
    """The conversion as a command; `mesh`: None for Hugging Face files."""
    words = ["reshard", "convert", source.name, out, *source.options]
    if mesh is None:
        return (*words, "--to", to)
    words += ["--tp", str(mesh.tp)]
    for option, n in (("--pp", mesh.pp), ("--ep", mesh.ep)):
        words += [option, str(n)] if n > 1 else []
    if mesh.weights:
        words += ["--split", ":".join(map(str, mesh.weights))]
    if mesh.layers:
        words += ["--pp-layers", ",".join(map(str, mesh.layers))]
    return (*words, *(("--to", to) if to != "native" else ()))


def _kinds(src: Layout, dst: Layout) -> tuple[LayerKind, ...]:
    """What each kind of layer becomes: layers of identical rows and dtypes together, first what stands outside of
    layers.
    """
    model = dst.model
    slots: dict[int, list[Slot]] = defaultdict(list)
    pieces: dict[Slot, list[Piece]] = defaultdict(list)
    for slot in (*dst.slots, *dst.constants):
        slots[slot.row].append(slot)
    for held in dst.pieces.values():
        for piece in held:
            pieces[piece.slot].append(piece)
    firsts = range(0, dst.mesh.world, dst.mesh.tp)
    gathered = {
        join.dst.slot.row
        for component in plan(src, dst, firsts).components
        for join in component.joins
        if _is_gathered(join)
    }
    layered: dict[int, list[tuple[int, str]]] = defaultdict(list)  # layer → its rows, and their dtypes
    outside: list[tuple[int, str]] = []
    for row, mine in sorted(slots.items()):
        if "layer" not in mine[0].box:
            outside.append((row, dst.dtype(mine[0], {})))
            continue
        ranges = {slot.box["layer"]: slot for slot in mine}
        for slot in ranges.values():
            for layer in capacity.layers_of(slot):
                layered[layer].append((row, dst.dtype(slot, {"layer": layer})))
    groups: dict[tuple[tuple[tuple[int, str], ...], tuple[str, ...]], list[int]] = defaultdict(list)
    for layer in sorted(layered):
        groups[tuple(layered[layer]), _family_kinds(model, layer)].append(layer)
    found = []
    if outside:
        found.append(
            LayerKind(
                "", 0, (), tuple(_stored_as(dst, slots[row], pieces, dtype, row in gathered) for row, dtype in outside)
            )
        )
    for (rows, kinds), layers in groups.items():
        stored = tuple(_stored_as(dst, slots[row], pieces, dtype, row in gathered) for row, dtype in rows)
        found.append(LayerKind(folded(layers), len(layers), kinds, stored))
    return tuple(found)


def _family_kinds(model: Model, layer: int) -> tuple[str, ...]:
    rows = [model.family.rows[at] for at, layers in model.active.items() if layers is not None and layer in layers]
    here = {kind for row in rows for kind in row.kinds}
    return tuple(kind for group in model.family.one_of for kind in group if kind in here)


def _is_gathered(join: Join) -> bool:
    """Whether a copy transposes or interleaves: it keeps not the order of the axes, or has no axis of neighbours on one
    of the sides.
    """
    spans = zip(join.box, join.src.strides, join.dst.strides, strict=True)
    steps = [(high - low > 1, a, b) for (low, high), a, b in spans if a is not None and b is not None]
    moved = [(a, b) for several, a, b in steps if several]
    if not moved:
        return False
    apart = min(a for _, a, _ in steps) > 1 or min(b for _, _, b in steps) > 1
    return apart or sorted(moved) != sorted(moved, key=lambda step: (step[1], step[0]))


def _stored_as(
    dst: Layout, slots: Sequence[Slot], pieces: Mapping[Slot, list[Piece]], dtype: str, gathered: bool
) -> StoredAs:
    slot = next((slot for slot in slots if slot in pieces), slots[0])
    row = slot.template if isinstance(slot.template, Row) else None
    cut: dict[str, None] = {}
    repeated: dict[str, int] = {}
    padded: dict[str, int] = {}
    for piece in pieces.get(slot, ()):
        named = {axis: _compound(dst, piece, axis) for axis in piece.tensor.axes}
        for axis, box, size in zip(piece.tensor.axes, piece.box, piece.tensor.sizes, strict=True):
            if axis != "layer" and box != (0, size) and row is not None:
                cut[_how(dst, row, named[axis])] = None
        repeated |= {axis: n for axis, n in dst.repeats.items() if named.get(axis) == axis}
        padded |= {axis: to for axis, (_, to) in dst.padding.items() if axis in named}
    shapes = [each.shape for each in slots]
    count = max(math.prod(high - low for axis, (low, high) in each.box.items() if axis != "layer") for each in slots)
    return StoredAs(
        name=slot.template.name.text,
        logical=row.leaves if row else (),
        least=tuple(map(min, zip(*shapes, strict=True))),
        shape=tuple(map(max, zip(*shapes, strict=True))),
        dtype=dtype,
        count=count,
        nbytes=max(each.elements for each in slots) * count * BITS[dtype] // 8,
        cut=tuple(cut),
        repeated=repeated if cut else {},
        padded=padded,
        gathered=gathered,
        stage=row.stage if row and "layer" not in slot.box and dst.mesh.pp > 1 else "every",
        zero=row is not None and row.zero,
        tower=row.tower if row else "",
    )


def _compound(dst: Layout, piece: Piece, axis: str) -> str:
    """The name under which an axis is cut in this tensor: kv is `heads` where the group stands beside it;
    inter/128 is `inter`.
    """
    block = block_of(axis)
    beside = block[0] if block else piece.tensor.axes
    own = block[0] if block else (axis,)
    return next(
        (name for name, atoms in dst.format.axes.items() if set(atoms) <= set(beside) and set(atoms) & set(own)), own[0]
    )


def _how(dst: Layout, row: Row, axis: str) -> str:
    """`column by heads`: a matrix' outputs are cut; `row by inter`: its inputs; `by experts`, `by heads`:
    what is cut is neither.
    """
    experts = set(dst.format.cut.get("ep", ()))
    wanted = set(dst.format.axes.get(axis, (axis,)))
    matrix = [names for dim in row.pattern.dims if not (names := set(_names(dim))) or not names <= experts]
    at = next((at for at, names in enumerate(matrix) if names & wanted), None)
    if at is None or len(matrix) < 2:
        return f"by {axis}"
    return f"row by {axis}" if at == len(matrix) - 1 else f"column by {axis}"


def _names(dim: Product) -> Iterator[str]:
    for node in dim:
        if isinstance(node, str):
            block = block_of(node)
            yield from block[0] if block else (node,)
        else:
            for term in node.terms:
                yield from _names(term)


# --- as text ----------------------------------------------------------------------------------------------------------

LEGEND = "Per rank (column: outputs are split, row: inputs are split, whole: not split):"


def _text(report: Report, width: int) -> Iterator[str]:
    yield from _head(report, width)
    yield ""
    yield from _on_disk(report, width)
    yield ""
    yield from _rows(report, width)
    if report.cache is not None or report.device is not None:
        yield ""
        yield from _on_device(report, width)
    if report.sizes:
        beside = f" with EP {report.mesh.ep}" if report.mesh.ep > 1 else ""
        yield ""
        yield from _wrapped(f"TP sizes this model allows{beside}: {listed(report.sizes)}", width, "")
    yield ""
    yield from _command_lines(report.command, width)


def _head(report: Report, width: int) -> Iterator[str]:
    source = report.source
    yield source.name + (f" @ {source.commit}" if source.commit else "")
    extra = f" + {report.extra_layers} for multi-token prediction" if report.extra_layers else ""
    around = f" around {report.around}" if report.around else ""
    yield from _wrapped(f"{report.came_from}; family {report.family}{around}, {report.layers} layers{extra}", width)
    several = len(source.dtypes) > 1
    dtypes = ", ".join(
        f"{dtype} ({n})" if several else dtype for dtype, n in sorted(source.dtypes.items(), key=lambda item: -item[1])
    )
    files = "1 file" if source.files == 1 else f"{source.files} files"
    yield from _wrapped(f"{files}, {decimal(source.nbytes)}, {source.tensors} tensors: {dtypes}", width)
    if report.published:
        yield f"  becomes {report.format}: the published files"
    else:
        ranks = "1 rank" if report.mesh.world == 1 else f"{report.mesh.world} ranks"
        yield from _wrapped(f"becomes {report.format}, {report.mesh}: {ranks}", width)


def _on_disk(report: Report, width: int) -> Iterator[str]:
    head = min(max(4, *(len(group.ranks) for group in report.ranks)), width - 60)
    yield f"  {'rank':<{head}}  {'tensors':>7}  {'weights':>9}"
    for group in report.ranks:
        *before, ranks = textwrap.wrap(group.ranks, head)
        yield from (f"  {line}" for line in before)
        yield f"  {ranks:<{head}}  {group.tensors:>7}  {decimal(group.nbytes):>9}  {group.nbytes:>19,} bytes"
    yield f"  balance {report.balance:.3f} (largest over mean)"
    parts = [
        f"{decimal(report.logical)} of the model",
        f"{decimal(report.replicated)} replicated",
        f"{decimal(report.padding)} padding",
    ]
    if report.constants:
        parts.append(f"{decimal(report.constants)} constants")
    yield from _wrapped(f"stored {decimal(report.stored)}: {', '.join(parts)}", width)
    if report.repeated_bytes:
        towers = {leaf: row.tower for kind in report.kinds for row in kind.rows if row.tower for leaf in row.logical}
        together: Counter[str] = Counter()
        for name, nbytes in report.repeated_bytes.items():
            together[towers.get(name, name)] += nbytes
        most = sorted(together.items(), key=lambda item: (-item[1], item[0]))
        names = [f"{name} {decimal(n)}" for name, n in most[:6]]
        if rest := most[6:]:
            names.append(f"{len(rest)} more {decimal(sum(n for _, n in rest))}")
        yield from _wrapped(f"replicated: {', '.join(names)}", width)
    for axis, (size, n) in report.repeats.items():
        yield from _wrapped(f"repeated: each of the {size} {axis} is stored on {n} ranks", width)
    about = "" if report.disk_exact else "about "
    yield f"  disk needed {about}{decimal(report.disk)}"
    workers = "1 worker" if report.workers == 1 else f"{report.workers} workers"
    yield f"  memory while converting at most {binary(report.memory)} ({workers})"


def _rows(report: Report, width: int) -> Iterator[str]:
    yield from _wrapped(LEGEND if report.mesh.world > 1 else "Stored as:", width, "")
    for at, kind in enumerate(report.kinds):
        yield ""
        start = _common_start(kind) if kind.layers else ""
        like = next((other for other in report.kinds[:at] if other.layers and _within(other, kind)), None)
        if kind.layers:
            kinds = f" ({', '.join(kind.kinds)})" if kind.kinds else ""
            title = f"layers {kind.layers}" if kind.count > 1 else f"layer {kind.layers}"
            each = " each" if kind.count > 1 else ""
            beside = f"as layers {like.layers}, and " if like else ""
            yield from _wrapped(f"{title}{kinds}, {decimal(kind.nbytes)}{each}: {beside}{start}…", width)
        else:
            yield "  outside the layers" + (f", {decimal(kind.nbytes)}" if report.mesh.pp == 1 else "")
        rows = [row for row in kind.rows if not row.tower and (like is None or row not in like.rows)]
        names = [row.name.removeprefix(start) for row in rows]
        shapes = [_shape(row) for row in rows]
        one, two = min(max(map(len, names)), 26), min(max(map(len, shapes)), 22)
        types = max(len(row.dtype) for row in rows)
        left = 4 + one + 2 + two + 2 + types + 2
        for row, name, shape in zip(rows, names, shapes, strict=True):
            words = textwrap.wrap(_words(row, name, report.mesh.world == 1), width - left) or [""]
            if len(name) > one:
                yield from _long("    " + name, width)
                name = ""
            yield f"    {name:<{one}}  {shape:>{two}}  {row.dtype:<{types}}  {words[0]}"
            yield from (" " * left + more for more in words[1:])
        yield from _towers(kind, report.mesh, width)


def _towers(kind: LayerKind, mesh: Mesh, width: int) -> Iterator[str]:
    """Components that are not split, a line for each."""
    towers: dict[str, list[StoredAs]] = defaultdict(list)
    for row in kind.rows:
        if row.tower:
            towers[row.tower].append(row)
    if towers:
        where = "whole on the first stage" if mesh.pp > 1 else "unchanged" if mesh.world == 1 else "whole on every rank"
        yield ""
        yield from _wrapped(f"other components, not split: {where}", width)
    for name, rows in towers.items():
        count = sum(row.count for row in rows)
        yield f"    {name}  {count} tensor{'s' * (count > 1)}, {decimal(sum(row.nbytes for row in rows))}"


def _words(row: StoredAs, name: str, alone: bool) -> str:
    """How a row is cut (among several ranks), and what is in it, said only where the name does not say it."""
    cut: dict[str, list[str]] = defaultdict(list)  # "column by" → heads, kv
    for how in row.cut:
        way, _, axis = how.rpartition(" ")
        cut[way].append(axis)
    parts = [", ".join(f"{way} {', '.join(axes)}" for way, axes in cut.items()) or ("" if alone else "whole")]
    parts = [part for part in parts if part] if row.logical else ["constant"]
    parts += [f"{axis} on {n} ranks each" for axis, n in row.repeated.items()]
    parts += [f"{axis} padded to {size}" for axis, size in row.padded.items()]
    if row.stage != "every":
        parts.append(f"{row.stage} stage only")
    if row.zero:
        parts.append("zero except on the first rank")
    if row.count > 1:
        parts.append(f"{row.count} tensors")
    if row.logical and row.logical != (name,):
        starts = {leaf[: leaf.rfind(".") + 1] for leaf in row.logical}
        start = starts.pop() if len(starts) == 1 and len(row.logical) > 1 else ""
        parts.append(
            "of " + ", ".join(leaf.removeprefix(start) if name.startswith(start) else leaf for leaf in row.logical)
        )
    if row.gathered:
        parts.append("transposed or interleaved")
    return "; ".join(parts)


def _on_device(report: Report, width: int) -> Iterator[str]:
    cache, device = report.cache, report.device
    title = "At run time"
    if device is not None:
        title += (
            f" on {binary(device.memory)} per device, {binary(device.usable)} of it usable "
            f"({capacity.RESERVE_PERCENT} % reserved)"
        )
    if report.context:
        title += f", context {report.context}, batch {report.batch}"
    yield from _wrapped(title + ":", width, "")
    head = min(max(4, *(len(group.ranks) for group in report.ranks)), width - 50)
    yield f"  {'rank':<{head}}  {'weights':>11}  {'KV cache':>11}  {'total':>11}"
    for group in report.ranks:
        *before, ranks = textwrap.wrap(group.ranks, head)
        yield from (f"  {line}" for line in before)
        both = group.nbytes + (group.cache or 0)
        kept = "not counted" if group.cache is None else binary(group.cache)
        verdict = "" if device is None else "  fits" if both <= device.usable else "  too large"
        yield f"  {ranks:<{head}}  {binary(group.nbytes):>11}  {kept:>11}  {binary(both):>11}{verdict}"
    if cache is not None:
        short = f", {len(cache.windowed)} of them at most {cache.window} tokens" if cache.windowed else ""
        yield from _wrapped(f"KV cache in {'/'.join(cache.dtypes)}, {cache.layers} layers{short}", width)
        if report.extra_layers:
            yield from _wrapped("multi-token prediction layers cache nothing in ordinary decoding", width)
    elif report.context:
        yield from _wrapped(
            f"KV cache not counted: the table of family {report.family} does not say what is cached", width
        )
    else:
        yield from _wrapped("KV cache not counted: give --context", width)
    if device is None:
        return
    if device.fits:
        yield from _wrapped(f"fits, with {binary(device.usable - device.worst)} to spare beyond the reserve", width)
    else:
        yield from _wrapped(f"does not fit: {binary(device.worst - device.usable)} over", width)
    if not report.published:
        small = device.smallest
        found = f"{small} ({small.world} rank{'s' if small.world > 1 else ''})" if small else "none"
        yield from _wrapped(f"smallest mesh that fits: {found}", width)


def _command_lines(command: Sequence[str], width: int) -> Iterator[str]:
    """The command, continued where it is too long for one line, an option and its value together."""
    words: list[str] = []
    for word in command:
        if words and words[-1].startswith("--") and not word.startswith("--"):
            words[-1] += " " + shlex.quote(word)
        else:
            words.append(shlex.quote(word))
    line, *rest = words
    for word in rest:
        if len(line) + 1 + len(word) + 2 > width:
            yield line + " \\"
            line = "    " + word
        else:
            line += " " + word
    yield line


_NUMBER = re.compile(r"(?<=[0-9]) (?=(?:[kMG]?B|[MG]iB)\b)")


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Lines that part no number from its unit."""
    lines = textwrap.wrap(
        _NUMBER.sub("\N{NO-BREAK SPACE}", text),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _long(text: str, width: int) -> Iterator[str]:
    for at in range(0, len(text), width):
        yield text[at : at + width]


def _shape(row: StoredAs) -> str:
    sizes = zip(row.least, row.shape, strict=True)
    return " × ".join(str(low) if low == high else f"{low}-{high}" for low, high in sizes) or "scalar"


def _within(part: LayerKind, whole: LayerKind) -> bool:
    """Whether a kind has all that another has, and more."""
    return len(part.rows) < len(whole.rows) and all(row in whole.rows for row in part.rows)


def _common_start(kind: LayerKind) -> str:
    """What all names of a kind begin with, up to a dot."""
    names = [row.name for row in kind.rows]
    start = names[0][: names[0].rfind(".") + 1]
    while start and not all(name.startswith(start) for name in names):
        start = start[: start[:-1].rfind(".") + 1]
    return start


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _mesh(mesh: Mesh | None) -> dict[str, Any] | None:
    if mesh is None:
        return None
    given = {name: list(numbers) for name, numbers in (("weights", mesh.weights), ("layers", mesh.layers)) if numbers}
    return {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep, "world": mesh.world} | given


def facts(source: Source, name: str, *options: str) -> SourceFacts:
    """What a report says of a source; `options` are what the next command must repeat."""
    return SourceFacts(
        name=name,
        files=len({path for path, _ in source.places.values()}),
        nbytes=source.weights_size,
        tensors=len(source.places),
        dtypes=Counter(entry.dtype for _, entry in source.places.values()),
        commit=source.origin.commit,
        carried=sum(file.size for file in source.carried),
        options=options,
    )


def said(revision: str | None, family: str | None) -> list[str]:
    """The options that the next command must repeat."""
    given = (("--revision", revision), ("--family", family))
    return [word for option, value in given if value is not None for word in (option, value)]
