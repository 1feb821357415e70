"""Choices: which experts a mixture takes for each token, and where that is a toss-up: nearer to another choice than rounding allows.

Where a token goes is discontinuous. A rounding may send it to another expert, and what it computes there, and all tokens behind it, has
nothing to do with rounding any more. There, and only there, the choices of the reference are imposed on those who are compared with it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comm.collectives import alone
from ..load import load_model

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source

    from ..model.decoder import Decoder

Where = tuple[int, str]  # a router: its layer, and the part of it
Routes = Mapping[Where, Tensor]  # router → the experts of every token, [prompts, tokens, top]; -1: those of its own choice
Margins = Mapping[Where, Tensor]  # router → by how much they were better than the others, [prompts, tokens]

BATCH = 8  # prompts that go through together


@dataclass(frozen=True)
class Choices:
    """What this runtime at TP 1 chooses for some prompts, in float32, and how sure it is.

    `logits`: in float32, `exact`: in float64 with the same choices. `bounds`: router → the margin below which a choice is a toss-up.
    """

    logits: Tensor
    exact: Tensor
    routes: Routes
    margins: Margins
    bounds: dict[Where, float]

    @property
    def tossed(self) -> dict[Where, Tensor]:
        """Router → which choices are toss-ups, [prompts, tokens]."""
        return {where: tossed(margin, self.bounds[where]) for where, margin in self.margins.items()}

    @property
    def share(self) -> float:
        """Of all choices, those that are toss-ups."""
        return float(torch.stack(list(self.tossed.values())).double().mean())

    @property
    def unsettled(self) -> Tensor:
        """[prompts, tokens]: where one of this token's choices, or of one that it attends to, is a toss-up."""
        return torch.stack(list(self.tossed.values())).any(0).cumsum(1) > 0

    def settles(self, margins: Margins) -> bool:
        """Whether none of some other choices is a toss-up."""
        return not any(bool(tossed(margin, self.bounds[where]).any()) for where, margin in margins.items())

    @property
    def imposed(self) -> Routes:
        """The choices that are toss-ups."""
        return {where: self.routes[where].where(odd[..., None], -1) for where, odd in self.tossed.items()}


def tossed(margin: Tensor, bound: float) -> Tensor:
    return ~(margin > bound)


def bound(margin: Tensor, exact: Tensor, times: float) -> float:
    """So many times what margins change between float32 and float64, at most; those that are infinite do not count."""
    return times * float((margin.double() - exact.double()).abs().nan_to_num(0.0, 0.0, 0.0).max())


def choices(source: "Source", prompts: Tensor, times: float) -> Choices:
    """What the routers of a published mixture decide. Margins may change by `times` what they change between float32 and float64."""
    logits, routes, margins = decisions(source, prompts, torch.float32)
    exact, _, others = decisions(source, prompts, torch.float64, routes)
    bounds = {where: bound(margin, others[where], times) for where, margin in margins.items()}
    return Choices(logits, exact, routes, margins, bounds)


def decisions(source: "Source", prompts: Tensor, dtype: torch.dtype, routes: Routes | None = None) -> tuple[Tensor, Routes, Margins]:
    """Logits, choices and margins of this runtime at TP 1, with `routes` imposed."""
    decoder = load_model(source, dtype, world=alone())
    parts: list[Tensor] = []
    with recording(decoder) as recorded:
        for at in range(0, len(prompts), BATCH):
            impose(decoder, routes, slice(at, at + BATCH))
            parts.append(decoder(prompts[at : at + BATCH]))
    shape = prompts.shape
    run = {where: each for where, each in recorded.items() if each}  # layers beyond the decoder's are not
    taken = {where: torch.cat([chosen for chosen, _ in each]).view(*shape, -1) for where, each in run.items()}
    return torch.cat(parts), taken, {where: torch.cat([margin for _, margin in each]).view(shape) for where, each in run.items()}


@contextmanager
def recording(decoder: "Decoder") -> Iterator[dict[Where, list[tuple[Tensor, Tensor]]]]:
    """Router → the choices and margins of every forward, [tokens, top] and [tokens]."""
    found: dict[Where, list[tuple[Tensor, Tensor]]] = {}
    for where, router in decoder.routers().items():
        found[where] = router.decisions = []
    try:
        yield found
    finally:
        for router in decoder.routers().values():
            router.decisions = None


def impose(decoder: "Decoder", routes: Routes | None, prompts: slice = slice(None), tokens: slice = slice(None)) -> None:
    """Have the next forwards, of such a part of the prompts and tokens, make these choices; None: their own."""
    for where, router in decoder.routers().items():
        router.imposed = routes[where][prompts, tokens].flatten(0, 1) if routes is not None and where in routes else None
