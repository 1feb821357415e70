"""Logits that are not finite: which step on which rank is the first to produce inf or NaN, and the remedy."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reshard.errors import ReshardError

from ..comm.collectives import gathered
from .decoder import HEAD, PARTIAL
from .local_shapes import language
from .step_inputs import belongs

if TYPE_CHECKING:
    from .decoder import Decoder


class NotFinite(ReshardError):
    """The logits are not finite: no next token can be chosen."""


@torch.inference_mode()
def not_finite(decoder: "Decoder", ids: Tensor, what: str) -> NotFinite:
    """The error for a text, tokens [1, seq], whose next logits are not finite. All ranks call it, and all get the same.

    The text is run again step by step. If it then stays finite, as rounding near the limit may allow, no step is named.
    """
    mesh, dtype = decoder.layout.mesh, str(decoder.dtype).removeprefix("torch.")
    message = f"{what}: the logits after token {ids.shape[1]} are not finite in {dtype}"
    every = [found for found in gathered(decoder.world, _walked(decoder, ids), "not finite") if found]
    if not every:
        return NotFinite(f"{message}; run step by step, they are finite", _remedy(dtype, None))
    stage = [found for found in every if mesh.stage(found["rank"]) == mesh.stage(every[0]["rank"])]
    first = next((found for found in stage if found["tensor"]), None) or next(
        (found for found in stage if found["alone"]), stage[0]
    )
    message += (
        f": {first['step']}, rank {first['rank']}, is the first to give {first['value']}, at token {first['token']}"
    )
    if first["tensor"]:
        message += f"; its {first['tensor']} holds {first['holds']}"
    return NotFinite(message, _remedy(dtype, first))


def _remedy(dtype: str, found: dict[str, Any] | None) -> str:
    narrow = "float16 overflows above 65504; --dtype bfloat16 has the range of float32"
    if found and found["tensor"] and (dtype != "float16" or found["stored"] == "F16"):
        return (
            f"{found['tensor']} is stored like that: convert again from a good copy; "
            "reshard verify --against SRC says whether the original has it too"
        )
    if dtype == "float16":
        return narrow
    return "reshard verify --against SRC says whether another implementation gets finite logits from the original"


def _walked(decoder: "Decoder", ids: Tensor) -> dict[str, Any] | None:
    """The first step of this rank whose output is not finite, or None. Runs to the end, as the other ranks do."""
    world, width, alone = decoder.world, len(decoder.has.ranks), False
    found: dict[str, Any] | None = None
    x: Tensor | None = None

    def look(part: str, part_of: Tensor) -> None:
        nonlocal alone
        alone = alone or (part == PARTIAL and not bool(part_of.isfinite().all()))

    if not decoder.has.first:
        before = decoder.rank - width
        shape = world.recv((3,), torch.int64, before, "stage", decoder.device).tolist()
        x = world.recv(shape, decoder.dtype, before, "stage", decoder.device)
    came = x is None or bool(x.isfinite().all())
    decoder.watch = look
    try:
        for step, call in decoder.walk(ids):
            alone = False
            x = call(x if step != HEAD or x is None else x[:, -1:])
            if came and found is None and not bool(x.isfinite().all()):
                odd = int((~x.isfinite()).any(-1)[0].nonzero()[0])
                value = "nan" if bool(x[0, odd].isnan().any()) else "inf"
                token = ids.shape[1] if step == HEAD else odd + 1
                found = {"step": step, "rank": decoder.rank, "alone": alone, "token": token, "value": value} | _held(
                    decoder, step
                )
    finally:
        decoder.watch = None
    if not decoder.has.last:
        assert x is not None
        world.send(torch.tensor(x.shape, device=x.device), decoder.rank + width, "stage")
        world.send(x, decoder.rank + width, "stage")
    return found


def _held(decoder: "Decoder", step: str) -> dict[str, Any]:
    """The first weight of a step that is not finite, what it contains, its stored dtype; None where all are finite."""
    there = dict(decoder.named_parameters())
    for slot in language(decoder.layout, decoder.rank):
        for point in slot.points():
            name = slot.name(point)
            tensor = there.get(name)
            if tensor is None or not tensor.is_floating_point() or not belongs(name, step, "head" not in there):
                continue
            if not bool((whole := tensor.float()).isfinite().all()):
                holds = "nan" if bool(whole.isnan().any()) else "inf"
                return {"tensor": name, "holds": holds, "stored": decoder.layout.dtype(slot, point)}
    return {"tensor": None, "holds": None, "stored": None}
