"""Made-up checkpoints: random ones that have every row of a family table, made from the table alone.

No matrix is square and no two axes are of one size, unless the table forces it.
"""

import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..containers import safetensors
from ..errors import ReshardError
from ..inputs.limits import numeral
from ..model.naming import settle
from ..model.sizes import axis_size
from ..tables import expression
from ..tables.config import Config
from ..tables.families import Family
from ..tables.notation import Pattern, bases, block_of
from ..tables.row import Row
from .mutations import Data

# Sizes of the axes that families know, all different; a head is wide enough for a quarter of it to be rotated in pairs.
_SMALL = {
    "layer": 2,
    "kv": 4,
    "group": 3,
    "heads": 8,
    "head_dim": 16,
    "hidden": 56,
    "inter": 44,
    "vocab": 131,
    "pos": 72,
}
_SMALL |= {"experts": 6, "routes": 6, "moe_inter": 20, "q_lora": 36, "kv_lora": 28, "rope_dim": 12, "nope_dim": 10}
_SMALL |= {"index_heads": 9, "index_dim": 26, "o_groups": 4, "o_heads": 3, "o_lora": 18, "streams": 3}
_SMALL |= {"lk": 8, "lgroup": 3, "lk_dim": 14, "lv_dim": 18, "kernel": 5}
_SMALL |= {"ssm_groups": 8, "ssm_group": 3, "ssm_dim": 14, "ssm_state": 18, "dt_rank": 9}
# The same where weights have scales per block: two ranks cut between blocks, what is not cut may end within one.
_BLOCKED = {
    "layer": 2,
    "heads": 4,
    "head_dim": 384,
    "hidden": 160,
    "inter": 1024,
    "vocab": 131,
    "experts": 5,
    "routes": 5,
}
_BLOCKED |= {
    "moe_inter": 256,
    "q_lora": 380,
    "kv_lora": 300,
    "rope_dim": 192,
    "nope_dim": 320,
    "kv": 4,
    "group": 3,
    "index_dim": 224,
}
_BLOCKED |= {"o_groups": 2, "o_heads": 2, "o_lora": 128}
_FREE = (22, 26, 34, 38, 46, 50, 58, 62, 68, 74, 76, 82, 86, 92, 94)  # for axes that nobody knows
_NUMBERS = {"top": 2, "index_top": 9}  # of facts that config.json must have
LARGEST, MOST = 1 << 20, 1 << 26  # size of an axis; elements of a checkpoint
_TURNED = 6  # features of a head that are rotated
_SHARED = 3  # what a factor of a size gets that is no axis: shared experts


def made_up(table: Family, where: Path) -> Iterator[Path]:
    """Random checkpoints of a family from its table alone, one directory for each set of optional rows, until every row
    is in one.

    Where rows have several layouts, until each has been in one in every layout. Raises ReshardError where the table
    makes none.
    """
    covered: set[tuple[int, Pattern]] = set()
    layouts = range(1 + max((len(row.layouts) for row in table.rows), default=0))
    for number, (layout, truths) in enumerate(itertools.product(layouts, _variants(table))):
        rows = (row._replace(pattern=((row.pattern, *row.layouts)[: layout + 1])[-1], layouts=()) for row in table.rows)
        try:
            config, shapes = _invented(replace(table, rows=tuple(rows)), truths)
        except ReshardError as error:
            raise _none(table, error.message) from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a table may say anything
            raise _none(table, f"what it says of sizes, kinds or config keys makes no sense: {error!r}") from None
        active = {(at, row.pattern) for at, row, _ in shapes}
        if active <= covered:
            continue
        covered |= active
        directory = where / f"variant-{number}"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        _fill(table, shapes, directory / "model.safetensors")
        yield directory
    if not covered:
        raise _none(table, "it has no rows, or none in any layer")


def _none(table: Family, why: str) -> ReshardError:
    return ReshardError(
        f'family "{table.name}": cannot generate a synthetic checkpoint from its table: {why}',
        "docs/notation.md shows the form of every key",
    )


