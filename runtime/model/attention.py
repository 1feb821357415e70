"""Attention on one rank: its own heads, all tokens. Returns partial sums, to be added over tensor parallel ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reshard.errors import ReshardError

from .cache import Cache
from .rope import rotate
from .sparse_attention import chosen, index_keys
from .spec import Spec
from .weights import Weights, norm, rms_norm


@dataclass(frozen=True)
class Heads:
    """The attention heads of this rank.

    `ids`: its query heads among all `total`; `kv`: how many key and value heads it has; `whole`: key heads of the
    model; `copies`: ranks that hold the same key head; `size`, `value`: features of a key and of a value head.
    """

    ids: tuple[int, ...]
    total: int
    kv: int
    whole: int
    copies: int
    size: int
    value: int


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention; `q`: None where queries are not compressed."""

    q: int | None
    kv: int
    rope: int
    nope: int


@dataclass
class Sight:
    """The mask of layers of one kind, [batch, 1, seq, columns], and the rotary angles of the new tokens."""

    mask: Tensor
    turn: tuple[Tensor, Tensor] | None


@dataclass
class Context:
    """What all layers of one forward share.

    `ids`: the tokens; `real`: those that are not padding [batch, seq]; `far`, `near`: masks and angles of layers
    without and with a window; `growth`: factor on queries; `chosen`: the mask by the last indexer; `embedded`:
    embeddings, where layers have inputs computed from them (`own`); `lent`: keys and values of the new tokens in layers
    whose cache others share, `foreign` if they came from another stage and are not in this rank's cache yet.
    """

    ids: Tensor
    real: Tensor
    far: Sight
    near: Sight
    growth: Tensor | None
    bias: Tensor | None
    cache: Cache | None
    chosen: Tensor | None = None
    embedded: Tensor | None = None
    own: Tensor | None = None
    lent: dict[int, Tensor] = field(default_factory=dict)
    foreign: set[int] = field(default_factory=set)

    def borrowed(self, lender: int, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values of another layer's heads, of `size` features each, as far as this rank has them."""
        k, v = parted(self.lent[lender], size)
        if self.cache is None:
            return k, v
        kept = self.cache.write(lender, k, v) if lender in self.foreign else self.cache.read(lender)
        self.foreign.discard(lender)
        return kept[0], kept[1]

    def with_lent(self, lent: Mapping[int, Tensor]) -> "Context":
        return replace(self, lent={**self.lent, **lent})

    def of(self, layer: int, spec: Spec) -> Sight:
        sight = self.near if layer in spec.windowed else self.far
        return sight if layer in spec.roped else Sight(sight.mask, None)


def joined(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values [batch, heads, seq, features] → [batch, seq, features of all]."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (k, v)], -1)


def parted(both: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The inverse."""
    k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in both.chunk(2, -1))
    return k, v


def seen(positions: Tensor, columns: Tensor, window: int | None = None, chunks: bool = False) -> Tensor:
    """The causal mask [batch, 1, seq, columns], without padding; with a window, of that many tokens or of its chunk."""
    at, to = positions[:, None, :, None], columns[:, None, None, :]
    before = (at >= to) & (to >= 0)
    if window is None:
        return before
    return before & (at // window == to // window if chunks else at - to < window)


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

    `reduce` sums a tensor [batch, seq, 2] over the ranks: norms over the whole projection need it.
    """
    gate, mask = None, context.of(layer, spec).mask
    if latent:
        q, k, v, mask = _latent(x, weights, layer, spec, heads, latent, context)
    else:
        q, k, v, gate = _plain(x, weights, layer, spec, heads, context, reduce)
    bias, scale = context.bias, spec.attn_scale / (layer + 1 if spec.scale_by_layer else 1)
    if bias is not None and spec.alibi_scaled:
        bias = bias * scale
    if context.growth is not None and not (spec.growth and spec.growth.unrotated and layer in spec.roped):
        q = q * context.growth
    out = attend(q, k, v, scale, mask, spec.attn_cap, weights.get("attn.sinks"), bias)
    out = out.transpose(1, 2).flatten(2)
    return weights.linear(out if gate is None else out * gate.sigmoid(), "attn.o", bias=False)


def _plain(
    x: Tensor,
    weights: Weights,
    layer: int,
    spec: Spec,
    heads: Heads,
    context: Context,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values, and the output gate [batch, seq, heads · features] where there is one."""
    batch, seq, _ = x.shape
    n, m, size, value = len(heads.ids), heads.kv, heads.size, heads.value
    gate, turn = None, context.of(layer, spec).turn
    if (lender := spec.lenders.get(layer)) is not None:
        q = weights.linear(x, "attn.q").reshape(batch, seq, -1, size).transpose(1, 2)
        q = rotate(_norm(q, "attn.q_norm", weights, spec), turn, spec.rope_interleaved)
        return q, *context.borrowed(lender, size), None
    if "attn.qk" in weights:  # values are the keys before normalisation
        q, k = weights.linear(x, "attn.qk").split([n * size, m * size], -1)
        v = k
    elif "attn.qgkv" in weights:  # each head's gate follows its query
        q, k, v = weights.linear(x, "attn.qgkv").split([2 * n * size, m * size, m * size], -1)
        q, gate = (part.flatten(2) for part in q.reshape(batch, seq, n, 2 * size).split(size, -1))
        if (bias := weights.get("attn.qkv_bias")) is not None:  # the gate has none
            q, k, v = (
                part + own for part, own in zip((q, k, v), bias.split([n * size, m * size, m * size]), strict=True)
            )
    else:
        runs = (n * size, m * size, m * value)
        q, k, v = weights.linear(x, "attn.qkv", runs=runs).split(runs, -1)
    if (whole := weights.get("attn.q_norm_full")) is not None:
        squares = torch.stack((q.float().pow(2).sum(-1), k.float().pow(2).sum(-1) / heads.copies), -1)
        squares = reduce(squares) / torch.tensor([heads.total * size, heads.whole * size], device=x.device)
        q = rms_norm(q, whole, spec.eps, spec.norm_offset, squares[..., :1])
        k = rms_norm(k, weights["attn.k_norm_full"], spec.eps, spec.norm_offset, squares[..., 1:])
    if spec.attn_clip is not None:
        q, k, v = (part.clamp(-spec.attn_clip, spec.attn_clip) for part in (q, k, v))
    q, k, v = (part.reshape(batch, seq, -1, of).transpose(1, 2) for part, of in ((q, size), (k, size), (v, value)))
    if not spec.late_qk_norm:
        q, k = _norm(q, "attn.q_norm", weights, spec), _norm(k, "attn.k_norm", weights, spec)
    v = _norm(v, "attn.v_norm", weights, spec)
    if spec.value_factor is not None:
        v = v * spec.value_factor
    q, k = rotate(q, turn, spec.rope_interleaved), rotate(k, turn, spec.rope_interleaved)
    if spec.bare_heads and turn is not None:
        q, k = rms_norm(q, None, spec.eps), rms_norm(k, None, spec.eps)
    if spec.late_qk_norm:
        q, k = _norm(q, "attn.q_norm", weights, spec), _norm(k, "attn.k_norm", weights, spec)
    if layer in spec.lenders.values():
        context.lent[layer] = joined(k, v)
    if context.cache is not None:
        k, v = context.cache.write(layer, k, v)
    return q, k, v, gate


def _norm(x: Tensor, name: str, weights: Weights, spec: Spec) -> Tensor:
    """x [batch, heads, seq, features], each head normalised: shared weights, its own, no weights, or not at all."""
    each = weights.get(f"{name}_heads")
    if name not in weights and each is None and name not in spec.bare:
        return x
    weight = weights.get(name) if each is None else each[:, None]
    return norm(x, spec.norm, weight, weights.get(f"{name}_bias"), spec.eps, spec.norm_offset)


def _latent(
    x: Tensor, weights: Weights, layer: int, spec: Spec, heads: Heads, latent: Latent, context: Context
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Multi-head latent attention: the cache holds one compressed vector per token, equal on all ranks."""
    batch, seq, _ = x.shape
    n, turn = len(heads.ids), context.of(layer, spec).turn
    compressed = x
    if latent.q is None:
        q = weights.linear(x, "attn.q_whole")
        c, k_rope = weights.linear(x, "attn.kv_a", runs=(latent.kv, latent.rope)).split([latent.kv, latent.rope], -1)
    else:
        runs = (latent.q, latent.kv, latent.rope)
        q, c, k_rope = weights.linear(x, "attn.qkv_a", runs=runs).split(runs, -1)
        compressed = rms_norm(q, weights["attn.q_a_norm"], spec.eps_latent)
        q = weights.linear(compressed, "attn.q_b")
    c = rms_norm(c, weights["attn.kv_a_norm"], spec.eps_latent)[:, None]
    k_rope = k_rope[:, None]
    q, q_rope = q.reshape(batch, seq, n, -1).transpose(1, 2).split([latent.nope, latent.rope], -1)
    q_rope, k_rope = rotate(q_rope, turn, spec.rope_interleaved), rotate(k_rope, turn, spec.rope_interleaved)
    index = (index_keys(x, weights, spec, turn),) if "attn.index_k" in weights else ()
    if context.cache is not None:
        c, k_rope, *index = context.cache.write(layer, c, k_rope, *index)  # type: ignore[assignment]
    mask = _choose(x, compressed, index, weights, layer, spec, context)
    kv = weights.linear(c[:, 0], "attn.kv_b", runs=(latent.nope, heads.value) * n)
    k, v = kv.reshape(batch, c.shape[2], n, -1).transpose(1, 2).split([latent.nope, heads.value], -1)
    return torch.cat((q, q_rope), -1), torch.cat((k, k_rope.expand(-1, n, -1, -1)), -1), v, mask


def _choose(
    x: Tensor, compressed: Tensor, index: Sequence[Tensor], weights: Weights, layer: int, spec: Spec, context: Context
) -> Tensor:
    """The mask: all earlier tokens, or those chosen by this layer's indexer, or by the last indexer before it."""
    sight = context.of(layer, spec)
    if spec.index_top is None:
        return sight.mask
    if index:
        context.chosen = chosen(x, compressed, index[0], weights, spec, sight.turn, sight.mask)
    if context.chosen is None:
        raise ReshardError(
            f"layer {layer} uses the index of an earlier layer, which another pipeline stage has", "run it with --pp 1"
        )
    return context.chosen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor,
    cap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """q [batch, heads, seq, features], k, v [batch, kv, columns, …] → [batch, heads, seq, features of v]."""
    batch, n, seq, _ = q.shape
    m, columns = k.shape[1], k.shape[2]
    scores = (q.reshape(batch, m, -1, q.shape[-1]) @ k.transpose(-1, -2)).view(batch, n, seq, columns) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores + bias
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
