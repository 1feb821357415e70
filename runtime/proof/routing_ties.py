"""Routing ties: which experts a mixture chooses for each token, and where experts tie within rounding error.

Routing is discontinuous. Rounding may send a token to another expert, and then its result, and those of all later
tokens, differ by more than rounding. Only there, the reference's choices are imposed on what is compared with it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comm.threads import alone
from ..load import load_model

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source

    from ..model.decoder import Decoder

Where = tuple[int, str]  # a router: its layer and part
Routes = Mapping[Where, Tensor]  # router → experts of each token, [prompts, tokens, top]; -1: the router's own choice
Margins = Mapping[Where, Tensor]  # router → their lead over the other experts, [prompts, tokens]

BATCH = 8  # prompts per forward


@dataclass(frozen=True)
class Choices:
    """What this runtime at TP 1 chooses for some prompts, in float32, and with what margins.

    `logits`: in float32; `exact`: in float64 with the same choices; `bounds`: router → margins up to which experts tie.
    """

    logits: Tensor
    exact: Tensor
    routes: Routes
    margins: Margins
    bounds: dict[Where, float]

    @property
    def tied(self) -> dict[Where, Tensor]:
        """Router → which choices are ties, [prompts, tokens]."""
        return {where: tied(margin, self.bounds[where]) for where, margin in self.margins.items()}

    @property
    def share(self) -> float:
        """The share of choices that are ties."""
        return float(torch.stack(list(self.tied.values())).double().mean())

    @property
    def unsettled(self) -> Tensor:
        """[prompts, tokens]: where a choice for this token, or for an earlier one, is a tie."""
        return torch.stack(list(self.tied.values())).any(0).cumsum(1) > 0

    def settles(self, margins: Margins) -> bool:
        """Whether none of these other choices is a tie."""
        return not any(bool(tied(margin, self.bounds[where]).any()) for where, margin in margins.items())

    @property
    def imposed(self) -> Routes:
        """The choices that are ties, -1 elsewhere."""
        return {where: self.routes[where].where(odd[..., None], -1) for where, odd in self.tied.items()}


def tied(margin: Tensor, bound: float) -> Tensor:
    return ~(margin > bound)


def bound(margin: Tensor, exact: Tensor, times: float) -> float:
    """`times` the largest change of margins between float32 and float64; infinite ones do not count."""
    return times * float((margin.double() - exact.double()).abs().nan_to_num(0.0, 0.0, 0.0).max())


def choices(source: "Source", prompts: Tensor, times: float) -> Choices:
    """The choices of a published mixture's routers. `times`: see `bound`."""
    logits, routes, margins = decisions(source, prompts, torch.float32)
    exact, _, others = decisions(source, prompts, torch.float64, routes)
    bounds = {where: bound(margin, others[where], times) for where, margin in margins.items()}
    return Choices(logits, exact, routes, margins, bounds)


def decisions(
    source: "Source", prompts: Tensor, dtype: torch.dtype, routes: Routes | None = None
) -> tuple[Tensor, Routes, Margins]:
    """Logits, choices and margins of this runtime at TP 1, with `routes` imposed."""
    decoder = load_model(source, dtype, world=alone())
    parts: list[Tensor] = []
    with recording(decoder) as recorded:
        for at in range(0, len(prompts), BATCH):
            impose(decoder, routes, slice(at, at + BATCH))
            parts.append(decoder(prompts[at : at + BATCH]))
    shape = prompts.shape
    run = {where: each for where, each in recorded.items() if each}  # multi-token prediction does not run
    taken = {where: torch.cat([chosen for chosen, _ in each]).view(*shape, -1) for where, each in run.items()}
    return (
        torch.cat(parts),
        taken,
        {where: torch.cat([margin for _, margin in each]).view(shape) for where, each in run.items()},
    )


@contextmanager
def recording(decoder: "Decoder") -> Iterator[dict[Where, list[tuple[Tensor, Tensor]]]]:
    """Router → choices [tokens, top] and margins [tokens] of every forward inside."""
    found: dict[Where, list[tuple[Tensor, Tensor]]] = {}
    for where, router in decoder.routers().items():
        found[where] = router.decisions = []
    try:
        yield found
    finally:
        for router in decoder.routers().values():
            router.decisions = None


def impose(
    decoder: "Decoder", routes: Routes | None, prompts: slice = slice(None), tokens: slice = slice(None)
) -> None:
    """Make the next forwards, of this part of the prompts and tokens, use these choices; None: their own."""
    for where, router in decoder.routers().items():
        router.imposed = (
            routes[where][prompts, tokens].flatten(0, 1) if routes is not None and where in routes else None
        )
