"""The first step in which this runtime, at TP 1, computes something else than transformers, and its inputs.

No family and no module of transformers is known by name: the output of one of our steps is looked up among all inputs
and outputs of their modules, to within their own rounding. Layers first; then, in the first layer whose output is not
found, its norms, attention and feed-forward. Then values of `[model]` that matter for that part are changed, one at a
time, to what other tables have: a change that makes the layer right is reported.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reshard.tables.facts import PARTS

from ..comm.threads import alone
from ..load import load_model, with_facts
from ..memory import exhausted
from ..model.decoder import PARTIAL
from ..model.spec import Spec
from ..model.step_inputs import Used, others, used
from .bounds import TIMES

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source

    from ..model.decoder import Decoder
    from .reference import Reference

ULP = torch.finfo(torch.float32).eps
TOLD = 3  # changes, each of which would make a step right, that are reported

Key = tuple[str, str, int]  # module, "in" or "out", how many before
Place = tuple[int, int] | None  # of a module: the index of its layer and its depth in it; None outside of layers


@torch.inference_mode()
def first_to_differ(
    source: "Source", reference: "Reference", ids: Tensor, settled: Tensor | None = None
) -> Used | None:
    """None if every step agrees, or if transformers cannot be inspected.

    ids [batch, seq]; `settled` [batch, seq]: the tokens to compare, by default all.
    """
    modules = [getattr(reference.prepare(), "module", None), getattr(reference.load(torch.float64), "module", None)]
    if None in modules or (settled is not None and not bool(settled.any())):
        return None
    decoder, table = load_model(source, torch.float32, world=alone()), with_facts(source.layout.model.family)
    coarse = _Flow.of(modules, ids, settled, lambda place: place is None or place[1] == 0)
    x: Tensor | None = None
    parts: list[tuple[str, str, Tensor]] = []
    step, name, before = "", "", x

    def watch(part: str, tensor: Tensor) -> None:
        if part != PARTIAL:
            parts.append((step, part, tensor))

    decoder.watch = watch
    groups = _by_layer(decoder, ids)
    for name, steps in groups.items():
        before = x
        parts.clear()
        for step, call in steps:
            x = call(x)
            parts.append((step, step, x))
        if not coarse.has(parts[-1][2], _after(groups, name)):
            break
    else:
        return None
    decoder.watch = None
    layer = int(name.removeprefix("layer ")) if name.startswith("layer ") else None
    fine = _Flow.of(
        modules,
        ids,
        settled,
        lambda place: (place is None) if layer is None else place is not None and place[0] == layer,
    )
    after = max((at for at, (_, _, tensor) in enumerate(parts) if fine.has(tensor)), default=-1) + 1
    if after >= len(parts) - 1:  # of parts with the same input, one may be right and another wrong
        after = next(at for at, (_, _, tensor) in enumerate(parts) if not fine.has(tensor) or at == len(parts) - 1)
    step, part, _ = parts[after]
    apart = [part for step, part, _ in parts if "norm" in part]
    found = used(source, table, step, part, apart)

    def agreeing() -> int:
        """How many layers in a row agree, from this one on."""
        y, groups = before, _by_layer(decoder, ids)
        names = list(groups)[list(groups).index(name) :]
        for count, other in enumerate(names):
            for _, call in groups[other]:
                y = call(y)
            if y is None or not coarse.has(y, _after(groups, other)):
                return count
        return len(names)

    return replace(found, agrees=_agreeing(source, decoder, found, agreeing))


def _by_layer(decoder: "Decoder", ids: Tensor) -> dict[str, list[tuple[str, Any]]]:
    """The steps of a forward, grouped by layer."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for step, call in decoder.walk(ids):
        found.setdefault(step.partition(",")[0], []).append((step, call))
    return found


def _after(groups: Mapping[str, Any], name: str) -> str:
    """The consumer of a layer's output: the next one."""
    names = [*groups, ""]
    return names[names.index(name) + 1]


