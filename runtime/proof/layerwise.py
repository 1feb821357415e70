"""The numeric proof layer by layer, of a model that is larger than the memory: every step gets the same input on both sides.

The reference is this runtime at TP 1, from the original files, so that the rung is self-consistent at best. In float32 a step of the
shards may differ from it by at most 4 × what the step itself changes between float32 and float64. Memory: one layer at a time, in float64
at most.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reshard.jobs.verdict import SELF_CONSISTENT, UNPROVEN, Rung
from reshard.layout.mesh import Mesh
from reshard.text.progress import Progress

from ..comm.collectives import World, alone, run_threads
from ..load import open_for
from ..model.step_inputs import belongs
from .bounds import TIMES
from .culprit import culprit
from .prompts import prompts_for
from .routing_ties import Margins, Routes, bound, impose, recording, tossed

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source


class _Part:
    """One rank's part of a model, of which only the weights of the step at hand are in memory."""

    def __init__(self, place: "Source", world: World, dtype: torch.dtype, mesh: Mesh | None = None) -> None:
        self.opened = open_for(place, mesh, world)
        self.tied = not self.opened.layout.pieces.get("head")
        self.rank, self.dtype = world.rank, dtype
        self.decoder = self.opened.decoder(world).to(dtype)

    def hold(self, step: str) -> None:
        """Have the weights of a step, and no others."""
        self.drop()
        state = self.opened.state(self.rank, self.dtype, only=lambda name: belongs(name, step, self.tied))
        self.decoder.load_state_dict(state, strict=False, assign=True)

    def drop(self) -> None:
        empty = {name: tensor.to("meta") for name, tensor in self.decoder.named_parameters() if not tensor.is_meta}
        self.decoder.load_state_dict(empty, strict=False, assign=True)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, for each thread

    def steps(self, ids: Tensor) -> Iterator[str]:
        for name, _ in self.decoder.walk(ids):
            yield name

    def run(self, step: str, ids: Tensor, x: Tensor | None, routes: Routes | None = None) -> tuple[Tensor, Routes, Margins]:
        """What a step makes of x, with `routes` imposed where it has a router; what that chose, and how sure it was."""
        self.hold(step)
        impose(self.decoder, routes)
        call = next(call for name, call in self.decoder.walk(ids) if name == step)
        with recording(self.decoder) as recorded:
            output = call(None if x is None else x.to(self.dtype))
        seen = {layer: each[0] for layer, each in recorded.items() if each}
        return (
            output,
            {at: chosen.view(*ids.shape, -1) for at, (chosen, _) in seen.items()},
            {at: m.view(ids.shape) for at, (_, m) in seen.items()},
        )


@contextmanager
def _once(part: _Part) -> Iterator[_Part]:
    try:
        yield part
    finally:
        part.drop()


def layer_by_layer(opened: "Source", source: "Source", progress: Progress) -> Rung:
    """The rung, for shards and their original. The mesh of the shards is that of the ranks, which are threads."""
    rung, mesh = Rung("numerics", best=SELF_CONSISTENT), opened.layout.mesh
    ids = prompts_for(source)[:2]
    x: Tensor | None = None
    output, own, worst, count, odd = torch.empty(0), 0.0, 0.0, 0, ""
    differ: dict[int, float] = {}
    imposed: Routes = {}
    shares: list[float] = []

    def reference(step: str, narrow: _Part, wide: _Part) -> None:
        nonlocal output, own, imposed
        with _once(narrow):
            output, routes, margins = narrow.run(step, ids, x)
        with _once(wide):
            exact, _, others = wide.run(step, ids, x, routes)
        odd = {layer: tossed(margin, bound(margin, others[layer], TIMES)) for layer, margin in margins.items()}
        imposed = {layer: routes[layer].where(each[..., None], -1) for layer, each in odd.items()}
        shares.extend(float(each.double().mean()) for each in odd.values())
        own = float((output.double() - exact).abs().max())

    def work(world: World) -> None:
        nonlocal x, worst, count, odd
        with torch.inference_mode():
            mine = _Part(opened, world, torch.float32, mesh)  # read, not mapped: a mapping counts as memory under ulimit
            narrow, wide = (_Part(source, alone(), dtype) for dtype in (torch.float32, torch.float64))
            steps, ours = list(narrow.steps(ids)), set(mine.steps(ids))
            for step in steps:
                if world.rank == 0:
                    differ.clear()
                    reference(step, narrow, wide)
                    odd = "" if bool(output.isfinite().all()) and math.isfinite(own) else step
                world.meet(f"the reference of {step}")
                if odd:
                    break
                if step in ours:
                    differ[world.rank] = float((mine.run(step, ids, x, imposed)[0].double() - output.double()).abs().max())
                    mine.drop()
                world.meet(f"the shards of {step}")
                if world.rank == 0:
                    largest, limit = max(differ.values(), key=lambda value: (value != value, value)), TIMES * own
                    if not largest <= limit and not rung.failures:
                        words = f"differs by {largest:.3g}" if math.isfinite(largest) else "is not finite, that of the reference is"
                        words += f", {limit:.3g} is the bound{culprit(step, opened, source)}"
                        rung.failures.append(f"float32: {step} {words}")
                    share = largest / own if own and math.isfinite(largest) else 0.0
                    worst, count, x = max(worst, share), count + 1, output
                    progress.advance(opened.bytes // len(steps))
                world.meet(f"the comparison of {step}")

    progress.start("running the model layer by layer", opened.bytes)
    run_threads(mesh.world, work, timeout=3600)
    progress.finish()
    rung.numbers = {"reference": "this runtime at TP 1", "steps": count, "worst": worst}
    rung.words = f"agrees with this runtime at TP 1, not independent; {count} steps, each from the same input; "
    rung.words += f"off by {worst:.2f} × its own error at most"
    rung.hint = "without --layers, where there is memory for it, it is compared with transformers"
    if odd:
        rung.best = UNPROVEN
        rung.notes.append(f"{odd} of the reference gives what is not finite: nothing to compare with from there on")
    if shares:
        rung.numbers["imposed"] = sum(shares) / len(shares)
        rung.words += f"; {rung.numbers['imposed']:.2%} of routing imposed"
    rung.notes.append("layer by layer: tokens that the model goes on with, and what transformers computes, were not compared")
    return rung
