"""One layer's weights on one rank, and operations on any weight: products, norms, dequantization. Knows no layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # rows and columns that share a scale in FP8 checkpoints
BITS, GROUP = 4, 32  # bits of a packed number; columns that share a scale in packed checkpoints


@dataclass
class Router:
    """What a router did, and what it has to do.

    `routed`: experts that received tokens. If set, `decisions` collects each forward's choices, [tokens, top], and
    margins, [tokens], and `imposed` replaces the router's choices, except for rows of -1.
    """

    routed: set[int] = field(default_factory=set)
    decisions: list[tuple[Tensor, Tensor]] | None = None
    imposed: Tensor | None = None


class Weights:
    """The stored tensors of a layer by their names in it: `attn.qkv`, `mlp.down` …"""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.routers = {part: Router() for part in ("moe", "moa") if f"{part}.router" in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def matrix(self, name: str, dtype: torch.dtype, runs: Sequence[int] = (), expert: int | None = None) -> Tensor:
        """A matrix in `dtype`, dequantized if it has scales. `runs`: rows of fused parts, each with its own blocks."""
        packed = f"{name}_packed" in self.tensors
        weight, scale = self.tensors[f"{name}_packed" if packed else name], self.tensors.get(f"{name}_scale")
        if expert is not None:
            weight, scale = weight[expert], None if scale is None else scale[expert]
        if scale is None:
            return weight if weight.dtype == dtype else weight.to(dtype)
        if packed:
            numbers = unpacked(weight)
            return (numbers * scale.float().repeat_interleave(GROUP, -1)[..., : numbers.shape[-1]]).to(dtype)
        if scale.shape[0] == weight.shape[0]:
            return (weight.float() * scale.float()).to(dtype)
        rows = _blocks(runs or [weight.shape[0]], weight.device)
        columns = _blocks([weight.shape[1]], weight.device)
        return (weight.float() * scale.float()[rows][:, columns]).to(dtype)

    def rows(self, name: str) -> int:
        """Rows of a matrix, or of each matrix of a stack."""
        return self.tensors[f"{name}_packed" if f"{name}_packed" in self.tensors else name].shape[-2]

    def linear(self, x: Tensor, name: str, runs: Sequence[int] = (), bias: bool = True) -> Tensor:
        """x · weightᵀ, with the bias of the same name if there is one."""
        return multiply(x, self.matrix(name, x.dtype, runs), self.get(f"{name}_bias") if bias else None)


def unpacked(packed: Tensor) -> Tensor:
    """Unpack unsigned 4-bit numbers, lowest bits first, and centre them at 0: [..., columns / 8] → [..., columns]."""
    shifts = torch.arange(0, 32, BITS, device=packed.device, dtype=packed.dtype)
    numbers = (packed[..., None] >> shifts) & ((1 << BITS) - 1)
    return numbers.flatten(-2).float() - (1 << (BITS - 1))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias. One row is bound by memory bandwidth: torch's matrix-vector product is up to 1.5 × faster."""
    if x.dtype is not torch.bfloat16 or x.numel() != x.shape[-1] or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    return (torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)).view(*x.shape[:-1], -1)


def _blocks(runs: Sequence[int], device: torch.device) -> Tensor:
    """The block index of every row; each run starts a new block."""
    found, start = [], 0
    for run in runs:
        found.append(start + torch.arange(run, device=device) // BLOCK)
        start += -(-run // BLOCK)
    return torch.cat(found)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, mean: Tensor | None = None) -> Tensor:
    """RMS norm over the last axis, in float32; `mean`: the mean of squares, where it spans more than this tensor."""
    wide = x.float()
    if mean is None:
        mean = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(mean + eps)
    if weight is None:
        return wide.to(x.dtype)
    return (wide * (weight.float() + offset)).to(x.dtype) if offset else weight * wide.to(x.dtype)


def norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    """A norm of either kind over the last axis. The weight may have more axes: one norm for each head."""
    if kind == "rms":
        return rms_norm(x, weight, eps, offset)
    weight = weight if weight is None or not offset else weight + offset
    if weight is None or weight.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)
