"""What a decoder computes: values from a family table's `[model]` and config.json. Knows no weights and no ranks.

The facts, their meanings and defaults are in reshard.tables.facts.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from reshard.errors import ReshardError
from reshard.layout import capacity
from reshard.model.understand import Model, Tensor
from reshard.tables.config import Config
from reshard.tables.facts import ANY, COUNT, GROWTH, PART, POSITIVE, ROUTING, UNSIGNED, Range
from reshard.tables.families import Family
from reshard.tables.notation import block_of
from reshard.tables.schemes import PACKED, SCALE

from .spec_values import Facts, Section, first_number
from .weights import BITS, BLOCK, GROUP

# Keys of config.json for the number of positions.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `size` features of a head are rotated; `scaling`: the parameters of the variant `kind`."""

    kind: str
    size: int
    base: float
    positions: int
    original: int
    scaling: Mapping[str, Any]


@dataclass(frozen=True)
class Growth:
    """Queries are multiplied by 1 + by · log(1 + ⌊position / span⌋), positions from `start`; see the module."""

    by: float
    span: float
    start: int
    unrotated: bool


@dataclass(frozen=True)
class Routing:
    """How a router chooses `top` experts per token, and weights them."""

    top: int
    score: str
    renormalize: float
    jitter: float
    scale: float
    groups: int
    group_top: int
    group_best: int
    weigh_input: bool
    wide: bool
    divide: float = 1.0


@dataclass(frozen=True)
class Spec:
    """All values that the decoder of one model needs; see the module for the words.

    `rope`, `rope_near`: angles of the layers without and with a window; `roped`, `windowed`: layers; `positions`: None
    where there is no limit.
    """

    norm: str
    norm_offset: float
    bare: frozenset[str]
    bare_heads: bool
    eps: float
    eps_latent: float
    activation: str
    gate_limit: float | None
    gate_alpha: float
    up_offset: float
    parallel: bool
    post_norm: bool
    pos_offset: int
    alibi: bool
    alibi_scaled: bool
    rope: Rope | None
    rope_near: Rope | None
    rope_interleaved: bool
    roped: frozenset[int]
    late_qk_norm: bool
    growth: Growth | None
    embed_scale: float
    embed_factor: float | None
    residual_factor: float | None
    logit_factor: float | None
    attn_scale: float
    scale_by_layer: bool
    value_factor: float | None
    attn_cap: float | None
    attn_clip: float | None
    index_top: int | None
    index_interleaved: bool
    logit_cap: float | None
    head_norm: bool
    routing: Routing | None
    lenders: Mapping[int, int]  # borrowing layer → the one that it borrows from
    window: int | None
    window_chunks: bool
    windowed: frozenset[int]
    positions: int | None

    @classmethod
    def of(cls, table: Family, config: Config, model: Model) -> "Spec":
        """Raises ReshardError for a family that does not run, or for values that are not legal or do not fit."""
        spec = cls.read(table, config, model)
        _check_rope(spec, model)
        if spec.routing is not None:
            _check_routing(spec.routing, model.tensors["moe.router"])
        return spec

    @classmethod
    def read(cls, table: Family, config: Config, model: Model) -> "Spec":
        """The same, whatever the sizes of the model."""
        if not table.runs:
            raise ReshardError(
                f'family "{table.name}" converts and merges but does not run: its table does not describe a decoder',
                "verify proves its weights (integrity, weights, sha256); docs/notation.md lists what [model] can say",
            )
        if table.scheme and (odd := _not_dequantised(model)):
            raise ReshardError(
                f'family "{table.name}" converts and merges but does not run: this runtime does not dequantise {odd}',
                "verify proves its weights (integrity, weights, sha256)",
            )
        said = Facts(table.model, config.with_defaults(table.defaults))
        runs = table.model.get("runs")
        for condition in runs if isinstance(runs, list) else ():
            if not said.config.says(condition):
                raise ReshardError(
                    f'config.json: family "{table.name}" runs only with {condition}', "it still converts and merges"
                )
        sizes = model.sizes
        latent = "attn.kv_a" in model.tensors
        window, windowed = capacity.window(model, config)
        head, far, near = _head_sizes(model, frozenset(windowed))
        alibi, learned = said.true("alibi"), "pos_embed" in model.tensors
        rope, rope_near = (None, None) if alibi or learned else _ropes(said, far, near)
        factor = said.optional("attn_factor")
        scale = 1 / math.sqrt(said.number("attn_scale", float(head))) if factor is None else factor
        if latent and rope is not None and rope.kind != "default":
            scale *= mscale(rope.scaling.get("factor", 1.0), rope.scaling.get("mscale_all_dim", 0.0)) ** 2
        offset = said.count("pos_offset")
        return cls(
            norm=said.legal("norm"),
            norm_offset=said.number("norm_offset"),
            bare=frozenset(table.model.get("bare", ())) - ({"norm"} if said.true("post_norm") else set()),
            bare_heads=said.true("bare_heads"),
            eps=said.number("eps"),
            eps_latent=said.number("eps_latent"),
            activation=_activation(said, model),
            gate_limit=said.optional("gate_limit"),
            gate_alpha=said.number("gate_alpha"),
            up_offset=said.number("up_offset"),
            parallel=said.true("parallel"),
            post_norm=said.true("post_norm"),
            pos_offset=offset,
            alibi=alibi,
            alibi_scaled=said.true("alibi_scaled"),
            rope=rope,
            rope_near=rope_near,
            rope_interleaved=said.true("rope_interleaved"),
            roped=frozenset(capacity.layers_of_rule("rope_layers", model, config)),
            late_qk_norm=said.true("late_qk_norm"),
            growth=_growth(table, said),
            embed_scale=math.sqrt(said.number("embed_scale")),
            embed_factor=said.optional("embed_factor"),
            residual_factor=said.optional("residual_factor"),
            logit_factor=said.optional("logit_factor"),
            attn_scale=scale,
            scale_by_layer=said.true("scale_by_layer"),
            value_factor=said.optional("value_factor"),
            attn_cap=said.optional("attn_cap") or None,
            attn_clip=said.optional("attn_clip"),
            index_top=said.count("index_top") if "index_top" in table.model else None,
            index_interleaved=said.true("index_interleaved"),
            logit_cap=said.optional("logit_cap") or None,
            head_norm=said.true("head_norm"),
            routing=_routing(table, said) if "moe.router" in model.tensors else None,
            lenders=capacity.lenders(model, config),
            window=window,
            window_chunks=said.true("window_chunks"),
            windowed=frozenset(windowed),
            positions=_positions(sizes["pos"], offset) if learned else None,
        )


