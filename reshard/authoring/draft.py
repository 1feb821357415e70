"""A starter table for a family that has none, inferred from headers, config.json and tensors of similar names
elsewhere.

What is filled in is a guess that the shapes agree with; what could not be guessed is a comment that begins with TODO.
Where transformers is installed, its own plan for tensor parallelism is a second opinion on what is cut. Prints nothing,
writes nothing.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..checkpoints.published import Published
from ..errors import ReshardError
from ..inputs import decode
from ..model.naming import settle
from ..model.sizes import axes_of
from ..model.understand import Config, understand
from ..tables import families, formats, wrappers
from ..tables.families import Family
from ..tables.notation import parse_pattern
from .similar import Found, Meaning, Sizes, buffers, by_likeness, fits, found_in, free, meanings

OPEN = "TODO"


@dataclass(frozen=True)
class Draft:
    """The text of the table; how many folded names it explains, and those that it does not."""

    text: str
    filled: int
    open: tuple[str, ...]
    like: str | None = None
    doubts: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    def words(self) -> str:
        """What is left to do, in a line or two."""
        if self.towers:
            return (
                f'the language model is as in "{self.like}"; whole on the first stage: '
                f"{', '.join(self.towers)}; next: reshard check-table"
            )
        if self.like:
            return f'every tensor is as in "{self.like}": describe the model in [model], then run reshard check-table'
        todo = f"{len(self.open)} left to fill in ({OPEN})" if self.open else "none left to fill in"
        doubts = f"; transformers splits {len(self.doubts)} rows differently" if self.doubts else ""
        return f"{self.filled} tensor names filled in, {todo}{doubts}; review every row, then run reshard check-table"

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.text,
            "filled": self.filled,
            "open": list(self.open),
            "like": self.like,
            "doubts": list(self.doubts),
            "towers": list(self.towers),
        }


def draft(published: Published) -> Draft:
    """A starter table for a published checkpoint, whether or not a shipped one fits it."""
    name = _name(published.config)
    found = found_in(published)
    alike = _alike(published, found) or _around(published, found)
    if alike is not None:
        return alike
    order = by_likeness(found)
    sizes = _sizes(published.config, order)
    aside = [each for each in found if each.end in buffers()]
    rows, unknown = [], []
    used: dict[str, set[int | None]] = defaultdict(set)
    for each in found:
        if each in aside:
            continue
        meaning = next((m for m in meanings(each, order) if fits(m, each, sizes) and free(m, each, used)), None)
        if meaning is None:
            unknown.append(each)
            continue
        for leaf in meaning.leaves.split():
            used[leaf].update(each.layers if each.layers is not None else (None,))
        rows.append((each, meaning))
    words, one_of, extra = _kinds([each for each, _ in rows], sizes.get("layer"), published.config)
    doubts = tuple(_doubts(rows, published.config))
    text = "\n".join(_lines(name, published.config, rows, aside, unknown, words, one_of, extra, sizes, doubts)) + "\n"
    return Draft(text, len(rows) + len(aside), tuple(each.folded for each in unknown), None, doubts)


def _name(config: Config) -> str:
    name = config.model_type or "mine"
    return f"{name}_draft" if name in families.shipped() else name


# --- sizes ------------------------------------------------------------------------------------------------------------


def _expressions(order: Iterable[str]) -> dict[str, list[str]]:
    """Axis → the config keys that shipped tables have for it, those of the tables most alike first."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name in order:
        for axis, expression in families.load(name).sizes.items():
            found[axis].update((word.strip(), None) for word in expression.split("|"))
    return {axis: list(keys) for axis, keys in found.items()}


def _sizes(config: Config, order: Iterable[str]) -> Sizes:
    sizes: Sizes = {}
    for axis, keys in _expressions(order).items():
        for key in keys:
            try:
                value = config.size(key)
            except ReshardError:
                continue
            if value is not None:
                sizes.setdefault(axis, value)
    if {"heads", "kv"} <= sizes.keys() and sizes["kv"] and sizes["heads"] % sizes["kv"] == 0:
        sizes["group"] = sizes["heads"] // sizes["kv"]
    return sizes


def _said(config: Config, axes: Iterable[str], order: list[str]) -> Iterator[str]:
    keys = _expressions(order)
    for axis in axes:
        there = []
        for key in keys.get(axis, ()):
            try:
                there += [key] if config.size(key) is not None else []
            except ReshardError:
                continue
        if there:
            yield f'{_quoted(axis)} = "{there[0]}"'
        elif axis not in ("group", "layer"):
            yield f"# {OPEN} {axis}: solved from the shapes; give its key in config.json, if there is one"


def _quoted(key: str) -> str:
    return key if key.replace("_", "a").isalnum() else f'"{key}"'


# --- layers -----------------------------------------------------------------------------------------------------------


