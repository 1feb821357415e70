"""What the tests draw from: headers of fixtures and of invented checkpoints, random tables, models and meshes; what
layouts must hold.

    headers("llama")              config and stored tensors of a fixture, read without `reshard`
    invented("llama", sizes)      the same for any sizes, made from the family's table
    joints()                      Hypothesis: a random model in two random layouts, as TOML text
    numbered(model), hold(...)    every element of a model as a number, and what each stored tensor of a layout must
                                  then hold

`hold` says with numpy's transpose and concatenate what a pattern means; it shares no arithmetic with `reshard`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fixtures import FIXTURES, checkpoint, read
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from reshard.engine.worker import Key
from reshard.errors import ReshardError
from reshard.layout.cut import Layout, Piece, lay_out
from reshard.layout.join import Plan
from reshard.layout.mesh import Mesh
from reshard.model.naming import settle
from reshard.model.understand import Config, Model, Tensor, understand
from reshard.tables import families
from reshard.tables.families import Family
from reshard.tables.formats import Format
from reshard.tables.layer_rules import layers_named
from reshard.tables.notation import Product, Sum, block_of
from reshard.tables.row import Row

Array = np.ndarray[Any, Any]

# Examples per law. As tests run, always the same; given a number, that many, and others each time.
EXAMPLES = os.environ.get("RESHARD_EXAMPLES")
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


Headers = dict[str, Stored]


def law(examples: int) -> settings:
    """How Hypothesis tries a law."""
    return settings(
        deadline=None,
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )


# Headers


@cache
def headers(name: str) -> tuple[dict[str, Any], Headers]:
    """Config and stored tensors of a fixture."""
    directory = checkpoint(name)
    config = json.loads((directory / "config.json").read_text())
    return config, {key: Stored(DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in read(directory).items()}


def table_of(name: str) -> Family:
    """The family table of a fixture."""
    return families.load(FIXTURES[name].family)


def unused_rows(table: Family, models: Iterable[Model]) -> set[str]:
    """The names of rows that none of these models has, in whatever spelling."""
    used = {model.family.rows[at].name.text for model in models for at in model.active}
    starts = table.prefixes or ("",)

    def names(row: Row) -> Iterator[str]:
        for text in (row.name.text, *(other.text for other in row.others)):
            yield from ((start + text[1:] for start in starts) if text[0] == "~" else (text,))

    return {row.name.text for row in table.rows if used.isdisjoint(names(row))}


@cache
def model_of(name: str) -> Model:
    """A fixture, understood."""
    config, stored = headers(name)
    return understand(table_of(name), Config(config), stored, name)


def invented(
    family: str, sizes: Mapping[str, int], kinds: Sequence[Sequence[str]] = (), tags: Sequence[str] = (), **config: Any
) -> tuple[dict[str, Any], Headers]:
    """Config and stored tensors of a checkpoint that was never written: every row of the table, at these sizes of the
    plain axes.

    `kinds`: those of each layer, extra layers included (none needed where the table has no `one_of`). `tags`: which are
    there. Weights are BF16, scales F32; a tied head is left out where config says so.
    """
    table = families.load(family)
    config = {"model_type": family} | config
    for axis, expression in table.sizes.items():
        atoms = table.axes.get(axis, (axis,))
        if (key := said(expression)) and all(atom in sizes for atom in atoms):
            put(config, key, math.prod(sizes[atom] for atom in atoms))
    known = dict(sizes)
    for axis, expression in table.sizes.items():
        value = Config(config, table.defaults).size(expression)
        if value is not None:
            known[axis] = value
    tied = Config(config, table.defaults).says("tie_word_embeddings")
    stored: Headers = {}
    for row in settle(table, {}, known).rows:
        if row.tags - set(tags) or (tied and row.leaves[0] in table.tied):
            continue
        shape = row.pattern.measure(lambda _, axis: size_of(axis, known))[0]
        layers = [at for at in range(max(known["layer"], len(kinds))) if row.within(set(kinds[at] if kinds else ()))]
        if table.counts_apart and "layer" in row.name.axes:
            layers = [at for at in layers if row.name.extra == (at >= known["layer"])]
        if row.kinds and not layers:
            continue
        ranges = [layers if axis == "layer" else range(known[axis]) for axis in row.name.axes]
        for numbers in itertools.product(*ranges):
            text = row.name.name(dict(zip(row.name.axes, numbers, strict=True)))
            stored[text] = Stored("F32" if "scale" in row.leaves[0] else "BF16", shape)
    return config, stored


def said(expression: str) -> str:
    """The first config key, perhaps `a.b`, that is a whole size."""
    return next(
        (key for key in expression.split(" | ") if re.fullmatch(r"[a-z_][\w.]*", key) and ".any." not in key), ""
    )


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Say `a.b`, unless it is said."""
    *outer, last = key.split(".")
    for name in outer:
        config = config.setdefault(name, {})
    config.setdefault(last, value)


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    block = block_of(axis)
    return -(-math.prod(sizes[base] for base in block[0]) // block[1]) if block else sizes[axis]


# What a layout holds


def numbered(model: Model) -> dict[str, Array]:
    """Every element of every logical tensor as a number of its own, from 1 on;
    a tied name has the numbers of the other.
    """
    found: dict[str, Array] = {}
    start = 1
    for name, tensor in model.tensors.items():
        if name not in model.alias:
            count = math.prod(tensor.sizes)
            found[name] = np.arange(start, start + count).reshape(tensor.sizes)
            start += count
    return found | {name: found[other] for name, other in model.alias.items()}


def hold(layout: Layout, values: Mapping[str, Array]) -> dict[Key, Array]:
    """What every stored tensor of a layout must hold: padding and what others store for a `zero` row are 0."""
    found: dict[Key, Array] = {}
    for slot in layout.slots:
        row = slot.template
        assert isinstance(row, Row)
        mine = [piece for leaf in row.leaves for piece in layout.pieces.get(leaf, ()) if piece.slot is slot]
        for point in slot.points():
            leaves = []
            for piece, leaf in zip(mine, row.leaves, strict=True) if mine else ():
                assert piece.tensor.name == leaf
                axes = piece.tensor.axes
                index = tuple(point[a] if a in point else slice(*span) for a, span in zip(axes, piece.box, strict=True))
                rest = [a for a in axes if a not in point]
                part = values[leaf][index]
                for at, axis in enumerate(rest):
                    missing = stored_extent(layout, row, piece, axis) - part.shape[at]
                    part = np.pad(part, [(0, missing if n == at else 0) for n in range(part.ndim)])
                leaves.append((tuple(rest), part))
            flat = arranged(row, leaves) if mine else np.zeros(math.prod(slot.shape), np.int64).reshape(slot.shape)
            assert flat.shape == slot.shape, (row.name.text, flat.shape, slot.shape)
            found[slot.rank, slot.name(point)] = flat
    return found


def stored_extent(layout: Layout, row: Row, piece: Piece, axis: str) -> int:
    """How much of an axis a stored tensor has room for: what it holds, or its equal part of the padded size."""
    low, high = piece.box[piece.tensor.axes.index(axis)]
    table, mesh = layout.format, layout.mesh
    if axis not in table.pad or axis not in table.cut.get("tp", ()) or row.whole or row.cut or mesh.weights:
        return high - low
    unit = math.prod(mesh.tp if factor == "tp" else int(factor) for factor in table.pad[axis].split("*"))
    inside = mesh.ep > 1 and any(other in table.cut.get("ep", ()) for other in piece.tensor.axes)
    return -(-layout.model.sizes[axis] // unit) * unit // (mesh.etp if inside else mesh.tp)


def arranged(row: Row, leaves: Sequence[tuple[tuple[str, ...], Array]]) -> Array:
    """The leaves laid out as the pattern says."""
    flat: Product = tuple(node for dim in row.pattern.dims for node in dim)
    whole = _arranged(flat, list(leaves))
    shape, at = [], 0
    for dim in row.pattern.dims:
        shape.append(math.prod(whole.shape[at : at + len(dim)]))
        at += len(dim)
    return whole.reshape(shape)


def _arranged(product: Product, leaves: list[tuple[tuple[str, ...], Array]]) -> Array:
    """One dimension per factor of the product, a sum being one."""
    seam = next((at for at, node in enumerate(product) if isinstance(node, Sum)), None)
    if seam is None:
        ((axes, array),) = leaves
        return array.transpose([axes.index(str(node)) for node in product])
    node = product[seam]
    assert isinstance(node, Sum)
    before, after = product[:seam], product[seam + 1 :]
    parts = []
    for term in node.terms:
        own, leaves = leaves[: count_leaves(term)], leaves[count_leaves(term) :]
        part = _arranged((*before, *term, *after), own)
        parts.append(part.reshape(*part.shape[:seam], -1, *part.shape[seam + len(term) :]))
    return np.concatenate(parts, axis=seam)


def count_leaves(product: Product) -> int:
    return sum(count_leaves(term) for node in product if isinstance(node, Sum) for term in node.terms) or 1


def carried_out(plan: Plan, held: Mapping[Key, Array]) -> tuple[dict[Key, Array], dict[Key, Array]]:
    """What the destination holds when every copy has been made by indexing one element after another,
    and how often each was written.
    """
    result: dict[Key, Array] = {}
    writes: dict[Key, Array] = {}
    for slot in plan.dst.slots:
        for point in slot.points():
            key = (slot.rank, slot.name(point))
            result[key] = np.zeros(slot.elements, np.int64)
            writes[key] = np.zeros(slot.elements, np.int64)
    for copy in plan.copies():
        src = dst = np.zeros((), np.int64)
        for n, a, b in copy.dims:
            src = src[..., None] + np.arange(n) * a
            dst = dst[..., None] + np.arange(n) * b
        key = (copy.dst.rank, copy.dst_name)
        result[key][copy.dst_offset + dst] = held[copy.src.rank, copy.src_name].reshape(-1)[copy.src_offset + src]
        np.add.at(writes[key], copy.dst_offset + dst, 1)
    return {
        key: flat.reshape(held_shape) for (key, flat), held_shape in zip(result.items(), _shapes(plan.dst), strict=True)
    }, writes


def _shapes(layout: Layout) -> list[tuple[int, ...]]:
    return [slot.shape for slot in layout.slots for _ in slot.points()]


# Random models in random layouts

AXES = ("layer", "kv", "group", "head_dim", "hidden", "inter", "vocab", "experts")


@dataclass(frozen=True)
class Joint:
    """A random model, its family table and two format tables, as TOML; `sizes` of the plain axes."""

    sizes: dict[str, int]
    tensors: dict[str, tuple[str, ...]]
    family: str
    formats: tuple[str, str]

    def model(self) -> Model:
        table = families.parse(self.family, "family")
        layers = tuple(range(self.sizes["layer"]))
        found = {
            name: Tensor(
                name,
                axes,
                tuple(size_of(axis, self.sizes) for axis in axes),
                ("BF16",),
                layers if "layer" in axes else None,
            )
            for name, axes in self.tensors.items()
        }
        sizes = self.sizes | {"heads": self.sizes["kv"] * self.sizes["group"]}
        active = {at: layers if "layer" in row.name.axes else None for at, row in enumerate(table.rows)}
        return Model(table, found, sizes, active, {}, self.sizes["layer"])


def _row(draw: st.DrawFn, number: int, tensors: Mapping[str, tuple[str, ...]], words: Sequence[str] = ("",)) -> str:
    """A random row that holds these tensors: which axes it enumerates, where its seams lie, which factors share a
    dimension.
    """
    common = set.intersection(*(set(axes) for axes in tensors.values()))
    enumerated = [axis for axis in ("layer", "experts") if axis in common and draw(st.booleans())]
    leaves = [[axis for axis in axes if axis not in enumerated] for axes in tensors.values()]
    nodes = _product(draw, leaves)
    dims, at = [], 0
    while at < len(nodes):
        width = draw(st.integers(1, len(nodes) - at))
        text = " ".join(nodes[at : at + width])
        dims.append(f"({text})" if width > 1 else text)
        at += width
        if draw(st.integers(0, 9)) == 0:
            dims.append("1")
    name = f"t{number}" + "".join(f".{{{axis}}}" for axis in enumerated)
    pattern = " ".join(dims).replace("kv group", "heads") if draw(st.booleans()) else " ".join(dims)
    return json.dumps([name, pattern, " ".join(tensors), draw(st.sampled_from(list(words)))])


def _product(draw: st.DrawFn, leaves: list[list[str]]) -> list[str]:
    if len(leaves) == 1:
        return draw(st.permutations(leaves[0]))
    common = [axis for axis in leaves[0] if all(axis in leaf for leaf in leaves)]
    outside = draw(st.permutations([axis for axis in common if draw(st.booleans())]))
    cut = draw(st.integers(0, len(outside)))
    inner = [[axis for axis in leaf if axis not in outside] for leaf in leaves]
    seams = sorted(draw(st.sets(st.integers(1, len(leaves) - 1), min_size=1)))
    terms = [inner[a:b] for a, b in itertools.pairwise([0, *seams, len(leaves)])]
    return [
        *outside[:cut],
        "(" + " + ".join(" ".join(_product(draw, term)) or "1" for term in terms) + ")",
        *outside[cut:],
    ]


def _table(
    draw: st.DrawFn, name: str, tensors: Mapping[str, tuple[str, ...]], extra: str, words: Sequence[str] = ("",)
) -> str:
    left = draw(st.permutations(list(tensors)))
    rows = []
    while left:
        width = draw(st.integers(1, min(3, len(left))))
        mine = {one: tensors[one] for one in left[:width]}
        if len({"layer" in axes for axes in mine.values()}) > 1:  # in one row all have layers or none has
            mine = {left[0]: tensors[left[0]]}
        rows.append(_row(draw, len(rows), mine, words))
        left = left[len(mine) :]
    return f'name = "{name}"\nrows = [\n' + ",\n".join(rows) + f'\n]\n{extra}\n[axes]\nheads = "kv group"\n'


@st.composite
def joints(draw: st.DrawFn) -> Joint:
    """A random model of one to five tensors in a published layout and two cut ones: fused, transposed, stacked,
    enumerated.
    """
    sizes = {
        axis: draw(st.sampled_from((1, 2, 3, 4) if axis in ("layer", "kv", "group") else (2, 4, 6, 12)))
        for axis in AXES
    }
    tensors: dict[str, tuple[str, ...]] = {}
    for number in range(draw(st.integers(1, 5))):
        axes = draw(st.lists(st.sampled_from(AXES), unique=True, max_size=4))
        tensors[f"l{number}"] = tuple(axes)
        if "inter" in axes and sizes["inter"] > 1 and draw(st.booleans()):
            tensors[f"l{number}_scale"] = tuple("inter/2" if axis == "inter" else axis for axis in axes)
    formats = []
    # a table may not name an axis that no row has
    held = {axis for axes in tensors.values() for axis in axes} | {"heads", "layer"}
    for number in range(2):
        cut = [
            axis
            for axis in ("heads", "kv", "inter", "vocab", "head_dim", "hidden")
            if draw(st.integers(0, 2)) and axis in held
        ]
        stage = ["first", "last", "every", ""]
        replicate = [axis for axis in ("kv", "head_dim") if draw(st.booleans()) and axis in held]
        lines = [
            f"replicate = {json.dumps(replicate)}",
            'weighted = ["tp"]',
            'uneven = ["layer"]' if draw(st.booleans()) else "",
            "[cut]",
            f"tp = {json.dumps(cut)}",
            'ep = ["experts"]' if "experts" in held else "",
            'pp = ["layer"]',
        ]
        if draw(st.booleans()) and "vocab" in held:
            lines += ["[pad]", f'vocab = "{draw(st.sampled_from(["tp", "4", "2*tp"]))}"']
        words = [*stage, "whole", "zero"]
        formats.append(_table(draw, f"format{number}", tensors, "\n".join(lines), words))
    return Joint(sizes, tensors, _table(draw, "family", tensors, ""), (formats[0], formats[1]))


@dataclass(frozen=True)
class Invention:
    """A checkpoint of a family at sizes that nobody published."""

    family: str
    config: dict[str, Any]
    stored: Headers

    def model(self) -> Model:
        return understand(families.load(self.family), Config(self.config), self.stored, self.family)


SMALL: Mapping[str, Sequence[int]] = {
    "layer": (1, 2, 3, 5),
    "kv": (1, 2, 4),
    "group": (1, 2, 3, 4),
    "heads": (4, 8),
    "experts": (2, 4, 8),
    "vocab": (7, 16, 61),
    "hidden": (5, 12),
    "head_dim": (2, 3, 6),
}


@st.composite
def inventions(draw: st.DrawFn) -> Invention:
    """Any family, with any of its options and kinds of layers, at random sizes; weights in 8 bits with scales are left
    to fixtures.
    """
    family = draw(st.sampled_from(families.shipped()))
    table = families.load(family)
    axes = {
        axis
        for row in table.rows
        for axis in (*row.name.axes, *(a for path in row.pattern.axes for a in path))
        if "/" not in axis
    }
    axes |= {"layer"}
    solved = {
        axis for axis, expression in table.sizes.items() if re.search(r"[+*]", expression) and not said(expression)
    }
    solved |= {"routes"} | ({"heads"} if "heads" in table.axes else set())
    sizes = {axis: draw(st.sampled_from(SMALL.get(axis, (4, 6, 12)))) for axis in sorted(axes - solved)}
    sizes |= {axis: int(expression) for axis, expression in table.sizes.items() if expression.isdecimal()}
    first: dict[str, str] = {}
    for axis in sorted(sizes.keys() & table.sizes.keys()):  # what one key says is one size
        if key := said(table.sizes[axis]):
            sizes[axis] = sizes[first.setdefault(key, axis)]
    for axis, atoms in table.axes.items():
        if axis in table.sizes and table.sizes[axis] == table.sizes.get(atoms[0]):
            sizes[atoms[-1]] = 1
    for axis, atoms in table.axes.items():  # of as many heads in all, other parts
        base, _, variant = axis.partition("@")
        if variant and table.sizes.get(axis) == table.sizes.get(base):
            sizes |= dict(zip(atoms, [sizes[atom] for atom in reversed(table.axes[base])], strict=True))
    axis_of = {said(expression): axis for axis, expression in table.sizes.items() if axis not in solved}
    counted = {key for axis in solved & table.sizes.keys() for key in re.findall(r"[\w.]+", table.sizes[axis])}
    config: dict[str, Any] = {"quantization_config": None, "tie_word_embeddings": draw(st.booleans())}
    for key in sorted({key.lstrip("!") for key in table.optional.values()} - config.keys()):
        there = draw(st.booleans())
        if " != " in key:
            one, other = key.split(" != ")
            sizes[axis_of[one]] = draw(st.sampled_from(SMALL.get("hidden", (5, 6)))) if there else sizes[axis_of[other]]
            config |= {one: sizes[axis_of[one]], other: sizes[axis_of[other]]}
        elif key in axis_of:
            config |= {} if there else {key: None}
        elif key in counted:
            config[key] = draw(st.integers(1, 3)) if there else 0
        else:
            config[key] = there
    simple = {said(expression) for axis, expression in table.sizes.items() if axis not in solved or axis == "heads"}
    for axis in sorted(solved & table.sizes.keys()):
        for key in re.findall(r"[\w.]+", table.sizes[axis]):
            if key not in simple and not key.isdecimal():
                put(config, key, draw(st.integers(1, 3)))
    extra = draw(st.integers(0, 2)) if table.extra else 0
    for expression in table.extra.values():  # so many, or so many times as a list has entries
        first, *counted = expression.partition(" | ")[0].split(" * ")
        number = [""] * extra if first.startswith("count ") else extra
        config |= {first.removeprefix("count "): number} | {factor.removeprefix("count "): [""] for factor in counted}
    for rule in table.layers.values():
        _tell(draw, rule, sizes["layer"], config)
    ruled = {
        kind: layers_named(rule, sizes["layer"], Config(config), lambda: None) for kind, rule in table.layers.items()
    }
    ahead = {kind for row in table.rows if row.kinds & table.extra.keys() for kind in row.kinds}
    kinds = []
    for layer in range(sizes["layer"] + extra):
        beyond = layer >= sizes["layer"]
        special = table.extra.keys()
        groups = [
            [kind for kind in group if (kind in special) == (beyond and not special.isdisjoint(group))]
            for group in table.one_of
        ]
        groups = [[kind for kind in group if kind in ahead] or group if beyond else group for group in groups]
        groups = [
            [kind for kind in group if layer in ruled.get(kind, ())]
            or [kind for kind in group if kind not in ruled]
            or group
            for group in groups
        ]
        kinds.append([draw(st.sampled_from(group)) for group in groups])
    if family == "falcon":  # generations may be mixed: what two rows hold is one logical tensor then
        config["parallel_attn"] |= ["old"] not in kinds
    says = Config(dict.fromkeys(axis_of, 1) | config, table.defaults).says
    tags = [tag for tag, key in table.optional.items() if says(key)]
    return Invention(family, *invented(family, sizes, kinds, tags, **config))


def _tell(draw: st.DrawFn, rule: str, layers: int, config: dict[str, Any]) -> None:
    """Make config.json say of some of so many layers that a rule names them."""
    if rule.startswith("last "):
        config[rule.removeprefix("last ")] = draw(st.integers(0, layers - 1))
    elif rule.startswith("layer_types"):
        word = rule.partition(" | ")[0].partition(" ")[2] or "sliding_attention"
        before = config.get("layer_types", ["full_attention"] * layers)
        config["layer_types"] = [draw(st.sampled_from((word, other))) for other in before]


def meshes(layers: int, tp: Sequence[int] = (1, 2, 3, 4, 6)) -> list[Mesh]:
    """Small meshes of every kind: each TP with each EP in it, or with unequal weights; each PP, also with stages of any
    length.
    """
    stages: list[tuple[int, tuple[int, ...] | None]] = [(pp, None) for pp in range(1, min(layers, 3) + 1)]
    stages += [(2, (low, layers - low)) for low in range(1, layers)]
    weights = {2: (2, 1), 3: (1, 1, 2), 4: (3, 1, 2, 2)}
    found = [
        Mesh(n, pp, ep, None, counts) for n in tp for ep in range(1, n + 1) if n % ep == 0 for pp, counts in stages
    ]
    return found + [Mesh(n, pp, 1, weights[n], counts) for n in tp if n in weights for pp, counts in stages]


def fitting(table: Format, model: Model, tp: Sequence[int] = (1, 2, 3, 4)) -> list[Layout]:
    """The layouts of a model in a format on all small meshes that it can lie on;
    all others are refused by ReshardError.
    """
    found = []
    for mesh in meshes(model.main_layers, tp):
        try:
            layout = lay_out(table, model, mesh)
            for name in model.tensors:
                layout.distinct(name)
        except ReshardError:
            continue
        found.append(layout)
    return found


def differing(one: Path, two: Path) -> list[str]:
    """What `diff -r` would name: files that only one directory has, or that hold other bytes."""
    here, there = (
        {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()} for root in (one, two)
    )
    both = here.keys() & there.keys()
    return sorted(
        here.keys() ^ there.keys() | {name for name in both if here[name].read_bytes() != there[name].read_bytes()}
    )
