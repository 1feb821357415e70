"""What each rank of a mesh computes for the numerics check, as threads of this process or as separate processes.

    threads      cheap: two cores can prove TP 64
    processes    connected by gloo over loopback, started like those of `reshard generate`

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

from ..comm.collectives import World
from ..comm.launch import run_processes
from ..comm.threads import run_threads
from ..generate import Options, generate
from ..load import load_model
from ..model.finite import NotFinite, not_finite
from .routing_ties import BATCH, Routes, Where, impose

T = TypeVar("T")

PATIENCE = 3600.0  # seconds that ranks wait for each other: they may have to share few cores


@dataclass(frozen=True)
class Computed:
    """What a rank computed; ranks other than 0 leave out what is equal on all.

    `logits` of whole prompts, [prompts, tokens, vocab]; `stepwise`: of the first few, token by token from the middle;
    `tokens`: continuations; `routed`: router → experts that received tokens; `odd`: the first step that is not finite.
    """

    logits: Tensor
    stepwise: Tensor
    tokens: list[list[int]]
    routed: dict[Where, set[int]]
    odd: str | None = None


def on_ranks(mesh: Mesh, processes: bool, work: Callable[..., T], **given: Any) -> list[T]:
    """`work(world, mesh=…, **given)` on every rank of a mesh; the results in rank order. Raises the first failure."""
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
    """Logits of prompts; with `starts`, also token by token, and continuations of `new` tokens for each start.

    `routes` are imposed, except on continuations.
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
    """How a prompt is split for token by token: its first half at once."""
    half = length // 2
    return [(0, half), *((at, at + 1) for at in range(half, length))]


@torch.inference_mode()
def walk(
    world: World, *, out: Path, mesh: Mesh, prompts: Tensor, inputs: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """What each step of the model that this rank takes part in makes of the given input, in float32."""
    decoder = load_model(out, torch.float32, mesh=mesh, world=world)
    return {name: step(inputs[name]) for name, step in decoder.walk(prompts)}
