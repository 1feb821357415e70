"""Checking a table by damaging it: every row and axis is exchanged, transposed, shifted, renamed or dropped, and something must notice.

    rows attn.k and attn.v exchanged            numerics: logits differ by 1.3, rounding is 4e-16
    row norm dropped                            opening: no row claims model.norm.weight

A wrong table that fits is consistent: what it converts, it merges back, so that `verify` finds nothing by digests, weights or files.
It is caught only where it does not fit a checkpoint, or where the model is run. Checkpoints are a given one, and random ones made up
from the table itself: no matrix square, no two axes of one size, unless the table forces it; one for each set of optional rows.

The table as it is, on one rank, is what a damaged one is compared with; a given checkpoint is also run by transformers, which says
whether the table itself is right.
"""

import itertools
import json
import math
import re
import tempfile
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import header, tables
from .checkpoint import Published, open_published
from .config import Config
from .dialect import settle
from .errors import ReshardError
from .join import plan
from .layout import Layout, Piece, lay_out
from .mesh import Mesh
from .model import Model
from .notation import Pattern, Product, Sum, block_of, evaluate, parse_pattern
from .progress import Progress, Silent
from .sizes import axis_size
from .source import Source, from_published
from .tables import Row, Table
from .verdict import WIDTH

Data = dict[str, Any]  # a table as TOML has it, `like` resolved

# By what a damage is caught, and what that means; in the order in which it is tried.
RUNGS = {
    "reading": "the table contradicts itself, and is not read",
    "opening": "it does not fit the checkpoint, which is not opened",
    "planning": "its tensors have other axes than the formats know",
    "numerics": "it fits, merges back bit by bit, and the model computes other logits",
    "beyond": "as numerics, but what differs is not looked at by verify --numerics",
}
EQUIVALENT, MISSED, OPEN = "equivalent", "NOT CAUGHT", "not climbed"

LARGEST = 50_000_000  # elements of a given checkpoint that is run, in float64, for every damage
MESHES = (Mesh(), Mesh(2), Mesh(3), Mesh(4), Mesh(8), Mesh(2, 2), Mesh(4, ep=2), Mesh(3, weights=(2, 1, 1)))
TIMES, FLOOR = 16.0, 1e-7  # × the rounding between one rank and two; × the largest logit
TRUE = 4.0  # × what transformers changes between float32 and float64: the bound of verify --numerics
PROMPTS, LENGTH = 2, 24
SHOWN = 40  # damages that are not caught, told one by one


# --- what was found ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One damage, in words, what caught it, and how."""

    name: str
    by: str
    words: str = ""
    checkpoint: str = ""


@dataclass(frozen=True)
class TableCheck:
    """What became of every damage. `rounding`: the largest difference that still counts as none; None where nothing was run."""

    family: str
    rows: int
    axes: int
    checkpoints: tuple[str, ...]
    trials: tuple[Trial, ...]
    uncovered: tuple[str, ...] = ()
    rounding: float | None = None
    itself: str = ""  # the given checkpoint by the table as it is, against transformers
    wrong: bool = False
    skipped: str | None = None  # why nothing was run

    @property
    def count(self) -> Counter[str]:
        return Counter(trial.by for trial in self.trials)

    @property
    def missed(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.by == MISSED)

    @property
    def ok(self) -> bool:
        """The table is not known to be wrong, nothing escaped, and every row stands in a checkpoint; what was not run does not count."""
        return not self.missed and not self.uncovered and not self.wrong

    @property
    def proven(self) -> bool:
        """Every damage was caught."""
        return self.ok and not self.count[OPEN]

    def lines(self, each: bool = False) -> list[str]:
        """What a person wants to know, the verdict first; with `each` every damage and what caught it."""
        count, wrong = self.count, len(self.trials) - self.count[EQUIVALENT]
        caught = sum(count[rung] for rung in RUNGS)
        share = "all" if caught == wrong else f"{caught} of {wrong}"
        found = [f"{self.family}: {share} caught: {wrong} damages of {self.rows} rows and {self.axes} axes"]
        found += _wrapped(self.itself, 2) if self.itself else []
        found += _wrapped(f"NOT CAUGHT: {len(self.missed)}", 2) if self.missed else []
        for trial in self.missed[:SHOWN]:
            found += _wrapped(f"{trial.name}: {trial.words}" if trial.words else trial.name, 4)
        found += [f"    … and {len(self.missed) - SHOWN} more"] if len(self.missed) > SHOWN else []
        for rung, what in RUNGS.items():
            words = what
            if rung == "numerics" and self.rounding is not None:
                words += f" (by more than {self.rounding:.1g})"
            found += _wrapped(f"{rung:<11} {count[rung]:>5}  {words}", 2, 21)
        found += _wrapped(f"{EQUIVALENT:<11} {count[EQUIVALENT]:>5}  the same layout in other words", 2, 21)
        if count[OPEN]:
            found += _wrapped(f"{OPEN:<11} {count[OPEN]:>5}  fits, and the model was not run: {self.skipped}", 2, 21)
        found += _wrapped("What fits passes integrity, weights and sha256: a wrong table merges back what it split.", 0)
        for name in self.uncovered:
            found += _wrapped(f"no checkpoint has the row {name}: bring one, --with PATH", 0)
        found += [line for name in self.checkpoints for line in _wrapped(f"checkpoint: {name}", 0, 2)]
        if each:
            for trial in self.trials:
                found += _wrapped(f"{trial.by:<11} {trial.name}{': ' + trial.words if trial.words else ''}", 0, 14)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "ok": self.ok,
            "proven": self.proven,
            "rows": self.rows,
            "axes": self.axes,
            "checkpoints": list(self.checkpoints),
            "uncovered": list(self.uncovered),
            "rounding": self.rounding,
            "itself": self.itself or None,
            "wrong": self.wrong,
            "skipped": self.skipped,
            "count": dict(self.count),
            "mutations": [
                {"name": trial.name, "by": trial.by, "words": trial.words, "checkpoint": trial.checkpoint} for trial in self.trials
            ],
        }


