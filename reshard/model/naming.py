"""How one checkpoint spells what its family table says: which of several names, which prefix, where extra layers are
counted from, and which other components stand next to the language model. Out comes the same table with nothing left
open. Knows nothing of sizes or files.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Protocol

from ..tables.families import Family
from ..tables.notation import Pattern, Template, fold
from ..tables.row import Row
from .sizes import axes_of, extent


class Shaped(Protocol):
    """What this module needs of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def settle(table: Family, stored: Mapping[str, Shaped], sizes: Mapping[str, int]) -> Family:
    """The table as this checkpoint spells it. `sizes`: what config.json says of axes.

    Of alternative names, and of prefixes, the first that occurs counts, and the first where none does; of alternative
    patterns the only one that the shapes fit, and the first where none or several do. Numbers of `{layer:extra}` count
    from the main layers on, which are as many as `sizes` says, or as there are; a number that counts a compound is
    divided by the sizes of its parts. Every tensor below a component's name that no row claims gets a row of its own.
    """
    open_names = table.prefixes or any(row.others for row in table.rows)
    kinds = {kind for name in stored for kind in (name, fold(name)[0])} if open_names else set()
    prefix = next(
        (
            p
            for p in table.prefixes
            if any(p + row.name.folded[1:] in kinds for row in table.rows if row.name.text[0] == "~")
        ),
        table.prefixes[0] if table.prefixes else "",
    )
    rows = [_spelled(row, kinds, prefix) for row in table.rows]
    if any(row.layouts for row in rows):
        shapes = {fold(name)[0]: each.shape for name, each in stored.items()}
        rows = [row._replace(pattern=_laid_out(row, shapes.get(row.name.folded), sizes), layouts=()) for row in rows]
    if any(row.name.extra for row in rows):
        counted = sizes["layer"] if "layer" in sizes else _layers(rows, stored)
        rows = [row._replace(name=row.name._replace(base=counted)) if row.name.extra else row for row in rows]
    rows = [
        row._replace(name=row.name._replace(sizes=_sizes(row.name, sizes))) if row.name.compounds else row
        for row in rows
    ]
    aside = tuple(_prefixed(template, prefix) for template in table.aside)
    settled = replace(table, rows=tuple(rows), aside=aside, prefixes=())
    return (
        replace(settled, rows=(*rows, *tower_rows(table.towers, stored, settled.claimed())))
        if table.towers
        else settled
    )


def _spelled(row: Row, kinds: Collection[str], prefix: str) -> Row:
    names = [_prefixed(name, prefix) for name in (row.name, *row.others)]
    return row._replace(name=next((name for name in names if name.folded in kinds), names[0]), others=())


def _laid_out(row: Row, shape: tuple[int, ...] | None, sizes: Mapping[str, int]) -> Pattern:
    """The pattern that the shape fits, as far as sizes are known."""
    fits = [pattern for pattern in (row.pattern, *row.layouts) if shape is not None and _fits(pattern, shape, sizes)]
    return fits[0] if len(fits) == 1 else row.pattern


def _fits(pattern: Pattern, shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    known = [axes_of(dim) <= sizes.keys() for dim in pattern.dims]
    return len(shape) == len(pattern.dims) and all(
        extent(dim, sizes) == size for dim, size, sure in zip(pattern.dims, shape, known, strict=True) if sure
    )


def _prefixed(template: Template, prefix: str) -> Template:
    if not template.text.startswith("~"):
        return template
    form = prefix.replace("{", "{{").replace("}", "}}") + template.form[1:]
    return template._replace(text=prefix + template.text[1:], form=form)


def _sizes(name: Template, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Of the axes in a name, one for each: what is not said of the parts of a compound follows from the compound.
    () if nothing does.
    """
    known = dict(sizes)
    for whole, parts in name.compounds:
        unknown = [part for part in parts[1:] if part not in known]
        rest = prod(known[part] for part in parts if part in known)
        if len(unknown) == 1 and parts[0] in known and whole in known and rest:
            known[unknown[0]] = known[whole] // rest
        elif unknown:
            return ()
    return tuple(known.get(axis, 1) for axis in name.axes)


def _layers(rows: Iterable[Row], stored: Iterable[str]) -> int:
    """As many as the highest number of a layer that is not extra."""
    names = {row.name.folded: row.name for row in rows if "layer" in row.name.axes and not row.name.extra}
    found = [
        (names[kind], numbers)
        for kind, holes in map(fold, stored)
        if kind in names and (numbers := names[kind].numbers(holes))
    ]
    return max((numbers[name.axes.index("layer")] for name, numbers in found), default=-1) + 1


def tower_rows(towers: Sequence[str], stored: Mapping[str, Shaped], known: Collection[str] = ()) -> list[Row]:
    """Rows for the tensors of other components; `known`: names, folded, that other rows claim."""
    beside: dict[str, dict[str, tuple[int, ...]]] = {tower: {} for tower in towers}
    depths = {1 + tower.count(".") for tower in towers}
    for name, each in stored.items():
        parts = name.split(".", max(depths, default=0))
        tower = next((start for depth in depths if (start := ".".join(parts[:depth])) in beside), None)
        if tower is not None and name not in known and fold(name)[0] not in known:
            beside[tower][name] = each.shape
    return [row for tower, shapes in beside.items() for row in _tower_rows(tower, shapes)]


def _tower_rows(tower: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    """One row for each regular set of tensors, with axes that are named for their sizes: nothing ever cuts them."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[tuple[int, ...], str]]] = defaultdict(list)
    for name, shape in shapes.items():
        kind, numbers = fold(name)
        groups[kind, shape].append((numbers, name))
    rows = []
    for (kind, shape), members in groups.items():
        counts = tuple(1 + max(column) for column in zip(*(numbers for numbers, _ in members), strict=True))
        alone = sum(other == kind for other, _ in groups) > 1 or prod(counts) != len(members) or not counts
        rows += [_tower_row(name, (), shape) for _, name in members] if alone else [_tower_row(kind, counts, shape)]
    return [row._replace(tower=tower) for row in rows]


def _tower_row(name: str, counts: tuple[int, ...], shape: tuple[int, ...]) -> Row:
    axes = [f"{chr(ord('a') + at)}{size}" for at, size in enumerate((*counts, *shape))]
    over, own = tuple(axes[: len(counts)]), tuple(axes[len(counts) :])
    form = name.replace("{}", "{{{}}}").format(*over) if over else name
    row = Row(
        Template(form, over, frozenset(), form),
        Pattern(tuple((axis,) for axis in own), (own,)),
        (name.replace("{}", "*"),),
    )
    return row._replace(stage="first", whole=True)
