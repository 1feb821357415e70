"""Learning a format from what an engine holds: a checkpoint whose elements are their own numbers, loaded by the engine,
says of every element of every parameter which element of which logical tensor it is.

    Numbers    gives each element of each logical tensor a number, writes them in place of a checkpoint's values
    observed   what a parameter of a rank holds: pieces, each a box of a logical tensor with its strides
    rows       the rows of a table that store all of this, inferred from one rank that holds everything
    held       the other direction: what a layout says that a rank holds, in numbers; a table is proven by it

Knows no engine: parameters are arrays with names.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import ReshardError
from ..layout.cut import Layout, Piece
from ..layout.mesh import Range
from ..model.understand import Model
from ..tables.notation import fold

Array = np.ndarray[Any, np.dtype[Any]]
FIRST = 4096  # numbers below are left to what an engine makes up itself: scales of 1, padding of 0
MOST = 1 << 24  # float32 holds all whole numbers up to it


class Numbers:
    """A number for each element of each logical tensor; tied tensors share theirs.

    Raises ReshardError where there are more elements than float32 has whole numbers.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.first: dict[str, int] = {}
        at = FIRST
        for name, tensor in model.tensors.items():
            if name not in model.alias:
                self.first[name] = at
                at += math.prod(tensor.sizes)
        self.end = at
        if at > MOST:
            raise ReshardError(f"{at} elements cannot be told apart in float32, at most {MOST} can")
        self._names = list(self.first)
        self._starts = np.array([self.first[name] for name in self._names])

    def of(self, piece: Piece, point: Mapping[str, int]) -> tuple[Array, Array]:
        """Numbers of a piece's elements and their offsets in the stored tensor, at a point of the enumerated axes."""
        tensor = piece.tensor
        first = self.first[self.model.alias.get(tensor.name, tensor.name)]
        numbers, places, step = np.zeros(1, np.int64) + first, np.zeros(1, np.int64) + piece.offset, 1
        steps: list[int] = []
        for size in reversed(tensor.sizes):
            steps.insert(0, step)
            step *= size
        for axis, (low, high), stride, step in zip(tensor.axes, piece.box, piece.strides, steps, strict=True):
            if stride is None:
                numbers = numbers + point[axis] * step
                continue
            numbers = (numbers[:, None] + np.arange(low, high) * step).ravel()
            places = (places[:, None] + np.arange(high - low) * stride).ravel()
        return numbers, places

    def whose(self, numbers: Array) -> tuple[list[str], Array]:
        """The logical tensors that numbers are of, and for each number which of these."""
        at = np.searchsorted(self._starts, numbers, "right") - 1
        found, which = np.unique(at, return_inverse=True)
        return [self._names[n] for n in found], which


def held(layout: Layout, numbers: Numbers) -> Iterator[tuple[int, str, Array]]:
    """What each rank holds by a layout: (rank, stored name, int64 array), zero where there is padding."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for owned in layout.pieces.values():
        for piece in owned:
            pieces[id(piece.slot)].append(piece)
    for slot in layout.slots:
        for point in slot.points():
            flat = np.zeros(slot.elements, np.int64)
            for piece in pieces[id(slot)]:
                values, places = numbers.of(piece, point)
                flat[places] = values
            yield slot.rank, slot.name(point), flat.reshape(slot.shape)


# --- what a parameter holds -------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A box of a logical tensor inside one parameter. `strides`: of the axes along which it extends."""

    tensor: str
    box: dict[str, Range]
    offset: int
    strides: dict[str, int]


class Unlike(Exception):
    """A parameter holds something else than boxes of logical tensors; the message says what."""


def observed(values: Array, numbers: Numbers) -> tuple[Held, ...]:
    """The pieces in a parameter, by offset. Raises Unlike where it is not made of whole boxes with a stride along
    each axis, and padding of zeros.
    """
    flat = np.asarray(values, np.float64).ravel()
    if not np.isfinite(flat).all() or (flat != np.round(flat)).any() or np.abs(flat).max(initial=0) > MOST:
        raise Unlike("values that no element of the checkpoint has")
    whole = flat.astype(np.int64)
    ours = (whole >= FIRST) & (whole < numbers.end)
    if (whole[~ours] != 0).any():
        raise Unlike("values that no element of the checkpoint has")
    if not ours.any():
        raise Unlike("nothing of the checkpoint")
    places = np.flatnonzero(ours)
    names, which = numbers.whose(whole[places])
    found = [_piece(name, whole[places[which == at]], places[which == at], numbers) for at, name in enumerate(names)]
    return tuple(sorted(found, key=lambda piece: piece.offset))


