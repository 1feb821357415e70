"""The statistics of a generation: rates, memory, and how they compare with the machine's memory bandwidth."""

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from reshard.text.units import binary, decimal

if TYPE_CHECKING:
    from .comm.collectives import World
    from .generate import Generated
    from .model.decoder import Decoder

_READ = 256 << 20  # bytes that each rank reads at most to measure the memory bandwidth
_PIECE = 4 << 10  # bytes: smaller tensors are not read for that


def statistics(
    decoder: "Decoder", world: "World", done: "Generated", prompts: Sequence[Sequence[int]], times: dict[str, float]
) -> dict[str, Any]:
    """Rates, memory and the machine's bandwidth, over all ranks; all ranks call it."""
    import torch

    tensors = list({parameter.data_ptr(): parameter for parameter in decoder.parameters()}.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = [
        sum(t.nbytes for t in tensors),
        done.cache,
        touched(decoder, len(prompts)),
        peak,
        done.exchanging,
        *bandwidth(tensors, world),
    ]
    every = world.all_gather(
        torch.tensor([mine], dtype=torch.float64), range(world.size), [1] * world.size, 0, "statistics"
    ).tolist()
    weights, caches, per_step, peaks, exchanging, read, seconds = (list(column) for column in zip(*every, strict=True))
    machine = sum(read) / max(*seconds, 1e-9) if any(seconds) else None
    rate = done.steps / done.decoding if done.steps else None
    spent = done.first + done.decoding
    return {
        "mesh": str(decoder.layout.mesh),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "device": str(tensors[0].device.type),
        "seconds": {name: round(value, 6) for name, value in times.items()},
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(map(len, done.tokens)),
        "tokens_per_second": done.rate,
        "steps": done.steps,
        "bytes_per_step": int(sum(per_step)),
        "bandwidth": rate and sum(per_step) * rate,
        "machine_bandwidth": machine,
        "share_of_machine": rate and machine and sum(per_step) * rate / machine,
        "share_in_collectives": max(exchanging) / spent if spent else 0.0,
        "memory": {"weights": list(map(int, weights)), "cache": list(map(int, caches)), "peak": list(map(int, peaks))},
        "balance": max(weights) / (sum(weights) / len(weights)),
    }


def touched(decoder: "Decoder", batch: int) -> int:
    """Bytes of this rank's weights that a step reads: all, except for rows of the embedding and experts not used."""
    state = dict(decoder.named_parameters())
    sizes, total = decoder.model.sizes, 0.0
    routing = decoder.spec.routing
    for name, tensor in state.items():
        share = 1.0
        if name in ("embed", "pos_embed") and (name != "embed" or "head" in state or "head" not in decoder.model.alias):
            share = min(1.0, batch / max(1, tensor.shape[0]))
        elif ".moe." in name and tensor.dim() == 3 and routing is not None:
            share = min(1.0, batch * routing.top / sizes["experts"])
        total += tensor.nbytes * share
    return int(total)


def bandwidth(tensors: Sequence[Any], world: "World") -> tuple[float, float]:
    """Bytes that this rank read of its weights while all others did so too, and the seconds that took.

    Matrices are multiplied with a vector, which is limited by memory bandwidth; tensors of other dtypes are summed.
    """
    import torch

    parts: list[tuple[int, Callable[[], Any]]] = []
    left = _READ
    for tensor in tensors:
        if not tensor.is_contiguous() or min(tensor.nbytes, left) < _PIECE:
            continue
        if tensor.dim() == 2 and tensor.dtype in (torch.bfloat16, torch.float32):
            matrix = tensor.detach()[: max(1, left // tensor[0].nbytes)]
            parts.append((matrix.nbytes, partial(torch.mv, matrix, torch.ones_like(matrix[0]))))
        else:
            flat = tensor.detach().reshape(-1)[: left // tensor.element_size()]
            flat = flat[: flat.numel() // 8 * 8].view(torch.int64)
            parts.append((flat.nbytes, flat.sum))
        left -= parts[-1][0]
    if not parts:
        return 0.0, 0.0
    for _, look in parts:
        look()  # warm up, so that no page is mapped while the clock runs
    world.meet("measure bandwidth")
    synchronize: Callable[[], object] = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    synchronize()
    size, read, began = sum(nbytes for nbytes, _ in parts), 0, time.perf_counter()
    while read == 0 or time.perf_counter() - began < 0.05:
        for _, look in parts:
            look()
        read += size
    synchronize()
    return float(read), time.perf_counter() - began


def lines(about: dict[str, Any]) -> list[str]:
    """The statistics, for people."""
    seconds, memory = about["seconds"], about["memory"]
    ranks = f"{about['ranks']} process{'es' if about['ranks'] > 1 else ''} on {about['device']}"
    found = [
        f"job          {about['mesh']}: {ranks}, {about['threads']} thread{'s' if about['threads'] > 1 else ''} each",
        f"start        {seconds['start']:.2f} s, load {seconds['load']:.2f} s",
        f"first token  {seconds['first_token'] * 1000:.1f} ms after {about['prompt_tokens']} prompt tokens",
    ]
    if about["tokens_per_second"]:
        found.append(
            f"decode       {about['tokens_per_second']:,.1f} tokens/s "
            f"({about['new_tokens']} tokens, {about['steps']} steps)"
        )
        machine = ""
        if about["machine_bandwidth"]:
            reach = decimal(int(about["machine_bandwidth"]))
            machine = f", {about['share_of_machine']:.0%} of the {reach}/s that these ranks can read"
        found.append(f"bandwidth    {decimal(int(about['bandwidth']))}/s of weights{machine}")
    found.append(f"collectives  {about['share_in_collectives']:.0%} of the time")
    kinds = [f"{name} {_folded(memory[name])}" for name in ("weights", "cache", "peak")]
    found.append(f"memory       {', '.join(kinds)} per rank")
    found.append(f"balance      {about['balance']:.3f} (largest over mean)")
    return found


def _folded(sizes: Sequence[int]) -> str:
    low, high = binary(min(sizes)), binary(max(sizes))
    return low if low == high else f"{low} to {high}"
