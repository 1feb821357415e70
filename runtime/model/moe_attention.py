"""Mixture-of-attention heads on one rank: each expert projects one query per key head, and has an output projection."""

from torch import Tensor

from .attention import Context, Heads, attend
from .experts import route
from .rope import rotate
from .spec import Spec
from .weights import Weights, multiply


def mixed_attention(x: Tensor, weights: Weights, layer: int, spec: Spec, heads: Heads, context: Context) -> Tensor:
    """x [batch, seq, hidden] → this rank's part of [batch, seq, hidden], without the output's bias."""
    assert spec.routing is not None
    batch, seq, hidden = x.shape
    sight = context.of(layer, spec)
    flat = x.flatten(0, 1)
    chosen, shares, used = route(flat, weights, spec.routing, spec.eps, "moa")
    top = chosen.shape[1]
    q = _each(flat[:, None].expand(-1, top, -1), chosen, used, weights["moa.q"])
    # A key head's queries are adjacent.
    q = q.view(batch, seq, top, heads.kv, heads.size).permute(0, 3, 2, 1, 4).flatten(1, 2)
    k, v = (
        part.view(batch, seq, heads.kv, heads.size).transpose(1, 2)
        for part in weights.linear(x, "attn.kv").chunk(2, -1)
    )
    q, k = rotate(q, sight.turn, spec.rope_interleaved), rotate(k, sight.turn, spec.rope_interleaved)
    if context.cache is not None:
        k, v = context.cache.write(layer, k, v)
    found = attend(q, k, v, spec.attn_scale, sight.mask, spec.attn_cap, None, None)
    found = found.view(batch, heads.kv, top, seq, heads.size).permute(0, 3, 2, 1, 4).reshape(batch * seq, top, -1)
    out = _each(found, chosen, used, weights["moa.o"]) * shares[..., None].to(x.dtype)
    return out.sum(1).view(batch, seq, hidden) / heads.copies  # ranks with the same key heads compute the same


def _each(x: Tensor, chosen: Tensor, used: list[int], matrices: Tensor) -> Tensor:
    """x [tokens, top, in] times the matrix [out, in] of the expert chosen for each. `used`: the experts that occur."""
    out = x.new_empty(*chosen.shape, matrices.shape[1])
    for expert in used:
        out[chosen == expert] = multiply(x[chosen == expert], matrices[expert])
    return out
