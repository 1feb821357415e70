"""Layouts: where each box of each logical tensor lies in stored files.

A Hugging Face directory is a layout on one rank; a shard directory is one on many. Everything here is arithmetic on
names, axes and sizes in elements: no file is known, let alone opened.

    Slot    one row on one rank: the stored tensors `layers.0.attn.qkv`, `layers.1.attn.qkv`, … of one shape
    Piece   one leaf of a slot: this box of that logical tensor, with the strides that it has there
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from types import MappingProxyType

from ..containers.dtypes import BITS
from ..errors import ReshardError
from ..model.understand import Model, Problems, Tensor
from ..tables.expression import parse
from ..tables.formats import MESH, Format
from ..tables.notation import Pattern, block_of, varied
from ..tables.row import Constant, Row
from ..tables.schemes import PACKED, SCALE
from .mesh import Coordinate, Mesh, Range, Rule, cut, cut_compound, shares

Point = dict[str, int]  # enumerated axis → index


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The stored tensors of one row on one rank. `box`: the range of each enumerated axis; `layers`:
    those that exist.
    """

    row: int
    rank: int
    template: Row | Constant
    shape: tuple[int, ...]
    box: dict[str, Range]
    layers: tuple[int, ...] | None

    def points(self) -> Iterator[Point]:
        """The points of the enumerated axes, layer by layer."""
        axes = self.template.name.axes
        ranges: list[Sequence[int]] = []
        for axis in axes:
            low, high = self.box[axis]
            ranges.append(
                [layer for layer in self.layers or () if low <= layer < high] if axis == "layer" else range(low, high)
            )
        for numbers in product(*ranges):
            yield dict(zip(axes, numbers, strict=True))

    def name(self, point: Mapping[str, int]) -> str:
        template = self.template.name
        if template.local:
            point = {axis: at - self.box[axis][0] if axis in template.local else at for axis, at in point.items()}
        return template.name(point)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def count(self) -> int:
        """How many stored tensors this slot has."""
        return math.prod(self.within(axis, held) for axis, held in self.box.items())

    def within(self, axis: str, held: Range) -> int:
        """How many indices of an axis there are in a range; of layers, those that exist."""
        low, high = held
        if axis == "layer" and self.layers is not None:
            return sum(low <= layer < high for layer in self.layers)
        return high - low


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """This box of that logical tensor lies in this slot. `strides`: elements per axis, None along enumerated axes."""

    tensor: Tensor
    slot: Slot
    box: tuple[Range, ...]
    offset: int
    strides: tuple[int | None, ...]

    @property
    def elements(self) -> int:
        return self.tensor.count(self.box)


