"""The numeric proof: the shards, run at their own mesh, compute what the original does. Tolerances are derived, never chosen.

    float32        at most 4 × what the reference itself changes between float32 and float64 on the same tokens, whole and token by token;
                   and the same tokens when both go on by themselves
    stored dtype   rms distance from the float32 reference at most 2 × the reference's own

The unit is the reference's own rounding error, measured on the same CPU with the same kernels and tokens: so no bound depends on the CPU,
as long as the number of roundings does not. Products are accumulated in float32 or better everywhere (AVX2, AVX-512, AMX, Arm).

Of mixtures, whose routing no bound holds for, choices of experts that are toss-ups (`choices`) are imposed: this runtime at TP 1 stands for
the reference where they have an effect, and in 16 bits, where a rounding is large, everywhere. Their share is told.

The reference is transformers, which is checked itself, or this runtime at TP 1: then the rung is self-consistent at best (`reference`).
Where rotary angles change with how far a text reaches, it keeps a cache where the shards do: the keys in there were turned by other angles
than a forward of the whole text turns them by. Ranks are threads of this process, or processes (`ranks`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import PlaceError, ReshardError
from reshard.jobs.verdict import SELF_CONSISTENT, UNPROVEN, Rung
from reshard.text.progress import Progress
from reshard.text.units import binary

from .. import memory
from .bounds import RMS, TIMES
from .culprit import culprit
from .prompts import LENGTH, NEW, placeholders, positions, prompts_for

if TYPE_CHECKING:
    import torch

    from reshard.checkpoints.source import Source

    from .on_ranks import Computed
    from .reference import Reference
    from .routing_ties import Choices, Routes, Where

DISTINCT = 16  # of the tokens that both go on with by themselves, so many must be distinct
UNASKED = 1 << 30  # bytes of memory that it may take where nobody asked for it
MEMORY = 20  # bytes per parameter that the rung takes: the reference in float64 and float32, the shards in float32
LEAST = 12  # without room for anything else: the reference in float64 and float32


@dataclass(frozen=True)
class Numbers:
    """What was measured in one dtype. Distances of logits from the reference in float32; `own`: that of the reference itself."""

    max: float
    rms: float
    own_max: float
    own_rms: float
    kl: float
    agreed: float

    def to_json(self) -> dict[str, float]:
        return {name: float(f"{getattr(self, name):.6g}") for name in ("max", "rms", "own_max", "own_rms", "kl", "agreed")}


def numerics(
    out: Path,
    source: "Source | None",
    progress: Progress,
    *,
    must: bool = False,
    asked: bool = False,
    exhaustive: bool = False,
    layers: bool = False,
    processes: bool = False,
) -> Rung:
    """Climb the rung. What stands against it makes it skipped, or, where it `must` be climbed, an error.

    `asked`: also if it takes more memory than what nobody asked for may take;
    `exhaustive`: as many prompts as the vocabulary has rows for; `layers`: layer by layer, in the memory of one; `processes`: each rank is
    a process of its own.
    """

    def skipped(why: str, hint: str) -> Rung:
        if must:
            raise ReshardError(f"numerics: {why}", hint)
        return Rung("numerics", skipped=f"{why}: {hint}")

    if source is None:
        return skipped("there is nothing to compare with", "--against SRC")
    if not source.published_paths:
        return skipped(f"{source.where} is no published checkpoint", "--against the original")
    elements = sum(tensor.elements for name, tensor in source.layout.model.tensors.items() if name not in source.layout.alias)
    if (needed := MEMORY * elements) > UNASKED and not (must or asked):
        return Rung("numerics", skipped=f"takes {binary(needed)} of memory: ask for it by --numerics, or --layers for less")
    try:
        import torch
    except ImportError:
        return skipped("PyTorch is not installed", "pip install 'reshard[runtime]'")
    if (why := _cannot_run(source)) is not None:
        return Rung("numerics", skipped=f"could not be climbed: {why}")
    if layers:
        from reshard.checkpoints.source import open_source

        from .layerwise import layer_by_layer

        with memory.told("numerics", "a step of one layer has to fit, several times, in float64 at most"):
            return layer_by_layer(open_source(out, source.layout.model.family), source, progress)
    if (least := LEAST * elements) > (most := memory.limit()):
        words = f"takes at least {binary(least)} of memory, this process may have {binary(most)}"
        return skipped(words, "--layers takes that of one layer")
    try:
        with torch.inference_mode(), memory.told("numerics", "--layers runs it layer by layer, in the memory of one"):
            return _Check(out, source, progress, exhaustive, processes).climb()
    except PlaceError:
        raise
    except ReshardError as error:
        if must:
            raise
        return Rung("numerics", skipped=f"the runtime cannot run it: {error.message}")


def _cannot_run(source: "Source") -> str | None:
    """Why the runtime cannot run a model, as far as its table and config.json tell: that is nobody's mistake."""
    from ..load import with_facts
    from ..model.spec import Spec

    model = source.layout.model
    try:
        Spec.of(with_facts(model.family), source.config, model)
    except ReshardError as error:
        return error.message
    return None


