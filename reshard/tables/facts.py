"""The facts of `[model]`: what a family computes, beyond what its tensors say.

Each is defined here once: the reader checks tables by it, docs/notation.md lists it, the runtime takes its default and
refuses values that are not legal, and a numeric difference in a part of a step is explained by the facts of that part.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ReshardError
from ..inputs import decode
from . import expression, layer_rules

# What a table may say of each kind of fact.
FORMS: Mapping[str, Any] = {
    "number": int | float | str,  # a constant, or an expression
    "truth": bool | str | list[str],  # a constant, an expression, or a list of conditions of which one must be true
    "either": bool | int | float | str | list[str],  # a truth or a number
    "word": str,  # an expression that comes to one of some words
    "name": str,  # one of some words, or an expression that comes to one
    "size": str,  # an expression that comes to a number of elements
    "condition": str,
    "rule": str,  # which layers, see layer_rules
    "names": list[str],  # of logical tensors
    "runs": bool | list[str],  # a constant, or a list of conditions that must all be true
    "facts": dict[str, Any],  # a table of further facts
}
EPS = "rms_norm_eps | layer_norm_epsilon | layer_norm_eps | layernorm_epsilon | norm_eps | 0.000001"


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included; `whole`: integers only; `words`: what they are, for a message."""

    low: float
    high: float
    words: str
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and not (self.whole and value % 1)


_MOST = 1e30  # far below where float32 ends, far above every fact of every published model
ANY = Range(-1e300, 1e300, "a finite number")
UNSIGNED = Range(0, _MOST, "a finite number that is not negative")
POSITIVE = Range(sys.float_info.min, _MOST, "a positive number")
PART = Range(0, 1, "a number from 0 to 1")
COUNT = Range(1, 2**31 - 1, "a positive integer", whole=True)
NATURAL = Range(0, 2**31 - 1, "a non-negative integer", whole=True)

SCORES = ("softmax", "sigmoid", "chosen", "sparsemixer")
ACTIVATIONS = (
    *("silu", "swish", "relu", "relu2", "xielu"),
    *("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu"),
)


class Fact(NamedTuple):
    """`kind`: a key of FORMS; `meaning`: Markdown; `default`: where a family does not say it; `legal`:
    what it may come to.
    """

    kind: str
    meaning: str
    default: Any = None
    legal: Range | tuple[str, ...] | None = None


