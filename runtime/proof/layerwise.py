"""The numerics check layer by layer, for models larger than memory: every step gets the same input on both sides.

The reference is this runtime at TP 1, from the original files, so the check is self-consistent at best. In float32 a
step of the shards may differ from it by at most 4 × the step's own change between float32 and float64. Memory: one
layer at a time, in float64 at most.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reshard.jobs.verdict import SELF_CONSISTENT, UNPROVEN, Check
from reshard.layout.mesh import Mesh
from reshard.text.progress import Progress

from ..comm.collectives import World
from ..comm.threads import alone, run_threads
from ..load import open_for
from ..model.step_inputs import belongs
from .bounds import TIMES
from .culprit import culprit
from .prompts import prompts_for
from .routing_ties import Margins, Routes, bound, impose, recording, tied

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source


class _Part:
    """One rank's part of a model, with only the weights of the current step in memory."""

    def __init__(self, place: "Source", world: World, dtype: torch.dtype, mesh: Mesh | None = None) -> None:
        self.opened = open_for(place, mesh, world)
        self.tied = not self.opened.layout.pieces.get("head")
        self.rank, self.dtype = world.rank, dtype
        self.decoder = self.opened.decoder(world).to(dtype)

    def hold(self, step: str) -> None:
        """Load the weights of a step, and drop all others."""
        self.drop()
        state = self.opened.state(self.rank, self.dtype, only=lambda name: belongs(name, step, self.tied))
        self.decoder.load_state_dict(state, strict=False, assign=True)

    def drop(self) -> None:
        empty = {name: tensor.to("meta") for name, tensor in self.decoder.named_parameters() if not tensor.is_meta}
        self.decoder.load_state_dict(empty, strict=False, assign=True)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, per thread

    def steps(self, ids: Tensor) -> Iterator[str]:
        for name, _ in self.decoder.walk(ids):
            yield name

    def run(
        self, step: str, ids: Tensor, x: Tensor | None, routes: Routes | None = None
    ) -> tuple[Tensor, Routes, Margins]:
        """The output of a step for x, with `routes` imposed if it has a router; that router's choices and margins."""
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


def layer_by_layer(opened: "Source", source: "Source", progress: Progress) -> Check:
    """Run the check for shards and their original. Ranks are threads, on the mesh of the shards."""
    check, mesh = Check("numerics", best=SELF_CONSISTENT), opened.layout.mesh
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
        odd = {layer: tied(margin, bound(margin, others[layer], TIMES)) for layer, margin in margins.items()}
        imposed = {layer: routes[layer].where(each[..., None], -1) for layer, each in odd.items()}
        shares.extend(float(each.double().mean()) for each in odd.values())
        own = float((output.double() - exact).abs().max())

    def work(world: World) -> None:
        nonlocal x, worst, count, odd
        with torch.inference_mode():
            # Read, not mapped: a mapping counts as memory under ulimit.
            mine = _Part(opened, world, torch.float32, mesh)
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
                    differ[world.rank] = float(
                        (mine.run(step, ids, x, imposed)[0].double() - output.double()).abs().max()
                    )
                    mine.drop()
                world.meet(f"the shards of {step}")
                if world.rank == 0:
                    largest, limit = max(differ.values(), key=lambda value: (value != value, value)), TIMES * own
                    if not largest <= limit and not check.failures:
                        words = (
                            f"differs by {largest:.3g}" if math.isfinite(largest) else "is not finite, the reference is"
                        )
                        words += f", the bound is {limit:.3g}{culprit(step, opened, source)}"
                        check.failures.append(f"float32: {step} {words}")
                    share = largest / own if own and math.isfinite(largest) else 0.0
                    worst, count, x = max(worst, share), count + 1, output
                    progress.advance(opened.bytes // len(steps))
                world.meet(f"the comparison of {step}")

    progress.start("running the model layer by layer", opened.bytes)
    run_threads(mesh.world, work, timeout=3600)
    progress.finish()
    check.numbers = {"reference": "this runtime at TP 1", "steps": count, "worst": worst}
    check.words = f"agrees with this runtime at TP 1, not independent; {count} steps, each from the same input; "
    check.words += f"within {worst:.2f} × its own error"
    check.hint = "without --layers, given enough memory, it compares with transformers"
    if odd:
        check.best = UNPROVEN
        check.notes.append(f"{odd} of the reference is not finite: nothing to compare with from there on")
    if shares:
        check.numbers["imposed"] = sum(shares) / len(shares)
        check.words += f"; {check.numbers['imposed']:.2%} routing ties"
    check.notes.append("layer by layer: continuations, and what transformers computes, were not compared")
    return check