@dataclass(frozen=True)
class Layout:
    """The shape of a checkpoint, without data. `repeats`: how often an axis is repeated;
    both empty for a published one.
    """

    format: Format
    model: Model
    mesh: Mesh
    slots: tuple[Slot, ...]
    constants: tuple[Slot, ...] = ()
    repeats: dict[str, int] = field(default_factory=dict)
    padding: dict[str, tuple[int, int]] = field(default_factory=dict)  # axis → (size, stored size)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    stages: tuple[Range, ...] = ((0, 0),)
    # beyond the model's: stored twice in the original with equal bytes, once here
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def alias(self) -> dict[str, str]:
        """Tied names: those that the original stores once, and those that this layout does."""
        return self.model.alias | self.tied

    @cached_property
    def by_rank(self) -> tuple[tuple[Slot, ...], ...]:
        ranks: list[list[Slot]] = [[] for _ in range(self.mesh.world)]
        for slot in (*self.slots, *self.constants):
            ranks[slot.rank].append(slot)
        return tuple(map(tuple, ranks))

    def holding(self, tensor: str) -> tuple[Piece, ...]:
        """All pieces of a logical tensor; a tied name without pieces of its own has those of the other."""
        if tensor in self.pieces:
            return self.pieces[tensor]
        other = self.alias.get(tensor) or next((k for k, v in self.alias.items() if v == tensor), "")
        return self.pieces.get(other, ())

    def ranges(self, piece: Piece) -> dict[str, Range]:
        """The range of every axis that a piece holds; of a packed matrix, those of the matrix: where its numbers are
        counted in words, its scales tell.
        """
        found = dict(zip(piece.tensor.axes, piece.box, strict=True))
        base, _, variant = piece.tensor.name.partition("@")
        if not base.endswith(PACKED):
            return found
        scale = self.pieces.get(varied(base.removesuffix(PACKED) + SCALE, variant), ())
        for other in scale:
            if other.slot.rank == piece.slot.rank:
                found |= {
                    axis: each for axis, each in zip(other.tensor.axes, other.box, strict=True) if axis not in found
                }
        for axis, (low, high) in tuple(found.items()):
            block = block_of(axis)
            if block is not None and len(block[0]) == 1:
                (inner,), unit = block
                found.setdefault(inner, (low * unit, min(high * unit, self.model.sizes[inner])))
        return {axis: each for axis, each in found.items() if block_of(axis) is None}

    def beyond(self, other: "Layout") -> dict[str, tuple[Piece, ...]]:
        """What this layout stores beside the tensor that it is tied to, and `other` only once,
        under the other's name.
        """
        pairs = [pair for pair in other.alias.items() if self.pieces.keys() >= set(pair)]
        return {name: self.pieces[name] for pair in pairs for name in pair if name not in other.pieces}

    def distinct(self, tensor: str) -> tuple[Piece, ...]:
        """One piece for every distinct box, the one on the lowest rank: replicas left out. Proves that they cover the
        tensor.
        """
        return _distinct(self.holding(tensor), self.model.tensors[tensor])

    def logical_bytes(self) -> dict[str, int]:
        """Bytes of every logical tensor, each once: a tied name counts as the tensor that it is a name for."""
        found, alias = {}, self.alias
        for name, tensor in self.model.tensors.items():
            if name not in alias:
                bits = [BITS[dtype] for dtype in tensor.dtypes]
                found[name] = (
                    tensor.elements * bits[0] // 8 if len(bits) == 1 else tensor.elements // len(bits) * sum(bits) // 8
                )
        return found

    def dtype(self, slot: Slot, point: Mapping[str, int]) -> str:
        """The dtype of one stored tensor; its leaves agree, `lay_out` has seen to that."""
        if isinstance(slot.template, Constant):
            return slot.template.dtype
        return self.model.tensors[slot.template.leaves[0]].dtype(point)


def _distinct(pieces: Sequence[Piece], tensor: Tensor) -> tuple[Piece, ...]:
    boxes: dict[tuple[tuple[Range, ...], tuple[int, ...] | None], Piece] = {}
    for piece in pieces:
        boxes.setdefault((piece.box, piece.slot.layers), piece)
    found = tuple(boxes.values())
    if (held := sum(_held(piece) for piece in found)) != tensor.elements:
        raise ReshardError(
            f"{tensor.name}: the layout holds {held} of {tensor.elements} elements, each must be there once"
        )
    return found


def _held(piece: Piece) -> int:
    """Elements of a piece, only the slot's own layers counted."""
    return math.prod(piece.slot.within(axis, held) for axis, held in zip(piece.tensor.axes, piece.box, strict=True))


# --- laying out -------------------------------------------------------------------------------------------------------