ROUTING: Mapping[str, Fact] = {
    "top": Fact("number", "experts per token, default `num_experts_per_tok`", "num_experts_per_tok", legal=COUNT),
    "score": Fact(
        "name",
        '`"softmax"` (default), `"sigmoid"`, `"chosen"`: softmax over those chosen, `"sparsemixer"`: each '
        "choice by softmax over what is "
        "left, without what is much worse than the best of that; or what config.json says: `score_function | =softmax`",
        "softmax",
        legal=SCORES,
    ),
    "jitter": Fact("number", "of the sparsemixer: half of what counts as much worse, relatively", 0.0, legal=UNSIGNED),
    "renormalize": Fact(
        "either",
        "weights are divided by their sum, or, if this is a number, by their norm of that order",
        legal=UNSIGNED,
    ),
    "scale": Fact("number", "weights are multiplied by it, after renormalization", 1.0, legal=ANY),
    "groups": Fact("number", "experts are chosen in `group_top` of this many groups", 1.0, legal=COUNT),
    "group_top": Fact(
        "number",
        "groups to choose from: those with the greatest sum of their `group_best` best scores",
        1.0,
        legal=COUNT,
    ),
    "group_best": Fact("number", "scores that count for a group, default 2", 2.0, legal=COUNT),
    "divide": Fact("number", "the output of the router's own norm is divided by its square root", 1.0, legal=POSITIVE),
    "weigh_input": Fact("truth", "weights multiply an expert's input, not its output"),
    "wide": Fact("truth", "the router works in float32"),
}
GROWTH: Mapping[str, Fact] = {
    "by": Fact("number", "factor of the logarithm", legal=ANY),
    "span": Fact("number", "positions per step", legal=POSITIVE),
    "start": Fact("number", "positions count from it", 0.0, legal=NATURAL),
    "unrotated": Fact("truth", "only in layers without rotary positions"),
    "if": Fact("truth", "only where this is true", "true"),
}
# Which facts bear on which part of a step; `layer`: on how its parts are put together; "": on whether and what anything
# runs at all.
PARTS: Mapping[str, Mapping[str, Fact]] = {
    "embedding": {
        "embed_scale": Fact("number", "embeddings are multiplied by its square root", 1.0, legal=UNSIGNED),
        "embed_factor": Fact("number", "embeddings are multiplied by it", legal=ANY),
        "pos_offset": Fact("number", "rows of `pos_embed` before that of the first position", 0.0, legal=NATURAL),
    },
    "norm": {
        "norm": Fact("name", '`"rms"` (default) or `"layer"`', "rms", legal=("rms", "layer")),
        "norm_offset": Fact("number", "1 where norms multiply by 1 + weight", 0.0, legal=ANY),
        "bare": Fact("names", "norms that have no weights, a list of their logical names", ()),
        "eps": Fact("number", "of norms; default: the key for it that config.json has", EPS, legal=UNSIGNED),
    },
    "attention": {
        "rope_interleaved": Fact("truth", "the two features of a rotated pair are adjacent, not half a head apart"),
        "rope_fraction": Fact("number", "the part of a head that is rotated", 1.0, legal=PART),
        "rope_size": Fact("number", "features of a head that are rotated, in place of `rope_fraction`", legal=NATURAL),
        "rope_layers": Fact("rule", "the layers that rotate, by a rule; default: `all`", "all"),
        "rope_base": Fact(
            "number",
            "base of the angles where neither `rope_parameters` nor `rope_theta` gives one; default: 10000",
            10000.0,
            legal=POSITIVE,
        ),
        "rope_near": Fact(
            "number",
            "base of the angles of layers with a window, never scaled; default: config.json gives each kind of "
            "layer its own, or all "
            "have the same",
            legal=POSITIVE,
        ),
        "alibi": Fact("truth", "positions are a bias on the scores"),
        "alibi_scaled": Fact("truth", "that bias is in bfloat16, and scaled as scores are"),
        "attn_scale": Fact(
            "number", "scores are divided by its square root; default: features of a head", legal=POSITIVE
        ),
        "attn_factor": Fact("number", "scores are multiplied by it instead", legal=ANY),
        "scale_by_layer": Fact("truth", "scores are also divided by the layer's number, from 1"),
        "attn_cap": Fact("number", "soft cap of scores; 0: none", legal=UNSIGNED),
        "attn_clip": Fact("number", "queries, keys and values are clamped to ± this", legal=POSITIVE),
        "value_factor": Fact("number", "values are multiplied by it", legal=ANY),
        "growth": Fact(
            "facts",
            "`{ by, span }`: queries are multiplied by 1 + by · log(1 + ⌊position / span⌋); `start`: positions "
            "count from it; "
            "`unrotated`: in layers that do not rotate; `if`: where this is true",
            {},
        ),
        "late_qk_norm": Fact("truth", "norms of query and key heads come after their rotation"),
        "bare_heads": Fact("truth", "query and key heads have a norm without weights in the layers that rotate"),
        "window": Fact("size", "size expression: tokens that a windowed layer keeps"),
        "window_if": Fact("condition", "config key that must be true, else no layer has a window"),
        "window_layers": Fact("rule", "the layers that have it, by a rule, see below; default: `all`", "all"),
        "window_chunks": Fact(
            "truth", "windows do not slide: a token sees what came before it in its own chunk of so many tokens"
        ),
        "borrowed": Fact(
            "rule",
            "the layers that look up keys and values of the last one of their kind, with a window or without, "
            "that has its own, by a rule",
            "",
        ),
        "index_top": Fact("number", "tokens that a layer's indexer lets a token see", legal=COUNT),
        "index_interleaved": Fact("truth", "as `rope_interleaved`, of indexers"),
        "eps_latent": Fact("number", "of the norms inside latent attention; default: as `eps`", EPS, legal=UNSIGNED),
    },
    "feed-forward": {
        "activation": Fact("word", "default: `hidden_act`", "hidden_act | =silu", legal=ACTIVATIONS),
        "gate_limit": Fact(
            "number", "clamp of a gated unit: (up + up_offset) · gate · sigmoid(gate_alpha · gate)", legal=POSITIVE
        ),
        "gate_alpha": Fact("number", "of that unit", 1.0, legal=ANY),
        "up_offset": Fact("number", "of that unit", 0.0, legal=ANY),
    },
    "experts": {"routing": Fact("facts", "of experts, see below")},
    "residual": {"residual_factor": Fact("number", "what a layer adds is multiplied by it", legal=ANY)},
    "layer": {
        "parallel": Fact("truth", "attention and feed-forward both start from the layer's input"),
        "post_norm": Fact(
            "truth", "`attn_norm` and `mlp_norm` come after the residual addition, and there is no final norm"
        ),
    },
    "head": {
        "logit_factor": Fact("number", "logits are multiplied by it", legal=ANY),
        "logit_cap": Fact("number", "soft cap of logits; 0: none", legal=UNSIGNED),
        "head_norm": Fact("truth", "rows of the head are divided by their lengths"),
    },
    "": {
        "cache": Fact("names", "the logical tensors whose outputs decoding keeps, per token", ()),
        "runs": Fact(
            "runs",
            "`false`: these facts are not enough; the family converts, merges and does not run. Or what must "
            "be true of config.json, a "
            "list, as in `[optional]`, alternatives by `|`",
            (),
        ),
    },
}
FACTS: Mapping[str, Fact] = {name: fact for part in PARTS.values() for name, fact in part.items()}


