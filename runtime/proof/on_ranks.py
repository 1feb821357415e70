"""Ranks: what each rank of a mesh computes for the numeric proof, as threads of this process or as processes of their own.

    threads      cheap: two cores can prove TP 64
    processes    connected by gloo over loopback, started as `reshard generate` starts them

Knows no reference and no bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from reshard.layout.mesh import Mesh

from ..comm.collectives import World, run_threads
from ..comm.launch import run_processes
from ..generate import Options, generate
from ..load import load_model
from ..model.finite import NotFinite, not_finite
from .routing_ties import BATCH, Routes, Where, impose

T = TypeVar("T")

PATIENCE = 3600.0  # seconds that ranks wait for each other: they may have to take turns


@dataclass(frozen=True)
class Computed:
    """What a rank computed. Logits of whole prompts, [prompts, tokens, vocab], and of the first few token by token from the middle on.

    `tokens`: how texts go on; `routed`: router → the experts that tokens were sent to; `odd`: the first step that is not finite, in words.
    All but rank 0 leave out what is the same on all.
    """

    logits: Tensor
    stepwise: Tensor
    tokens: list[list[int]]
    routed: dict[Where, set[int]]
    odd: str | None = None


def on_ranks(mesh: Mesh, processes: bool, work: Callable[..., T], **given: Any) -> list[T]:
    """`work(world, mesh=…, **given)` on every rank of a mesh; the results in their order. Raises what the first to fail raised."""
    call = partial(work, mesh=mesh, **given)
    return run_processes(mesh.world, call, PATIENCE) if processes else run_threads(mesh.world, call, PATIENCE)


@torch.inference_mode()
def compute(
    world: World,
    *,
    out: Path,
    mesh: Mesh,
    dtype: torch.dtype,
    prompts: Tensor,
    starts: Sequence[Sequence[int]] = (),
    new: int = 0,
    routes: Routes | None = None,
) -> Computed:
    """Logits of prompts; where there are `starts`, also token by token, and `new` tokens that each start goes on with.

    `routes` are imposed, but not on the texts that go on.
    """
    decoder = load_model(out, dtype, mesh=mesh, world=world)
    length = prompts.shape[1]

    def forward(rows: slice, low: int = 0, high: int = length, cache: Any = None) -> Tensor:
        impose(decoder, routes, rows, slice(low, high))
        logits: Tensor = decoder(prompts[rows, low:high], cache=cache, all_ranks=True)
        return logits

    whole = torch.cat([forward(slice(at, at + BATCH)) for at in range(0, len(prompts), BATCH)])
    stepwise, tokens, odd = whole[:0], [], None
    if not bool((finite := whole.isfinite().all(-1)).all()):
        impose(decoder, None)
        row, column = (~finite).nonzero()[0].tolist()
        odd = not_finite(decoder, prompts[row : row + 1, : column + 1], f"text {row + 1}").message
    elif starts:
        first = slice(0, BATCH)
        cache = decoder.new_cache(len(prompts[first]), length)
        stepwise = torch.cat([forward(first, low, high, cache) for low, high in pieces(length)], 1)
        impose(decoder, None)
        try:
            tokens = generate(decoder, starts, Options(new)).tokens
        except NotFinite as error:
            odd = error.message
    routed = {where: set(router.routed) for where, router in decoder.routers().items()}
    if world.rank:
        return Computed(whole[:0], whole[:0], [], routed)
    return Computed(whole, stepwise, tokens, routed, odd)


def pieces(length: int) -> list[tuple[int, int]]:
    """How a prompt is taken token by token: its first half at once."""
    half = length // 2
    return [(0, half), *((at, at + 1) for at in range(half, length))]


@torch.inference_mode()
def walk(world: World, *, out: Path, mesh: Mesh, prompts: Tensor, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What each step of the model that this rank has a part in makes of the input given, in float32."""
    decoder = load_model(out, torch.float32, mesh=mesh, world=world)
    return {name: step(inputs[name]) for name, step in decoder.walk(prompts)}