def lay_out(
    table: Format,
    model: Model,
    mesh: Mesh,
    active: Mapping[int, tuple[int, ...] | None] | None = None,
    tied: Mapping[str, str] = MappingProxyType({}),
) -> Layout:
    """The layout that a format gives a model on a mesh.

    `active` restricts the format of published checkpoints to the rows (and their layers) that are in use; without it
    each logical tensor goes to the first row whose tensors all exist. `tied`: names of tensors that the model has
    twice, to be stored once; that they are equal the caller must know. Raises ReshardError listing everything that does
    not divide or has no row.
    """
    problems = Problems()
    table = table.refined(model.family.axes)
    if active is None:
        axes = {name: tensor.axes for name, tensor in model.tensors.items()}
        table = _with_towers(table.varied(axes), model)
        if model.family.scheme:
            table = table.parted(model.family.parts, axes)
    chosen = _choose(table, model, active, problems)
    for line in unmet(table.requires, model, mesh):
        problems.add(f"the engine requires {line}")
    for name in _stored_twice(table, chosen, model, mesh):
        problems.add(f"two logical tensors would be stored as {name} on one rank")
    cutter = _Cutter(table, model, mesh, problems)
    stored_once = _tied_rows(table, model.alias | dict(tied))
    slots, pieces = [], defaultdict(list)
    refused = -1  # what one rank of a stage cannot hold, the others need not say again: there may be 65,536 of them
    for rank in range(mesh.world):
        stage, before = mesh.stage(rank), len(problems)
        if stage == refused:
            continue
        here = {at for at, row, _ in chosen if _in_stage(row, stage, mesh.pp)}
        for at, row, layers in chosen:
            if at not in here or stored_once.get(at, at) in here - {at}:
                continue
            found = cutter.place(at, row, layers, rank)
            if found is not None:
                slots.append(found[0])
                for piece in found[1]:
                    pieces[piece.tensor.name].append(piece)
        if len(problems) > before:
            refused = stage
    cutter.unused()
    what = f'table "{table.name}"' if table.published else f'format "{table.name}" on {mesh}'
    problems.raise_if_any(f"{what} does not fit this model:")
    constants = _constants(table, slots)
    return Layout(
        table,
        model,
        mesh,
        tuple(slots),
        constants,
        cutter.repeats,
        cutter.padding,
        {name: tuple(held) for name, held in pieces.items()},
        cutter.stages,
        {name: other for name, other in tied.items() if not {name, other} & model.alias.keys()},
    )


def _stored_twice(
    table: Format, chosen: Sequence[tuple[int, Row, tuple[int, ...] | None]], model: Model, mesh: Mesh
) -> list[str]:
    """Names of which one rank would have two: rows may share one where they are in different stages or layers."""
    tied = _tied_rows(table, model.alias) if not table.published else {}
    seen: dict[str, list[tuple[Row, set[int]]]] = defaultdict(list)
    found = []
    for at, row, layers in chosen if not table.published else ():
        if at in tied:
            continue
        here = set(layers) if layers is not None else {-1}
        for other, there in seen[row.name.text]:
            alone = "layer" not in row.name.axes and {row.stage, other.stage} == {"first", "last"} and mesh.pp > 1
            if here & there and not alone:
                found.append(row.name.text)
        seen[row.name.text].append((row, here))
    return found


def unmet(conditions: Sequence[str], model: Model, mesh: Mesh) -> list[str]:
    """Of conditions on sizes and mesh those that are false, with the numbers; one on an axis that the model does not
    have says nothing.
    """
    known = model.sizes | {name: getattr(mesh, name) for name in MESH}
    known |= {
        name: math.prod(model.sizes[atom] for atom in atoms)
        for name, atoms in model.family.axes.items()
        if model.sizes.keys() >= set(atoms)
    }
    lines = []
    for text in conditions:
        condition = parse(text)
        if known.keys() >= set(condition.keys) and not condition.says(known.get):
            sizes = ", ".join(f"{key} is {known[key]}" for key in condition.keys)
            lines.append(f"{text}: {sizes}")
    return lines


def _with_towers(table: Format, model: Model) -> Format:
    """A format that stores other components has them under their original names, whole, on the stages that it says."""
    rows = tuple(row._replace(stage=stage) for stage in table.towers for row in model.family.rows if row.tower)
    return replace(table, rows=table.rows + rows) if rows else table