def mscale(factor: float, weight: float) -> float:
    """YaRN's correction of magnitudes."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _head_sizes(model: Model, windowed: Set[int]) -> tuple[int, int, int]:
    """Features of a query head, and features that could be rotated in layers without and with a window."""
    if "attn.kv_a" in model.tensors:
        return model.sizes["qk_dim"], model.sizes["rope_dim"], model.sizes["rope_dim"]
    found: dict[bool, int] = {}
    for layer in range(model.main_layers):
        if (tensor := model.form("attn.q", layer)) is not None:
            found[layer in windowed] = next(
                model.sizes[axis] for axis in tensor.axes if axis.partition("@")[0] in ("qk_dim", "head_dim")
            )
    far = found.get(False, found.get(True, 0)) or model.sizes.get("head_dim", 0)
    return far, far, found.get(True, far)


KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_OLD = {"su": "longrope", "mrope": "default"}  # for text, positions are equal along every axis of an image
_BASE = Range(1.0001, 1e30, "a number above 1")
# What a variant may say beside its kind, and what it must.
_SCALING = {
    "factor": POSITIVE,
    "alpha": POSITIVE,
    "attention_factor": POSITIVE,
    "partial_rotary_factor": PART,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "mscale": UNSIGNED,
    "mscale_all_dim": UNSIGNED,
    "short_mscale": ANY,
    "long_mscale": ANY,
}
_NEEDED = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "linear": ("factor",)}


def _ropes(said: Facts, far: int, close: int) -> tuple[Rope | None, Rope | None]:
    """Angles of the layers without and with a window, whose heads have `far` and `close` features."""
    scaling, given = (Section.of(said.config.get(key), key) for key in ("rope_scaling", "rope_parameters"))
    whole: Section | None
    near: Section | None
    if any(isinstance(one, dict) for one in given.data.values()):  # one per kind of layer
        whole, near = (
            None if given.data.get(kind) is None else Section.of(given.data[kind], f"rope_parameters.{kind}")
            for kind in ("full_attention", "sliding_attention")
        )
    else:
        whole = near = scaling if scaling.data else given
    base = said.optional("rope_near")
    if base is not None and near is whole:
        near = Section({"rope_theta": base}, "rope_near")
    return None if whole is None else _rope(said, far, whole), None if near is None else _rope(said, close, near)


def _rope(said: Facts, size: int, section: Section) -> Rope:
    where = section.where
    kind = str(section.data.get("rope_type") or section.data.get("type") or "default")
    kind = _OLD.get(kind, kind)
    if kind not in KINDS:
        raise ReshardError(f'config.json: unknown rope type "{kind}"', f"the runtime has {', '.join(KINDS)}")
    positions = int(first_number(said.config, ("max_position_embeddings", "n_positions"), COUNT) or 2048)
    original = first_number(said.config, ("original_max_position_embeddings",), COUNT)
    original = section.number("original_max_position_embeddings", COUNT) or original or positions
    scaling: dict[str, Any] = {
        key: found for key, legal in _SCALING.items() if (found := section.number(key, legal)) is not None
    }
    for key in _NEEDED.get(kind, ()):
        section.needed(key, POSITIVE)
    if "truncate" in section.data:
        scaling["truncate"] = bool(section.data["truncate"])
    fraction = scaling.get("partial_rotary_factor")
    if kind == "proportional" or (kind == "default" and "rope_fraction" not in said.facts):
        fraction = 1.0  # the rest turns with frequency zero; or it is a key that most decoders do not read
    part = size * (said.number("rope_fraction") if fraction is None else fraction)
    turned = said.count("rope_size") if "rope_size" in said.facts else int(part)
    if kind == "longrope":
        scaling |= {key: section.numbers(key, POSITIVE) for key in ("short_factor", "long_factor")}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ReshardError(
            f"config.json: {where}: high_freq_factor is {scaling['high_freq_factor']}, expected more than "
            f"low_freq_factor = {scaling['low_freq_factor']}"
        )
    base = section.number("rope_theta", _BASE) or first_number(said.config, ("rope_theta", "rotary_emb_base"), _BASE)
    return Rope(
        kind=kind,
        size=turned,
        base=base or said.number("rope_base"),
        positions=positions,
        original=max(int(original), 2),
        scaling=scaling,
    )


def _activation(said: Facts, model: Model) -> str:
    """Raises ReshardError for one that needs weights that the layers lack."""
    word = str(said.legal("activation"))
    gated = any(name in model.tensors for name in ("mlp.gate", "mlp.gate_up"))
    if word == "xielu" and (gated or "mlp.act_beta" not in model.tensors):
        raise ReshardError("config.json: the activation xielu has weights of its own, the layers have none for it")
    return word


def _positions(rows: int, offset: int) -> int:
    if offset >= rows:
        raise ReshardError(f"[model] pos_offset is {offset}, the table of positions has {rows} rows")
    return rows - offset


def _growth(table: Family, said: Facts) -> Growth | None:
    of = Facts(table.model.get("growth", {}), said.config, GROWTH)
    by = of.optional("by")
    if by is None or not of.true("if"):
        return None
    return Growth(by, of.number("span"), of.count("start"), of.true("unrotated"))


def _routing(table: Family, said: Facts) -> Routing:
    facts = table.model.get("routing")
    if not isinstance(facts, dict):
        raise ReshardError(
            f'family "{table.name}" has experts, its table does not say how they are chosen',
            "[model] routing is missing",
        )
    of = Facts(facts, said.config, ROUTING)
    renormalize = of.value("renormalize")
    return Routing(
        top=of.count("top"),
        score=str(of.legal("score")),
        renormalize=float(bool(renormalize) if renormalize in (None, True, False) else of.number("renormalize")),
        jitter=of.number("jitter"),
        scale=of.number("scale"),
        groups=of.count("groups"),
        group_top=of.count("group_top"),
        group_best=of.count("group_best"),
        weigh_input=of.true("weigh_input"),
        divide=of.number("divide"),
        wide=of.true("wide"),
    )


# Parts that a row of the runtime's own layout fuses.
_FUSED = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("moe.gate", "moe.up"), ("shared.gate", "shared.up"))


# Schemes whose numbers are the stored ones times their scales.
_SCALED = ("fp8", "fbgemm_fp8", "compressed_tensors", "modelopt", "torchao")


def _not_dequantised(model: Model) -> str:
    """What of a quantised model Weights.matrix cannot read: it knows BLOCK, rows, and BITS packed by GROUP."""
    if model.family.scheme not in _SCALED:
        return model.family.scheme
    parts = model.family.parts - {"packed", "scale"}
    for name, tensor in model.tensors.items():
        base = name.partition("@")[0]
        if found := next((part for part in parts if base.endswith(f"_{part}")), None):
            return f"{found} of {base.removesuffix(f'_{found}')}"
        units = {block[1] for axis in tensor.axes if (block := block_of(axis))}
        if base.endswith(PACKED) and (tensor.dtypes != ("I32",) or units != {32 // BITS}):
            return f"{base} in {'/'.join(tensor.dtypes)}"
        packed = base.removesuffix(SCALE) + PACKED in model.tensors
        plain = [axis for axis in tensor.axes if axis not in ("layer", "experts")]
        if base.endswith(SCALE) and (units != {GROUP} if packed else bool(units - {BLOCK}) or not plain):
            return f"{base} of blocks of {'/'.join(map(str, sorted(units))) or 'a whole matrix'}"
    for names in _FUSED:
        forms = ((model.tensors.get(name), model.tensors.get(name + PACKED)) for name in names)
        held = {tuple((each.dtypes, each.layers) if each else None for each in both) for both in forms if any(both)}
        if len(held) > 1:
            return f"{', '.join(names)} of several kinds"
    return ""


def _check_rope(spec: Spec, model: Model) -> None:
    """Raises ReshardError where angles and heads do not fit each other."""
    sizes = _head_sizes(model, spec.windowed)[1:]
    for rope, size in zip((spec.rope, spec.rope_near), sizes, strict=True):
        if rope is None:
            continue
        turned = 2 * -(-rope.size // 2)  # in pairs
        if turned > size or (rope.kind == "dynamic" and turned <= 2):
            raise ReshardError(f"config.json: {turned} features of a head of {size} would be rotated ({rope.kind})")
        for key in ("short_factor", "long_factor"):
            if len(rope.scaling.get(key, range(turned // 2))) != turned // 2:
                raise ReshardError(
                    f"config.json: {key} of rotary positions has {len(rope.scaling[key])} numbers, {turned // 2} are "
                    f"needed: one for each pair of the {turned} rotated features"
                )


def _check_routing(routing: Routing, router: Tensor) -> None:
    """Raises ReshardError where that many cannot be chosen among the experts that there are."""
    sizes = dict(zip(router.axes, router.sizes, strict=True))
    (experts,) = (size for axis, size in sizes.items() if axis not in ("layer", "hidden"))
    grouped = routing.groups > 1
    if experts % routing.groups:
        raise ReshardError(f"config.json: {experts} experts cannot be divided into {routing.groups} groups")
    each = experts // routing.groups
    for what, count, of_, there in (
        ("groups are chosen", routing.group_top if grouped else 1, "groups", routing.groups),
        ("best scores count for a group", routing.group_best if grouped else 1, "experts in each", each),
        ("experts are chosen per token", routing.top, "that can be", each * (routing.group_top if grouped else 1)),
    ):
        if count > there:
            raise ReshardError(f"config.json: {count} {what}, there are {there} {of_}")