def _variants(table: Family) -> list[dict[str, bool]]:
    """Truths of the config keys that optional rows are bound to: those that most rows want, then what the rest of the
    rows wants.
    """
    wants: dict[str, Counter[bool]] = {}
    for row in table.rows:
        for tag in row.tags:
            if (key := table.optional.get(tag)) is not None:
                wants.setdefault(key.lstrip("!"), Counter())[not key.startswith("!")] += 1
    usual = {key: found[True] >= found[False] for key, found in wants.items()}
    # block scales make everything large: only for their own rows
    usual |= {key: False for key in usual if _of_quantization(key)}
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


# row, and its stored tensors: name, dtype, shape
Shaped = list[tuple[int, Row, list[tuple[str, str, tuple[int, ...]]]]]


def _invented(table: Family, truths: Mapping[str, bool]) -> tuple[Data, Shaped]:
    """config.json, and every stored tensor."""
    tags = {tag for row in table.rows for tag in row.tags}
    tags = {
        tag
        for tag in tags
        if (key := table.optional.get(tag)) is None or truths[key.lstrip("!")] != key.startswith("!")
    }
    rows = [(at, row) for at, row in enumerate(table.rows) if row.tags <= tags]
    if empty := next((axis for axis, atoms in table.axes.items() if not atoms), None):
        raise ReshardError(f'[axes] {empty} = "" has no parts')
    kinds = _kinds(table)
    extra = sum(not table.extra.keys().isdisjoint(kind) for kind in kinds)
    if extra == len(kinds):
        raise ReshardError(f"one_of = {list(map(list, table.one_of))} leaves no kind for the layers that are not extra")
    config, sizes = _sized(table, [row for _, row in rows], truths, 2 * (len(kinds) - extra))
    _check(table, [row for _, row in rows], sizes)
    main = sizes["layer"]
    table = settle(table, {}, sizes)
    rows = [(at, table.rows[at]) for at, _ in rows]
    plain = len(kinds) - extra
    late = {kind for kind, rule in table.layers.items() if rule.startswith(("last ", "from "))}
    usual = sorted(itertools.islice(itertools.cycle(kinds[:plain]), main), key=lambda mine: bool(late & set(mine)))
    usual = _placed(table, usual)
    config |= _naming_layers(table, usual)
    kinds = [*usual, *kinds[plain:]]
    for key in table.extra.values():  # so many, or so many times as a list has entries
        first, *counted = (factor.strip() for factor in _first(key).split("*"))
        said = [""] * extra if first.startswith("count ") else extra
        config |= {first.removeprefix("count "): said} | {factor.removeprefix("count "): [""] for factor in counted}
    shapes: Shaped = []
    elements = 0
    leaves = {leaf for _, row in rows for leaf in row.leaves}
    for at, row in rows:
        shape = row.pattern.measure(lambda _, axis: axis_size(axis, sizes))[0]
        dtype = "F8_E4M3" if any(f"{leaf}_scale" in leaves for leaf in row.leaves) else "F32"
        dtype = "I32" if any(leaf.endswith("_packed") for leaf in row.leaves) else dtype
        ranges: list[Sequence[int]] = []
        for axis in row.name.axes:
            if axis == "layer":
                apart = table.counts_apart
                ranges.append(
                    [
                        n
                        for n in range(main + extra)
                        if row.within(set(kinds[n])) and (not apart or row.name.extra == (n >= main))
                    ]
                )
            else:
                ranges.append(range(sizes[axis]))
        elements += math.prod(map(len, ranges)) * math.prod(shape)
        if elements > MOST:
            raise ReshardError(f"the sizes that it fixes give more than {MOST} elements")
        names = [
            row.name.name(dict(zip(row.name.axes, numbers, strict=True))) for numbers in itertools.product(*ranges)
        ]
        if names:
            shapes.append((at, row, [(name, dtype, shape) for name in names]))
    return config, shapes


def _check(table: Family, rows: Iterable[Row], sizes: Mapping[str, int]) -> None:
    """Every axis of these rows has a size that files can have."""
    needed = {"layer"} | bases(axis for row in rows for path in row.pattern.axes for axis in (*row.name.axes, *path))
    for axis in sorted(needed, key=lambda axis: (axis not in table.sizes, axis)):  # what follows from others last
        what = f'axis {axis} ([sizes] {axis} = "{table.sizes[axis]}")' if axis in table.sizes else f"axis {axis}"
        if axis not in sizes:
            raise ReshardError(f"{what} has no size, whatever config.json says")
        if not 1 <= sizes[axis] <= LARGEST:
            raise ReshardError(f"{what} has size {sizes[axis]}, expected 1 to {LARGEST}")


