"""The inputs of a step of the decoder: tensors by logical and stored name, and the `[model]` values it depends on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from reshard.tables import families
from reshard.tables.facts import PARTS, ROUTING
from reshard.tables.families import Family

from .decoder import ATTENTION, EMBEDDING, FEED_FORWARD, HEAD, OWN, RESIDUAL
from .experts import ACTIVATIONS
from .spec_values import Facts

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source
    from reshard.tables.families import Family

# Values that are not looked up in config.json.
WORDS = ("norm", "bare", "growth", "borrowed", "rope_layers", "window_layers")
SHOWN = 12  # unset values that a report lists
ABSENT = "absent"  # stands for: not set


def belongs(name: str, step: str, tied: bool) -> bool:
    """Whether a step needs a tensor, given by its stored name on a rank, or by its logical name in a layer."""
    if step.startswith("layer "):
        layer, _, part = step.removeprefix("layer ").partition(", ")
        inside = name.removeprefix(f"layers.{layer}.")
        if name.startswith("ple_"):
            return part == OWN
        attends = "attn" in inside or inside.startswith(("lin.", "moa."))
        return inside != name and (part not in ("attention", "feed-forward") or attends == (part == "attention"))
    embeds = name in ("embed", "embed_proj", "pos_embed") or name.startswith("embed_norm")
    return not name.startswith("layers.") and (
        embeds if step == EMBEDDING else not embeds or (tied and name == "embed")
    )


@dataclass(frozen=True)
class Used:
    """A step, or a part of it (a norm, the attention, the feed-forward …), and its inputs.

    `weights`: logical name → stored names; `facts`: values set in [model] → their text, unless constant, and result;
    `absent`: values that matter and are not set; `agrees`: single changes of a value that would make the step right.
    """

    step: str
    part: str
    weights: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, tuple[str | None, Any]]
    absent: tuple[str, ...]
    agrees: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """In words: `layer 0, attention`; `layer 0, attention: attn_norm`."""
        return self.step if self.part in (self.step, self.step.rpartition(", ")[2]) else f"{self.step}: {self.part}"

    def lines(self) -> list[str]:
        """For people, one thing per line."""
        found = []
        if self.agrees:
            each = " or ".join(
                f"without {name}" if value == ABSENT else f"with {name} = {json.dumps(value)}"
                for name, value in self.agrees
            )
            found.append(f"{self.name} would agree {each}")
        if self.weights:
            common = _common([name for stored in self.weights.values() for name in stored])
            pairs = (
                (name, " + ".join(one.removeprefix(common) for one in stored)) for name, stored in self.weights.items()
            )
            found.append(
                f"weights: {', '.join(map(' = '.join, pairs))}" + (f", of {common.rstrip('.')}" if common else "")
            )
        if self.facts:
            said = (
                f"{name} = {_said(value)}" + (f" ({text})" if text is not None else "")
                for name, (text, value) in self.facts.items()
            )
            found.append(f"[model]: {', '.join(said)}")
        if self.absent and not self.agrees:
            rest = f", … ({len(self.absent) - SHOWN} more)" if len(self.absent) > SHOWN else ""
            found.append(f"[model], not set: {', '.join(self.absent[:SHOWN])}{rest}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "part": self.part,
            "weights": {name: list(stored) for name, stored in self.weights.items()},
            "facts": {name: value for name, (_, value) in self.facts.items()},
            "absent": list(self.absent),
            "agrees": [{"fact": name, "value": None if value == ABSENT else value} for name, value in self.agrees],
        }


def _common(names: Sequence[str]) -> str:
    """The common prefix of several dotted names, up to a dot."""
    parts = [name.split(".")[:-1] for name in names] if len(names) > 1 else []
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(f"{column[0]}." for column in shared)


def _said(value: Any) -> str:
    return value.removeprefix("=") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def used(source: "Source", table: "Family", step: str, part: str, apart: Sequence[str]) -> Used:
    """What goes into a part of a step; `apart`: its norms, which are parts of their own."""
    model, config = source.layout.model, source.config.with_defaults(table.defaults)
    layer = int(step.removeprefix("layer ").partition(",")[0]) if step.startswith("layer ") else None
    within = f"layer {layer}, {part}" if layer is not None and part in (ATTENTION, FEED_FORWARD) else step
    weights = {}
    for name, tensor in model.tensors.items():
        base = name.partition("@")[0]
        here = base if layer is None or tensor.layers is None else f"layers.{layer}.{base}"
        owner = base.removesuffix("_bias")
        if part in apart:
            wanted = owner == part
        else:
            wanted = owner not in apart and part != RESIDUAL and belongs(here, within, "head" not in model.tensors)
        if wanted and (tensor.layers is None or layer in tensor.layers):
            texts = (
                piece.slot.template.name.text.replace("{layer}", str(layer)) for piece in source.layout.holding(name)
            )
            weights[base] = tuple(dict.fromkeys(texts))
    names = dict.fromkeys(fact for kind in kinds(step, part, apart, weights) for fact in PARTS[kind])
    given = Facts(table.model, config)
    facts: dict[str, tuple[str | None, Any]] = {}
    for name in names:
        if name in table.model and name == "routing":
            inner = Facts(table.model[name], config, ROUTING)
            facts |= {f"routing.{key}": _resolved(said, inner.value(key)) for key, said in inner.facts.items()}
        elif name in table.model:
            said = table.model[name]
            facts[name] = _resolved(said, said if name in WORDS else given.value(name))
    return Used(step, part, weights, facts, tuple(name for name in names if name not in table.model))


def _resolved(said: Any, value: Any) -> tuple[str | None, Any]:
    return said if isinstance(said, str) and said != value else None, value


def kinds(step: str, part: str, apart: Sequence[str], weights: Mapping[str, Any]) -> Iterator[str]:
    """The kinds (keys of PARTS) that a part of a step is of."""
    if part in apart:
        yield "norm"
    elif part in (EMBEDDING, HEAD):
        yield {EMBEDDING: "embedding", HEAD: "head"}[part]
    elif part in (ATTENTION, FEED_FORWARD, RESIDUAL):
        yield part
        if part == ATTENTION and any("norm" in name for name in weights):
            yield "norm"
        if part == FEED_FORWARD and any(name.startswith("moe.") for name in weights):
            yield "experts"
    else:
        yield "residual"
    if step.startswith("layer "):
        yield "layer"


def others(table: "Family", names: Sequence[str]) -> Iterator[tuple[str, Any, "Mapping[str, Any]"]]:
    """Each value changed to what another shipped table has, or unset: its name, the new value, all of [model] then."""
    known = [families.load(name).model for name in families.shipped()]
    for name in names:
        if name == "routing":
            given = table.model.get(name)
            keys = dict.fromkeys(key for family in known if isinstance(family.get(name), dict) for key in family[name])
            if isinstance(given, dict):
                for key in keys:
                    for value in _values([family[name] for family in known if isinstance(family.get(name), dict)], key):
                        changed = {k: v for k, v in given.items() if k != key} | (
                            {} if value == ABSENT else {key: value}
                        )
                        yield f"routing.{key}", value, {**table.model, name: changed}
            continue
        values = list(_values(known, name)) + ([f"={word}" for word in ACTIVATIONS] if name == "activation" else [])
        for value in values:
            rest = {k: v for k, v in table.model.items() if k != name}
            yield name, value, rest if value == ABSENT else rest | {name: value}


def _values(facts: Sequence[Mapping[str, Any]], name: str) -> Iterator[Any]:
    """Unset; true and false where a table has a boolean; and the values that tables have, once each."""
    found = [family[name] for family in facts if name in family]
    more = [True, False] if any(isinstance(value, bool) for value in found) else []
    yield ABSENT
    yield from {repr(value): value for value in (*more, *found)}.values()
