"""Tables: rules as data. A family table says what one architecture's published tensors mean; a format table how an engine stores them.

Reads TOML (docs/notation.md) into frozen rows. Knows nothing about checkpoints, sizes or meshes.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ..errors import PlaceError, ReshardError
from ..inputs import decode, limits
from .config import Config
from .notation import Pattern, Template, bases, parse_pattern, parse_template, variant_of, varied

STAGES = ("first", "last", "every")
HOME = Path(__file__).parent.parent  # families/, formats/, wrappers/
BASE = "_base"  # ends the name of the table of a base model


class Row(NamedTuple):
    """One stored tensor, or a regular set of them: its name, how it is laid out, and the logical tensors it holds."""

    name: Template
    pattern: Pattern
    leaves: tuple[str, ...]
    others: tuple[Template, ...] = ()  # other spellings of the name
    layouts: tuple[Pattern, ...] = ()  # other patterns, told apart by the shape
    kinds: frozenset[str] = frozenset()  # of `one_of`
    either: tuple[frozenset[str], ...] = ()  # of each of these, one kind
    tags: frozenset[str] = frozenset()  # ending in ?
    stage: str = "every"
    whole: bool = False  # ignores tensor parallelism
    zero: bool = False  # content on coordinate 0, zeros elsewhere
    cut: str | None = None  # cut this axis instead
    tower: str = ""  # which other tower it belongs to: not of the language model, carried whole

    def within(self, kinds: Set[str]) -> bool:
        """Whether a layer of these kinds has this row."""
        return self.kinds <= kinds and all(one & kinds for one in self.either)


class Constant(NamedTuple):
    """A scalar that an engine wants and no checkpoint has; one per layer of the logical tensor `beside`."""

    name: Template
    dtype: str
    value: float
    beside: str


@dataclass(frozen=True)
class Table:
    """A table as written, with `like` and compounds resolved. `texts`: every TOML text it was read from, by name."""

    name: str
    rows: tuple[Row, ...]
    texts: dict[str, str] = field(compare=False, default_factory=dict)
    match: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    aside: tuple[Template, ...] = ()
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # compounds
    sizes: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # facts of the architecture for the runtime and for capacity
    one_of: tuple[tuple[str, ...], ...] = ()
    layers: dict[str, str] = field(default_factory=dict)  # kind → the rule by which config.json names its layers
    optional: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)  # kind of the layers beyond `layer` → config key with their number
    tied: dict[str, str] | str = field(default_factory=dict)
    towers: tuple[str, ...] = ()  # a family: what the names of other towers begin with; a format: the stage that stores them whole
    quantization: tuple[dict[str, Any], ...] = ()
    # formats only
    cut: dict[str, tuple[str, ...]] = field(default_factory=dict)
    replicate: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()
    weighted: tuple[str, ...] = ()
    pad: dict[str, str] = field(default_factory=dict)
    constants: tuple[Constant, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether the facts that a decoder needs are there."""
        return "cache" in self.model and self.model.get("runs") is not False

    @property
    def around(self) -> str:
        """Of a table with other towers, the family of its language model, where that has a table of its own."""
        return next(iter([*self.texts][1:]), "") if self.towers else ""

    @property
    def counts_apart(self) -> bool:
        """Whether extra layers have names of their own."""
        return any(row.name.extra for row in self.rows)

    def leaves(self) -> set[str]:
        """The logical tensors that its rows hold, without their variants."""
        return {leaf.partition("@")[0] for row in self.rows for leaf in row.leaves}

    def claimed(self) -> set[str]:
        """The names, folded, that its rows and `aside` have; those of other towers left out."""
        return {template.folded for template in (*(row.name for row in self.rows if not row.tower), *self.aside)}

    def for_family(self, family: str) -> "Table":
        """This format as it stands for one family: the rows and words of `[family.X]` are tried before the common ones."""
        if self.families and family not in self.families:
            raise ReshardError(
                f'format "{self.name}" has no names for family "{family}"; it has them for {", ".join(self.families)}',
                "convert --to native works for every family",
            )
        special = self.overrides.get(family)
        if special is None:
            return self
        other = _parse(_checked({**special, "name": self.name}, f'table "{self.name}", [family.{family}]'), {}, self.axes)
        return replace(
            self,
            rows=other.rows + self.rows,
            constants=other.constants or self.constants,
            tied=other.tied or self.tied,
        )

    def refined(self, other: "Table") -> "Table":
        """The same table with the compounds of another written out too: two layouts meet at the atoms of both."""
        new = {name: atoms for name, atoms in other.axes.items() if name not in self.axes}
        if not new:
            return self
        rows = tuple(
            row._replace(pattern=row.pattern.refined(new), layouts=tuple(pattern.refined(new) for pattern in row.layouts))
            for row in self.rows
        )
        return replace(self, rows=rows, axes=self.axes | new, sizes=other.sizes | self.sizes)

    def varied(self, tensors: Mapping[str, tuple[str, ...]]) -> "Table":
        """This format with every row, and every word about axes, once more for each variant among `tensors` (name → axes)."""
        variants = sorted({variant_of(name) for name in tensors} - {""})
        if not variants:
            return self
        there = bases(axis for axes in tensors.values() for axis in axes)
        also_axes = sorted({variant_of(axis) for axis in there} - {""})

        def also(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for base in names for name in (base, *(varied(base, variant) for variant in also_axes)))

        rows = [other for row in self.rows for other in (row, *(_varied_row(row, variant, tensors) for variant in variants))]
        axes = {varied(name, v): tuple(varied(atom, v) for atom in atoms) for name, atoms in self.axes.items() for v in ("", *also_axes)}
        return replace(
            self,
            rows=tuple(row for row in rows if row is not None),
            axes={name: atoms for name, atoms in axes.items() if name in self.axes or set(atoms) <= there},
            cut={mesh: also(named) for mesh, named in self.cut.items()},
            replicate=also(self.replicate),
            uneven=also(self.uneven),
            pad={name: unit for axis, unit in self.pad.items() for name in also([axis])},
        )


