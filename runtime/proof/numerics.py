"""The numerics check: shards, run on their own mesh, compute what the original does. Bounds are derived, not chosen.

    float32        at most 4 × the reference's own change between float32 and float64 on the same tokens, in whole texts
                   and token by token; and the same tokens in greedy continuations
    stored dtype   RMS distance from the float32 reference at most 2 × the reference's own

The unit is the reference's own rounding error, measured on the same CPU with the same kernels and tokens: no bound
depends on the CPU, as long as the number of roundings does not. Products are accumulated in float32 or better
(AVX2, AVX-512, AMX, Arm).

No bound holds for the routing of mixtures. Where experts tie within rounding error (`routing_ties`), one choice is
imposed: this runtime at TP 1 replaces the reference for tokens that depend on a tie, and in 16 bits, where rounding is
coarse, all of float32's routing is imposed. The report gives the tie rate.

The reference is transformers, itself checked, or this runtime at TP 1: then the check is self-consistent at best
(`reference`). If rotary angles depend on the length of the text, the reference uses a cache where the shards do: cached
keys were rotated by other angles than in a forward of the whole text. Ranks are threads of this process, or processes
(`on_ranks`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import PlaceError, ReshardError, unusable
from reshard.jobs.verdict import SELF_CONSISTENT, UNPROVEN, Check
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

DISTINCT = 16  # distinct tokens that the greedy continuations must contain
UNASKED = 1 << 30  # bytes of memory that it may use without being asked for
MEMORY = 20  # bytes per parameter: the reference in float64 and float32, the shards in float32
LEAST = 12  # bytes per parameter, at least: the reference in float64 and float32


@dataclass(frozen=True)
class Numbers:
    """What was measured in one dtype: distances of logits from the float32 reference; `own_…`: its own error."""

    max: float
    rms: float
    own_max: float
    own_rms: float
    kl: float
    agreed: float

    def to_json(self) -> dict[str, float]:
        return {
            name: float(f"{getattr(self, name):.6g}") for name in ("max", "rms", "own_max", "own_rms", "kl", "agreed")
        }


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
) -> Check:
    """Run the check. An obstacle makes it skipped or, if it `must` run, an error.

    `asked`: run it even if it needs more than UNASKED; `exhaustive`: as many prompts as the vocabulary has rows for;
    `layers`: layer by layer, in the memory of one; `processes`: each rank is a process of its own.
    """

    def skipped(why: str, hint: str) -> Check:
        if must:
            raise ReshardError(f"numerics: {why}", hint)
        return Check("numerics", skipped=f"{why}: {hint}")

    if source is None:
        return skipped("there is nothing to compare with", "--against SRC")
    if not source.published_paths:
        return skipped(f"{source.where} is not a published checkpoint", "--against the original")
    elements = sum(
        tensor.elements for name, tensor in source.layout.model.tensors.items() if name not in source.layout.alias
    )
    if (needed := MEMORY * elements) > UNASKED and not (must or asked):
        words = f"needs {binary(needed)} of memory: ask for it with --numerics, or use --layers for less"
        return Check("numerics", skipped=words)
    if (why := unusable("torch", "PyTorch")) is not None:
        return skipped(why, "pip install 'reshard[runtime]'")
    import torch

    if (why := _cannot_run(source)) is not None:
        return Check("numerics", skipped=f"cannot run it: {why}")
    if layers:
        from reshard.checkpoints.source import open_source

        from .layerwise import layer_by_layer

        with memory.reported("numerics", "one step of one layer must fit several times, in float64 at most"):
            return layer_by_layer(open_source(out, source.layout.model.family), source, progress)
    if (least := LEAST * elements) > (most := memory.limit()):
        words = f"needs at least {binary(least)} of memory, this process may use {binary(most)}"
        return skipped(words, "--layers needs only the memory of one layer")
    try:
        with torch.inference_mode(), memory.reported("numerics", "--layers needs only the memory of one layer"):
            return _Numerics(out, source, progress, exhaustive, processes).run()
    except PlaceError:
        raise
    except ReshardError as error:
        if must:
            raise
        return Check("numerics", skipped=f"the runtime cannot run it: {error.message}")


def _cannot_run(source: "Source") -> str | None:
    """Why the runtime cannot run a model, by its table and config.json: not the user's mistake, so not an error."""
    from ..load import with_facts
    from ..model.spec import Spec

    model = source.layout.model
    try:
        Spec.of(with_facts(model.family), source.config, model)
    except ReshardError as error:
        return error.message
    return None


