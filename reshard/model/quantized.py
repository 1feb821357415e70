"""A quantisation scheme laid over a family: which matrices of a checkpoint are stored as which tensors.

The stored names say it, matrix by matrix and layer by layer, and the shapes say in which units; config.json is checked
against them. Out comes a table like the family's own, with the rows of the scheme in place of those of the matrices, so
that everything after it sees ordinary rows.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ..containers.dtypes import BITS, wide
from ..errors import ReshardError
from ..tables import families, formats, schemes
from ..tables.config import Config
from ..tables.families import Family
from ..tables.notation import Pattern, Product, fold, parse_pattern, parse_template, varied
from ..tables.row import Row
from ..tables.schemes import GROUPS, Part, Scheme
from ..text.units import runs
from .matrices import PLAIN, Found, Matrices, Matrix
from .naming import settle


def quantized(table: Family, config: Config, stored: Mapping[str, Any], where: str) -> Family:
    """The family as this checkpoint quantises it; the same where it does not, or where the table has rows for it.

    Raises ReshardError for a scheme that is not known, by its name, and for every matrix whose tensors do not fit one
    another or what config.json says of them.
    """
    said = config.quantization
    if said is None or table.scheme or _listed(table, said):
        return table
    scheme = schemes.scheme_of(said)
    if scheme is None:
        raise _unknown(said)
    return _laid_over(table, scheme, said, config, stored, where)


def plain_names(config: Config, stored: Mapping[str, Any]) -> set[str]:
    """The names that a checkpoint's tensors would have if nothing were quantised."""
    said = config.quantization
    scheme = schemes.scheme_of(said) if said is not None else None
    if said is None or scheme is None:
        return set(stored)
    suffixes = sorted({suffix for layout in scheme.layouts for suffix in layout.suffixes}, key=len, reverse=True)
    found = set()
    for name in stored:
        suffix = next((each for each in suffixes if name.endswith(each)), "")
        found.add(name.removesuffix(suffix) + (PLAIN if suffix.startswith(".") else ""))
    return found


class Derived(NamedTuple):
    """A tensor whose value follows from its matrix. `rule`: "out in", "in // group", or "" for one that says more."""

    name: str
    rule: str
    matrix: Found
    group: int


def derived(table: Family, config: Config, stored: Mapping[str, Any]) -> Iterator[Derived]:
    """The tensors of a quantised checkpoint that stand aside, and what they have to say."""
    said = config.quantization
    if said is None or not table.scheme:
        return
    matrices = Matrices(schemes.load(table.scheme), said, stored, table.towers)
    for name, found in matrices.found.items():
        for suffix in found.matrix.aside:
            rule = matrices.scheme.layouts[found.matrix.layout].aside[suffix]
            group = matrices.claims[found.matrix.claim][1].get("group", 0)
            yield Derived(name.removesuffix(PLAIN) + suffix, rule, found, group)


def _listed(table: Family, said: Mapping[str, Any]) -> bool:
    return any(all(said.get(key) == value for key, value in known.items()) for known in table.quantization)


def _shown(said: Mapping[str, Any]) -> str:
    """The method of a quantization_config, and what says most of it."""
    nameless = "mlx" if {"bits", "group_size"} <= said.keys() else "unnamed"  # as MLX writes it
    method = said.get("quant_method") or said.get("quant_algo") or nameless
    keys = ("bits", "group_size", "weight_block_size", "format", "load_in_4bit")
    details = ", ".join(f"{key} {said[key]}" for key in keys if said.get(key))
    return f'"{method}" ({details})' if details else f'"{method}"'


def _unknown(said: Mapping[str, Any]) -> ReshardError:
    known = sorted(schemes.load(name).methods[0] for name in schemes.shipped())
    return ReshardError(
        f"config.json: quantization_config of method {_shown(said)} is not supported",
        f"supported: unquantized, {', '.join(known)}; docs/extend/scheme.md shows what a table for another takes",
    )


