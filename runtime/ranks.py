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

from reshard.mesh import Mesh

from .generate import Options, generate
from .launch import run_processes
from .load import load_model
from .parallel import World, run_threads

T = TypeVar("T")
Routes = dict[int, list[Tensor]]  # layer → the experts of every token, [tokens, top], of one forward after another

PATIENCE = 3600.0  # seconds that ranks wait for each other: they may have to take turns
BATCH = 8  # prompts that go through together


@dataclass(frozen=True)
class Computed:
    """What a rank computed. Logits of whole prompts, [prompts, tokens, vocab], and of the first few token by token from the middle on.

    `tokens`: how texts go on; `routed`: layer → the experts that tokens were sent to. All but rank 0 leave out what is the same on all.
    """

    logits: Tensor
    stepwise: Tensor
    tokens: list[list[int]]
    routed: dict[int, set[int]]


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
    """Logits of prompts; where there are `starts`, also token by token, and `new` tokens that each start goes on with."""
    decoder = load_model(out, dtype, mesh=mesh, world=world)
    for layer, weights in decoder.routers().items():
        weights.imposed = iter(routes[layer]) if routes else None
    parts: list[Tensor] = []
    steps: list[Tensor] = []
    for ids in prompts.split(BATCH):
        parts.append(decoder(ids, all_ranks=True))
        if starts and not steps:
            cache, half = decoder.new_cache(*ids.shape), ids.shape[1] // 2
            pieces = [ids[:, :half], *ids[:, half:].split(1, 1)]
            steps.append(torch.cat([decoder(piece, cache=cache, all_ranks=True) for piece in pieces], 1))
    tokens = generate(decoder, starts, Options(new)).tokens if starts else []
    routed = {layer: set(weights.routed) for layer, weights in decoder.routers().items()}
    if world.rank:
        return Computed(parts[0][:0], parts[0][:0], [], routed)
    return Computed(torch.cat(parts), steps[0] if steps else parts[0], tokens, routed)


@torch.inference_mode()
def walk(world: World, *, out: Path, mesh: Mesh, prompts: Tensor, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What each step of the model that this rank has a part in makes of the input given, in float32."""
    decoder = load_model(out, torch.float32, mesh=mesh, world=world)
    return {name: step(inputs[name]) for name, step in decoder.walk(prompts)}
