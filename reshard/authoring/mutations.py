"""Mutations of a table: each row and axis exchanged, transposed, shifted, renamed or dropped, one at a time."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables.families import Family
from ..tables.notation import Product, Sum, block_of, parse_pattern
from ..tables.row import Row

Data = dict[str, Any]  # a table as TOML has it, `like` resolved


@dataclass(frozen=True)
class Mutation:
    """A mutation, in words: the table as TOML has it, or an axis of a logical tensor (of a row's name: "") shifted by
    one.

    `rows`: those that it touches.
    """

    name: str
    rows: tuple[int, ...]
    data: Data | None = field(default=None, hash=False)
    shift: tuple[str, str] | None = None


def mutations(table: Family) -> Iterator[Mutation]:
    """Every mutation of every row and axis, each once."""
    data = table.written
    seen = {identity(data)}
    for mutation in itertools.chain(_rows(data), _patterns(table, data), _axes(table, data), _shifts(table, data)):
        if mutation.data is not None:
            if (one := identity(mutation.data)) in seen:
                continue
            seen.add(one)
        yield mutation


def identity(data: Data) -> str:
    """What a table says, whatever else it holds: mutations that say the same are one."""
    return json.dumps([data.get(key) for key in ("rows", "sizes", "axes")])


def _changed(data: Data, **rows: list[str] | None) -> Data:
    """The same data with other rows, by number: `_3=[…]`; None drops one."""
    new = {int(number[1:]): row for number, row in rows.items()}
    kept = [new.get(at, row) for at, row in enumerate(data["rows"])]
    return data | {"rows": [row for row in kept if row is not None]}


def _at(at: int) -> str:
    return f"_{at}"


def _names(data: Data) -> tuple[list[str], list[list[str]]]:
    """What to call each row, and each of its leaves: by the stored name, too, where a logical tensor stands in several
    rows.
    """
    count = Counter(leaf for row in data["rows"] for leaf in row[2].split())
    leaves = [
        [leaf if count[leaf] == 1 else f"{leaf} ({row[0].lstrip('~')})" for leaf in row[2].split()]
        for row in data["rows"]
    ]
    return ["+".join(names) for names in leaves], leaves


def _rows(data: Data) -> Iterator[Mutation]:
    rows: list[list[str]] = data["rows"]
    called, named = _names(data)
    everything = tuple(range(len(rows)))
    yield Mutation("rows in the opposite order", everything, data | {"rows": rows[::-1]})
    for at in everything:
        yield Mutation(f"row {called[at]} dropped", (at,), _changed(data, **{_at(at): None}))
    leaves = [(at, n, leaf) for at, row in enumerate(rows) for n, leaf in enumerate(row[2].split())]
    for (at, n, one), (to, m, other) in itertools.combinations(leaves, 2):
        if one == other:
            continue
        texts = {at: rows[at][2].split(), to: rows[to][2].split()}
        texts[at][n], texts[to][m] = other, one
        new = {_at(row): [*rows[row][:2], " ".join(names), *rows[row][3:]] for row, names in texts.items()}
        one, other = named[at][n], named[to][m]
        words = (
            f"leaves {one} and {other} of {called[at]} exchanged" if at == to else f"rows {one} and {other} exchanged"
        )
        yield Mutation(words, tuple({at, to}), _changed(data, **new))
    for at, to in itertools.combinations(everything, 2):
        new = {_at(at): [rows[at][0], *rows[to][1:]], _at(to): [rows[to][0], *rows[at][1:]]}
        words = f"stored names of {called[at]} and {called[to]} exchanged"
        yield Mutation(words, (at, to), _changed(data, **new))
    for at, row in enumerate(rows):
        names = row[2].split()
        if len(names) > 1:
            for words, order in (("reversed", names[::-1]), ("shifted by one", [*names[1:], names[0]])):
                new = {_at(at): [*row[:2], " ".join(order), *row[3:]]}
                yield Mutation(f"leaves of fused row {called[at]} {words}", (at,), _changed(data, **new))
        for hole in re.findall(r"\.?\{[a-z_0-9:]+\}", row[0]):
            new = {_at(at): [row[0].replace(hole, "", 1), *row[1:]]}
            yield Mutation(f"placeholder {hole.lstrip('.')} of {called[at]} dropped", (at,), _changed(data, **new))
        holes = re.findall(r"\{[a-z_0-9:]+\}", row[0])
        for one, other in itertools.combinations(holes, 2):
            text = row[0].replace(one, "\0").replace(other, one).replace("\0", other)
            words = f"placeholders {one} and {other} of {called[at]} exchanged"
            yield Mutation(words, (at,), _changed(data, **{_at(at): [text, *row[1:]]}))


def _patterns(table: Family, data: Data) -> Iterator[Mutation]:
    """Within one pattern: dimensions and factors exchanged, terms of a sum exchanged, an axis dropped or called by
    another's name.
    """
    every = sorted(
        {axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)} | {"layer"}
    )
    patterns = [
        (at, row, called, row[1].split(" | "), n)
        for at, (row, called) in enumerate(zip(data["rows"], _names(data)[0], strict=True))
        for n in range(len(row[1].split(" | ")))
    ]
    for at, row, called, layouts, layout in patterns:
        dims = parse_pattern(layouts[layout], table.axes).dims
        called += f", {layouts[layout]}," if len(layouts) > 1 else ""

        def with_(
            dims: tuple[Product, ...],
            names: str | None = None,
            at: int = at,
            row: list[str] = row,
            others: tuple[list[str], list[str]] = (layouts[:layout], layouts[layout + 1 :]),
        ) -> Data:
            text = " | ".join((*others[0], _text(dims), *others[1]))
            return _changed(data, **{_at(at): [row[0], text, names or row[2], *row[3:]]})

        for n in range(len(dims) - 1):
            words = f"pattern of {called} transposed" + (f", dimensions {n} and {n + 1}" if len(dims) > 2 else "")
            yield Mutation(words, (at,), with_((*dims[:n], dims[n + 1], dims[n], *dims[n + 2 :])))
        for d, dim in enumerate(dims):

            def in_dim(product: Product, d: int = d, dims: tuple[Product, ...] = dims) -> tuple[Product, ...]:
                return (*dims[:d], product, *dims[d + 1 :])

            for words, product, names in _mutated(dim, row[2].split(), every):
                yield Mutation(f"{words} in the pattern of {called}", (at,), with_(in_dim(product), names))


def _mutated(product: Product, leaves: Sequence[str], axes: Sequence[str]) -> Iterator[tuple[str, Product, str | None]]:
    """A product mutated in one place: in words, what it becomes, and other leaves where they go along."""
    for n in range(len(product) - 1):
        one, other = product[n], product[n + 1]
        yield f"{_word(one)} and {_word(other)} exchanged", (*product[:n], other, one, *product[n + 2 :]), None
    for n, node in enumerate(product):
        before, after = product[:n], product[n + 1 :]
        if isinstance(node, str):
            yield f"axis {node} dropped", (*before, *after), None
            for other in axes:
                if other != node:
                    yield f"axis {node} called {other}", (*before, other, *after), None
            continue
        counts = [_leaves(term) for term in node.terms]
        starts = [sum(counts[:t]) for t in range(len(counts) + 1)]
        for t in range(len(node.terms) - 1):
            terms = (*node.terms[:t], node.terms[t + 1], node.terms[t], *node.terms[t + 2 :])
            a, b, c = starts[t : t + 3] if t + 2 < len(starts) else (*starts[t : t + 2], starts[-1])
            moved = " ".join((*leaves[:a], *leaves[b:c], *leaves[a:b], *leaves[c:]))
            yield f"terms {t} and {t + 1} exchanged", (*before, Sum(terms), *after), None
            if len(leaves) == starts[-1]:
                yield f"terms {t} and {t + 1} exchanged, with their leaves,", (*before, Sum(terms), *after), moved
        for t, term in enumerate(node.terms):
            own = leaves[starts[t] : starts[t + 1]] if len(leaves) == starts[-1] else ()
            for words, product_, _ in _mutated(term, own, axes):
                terms = (*node.terms[:t], product_, *node.terms[t + 1 :])
                yield f"{words} (term {t})", (*before, Sum(terms), *after), None


def _leaves(product: Product) -> int:
    return sum(_leaves(term) for node in product if isinstance(node, Sum) for term in node.terms) or 1


def _word(node: "str | Sum") -> str:
    if isinstance(node, Sum):
        return "(" + " + ".join(" ".join(map(_word, term)) or "1" for term in node.terms) + ")"
    base, slash, unit = node.partition("/")
    return f"({base})/{unit}" if slash and " " in base else node


def _text(dims: Iterable[Product]) -> str:
    """A pattern as text, compounds written out."""
    products = [" ".join(map(_word, dim)) or "1" for dim in dims]
    whole = [text if len(dim) <= 1 else f"({text})" for text, dim in zip(products, dims, strict=True)]
    return " ".join(whole)


def _axes(table: Family, data: Data) -> Iterator[Mutation]:
    """Sizes exchanged, shifted and dropped; compounds reversed and dropped."""
    sizes, compounds = data.get("sizes", {}), data.get("axes", {})

    def using(*axes: str) -> tuple[int, ...]:
        wanted = {atom for axis in axes for atom in (axis, *table.axes.get(axis, ()))}

        def bases(row: Row) -> set[str]:
            found = {axis for path in row.pattern.axes for axis in (*row.name.axes, *path)}
            return found | {base for axis in found if (block := block_of(axis)) for base in block[0]}

        return tuple(at for at, row in enumerate(table.rows) if wanted & bases(row))

    for axis, keys in sizes.items():
        rest = {name: text for name, text in sizes.items() if name != axis}
        yield Mutation(f"size of axis {axis} dropped", using(axis), data | {"sizes": rest})
        more = " | ".join(f"{text.strip()} + 1" for text in keys.split("|"))
        yield Mutation(f"size of axis {axis} shifted by one", using(axis), data | {"sizes": {**sizes, axis: more}})
    for one, other in itertools.combinations(sizes, 2):
        new = {**sizes, one: sizes[other], other: sizes[one]}
        yield Mutation(f"sizes of axes {one} and {other} exchanged", using(one, other), data | {"sizes": new})
    for axis, parts in compounds.items():
        rest = {name: text for name, text in compounds.items() if name != axis}
        yield Mutation(f"compound axis {axis} dropped", using(axis), data | {"axes": rest})
        for one, other in itertools.pairwise(parts.split()):
            text = " ".join({one: other, other: one}.get(part, part) for part in parts.split())
            yield Mutation(
                f"parts {one} and {other} of axis {axis} exchanged",
                using(axis),
                data | {"axes": {**compounds, axis: text}},
            )


def _shifts(table: Family, data: Data) -> Iterator[Mutation]:
    """Every axis of every logical tensor displaced by one, around: no table can say so, but code that reads one can do
    it.
    """
    done = set()
    called, _ = _names(data)
    for at, row in enumerate(table.rows):
        for axis in row.name.axes:
            yield Mutation(f"axis {axis} in the name of {called[at]} shifted by one", (at,), shift=("", axis))
        for leaf, path in zip(row.leaves, row.pattern.axes, strict=True):
            for axis in path:
                if (leaf, axis) not in done:
                    done.add((leaf, axis))
                    rows = (at, *(n for n, other in enumerate(table.rows) if n != at and leaf in other.leaves))
                    yield Mutation(f"axis {axis} of {leaf} shifted by one", rows, shift=(leaf, axis))