def _wrapped(text: str, indent: int, more: int | None = None) -> list[str]:
    first = " " * indent
    rest = " " * (indent + 2 if more is None else more)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


# --- damages -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A damage, in words: the table as TOML would have it, or an axis of a logical tensor (of a row's name: "") displaced by one.

    `rows`: those that it touches.
    """

    name: str
    rows: tuple[int, ...]
    data: Data | None = field(default=None, hash=False)
    shift: tuple[str, str] | None = None


def mutations(table: Table) -> Iterator[Mutation]:
    """Every damage of every row and axis, each once."""
    data = tables.written(table)
    seen = {_key(data)}
    for mutation in itertools.chain(_rows(data), _patterns(table, data), _axes(table, data), _shifts(table, data)):
        if mutation.data is not None:
            if (key := _key(mutation.data)) in seen:
                continue
            seen.add(key)
        yield mutation


def _key(data: Data) -> str:
    return json.dumps([data.get(key) for key in ("rows", "sizes", "axes")])


def _changed(data: Data, **rows: list[str] | None) -> Data:
    """The same data with other rows, by number: `_3=[…]`; None drops one."""
    new = {int(number[1:]): row for number, row in rows.items()}
    kept = [new.get(at, row) for at, row in enumerate(data["rows"])]
    return data | {"rows": [row for row in kept if row is not None]}


def _at(at: int) -> str:
    return f"_{at}"


def _names(data: Data) -> tuple[list[str], list[list[str]]]:
    """What to call each row, and each of its leaves: by the stored name, too, where a logical tensor stands in several rows."""
    count = Counter(leaf for row in data["rows"] for leaf in row[2].split())
    leaves = [[leaf if count[leaf] == 1 else f"{leaf} ({row[0].lstrip('~')})" for leaf in row[2].split()] for row in data["rows"]]
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
        words = f"leaves {one} and {other} of {called[at]} exchanged" if at == to else f"rows {one} and {other} exchanged"
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


def _patterns(table: Table, data: Data) -> Iterator[Mutation]:
    """Within one pattern: dimensions and factors exchanged, terms of a sum exchanged, an axis dropped or called by another's name."""
    every = sorted({axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)} | {"layer"})
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

            for words, product, names in _damaged(dim, row[2].split(), every):
                yield Mutation(f"{words} in the pattern of {called}", (at,), with_(in_dim(product), names))


def _damaged(product: Product, leaves: Sequence[str], axes: Sequence[str]) -> Iterator[tuple[str, Product, str | None]]:
    """A product damaged in one place: in words, what it becomes, and other leaves where they go along."""
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
            for words, product_, _ in _damaged(term, own, axes):
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


def _axes(table: Table, data: Data) -> Iterator[Mutation]:
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
            yield Mutation(f"parts {one} and {other} of axis {axis} exchanged", using(axis), data | {"axes": {**compounds, axis: text}})


def _shifts(table: Table, data: Data) -> Iterator[Mutation]:
    """Every axis of every logical tensor displaced by one, around: no table can say so, but code that reads one can do it."""
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


# --- checkpoints -------------------------------------------------------------------------------------------------------------------


# Sizes of the axes that families know, all different; a head is wide enough for a quarter of it to be rotated in pairs.
_SMALL = {"layer": 2, "kv": 4, "group": 3, "heads": 8, "head_dim": 16, "hidden": 56, "inter": 44, "vocab": 131, "pos": 72}
_SMALL |= {"experts": 6, "routes": 6, "moe_inter": 20, "q_lora": 36, "kv_lora": 28, "rope_dim": 12, "nope_dim": 10}
_SMALL |= {"index_heads": 9, "index_dim": 26, "o_groups": 4, "o_heads": 3, "o_lora": 18, "streams": 3}
_SMALL |= {"lk": 8, "lgroup": 3, "lk_dim": 14, "lv_dim": 18, "kernel": 5}
_SMALL |= {"ssm_groups": 8, "ssm_group": 3, "ssm_dim": 14, "ssm_state": 18, "dt_rank": 9}
# The same where weights have scales per block: two ranks cut between blocks, what is not cut may end within one.
_BLOCKED = {"layer": 2, "heads": 4, "head_dim": 384, "hidden": 160, "inter": 1024, "vocab": 131, "experts": 5, "routes": 5}
_BLOCKED |= {"moe_inter": 256, "q_lora": 380, "kv_lora": 300, "rope_dim": 192, "nope_dim": 320, "kv": 4, "group": 3, "index_dim": 224}
_BLOCKED |= {"o_groups": 2, "o_heads": 2, "o_lora": 128}
_FREE = (22, 26, 34, 38, 46, 50, 58, 62, 68, 74, 76, 82, 86, 92, 94)  # for axes that nobody knows
_NUMBERS = {"top": 2, "index_top": 9}  # of facts that config.json must have
_TURNED = 6  # features of a head that are rotated
_SHARED = 3  # what a factor of a size gets that is no axis: shared experts