def _in_stage(row: Row, stage: int, stages: int) -> bool:
    if "layer" in row.name.axes or any("layer" in path for path in row.pattern.axes):
        return True
    return (
        row.stage == "every" or (row.stage == "first" and stage == 0) or (row.stage == "last" and stage == stages - 1)
    )


def _choose(
    table: Format, model: Model, active: Mapping[int, tuple[int, ...] | None] | None, problems: Problems
) -> list[tuple[int, Row, tuple[int, ...] | None]]:
    if active is not None:
        return [(at, table.rows[at], layers) for at, layers in active.items()]
    left = {name: _existing(tensor) for name, tensor in model.tensors.items()}
    chosen = []
    for at, row in enumerate(table.rows):
        if not all(leaf in left for leaf in row.leaves):
            continue
        here = set[int].intersection(*(left[leaf] for leaf in row.leaves))
        if model.family.scheme and table.parts:  # what is not of one dtype has rows of its own
            here = {at for at in here if len({model.tensors[leaf].dtype({"layer": at}) for leaf in row.leaves}) == 1}
        if not here or ("layer" not in row.name.axes and any(left[leaf] != here for leaf in row.leaves)):
            continue
        for leaf in row.leaves:
            left[leaf] = left[leaf] - here
        row = row._replace(pattern=_fitting(row, model), layouts=())
        chosen.append((at, row, tuple(sorted(here)) if "layer" in row.name.axes else None))
    for name, layers in left.items():
        if layers:
            problems.add(
                f"no row for the logical tensor {name}",
                f"{name} {' '.join(model.tensors[name].axes)}{_named(layers - {-1})}",
            )
    return chosen


def _existing(tensor: Tensor) -> set[int]:
    """The layers where a tensor is; of one that belongs to none, -1."""
    return {-1} if tensor.layers is None else set(tensor.layers)


def _named(layers: set[int]) -> str:
    return f" in layers {', '.join(map(str, sorted(layers)))}" if layers else ""


def _fitting(row: Row, model: Model) -> Pattern:
    """Of alternative patterns the first that has the axes of the tensors, or else the first."""
    wanted = [sorted(model.tensors[leaf].axes) for leaf in row.leaves]
    patterns = (row.pattern, *row.layouts)
    return next(
        (one for one in patterns if [sorted((*row.name.axes, *path)) for path in one.axes] == wanted), row.pattern
    )


def _tied_rows(table: Format, alias: Mapping[str, str]) -> dict[int, int]:
    """For a row that a tied name makes superfluous on a rank, the row that keeps the bytes there."""
    keep = table.tied
    if keep in ("", "both"):
        return {}
    drop = alias.get(keep) or next((name for name, other in alias.items() if other == keep), None)
    if drop is None:
        return {}
    rows = {row.leaves: at for at, row in reversed(list(enumerate(table.rows)))}
    return {rows[(drop,)]: rows[(keep,)]} if (drop,) in rows and (keep,) in rows else {}


def _constants(table: Format, slots: Sequence[Slot]) -> tuple[Slot, ...]:
    return tuple(
        Slot(len(table.rows) + number, slot.rank, constant, (), slot.box, slot.layers)
        for number, constant in enumerate(table.constants)
        for slot in slots
        if isinstance(slot.template, Row) and constant.beside in slot.template.leaves
    )


