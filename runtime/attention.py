"""Attention on one rank: its own heads, of all tokens. What comes out are partial sums, to be added among the tensor parallel ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import Cache
from .rope import rotate
from .spec import Spec
from .weights import Weights, rms_norm


@dataclass(frozen=True)
class Heads:
    """Which heads this rank has. `ids`: query heads among all `total`; `kv`: its key and value heads; `size`, `value`: features of a
    key and of a value head; `copies`: ranks that hold the same key head; `whole`: key heads of the model."""

    ids: tuple[int, ...]
    total: int
    kv: int
    whole: int
    copies: int
    size: int
    value: int


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention; `q`: None where queries are not compressed."""

    q: int | None
    kv: int
    rope: int
    nope: int


@dataclass
class Context:
    """What all layers of one forward share. `mask`, `near`: who sees whom [batch, 1, seq, columns], without and with the window."""

    turn: tuple[Tensor, Tensor] | None
    mask: Tensor
    near: Tensor
    bias: Tensor | None
    cache: Cache | None


def attention(
    x: Tensor,
    weights: Weights,
    layer: int,
    spec: Spec,
    heads: Heads,
    latent: Latent | None,
    context: Context,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """x [batch, seq, hidden] → this rank's part of [batch, seq, hidden], without the output's bias.

    `reduce` adds a tensor [batch, seq, 2] among the ranks: norms over the whole projection need it.
    """
    q, k, v = (
        _latent(x, weights, layer, spec, heads, latent, context) if latent else _plain(x, weights, layer, spec, heads, context, reduce)
    )
    scale = spec.attn_scale / (layer + 1 if spec.scale_by_layer else 1)
    mask = context.near if layer in spec.windowed else context.mask
    out = _attend(q, k, v, scale, mask, spec.attn_cap, weights.get("attn.sinks"), context.bias)
    out = out.transpose(1, 2).flatten(2)
    return weights.linear(out, "attn.o", bias=False)


def _plain(
    x: Tensor, weights: Weights, layer: int, spec: Spec, heads: Heads, context: Context, reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, _ = x.shape
    n, m, size = len(heads.ids), heads.kv, heads.size
    q, k, v = weights.linear(x, "attn.qkv").split([n * size, m * size, m * size], -1)
    if (whole := weights.get("attn.q_norm_full")) is not None:
        squares = torch.stack((q.float().pow(2).sum(-1), k.float().pow(2).sum(-1) / heads.copies), -1)
        squares = reduce(squares) / torch.tensor([heads.total * size, heads.whole * size], device=x.device)
        q = rms_norm(q, whole, spec.eps, spec.norm_offset, squares[..., :1])
        k = rms_norm(k, weights["attn.k_norm_full"], spec.eps, spec.norm_offset, squares[..., 1:])
    q, k, v = (part.reshape(batch, seq, -1, size) for part in (q, k, v))
    if (one := weights.get("attn.q_norm")) is not None:
        q = rms_norm(q, one, spec.eps, spec.norm_offset)
        k = rms_norm(k, weights["attn.k_norm"], spec.eps, spec.norm_offset)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if spec.rope is not None and context.turn is not None:
        q, k = rotate(q, context.turn, spec.rope.interleaved), rotate(k, context.turn, spec.rope.interleaved)
    if context.cache is not None:
        k, v = context.cache.write(layer, k, v)
    return q, k, v


def _latent(
    x: Tensor, weights: Weights, layer: int, spec: Spec, heads: Heads, latent: Latent, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values come of one compressed vector per token, which is what is cached, the same on every rank."""
    batch, seq, _ = x.shape
    n = len(heads.ids)
    if latent.q is None:
        q = weights.linear(x, "attn.q_whole")
        c, k_rope = weights.linear(x, "attn.kv_a", runs=(latent.kv, latent.rope)).split([latent.kv, latent.rope], -1)
    else:
        runs = (latent.q, latent.kv, latent.rope)
        q, c, k_rope = weights.linear(x, "attn.qkv_a", runs=runs).split(runs, -1)
        q = weights.linear(rms_norm(q, weights["attn.q_a_norm"], spec.eps_latent), "attn.q_b")
    c = rms_norm(c, weights["attn.kv_a_norm"], spec.eps_latent)[:, None]
    k_rope = k_rope[:, None]
    q, q_rope = q.reshape(batch, seq, n, -1).transpose(1, 2).split([latent.nope, latent.rope], -1)
    if spec.rope is not None and context.turn is not None:
        q_rope, k_rope = (rotate(part, context.turn, spec.rope.interleaved) for part in (q_rope, k_rope))
    if context.cache is not None:
        c, k_rope = context.cache.write(layer, c, k_rope)
    kv = weights.linear(c[:, 0], "attn.kv_b", runs=(latent.nope, heads.value) * n)
    k, v = kv.reshape(batch, c.shape[2], n, -1).transpose(1, 2).split([latent.nope, heads.value], -1)
    return torch.cat((q, q_rope), -1), torch.cat((k, k_rope.expand(-1, n, -1, -1)), -1), v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, cap: float | None, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """q [batch, heads, seq, features], k and v [batch, kv, columns, …] → [batch, heads, seq, features of v]; softmax in float32."""
    batch, n, seq, _ = q.shape
    m, columns = k.shape[1], k.shape[2]
    scores = (q.reshape(batch, m, -1, q.shape[-1]) @ k.transpose(-1, -2)).view(batch, n, seq, columns) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores + bias * scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, seq, -1)), -1)
    shares = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., :columns]
    return (shares.reshape(batch, m, -1, columns) @ v).view(batch, n, seq, v.shape[-1])


def slopes(total: int) -> Tensor:
    """ALiBi's slope of each of `total` heads."""
    power = 2 ** math.floor(math.log2(total))
    first = [2 ** (-(2 ** -(math.log2(power) - 3)) * i) for i in range(1, power + 1)]
    more = [2 ** (-(2 ** -(math.log2(2 * power) - 3)) * i) for i in range(1, 2 * (total - power) + 1, 2)]
    return torch.tensor(first + more)