def made_up(table: Table, where: Path) -> Iterator[Path]:
    """Random checkpoints of a family from its table alone, one directory for each set of optional rows, until every row is in one.

    Where rows have several layouts, until each has been in one in every layout.
    """
    covered: set[tuple[int, Pattern]] = set()
    layouts = range(1 + max(len(row.layouts) for row in table.rows))
    for number, (layout, truths) in enumerate(itertools.product(layouts, _variants(table))):
        rows = (replace(row, pattern=((row.pattern, *row.layouts)[: layout + 1])[-1], layouts=()) for row in table.rows)
        config, shapes = _invented(replace(table, rows=tuple(rows)), truths)
        active = {(at, row.pattern) for at, row, _ in shapes}
        if active <= covered:
            continue
        covered |= active
        directory = where / f"variant-{number}"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        _fill(table, shapes, directory / "model.safetensors")
        yield directory


def _variants(table: Table) -> list[dict[str, bool]]:
    """Truths of the config keys that optional rows are bound to: those that most rows want, then what the rest of the rows wants."""
    wants: dict[str, Counter[bool]] = {}
    for row in table.rows:
        for tag in row.tags:
            if (key := table.optional.get(tag)) is not None:
                wants.setdefault(key.lstrip("!"), Counter())[not key.startswith("!")] += 1
    usual = {key: found[True] >= found[False] for key, found in wants.items()}
    usual |= {key: False for key in usual if _of_quantization(key)}  # block scales make everything large: only for their own rows
    found = [usual]
    for row in table.rows:
        own = {}
        for tag in row.tags:
            if (key := table.optional.get(tag)) is not None:
                own[key.lstrip("!")] = not key.startswith("!")
        if not any(all(variant[key] == truth for key, truth in own.items()) for variant in found):
            found.append(usual | own)
    return found


def _of_quantization(key: str) -> bool:
    return key.partition(".")[0] == "quantization_config"


Shaped = list[tuple[int, Row, list[tuple[str, str, tuple[int, ...]]]]]  # row, and its stored tensors: name, dtype, shape


def _invented(table: Table, truths: Mapping[str, bool]) -> tuple[Data, Shaped]:
    """config.json, and every stored tensor."""
    tags = {tag for row in table.rows for tag in row.tags}
    tags = {tag for tag in tags if (key := table.optional.get(tag)) is None or truths[key.lstrip("!")] != key.startswith("!")}
    rows = [(at, row) for at, row in enumerate(table.rows) if row.tags <= tags]
    kinds = _kinds(table)
    extra = sum(not table.extra.keys().isdisjoint(kind) for kind in kinds)
    config, sizes = _sized(table, [row for _, row in rows], truths, 2 * (len(kinds) - extra))
    main = sizes["layer"]
    table = settle(table, {}, sizes)
    rows = [(at, table.rows[at]) for at, _ in rows]
    plain = len(kinds) - extra
    late = {kind for kind, rule in table.layers.items() if rule.startswith(("last ", "from "))}
    usual = sorted(itertools.islice(itertools.cycle(kinds[:plain]), main), key=lambda mine: bool(late & set(mine)))
    usual = _placed(table, usual)
    config |= _told(table, usual)
    kinds = [*usual, *kinds[plain:]]
    for key in table.extra.values():  # so many, or so many times as a list has entries
        first, *counted = (factor.strip() for factor in _first(key).split("*"))
        config |= {first: extra} | {factor.removeprefix("count "): [""] for factor in counted}
    shapes: Shaped = []
    leaves = {leaf for _, row in rows for leaf in row.leaves}
    for at, row in rows:
        shape = row.pattern.measure(lambda _, axis: axis_size(axis, sizes))[0]
        dtype = "F8_E4M3" if any(f"{leaf}_scale" in leaves for leaf in row.leaves) else "F32"
        dtype = "I32" if any(leaf.endswith("_packed") for leaf in row.leaves) else dtype
        ranges: list[Iterable[int]] = []
        for axis in row.name.axes:
            if axis == "layer":
                apart = table.counts_apart
                ranges.append(
                    [n for n in range(main + extra) if row.within(set(kinds[n])) and (not apart or row.name.extra == (n >= main))]
                )
            else:
                ranges.append(range(sizes[axis]))
        names = [row.name.name(dict(zip(row.name.axes, numbers, strict=True))) for numbers in itertools.product(*ranges)]
        if names:
            shapes.append((at, row, [(name, dtype, shape) for name in names]))
    return config, shapes