def _placed(table: Family, kinds: list[list[str]]) -> list[list[str]]:
    """Kinds for each layer in this order, if they can stand there: names that count in steps have none for the layers
    between.
    """
    counting = [row for row in table.rows if row.name.steps and (row.kinds or row.either)]
    left, found = list(kinds), []
    for layer in range(len(kinds)):
        fits = [
            mine
            for mine in (*left, *kinds)
            if all(row.name.counts("layer", layer) for row in counting if row.within(set(mine)))
        ]
        found.append(fits[0])
        if fits[0] in left:
            left.remove(fits[0])
    return found


def _kinds(table: Family) -> list[list[str]]:
    """Kinds of layers: each combination, and extra ones last, two at least, of kinds that have rows there,
    or else of the last.
    """
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


def _naming_layers(table: Family, kinds: Sequence[Sequence[str]]) -> Data:
    """What config.json must say so that the rules of kinds name the layers that are of them; one list may say it of
    several.
    """
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


def _first(text: str) -> str:
    return text.split("|")[0].strip()


def _sized(table: Family, rows: Sequence[Row], truths: Mapping[str, bool], layers: int) -> tuple[Data, dict[str, int]]:
    """config.json and the sizes of all axes."""
    axes = {axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)}
    blocks = {axis for axis in axes if block_of(axis)}
    bases = {base for axis in blocks for base in (block_of(axis) or ((), 0))[0]}
    known = _BLOCKED if any(block_of(axis) for row in rows for path in row.pattern.axes for axis in path) else _SMALL
    config: Data = {"model_type": table.name, "tie_word_embeddings": False}
    sized = {key for text in table.sizes.values() for key in expression.parse(_first(text)).keys}
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
    free = itertools.chain(_FREE, itertools.count(_FREE[-1] + 4, 4))  # none of those known
    sizes: dict[str, int] = {}
    composite = {axis for axis, text in table.sizes.items() if re.search(r"[+*]", _first(text))}
    by_key: dict[str, str] = {}
    for axis in sorted((axes | {"layer"}) - blocks | bases, key=lambda axis: (axis not in _SMALL, axis)):
        if axis in composite or axis in table.axes:
            continue
        if (plain := numeral(table.sizes.get(axis, ""))) is not None:
            sizes[axis] = plain
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
            if isinstance(whole, int):  # else it is refused below, when the size is evaluated
                sizes[atoms[-1]] = whole // max(1, math.prod(sizes[atom] for atom in atoms[:-1]))
    for axis in sorted(composite):
        for key in expression.parse(_first(table.sizes[axis])).keys:
            config.setdefault(key, _SHARED if "*" in table.sizes[axis] else _SMALL.get(axis, _SHARED))
    for key in (key for key, truth in truths.items() if " != " in key and not truth):
        config[key.partition(" != ")[0]] = config.get(key.partition(" != ")[2])
    asked = Config(_nested(config), table.defaults)
    for axis, text in table.sizes.items():
        value = asked.size(text)
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
        if fact in ("groups", "group_top") and re.fullmatch(r"[A-Za-z_]\w*", key):
            config.setdefault(key, 1)  # whatever it is where it is left out: so few experts are in no groups
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
            if not isinstance(place, dict):
                raise ReshardError(f"{section} is a section of config.json in {key}, but a value elsewhere")
        place[last] = value
    return found


def _fill(table: Family, shapes: Shaped, path: Path) -> None:
    """Write all tensors, filled with noise that keeps activations near one, nothing constant, no two rows equal."""
    flat = {name: (row, dtype, shape) for _, row, stored in shapes for name, dtype, shape in stored}
    prologue, found = safetensors.build(
        [(name, dtype, shape) for name, (_, dtype, shape) in flat.items()], {"format": "pt"}
    )
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