def _varied_row(row: Row, variant: str, tensors: Mapping[str, tuple[str, ...]]) -> Row | None:
    """A format's row for the tensors of a variant, which may have axes of other sizes; None where there are no such tensors."""
    leaves = tuple(varied(leaf, variant) for leaf in row.leaves)
    if not all(leaf in tensors for leaf in leaves):
        return None
    own = {axis.partition("@")[0]: axis for axis in bases(axis for leaf in leaves for axis in tensors[leaf])}
    pattern, *layouts = [one.renamed(lambda axis: own.get(axis, axis)) for one in (row.pattern, *row.layouts)]
    return row._replace(pattern=pattern, layouts=tuple(layouts), leaves=leaves)


# The form of every key: [form] is a list of it, {"": form} a TOML table of it, a tuple says "one of".
_KEYS: dict[str, Any] = {
    "name": str,
    "like": str,
    "match": [str],
    "prefix": (str, [str]),
    "rows": [[str]],
    "without": [str],
    "aside": [str],
    "axes": {"": str},
    "sizes": {"": str},
    "defaults": {"": object},
    "model": {"": object},
    "one_of": [[str]],
    "layers": {"": str},
    "optional": {"": str},
    "extra": {"": str},
    "tied": (str, {"": str}),
    "towers": [str],
    "names": {"": [str]},
    "quantization": [{"": object}],
    "cut": {"": [str]},
    "replicate": [str],
    "uneven": [str],
    "weighted": [str],
    "pad": {"": str},
    "constants": [[object]],
    "files": {"": str},
    "engine": {"": object},
    "families": [str],
    "family": {"": {"": object}},
}
MESH = ("tp", "ep", "pp")
# The keys of [model].
_FACTS = {"cache", "window", "window_if", "window_layers", "norm", "norm_offset", "eps", "eps_latent", "activation", "routing"}
_FACTS |= {"gate_limit", "gate_alpha", "up_offset", "parallel", "alibi", "alibi_scaled", "rope_fraction", "rope_interleaved", "embed_scale"}
_FACTS |= {"attn_scale", "scale_by_layer", "attn_cap", "logit_cap", "runs", "bare", "rope_layers", "rope_near", "late_qk_norm", "growth"}
_FACTS |= {"rope_base", "bare_heads", "window_chunks", "index_top", "index_interleaved", "borrowed"}
_FACTS |= {"post_norm", "pos_offset", "rope_size", "head_norm"}
_FACTS |= {"attn_clip", "value_factor", "embed_factor", "residual_factor", "logit_factor", "attn_factor"}
_ROUTING = {"divide", "top", "score", "renormalize", "jitter", "scale", "groups", "group_top", "group_best", "weigh_input", "wide"}