def _laid_over(
    table: Family, scheme: Scheme, said: Mapping[str, Any], config: Config, stored: Mapping[str, Any], where: str
) -> Family:
    """The table with the scheme's rows."""
    matrices = Matrices(scheme, said, stored, table.towers)
    plain, problems = matrices.plain(), matrices.problems
    config = config.with_defaults(table.defaults)
    sizes = {axis: size for axis, text in table.sizes.items() if (size := config.size(text)) is not None}
    rows = list(zip(table.written.get("rows", ()), table.rows, settle(table, plain, sizes).rows, strict=False))
    next_to = tuple(part.suffix.lstrip("^") for each in scheme.beside for part in each.parts)
    if not matrices.found and not problems and not any(name.endswith(next_to) for name in stored):
        raise ReshardError(
            f"{where}: config.json: quantization_config of method {_shown(said)}, no tensor is stored so",
            "were the weights dequantised? then take it out of config.json",
        )
    at = defaultdict(list)
    for number, (_, _, row) in enumerate(rows):
        at[row.name.folded].append(number)
    held: dict[int, dict[int, Matrix | None]] = defaultdict(dict)  # row → layer → how its matrices are stored there
    for name in plain:
        found = matrices.found.get(name)
        matrix = found.matrix if found else None
        for number in _claiming(name, rows, at):
            row = rows[number][2]
            if found and len(row.pattern.dims) < 2:
                problems.add(f"{row.name.folded} is no matrix and has {_names(found.matrix)}", name)
                continue
            if held[number].setdefault(_layer(row, name), matrix) != matrix:
                problems.add(f"{row.name.text}: stored in several ways in one layer", name)
            if matrix is None and len(row.pattern.dims) > 1 and _coded(name, stored[name].dtype):
                scales = ", ".join(sorted(scheme.telling))
                problems.add(f"{row.name.folded} is {stored[name].dtype} and has none of {scales}", name)
    problems.raise_if_any(
        f"{where}: not stored as {scheme.name} has it:",
        "tensors of one matrix and config.json contradict one another: download both again",
    )
    written = _Written(table, scheme, stored, where, rows, held)
    for number in range(len(rows)):
        written.row(number)
    return written.table()


def _names(matrix: Matrix) -> str:
    return ", ".join(part.suffix for part, _ in matrix.parts if part.name)


def _coded(name: str, dtype: str) -> bool:
    """Whether a dtype is of codes that stand for numbers; larger integers under other names are tables."""
    return BITS[dtype] <= 8 or (not wide(dtype) and name.endswith(PLAIN))


def _claiming(name: str, rows: Sequence[tuple[Any, Row, Row]], at: Mapping[str, Sequence[int]]) -> Iterator[int]:
    """The rows of a name."""
    key, numbers = fold(name)
    for number in at.get(name, at.get(key, ())):
        if rows[number][2].name.numbers(() if name in at else numbers) is not None:
            yield number


def _layer(row: Row, name: str) -> int:
    """The layer of a stored name; of a row without layers, -1."""
    numbers = row.name.numbers(fold(name)[1])
    return numbers[row.name.axes.index("layer")] if numbers and "layer" in row.name.axes else -1


# --- rows -------------------------------------------------------------------------------------------------------------


