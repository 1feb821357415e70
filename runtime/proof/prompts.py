"""Prompts of the numeric proof: tokens that reach as much of a model as may be."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from reshard.checkpoints.source import Source

LENGTH, MOST = 48, 32  # tokens of a prompt; prompts
NEW = 32  # tokens that shards and reference go on with by themselves


def prompts_for(source: "Source", exhaustive: bool = False) -> "torch.Tensor":
    """[prompts, tokens]: every row of a small vocabulary, so many of a large one, in an order that is no order."""
    import torch

    vocab, others = source.layout.model.sizes["vocab"], placeholders(source)
    most = positions(source)
    length = min(LENGTH, max(most - NEW, most // 2))
    count = -(-(vocab - len(others)) // length)
    count = max(4, count if exhaustive else min(count, MOST))
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    order = order[[token not in others for token in order.tolist()]]
    return order.repeat(-(-count * length // len(order)))[: count * length].view(count, length)


def placeholders(source: "Source") -> set[int]:
    """Tokens that stand for what other towers see or hear: no text has them."""
    said = (source.config.data.get(key) for key in source.config.data if re.fullmatch(r"(image|video|audio)_token_(id|index)", key))
    return {token for token in said if isinstance(token, int) and 0 <= token < source.layout.model.sizes["vocab"]}


def positions(source: "Source") -> int:
    """How many positions the model has; a large number where config.json does not say."""
    from ..model.spec import POSITIONS

    return next((int(source.config.get(key)) for key in POSITIONS if source.config.get(key)), 1 << 30)
