"""The mesh of ranks, and how one axis is cut among its coordinates. Knows nothing about tables, tensors or files.

world = pp × tp          rank = pp_rank · tp + tp_rank
tp = ep × etp            tp_rank = ep_rank · etp + etp_rank      (etp cuts inside the experts)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..errors import ReshardError

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Where a rank stands along one mesh axis; `weights` are all coordinates' shares, None when equal."""

    index: int
    count: int
    weights: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks, and along which axes; `weights` makes tensor-parallel ranks unequal,
    `layers` fixes the stages.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    weights: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep"):
            if type(n := getattr(self, name)) is not int or not 1 <= n <= 65536:
                raise ReshardError(f"--{name} {n} is not a number of ranks", "give 1 to 65536")
        if self.world > 65536:
            raise ReshardError(f"--tp {self.tp} × --pp {self.pp} makes {self.world} ranks, at most 65536 are supported")
        if self.tp % self.ep:
            raise ReshardError(
                f"--ep {self.ep} does not divide --tp {self.tp}",
                "expert parallel ranks are tensor parallel ranks: --ep must divide --tp",
            )
        for name, numbers in (("split", self.weights), ("pp-layers", self.layers)):
            if not all(type(n) is int for n in numbers or ()):
                raise ReshardError(f"--{name} {numbers}: expected whole numbers", "for example 3:3:2 or 10,11,11")
        if self.weights is not None and (len(self.weights) != self.tp or min(self.weights) < 1):
            split = ":".join(map(str, self.weights))
            raise ReshardError(
                f"--split {split} names {len(self.weights)} ranks, --tp is {self.tp}",
                "give one positive weight per rank",
            )
        if self.layers is not None and (len(self.layers) != self.pp or min(self.layers) < 1):
            stages = ",".join(map(str, self.layers))
            raise ReshardError(
                f"--pp-layers {stages} names {len(self.layers)} stages, --pp is {self.pp}",
                "give one positive number of layers per stage",
            )

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def etp(self) -> int:
        return self.tp // self.ep

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def coordinate(self, axis: str, rank: int) -> Coordinate:
        """The coordinate of `rank` along "tp", "ep", "etp" or "pp"."""
        if axis == "pp":
            return Coordinate(rank // self.tp, self.pp)
        tp_rank, etp = rank % self.tp, self.etp
        group = tp_rank // etp
        if axis == "tp":
            return Coordinate(tp_rank, self.tp, self.weights)
        if axis == "ep":
            sums = self.weights and tuple(sum(self.weights[at : at + etp]) for at in range(0, self.tp, etp))
            return Coordinate(group, self.ep, sums)
        return Coordinate(tp_rank % etp, etp, self.weights and self.weights[group * etp : (group + 1) * etp])

    def __str__(self) -> str:
        parts = [f"{name.upper()} {n}" for name in ("tp", "pp", "ep") if (n := getattr(self, name)) > 1 or name == "tp"]
        split = f", split {':'.join(map(str, self.weights))}" if self.weights else ""
        return " × ".join(parts) + split


@lru_cache(256)
def shares(size: int, weights: tuple[int, ...], unit: int = 1) -> tuple[Range, ...]:
    """Consecutive ranges in proportion to `weights`, in whole units, by largest remainder; ties go to the earlier one.

    The last unit may be short. `shares(8, (3, 3, 2))` is ((0, 3), (3, 6), (6, 8)).
    """
    units, total = -(-size // unit), sum(weights)
    counts = [units * weight // total for weight in weights]
    rest = sorted(range(len(weights)), key=lambda k: (-(units * weights[k] % total), k))
    for k in rest[: units - sum(counts)]:
        counts[k] += 1
    ends = [0, *accumulate(counts)]
    return tuple((min(low * unit, size), min(high * unit, size)) for low, high in pairwise(ends))


class Rule(NamedTuple):
    """What a table allows for one axis: repetition, zero padding to a multiple, an uneven remainder;
    `unit` binds weights.
    """

    replicate: bool = False
    pad: int = 1
    uneven: bool = False
    unit: int = 1


def cut(axis: str, size: int, at: Coordinate, rule: Rule) -> Range:
    """The range of `axis` that a coordinate owns; its end exceeds `size` where zero padding is stored.

    Raises ReshardError where the axis does not divide and the rule allows nothing else.
    """
    n, k = at.count, at.index
    if n == 1:
        return 0, -(-size // rule.pad) * rule.pad if rule.pad > 1 else size
    if rule.replicate and size < n and n % size == 0:
        head = k // (n // size)
        return head, head + 1
    if at.weights is not None:
        low, high = shares(size, at.weights, rule.unit)[k]
        if low == high:
            raise ReshardError(f"axis {axis}: {size} in units of {rule.unit} leaves rank {k} of --split with nothing")
        return low, high
    padded = -(-size // rule.pad) * rule.pad
    if padded % n == 0:
        return k * padded // n, (k + 1) * padded // n
    if rule.uneven and size >= n:
        return shares(size, (1,) * n)[k]
    raise ReshardError(f"axis {axis}: {padded} cannot be split over {n} ranks")


def cut_compound(axes: Sequence[str], sizes: Sequence[int], at: Coordinate, rule: Rule) -> tuple[Range, ...]:
    """Ranges of a compound axis such as `heads = kv group`: whole groups while they last, then inside a group.

    n ≤ kv: cut kv, keep groups whole. n a multiple of kv: kv = k ÷ (n / kv), then cut the group among those n / kv.
    """
    first, rest = sizes[0], sizes[1:]
    if not rest or at.count <= first:
        return cut(axes[0], first, at, rule), *((0, size) for size in rest)
    if at.count % first:
        raise ReshardError(f"axis {axes[0]}: {at.count} ranks are not a multiple of {first}")
    per = at.count // first
    index = at.index // per
    inner = Coordinate(at.index % per, per, at.weights and at.weights[index * per : (index + 1) * per])
    return (index, index + 1), *cut_compound(axes[1:], rest, inner, Rule())
