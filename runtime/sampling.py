"""Sampling: which token comes next, given logits. Knows nothing about models, ranks or text.

A draw depends on the logits, the seed, the number of the prompt and the number of the token, and on nothing else: not on what else is in
the batch, nor on the mesh. Every rank draws for itself, and draws the same.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reshard.errors import ReshardError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy: the likeliest token. `top_k` 0 and `top_p` 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @staticmethod
    def of(
        said: dict[str, Any], temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, seed: int = 0
    ) -> "Sampling":
        """What was asked for, else what generation_config.json says. Raises ReshardError for what is out of range.

        Greedy unless that has `do_sample`, or a temperature, top-k or top-p was asked for.
        """
        if temperature is None and top_k is None and top_p is None and not said.get("do_sample"):
            return Sampling(seed=seed)

        def pick(asked: Any, key: str, default: Any) -> Any:
            if asked is not None:
                return asked
            known = said.get(key) if said.get("do_sample") else None
            return default if known is None else known

        found = Sampling(float(pick(temperature, "temperature", 1.0)), int(pick(top_k, "top_k", 0)), float(pick(top_p, "top_p", 1.0)), seed)
        if not (0 <= found.temperature < float("inf") and found.top_k >= 0 and 0 < found.top_p <= 1):
            raise ReshardError(
                f"temperature {found.temperature:g}, top-k {found.top_k}, top-p {found.top_p:g}: cannot be sampled with",
                "temperature from 0 on (0: greedy), top-k from 0 on (0: all tokens), top-p above 0 and at most 1",
            )
        return found

    def choose(self, logits: Tensor, prompt: int, step: int) -> int:
        """The next token of a prompt: logits [vocab], which are finite → id."""
        if self.temperature == 0 or self.top_k == 1:
            return int(logits.argmax())
        scores = logits.double().cpu()
        scores = (scores - scores.max()) / self.temperature  # at most 0: no temperature is so low that this overflows upwards
        order = scores.argsort(descending=True, stable=True)
        if self.top_k:
            order = order[: self.top_k]
        share = scores[order].softmax(0)
        if self.top_p < 1:
            before = share.cumsum(0) - share
            order = order[before < self.top_p]  # the first is always in
        # In the order of ids, not of likelihood: two tokens that are nearly as likely may change places with the mesh, by rounding.
        order = order.sort().values
        upto = scores[order].softmax(0).cumsum(0)
        number = random.Random(f"{self.seed}/{prompt}/{step}").random() * float(upto[-1])
        return int(order[min(int(torch.searchsorted(upto, number, right=True)), len(order) - 1)])