def _placed(table: Table, kinds: list[list[str]]) -> list[list[str]]:
    """Kinds for each layer in this order, if they can stand there: names that count in steps have none for the layers between."""
    counting = [row for row in table.rows if row.name.steps and (row.kinds or row.either)]
    left, found = list(kinds), []
    for layer in range(len(kinds)):
        fits = [mine for mine in (*left, *kinds) if all(row.name.counts("layer", layer) for row in counting if row.within(set(mine)))]
        found.append(fits[0])
        if fits[0] in left:
            left.remove(fits[0])
    return found


def _kinds(table: Table) -> list[list[str]]:
    """Kinds of layers: each combination, and extra ones last, two at least, of kinds that have rows there, or else of the last."""
    special = set(table.extra)
    beside = {kind for row in table.rows if row.kinds & special for kind in row.kinds}
    plain = [[kind for kind in group if kind not in special] for group in table.one_of]
    found = [list(kinds) for kinds in itertools.product(*plain)]
    if special:
        groups = [[kind for kind in group if kind in special or kind in beside] or group[-1:] for group in table.one_of]
        groups = [[kind for kind in group if kind in special] or group for group in groups]
        combined = [list(kinds) for kinds in itertools.product(*groups)]
        found += combined * (1 if len(combined) > 1 else 2)
    return found


def _told(table: Table, kinds: Sequence[Sequence[str]]) -> Data:
    """What config.json must say so that the rules of kinds name the layers that are of them; one list may say it of several."""
    found: Data = {}
    for kind, rule in table.layers.items():
        here = [kind in mine for mine in kinds]
        for key, value in _said(rule, here):
            if key in found and isinstance(value, list):
                value = [new if mine else old for new, old, mine in zip(value, found[key], here, strict=True)]
            found[key] = value
    return found


def _said(rule: str, layers: Sequence[bool]) -> Iterator[tuple[str, Any]]:
    """What config.json must say so that a rule names these layers."""
    word, _, key = _first(rule).partition(" ")
    if word == "last":
        yield key, sum(layers)
    elif word == "from":
        yield key, layers.index(True) if any(layers) else len(layers)
    elif key or word == "layer_types":
        yield word, [(key or "sliding_attention") if here else "other" if key else "full_attention" for here in layers]
    else:
        yield word, list(map(int, layers))


def _first(expression: str) -> str:
    return expression.split("|")[0].strip()


def _sized(table: Table, rows: Sequence[Row], truths: Mapping[str, bool], layers: int) -> tuple[Data, dict[str, int]]:
    """config.json and the sizes of all axes."""
    axes = {axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)}
    blocks = {axis for axis in axes if block_of(axis)}
    bases = {base for axis in blocks for base in (block_of(axis) or ((), 0))[0]}
    known = _BLOCKED if any(block_of(axis) for row in rows for path in row.pattern.axes for axis in path) else _SMALL
    config: Data = {"model_type": table.name, "tie_word_embeddings": False}
    sized = {key for text in table.sizes.values() for key in re.findall(r"[A-Za-z_][\w.]*", _first(text))}
    for key, truth in truths.items():
        if _of_quantization(key):
            fits = (entry for entry in table.quantization if truth and Config({"quantization_config": entry}).says(key))
            config["quantization_config"] = next(fits, config.get("quantization_config"))
        elif "=" in key:  # two keys compared: two axes differ unless they are made equal, below
            continue
        elif not truth:
            config[key] = None if key in sized else False
        elif key not in sized:
            config[key] = True
    free = iter(_FREE)
    sizes: dict[str, int] = {}
    composite = {axis for axis, text in table.sizes.items() if re.search(r"[+*]", _first(text))}
    by_key: dict[str, str] = {}
    for axis in sorted((axes | {"layer"}) - blocks | bases, key=lambda axis: (axis not in _SMALL, axis)):
        if axis in composite or axis in table.axes:
            continue
        if table.sizes.get(axis, "").isdecimal():
            sizes[axis] = int(table.sizes[axis])
            continue
        key = _first(table.sizes.get(axis, ""))
        if key and key in by_key:
            sizes[axis] = sizes[by_key[key]]
            continue
        if axis.startswith("kv@"):
            sizes[axis] = (known.get("kv") or _SMALL["kv"]) // 2
        else:
            sizes[axis] = known[axis] if axis in known else _SMALL[axis] if axis in _SMALL else next(free)
        if axis == "layer":
            sizes[axis] = max(sizes[axis], layers)
        if key:
            by_key[key] = axis
            config.setdefault(key, sizes[axis])
    for axis, atoms in table.axes.items():
        key = _first(table.sizes.get(axis, ""))
        if key in by_key and all(atom in sizes for atom in atoms):  # heads = kv group, and both heads and kv are n_head
            sizes[atoms[-1]] = sizes[by_key[key]] // max(1, math.prod(sizes[atom] for atom in atoms[:-1]))
        elif key and all(atom in sizes for atom in atoms):
            whole = config.setdefault(key, math.prod(sizes[atom] for atom in atoms))
            sizes[atoms[-1]] = whole // math.prod(sizes[atom] for atom in atoms[:-1])
    for axis in sorted(composite):
        for key in re.findall(r"[A-Za-z_][\w.]*", _first(table.sizes[axis])):
            config.setdefault(key, _SHARED if "*" in table.sizes[axis] else _SMALL.get(axis, _SHARED))
    for key in (key for key, truth in truths.items() if " != " in key and not truth):
        config[key.partition(" != ")[0]] = config[key.partition(" != ")[2]]
    asked = Config(_nested(config), table.defaults)
    for axis, text in table.sizes.items():
        value = evaluate(text, asked.get)
        if value is not None and axis not in table.axes:
            sizes[axis] = value
    beside = table.model.get("parallel", [])  # one after the other: beside each other, their biases are one sum
    for text in beside if isinstance(beside, list) else [beside]:
        for key in re.findall(r"[A-Za-z_]\w*", str(text)):
            if key.lower() not in ("true", "false"):
                config.setdefault(key, False)
    for fact, text in (*table.model.items(), *table.model.get("routing", {}).items()):
        key = _first(text) if isinstance(text, str) else ""
        if fact == "rope_size":
            config[key] = _TURNED
        needed = fact in ("top", "attn_scale", "embed_scale", "index_top") and re.fullmatch(r"[A-Za-z_]\w*", key)
        if needed and "|" not in str(text) and (fact in _NUMBERS or asked.get(key) is None):
            config[key] = _NUMBERS.get(fact, 11)
    return _nested(config), sizes


