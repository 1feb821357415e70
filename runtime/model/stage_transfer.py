"""What a pipeline stage sends to the next next to hidden states, concatenated with them into one tensor.

    the embedding      where layers have per-layer inputs computed from it
    keys and values    of the new tokens, of layers whose KV cache later layers share

A place is (layer, whether its first step is done): it stands for everything that later steps need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Context, joined, parted

Place = tuple[int, bool]


@dataclass(frozen=True)
class Carried:
    """`own`: whether layers have inputs of their own; `lenders`: layer → the layer whose keys and values it uses."""

    hidden: int
    layers: int
    own: bool
    lenders: Mapping[int, int]

    def lent(self, place: Place) -> list[int]:
        """The layers whose keys and values are needed after a place."""
        after = place[0] + place[1]
        return sorted({lender for layer, lender in self.lenders.items() if lender < after <= layer})

    def features(self, place: Place) -> int:
        """Features per token at a place, without keys and values."""
        return self.hidden * (1 + (self.own and place[0] < self.layers))

    def give(self, x: Tensor, place: Place, context: Context) -> Tensor:
        """x [batch, seq, hidden], concatenated with what later steps need."""
        parts = [x]
        if self.features(place) > self.hidden:
            assert context.embedded is not None
            parts.append(context.embedded)
        parts += [context.lent[lender] for lender in self.lent(place)]
        return torch.cat(parts, -1) if len(parts) > 1 else x

    def take(self, x: Tensor, place: Place, context: Context, widths: Sequence[int]) -> Tensor:
        """The inverse: hidden states; the rest goes into `context`. `widths`: features of each layer's K and V."""
        parts: tuple[Tensor, ...] = x.split([self.features(place), *widths], -1)
        if self.features(place) > self.hidden:
            context.embedded = parts[0][..., self.hidden :]
        context.lent.update(zip(self.lent(place), parts[1:], strict=True))
        context.foreign.update(self.lent(place))
        return parts[0][..., : self.hidden]


@dataclass(frozen=True)
class Whole:
    """Keys and values of all heads of a stage, for inspection.

    `size`: head size of a layer; `rows`: its key heads on each rank of the stage; `gather`: concatenates tensors of
    these ranks, given how many heads each has; `mine`: the index of this rank.
    """

    size: Callable[[int], int]
    rows: Callable[[int], Sequence[Sequence[int]]]
    gather: Callable[[Tensor, list[int]], Tensor]
    mine: int

    def spread(self, context: Context, layers: Sequence[int]) -> Context:
        """The context with every key head of the stage, once each."""
        if not layers:
            return context
        lent = {
            layer: joined(*(self._all(part, layer) for part in parted(context.lent[layer], self.size(layer))))
            for layer in layers
        }
        return context.with_lent(lent)

    def width(self, layer: int) -> int:
        return 2 * self.size(layer) * len({row for own in self.rows(layer) for row in own})

    def keep(self, context: Context, layers: Sequence[int]) -> None:
        """Reduce each layer's key heads to those of this rank."""
        for layer in layers:
            own = list(self.rows(layer)[self.mine])
            context.lent[layer] = joined(*(part[:, own] for part in parted(context.lent[layer], self.size(layer))))

    def _all(self, part: Tensor, layer: int) -> Tensor:
        rows = self.rows(layer)
        found = self.gather(part, [len(own) for own in rows])
        at = {row: column for column, row in enumerate(row for own in rows for row in own)}
        return found[:, [at[row] for row in sorted(at)]]
