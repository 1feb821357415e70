"""What layers need of earlier ones beside hidden states: laid beside them, in one tensor, where it goes from stage to stage.

    the embedding      where layers take something of it for themselves
    keys and values    of the new tokens, of layers that later ones borrow from

A place is a layer, and whether its first step has been done: what lies there is what all later steps need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Context, joined, parted

Place = tuple[int, bool]


@dataclass(frozen=True)
class Carried:
    """`own`: whether layers take something of the embedding; `lenders`: borrowing layer → the one that it borrows from."""

    hidden: int
    layers: int
    own: bool
    lenders: Mapping[int, int]

    def lent(self, place: Place) -> list[int]:
        """The layers whose keys and values are needed from a place on."""
        after = place[0] + place[1]
        return sorted({lender for layer, lender in self.lenders.items() if lender < after <= layer})

    def features(self, place: Place) -> int:
        """Of a token there, without keys and values."""
        return self.hidden * (1 + (self.own and place[0] < self.layers))

    def give(self, x: Tensor, place: Place, context: Context) -> Tensor:
        """x [batch, seq, hidden] and what is needed beside it."""
        parts = [x]
        if self.features(place) > self.hidden:
            assert context.embedded is not None
            parts.append(context.embedded)
        parts += [context.lent[lender] for lender in self.lent(place)]
        return torch.cat(parts, -1) if len(parts) > 1 else x

    def take(self, x: Tensor, place: Place, context: Context, widths: Sequence[int]) -> Tensor:
        """The inverse: hidden states; the rest is put where layers look for it. `widths`: features of each layer's keys and values."""
        parts: tuple[Tensor, ...] = x.split([self.features(place), *widths], -1)
        if self.features(place) > self.hidden:
            context.embedded = parts[0][..., self.hidden :]
        context.lent.update(zip(self.lent(place), parts[1:], strict=True))
        context.foreign.update(self.lent(place))
        return parts[0][..., : self.hidden]


@dataclass(frozen=True)
class Whole:
    """Keys and values of all heads of a stage, for looking at them. `size`: features of a layer's heads; `rows`: its key heads on each rank
    of the stage; `gather`: tensors of these ranks, of so many heads each, side by side; `mine`: this one's number."""

    size: Callable[[int], int]
    rows: Callable[[int], Sequence[Sequence[int]]]
    gather: Callable[[Tensor, list[int]], Tensor]
    mine: int

    def spread(self, context: Context, layers: Sequence[int]) -> Context:
        """The context with every key head of the stage, one copy of each."""
        if not layers:
            return context
        lent = {layer: joined(*(self._all(part, layer) for part in parted(context.lent[layer], self.size(layer)))) for layer in layers}
        return context.with_lent(lent)

    def width(self, layer: int) -> int:
        return 2 * self.size(layer) * len({row for own in self.rows(layer) for row in own})

    def keep(self, context: Context, layers: Sequence[int]) -> None:
        """Of every key head of the stage those of this rank."""
        for layer in layers:
            own = list(self.rows(layer)[self.mine])
            context.lent[layer] = joined(*(part[:, own] for part in parted(context.lent[layer], self.size(layer))))

    def _all(self, part: Tensor, layer: int) -> Tensor:
        rows = self.rows(layer)
        found = self.gather(part, [len(own) for own in rows])
        at = {row: column for column, row in enumerate(row for own in rows for row in own)}
        return found[:, [at[row] for row in sorted(at)]]