def check(model: Mapping[str, Any], where: str) -> None:
    """Raises ReshardError for a fact that is not known, not of its form, no expression,
    or a constant that is not legal.
    """
    for place, data, known in (
        ("model", model, FACTS),
        ("model.routing", model.get("routing", {}), ROUTING),
        ("model.growth", model.get("growth", {}), GROWTH),
    ):
        section, _, key = place.partition(".")
        for name in (name for name in known if name in data):
            form, hint = FORMS[known[name].kind], "docs/notation.md shows the form of every key"
            decode.typed(data[name], form, where, hint=hint, path=f"{place}.{name}")
        if odd := sorted(data.keys() - known.keys()):
            name = f"[{section}] {key}".rstrip()
            raise ReshardError(f"{where}: unknown key {odd[0]} in {name}", f"keys are {', '.join(sorted(known))}")
        for name, value in data.items():
            with expression.within(f"{where}: {place}.{name}"):
                _check(known[name], value)


def _check(fact: Fact, value: Any) -> None:
    if fact.kind == "rule":
        layer_rules.parse(value)
    elif fact.kind not in ("names", "facts") and not (fact.kind == "name" and value in (fact.legal or ())):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                expression.parse(text)
            elif fact.kind == "number" or (fact.kind == "either" and not isinstance(text, bool)):
                legal(fact, text)


def legal(fact: Fact, value: Any) -> Any:
    """The same value, if a fact may come to it; else raises ReshardError."""
    if fact.legal is not None and value not in fact.legal:
        raise ReshardError(
            f"{expression.shown(value)} is not {fact.legal.words}"
            if isinstance(fact.legal, Range)
            else f"unknown {expression.shown(value)}; the runtime has {', '.join(fact.legal)}"
        )
    return value