def _agreeing(
    source: "Source", decoder: "Decoder", found: Used, agreeing: Callable[[], int]
) -> tuple[tuple[str, Any], ...]:
    """The single changes of a value after which most layers in a row agree: of values that matter, else of any."""
    table, model, seen = with_facts(source.layout.model.family), source.layout.model, [decoder.spec]
    near = dict.fromkeys(name.partition(".")[0] for name in (*found.facts, *found.absent))
    agree: dict[str, tuple[int, Any]] = {}
    bearing = chain(*(facts for part, facts in PARTS.items() if part))
    for names in (list(near), [name for name in bearing if name not in near]):
        for fact, value, facts in () if agree else others(table, names):
            try:
                changed = replace(table, model=dict(facts))
                decoder.spec = Spec.of(changed, source.config, replace(model, family=changed))
                if decoder.spec not in seen:
                    seen.append(decoder.spec)
                    if (count := agreeing()) > agree.get(fact, (0, None))[0]:
                        agree[fact] = count, value
            except Exception as error:  # whatever inconsistent values cause
                if exhausted(error):
                    raise
            finally:
                decoder.spec = seen[0]
    most = max((count for count, _ in agree.values()), default=0)
    return tuple((fact, value) for fact, (count, value) in agree.items() if count == most)[:TOLD]


@dataclass(frozen=True)
class _Flow:
    """Tensors [batch, seq, features] at chosen modules, in float32, and the distance of each from float64."""

    tensors: Mapping[Key, Tensor]
    own: Mapping[Key, float]
    places: Mapping[str, Place]
    settled: Tensor | None

    @classmethod
    def of(cls, modules: list[Any], ids: Tensor, settled: Tensor | None, chosen: Callable[[Place], bool]) -> "_Flow":
        narrow, wide = (_recorded(module, ids, chosen) for module in modules)
        pick: Any = slice(None) if settled is None else settled
        shared = {
            key: tensor[pick] for key, tensor in narrow.items() if key in wide and wide[key].shape == tensor.shape
        }
        own = {key: float((tensor.double() - wide[key][pick]).abs().max()) for key, tensor in shared.items()}
        return cls(shared, own, {name: _place(modules[0], name) for name, _, _ in shared if name}, settled)

    def has(self, x: Tensor, taker: str | None = None) -> bool:
        """Whether one of them is x, up to what x has appended for later layers.

        `taker`: the consumer, "" for logits; only its inputs count, if they are known.
        """
        x = x if self.settled is None else x[self.settled]
        there = [key for key in self.tensors if taker is None or self._into(key, taker)] or list(self.tensors)
        return any(self._is(x[..., : self.tensors[key].shape[-1]], self.tensors[key], self.own[key]) for key in there)

    def _into(self, key: Key, taker: str) -> bool:
        name, way, _ = key
        if not taker.startswith("layer "):
            return not taker and not name
        return way == "in" and self.places.get(name) == (int(taker.removeprefix("layer ")), 0)

    @staticmethod
    def _is(x: Tensor, tensor: Tensor, own: float) -> bool:
        if x.shape != tensor.shape:
            return False
        bound = TIMES * max(own, ULP * float(tensor.abs().max()))
        return float((x.double() - tensor.double()).abs().max()) <= bound


def _recorded(module: nn.Module, ids: Tensor, chosen: Callable[[Place], bool]) -> dict[Key, Tensor]:
    """Inputs and outputs of modules in a forward, as [batch, seq, features]; the logits, too."""
    found: dict[Key, Tensor] = {}
    times: Counter[tuple[str, str]] = Counter()

    def keep(name: str, way: str, values: Any) -> None:
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point():
                if value.dim() == 2 and value.shape[0] == ids.numel():
                    value = value.view(*ids.shape, -1)
                if value.dim() == 3 and value.shape[:2] == ids.shape:
                    found[name, way, times[name, way]] = value.detach().clone()
                    times[name, way] += 1

    def hook(name: str) -> Callable[..., None]:
        def seen(_: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            keep(name, "in", (*args, *given.values()))
            keep(name, "out", output)

        return seen

    inside = [(name, each) for name, each in module.named_modules() if name and chosen(_place(module, name))]
    handles = [each.register_forward_hook(hook(name), with_kwargs=True) for name, each in inside]
    try:
        keep("", "out", module(ids, use_cache=False).logits)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _place(root: nn.Module, name: str) -> Place:
    """The place of a module: layers are the items of the first list on its path."""
    module, path = root, name.split(".")
    for at, part in enumerate(path):
        if isinstance(module, nn.ModuleList):
            return int(part), len(path) - at - 1
        module = getattr(module, part)
    return None