def _kinds(
    rows: list[Found], main: int | None, config: Config
) -> tuple[dict[str, str], list[list[str]], dict[str, str]]:
    """For folded names that are not in all layers a word; the sets of kinds; and extra layers."""
    everywhere = {layer for each in rows for layer in each.layers or ()}
    beyond = {layer for layer in everywhere if main is not None and layer >= main}
    groups: dict[tuple[int, ...], list[Found]] = defaultdict(list)
    for each in rows:
        if each.layers is not None and set(each.layers) != everywhere:
            groups[each.layers].append(each)
    words: dict[str, str] = {}
    one_of: list[list[str]] = []
    extra: dict[str, str] = {}
    named: set[str] = set()
    for layers, members in groups.items():
        if beyond and set(layers) == beyond:
            kind = "mtp"
            key = next(
                (
                    k
                    for k, v in config.data.items()
                    if v == len(beyond) and ("mtp" in k or "nextn" in k or "predict" in k)
                ),
                None,
            )
            extra = {"mtp": key or OPEN}
        else:
            kind = (
                "moe"
                if any("expert" in each.folded for each in members)
                else "dense"
                if any(".mlp." in each.folded for each in members)
                else "kind"
            )
        while kind in named:
            kind += "_too"
        named.add(kind)
        words |= {each.folded: kind for each in members}
        rest = tuple(sorted(everywhere - set(layers)))
        partner = next((words[each.folded] for each in groups.get(rest, ()) if each.folded in words), None)
        if partner is None:
            one_of.append([kind] if rest in groups else [kind, f"no_{kind}"])
        else:
            next(group for group in one_of if partner in group).append(kind)
    return words, one_of, extra


# --- a second opinion -------------------------------------------------------------------------------------------------


def _tp_plan(model_type: str | None) -> dict[str, str]:
    """transformers' plan for tensor parallelism of a model type, or nothing: end of a module's name → colwise,
    rowwise.
    """
    if model_type is None or find_spec("transformers") is None:
        return {}
    try:
        config = import_module("transformers").CONFIG_MAPPING[model_type]
        plan = getattr(config, "base_model_tp_plan", None) or {}
        return {name.rpartition("*.")[2]: str(way) for name, way in plan.items()}
    except Exception:  # whatever another library does at import must not keep us from drafting
        return {}


def _doubts(rows: Iterable[tuple[Found, Meaning]], config: Config) -> Iterator[str]:
    """Where transformers cuts the other dimension than the row does."""
    plan = _tp_plan(config.inner_type or config.model_type)
    cut = {axis for axes in formats.load("native").cut.values() for axis in axes} | {"kv", "group"}
    for each, meaning in rows:
        way = plan.get(each.end.removesuffix(".weight"))
        dims = parse_pattern(meaning.pattern, {}).dims
        if way is None or len(dims) != 2:
            continue
        column, row = (bool(axes_of(dim) & cut) for dim in dims)
        if ("colwise" in way and not column) or ("rowwise" in way and not row):
            yield f'{each.name}: transformers splits it {way}, this row says "{meaning.pattern}"'


# --- text -------------------------------------------------------------------------------------------------------------


HEAD = """# Drafted by `reshard inspect --draft-table`. What is filled in agrees with config.json and the shapes, but
# k and v, gate and up, or two norms have the same shapes. Review every row; `reshard check-table` and `reshard verify`
# say how far to trust it. docs/notation.md describes the notation, docs/vocabulary.md lists the logical names."""


def _alike(published: Published, found: list[Found]) -> Draft | None:
    """A table that is like a shipped one, where that explains every tensor as it is, or behind another prefix."""
    stored = {name: entry for name, (_, entry) in published.tensors.items()}
    for family in by_likeness(found)[:6]:
        for names in _respellings(found, families.load(family)):
            head = f'name = {_text_of(_name(published.config))}\nlike = "{family}"\n'
            text = (
                head
                + (f"[names]\n{names}" if names else "")
                + "[model]\nruns = false                            # until its facts are known to hold\n"
            )
            try:
                understand(families.parse(text, "draft", _text), published.config, stored)
            except ReshardError:
                continue
            note = f'# Every tensor has the same name and shape as in "{family}".'
            return Draft(f"{HEAD}\n{note}\n{text}", len(found), (), family)
    return None