class _Check:
    """One climb: prompts, reference, shards."""

    def __init__(self, out: Path, source: "Source", progress: Progress, exhaustive: bool, processes: bool) -> None:
        import torch

        from ..load import main_dtype
        from .reference import reference_for

        self.out, self.source, self.progress, self.processes, self.rung = out, source, progress, processes, Rung("numerics")
        model = source.layout.model
        self.vocab, self.stored = model.sizes["vocab"], main_dtype(model) or torch.float32
        self.reference: Reference = reference_for(source)
        self.prompts, self.others = prompts_for(source, exhaustive), placeholders(source)
        self.routed: dict[Where, set[int]] = {}
        self.mixed = "moe.router" in model.tensors
        self.chosen: Choices | None = None

    def climb(self) -> Rung:
        import torch

        from .reference import FINE, own_reference, relative

        rung, narrow = self.rung, self.stored in (torch.bfloat16, torch.float16)
        self.progress.start("running the model", ((5 if narrow else 3) + 2 * self.mixed) * self.source.bytes)
        wide = self.reference.logits(self.prompts, torch.float32)
        self.progress.advance(self.source.bytes)
        if not bool(wide.isfinite().all()):
            self.progress.finish()
            return Rung("numerics", skipped=f"the logits of the reference, {self.reference.name}, are not finite")
        exact = self.reference.logits(self.prompts, torch.float64)
        self.progress.advance(self.source.bytes)
        if self.mixed:
            chosen = self.chosen = self._choices()
            odd = chosen.unsettled[..., None]
            wide, exact = chosen.logits.where(odd, wide), chosen.exact.where(odd, exact)
        if self.reference.independent and (off := relative(wide, exact)) > FINE:
            words = f"{self.reference.name} is off by {off:.2g} of the scale of logits in float32, rounding by {FINE:.2g} at most"
            self.reference = own_reference(self.source, words)
            wide, exact = (self.reference.logits(self.prompts, dtype) for dtype in (torch.float32, torch.float64))
            if self.chosen is not None:
                wide, exact = self.chosen.logits, self.chosen.exact
        ours = self._shards(torch.float32, goes_on=True, routes=self.chosen.imposed if self.chosen else None)
        self.progress.advance(self.source.bytes)
        why = ours.odd or (None if bool(wide.isfinite().all()) else "the logits of this runtime at TP 1 are not finite")
        if why is not None:
            rung.failures.append(f"float32: {why}; those of {self.reference.name} are finite{self._told_apart()}")
            rung.numbers["reference"] = rung.words = self.reference.name
            self.progress.finish()
            return rung
        numbers = _numbers(ours.logits, wide, exact)
        rung.numbers |= {"reference": self.reference.name, "float32": numbers.to_json() | self._imposed()}
        limit = TIMES * numbers.own_max
        if not numbers.max <= limit:
            where = self._first_to_differ() or self._told_apart()
            rung.failures.append(f"float32: logits differ by {numbers.max:.3g}, {limit:.3g} is the bound{where}")
        if not (off := _distance(ours.stepwise, self._by_token(wide, ours.stepwise))) <= limit:
            rung.failures.append(f"float32: token by token, logits differ by {off:.3g}, {limit:.3g} is the bound")
        self._continuations(ours.tokens, limit)
        if narrow:
            name = str(self.stored).removeprefix("torch.")
            routes, more = None, {}
            if self.chosen:
                wide, routes = self.chosen.logits, self.chosen.routes
                own, share = self._narrowed(self.chosen)
                more = {"routing": "that of float32 imposed", "would_differ": share}
            else:
                own = self.reference.logits(self.prompts, self.stored)
            self.progress.advance(self.source.bytes)
            self._in_stored(name, wide, own, routes, more)
            self.progress.advance(self.source.bytes)
        self._coverage()
        self.progress.finish()
        return rung

    def _in_stored(self, name: str, wide: "torch.Tensor", own: "torch.Tensor", routes: "Routes | None", more: dict[str, Any]) -> None:
        """Compare in the stored dtype, in which the reference gives `own`."""
        from .reference import COARSE, relative

        rung = self.rung
        if not bool((finite := own.isfinite().all(-1)).all()):
            odd, of = int((~finite).sum()), finite.numel()
            words = f"in {name} the logits of the reference are not finite, at {odd} of {of} tokens: nothing to compare with"
            rung.notes.append(f"{words}; in float32 they are: run it with --dtype bfloat16" if name == "float16" else words)
            return
        ours = self._shards(self.stored, routes=routes)
        if ours.odd is not None:
            rung.failures.append(f"{name}: {ours.odd}; those of the reference are finite")
            return
        numbers = _numbers(ours.logits.float(), wide, own.float())
        rung.numbers[name] = numbers.to_json() | more
        if (off := relative(own, wide)) > COARSE:
            words = f"the reference itself is off by {off:.2g} of the scale of logits: beyond {COARSE:.2g}, its error bounds nothing"
            rung.notes.append(f"{name}: {words}")
        elif not numbers.rms <= RMS * numbers.own_rms:
            words = f"{numbers.rms:.3g} from the float32 reference, {RMS} × {numbers.own_rms:.3g} is the bound"
            rung.failures.append(f"{name}: rms distance of logits {words}")

    def _shards(self, dtype: "torch.dtype", goes_on: bool = False, routes: "Routes | None" = None) -> "Computed":
        """What the shards compute; with `goes_on` also token by token, and how texts go on."""
        from .on_ranks import compute, on_ranks

        given: dict[str, Any] = {"out": self.out, "dtype": dtype, "prompts": self.prompts, "routes": routes}
        if goes_on:
            given |= {"starts": self._starts.tolist(), "new": self._new}
        found = on_ranks(self._opened.layout.mesh, self.processes, compute, **given)
        for one in found:
            for layer, experts in one.routed.items():
                self.routed.setdefault(layer, set()).update(experts)
        return found[0]

    def _choices(self) -> "Choices":
        from .routing_ties import choices

        found = choices(self.source, self.prompts, TIMES)
        self.progress.advance(2 * self.source.bytes)
        if bool(found.unsettled.all()) and self.reference.independent:
            self.rung.best = SELF_CONSISTENT
            self.rung.notes.append(f"every token depends on a toss-up of a router: logits of {self.reference.name} were compared nowhere")
        return found

    def _imposed(self) -> dict[str, Any]:
        """What is told of a mixture in float32: the share of choices that were imposed, and of tokens that this had an effect on."""
        if self.chosen is None:
            return {}
        tokens = float(self.chosen.unsettled.double().mean())
        return {"routing": "that of the reference imposed where it is a toss-up", "imposed": self.chosen.share, "tokens": tokens}

    def _narrowed(self, chosen: "Choices") -> "tuple[torch.Tensor, float]":
        """Logits in the stored dtype with the choices of float32, and the part of these that would have been others."""
        import torch

        from .routing_ties import decisions

        logits, _, _ = decisions(self.source, self.prompts, self.stored, chosen.routes)
        _, others, _ = decisions(self.source, self.prompts, self.stored)
        odd = [(others[layer].sort(-1)[0] != routes.sort(-1)[0]).any(-1) for layer, routes in chosen.routes.items()]
        return logits, float(torch.stack(odd).double().mean())

    @cached_property
    def _opened(self) -> "Source":
        from reshard.checkpoints.source import open_source

        return open_source(self.out, self.source.layout.model.family)

    @property
    def _starts(self) -> "torch.Tensor":
        return self.prompts[:4, : LENGTH // 4]

    @property
    def _new(self) -> int:
        """Tokens to go on with: as many as a model of few positions has room for."""
        return min(NEW, positions(self.source) - self._starts.shape[1])

    def _continuations(self, tokens: Sequence[Sequence[int]], limit: float) -> None:
        """The same tokens as the reference's, where it is surer of them than the bound, and no router tosses up."""
        agreed, distinct, tossed = 0, set(), 0
        theirs, margins = (found.tolist() for found in self.reference.greedy(self._starts, self._new, cached=self._turns))
        for number, (start, ours) in enumerate(zip(self._starts.tolist(), tokens, strict=True), 1):
            each = zip(ours, theirs[number - 1], margins[number - 1], strict=True)
            for at, (one, other, margin) in enumerate(each):
                if one != other:
                    if not self._settled([*start, *ours[:at]]):
                        tossed += 1
                    elif margin > 2 * limit:
                        words = f"the reference {other}, surer of it by {margin:.3g} than of any other"
                        self.rung.failures.append(f"float32: text {number}: token {at + 1} is {one}, that of {words}")
                    break  # from here on they go different ways
                agreed += 1
                distinct.add(one)
                if one in self.others:
                    break  # a text does not go on from here
        self.rung.numbers["continuations"] = {"texts": len(tokens), "tokens": agreed, "distinct": len(distinct)}
        if self.chosen is not None:
            self.rung.numbers["continuations"]["tossed"] = tossed  # texts that end where a router tosses up
        if not agreed and not self.rung.failures:
            self.rung.best = UNPROVEN
            self.rung.notes.append("no token that the model goes on with was compared")
        elif len(distinct) < DISTINCT and not self.rung.failures:
            self.rung.notes.append(f"the model went on with {len(distinct)} distinct tokens, {DISTINCT} would say more")

    @cached_property
    def _turns(self) -> bool:
        """Whether rotary angles change within the texts, with how far they reach."""
        from ..load import with_facts
        from ..model.spec import Spec

        spec = Spec.of(with_facts(self.source.layout.model.family), self.source.config, self.source.layout.model)
        reach = max(self.prompts.shape[1], self._starts.shape[1] + self._new)
        most = {"longrope": lambda rope: rope.original, "dynamic": lambda rope: rope.positions}
        return any(rope is not None and rope.kind in most and reach > most[rope.kind](rope) for rope in (spec.rope, spec.rope_near))

    def _by_token(self, wide: "torch.Tensor", ours: "torch.Tensor") -> "torch.Tensor":
        """The reference's logits of tokens that come one by one: those of the whole texts, but where angles change on the way."""
        if not self._turns:
            return wide
        from .on_ranks import pieces
        from .routing_ties import BATCH

        found = self.reference.stepwise(self.prompts[:BATCH], pieces(self.prompts.shape[1]))
        if self.chosen is not None:  # what hangs on a toss-up is compared in whole texts alone
            found = ours.where(self.chosen.unsettled[:BATCH, :, None], found)
        return found

    def _settled(self, ids: Sequence[int]) -> bool:
        """Whether no choice of experts in a text is a toss-up."""
        import torch

        from .routing_ties import decisions

        return self.chosen is None or self.chosen.settles(decisions(self.source, torch.tensor([ids]), torch.float32)[2])

    def _coverage(self) -> None:
        rung, model = self.rung, self.source.layout.model
        rows, vocab = len(set(self.prompts.flatten().tolist())), self.vocab - len(self.others)
        covered: dict[str, Any] = {"rows": rows, "vocabulary": vocab}
        if rows < vocab:
            rung.notes.append(f"{vocab - rows} of {vocab} rows of the vocabulary were not embedded")
        if self.routed:
            experts = model.sizes["experts"]
            reached = sum(map(len, self.routed.values()))
            covered |= {"experts": reached, "of": experts * len(self.routed)}
            if reached < experts * len(self.routed):
                rung.notes.append(f"{experts * len(self.routed) - reached} of {experts * len(self.routed)} experts were not routed to")
        if (beyond := model.sizes.get("layer", 0) - model.main_layers) > 0 and model.main_layers:
            rung.notes.append(f"{beyond} layers beyond the decoder's (multi-token prediction) are not run")
        rung.numbers["coverage"] = covered
        worst = rung.numbers["float32"]
        share = worst["max"] / worst["own_max"] if worst["own_max"] else math.inf if worst["max"] else 0.0
        done = rung.numbers["continuations"]
        if not self.reference.independent:
            rung.best, rung.hint = SELF_CONSISTENT, self.reference.hint
        alone = f"agrees with {self.reference.name}, not independent" if rung.best == SELF_CONSISTENT and not rung.failures else ""
        rung.words = f"{alone or self.reference.name}; logits off by {share:.2f} × its own error; {done['tokens']} tokens agreed"
        if self.chosen is not None:
            rung.words += f"; {self.chosen.share:.2%} of routing imposed"
        for name, numbers in rung.numbers.items():
            if isinstance(numbers, dict) and "kl" in numbers:
                largest, rms = f"max {numbers['max']:.2g}", f"rms {numbers['rms']:.2g}"
                if name == "float32":
                    largest += f" (at most {TIMES * numbers['own_max']:.2g})"
                else:
                    rms += f" (at most {RMS * numbers['own_rms']:.2g})"
                rung.details.append(f"{name}: {largest}, {rms}, KL {numbers['kl']:.2g}")
        routed = f", {covered['experts']} of {covered['of']} experts" if "experts" in covered else ""
        rung.details.append(f"reached: {rows} of {vocab} rows of the vocabulary{routed}")

    def _first_to_differ(self) -> str:
        """Which step is the first to compute something else from the same input, and which tensors of it are not the original's."""
        import torch

        from ..comm.collectives import alone
        from ..load import load_model
        from .on_ranks import on_ranks, walk

        ids, opened = self.prompts[:2], self._opened
        inputs: dict[str, torch.Tensor | None] = {}
        outputs: dict[str, torch.Tensor] = {}
        x: torch.Tensor | None = None
        for name, step in load_model(self.source, torch.float32, world=alone()).walk(ids):
            inputs[name], outputs[name] = x, (x := step(x))

        merged: dict[str, torch.Tensor] = {}
        for found in on_ranks(opened.layout.mesh, self.processes, walk, out=self.out, prompts=ids, inputs=inputs):
            merged |= found
        for name, output in outputs.items():
            if not _distance(merged[name], output) <= 1e-4 * float(output.abs().max()):
                return f"; the first step to differ is {name}{culprit(name, opened, self.source)}"
        return ""

    def _told_apart(self) -> str:
        """Which step is the first to compute something else than an independent reference does, also at TP 1, and what went into it."""
        from .first_difference import first_to_differ

        if not self.reference.independent:
            return ""
        settled = None if self.chosen is None else ~self.chosen.unsettled[:2]
        if (found := first_to_differ(self.source, self.reference, self.prompts[:2], settled)) is None:
            return ""
        self.rung.numbers["first"] = found.to_json()
        self.rung.details += found.lines()
        return f"; the first step to differ is {found.name}, also at TP 1"


# --- distances -------------------------------------------------------------------------------------------------------


def _distance(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """The largest difference; NaN where one is not finite."""
    a = a[: len(b)]
    return float((a.double() - b[: len(a)].double()).abs().max())


def _numbers(ours: "torch.Tensor", wide: "torch.Tensor", own: "torch.Tensor") -> Numbers:
    import torch

    def rms(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.sqrt(float((a.double() - b.double()).pow(2).mean()))

    p, q = wide.double().log_softmax(-1), ours.double().log_softmax(-1)
    return Numbers(
        max=_distance(ours, wide),
        rms=rms(ours, wide),
        own_max=_distance(own, wide),
        own_rms=rms(own, wide),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        agreed=float((wide.argmax(-1) == ours.argmax(-1)).double().mean()),
    )
