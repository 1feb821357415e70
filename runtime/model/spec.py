"""What a decoder computes: values from a family table's `[model]` and config.json. Knows no weights and no ranks.

The facts, their meanings and defaults are in reshard.tables.facts.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from reshard.errors import ReshardError
from reshard.layout import capacity
from reshard.model.understand import Model
from reshard.tables.config import Config
from reshard.tables.facts import GROWTH, ROUTING
from reshard.tables.families import Family

from .spec_values import Facts

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
        """Raises ReshardError for a family that does not run, and for a config that no value describes."""
        if not table.runs:
            raise ReshardError(
                f'family "{table.name}" converts and merges but does not run: its table does not describe a decoder',
                "verify proves its weights (integrity, weights, sha256); docs/notation.md lists what [model] can say",
            )
        said = Facts(table.model, config.with_defaults(table.defaults))
        for condition in table.model.get("runs", ()):
            if not any(said.config.says(alternative) for alternative in condition.split(" | ")):
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
            scale *= mscale(float(rope.scaling.get("factor", 1)), float(rope.scaling.get("mscale_all_dim") or 0)) ** 2
        offset = int(said.number("pos_offset"))
        return cls(
            norm=said.given("norm"),
            norm_offset=said.number("norm_offset"),
            bare=frozenset(table.model.get("bare", ())) - ({"norm"} if said.true("post_norm") else set()),
            bare_heads=said.true("bare_heads"),
            eps=said.number("eps"),
            eps_latent=said.number("eps_latent"),
            activation=str(said.value("activation")),
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
            index_top=int(said.number("index_top")) if "index_top" in table.model else None,
            index_interleaved=said.true("index_interleaved"),
            logit_cap=said.optional("logit_cap") or None,
            head_norm=said.true("head_norm"),
            routing=_routing(table, said) if "moe.router" in model.tensors else None,
            lenders=capacity.lenders(model, config),
            window=window,
            window_chunks=said.true("window_chunks"),
            windowed=frozenset(windowed),
            positions=sizes["pos"] - offset if learned else None,
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


def _ropes(said: Facts, far: int, close: int) -> tuple[Rope | None, Rope | None]:
    """Angles of the layers without and with a window, whose heads have `far` and `close` features."""
    scaling, given = (dict(said.config.get(key) or {}) for key in ("rope_scaling", "rope_parameters"))
    if any(isinstance(one, dict) for one in given.values()):  # one per kind of layer
        whole, near = (given.get(f"{kind}_attention") for kind in ("full", "sliding"))
    else:
        whole = near = scaling or given
    base = said.optional("rope_near")
    if base is not None and near is whole:
        near = {"rope_theta": base}
    return None if whole is None else _rope(said, far, whole), None if near is None else _rope(said, close, near)


def _rope(said: Facts, size: int, scaling: Mapping[str, Any]) -> Rope:
    get = said.config.get
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    kind = _OLD.get(kind, kind)
    if kind not in KINDS:
        raise ReshardError(f'config.json: unknown rope type "{kind}"', f"the runtime has {', '.join(KINDS)}")
    positions = int(get("max_position_embeddings") or get("n_positions") or 2048)
    fraction = scaling.get("partial_rotary_factor")
    if kind == "proportional" or (kind == "default" and "rope_fraction" not in said.facts):
        fraction = 1.0  # the rest turns with frequency zero; or it is a key that most decoders do not read
    part = size * (said.number("rope_fraction") if fraction is None else fraction)
    return Rope(
        kind=kind,
        size=int(said.number("rope_size", part)),
        base=float(
            scaling.get("rope_theta") or get("rope_theta") or get("rotary_emb_base") or said.number("rope_base")
        ),
        positions=positions,
        original=int(
            scaling.get("original_max_position_embeddings") or get("original_max_position_embeddings") or positions
        ),
        scaling=scaling,
    )


def _growth(table: Family, said: Facts) -> Growth | None:
    of = Facts(table.model.get("growth", {}), said.config, GROWTH)
    by = of.optional("by")
    if by is None or not of.true("if"):
        return None
    return Growth(by, of.number("span"), int(of.number("start")), of.true("unrotated"))


SCORES = ("softmax", "sigmoid", "chosen", "sparsemixer")


def _score(of: Facts) -> str:
    """One of these words, or what config.json says in one of them."""
    word = str(of.given("score"))
    found = word if word in SCORES else of.value("score")
    if found not in SCORES:
        raise ReshardError(
            f"config.json: unknown expert scoring {found!r} ({word})", f"the runtime has {', '.join(SCORES)}"
        )
    return str(found)


def _routing(table: Family, said: Facts) -> Routing:
    facts = table.model.get("routing")
    if not isinstance(facts, dict):
        raise ReshardError(
            f'family "{table.name}" has experts, its table does not say how they are chosen',
            "[model] routing is missing",
        )
    of = Facts(facts, said.config, ROUTING)
    return Routing(
        top=int(of.number("top")),
        score=_score(of),
        renormalize=float(of.value("renormalize") or 0),
        jitter=of.number("jitter"),
        scale=of.number("scale"),
        groups=int(of.number("groups")),
        group_top=int(of.number("group_top")),
        group_best=int(of.number("group_best")),
        weigh_input=of.true("weigh_input"),
        divide=of.number("divide"),
        wide=of.true("wide"),
    )
