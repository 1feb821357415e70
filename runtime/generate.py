"""Generation: token ids in, token ids out, all prompts in one batch with one KV cache. Knows nothing about text.

    prompts    a b c          input_ids  a a a b c        positions  -1 -1  0  1  2
               d e f g h                 d e f g h                    0  1  2  3  4

The last column gives every prompt's next token. Every rank has the same logits and samples the same tokens, so none
are sent.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from reshard.errors import ReshardError

from .model.finite import not_finite
from .sampling import Sampling

if TYPE_CHECKING:
    from .model.cache import Cache
    from .model.decoder import Decoder

_LOGITS = 1 << 26  # elements: longer prompts are prefilled in parts, to limit the memory of their logits


@dataclass(frozen=True)
class Options:
    """What to generate. `most`: new tokens per prompt; `positions`: those of the model, None if there is no limit."""

    most: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    positions: int | None = None


@dataclass
class Generated:
    """New tokens per prompt (without the stop token), why each ended ("stop" or "length"), and the times, in seconds.

    `first`: until the first token; `decoding`: the `steps` forwards of one token per prompt after it; `exchanging`: the
    part of both spent in collectives. `cache`: bytes of this rank's KV cache.
    """

    tokens: list[list[int]]
    reasons: list[str]
    first: float = 0.0
    decoding: float = 0.0
    steps: int = 0
    exchanging: float = 0.0
    cache: int = 0
    chosen: int = field(default=0, repr=False)

    @property
    def rate(self) -> float | None:
        """Tokens per second while decoding, all prompts together; None if there was only one token each."""
        return self.chosen / self.decoding if self.steps and self.decoding else None


def check(prompts: Sequence[Sequence[int]], vocabulary: int | None, positions: int | None) -> None:
    """Raises ReshardError for a prompt that is empty, too long, or has ids outside of the vocabulary."""
    if not prompts:
        raise ReshardError("no prompt", 'pass --prompt "…", or --prompts FILE')
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ReshardError(
                f"prompt {number} has no tokens",
                "the model has no BOS token to start from: give it some text",
            )
        if positions is not None and len(prompt) >= positions:
            raise ReshardError(
                f"prompt {number} has {len(prompt)} tokens; the model has {positions} positions, new tokens included",
                f"shorten it to at most {positions - 1} tokens",
            )
        odd = [token for token in prompt if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if odd:
            raise ReshardError(f"prompt {number}: token id {odd[0]} is not between 0 and {(vocabulary or 1) - 1}")


@torch.inference_mode()
def generate(
    decoder: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: Options = Options(),
    on_token: Callable[[int, int | None, str | None], None] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Generated:
    """New tokens for every prompt; all ranks call it with the same arguments. Raises NotFinite on all of them.

    `on_token(prompt, token, reason)`: called with each token as it is sampled, and with None and the reason at the end.
    """
    check(prompts, None, options.positions)
    world, batch = decoder.world, len(prompts)
    done = Generated([[] for _ in prompts], [""] * batch)
    if options.most < 1:
        done.reasons = ["length"] * batch
        return done
    device = next(iter(decoder.parameters())).device
    longest, spent = max(map(len, prompts)), world.seconds
    most = options.most if options.positions is None else min(options.most, options.positions - min(map(len, prompts)))
    cache = decoder.new_cache(batch, longest + most)

    def phase(name: str) -> None:
        world.phase = name
        if on_phase is not None:
            on_phase(name)

    def take(logits: torch.Tensor) -> list[int]:
        """Sample a token for every prompt that has not ended: [batch, vocab] → the next input of each."""
        finite = logits.isfinite().all(-1).tolist()
        for number, tokens in enumerate(done.tokens):
            if not (finite[number] or done.reasons[number]):
                raise not_finite(
                    decoder, torch.tensor([[*prompts[number], *tokens]], device=device), f"prompt {number + 1}"
                )
        chosen = []
        for number, tokens in enumerate(done.tokens):
            if done.reasons[number]:
                chosen.append(0)
                continue
            token = options.sampling.choose(logits[number], number, len(tokens))
            chosen.append(token)
            done.chosen += 1
            reason = None
            if token in options.stop:
                reason = "stop"
            else:
                tokens.append(token)
                if on_token is not None:
                    on_token(number, token, None)
                if len(tokens) == options.most or (
                    options.positions is not None and len(prompts[number]) + len(tokens) >= options.positions
                ):
                    reason = "length"
            if reason is not None:
                done.reasons[number] = reason
                if on_token is not None:
                    on_token(number, None, reason)
        return chosen

    phase("prefill")
    began = time.perf_counter()
    # Padding is the prompt's own first token: another one, whose activations may overflow, must not get into its batch.
    ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    positions = torch.tensor(
        [[-1] * (longest - len(prompt)) + list(range(len(prompt))) for prompt in prompts], device=device
    )
    part = max(1, _LOGITS // (batch * decoder.model.sizes["vocab"]))
    for at in range(0, longest, part):
        last = at + part >= longest
        logits = decoder(ids[:, at : at + part], positions[:, at : at + part], cache, all_ranks=last)
    chosen = take(logits[:, -1])
    done.first = time.perf_counter() - began

    phase("decode")
    done.chosen = 0
    began = time.perf_counter()
    while not all(done.reasons):
        lengths = [
            -1 if reason else len(prompt) + len(tokens) - 1
            for prompt, tokens, reason in zip(prompts, done.tokens, done.reasons, strict=True)
        ]
        logits = decoder(
            torch.tensor(chosen, device=device)[:, None],
            torch.tensor(lengths, device=device)[:, None],
            cache,
            all_ranks=True,
        )
        chosen = take(logits[:, -1])
        done.steps += 1
    done.decoding = time.perf_counter() - began
    done.exchanging = world.seconds - spent
    done.cache = _bytes(cache)
    return done


def _bytes(cache: "Cache") -> int:
    return sum(part.nbytes for kept in (*cache.kept.values(), *cache.states.values()) for part in kept)
