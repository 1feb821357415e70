"""The join of two layouts: which box of which stored tensor becomes which box of which other. Pure; opens no file.

    plan(hf, tp8)  splits        plan(tp8, hf)  merges        plan(tp8, tp4_pp2)  reshapes

The inverse is the arguments swapped. Joins are templates: one per pair of pieces, not per tensor. Copies are yielded
job by job, so that a million of them cost nothing until they are made.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

from ..errors import ReshardError
from .cut import Layout, Piece, Point, Slot
from .mesh import Range

Dim = tuple[int, int, int]  # extent, source stride, destination stride


class Copy(NamedTuple):
    """One strided copy between two stored tensors; offsets and strides in elements, outermost destination dimension
    first.
    """

    src: Slot
    src_name: str
    src_offset: int
    dst: Slot
    dst_name: str
    dst_offset: int
    dims: tuple[Dim, ...]

    @property
    def elements(self) -> int:
        return math.prod(n for n, _, _ in self.dims)


@dataclass(frozen=True, eq=False)
class Join:
    """The intersection of two pieces: a box of one logical tensor. Enumerated axes are iterated,
    the others are copied.
    """

    src: Piece
    dst: Piece
    box: tuple[Range, ...]

    @property
    def elements(self) -> int:
        return self.src.tensor.count(self.box)

    def points(self) -> Iterator[Point]:
        """The points of the axes that either side enumerates and at which both have a tensor."""
        axes, ranges = [], []
        for at, (axis, (low, high)) in enumerate(zip(self.src.tensor.axes, self.box, strict=True)):
            if self.src.strides[at] is None or self.dst.strides[at] is None:
                axes.append(axis)
                ranges.append(self._layers(low, high) if axis == "layer" else range(low, high))
        for numbers in product(*ranges):
            yield dict(zip(axes, numbers, strict=True))

    def _layers(self, low: int, high: int) -> Sequence[int]:
        exist: set[int] = set(self.src.tensor.layers or ())
        for slot in (self.src.slot, self.dst.slot):
            exist &= set(slot.layers) if slot.layers is not None else exist
        return [layer for layer in range(low, high) if layer in exist]

    def copies(self, at: Point) -> Iterator[Copy]:
        """The copies whose point agrees with `at` (which may fix some of the enumerated axes)."""
        src_start, dst_start, dims, loops = self._template
        if dims is None:
            return
        src, dst = self.src.slot, self.dst.slot
        names = [axis for axis, _, _, _ in loops]
        ranges = [
            indices if axis not in at else (at[axis],) if at[axis] in indices else () for axis, indices, _, _ in loops
        ]
        for numbers in product(*ranges):
            point = dict(zip(names, numbers, strict=True))
            src_offset, dst_offset = src_start, dst_start
            for n, (_, _, src_step, dst_step) in zip(numbers, loops, strict=True):
                src_offset += n * src_step
                dst_offset += n * dst_step
            yield Copy(src, src.name(point), src_offset, dst, dst.name(point), dst_offset, dims)

    @cached_property
    def _template(self) -> tuple[int, int, tuple[Dim, ...] | None, list[tuple[str, Sequence[int], int, int]]]:
        """What all copies share: offsets at index 0, dimensions (None if empty), and per enumerated axis its indices
        and steps.
        """
        src_start, dst_start = self.src.offset, self.dst.offset
        dims: list[Dim] = []
        loops: list[tuple[str, Sequence[int], int, int]] = []
        for n, (axis, (low, high)) in enumerate(zip(self.src.tensor.axes, self.box, strict=True)):
            src, dst = self.src.strides[n], self.dst.strides[n]
            src_start -= self.src.box[n][0] * (src or 0)
            dst_start -= self.dst.box[n][0] * (dst or 0)
            if src is None or dst is None:
                loops.append(
                    (axis, self._layers(low, high) if axis == "layer" else range(low, high), src or 0, dst or 0)
                )
                continue
            if high == low:
                return 0, 0, None, []
            src_start += low * src
            dst_start += low * dst
            if high - low > 1:
                dims.append((high - low, src, dst))
        return src_start, dst_start, collapse(dims), loops


def collapse(dims: Iterable[Dim]) -> tuple[Dim, ...]:
    """The same copy with as few dimensions as possible, in order of falling destination stride.

    >>> collapse([(4, 10, 20), (10, 1, 2)])
    ((40, 1, 2),)
    """
    merged: list[Dim] = []
    for n, src, dst in sorted(dims, key=lambda dim: (-dim[2], -dim[1])):
        if merged and merged[-1][1] == n * src and merged[-1][2] == n * dst:
            merged[-1] = (merged[-1][0] * n, src, dst)
        else:
            merged.append((n, src, dst))
    return tuple(merged)


@dataclass(frozen=True)
class Component:
    """Rows that are tied together by copies, e.g. q, k, v on one side and qkv on the other;
    `axes` both sides enumerate.
    """

    joins: tuple[Join, ...]
    axes: tuple[str, ...]

    def points(self) -> list[Point]:
        """The points of the common axes: each is one job, independent of all others."""
        ranges: dict[tuple[tuple[str, int], ...], None] = {}
        for join in self.joins:
            tensor = join.src.tensor
            per_axis = []
            for axis in self.axes:
                low, high = join.box[tensor.axes.index(axis)]
                per_axis.append(
                    [(axis, at) for at in (join._layers(low, high) if axis == "layer" else range(low, high))]
                )
            ranges.update(dict.fromkeys(product(*per_axis)))
        return [dict(point) for point in sorted(ranges)]

    def copies(self, at: Point) -> Iterator[Copy]:
        for join in self.joins:
            yield from join.copies(at)


@dataclass(frozen=True)
class Plan:
    """Everything to be done, and the proof that it is complete: each destination element has exactly one source."""

    src: Layout
    dst: Layout
    components: tuple[Component, ...]

    def copies(self) -> Iterator[Copy]:
        """All copies, one after another."""
        for component in self.components:
            for at in component.points():
                yield from component.copies(at)


def plan(src: Layout, dst: Layout, ranks: Iterable[int] | None = None) -> Plan:
    """Join two layouts of one model; `ranks` restricts the destination. Raises ReshardError if any element has no
    source.

    Replicas in the source are read once, from the lowest rank that holds them.
    """
    wanted = None if ranks is None else set(ranks)
    joins: list[Join] = []
    for name, pieces in dst.pieces.items():
        if name not in src.model.tensors:
            raise ReshardError(f"{name} is wanted, the source has no such tensor")
        sources = src.distinct(name)
        if wanted is None:
            dst.distinct(name)  # proves that the destination holds everything
        for piece in pieces:
            if wanted is not None and piece.slot.rank not in wanted:
                continue
            found = [Join(source, piece, box) for source in sources if (box := _intersect(source, piece)) is not None]
            covered = sum(_elements(join) for join in found)
            if covered != _elements(Join(piece, piece, piece.box)):
                raise ReshardError(
                    f"{name}: {covered} of {piece.elements} elements on rank {piece.slot.rank} have a source"
                )
            joins += found
    return Plan(src, dst, _components(joins))


def _elements(join: Join) -> int:
    return math.prod(
        len(join._layers(low, high)) if axis == "layer" else high - low
        for axis, (low, high) in zip(join.src.tensor.axes, join.box, strict=True)
    )


def _intersect(src: Piece, dst: Piece) -> tuple[Range, ...] | None:
    """The common box; the axes of a logical tensor stand in one order everywhere."""
    box = []
    for (a, b), (c, d) in zip(src.box, dst.box, strict=True):
        low, high = max(a, c), min(b, d)
        if low >= high and not (a == b == c == d):
            return None
        box.append((low, high))
    return tuple(box)


def _components(joins: Sequence[Join]) -> tuple[Component, ...]:
    parent: dict[tuple[str, int], tuple[str, int]] = {}

    def root(node: tuple[str, int]) -> tuple[str, int]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for join in joins:
        parent[root(("src", join.src.slot.row))] = root(("dst", join.dst.slot.row))
    groups: dict[tuple[str, int], list[Join]] = defaultdict(list)
    for join in joins:
        groups[root(("dst", join.dst.slot.row))].append(join)
    return tuple(Component(tuple(group), _common(group)) for group in groups.values())


def _common(group: Sequence[Join]) -> tuple[str, ...]:
    """Axes that every slot of the group enumerates."""
    slots = {id(slot): slot for join in group for slot in (join.src.slot, join.dst.slot)}
    first, *rest = slots.values()
    return tuple(axis for axis in first.box if all(axis in slot.box for slot in rest))