def _piece(name: str, values: Array, places: Array, numbers: Numbers) -> Held:
    tensor = numbers.model.tensors[name]
    order = np.argsort(values, kind="stable")
    values, places = values[order] - numbers.first[name], places[order]
    coordinates = np.unravel_index(values, tensor.sizes)
    box = [(int(along.min()), int(along.max()) + 1) for along in coordinates]
    extents = [high - low for low, high in box]
    if math.prod(extents) != len(values) or (values[1:] == values[:-1]).any():
        raise Unlike(f"{name}: {len(values)} elements that are no box of {list(tensor.sizes)}")
    grid = places.reshape(extents)
    offset = int(grid.flat[0])
    strides, wanted = {}, np.full(extents, offset)
    for at, (axis, extent) in enumerate(zip(tensor.axes, extents, strict=True)):
        if extent > 1:
            one = [0] * len(extents)
            one[at] = 1
            strides[axis] = int(grid[tuple(one)]) - offset
            shape = [1] * len(extents)
            shape[at] = extent
            wanted = wanted + np.arange(extent).reshape(shape) * strides[axis]
    if (wanted != grid).any() or min(strides.values(), default=1) < 1:
        raise Unlike(f"{name}: its elements are in another order than by axes")
    return Held(name, dict(zip(tensor.axes, box, strict=True)), offset, strides)


# --- patterns ---------------------------------------------------------------------------------------------------------


Item = tuple[str, int, dict[str, tuple[int, int]]]  # leaf, offset, axis → (stride, size)


