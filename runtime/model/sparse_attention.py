"""Sparse attention: a layer's indexer chooses the tokens that its heads attend to. Each rank has all of the indexer."""

import torch
from torch import Tensor

from .rope import rotate
from .spec import Spec
from .weights import Weights, norm


def index_keys(x: Tensor, weights: Weights, spec: Spec, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """x [batch, seq, hidden] → index keys [batch, 1, seq, features], shared by all heads of the indexer."""
    bias = weights.get("attn.index_k_norm_bias")
    k = norm(weights.linear(x, "attn.index_k"), "layer", weights["attn.index_k_norm"], bias, spec.eps_latent, 0.0)
    return rotate(k[:, None], turn, spec.index_interleaved)


def chosen(
    x: Tensor,
    compressed: Tensor,
    keys: Tensor,
    weights: Weights,
    spec: Spec,
    turn: tuple[Tensor, Tensor] | None,
    mask: Tensor,
) -> Tensor:
    """The attention mask reduced to the `index_top` best columns of each token; `mask` [batch, 1, seq, columns].

    A column's score is the sum over the indexer's heads of relu(q · k), weighted per token.
    """
    if spec.index_top is None or mask.shape[-1] <= spec.index_top:
        return mask
    counts = weights.linear(x, "attn.index_heads").float().transpose(1, 2)[..., None]
    q = weights.linear(compressed, "attn.index_q").unflatten(-1, (counts.shape[1], -1)).transpose(1, 2)
    found = (rotate(q, turn, spec.index_interleaved).float() @ keys.float().transpose(-1, -2)).relu()
    scores = (found * counts).sum(1, keepdim=True).masked_fill(~mask, float("-inf"))
    best = scores.topk(spec.index_top, -1)[1]
    return mask & torch.zeros_like(mask).scatter(-1, best, True)
