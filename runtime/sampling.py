"""Sampling: the next token, given logits. Knows nothing about models, ranks or text.

A sample depends on the logits, the seed, the index of the prompt and that of the token, and nothing else: not on the
rest of the batch, nor on the mesh. Every rank samples for itself, and gets the same.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reshard.errors import ReshardError

_TINY, _HUGE = 5e-324, 1.7e308
# Options: types, least, most, default, description.
_RANGES: dict[str, tuple[tuple[type, ...], float, float, float, str]] = {
    "temperature": ((int, float), 0, _HUGE, 1.0, "a number of at least 0 (0: greedy)"),
    "top_k": ((int,), 0, _HUGE, 0, "an integer of at least 0 (0: all tokens)"),
    "top_p": ((int, float), _TINY, 1, 1.0, "a number above 0 and at most 1"),
}


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy: the most likely token. `top_k` 0 and `top_p` 1 include all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @staticmethod
    def of(
        said: dict[str, Any],
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        root: Path = Path(),
    ) -> "Sampling":
        """The given values, else those of generation_config.json. Raises ReshardError for values out of range.

        Greedy unless the file has `do_sample`, or a temperature, top-k or top-p is given.
        """
        if temperature is None and top_k is None and top_p is None and not said.get("do_sample"):
            return Sampling(seed=seed)
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        found: dict[str, Any] = {}
        for key, (kinds, low, high, default, words) in _RANGES.items():
            known = said.get(key) if said.get("do_sample") else None
            value = found[key] = next(value for value in (asked[key], known, default) if value is not None)
            if type(value) not in kinds or not low <= value <= high:
                where = (
                    f"{root / 'generation_config.json'}: {key}" if asked[key] is None else f"--{key.replace('_', '-')}"
                )
                raise ReshardError(f"{where} is {value!r}: must be {words}", "correct it, or pass --temperature 0")
        return Sampling(float(found["temperature"]), int(found["top_k"]), float(found["top_p"]), seed)

    def choose(self, logits: Tensor, prompt: int, step: int) -> int:
        """The next token of a prompt: finite logits [vocab] → id."""
        if self.temperature == 0 or self.top_k == 1:
            return int(logits.argmax())
        scores = logits.double().cpu()
        scores = (scores - scores.max()) / self.temperature  # at most 0: cannot overflow upwards, however low it is
        order = scores.argsort(descending=True, stable=True)
        if self.top_k:
            order = order[: self.top_k]
        share = scores[order].softmax(0)
        if self.top_p < 1:
            before = share.cumsum(0) - share
            order = order[before < self.top_p]  # always includes the first
        # In order of ids, not of likelihood: on another mesh, rounding may swap two tokens of nearly equal likelihood.
        order = order.sort().values
        upto = scores[order].softmax(0).cumsum(0)
        number = random.Random(f"{self.seed}/{prompt}/{step}").random() * float(upto[-1])
        return int(order[min(int(torch.searchsorted(upto, number, right=True)), len(order) - 1)])
