"""What a mesh costs at run time: weights and KV cache per rank, whether they fit a device, and which meshes would.

Pure arithmetic on a model, its config and a layout. Knows nothing about files, and no family by name: a table's
`[model]` says

    cache          the logical tensors whose output a decoder keeps per token and layer, e.g. ["attn.k", "attn.v"];
                   every axis but `layer` and `hidden` counts. Which heads a rank keeps follows from where the layout
                   puts those tensors, so a repeated KV head is counted on each rank, and a latent cache (["attn.kv_a",
                   "attn.k_rope"]) is whole on all
    window         size expression for the tokens that a windowed layer keeps; missing, null or 0: no layer has a window
    window_if      config key that must be true (`!key`: false), else no layer has a window
    window_layers  which layers have it, by a rule, see `reshard.tables.layer_rules`. Default: all
    borrowed       the layers that keep nothing and look up what earlier ones keep, by such a rule; stages behind these
                   keep it, too

A cache element has the dtype of the weights that make it, at least 16 bits: checkpoints in FP8 are served with a 16-bit
cache. Layers beyond the main ones (multi-token prediction) keep nothing in ordinary decoding and are not counted.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..containers.dtypes import BITS, wide
from ..errors import ReshardError
from ..model.understand import Config, Model
from ..tables.facts import FACTS
from ..tables.formats import Format
from ..tables.layer_rules import layers_named
from ..tables.schemes import PACKED
from ..text.units import folded
from .cut import Layout, Piece, Slot, lay_out
from .mesh import Coordinate, Mesh, shares

RESERVE_PERCENT = 10  # of the device memory: activations, communication buffers, the allocator's waste
WIDEST_TP = 64  # what `smallest` tries before it adds pipeline stages
TRIED_TP = 128  # `sizes_that_work` looks at least this far

# --- bytes ------------------------------------------------------------------------------------------------------------


def slot_bytes(layout: Layout, slot: Slot) -> int:
    """Bytes of the stored tensors of a slot, padding and constants included."""
    per_point = slot.elements * math.prod(high - low for axis, (low, high) in slot.box.items() if axis != "layer")
    if "layer" not in slot.box:
        return per_point * BITS[layout.dtype(slot, {})] // 8
    return per_point * sum(BITS[layout.dtype(slot, {"layer": layer})] for layer in layers_of(slot)) // 8


def layers_of(slot: Slot) -> tuple[int, ...]:
    """The layers at which a slot has stored tensors; empty where its name enumerates none."""
    low, high = slot.box.get("layer", (0, 0))
    return tuple(layer for layer in slot.layers or () if low <= layer < high)


def piece_bytes(piece: Piece) -> int:
    """Bytes of the logical tensor that a piece holds, without padding."""
    tensor, low, high = piece.tensor, 0, 0
    elements = 1
    for axis, (start, stop) in zip(tensor.axes, piece.box, strict=True):
        if axis == "layer":
            low, high = start, stop
        else:
            elements *= stop - start
    if "layer" not in tensor.axes:
        return elements * BITS[tensor.dtypes[0]] // 8
    exist = piece.slot.layers if piece.slot.layers is not None else tensor.layers or ()
    return elements * sum(BITS[tensor.dtype({"layer": layer})] for layer in exist if low <= layer < high) // 8


def weight_bytes(layout: Layout) -> tuple[int, ...]:
    """Bytes of stored tensors per rank."""
    return tuple(sum(slot_bytes(layout, slot) for slot in slots) for slots in layout.by_rank)


# --- cache ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cache:
    """What decoding keeps: bytes per rank for `batch` sequences of `context` tokens. `windowed`: layers that keep
    `window` tokens.
    """

    context: int
    batch: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]  # of the elements kept
    layers: int
    windowed: tuple[int, ...] = ()
    window: int | None = None


def window(model: Model, config: Config) -> tuple[int | None, tuple[int, ...]]:
    """Tokens that a windowed layer keeps, and the layers that have a window."""
    tokens, layers = _windowed(model, config.with_defaults(model.family.defaults))
    return (tokens, layers) if tokens and layers else (None, ())


def layers_of_rule(fact: str, model: Model, config: Config) -> tuple[int, ...]:
    """The layers that a fact of `[model]` names."""
    config = config.with_defaults(model.family.defaults)

    def windowed() -> tuple[int, ...] | None:
        tokens, layers = _windowed(model, config)
        return layers if tokens else None

    return layers_named(model.family.model.get(fact, FACTS[fact].default), model.main_layers, config, windowed)


def _windowed(model: Model, config: Config) -> tuple[int | None, tuple[int, ...]]:
    """The window, if config.json gives one, and the layers that would have it."""
    facts = model.family.model
    if "window" not in facts or ("window_if" in facts and not config.says(facts["window_if"])):
        return None, ()
    layers = layers_named(facts.get("window_layers", "all"), model.main_layers, config, lambda: None)
    return config.size(facts["window"]), layers


def cache(layout: Layout, config: Config, context: int, batch: int) -> Cache | None:
    """The KV cache on each rank of a layout; None where the family table does not say what is cached."""
    model = layout.model
    names = [
        key
        for name in model.family.model.get("cache", ())
        for key in ((name,) if name in model.tensors else model.forms(name))
    ]
    if not names:
        return None
    tokens, windowed = window(model, config)
    short = set(windowed)
    ranks = [0] * layout.mesh.world
    dtypes: dict[str, None] = {}
    borrowed = lenders(model, config)
    for name in names:
        tensor = model.tensors[name]
        both = {layer for layer in tensor.layers or () if _holds_values(name, layer, model)}
        for piece in layout.holding(name):
            ranges = layout.ranges(piece)
            per_token = math.prod(high - low for axis, (low, high) in ranges.items() if axis not in ("layer", "hidden"))
            low, high = ranges["layer"]
            for layer in piece.slot.layers if piece.slot.layers is not None else tensor.layers or ():
                if low <= layer < min(high, model.main_layers):
                    dtype = _cache_dtype(tensor.dtype({"layer": layer}))
                    dtypes[dtype] = None
                    kept = min(context, tokens) if tokens and layer in short else context
                    kept *= 2 if layer in both else 1
                    for rank in _keeping(layer, piece.slot.rank, layout, borrowed):
                        ranks[rank] += per_token * kept * batch * BITS[dtype] // 8
    return Cache(context, batch, tuple(ranks), tuple(dtypes), model.main_layers, windowed, tokens)


def _holds_values(name: str, layer: int, model: Model) -> bool:
    """Whether a layer that keeps what a tensor gives has no values beside these keys: the same, normalised otherwise,
    are its values.
    """
    return name.partition("@")[0].removesuffix(PACKED) == "attn.k" and model.form("attn.v", layer) is None


def _keeping(layer: int, rank: int, layout: Layout, borrowed: Mapping[int, int]) -> Iterator[int]:
    """The rank that has a layer, and in other stages with layers that borrow from it those that have the same heads."""
    beside, borrowers = (
        layout.mesh.world // layout.mesh.pp,
        [other for other, lender in borrowed.items() if lender == layer],
    )
    for stage, (start, end) in enumerate(layout.stages):
        if stage == rank // beside or any(start <= other < end for other in borrowers):
            yield rank + (stage - rank // beside) * beside


def lenders(model: Model, config: Config) -> dict[int, int]:
    """For each layer that borrows keys and values the last one before it of its kind, with a window or without,
    that has its own.
    """
    if "borrowed" not in model.family.model:
        return {}
    borrowing, windowed = layers_of_rule("borrowed", model, config), set(window(model, config)[1])
    found = {}
    for layer in borrowing:
        own = [other for other in range(layer) if other not in borrowing and (other in windowed) == (layer in windowed)]
        if model.form("attn.k", layer) is not None:
            raise ReshardError(
                f"[model] borrowed: layer {layer} would borrow keys and values, and the checkpoint has its own"
            )
        if not own:
            raise ReshardError(
                f"config.json: layer {layer} borrows keys and values, and no layer of its kind before it has its own"
            )
        found[layer] = own[-1]
    return found


def _cache_dtype(dtype: str) -> str:
    return dtype if wide(dtype) else "BF16"


# --- fitting ----------------------------------------------------------------------------------------------------------


def usable(device_memory: int) -> int:
    """Bytes of a device that weights and cache may take: all but the reserve."""
    return device_memory * (100 - RESERVE_PERCENT) // 100


def needed(layout: Layout, config: Config, context: int | None, batch: int) -> tuple[int, ...]:
    """Bytes of weights and cache per rank; without a context, of weights alone."""
    weights = weight_bytes(layout)
    kept = cache(layout, config, context, batch) if context else None
    return weights if kept is None else tuple(map(sum, zip(weights, kept.ranks, strict=True)))


def fits(layout: Layout, config: Config, device_memory: int, context: int | None, batch: int) -> bool:
    """Whether weights and cache of the worst rank leave the reserve of a device free."""
    return max(needed(layout, config, context, batch)) <= usable(device_memory)


def smallest(
    model: Model,
    config: Config,
    table: Format,
    device_memory: int,
    context: int | None,
    batch: int,
    *,
    ep: int = 1,
    pp: int | None = None,
) -> Mesh | None:
    """The smallest mesh that fits: tensor parallel alone up to 64 ranks, and only where none of these does, pipeline
    stages too.

    Then the fewest ranks win, and among these the mesh with more tensor parallel ones. `pp` fixes the number of stages.
    None where nothing fits.
    """
    room = usable(device_memory)

    def worst(tp: int, stages: int) -> int | None:
        try:
            return max(needed(lay_out(table, model, _Firsts(tp=tp, pp=stages, ep=ep)), config, context, batch))
        except ReshardError:
            return None

    table = table.refined(model.family.axes)
    sizes = [tp for tp in sizes_that_work(table, model, Mesh(tp=ep, ep=ep, pp=pp or 1)) if tp <= WIDEST_TP]
    alone = {}
    for tp in sizes:
        need = worst(tp, pp or 1)
        if need is not None and need <= room:
            return Mesh(tp=tp, pp=pp or 1, ep=ep)
        alone[tp] = need
    if pp is not None:
        return None
    found: Mesh | None = None
    for tp in reversed(sizes):
        last = worst(tp, model.main_layers)  # one layer per stage: where this does not fit, no number of stages does
        if last is None or last > room:
            continue
        # the stages of a rank add up to no less than the rank without stages
        fewest = max(2, -(-(alone[tp] or 0) // room))
        for stages in range(fewest, model.main_layers + 1):
            if found is not None and tp * stages >= found.world:
                break
            need = worst(tp, stages)
            if need is not None and need <= room:
                found = Mesh(tp=tp, pp=stages, ep=ep)
                break
    return found


class _Firsts(Mesh):
    """A mesh of which only the first rank of each stage is looked at.

    Equal ranks of a stage are accepted or refused alike and hold equally much; where a table allows a remainder, the
    first has it.
    """

    __slots__ = ()

    @property
    def world(self) -> int:
        return self.pp

    def stage(self, rank: int) -> int:
        return rank

    def coordinate(self, axis: str, rank: int) -> Coordinate:
        return Mesh.coordinate(self, axis, rank * self.tp)


# --- sizes that work --------------------------------------------------------------------------------------------------


def sizes_that_work(table: Format, model: Model, mesh: Mesh) -> tuple[int, ...]:
    """The TP sizes for which a format lays a model out, with this mesh's EP and PP and equal ranks;
    empty where PP itself is refused.
    """
    table = table.refined(model.family.axes)
    if mesh.pp > 1 and not _works(table, model, Mesh(pp=mesh.pp, layers=mesh.layers)):
        return ()
    # Stages and tensor parallelism do not limit one another, so one stage is enough to try.
    most = max(TRIED_TP, model.sizes.get("heads", 0))
    return tuple(tp for tp in range(mesh.ep, most + 1, mesh.ep) if _works(table, model, _Firsts(tp=tp, ep=mesh.ep)))


def split_that_works(table: Format, model: Model, mesh: Mesh) -> tuple[int, ...] | None:
    """The `--split` weights with which this TP works although it does not divide; 8 KV heads on TP 3: (3, 3, 2). None
    where none do.

    The weights are whole units of the first axis that the format cuts and that has one for each rank: KV groups, then
    heads, …
    """
    table = table.refined(model.family.axes)
    units, held = model.units, {axis for tensor in model.tensors.values() for axis in tensor.axes}
    atoms = [atom for axis in table.cut.get("tp", ()) for atom in table.axes.get(axis, (axis,)) if atom in held]
    for atom in dict.fromkeys(atoms):
        count = model.sizes[atom] // units.get(atom, 1)
        if count < mesh.tp:
            continue
        counts = [high - low for low, high in shares(count, (1,) * mesh.tp)]
        weights = tuple(n // math.gcd(*counts) for n in counts)
        if len(set(weights)) > 1 and _works(table, model, Mesh(mesh.tp, mesh.pp, mesh.ep, weights, mesh.layers)):
            return weights
    return None


def _works(table: Format, model: Model, mesh: Mesh) -> bool:
    try:
        lay_out(table, model, mesh)
    except ReshardError:
        return False
    return True


def explain_refusal(error: ReshardError, table: Format, model: Model, mesh: Mesh) -> ReshardError:
    """The same refusal of a mesh, its hint naming the sizes that would work; unchanged where the sizes are not what is
    wrong.
    """
    hint = "; or ".join(_remedies(table.refined(model.family.axes), model, mesh))
    if not hint:
        return error
    return type(error)(error.message, hint if error.hint is None else f"{error.hint}; {hint}")


def _remedies(table: Format, model: Model, mesh: Mesh) -> Iterator[str]:
    if mesh.pp > 1 and not _works(table, model, Mesh(pp=mesh.pp, layers=mesh.layers)):
        if mesh.layers is None:
            works = [pp for pp in range(1, model.main_layers + 1) if _works(table, model, _Firsts(pp=pp))]
            yield f"PP sizes that work: {listed(works)}"
        return
    sizes = sizes_that_work(table, model, mesh)
    if mesh.tp in sizes:
        if mesh.weights is not None:
            yield "without --split this mesh works"
        return
    beside = f" with EP {mesh.ep}" if mesh.ep > 1 else ""
    if sizes:
        yield f"TP sizes that work{beside}: {listed(sizes)}"
    elif mesh.ep > 1:
        others = [
            ep for ep in range(1, mesh.tp + 1) if mesh.tp % ep == 0 and _works(table, model, _Firsts(tp=mesh.tp, ep=ep))
        ]
        if others:
            yield f"EP sizes that work with TP {mesh.tp}: {listed(others)}"
        elif plain := sizes_that_work(table, model, Mesh(tp=mesh.tp, pp=mesh.pp)):
            yield f"EP {mesh.ep} never works for this model; TP sizes that work without: {listed(plain)}"
    if (other := _as_many_ranks(table, model, mesh)) is not None:
        yield " ".join(f"--{name} {n}" for name in ("tp", "pp", "ep") if (n := getattr(other, name)) > 1)
    weights = split_that_works(table, model, mesh) if mesh.tp <= WIDEST_TP else None
    if weights is not None and weights != mesh.weights:
        yield f"--tp {mesh.tp} --split {':'.join(map(str, weights))}"


def _as_many_ranks(table: Format, model: Model, mesh: Mesh) -> Mesh | None:
    """A mesh of as many ranks that works: of fewer tensor parallel ones, but as many as can be, and of more stages."""
    if mesh.weights is not None or mesh.layers is not None or mesh.tp > TRIED_TP:
        return None
    for tp in range(mesh.tp - 1, 1, -1):
        if mesh.world % tp or not _works(table, model, Mesh(pp=mesh.world // tp)):
            continue
        for ep in range(min(mesh.ep, tp), 1 if mesh.ep > 1 else 0, -1):
            if tp % ep == 0 and _works(table, model, _Firsts(tp, mesh.world // tp, ep)):
                return Mesh(tp, mesh.world // tp, ep)
    return None


def listed(numbers: Iterable[int]) -> str:
    """Numbers as people write them, runs of four or more folded: 1-8, 12, 16."""
    return folded(numbers, 4)