def _nested(config: Data) -> Data:
    """Dotted keys as sections: {"a.b": 1} → {"a": {"b": 1}}."""
    found = {key: value for key, value in config.items() if "." not in key}
    for key, value in config.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def _fill(table: Table, shapes: Shaped, path: Path) -> None:
    """Write all tensors, filled with noise that keeps activations near one, nothing constant, no two rows equal."""
    flat = {name: (row, dtype, shape) for _, row, stored in shapes for name, dtype, shape in stored}
    prologue, found = header.build([(name, dtype, shape) for name, (_, dtype, shape) in flat.items()], {"format": "pt"})
    centre = 0.0 if table.model.get("norm_offset") else 1.0
    with path.open("wb") as file:
        file.write(prologue)
        for name, entry in sorted(found.entries.items(), key=lambda item: item[1].offset):
            file.seek(entry.offset)
            file.write(_noise(name, *flat[name], centre).tobytes())


def _noise(name: str, row: Row, dtype: str, shape: tuple[int, ...], centre: float) -> np.ndarray[Any, Any]:
    rng, leaf = np.random.default_rng(zlib.crc32(name.encode())), row.leaves[0]
    if dtype == "F8_E4M3":  # from an eighth to eight, of either sign
        bits = rng.integers(0, 128, shape, np.uint8) & 0x87 | rng.integers(0, 2, shape, np.uint8) << 7
        return np.asarray(bits | rng.integers(4, 10, shape, np.uint8) << 3, np.uint8)
    if dtype == "I32":
        return rng.integers(-(1 << 31), 1 << 31, shape, np.int32)
    spread, around = 1.0, 0.0
    if "_scale" in leaf:
        return np.asarray(rng.uniform(0.5, 1.5, shape) * 0.03, np.float32)
    if "bias" in leaf:
        spread = 1.0 if "score" in leaf or "router" in leaf else 0.3
    elif "norm" in leaf:
        spread, around = 0.3, centre
    elif len(shape) > 1 and "embed" not in leaf:
        spread = min(shape[-2:]) ** -0.5
    return np.asarray(rng.standard_normal(shape) * spread + around, np.float32)


# --- running -----------------------------------------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """What a model computes: logits [prompts, tokens, vocab], and what the caches of all ranks keep."""

    logits: Any
    kept: list[Any]


def _run(source: Source, mesh: Mesh, ids: Any) -> _Outcome:
    """A forward in float64 on ranks that are threads; shards are made on the way, through the plan, as loading makes them."""
    import torch

    load = import_module("reshard.runtime.load")
    decoders, specs, parallel = (import_module(f"reshard.runtime.{name}") for name in ("model", "spec", "parallel"))
    model = source.layout.model
    layout = lay_out(tables.load("formats", "native").for_family(model.family.name), model, mesh)

    def work(world: Any) -> tuple[Any, list[Any]]:
        with torch.inference_mode():
            decoder = _decoder(source, layout, world, load, decoders, specs)
            cache = decoder.new_cache(*ids.shape)
            logits = decoder(ids, cache=cache)
            return logits, [tensor for layer in sorted(cache.kept) for tensor in cache.kept[layer]]

    found = parallel.run_threads(mesh.world, work)
    return _Outcome(found[0][0], [tensor for _, kept in found for tensor in kept])


def _decoder(source: Source, layout: Layout, world: Any, load: Any, decoders: Any, specs: Any) -> Any:
    import torch

    model = layout.model
    cast = load.Cast(layout, world.rank, torch.float64, None)
    state = load.Reader(source, layout, world.rank, cast, lambda: None, lambda _: True).run(1)
    decoder = decoders.Decoder(specs.Spec.of(model.family, source.config, model), model, layout, world.rank, world)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval()


def _apart(source: Source, ids: Any) -> Any:
    """Logits of a model whose attention and feed-forward stand beside each other, if they stood one after the other; None for others.

    Beside each other, the biases of both are one sum, which says nothing of either.
    """
    import torch

    load = import_module("reshard.runtime.load")
    decoders, specs, parallel = (import_module(f"reshard.runtime.{name}") for name in ("model", "spec", "parallel"))
    model = source.layout.model
    layout = lay_out(tables.load("formats", "native").for_family(model.family.name), model, Mesh())
    with torch.inference_mode():
        decoder = _decoder(source, layout, parallel.alone(), load, decoders, specs)
        if not decoder.spec.parallel:
            return None
        decoder.spec = replace(decoder.spec, parallel=False)
        return decoder(ids)


