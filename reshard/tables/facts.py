"""The facts of `[model]`: what a family computes, beyond what its tensors say.

Each is defined here once: the reader checks tables by it, docs/notation.md lists it, the runtime takes its default, and
a numeric difference in a part of a step is explained by the facts of that part.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ReshardError
from ..inputs import decode

VALUE = (bool, int, float, str, [str])  # a constant, alternatives answered by config.json, or conditions of which one must be true
NUMBER = (int, float, str)
TRUTH = (bool, str, [str])
EPS = "rms_norm_eps | layer_norm_epsilon | layer_norm_eps | layernorm_epsilon | norm_eps | 0.000001"


class Fact(NamedTuple):
    """`form`: of its value, as inputs.decode has forms; `meaning`: Markdown; `default`: where a family does not say it."""

    form: Any
    meaning: str
    default: Any = None


ROUTING: Mapping[str, Fact] = {
    "top": Fact(NUMBER, "experts per token, default `num_experts_per_tok`", "num_experts_per_tok"),
    "score": Fact(
        str,
        '`"softmax"` (default), `"sigmoid"`, `"chosen"`: softmax over those chosen, `"sparsemixer"`: each choice by softmax over what is '
        "left, without what is much worse than the best of that; or what config.json says: `score_function | =softmax`",
        "softmax",
    ),
    "jitter": Fact(NUMBER, "of the sparsemixer: half of what counts as much worse, relatively", 0.0),
    "renormalize": Fact(VALUE, "weights are divided by their sum, or, if this is a number, by their norm of that order"),
    "scale": Fact(NUMBER, "weights are multiplied by it, after renormalization", 1.0),
    "groups": Fact(NUMBER, "experts are chosen in `group_top` of this many groups", 1.0),
    "group_top": Fact(NUMBER, "groups to choose from: those with the greatest sum of their `group_best` best scores", 1.0),
    "group_best": Fact(NUMBER, "scores that count for a group, default 2", 2.0),
    "divide": Fact(NUMBER, "the output of the router's own norm is divided by its square root", 1.0),
    "weigh_input": Fact(TRUTH, "weights multiply an expert's input, not its output"),
    "wide": Fact(TRUTH, "the router works in float32"),
}
GROWTH: Mapping[str, Fact] = {
    "by": Fact(NUMBER, "factor of the logarithm"),
    "span": Fact(NUMBER, "positions per step"),
    "start": Fact(NUMBER, "positions count from it", 0.0),
    "unrotated": Fact(TRUTH, "only in layers without rotary positions"),
    "if": Fact(TRUTH, "only where this is true", "true"),
}
# Which facts bear on which part of a step; `layer`: on how its parts are put together; "": on whether and what anything runs at all.
PARTS: Mapping[str, Mapping[str, Fact]] = {
    "embedding": {
        "embed_scale": Fact(NUMBER, "embeddings are multiplied by its square root", 1.0),
        "embed_factor": Fact(NUMBER, "embeddings are multiplied by it"),
        "pos_offset": Fact(NUMBER, "rows of `pos_embed` before that of the first position", 0.0),
    },
    "norm": {
        "norm": Fact(str, '`"rms"` (default) or `"layer"`', "rms"),
        "norm_offset": Fact(NUMBER, "1 where norms multiply by 1 + weight", 0.0),
        "bare": Fact([str], "norms that have no weights, a list of their logical names", ()),
        "eps": Fact(NUMBER, "of norms; default: the key for it that config.json has", EPS),
    },
    "attention": {
        "rope_interleaved": Fact(TRUTH, "the two features of a rotated pair are adjacent, not half a head apart"),
        "rope_fraction": Fact(NUMBER, "the part of a head that is rotated", 1.0),
        "rope_size": Fact(NUMBER, "features of a head that are rotated, in place of `rope_fraction`"),
        "rope_layers": Fact(str, "the layers that rotate, by a rule; default: `all`", "all"),
        "rope_base": Fact(NUMBER, "base of the angles where neither `rope_parameters` nor `rope_theta` gives one; default: 10000", 10000.0),
        "rope_near": Fact(
            NUMBER,
            "base of the angles of layers with a window, never scaled; default: config.json gives each kind of layer its own, or all "
            "have the same",
        ),
        "alibi": Fact(TRUTH, "positions are a bias on the scores"),
        "alibi_scaled": Fact(TRUTH, "that bias is in bfloat16, and scaled as scores are"),
        "attn_scale": Fact(NUMBER, "scores are divided by its square root; default: features of a head"),
        "attn_factor": Fact(NUMBER, "scores are multiplied by it instead"),
        "scale_by_layer": Fact(TRUTH, "scores are also divided by the layer's number, from 1"),
        "attn_cap": Fact(NUMBER, "soft cap of scores; 0: none"),
        "attn_clip": Fact(NUMBER, "queries, keys and values are clamped to ± this"),
        "value_factor": Fact(NUMBER, "values are multiplied by it"),
        "growth": Fact(
            {"": object},
            "`{ by, span }`: queries are multiplied by 1 + by · log(1 + ⌊position / span⌋); `start`: positions count from it; "
            "`unrotated`: in layers that do not rotate; `if`: where this is true",
            {},
        ),
        "late_qk_norm": Fact(TRUTH, "norms of query and key heads come after their rotation"),
        "bare_heads": Fact(TRUTH, "query and key heads have a norm without weights in the layers that rotate"),
        "window": Fact(str, "size expression: tokens that a windowed layer keeps"),
        "window_if": Fact(str, "config key that must be true, else no layer has a window"),
        "window_layers": Fact(str, "the layers that have it, by a rule, see below; default: `all`", "all"),
        "window_chunks": Fact(TRUTH, "windows do not slide: a token sees what came before it in its own chunk of so many tokens"),
        "borrowed": Fact(
            str,
            "the layers that look up keys and values of the last one of their kind, with a window or without, that has its own, by a rule",
            "",
        ),
        "index_top": Fact(NUMBER, "tokens that a layer's indexer lets a token see"),
        "index_interleaved": Fact(TRUTH, "as `rope_interleaved`, of indexers"),
        "eps_latent": Fact(NUMBER, "of the norms inside latent attention; default: as `eps`", EPS),
    },
    "feed-forward": {
        "activation": Fact(str, "default: `hidden_act`", "hidden_act | =silu"),
        "gate_limit": Fact(NUMBER, "clamp of a gated unit: (up + up_offset) · gate · sigmoid(gate_alpha · gate)"),
        "gate_alpha": Fact(NUMBER, "of that unit", 1.0),
        "up_offset": Fact(NUMBER, "of that unit", 0.0),
    },
    "experts": {"routing": Fact({"": object}, "of experts, see below")},
    "residual": {"residual_factor": Fact(NUMBER, "what a layer adds is multiplied by it")},
    "layer": {
        "parallel": Fact(TRUTH, "attention and feed-forward both start from the layer's input"),
        "post_norm": Fact(TRUTH, "`attn_norm` and `mlp_norm` come after the residual addition, and there is no final norm"),
    },
    "head": {
        "logit_factor": Fact(NUMBER, "logits are multiplied by it"),
        "logit_cap": Fact(NUMBER, "soft cap of logits; 0: none"),
        "head_norm": Fact(TRUTH, "rows of the head are divided by their lengths"),
    },
    "": {
        "cache": Fact([str], "the logical tensors whose outputs decoding keeps, per token", ()),
        "runs": Fact(
            (bool, [str]),
            "`false`: these facts are not enough; the family converts, merges and does not run. Or what must be true of config.json, a "
            "list, as in `[optional]`, alternatives by `|`",
            (),
        ),
    },
}
FACTS: Mapping[str, Fact] = {name: fact for part in PARTS.values() for name, fact in part.items()}


def check(model: Mapping[str, Any], where: str) -> None:
    """Raises ReshardError for a fact that is not known, or not of its form."""
    for place, data, known in (
        ("model", model, FACTS),
        ("model.routing", model.get("routing", {}), ROUTING),
        ("model.growth", model.get("growth", {}), GROWTH),
    ):
        section, _, key = place.partition(".")
        if said := decode.wrong(data, {f"{name}?": fact.form for name, fact in known.items()}, place):
            raise ReshardError(f"{where}: {said}", "docs/notation.md shows the form of every key")
        if odd := sorted(data.keys() - known.keys()):
            name = f"[{section}] {key}".rstrip()
            raise ReshardError(f"{where}: unknown key {odd[0]} in {name}", f"keys are {', '.join(sorted(known))}")
