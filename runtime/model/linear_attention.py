"""Linear attention on one rank: a gated delta net over the rank's own heads. Returns partial sums.

The state has a fixed size: for each head a matrix that maps keys to values, and the last few inputs of the convolution.
Each token decays the matrix and corrects what it returns for the token's key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Context
from .experts import ACTIVATIONS
from .spec import Spec
from .weights import Weights, rms_norm


@dataclass(frozen=True)
class Linear:
    """This rank's heads: `keys` heads of queries and keys, `values` heads of values, several per key; their sizes."""

    keys: int
    key: int
    values: int
    value: int


def linear_attention(x: Tensor, weights: Weights, layer: int, spec: Spec, heads: Linear, context: Context) -> Tensor:
    """x [batch, seq, hidden] → this rank's part of [batch, seq, hidden]."""
    batch, seq, _ = x.shape
    keys, values = heads.keys * heads.key, heads.values * heads.value
    mixed, z = weights.linear(x, "lin.qkvz").split([2 * keys + values, values], -1)
    strength, fading = weights.linear(x, "lin.ba").float().chunk(2, -1)
    strength = strength.sigmoid().masked_fill(~context.real[..., None], 0)  # padding changes nothing
    fading = -weights["lin.a_log"].float().exp() * F.softplus(fading + weights["lin.dt_bias"].float())
    fading = fading.masked_fill(~context.real[..., None], 0)

    before = context.cache.states.get(layer) if context.cache is not None else None
    if before is None:
        reach = weights["lin.conv"].shape[-1] - 1
        before = (
            mixed.new_zeros(batch, reach, mixed.shape[-1]),
            torch.zeros(batch, heads.values, heads.key, heads.value, device=x.device),
        )
    mixed, reached = _convolve(mixed, context.real, before[0], weights["lin.conv"])
    q, k, v = ACTIVATIONS[spec.activation](mixed).split([keys, keys, values], -1)
    q, k = (
        _unit(part.view(batch, seq, -1, heads.key)).repeat_interleave(heads.values // heads.keys, 2) for part in (q, k)
    )
    out, memory = _recall(
        q * heads.key**-0.5, k, v.view(batch, seq, -1, heads.value).float(), strength, fading.exp(), before[1]
    )
    if context.cache is not None:
        context.cache.states[layer] = reached, memory

    out = rms_norm(out.to(x.dtype), weights["lin.norm"], spec.eps)
    out = (out * F.silu(z.reshape(out.shape).float())).to(x.dtype)
    return weights.linear(out.flatten(2), "lin.o", bias=False)


def _convolve(x: Tensor, real: Tensor, before: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x [batch, seq, channels] with taps [channels, 1, kernel], following `before`.

    Also returns the last inputs, as many as `before` has. Padding is sorted first: it must not stand between tokens.
    """
    joined = torch.cat((before, x.masked_fill(~real[..., None], 0)), 1)
    order = (
        torch.cat((torch.ones_like(real[:, :1]).expand(-1, before.shape[1]), real), 1).int().argsort(dim=1, stable=True)
    )
    ordered = joined.gather(1, order[..., None].expand_as(joined))
    mixed = F.conv1d(F.pad(ordered.transpose(1, 2), (before.shape[1], 0)), taps, groups=taps.shape[0]).transpose(1, 2)
    back = order.argsort(1)[:, before.shape[1] :]
    return mixed.gather(1, back[..., None].expand_as(x)), ordered[:, ordered.shape[1] - before.shape[1] :]


def _unit(x: Tensor) -> Tensor:
    """Each head's features in float32, normalised to unit length."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def _recall(q: Tensor, k: Tensor, v: Tensor, strength: Tensor, fading: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What each query reads [batch, seq, heads, value], and the memory [batch, heads, key, value] after the last."""
    found = torch.empty_like(v)
    for at in range(q.shape[1]):
        memory = memory * fading[:, at, :, None, None]
        known = (k[:, at, :, None] @ memory).squeeze(2)
        correction = (v[:, at] - known) * strength[:, at, :, None]
        memory = memory + k[:, at, :, :, None] * correction[:, :, None]
        found[:, at] = (q[:, at, :, None] @ memory).squeeze(2)
    return found, memory