def pattern(
    shape: Sequence[int],
    pieces: Sequence[Held],
    compounds: Mapping[str, Sequence[str]],
    beside: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> str:
    """The pattern by which these pieces fill a tensor of this shape. Raises Unlike where none does.

    An axis of size one has no stride: `beside` says for each tensor which axis it stands next to.
    """
    dims, step = [], math.prod(shape)
    for size in shape:
        step, above = step // size, step
        dims.append((step, above, size))
    words = []
    for step, above, size in dims:
        items: list[Item] = []
        for piece in pieces:
            own = {
                axis: (stride // step, high - low)
                for axis, (low, high) in piece.box.items()
                if axis in piece.strides and step <= (stride := piece.strides[axis]) < above
            }
            if any(piece.strides[axis] % step or stride * n > size for axis, (stride, n) in own.items()):
                raise Unlike(f"{piece.tensor}: an axis runs over two dimensions of {list(shape)}")
            own |= _single(piece, own, beside.get(piece.tensor, {}))
            items.append((piece.tensor, piece.offset // step % size, own))
        words.append(_factor(items, size, compounds))
    return " ".join(words)


def _single(piece: Held, own: Mapping[str, tuple[int, int]], beside: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Axes of size one, given a stride next to that of the axis that they stand beside: before it, or behind it."""
    found = {}
    order = list(piece.box)
    for axis, other in beside.items():
        if axis in piece.box and other in own:
            stride, count = own[other]
            found[axis] = (stride * count if order.index(axis) < order.index(other) else stride, 1)
    return found


def _factor(items: Sequence[Item], size: int, compounds: Mapping[str, Sequence[str]]) -> str:
    text = _product(items, size, compounds)
    depth = [text[: at + 1].count("(") - text[: at + 1].count(")") for at in range(len(text))]
    return text if " " not in text or 0 not in depth[:-1] else f"({text})"


def _product(items: Sequence[Item], size: int, compounds: Mapping[str, Sequence[str]]) -> str:
    """One product of axes, of which one may be a sum."""
    outer: list[str] = []
    while True:
        first = {_outermost(item) for item in items}
        if len(first) > 1 or None in first:
            break
        ((axis, stride, count),) = (one for one in first if one is not None)
        if count == 1:
            outer.append(axis)
            items = [(leaf, offset, {k: v for k, v in own.items() if k != axis}) for leaf, offset, own in items]
            continue
        if stride * count != size or any(offset >= stride for _, offset, _ in items):
            break
        outer.append(axis)
        items = [(leaf, offset, {k: v for k, v in own.items() if k != axis}) for leaf, offset, own in items]
        size = stride
    if size == 1 and all(not own for *_, own in items):
        return _named(outer, compounds) or "1"
    if all(offset == items[0][1] and own == items[0][2] for _, offset, own in items) and len(items[0][2]) == 1:
        ((axis, (stride, count)),) = items[0][2].items()
        if stride == 1 and count < size and not outer and items[0][1] == 0:
            return axis  # padded
    return " ".join(filter(None, (_named(outer, compounds), _sum(items, size, compounds))))


def _sum(items: Sequence[Item], size: int, compounds: Mapping[str, Sequence[str]]) -> str:
    groups: list[list[Item]] = []
    end = -1
    for item in sorted(items, key=lambda item: item[1]):
        last = item[1] + sum((count - 1) * stride for stride, count in item[2].values())
        if item[1] > end:
            groups.append([])
        groups[-1].append(item)
        end = max(end, last)
    if len(groups) < 2 or groups[0][0][1] != 0:
        raise Unlike(f"{', '.join(leaf for leaf, *_ in items)}: {size} elements that are no product of axes")
    starts = [group[0][1] for group in groups]
    terms = []
    for group, start, stop in zip(groups, starts, [*starts[1:], size], strict=True):
        own = [(leaf, offset - start, axes) for leaf, offset, axes in group]
        terms.append(_product(own, stop - start, compounds))
    return f"({' + '.join(terms)})"


def _outermost(item: Item) -> tuple[str, int, int] | None:
    found = ((axis, stride, count) for axis, (stride, count) in item[2].items())
    return max(found, key=lambda one: one[1:], default=None)


def _named(axes: Sequence[str], compounds: Mapping[str, Sequence[str]]) -> str:
    """Axes in words, those of a compound by its name."""
    words = list(axes)
    for name, atoms in compounds.items():
        for at in range(len(words) - len(atoms) + 1):
            if words[at : at + len(atoms)] == list(atoms):
                words[at : at + len(atoms)] = [name]
    return " ".join(words)


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """A row without its words, and where it was seen. `constant`: what it holds where that is not of the checkpoint."""

    name: str
    pattern: str
    leaves: tuple[str, ...]


@dataclass
class Seen:
    """What one rank that holds everything has. `odd`: parameters that no row can describe, and why."""

    rows: list[Learned] = field(default_factory=list)
    scalars: dict[str, tuple[float, tuple[int, ...]]] = field(default_factory=dict)  # name, value, layers
    odd: dict[str, str] = field(default_factory=dict)


def rows(parameters: Mapping[str, Array], numbers: Numbers) -> Seen:
    """The rows by which one rank stores a whole model."""
    seen = Seen()
    groups: dict[str, dict[tuple[int, ...], tuple[Held, ...]]] = defaultdict(dict)
    shapes: dict[str, tuple[int, ...]] = {}
    scalars: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for name, values in parameters.items():
        folded, at = fold(name)
        if values.ndim == 0 and float(values) < FIRST and math.isfinite(float(values)):
            scalars[folded][at] = float(values)
            continue
        try:
            groups[folded][at] = observed(values, numbers)
            shapes[name] = tuple(values.shape)
        except Unlike as unlike:
            seen.odd[name] = str(unlike)
    for folded, values_of in scalars.items():
        if len(set(values_of.values())) == 1:
            layers = tuple(sorted(at[0] for at in values_of if at))
            seen.scalars[folded.replace("{}", "{layer}", 1)] = (next(iter(values_of.values())), layers)
        else:
            seen.odd[folded] = "scalars that differ from layer to layer"
    for folded, members in groups.items():
        kinds: dict[tuple[str, str, tuple[str, ...]], None] = {}
        for at, pieces in members.items():
            name = _filled(folded, at)
            try:
                kinds[_row(folded, at, shapes[name], pieces, numbers)] = None
            except Unlike as unlike:
                seen.odd[name] = str(unlike)
        seen.rows += [Learned(*kind) for kind in kinds]
    return seen


def _filled(folded: str, at: Sequence[int]) -> str:
    for number in at:
        folded = folded.replace("{}", str(number), 1)
    return folded


def _row(
    folded: str, at: Sequence[int], shape: tuple[int, ...], pieces: tuple[Held, ...], numbers: Numbers
) -> tuple[str, str, tuple[str, ...]]:
    """Name, pattern and leaves of a parameter's row, variants as the plain ones."""
    tensors = numbers.model.tensors
    fixed = [
        {axis: low for axis, (low, high) in piece.box.items() if high - low == 1 and axis not in piece.strides}
        for piece in pieces
    ]
    axes = [dict(zip(tensors[piece.tensor].axes, tensors[piece.tensor].sizes, strict=True)) for piece in pieces]
    enumerated: list[str] = []
    for number in at:
        alike = [
            axis
            for axis in fixed[0]
            if axis not in enumerated and all(one.get(axis) == number for one in fixed) and axes[0][axis] > 1
        ]
        enumerated.append("layer" if "layer" in alike else alike[0] if alike else str(number))
    for piece, one, sizes in zip(pieces, fixed, axes, strict=True):
        if left := [axis for axis in one if axis not in enumerated and sizes[axis] > 1]:
            raise Unlike(f"{piece.tensor}: only a part along {', '.join(left)}")
        if part := [axis for axis, (low, high) in piece.box.items() if high - low > 1 and high - low < sizes[axis]]:
            raise Unlike(f"{piece.tensor}: only a part along {', '.join(part)}")
    name = folded
    for word in enumerated:
        name = name.replace("{}", word if re.fullmatch("[0-9]+", word) else f"{{{word.partition('@')[0]}}}", 1)
    single = {
        piece.tensor: [axis for axis, size in sizes.items() if size == 1 and axis not in enumerated]
        for piece, sizes in zip(pieces, axes, strict=True)
    }
    text = _with_single(single, shape, pieces, numbers.model.family.axes)
    leaves = tuple(piece.tensor for piece in sorted(pieces, key=lambda piece: piece.offset))
    if len({leaf.partition("@")[2] for leaf in leaves}) == 1 and "@" in leaves[0]:
        variant = "@" + leaves[0].partition("@")[2]
        text, leaves = text.replace(variant, ""), tuple(leaf.removesuffix(variant) for leaf in leaves)
    return name, text, leaves


def _with_single(
    single: Mapping[str, Sequence[str]],
    shape: tuple[int, ...],
    pieces: Sequence[Held],
    compounds: Mapping[str, Sequence[str]],
) -> str:
    """A pattern with axes of size one: those of a compound stand beside its other parts, others in dimensions of size
    one, or else before the next axis of their tensor.
    """
    beside: dict[str, dict[str, str]] = defaultdict(dict)
    loose: list[str] = []
    for piece in pieces:
        for axis in single[piece.tensor]:
            parts = [
                other for atoms in compounds.values() if axis in atoms for other in atoms if other in piece.strides
            ]
            order = list(piece.box)
            after = [other for other in order[order.index(axis) + 1 :] if other in piece.strides]
            if parts:
                beside[piece.tensor][axis] = parts[0]
            elif len(pieces) == 1 and len(loose) < shape.count(1):
                loose.append(axis)
            elif after:
                beside[piece.tensor][axis] = after[0]
            else:
                raise Unlike(f"{piece.tensor}: {axis} is of size one and stands nowhere")
    found = pattern(shape, pieces, compounds, beside).split(" ")
    for axis in loose:
        found[found.index("1")] = axis
    return " ".join(found)


# --- words ------------------------------------------------------------------------------------------------------------


def words(row: Learned, ranks: Sequence[Mapping[str, Array]], numbers: Numbers, cut: Set[str]) -> str:
    """The words by which a row says how tensor parallel ranks share it; `ranks`: parameters of each of them, `cut`: the
    axes that the format cuts where no word says otherwise. Raises Unlike where no word says it.
    """
    found = [_cut_axes(row, parameters, numbers) for parameters in ranks]
    axes = {
        axis.partition("@")[0]
        for leaf in row.leaves
        for name, tensor in numbers.model.tensors.items()
        if name.partition("@")[0] == leaf
        for axis in tensor.axes
    }
    named = {name for name, atoms in numbers.model.family.axes.items() if set(atoms) <= axes} | axes
    usual = {
        axis for axis in axes if axis in cut or any(axis in numbers.model.family.axes.get(n, ()) for n in named & cut)
    }
    if found[0] is not None and all(one is None for one in found[1:]):
        return "whole zero" if usual and not found[0] else "zero"
    if any(one is None for one in found):
        raise Unlike("some ranks hold none of it")
    ours = set().union(*(one or set() for one in found))
    if not ours:
        return "whole" if usual else ""
    if ours <= usual:
        return ""
    if len(ours) == 1 and not ours & usual:
        return f"cut={ours.pop()}"
    raise Unlike(f"cut along {', '.join(sorted(ours))}")


def _cut_axes(row: Learned, parameters: Mapping[str, Array], numbers: Numbers) -> set[str] | None:
    """The axes along which a rank has a part of a row; None where it has zeros."""
    template = fold(row.name)[0]
    holes = re.findall(r"\{(\w+)\}", row.name)
    pattern_of = re.compile(re.sub(r"\\\{\w+\\\}", "[0-9]+", re.escape(template)))
    for name, values in parameters.items():
        if not pattern_of.fullmatch(name):
            continue
        if not values.any():
            return None
        return {
            axis.partition("@")[0]
            for piece in observed(values, numbers)
            for (axis, (low, high)), size in zip(
                piece.box.items(), numbers.model.tensors[piece.tensor].sizes, strict=True
            )
            if high - low < size and axis.partition("@")[0] not in holes
        }
    raise Unlike("this rank has no such parameter")