class _Numerics:
    """One run of the check: prompts, reference, shards."""

    def __init__(self, out: Path, source: "Source", progress: Progress, exhaustive: bool, processes: bool) -> None:
        import torch

        from ..cast import main_dtype
        from .reference import reference_for

        self.out, self.source, self.progress, self.processes = out, source, progress, processes
        self.check = Check("numerics")
        model = source.layout.model
        self.vocab, self.stored = model.sizes["vocab"], main_dtype(model) or torch.float32
        self.reference: Reference = reference_for(source)
        self.prompts, self.others = prompts_for(source, exhaustive), placeholders(source)
        self.routed: dict[Where, set[int]] = {}
        self.mixed = "moe.router" in model.tensors
        self.chosen: Choices | None = None

    def run(self) -> Check:
        import torch

        from .reference import FINE, own_reference, relative

        check, narrow = self.check, self.stored in (torch.bfloat16, torch.float16)
        self.progress.start("running the model", ((5 if narrow else 3) + 2 * self.mixed) * self.source.bytes)
        wide = self.reference.logits(self.prompts, torch.float32)
        self.progress.advance(self.source.bytes)
        if not bool(wide.isfinite().all()):
            self.progress.finish()
            return Check("numerics", skipped=f"the logits of the reference, {self.reference.name}, are not finite")
        exact = self.reference.logits(self.prompts, torch.float64)
        self.progress.advance(self.source.bytes)
        if self.mixed:
            chosen = self.chosen = self._choices()
            odd = chosen.unsettled[..., None]
            wide, exact = chosen.logits.where(odd, wide), chosen.exact.where(odd, exact)
        if self.reference.independent and (off := relative(wide, exact)) > FINE:
            words = (
                f"the float32 error of {self.reference.name} is {off:.2g} of the scale of logits, "
                f"rounding explains at most {FINE:.2g}"
            )
            self.reference = own_reference(self.source, words)
            wide, exact = (self.reference.logits(self.prompts, dtype) for dtype in (torch.float32, torch.float64))
            if self.chosen is not None:
                wide, exact = self.chosen.logits, self.chosen.exact
        ours = self._shards(torch.float32, goes_on=True, routes=self.chosen.imposed if self.chosen else None)
        self.progress.advance(self.source.bytes)
        why = ours.odd or (None if bool(wide.isfinite().all()) else "the logits of this runtime at TP 1 are not finite")
        if why is not None:
            check.failures.append(f"float32: {why}; those of {self.reference.name} are finite{self._at_one_rank()}")
            check.numbers["reference"] = check.words = self.reference.name
            self.progress.finish()
            return check
        numbers = _numbers(ours.logits, wide, exact)
        check.numbers |= {"reference": self.reference.name, "float32": numbers.to_json() | self._imposed()}
        limit = TIMES * numbers.own_max
        if not numbers.max <= limit:
            where = self._first_to_differ() or self._at_one_rank()
            check.failures.append(f"float32: logits differ by {numbers.max:.3g}, the bound is {limit:.3g}{where}")
        if not (off := _distance(ours.stepwise, self._by_token(wide, ours.stepwise))) <= limit:
            check.failures.append(f"float32: token by token, logits differ by {off:.3g}, the bound is {limit:.3g}")
        self._continuations(ours.tokens, limit)
        if narrow:
            name = str(self.stored).removeprefix("torch.")
            routes, more = None, {}
            if self.chosen:
                wide, routes = self.chosen.logits, self.chosen.routes
                own, share = self._narrowed(self.chosen)
                more = {"routing": "imposed from float32", "would_differ": share}
            else:
                own = self.reference.logits(self.prompts, self.stored)
            self.progress.advance(self.source.bytes)
            self._in_stored(name, wide, own, routes, more)
            self.progress.advance(self.source.bytes)
        self._coverage()
        self.progress.finish()
        return check

    def _in_stored(
        self, name: str, wide: "torch.Tensor", own: "torch.Tensor", routes: "Routes | None", more: dict[str, Any]
    ) -> None:
        """Compare in the stored dtype, in which the reference computes `own`."""
        from .reference import COARSE, relative

        check = self.check
        if not bool((finite := own.isfinite().all(-1)).all()):
            odd, of = int((~finite).sum()), finite.numel()
            words = f"in {name} the reference's logits are not finite at {odd} of {of} tokens: nothing to compare with"
            check.notes.append(
                f"{words}; in float32 they are finite: run it with --dtype bfloat16" if name == "float16" else words
            )
            return
        ours = self._shards(self.stored, routes=routes)
        if ours.odd is not None:
            check.failures.append(f"{name}: {ours.odd}; those of the reference are finite")
            return
        numbers = _numbers(ours.logits.float(), wide, own.float())
        check.numbers[name] = numbers.to_json() | more
        if (off := relative(own, wide)) > COARSE:
            words = f"the reference's own error, {off:.2g} of the scale of logits, is above {COARSE:.2g}: no bound"
            check.notes.append(f"{name}: {words}")
        elif not numbers.rms <= RMS * numbers.own_rms:
            words = f"is {numbers.rms:.3g} from the float32 reference, the bound is {RMS:g} × {numbers.own_rms:.3g}"
            check.failures.append(f"{name}: rms distance of logits {words}")

    def _shards(self, dtype: "torch.dtype", goes_on: bool = False, routes: "Routes | None" = None) -> "Computed":
        """What the shards compute; with `goes_on` also token by token, and greedy continuations."""
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
            self.check.best = SELF_CONSISTENT
            self.check.notes.append(
                f"every token depends on a routing tie: no logits were compared with {self.reference.name}"
            )
        return found

    def _imposed(self) -> dict[str, Any]:
        """The report on float32 routing: the shares of choices that were imposed, and of tokens that depend on them."""
        if self.chosen is None:
            return {}
        tokens = float(self.chosen.unsettled.double().mean())
        return {
            "routing": "imposed from the reference where experts tie",
            "imposed": self.chosen.share,
            "tokens": tokens,
        }

    def _narrowed(self, chosen: "Choices") -> "tuple[torch.Tensor, float]":
        """Logits in the stored dtype with the routing of float32, and the share of it that would have differed."""
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
        """New tokens of a continuation: as many as the model has positions for."""
        return min(NEW, positions(self.source) - self._starts.shape[1])

    def _continuations(self, tokens: Sequence[Sequence[int]], limit: float) -> None:
        """Greedy continuations equal the reference's, unless its margin is within the bound, or experts tie."""
        agreed, distinct, ties = 0, set(), 0
        theirs, margins = (
            found.tolist() for found in self.reference.greedy(self._starts, self._new, cached=self._turns)
        )
        for number, (start, ours) in enumerate(zip(self._starts.tolist(), tokens, strict=True), 1):
            each = zip(ours, theirs[number - 1], margins[number - 1], strict=True)
            for at, (one, other, margin) in enumerate(each):
                if one != other:
                    if not self._settled([*start, *ours[:at]]):
                        ties += 1
                    elif margin > 2 * limit:
                        words = f"the reference's is {other}, by a margin of {margin:.3g} over any other"
                        self.check.failures.append(f"float32: text {number}: token {at + 1} is {one}, {words}")
                    break  # from here on they diverge
                agreed += 1
                distinct.add(one)
                if one in self.others:
                    break  # a text does not go on from here
        self.check.numbers["continuations"] = {"texts": len(tokens), "tokens": agreed, "distinct": len(distinct)}
        if self.chosen is not None:
            self.check.numbers["continuations"]["ties"] = ties  # texts cut short by a routing tie
        if not agreed and not self.check.failures:
            self.check.best = UNPROVEN
            self.check.notes.append("no token that the model goes on with was compared")
        elif len(distinct) < DISTINCT and not self.check.failures:
            self.check.notes.append(
                f"the model went on with {len(distinct)} distinct tokens, {DISTINCT} would say more"
            )

    @cached_property
    def _turns(self) -> bool:
        """Whether rotary angles depend on the length of these texts."""
        from ..load import with_facts
        from ..model.spec import Spec

        spec = Spec.of(with_facts(self.source.layout.model.family), self.source.config, self.source.layout.model)
        reach = max(self.prompts.shape[1], self._starts.shape[1] + self._new)
        most = {"longrope": lambda rope: rope.original, "dynamic": lambda rope: rope.positions}
        return any(
            rope is not None and rope.kind in most and reach > most[rope.kind](rope)
            for rope in (spec.rope, spec.rope_near)
        )

    def _by_token(self, wide: "torch.Tensor", ours: "torch.Tensor") -> "torch.Tensor":
        """The reference's logits token by token: those of whole texts, unless rotary angles change within them."""
        if not self._turns:
            return wide
        from .on_ranks import pieces
        from .routing_ties import BATCH

        found = self.reference.stepwise(self.prompts[:BATCH], pieces(self.prompts.shape[1]))
        if self.chosen is not None:  # what depends on a tie is compared in whole texts only
            found = ours.where(self.chosen.unsettled[:BATCH, :, None], found)
        return found

    def _settled(self, ids: Sequence[int]) -> bool:
        """Whether no choice of experts in a text is a tie."""
        import torch

        from .routing_ties import decisions

        return self.chosen is None or self.chosen.settles(decisions(self.source, torch.tensor([ids]), torch.float32)[2])

    def _coverage(self) -> None:
        check, model = self.check, self.source.layout.model
        rows, vocab = len(set(self.prompts.flatten().tolist())), self.vocab - len(self.others)
        covered: dict[str, Any] = {"rows": rows, "vocabulary": vocab}
        if rows < vocab:
            check.notes.append(f"{vocab - rows} of {vocab} rows of the vocabulary were not used")
        if self.routed:
            experts = model.sizes["experts"]
            reached = sum(map(len, self.routed.values()))
            covered |= {"experts": reached, "of": experts * len(self.routed)}
            if reached < experts * len(self.routed):
                unused = experts * len(self.routed) - reached
                check.notes.append(f"{unused} of {experts * len(self.routed)} experts received no token")
        if (beyond := model.sizes.get("layer", 0) - model.main_layers) > 0 and model.main_layers:
            check.notes.append(f"{beyond} layers beyond the decoder's (multi-token prediction) are not run")
        check.numbers["coverage"] = covered
        worst = check.numbers["float32"]
        share = worst["max"] / worst["own_max"] if worst["own_max"] else math.inf if worst["max"] else 0.0
        done = check.numbers["continuations"]
        if not self.reference.independent:
            check.best, check.hint = SELF_CONSISTENT, self.reference.hint
        alone = (
            f"agrees with {self.reference.name}, not independent"
            if check.best == SELF_CONSISTENT and not check.failures
            else ""
        )
        check.words = (
            f"{alone or self.reference.name}; logits within {share:.2f} × its own error; {done['tokens']} tokens agree"
        )
        if self.chosen is not None:
            check.words += f"; {self.chosen.share:.2%} routing ties"
        for name, numbers in check.numbers.items():
            if isinstance(numbers, dict) and "kl" in numbers:
                largest, rms = f"max {numbers['max']:.2g}", f"rms {numbers['rms']:.2g}"
                if name == "float32":
                    largest += f" (bound {TIMES * numbers['own_max']:.2g})"
                else:
                    rms += f" (bound {RMS * numbers['own_rms']:.2g})"
                check.details.append(f"{name}: {largest}, {rms}, KL {numbers['kl']:.2g}")
        routed = f", {covered['experts']} of {covered['of']} experts" if "experts" in covered else ""
        check.details.append(f"covered: {rows} of {vocab} rows of the vocabulary{routed}")

    def _first_to_differ(self) -> str:
        """The first step that computes something else from the same input, and which of its tensors differ."""
        import torch

        from ..comm.threads import alone
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

    def _at_one_rank(self) -> str:
        """The first step, also at TP 1, that computes something else than an independent reference, and its inputs."""
        from .first_difference import first_to_differ

        if not self.reference.independent:
            return ""
        settled = None if self.chosen is None else ~self.chosen.unsettled[:2]
        if (found := first_to_differ(self.source, self.reference, self.prompts[:2], settled)) is None:
            return ""
        self.check.numbers["first"] = found.to_json()
        self.check.details += found.lines()
        return f"; the first step to differ is {found.name}, also at TP 1"


# --- distances -------------------------------------------------------------------------------------------------------


def _distance(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """The largest difference; NaN if one is not finite."""
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