def _ahead(source: Source, ids: Any) -> Any:
    """Logits of multi-token prediction, which the runtime leaves out: what each extra layer makes of hidden states and next tokens.

    None for a model without. As DeepSeek-V3 does it: the norms of embedding and of hidden state side by side, projected, one layer.
    """
    import torch
    from torch.nn import functional as F

    model = source.layout.model
    if not {"mtp.eh_proj", "mtp_eh_proj", "mtp.e_proj"} & model.tensors.keys():
        return None
    load = import_module("reshard.runtime.load")
    decoders, specs, parallel, weights = (import_module(f"reshard.runtime.{name}") for name in ("model", "spec", "parallel", "weights"))
    layout = lay_out(tables.load("formats", "native").for_family(model.family.name), model, Mesh())
    with torch.inference_mode():
        decoder = _decoder(source, layout, parallel.alone(), load, decoders, specs)
        x: Any = None
        eps, offset, vocab, logits = decoder.spec.eps, decoder.spec.norm_offset, model.sizes["vocab"], []
        there, extra = dict(decoder.named_parameters()), range(model.main_layers, model.sizes["layer"])
        decoder.spec = replace(decoder.spec, roped=decoder.spec.roped | set(extra))
        joint = "e_h_proj" if "mtp.e_proj" in model.tensors else "eh_proj"
        for name, step in decoder.walk(ids):
            if name != decoders.HEAD:
                x = step(x)
        for layer in extra:

            def of(name: str, layer: int = layer) -> Any:
                """The layer's own, or what all share, or what the main layers have; a tied head is the embedding."""
                names = (f"layers.{layer}.mtp.{name}", f"mtp_{name}", name, "embed")
                name = next(one for one in names if one in there)
                return weights.Weights(there).matrix(name, decoder.dtype) if f"{name}_scale" in there else there[name]

            def normed(x: Any, name: str) -> Any:
                return weights.rms_norm(x, of(name), eps, offset)

            ids, hidden = ids[:, 1:], x[:, :-1]
            x = F.linear(torch.cat((normed(F.embedding(ids, of("embed")), "e_norm"), normed(hidden, "h_norm")), -1), of(joint))
            for name, step in decoder.walk(ids, [layer]):
                if name.startswith("layer"):
                    x = step(x)
            logits.append(F.linear(normed(x, "norm"), of("head"))[..., :vocab])
        return torch.cat(logits, 1)