class _Cutter:
    """Cuts the axes of logical tensors as a format says; collects what does not divide, what is repeated and what is
    padded.
    """

    def __init__(self, table: Format, model: Model, mesh: Mesh, problems: Problems) -> None:
        self.table, self.model, self.mesh, self.problems = table, model, mesh, problems
        self.repeats: dict[str, int] = {}
        self.padding: dict[str, tuple[int, int]] = {}
        self.used: set[str] = set()
        self.mesh_axis = {axis: mesh_axis for mesh_axis, axes in table.cut.items() for axis in axes}
        self.stages = self._stages()
        self.units = model.units
        if mesh.weights and "tp" not in table.weighted:
            problems.add(f'format "{table.name}" wants equal ranks: --split cannot be used')

    def _stages(self) -> tuple[Range, ...]:
        main, pp = self.model.main_layers, self.mesh.pp
        extra = self.model.sizes.get("layer", main) - main
        given = self.mesh.layers
        if given is not None and sum(given) != main:
            problem = f"--pp-layers {','.join(map(str, given))} is {sum(given)} layers, the model has {main}"
        elif pp > main and pp > 1:
            problem = f"--pp {pp} leaves a stage empty: the model has {main} layers"
        elif given is None and main % pp and "layer" not in self.table.uneven:
            counts = ",".join(str(high - low) for low, high in shares(main, (1,) * pp))
            problem = (
                f'{main} layers cannot be split evenly over {pp} stages; format "{self.table.name}" then '
                f"needs --pp-layers, e.g. {counts}"
            )
        else:
            *before, (low, _) = shares(main, given or (1,) * pp)
            return (*before, (low, main + extra))  # extra layers stand on the last stage
        self.problems.add(problem)
        return ((0, main),) * pp

    def place(self, at: int, row: Row, layers: tuple[int, ...] | None, rank: int) -> tuple[Slot, list[Piece]] | None:
        """The slot of a row on a rank and its pieces; None where the rank has none of its layers."""
        tensors = [self.model.tensors[leaf] for leaf in row.leaves]
        for tensor, path in zip(tensors, row.pattern.axes, strict=True):
            axes = (*row.name.axes, *path)
            if sorted(axes) != sorted(tensor.axes):
                words = (
                    f"{row.name.text}: stores {tensor.name} by ({', '.join(axes)}), the family table says "
                    f"({', '.join(tensor.axes)})"
                )
                self.problems.add(words)
                return None
        try:
            boxes = [self.box(tensor, row, rank) for tensor in tensors]
            stored = [dict(zip(tensor.axes, box, strict=True)) for tensor, box in zip(tensors, boxes, strict=True)]
            shape, spans = row.pattern.measure(lambda leaf, axis: stored[leaf][axis][1] - stored[leaf][axis][0])
        except ReshardError as error:
            self.problems.add(error.message, row.name.text)
            return None
        enumerated = {axis: stored[0][axis] for axis in row.name.axes}
        slot = Slot(at, rank, row, shape, enumerated, layers)
        if not slot.count():
            return None
        held = [{"layer": layer} for layer in layers or (-1,)]
        if any(tensor.dtype(point) != tensors[0].dtype(point) for tensor in tensors[1:] for point in held):
            kinds = ", ".join(f"{tensor.name} {'/'.join(sorted(set(tensor.dtypes)))}" for tensor in tensors)
            self.problems.add(
                f"{row.name.text} cannot hold tensors of different dtypes, cast them to one before: {kinds}"
            )
        pieces = []
        for tensor, box, span in zip(tensors, boxes, spans, strict=True):
            if row.zero and self.mesh.coordinate("tp", rank).index:
                continue
            logical = tuple(
                (min(low, size), min(high, size)) for (low, high), size in zip(box, tensor.sizes, strict=True)
            )
            pieces.append(
                Piece(tensor, slot, logical, span.offset, tuple(span.strides.get(axis) for axis in tensor.axes))
            )
        return slot, pieces

    def box(self, tensor: Tensor, row: Row, rank: int) -> tuple[Range, ...]:
        """The range of each axis of a logical tensor that a rank stores; an end beyond the size is zero padding."""
        ranges = self._ranges(tensor.axes, tensor.axes, row, rank)
        return tuple(ranges[axis] for axis in tensor.axes)

    def _ranges(self, axes: Sequence[str], family: Sequence[str], row: Row, rank: int) -> dict[str, Range]:
        """`family` is the tensor whose other axes decide: inside the experts, tp is what ep leaves of it."""
        ranges: dict[str, Range] = {}
        if row.cut is not None and row.cut in axes:
            at = self._coordinate("tp", family, rank)
            ranges[row.cut] = cut(row.cut, self.model.sizes[row.cut], at, Rule())
        elif not row.cut:
            for name, atoms in self.table.axes.items():
                if name in self.mesh_axis and not row.whole and set(atoms) <= set(axes):
                    at = self._coordinate(self.mesh_axis[name], family, rank)
                    sizes = [self.model.sizes[atom] for atom in atoms]
                    ranges.update(
                        zip(atoms, cut_compound(atoms, sizes, at, self._rule(atoms[0], compound=True)), strict=True)
                    )
        for axis in axes:
            if axis in ranges:
                continue
            if axis == "layer" and self.mesh_axis.get(axis) == "pp":
                self.used.add("pp")
                ranges[axis] = self.stages[self.mesh.stage(rank)]
            elif block := block_of(axis):
                ranges[axis] = self._blocks(axis, block, family, row, rank)
            elif axis in self.mesh_axis and not row.whole and not row.cut:
                at = self._coordinate(self.mesh_axis[axis], family, rank)
                rule = self._rule(axis)
                ranges[axis] = cut(axis, self.model.sizes[axis], at, rule)
                self._note(axis, at, rule)
            else:
                ranges[axis] = (0, self.model.sizes[axis])
        return ranges

    def _coordinate(self, mesh_axis: str, family: Sequence[str], rank: int) -> Coordinate:
        if mesh_axis == "tp" and self.mesh.ep > 1 and any(self.mesh_axis.get(axis) == "ep" for axis in family):
            mesh_axis = "etp"
        self.used.add("tp" if mesh_axis == "etp" else mesh_axis)
        return self.mesh.coordinate(mesh_axis, rank)

    def _rule(self, axis: str, compound: bool = False) -> Rule:
        table = self.table
        unit = table.pad.get(axis, "1") if not compound else "1"
        pad = math.prod(self.mesh.tp if factor == "tp" else int(factor) for factor in unit.split("*"))
        if self.mesh.weights and "tp" in unit:
            pad = 1
        return Rule(axis in table.replicate, pad, axis in table.uneven, self.units.get(axis, 1))

    def _note(self, axis: str, at: Coordinate, rule: Rule) -> None:
        size = self.model.sizes[axis]
        if rule.replicate and size < at.count:
            self.repeats[axis] = at.count // size
        padded = -(-size // rule.pad) * rule.pad
        if padded > size and not (rule.replicate and size < at.count):
            self.padding[axis] = (size, padded)

    def _blocks(
        self, axis: str, block: tuple[tuple[str, ...], int], family: Sequence[str], row: Row, rank: int
    ) -> Range:
        """A cut of block-quantised weights must fall on block borders; it is contiguous, because whole outer axes are
        cut first.
        """
        base, unit = block
        ranges = self._ranges(base, (*family, *base), row, rank)
        low, extent, total = 0, 1, 1
        for name in base:
            start, stop = ranges[name]
            size = self.model.sizes[name]
            if extent > 1 and (start, stop) != (0, size):
                raise ReshardError(f"axis {axis}: cut twice, blocks of {unit} would be split")
            low, extent, total = low * size + start, extent * (stop - start), total * size
        high = low + extent
        if low % unit or (high % unit and high != total):
            raise ReshardError(f"axis {axis}: {total} cut at {low} and {high}, which splits a block of {unit}")
        return low // unit, -(-high // unit)

    def unused(self) -> None:
        """A mesh axis that cuts nothing is refused."""
        for mesh_axis in ("tp", "pp", "ep"):
            if getattr(self.mesh, mesh_axis) > 1 and mesh_axis not in self.used and not self.problems:
                self.problems.add(
                    f"--{mesh_axis} {getattr(self.mesh, mesh_axis)} cuts nothing of this model in format "
                    f'"{self.table.name}"'
                )