class _Written:
    """The table that says in rows what was found."""

    def __init__(
        self,
        family: Family,
        scheme: Scheme,
        stored: Mapping[str, Any],
        where: str,
        rows: Sequence[tuple[Sequence[str], Row, Row]],
        held: Mapping[int, Mapping[int, Matrix | None]],
    ) -> None:
        self.family, self.scheme, self.tensors, self.where = family, scheme, stored, where
        self.rows, self.held = rows, held
        self.entries: list[list[str]] = []
        self.gone: dict[str, None] = {}
        self.sizes: dict[str, str] = {}
        self.aside: dict[str, None] = {}
        self.taken = {row.name.folded for _, _, row in rows}
        self.stored = defaultdict(list)  # name, folded → stored names
        for name in stored:
            self.stored[fold(name)[0]].append(name)
        self.touched = {rows[at][0][0] for at, layers in held.items() if any(layers.values())}

    def row(self, at: int) -> None:
        """Note what one row of the family becomes."""
        entry, _, row = self.rows[at]
        layers = self.held.get(at, {})
        for beside in self.scheme.beside:
            leaf = next((leaf for leaf in row.leaves if leaf.partition("@")[0] == beside.of), None)
            for part in beside.parts if leaf is not None and layers else ():
                self._beside(str(leaf), part, row, entry[3:], layers.keys())
        if entry[0] not in self.touched:
            return
        self.gone[entry[0]] = None
        if not any(layers.values()):
            self.entries.append(list(entry))
            return
        found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        forms: dict[str, list[str]] = defaultdict(list)  # part → its patterns, the most general first
        laid = {matrix: list(self._laid(row, matrix)) for matrix in dict.fromkeys(layers.values()) if matrix}
        for layer, matrix in sorted(layers.items(), key=lambda item: (item[1].claim if item[1] else -1, item[0])):
            if matrix is None:
                found[row.name.text, row.pattern.text, " ".join(row.leaves)].add(layer)
                continue
            for name, kind, pattern in laid[matrix]:
                if pattern.text not in forms[kind]:
                    forms[kind].append(pattern.text)
                number = forms[kind].index(pattern.text)
                leaves = row.leaves if len(pattern.axes) == len(row.leaves) else row.leaves[:1]
                named = " ".join(_part_of(leaf, kind, f"form{number + 1}" if number else "") for leaf in leaves)
                found[name, pattern.text, named].add(layer)
        for (name, text, named), numbers in found.items():
            self.entries.append(_worded([name, text, named, *entry[3:]], numbers, layers.keys()))

    def _laid(self, row: Row, matrix: Matrix) -> Iterator[tuple[str, str, Pattern]]:
        """The tensors of a matrix: name, part and pattern of each."""
        stem = row.name.text.removesuffix(PLAIN)
        *lead, first, second = row.pattern.dims
        out, inner = (second, first) if turned(row) else (first, second)
        names = "_".join(axis.replace("@", "_") for axis in dict.fromkeys(_atoms(inner)))
        for part, pattern in matrix.parts:
            name = stem + part.suffix
            if name != row.name.text and parse_template(name).folded in self.taken:
                continue  # a row of the family's own
            products: dict[str, Product] = {"out": out, "in": inner}
            for axis in {str(node) for dim in pattern.dims for node in dim if str(node).startswith(GROUPS)}:
                products[axis] = (f"{axis}_{names}",)
            try:
                laid = pattern.replaced(products)
            except ReshardError as error:
                raise ReshardError(f"{self.where}: {name}: {error.message}", error.hint) from None
            yield name, part.name, parse_pattern(Pattern((*lead, *laid.dims), ()).text, {})
        self.sizes |= {axis: str(size) for axis, size in matrix.sizes}
        self.aside |= dict.fromkeys(stem + suffix for suffix in matrix.aside)

    def _beside(self, leaf: str, part: Part, row: Row, words: Sequence[str], every: Collection[int]) -> None:
        """A tensor next to a matrix, if there is one."""
        stem = row.name.text.removesuffix(PLAIN)
        start = stem.rpartition(".")[0] if part.suffix.startswith("^") else stem
        name = start + part.suffix.lstrip("^")
        key = parse_template(name).folded
        stored = self.stored.get(key, ())
        if key in self.taken or not stored or any(entry[0] == name for entry in self.entries):
            return
        shape = self.tensors[stored[0]].shape
        for pattern, _ in part.forms({}):
            if len(pattern.dims) == len(shape) and (prod(shape) == 1) == (not any(pattern.dims)):
                text = pattern.replaced({"out": row.pattern.dims[0]}).text
                layers = {_layer(row, each) for each in stored}
                self.entries.append(_worded([name, text, _part_of(leaf, part.name, ""), *words], layers, every))
                return

    def table(self) -> Family:
        """The family's table with these rows in place of its own."""
        table, scheme = self.family, self.scheme
        lists: dict[str, list[Any]] = {"without": list(self.gone), "rows": self.entries, "aside": list(self.aside)}
        own = {"name": f"{table.name}.{scheme.name}", "scheme": scheme.name, **lists, "sizes": self.sizes}
        text = [f"name = {json.dumps(own['name'])}", f'like = "{table.name}"', f'scheme = "{scheme.name}"']
        for key, values in lists.items():
            text += [f"{key} = [", *(f" {json.dumps(value)}," for value in values), "]"]
        text += ["[sizes]", *(f'{axis} = "{size}"' for axis, size in self.sizes.items())]
        return families.of_chain(table.chain.on(own, "\n".join(text) + "\n"))


def _worded(entry: Sequence[str], layers: Collection[int], every: Collection[int]) -> list[str]:
    """A row for these layers; it says which where they are not all that have the matrix."""
    if set(layers) == set(every) or -1 in layers:
        return list(entry)
    only = ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs(sorted(layers)))
    return [*entry[:3], " ".join([*entry[3:], f"layers={only}"])]


def _part_of(leaf: str, part: str, label: str) -> str:
    """The logical tensor of a part of a matrix: attn.q and scale → attn.q_scale."""
    base, _, variant = leaf.partition("@")
    return varied(f"{base}_{part}" if part else base, "_".join(filter(None, (variant, label))))


def _atoms(product: Product) -> Iterator[str]:
    for node in product:
        if isinstance(node, str):
            yield node
        else:
            for term in node.terms:
                yield from _atoms(term)


def turned(row: Row) -> bool:
    """Whether a family stores a matrix as (in, out): native stores every one as (out, in)."""
    leaf = row.leaves[0].partition("@")[0]
    for other in formats.load("native").rows:
        if leaf in other.leaves and len(other.pattern.dims) >= 2:
            place = other.leaves.index(leaf)
            inner = set(other.pattern.axes[place]) & set(_atoms(other.pattern.dims[-1]))
            first = set(_atoms(row.pattern.dims[-2]))
            last = set(_atoms(row.pattern.dims[-1]))
            return bool(inner) and inner <= first and not inner <= last
    return False