def _distance(a: Any, b: Any) -> float:
    """The largest difference of two tensors; infinite where their shapes differ or one is not finite."""
    if a.shape != b.shape:
        return math.inf
    found = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return found if math.isfinite(found) else math.inf


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: the models are small, and ranks are threads already."""
    import torch

    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)


# --- one checkpoint ----------------------------------------------------------------------------------------------------------------


class Bench:
    """A checkpoint on which damages are tried, opened once with the true table."""

    def __init__(self, name: str, root: Path, table: Table, skipped: str | None) -> None:
        self.name, self.table = name, table
        self.published: Published = open_published(root, name)
        self.source = from_published(self.published, table)
        model = self.source.layout.model
        self.active = set(model.active)
        self.meaning = meaning(self.source.layout)
        self.native = tables.load("formats", "native").for_family(table.name)
        self.mesh = Mesh(2)
        self._shards: list[Any] | None = None
        try:
            lay_out(self.native, model, self.mesh)
        except ReshardError:
            self.mesh = Mesh()
        lay_out(self.native, model, self.mesh)
        elements = sum(tensor.elements for held, tensor in model.tensors.items() if held not in model.alias)
        self.why = skipped or (f"{name} has {elements} elements, at most {LARGEST} are run" if elements > LARGEST else "")
        self.rounding = 0.0
        if not self.why:
            try:
                self._prepare(model)
            except Exception as error:  # a family that the runtime does not know
                self.why = f"the runtime cannot run {name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        about = ", ".join(f"{axis} {size}" for axis, size in sorted(model.sizes.items()) if axis in self.table.sizes)
        self.words = f"{name} ({len(self.published.tensors)} tensors; {about})"

    def _prepare(self, model: Model) -> None:
        """What the true table makes of it on one rank, and how far two ranks are from that."""
        import torch

        length = min(LENGTH, model.sizes.get("pos", LENGTH))
        self.ids = torch.randint(0, model.sizes["vocab"], (PROMPTS, length), generator=torch.Generator().manual_seed(0))
        self.wanted = _run(self.source, Mesh(), self.ids).logits
        self.same = _run(self.source, self.mesh, self.ids)
        self.ahead, self.apart = _ahead(self.source, self.ids), _apart(self.source, self.ids)
        largest, own = float(self.wanted.abs().max()), _distance(self.same.logits, self.wanted)
        self.rounding = max(TIMES * own, FLOOR * largest)
        if not own < largest / 1000:
            raise ReshardError(f"two ranks compute other logits than one: they differ by {own:.3g}, the largest is {largest:.3g}")

    def against_transformers(self) -> tuple[str, bool]:
        """What an independent implementation says of the table as it is, and whether that is that it is wrong."""
        import torch

        if self.why or self.published.root is None:
            return "", False
        with torch.inference_mode():
            reference = import_module("reshard.runtime.reference").reference_for(self.source)
            if not reference.name.startswith("transformers"):
                return f"the table as it is: nothing independent to compare with, but {reference.name}", False
            exact, own = (reference.logits(self.ids, dtype) for dtype in (torch.float64, torch.float32))
        off, bound = _distance(self.wanted, exact), TRUE * _distance(own, exact)
        words = f"the table as it is: logits differ from those of {reference.name} by {off:.2g}, its own rounding allows {bound:.2g}"
        return (f"WRONG: {words}", True) if off > bound else (words, False)

    def open(self, table: Table) -> Source:
        """The checkpoint by another table. Raises ReshardError where it does not fit."""
        return from_published(self.published, table)

    def shards(self, source: Source | None = None) -> list[Any]:
        """What every mesh would make of this checkpoint by the table of a source, by the true one: every copy, or that it does not fit."""
        if source is None:
            if self._shards is None:
                self._shards = self.shards(self.source)
            return self._shards
        found: list[Any] = []
        for mesh in MESHES:
            try:
                joined = plan(source.layout, lay_out(self.native, source.layout.model, mesh))
            except ReshardError:
                found.append(None)
                continue
            copies = ((c.src_name, c.src_offset, c.dst.rank, c.dst_name, c.dst_offset, c.dims) for c in joined.copies())
            found.append(sorted(copies))
        return found

    def renumbered(self, at: int, axis: str) -> Source | None:
        """The checkpoint with every tensor of a row taken for its neighbour along an axis of its name; None where there is none."""
        places = dict(self.source.places)
        for slot in self.source.layout.slots:
            if slot.row != at:
                continue
            points = list(slot.points())
            order = sorted({point[axis] for point in points})
            if len(order) < 2:
                return None
            for point in points:
                after = order[(order.index(point[axis]) + 1) % len(order)]
                places[0, slot.name(point)] = self.source.places[0, slot.name(point | {axis: after})]
        return replace(self.source, places=places)

    def displaced(self, leaf: str, axis: str) -> Source | None:
        """The checkpoint with a tensor read one further along an axis, around; None where there is nothing to displace."""
        layout = self.source.layout
        pieces: list[Piece] = []
        held = layout.pieces.get(leaf, ())
        for piece in held:
            at = piece.tensor.axes.index(axis) if axis in piece.tensor.axes else -1
            stride = piece.strides[at] if at >= 0 else None
            if stride is None or piece.box[at][1] - piece.box[at][0] < 2:  # as in layers where names count what others have stacked
                pieces.append(piece)
                continue
            low, high = piece.box[at]
            parts = (((low, high - 1), piece.offset + stride), ((high - 1, high), piece.offset))
            for part, offset in parts:
                pieces.append(replace(piece, box=(*piece.box[:at], part, *piece.box[at + 1 :]), offset=offset))
        if len(pieces) == len(held):
            return None
        return replace(self.source, layout=replace(layout, pieces=layout.pieces | {leaf: tuple(pieces)}))

    def judge(self, source: Source, name: str) -> Trial:
        """What running the model says of a table that fits."""
        try:
            got = _run(source, self.mesh, self.ids)
        except Exception as error:  # whatever the runtime stumbles over: tensors that it needs are not what they should be
            words = " ".join(str(error).split())[:100]
            return Trial(name, "numerics", f"the model cannot be run: {type(error).__name__}: {words}", self.name)
        if (off := _distance(got.logits, self.wanted)) > self.rounding:
            return Trial(name, "numerics", f"logits differ by {off:.3g}", self.name)
        kept = max((_distance(a, b) for a, b in zip(got.kept, self.same.kept, strict=True)), default=0.0)
        if kept > self.rounding:
            return Trial(name, "beyond", f"the same logits, by softmax; keys in the cache differ by {kept:.3g}", self.name)
        for what, compute, wanted in (("multi-token prediction", _ahead, self.ahead), ("branches one after the other", _apart, self.apart)):
            if wanted is None:
                continue
            try:
                off = _distance(compute(source, self.ids), wanted)
            except Exception as error:
                off, words = math.inf, f" ({type(error).__name__})"
            else:
                words = ""
            if off > self.rounding:
                return Trial(name, "beyond", f"the same logits; those of {what} differ by {off:.3g}{words}", self.name)
        return Trial(name, MISSED, f"the same logits: they differ by {off:.3g}, rounding is {self.rounding:.3g}", self.name)


def meaning(layout: Layout) -> dict[str, Any]:
    """What a layout says, however it was written: of each logical tensor its sizes, and where its elements lie."""
    found: dict[str, Any] = {}
    for name, tensor in layout.model.tensors.items():
        pieces = []
        for piece in layout.holding(name):
            own = {a: (box, s) for a, box, s in zip(tensor.axes, piece.box, piece.strides, strict=True) if box[1] - box[0] > 1 or s is None}
            slot = piece.slot
            pieces.append((slot.template.name.text, slot.shape, slot.layers, piece.offset, tuple(sorted(own.items()))))
        axes = sorted(zip(tensor.axes, tensor.sizes, strict=True))
        found[name] = (axes, tensor.dtypes, tensor.layers, sorted(pieces, key=repr))
    model = layout.model
    return found | {"": (sorted(model.alias.items()), model.main_layers, dict(model.sizes), model.aside)}


# --- all together ------------------------------------------------------------------------------------------------------------------


def check_table(table: Table, given: Path | None = None, sample: int | None = None, progress: Progress | None = None) -> TableCheck:
    """Damage a family table in every way and say what catches each damage.

    `given`: a checkpoint of the family, opened with the table first, and run if it is small; what it lacks is tried on made-up ones.
    `sample`: at most so many damages, spread over all. Raises ReshardError where the table itself does not fit, or no checkpoint can be
    made up from it.
    """
    progress = progress or Silent()
    skipped = None if find_spec("torch") is not None else "PyTorch is not installed: pip install 'reshard[runtime]'"
    with tempfile.TemporaryDirectory(prefix="reshard-check-") as scratch, _quiet_torch(skipped):
        benches = [Bench(str(given), given, table, skipped)] if given is not None else []
        for number, root in enumerate(made_up(table, Path(scratch)), 1):
            name = f"made up {number}"
            try:
                benches.append(Bench(name, root, table, skipped))
            except ReshardError as error:
                if given is None:
                    raise ReshardError(
                        f'family "{table.name}": the checkpoint made up from its table does not fit it: {error.message}',
                        "the table contradicts itself, or needs a config key that nobody can guess: give a checkpoint, --with PATH",
                    ) from None
        itself, wrong = benches[0].against_transformers() if given is not None else ("", False)
        todo = _spread(list(mutations(table)), sample)
        trials = []
        progress.start("trying damages", len(todo), " damages")
        for mutation in todo:
            trials.append(_tried(mutation, table, benches))
            progress.advance(1)
        progress.finish()
    active = {at for bench in benches for at in bench.active}
    axes = {axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)}
    return TableCheck(
        table.name,
        len(table.rows),
        len(axes),
        tuple(bench.words for bench in benches),
        tuple(trials),
        tuple(row.name.text for at, row in enumerate(table.rows) if at not in active),
        max((bench.rounding for bench in benches if not bench.why), default=None),
        itself,
        wrong,
        next((bench.why for bench in benches if bench.why), None),
    )


@contextmanager
def _quiet_torch(skipped: str | None) -> Iterator[None]:
    if skipped is not None:
        yield
        return
    with _one_thread():
        yield


def _spread(found: list[Mutation], sample: int | None) -> list[Mutation]:
    """Some of all, in their order; which, depends on their names alone."""
    if sample is None or sample >= len(found):
        return found
    chosen = sorted(range(len(found)), key=lambda at: zlib.crc32(found[at].name.encode()))[:sample]
    return [found[at] for at in sorted(chosen)]


def _tried(mutation: Mutation, table: Table, benches: Sequence[Bench]) -> Trial:
    """One damage: read, then tried on the checkpoints that have its rows, until one tells it from the true table."""
    name = mutation.name
    damaged: Table | None = None
    if mutation.data is not None:
        try:
            damaged = tables._consistent(tables._parse(dict(mutation.data), table.texts, {}))
        except ReshardError as error:
            return Trial(name, "reading", _line(error))
    own = set(mutation.rows)
    having = sorted((bench for bench in benches if own & bench.active), key=lambda bench: -len(own & bench.active))
    found = [] if having else [Trial(name, MISSED, "no checkpoint has these rows")]
    for bench in having:
        trial = _on(bench, mutation, damaged)
        if trial.by in RUNGS:
            return trial
        found.append(trial)
    return max(found, key=lambda trial: (EQUIVALENT, OPEN, MISSED).index(trial.by))


def _on(bench: "Bench", mutation: Mutation, damaged: Table | None) -> Trial:
    """One damage on one checkpoint."""
    name = mutation.name
    if damaged is None:
        assert mutation.shift is not None
        leaf, axis = mutation.shift
        displaced = bench.displaced(leaf, axis) if leaf else bench.renumbered(mutation.rows[0], axis)
        if displaced is None:
            return Trial(name, EQUIVALENT, "nothing to displace: an axis of one", bench.name)
        source = displaced
    else:
        try:
            source = bench.open(damaged)
        except ReshardError as error:
            return Trial(name, "opening", _line(error), bench.name)
        if meaning(source.layout) == bench.meaning:
            return Trial(name, EQUIVALENT, "says the same of every element", bench.name)
    try:
        plan(source.layout, lay_out(bench.native, source.layout.model, bench.mesh))
    except ReshardError as error:
        return Trial(name, "planning", _line(error), bench.name)
    trial = Trial(name, OPEN, bench.why, bench.name) if bench.why else bench.judge(source, name)
    if trial.by not in RUNGS and damaged is not None and bench.shards(source) == bench.shards():
        return Trial(name, EQUIVALENT, "makes the same shards on every mesh", bench.name)
    return trial


def _line(error: ReshardError) -> str:
    """The first thing that an error says is wrong."""
    lines = [line.strip() for line in error.message.splitlines()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
