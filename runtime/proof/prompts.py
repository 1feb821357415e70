"""Prompts of the numerics check: tokens that cover as much of a model as possible."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from reshard.checkpoints.source import Source

LENGTH, MOST = 48, 32  # tokens of a prompt; prompts
NEW = 32  # tokens of a greedy continuation


def prompts_for(source: "Source", exhaustive: bool = False) -> "torch.Tensor":
    """[prompts, tokens]: all rows of a small vocabulary, a sample of a large one, shuffled."""
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
    """Placeholder tokens for other components, such as images: no text has them."""
    said = (
        source.config.data.get(key)
        for key in source.config.data
        if re.fullmatch(r"(image|video|audio)_token_(id|index)", key)
    )
    return {token for token in said if isinstance(token, int) and 0 <= token < source.layout.model.sizes["vocab"]}


def positions(source: "Source") -> int:
    """How many positions the model has; a large number if config.json does not say."""
    from ..model.spec import POSITIONS

    return next((int(source.config.get(key)) for key in POSITIONS if source.config.get(key)), 1 << 30)