def _checked(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The same data, if every key is known and of its form."""
    unknown = sorted(set(data) - _KEYS.keys())
    if unknown:
        raise ReshardError(f"{where}: unknown key {unknown[0]}", f"keys are {', '.join(sorted(_KEYS))}")
    for key, value in data.items():
        if said := decode.wrong(value, _KEYS[key], key):
            raise ReshardError(f"{where}: {said}", "docs/notation.md shows the form of every key")
    if odd := sorted(set(data.get("model", ())) - _FACTS):
        raise ReshardError(f"{where}: unknown key {odd[0]} in [model]", f"keys are {', '.join(sorted(_FACTS))}")
    routing = data.get("model", {}).get("routing", {})
    if not isinstance(routing, dict) or (odd := sorted(routing.keys() - _ROUTING)):
        wrong = f"key {odd[0]}" if isinstance(routing, dict) else "value"
        raise ReshardError(f"{where}: unknown {wrong} in [model] routing", f"keys are {', '.join(sorted(_ROUTING))}")
    if (count := len(data.get("rows", ()))) > limits.ROWS:
        raise ReshardError(f"{where}: {count} rows, at most {limits.ROWS} are read")
    for row in data.get("rows", ()):
        if not 3 <= len(row) <= 4:
            raise ReshardError(f'{where}: row {row!r} is not ["stored name", "pattern", "logical names", "words"]')
    return data


def _merged(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """`like`: the child first. Rows and keys are added to the parent's; a row of the same stored name replaces its."""
    child, *parents = texts
    for parent in parents:
        parent = _respelled(parent, child.get("names", {}))
        gone = [name for name in child.get("without", ()) if any(row[0] == name for row in parent.get("rows", ()))]
        parent = _without(parent, gone)
        merged = {key: value for key, value in parent.items() if key != "match"}  # what another table is for, this one is not
        for key, value in child.items():
            if isinstance(value, dict) and isinstance(parent.get(key), dict):
                merged[key] = {**parent[key], **value}
            elif key == "rows":
                names = {row[0] for row in value}
                first = {row[0]: at for at, row in reversed(list(enumerate(parent.get("rows", ()))))}
                own = {name: [row for row in value if row[0] == name] for name in names}
                kept = [
                    each
                    for at, row in enumerate(parent.get("rows", ()))
                    for each in ([row] if row[0] not in names else own[row[0]] if first[row[0]] == at else ())
                ]
                merged[key] = kept + [row for row in value if row[0] not in first]
            elif key in ("aside", "one_of", "towers"):
                merged[key] = [*parent.get(key, ()), *value]
            elif key == "without":
                merged[key] = [*parent.get(key, ()), *(name for name in value if name not in gone)]
            else:
                merged[key] = value
        child = merged
    if child.get("without"):
        raise ReshardError(f'table "{child.get("name")}": no table that it is like has the row {child["without"][0]}')
    return child


def _without(parent: dict[str, Any], gone: list[str]) -> dict[str, Any]:
    """A table without some of its rows, and without what it says of tags that only these had."""
    if not gone:
        return parent
    rows = [row for row in parent["rows"] if row[0] not in gone]
    words = {word for row in rows for word in (row[3] if len(row) > 3 else "").split()}
    return parent | {"rows": rows, "optional": {tag: key for tag, key in parent.get("optional", {}).items() if tag in words}}


def written(table: Table) -> dict[str, Any]:
    """A table as its author wrote it, as data, with `like` resolved."""
    return _merged(
        [{key: value for key, value in decode.toml_of(text, name).items() if key != "like"} for name, text in table.texts.items()]
    )


def _respelled(parent: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """The rows of a table whose names begin in other ways: `"model." = ["language_model.model.", "model.language_model."]`."""

    def spelled(text: str) -> list[str]:
        start = next((start for start in sorted(names, key=len, reverse=True) if text.startswith(start)), None)
        return [text] if start is None else [other + text[len(start) :] for other in names[start]]

    if not names:
        return parent
    found = dict(parent)
    prefix = parent.get("prefix", [])
    found["prefix"] = [other for text in ([prefix] if isinstance(prefix, str) else prefix) for other in spelled(text)]
    found["rows"] = [
        [" | ".join(other for text in row[0].split(" | ") for other in spelled(text)), *row[1:]] for row in parent.get("rows", ())
    ]
    found["aside"] = [other for text in parent.get("aside", ()) for other in spelled(text)]
    return found


def _atoms(axes: Mapping[str, str], where: str) -> dict[str, tuple[str, ...]]:
    """Compounds written out to the end: {"heads": "kv group"} → {"heads": ("kv", "group")}."""
    if len(axes) > limits.COMPOUNDS:
        raise ReshardError(f"{where}: {len(axes)} compound axes, at most {limits.COMPOUNDS} are read")
    parts = {name: text.split() for name, text in axes.items()}
    counts: dict[str, int] = {}

    def count(axis: str, seen: tuple[str, ...]) -> int:
        if axis in seen:
            raise ReshardError(f"{where}: compound axis {axis} contains itself")
        if axis not in counts:
            counts[axis] = sum(count(part, (*seen, axis)) for part in parts[axis]) if axis in parts else 1
        return counts[axis]

    for name in parts:
        if (atoms := count(name, ())) > limits.ATOMS:
            raise ReshardError(f"{where}: compound axis {name} stands for {atoms} axes, at most {limits.ATOMS} are allowed")

    def expand(axis: str) -> tuple[str, ...]:
        return tuple(atom for part in parts[axis] for atom in expand(part)) if axis in parts else (axis,)

    return {name: expand(name) for name in parts}


def _parse(data: dict[str, Any], texts: dict[str, str], axes: Mapping[str, tuple[str, ...]]) -> Table:
    name = data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ReshardError(f'table: name = {name!r} is no name (letters, digits, "_", "-", ".")')
    where = f'table "{name}"'
    _check_files(data.get("files", {}), where)
    try:
        compounds = {**axes, **_atoms(data.get("axes", {}), where)}
        one_of = tuple(tuple(kinds) for kinds in data.get("one_of", ()))
        extra = dict(data.get("extra", {}))
        kinds = {kind for group in one_of for kind in group}
        if missing := sorted(set(extra) - kinds):
            raise ReshardError(f"{where}: extra layers of kind {missing[0]}, which no set of one_of has")
        rows = tuple(_row(row, compounds, kinds, where) for row in data.get("rows", ()))
        compounds |= {
            varied(name, variant): tuple(varied(atom, variant) for atom in atoms)
            for variant in sorted({variant_of(axis) for axis in _bases(rows)} - {""})
            for name, atoms in tuple(compounds.items())
        }
        ruled = dict(data.get("layers", {}))
        if missing := sorted(set(ruled) - kinds):
            raise ReshardError(f"{where}: layers of kind {missing[0]}, which no set of one_of has")
        if twice := _doubled(rows, [set(group) for group in one_of if set(group) & ruled.keys() or _told(rows, group)]):
            raise ReshardError(f"{where}: {twice} has two rows")
        prefix = data.get("prefix", ())
        return Table(
            name=name,
            rows=rows,
            texts=texts,
            match=tuple(data.get("match", ())),
            prefixes=(prefix,) if isinstance(prefix, str) else tuple(prefix),
            aside=tuple(parse_template(text) for text in data.get("aside", ())),
            axes=compounds,
            sizes=dict(data.get("sizes", {})),
            defaults=dict(data.get("defaults", {})),
            model=dict(data.get("model", {})),
            one_of=one_of,
            layers=ruled,
            optional=dict(data.get("optional", {})),
            extra=extra,
            tied=data.get("tied", {}),
            towers=tuple(data.get("towers", ())),
            quantization=tuple(data.get("quantization", ())),
            cut={mesh: tuple(named) for mesh, named in data.get("cut", {}).items()},
            replicate=tuple(data.get("replicate", ())),
            uneven=tuple(data.get("uneven", ())),
            weighted=tuple(data.get("weighted", ())),
            pad=dict(data.get("pad", {})),
            constants=tuple(_constant(entry, where) for entry in data.get("constants", ())),
            files=dict(data.get("files", {})),
            engine=dict(data.get("engine", {})),
            families=tuple(data.get("families", ())),
            overrides=dict(data.get("family", {})),
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ReshardError(f"{where}: malformed: {error}", "docs/notation.md shows the form of every key") from None


def _doubled(rows: Iterable[Row], groups: Sequence[Set[str]]) -> str:
    """A stored name that two rows have in one layer, or nothing. `groups`: kinds of which each layer is known to have one."""
    seen: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name in (row.name, *row.others):
            if any(not _apart(row, other, groups) for other in seen[name.folded]):
                return name.folded
            seen[name.folded].append(row)
    return ""


def _told(rows: Sequence[Row], group: Sequence[str]) -> bool:
    """Whether every kind of a set shows itself in a layer by a tensor that layers of no other kind have."""
    count = Counter(name.folded for row in rows for name in (row.name, *row.others))
    telling = [row.kinds for row in rows if not row.tags and all(count[name.folded] == 1 for name in (row.name, *row.others))]
    return all(any(kind in kinds for kinds in telling) for kind in group)


def _apart(row: Row, other: Row, groups: Sequence[Set[str]]) -> bool:
    ours, theirs = (one.kinds.union(*one.either) for one in (row, other))
    return any(ours & group and theirs & group and not ours & theirs & group for group in groups)


def _bases(rows: Iterable[Row]) -> set[str]:
    return bases(axis for row in rows for path in row.pattern.axes for axis in (*row.name.axes, *path))


def _row(entry: list[str], compounds: Mapping[str, tuple[str, ...]], kinds: set[str], where: str) -> Row:
    text, pattern_text, leaves_text, *rest = entry
    words = rest[0].split() if rest else []
    try:
        name, *others = [parse_template(one, compounds) for one in text.split(" | ")]
        pattern, *layouts = [parse_pattern(one, compounds) for one in pattern_text.split(" | ")]
    except ReshardError as error:
        raise ReshardError(f"{where}: {error.message}", error.hint) from None
    leaves = tuple(leaves_text.split())
    for one in (pattern, *layouts):
        if len(leaves) != len(one.axes):
            raise ReshardError(
                f'{where}: {text}: pattern "{pattern_text}" has {len(one.axes)} leaves, {len(leaves)} logical names are given'
            )
    if len(set(leaves)) < len(leaves):
        raise ReshardError(f"{where}: {text}: a logical tensor is named twice")
    if odd := next((other for other in others if sorted(other.axes) != sorted(name.axes)), None):
        raise ReshardError(f"{where}: {odd.text} has other placeholders than {name.text}")
    both = [axis for axis in name.axes for one in (pattern, *layouts) for path in one.axes if axis in path]
    if both:
        raise ReshardError(f"{where}: {text}: axis {both[0]} stands both in the name and in the pattern")
    cut = next((word[4:] for word in words if word.startswith("cut=")), None)
    plain = [word for word in words if not word.startswith("cut=")]
    axes = {axis for path in pattern.axes for axis in path} | set(name.axes)
    if cut is not None and cut not in axes:
        raise ReshardError(f"{where}: {text}: cut={cut}, but the row's axes are {', '.join(sorted(axes))}")
    if len(stages := [word for word in plain if word in STAGES]) > 1:
        raise ReshardError(f"{where}: {text}: {' and '.join(stages)}: one word says the stage")
    known = kinds | set(STAGES) | {"whole", "zero"}
    either = tuple(frozenset(word.split("|")) for word in plain if "|" in word)
    bad = [word for word in plain if word not in known and not word.endswith("?") and not ("|" in word and set(word.split("|")) <= kinds)]
    if bad:
        raise ReshardError(
            f'{where}: {text}: unknown word "{bad[0]}"', f"words are {', '.join(sorted(known))}, cut=AXIS, or a tag ending in ?"
        )
    return Row(
        name,
        pattern,
        leaves,
        tuple(others),
        tuple(layouts),
        kinds=frozenset(kinds & set(plain)),
        either=either,
        tags=frozenset(word for word in plain if word.endswith("?")),
        stage=next(iter(stages), "every"),
        whole="whole" in plain,
        zero="zero" in plain,
        cut=cut,
    )


def _constant(entry: list[Any], where: str) -> Constant:
    if [type(part) for part in entry] not in ([str, str, int, str], [str, str, float, str]) or entry[1] not in ("F32", "F64"):
        raise ReshardError(f"{where}: constant {entry!r} is not [name, F32 or F64, value, logical tensor]")
    return Constant(parse_template(entry[0]), entry[1], float(entry[2]), entry[3])


def _consistent(table: Table) -> Table:
    """The same table, if what it says about axes, tags and logical names is about some that it has: a typo must not mean nothing."""
    where = f'table "{table.name}"'
    leaves = {leaf for row in table.rows for leaf in row.leaves}
    axes = _bases(table.rows) | {"layer"} | table.axes.keys()
    said = {
        "sizes": table.sizes,
        "cut": [axis for named in table.cut.values() for axis in named],
        "replicate": table.replicate,
        "uneven": table.uneven,
        "pad": table.pad,
    }
    for key, names in said.items():
        for axis in names:
            if axis not in axes:
                raise ReshardError(f"{where}: {key} names the axis {axis}, which no row has")
    tags = {tag for row in table.rows for tag in row.tags}
    for tag in table.optional:
        if tag not in tags:
            raise ReshardError(f"{where}: optional names the tag {tag}, which no row has")
    for mesh in (*table.cut, *table.weighted):
        if mesh not in MESH:
            raise ReshardError(f"{where}: {mesh} is no mesh axis, they are {', '.join(MESH)}")
    for axis, unit in table.pad.items():
        if not all(factor == "tp" or limits.numeral(factor) for factor in unit.split("*")):
            raise ReshardError(f'{where}: pad {axis} = "{unit}" is no product of "tp" and numbers, such as "128*tp"')
    tied = [table.tied] if isinstance(table.tied, str) else [name for pair in table.tied.items() for name in pair]
    for name in tied:
        if name not in leaves | {"both"}:
            raise ReshardError(f"{where}: tied names the logical tensor {name}, which no row has")
    for constant in table.constants:
        if constant.beside not in leaves:
            raise ReshardError(f"{where}: constant {constant.name.text} stands beside {constant.beside}, which no row has")
    engine = table.engine
    if engine and not (isinstance(engine.get("name"), str) and isinstance(engine.get("versions"), list) and engine["versions"]):
        raise ReshardError(f"{where}: engine = {engine!r} wants a name and a list of versions")
    return table


_FILE = re.compile(r"([^{}]|\{(rank|tp|pp|part)(:0[1-9])?\})+")


def _check_files(files: Mapping[str, str], where: str) -> None:
    """Every rank has a file of its own, inside the directory."""
    for key, text in files.items():
        try:
            if not _FILE.fullmatch(text):
                raise ValueError
            names = {text.format(rank=2 * pp + tp, tp=tp, pp=pp, part=0) for pp in range(2 if key == "staged" else 1) for tp in range(2)}
        except (KeyError, ValueError, IndexError, AttributeError):
            names = set()
        outside = any(name.startswith("/") or ".." in name for name in names)
        if key not in ("shard", "staged") or len(names) < (4 if key == "staged" else 2) or outside:
            raise ReshardError(f'{where}: files.{key} = "{text}" does not name a file for every rank', "use {rank}, or {tp} and {pp}")


def parse(text: str, where: str, parent: Callable[[str], str] | None = None, leaves: Set[str] | None = None) -> Table:
    """A table from TOML text; `parent(name)` gives the text of the table that `like` names.

    `leaves`: of a format that has been used before, only the rows of these logical tensors, which a family has; the rest is not looked at.
    """
    texts: dict[str, str] = {}
    chain: list[dict[str, Any]] = []
    while True:
        data = decode.toml_of(text, where)
        texts[str(data.get("name"))] = text
        chain.append(_checked(data, where))
        like = data.pop("like", None)
        if like is None:
            whole = _merged(chain)
            if leaves is None:
                return _consistent(_parse(whole, texts, {}))
            return _parse(whole | {"rows": [row for row in whole.get("rows", ()) if leaves >= set(row[2].split())]}, texts, {})
        if like in texts or parent is None:
            raise ReshardError(f'{where}: like = "{like}" leads nowhere')
        text, where = parent(like), f"{like}.toml"


def _shipped(kind: str) -> Callable[[str], str]:
    def text(name: str) -> str:
        path = HOME / kind / f"{name}.toml"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or not path.is_file():
            raise ReshardError(f'no {"family" if kind == "families" else "format"} table "{name}"', nearest(kind, name))
        return path.read_text(encoding="utf-8")

    return text


def shipped(kind: str) -> tuple[str, ...]:
    """Names of the tables that come with reshard; `kind` is "families", "formats" or "wrappers"."""
    return tuple(sorted(path.stem for path in (HOME / kind).glob("*.toml")))


def digest(family: str) -> str:
    """Changes when a shipped family table, or one that it is like, does."""
    texts = load("families", family).texts
    return crc32("\0".join(texts.values()).encode()).to_bytes(4, "big").hex()


def nearest(kind: str, name: str) -> str:
    """The shipped tables whose names are most like this one, in words."""
    names = shipped(kind)
    if len(names) < 9:
        return f"there are {', '.join(names)}" + (", and hf: Hugging Face files" if kind == "formats" else "")
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), names, 5, 0.5) or [other for other in names if other in name or name in other]
    return f"there are {len(names)} {kind}" + (f", with such names: {', '.join(close[:5])}" if close else ", the README lists them")


@cache
def load(kind: str, name: str) -> Table:
    """A shipped table by its name."""
    return parse(_shipped(kind)(name), f"{name}.toml", _shipped(kind))


def load_file(path: Path, kind: str = "families") -> Table:
    """A user's own table; `like` may name a shipped one."""
    try:
        text = decode.read(path, limits.TABLE).decode()
    except (PlaceError, UnicodeDecodeError) as error:
        raise ReshardError(f"{path}: cannot be read as a table: {error}") from None
    return parse(text, path.name, _shipped(kind))


def wrapper_of(config: Config, key: str | None = None) -> Table | None:
    """The table of a multimodal checkpoint: a shipped wrapper around the family of its language model, which config.json names.

    The wrapper that lists its `model_type`, or `key`: "*" is for whatever names the family. Raises ReshardError where a wrapper lists it
    and there is no table for the language model.
    """
    kind = config.model_type
    for name in shipped("wrappers") if kind is not None else ():
        text = (HOME / "wrappers" / f"{name}.toml").read_text(encoding="utf-8")
        about = decode.toml_of(text, name)
        usual = about["wraps"].get(key or kind)
        if usual is None:
            continue
        inner = config.inner_type or usual
        family = family_of(inner, ())
        if family is not None:
            return _wrapped(str(kind), family, name, text, about.get("left_out", {}))
        if key is None:
            hint = f"{nearest('families', str(inner))}; or bring one with --family my.toml (docs/notation.md)"
            raise ReshardError(f'config.json: "{kind}" around a language model "{inner}", for which there is no table', hint)
    return None


def _wrapped(kind: str, family: Table, name: str, text: str, told: Mapping[str, dict[str, Any]]) -> Table:
    head, left_out = text.partition("\n[wraps]")[0], told.get(family.name, {}) | told.get(kind, {})
    keys = "".join(f"{key} = {value}\n" for key, value in left_out.items())
    return parse(f'name = "{kind}"\nlike = "{family.name}"\n{head}\n[defaults]\n{keys}', f"{name}.toml", _shipped("families"))


def base(family: Table) -> Table:
    """The table of a family's base model, stored without `model.` and perhaps without a head; without one it runs if that is tied."""
    heads = [row for row in written(family)["rows"] if row[2] == "head"]
    rows = [[*row[:3], " ".join([*row[3:], "head?"])] for row in heads]
    text = f'name = "{family.name}{BASE}"\nlike = "{family.name}"\nrows = {json.dumps(rows)}\n[names]\n"model." = [""]\n'
    text += "" if "runs" in family.model else '[model]\nruns = ["tie_word_embeddings"]\n'
    return parse(text, f"{family.name}{BASE}", _shipped("families"))


def named(name: str, config: Config) -> Table:
    """The shipped table of that name, which may be that of a multimodal checkpoint, or of a base model."""
    if name.endswith(BASE):
        return base(load("families", name.removesuffix(BASE)))
    if name not in shipped("families") and (wrapper := wrapper_of(config) or wrapper_of(config, "*")) is not None and wrapper.name == name:
        return wrapper
    return load("families", name)


def family_of(model_type: str | None, architectures: Iterable[str]) -> Table | None:
    """The shipped family table for a config's model_type or, failing that, one of its architectures."""
    names = shipped("families")
    if model_type in names:
        return load("families", model_type)
    wanted = {model_type, *architectures}
    return next((table for table in (load("families", name) for name in names) if wanted & set(table.match)), None)