def _around(published: Published, found: list[Found]) -> Draft | None:
    """A table like that of the language model's family, which config.json names, with whatever stands beside it as
    towers.
    """
    config, stored = published.config, {name: entry for name, (_, entry) in published.tensors.items()}
    wrapper = wrappers.wrapper_of(config, "*") if config.inner_type is not None else None
    if wrapper is None:
        return None
    own = settle(wrapper, stored, {}).claimed()
    inside = {start for name in own for start in _starts(name)}
    towers = tuple(
        sorted(
            {next((s for s in _starts(each.folded) if s not in inside), "") for each in found if each.folded not in own}
        )
    )
    about = decode.toml_of(wrapper.texts[wrapper.name], wrapper.name)
    spelled = {
        start: [o for o in others if any(each.name.startswith(o) for each in found)]
        for start, others in about["names"].items()
    }
    text = f'name = {_text_of(_name(config))}\nlike = "{about["like"]}"\n'
    text += (
        f"towers = {json.dumps(towers)}  # stored whole on the first stage: is any of them part of the "
        f"language model?\n[names]\n"
    )
    text += "".join(f"{json.dumps(start)} = {json.dumps(others)}\n" for start, others in spelled.items() if others)
    text += "".join(["[defaults]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in about["defaults"].items())])
    try:
        understand(families.parse(text, "draft", _text), config, stored)
    except ReshardError:
        return None
    return Draft(f"{HEAD}\n{text}", len(found), (), about["like"], (), towers)


def _starts(name: str) -> tuple[str, ...]:
    """What a tower may be called to which a name belongs: its first word, its first two."""
    words = name.split(".")
    return tuple(".".join(words[:count]) for count in (1, 2) if len(words) >= count)


def _respellings(found: Iterable[Found], table: Family) -> Iterator[str]:
    yield ""
    row = next((row for row in settle(table, {}, {}).rows if "{layer}" in row.name.text), None)
    if row is not None:
        usual = row.name.text.partition("{layer}")[0]
        for start in sorted({each.name.partition("{layer}")[0] for each in found if "{layer}" in each.name} - {usual}):
            yield (
                f'"{usual.rpartition("layers.")[0]}" = ["{start.rpartition("layers.")[0]}"]\n'
                if usual.endswith("layers.")
                else ""
            )


def _text(name: str) -> str:
    return families.load(name).texts[name]


def _lines(
    name: str,
    config: Config,
    rows: list[tuple[Found, Meaning]],
    aside: list[Found],
    unknown: list[Found],
    words: Mapping[str, str],
    one_of: list[list[str]],
    extra: Mapping[str, str],
    sizes: Sizes,
    doubts: Iterable[str],
) -> Iterator[str]:
    leaves = {leaf for _, meaning in rows for leaf in meaning.leaves.split()}
    yield HEAD
    yield f"name = {_text_of(name)}"
    lone = "head" if "embed" in leaves and "head" not in leaves else ""
    if lone or {"head", "embed"} <= leaves:
        yield 'tied = { head = "embed" }'
    if one_of:
        yield f"one_of = {[list(group) for group in one_of]}".replace("'", '"')
    for kind, key in extra.items():
        yield f'extra = {{ {kind} = "{key}" }}'
    if aside:
        yield f"aside = {[each.name for each in aside]}".replace("'", '"')
    yield "rows = ["
    one = max((len(each.name) for each, _ in rows), default=0) + 3
    two = max((len(meaning.pattern) for _, meaning in rows), default=0) + 3
    for each, meaning in sorted(rows, key=lambda pair: (pair[0].layers is not None, pair[0].name)):
        word = f', "{words[each.folded]}"' if each.folded in words else ""
        first, second = f"{_text_of(each.name)},", f'"{meaning.pattern}",'
        yield f' [{first:<{one}} {second:<{two}} "{meaning.leaves}"{word}],'
    if lone:
        yield ' ["lm_head.weight", "vocab hidden", "head"],   # not stored: tied'
    plan = _tp_plan(config.inner_type or config.model_type)
    for each in unknown:
        yield f" # {OPEN} {each.count} tensors {list(each.shape)}: what are they?{_in_words(each, sizes, plan)}"
        yield f' # [{_text_of(each.name)}, "{_guess(each, sizes)}", "?"],'
    yield "]"
    for doubt in doubts:
        yield f"# {OPEN} {doubt}"
    axes = {axis for each, m in rows for axis in each.axes} | {
        axis for _, m in rows for dim in parse_pattern(m.pattern, {}).dims for axis in axes_of(dim)
    }
    order = by_likeness([each for each, _ in rows])
    yield "[sizes]"
    yield from _said(config, sorted(axes | {"layer"}), order)
    if {"heads", "kv"} <= axes:
        yield '[axes]\nheads = "kv group"                      # a head is a group member of a KV head'
    kept = [leaf for leaf in ("attn.k", "attn.v", "attn.kv_a", "attn.k_rope") if leaf in leaves]
    yield f"[model]\ncache = {kept}".replace("'", '"')
    yield "runs = false                            # until its facts are there: docs/notation.md"


def _text_of(name: str) -> str:
    """A name as a string of TOML."""
    return json.dumps(name, ensure_ascii=False)


def _in_words(each: Found, sizes: Sizes, plan: Mapping[str, str]) -> str:
    some = [
        f"{size} is {' or '.join(sorted(axis for axis, n in sizes.items() if n == size)[:3])}"
        for size in each.shape
        if size in sizes.values()
    ]
    way = plan.get(each.end.removesuffix(".weight"))
    some += [f"transformers splits it {way}"] if way else []
    return f" {', '.join(some)}" if some else ""


def _guess(each: Found, sizes: Sizes) -> str:
    """A pattern by sizes alone; what is of no known size is `?`."""
    by_size = {size: axis for axis, size in reversed(sizes.items()) if axis not in ("layer", *each.axes)}
    if {"heads", "head_dim"} <= sizes.keys():
        by_size.setdefault(sizes["heads"] * sizes["head_dim"], "(heads head_dim)")
    if {"kv", "head_dim"} <= sizes.keys():
        by_size.setdefault(sizes["kv"] * sizes["head_dim"], "(kv head_dim)")
    return " ".join(by_size.get(size, "?") for size in each.shape)
