"""What layers need of earlier ones beside hidden states: laid beside them, in one tensor, where it goes from stage to stage.

    the embedding      where layers take something of it for themselves
    keys and values    of the new tokens, of layers that later ones borrow from

A place is a layer, and whether its first step has been done: what lies there is what all later steps need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Context, Heads

Place = tuple[int, bool]


@dataclass(frozen=True)
class Carried:
    """`own`: whether layers take something of the embedding; `lenders`: borrowing layer → the one that it borrows from; `heads`: of a
    layer on this rank; `rows`: key heads of a layer on each rank of this stage; `gather`: tensors of these ranks, of so many heads each,
    side by side."""

    hidden: int
    layers: int
    own: bool
    lenders: Mapping[int, int]
    heads: Callable[[int], Heads]
    rows: Callable[[int], Sequence[Sequence[int]]]
    gather: Callable[[Tensor, list[int]], Tensor]
    mine: int  # number of this rank in its stage

    def lent(self, place: Place) -> list[int]:
        """The layers whose keys and values are needed from a place on."""
        after = place[0] + place[1]
        return sorted({lender for layer, lender in self.lenders.items() if lender < after <= layer})

    def _embedded(self, place: Place) -> bool:
        return self.own and place[0] < self.layers

    def width(self, place: Place) -> int:
        """Features of a token there, of this rank's heads."""
        heads = [self.heads(lender) for lender in self.lent(place)]
        return self.hidden * (1 + self._embedded(place)) + sum(2 * each.kv * each.size for each in heads)

    def give(self, x: Tensor, place: Place, context: Context, whole: bool = False) -> Tensor:
        """x [batch, seq, hidden] and what is needed beside it, of this rank's heads, or of all heads of its stage."""
        parts = [x]
        if self._embedded(place):
            assert context.embedded is not None
            parts.append(context.embedded)
        for lender in self.lent(place):
            both = (self._all(part, lender) if whole else part for part in context.lent[lender])
            parts.extend(part.transpose(1, 2).flatten(2) for part in both)
        return torch.cat(parts, -1) if len(parts) > 1 else x

    def take(self, x: Tensor, place: Place, context: Context, whole: bool = False) -> Tensor:
        """The inverse: hidden states; the rest is put where layers look for it, keys and values into the cache, too, if there is one."""
        rest = x[..., self.hidden :]
        if self._embedded(place):
            context.embedded, rest = rest[..., : self.hidden], rest[..., self.hidden :]
        for lender in self.lent(place):
            heads, rows = self.heads(lender), self.rows(lender)
            count = len({row for part in rows for row in part}) if whole else heads.kv
            both, rest = rest[..., : 2 * count * heads.size], rest[..., 2 * count * heads.size :]
            k, v = (part.unflatten(-1, (count, heads.size)).transpose(1, 2) for part in both.chunk(2, -1))
            if whole:
                k, v = (part[:, list(rows[self.mine])] for part in (k, v))
            context.lent[lender] = k, v
            if context.cache is not None:
                context.cache.write(lender, k, v)
        return x[..., : self.hidden]

    def _all(self, part: Tensor, lender: int) -> Tensor:
        """Of every key head one copy."""
        rows = self.rows(lender)
        found = self.gather(part, [len(own) for own in rows])
        at = {row: column for column, row in enumerate(row for own in rows for row in own)}
        return found[:, [at[row] for row in sorted(at)]]
