"""Sizes of axes: every dimension of every stored tensor is an equation. The unknown ones are solved, then all are
checked.

Knows nothing about what the axes mean.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import Problems
from ..tables.families import Family
from ..tables.notation import block_of
from ..tables.row import Row

Points = Mapping[tuple[int, ...], str]  # numbers of the placeholders → stored name


class Shaped(Protocol):
    """What solving needs of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def solve(
    table: Family, stored: Mapping[str, Shaped], sizes: dict[str, int], points: Mapping[int, Points], problems: Problems
) -> None:
    """Sizes of all axes: from config, the rest from the shapes; then every equation is checked."""
    equations: list[tuple[Any, int, str]] = []  # (dimension of a pattern, its stored size, what it is)
    for at, names in points.items():
        row = table.rows[at]
        shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in names.values():
            shapes[stored[name].shape].append(name)
        usual = max(shapes, key=lambda shape: len(shapes[shape])) if shapes else ()
        for shape, examples in shapes.items():
            if shape != usual:
                problems.add(f"{dotted(row)}: shape {list(shape)} here, {list(usual)} elsewhere", examples[0])
        if len(usual) != len(row.pattern.dims):
            if shapes:
                problems.add(
                    f"{dotted(row)}: {len(usual)} dimensions {list(usual)}, the table says {len(row.pattern.dims)}"
                )
            continue
        equations += [
            (dim, size, f"{dotted(row)}: dimension {d} is {size}, {_words(dim)}")
            for d, (dim, size) in enumerate(zip(row.pattern.dims, usual, strict=True))
        ]
    known = dict(sizes)
    for axis, atoms in table.axes.items():
        if axis in sizes:
            equations.append((atoms, sizes[axis], f"config.json: {axis} is {sizes[axis]}, {_words(atoms)}"))
    pending = equations
    while pending:
        later = []
        for dim, size, words in pending:
            paths = [_compounded(path, table.axes, known) for path in _paths(dim)]
            unknown = {axis for path in paths for axis in path} - known.keys()
            if len(unknown) > 1 or (unknown and any(block_of(axis) for path in paths for axis in path)):
                later.append((dim, size, words))
            elif unknown:
                (axis,) = unknown
                one, two = (sum(math.prod(({**known, axis: x})[a] for a in path) for path in paths) for x in (1, 2))
                fit, rest = divmod(size - 2 * one + two, two - one) if two != one else (0, 1)
                if rest or fit < 0:
                    problems.add(f"{words}: no size of {axis} fits", _given(dim, known))
                else:
                    known[axis] = fit
        if len(later) == len(pending) and not _in_whole_blocks(later, table, known):
            break
        pending = later
    for dim, size, words in equations:
        axes = axes_of(dim)
        if all(axis in known for axis in axes) and extent(dim, known) != size:
            problems.add(f"{words} = {extent(dim, known)}", _given(dim, known))
        for axis in axes:
            if axis not in known and not problems:
                problems.add(f"the size of axis {axis} follows from no shape and no config key ({words})")
    sizes.update(known)
    for axis, atoms in table.axes.items():
        if all(atom in known for atom in atoms):
            sizes[axis] = math.prod(known[atom] for atom in atoms)


def _in_whole_blocks(equations: Sequence[tuple[Any, int, str]], table: Family, known: dict[str, int]) -> bool:
    """Whether one more size follows if a dimension that counts blocks counts full ones; the equations are checked in
    the end.
    """
    for dim, size, _ in equations:
        paths = _paths(dim)
        blocks = [block for path in paths for axis in path if (block := block_of(axis))]
        bases = [base for axis in paths[0] for base in (block_of(axis) or ((axis,), 1))[0]]
        path = _compounded(tuple(bases), table.axes, known)
        unknown = [axis for axis in path if axis not in known]
        rest = math.prod(known[axis] for axis in path if axis in known)
        whole, left = divmod(size * math.prod(unit for _, unit in blocks), rest or 1)
        if len(paths) == 1 and blocks and len(unknown) == 1 and whole and not left:
            known[unknown[0]] = whole
            return True
    return False


def _paths(nodes: Sequence[Any]) -> list[tuple[str, ...]]:
    """A dimension as a sum of products: one tuple of axes per term."""
    paths: list[tuple[str, ...]] = [()]
    for node in nodes:
        ends = [(node,)] if isinstance(node, str) else [path for term in node.terms for path in _paths(term)]
        paths = [(*path, *end) for path in paths for end in ends]
    return paths


def _compounded(
    path: tuple[str, ...], compounds: Mapping[str, tuple[str, ...]], known: Mapping[str, int]
) -> tuple[str, ...]:
    """Atoms among others replaced by their compound where only the compound's size is known: kv × group is heads."""
    for name, atoms in compounds.items():
        if name in known and set(atoms) < set(path) and not set(atoms) <= known.keys():
            path = (name, *(axis for axis in path if axis not in atoms))
    return path


def axes_of(product_: Sequence[Any]) -> set[str]:
    """The axes of one dimension of a pattern; of those that count blocks, the axes counted."""
    axes: set[str] = set()
    for node in product_:
        if isinstance(node, str):
            block = block_of(node)
            axes.update(block[0] if block else (node,))
        else:
            axes.update(axis for term in node.terms for axis in axes_of(term))
    return axes


def axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    """Elements along an axis; along a derived axis, blocks (the last may be short)."""
    block = block_of(axis)
    return sizes[axis] if block is None else -(-math.prod(sizes[base] for base in block[0]) // block[1])


def extent(product_: Sequence[Any], sizes: Mapping[str, int]) -> int:
    """Elements along one dimension of a pattern."""
    return math.prod(
        axis_size(node, sizes) if isinstance(node, str) else sum(extent(term, sizes) for term in node.terms)
        for node in product_
    )


def _words(product_: Sequence[Any]) -> str:
    def word(node: Any) -> str:
        if not isinstance(node, str):
            return "(" + " + ".join(map(_words, node.terms)) + ")"
        return f"({node})" if " " in node else node

    return " × ".join(map(word, product_)) or "1"


def _given(product_: Sequence[Any], known: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} = {known[axis]}" for axis in sorted(axes_of(product_)) if axis in known)


def dotted(row: Row) -> str:
    return row.name.text.lstrip("~")
