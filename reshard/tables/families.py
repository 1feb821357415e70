"""Families: what the published tensors of one architecture mean."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

from msgspec import convert

from ..errors import ReshardError
from . import expression, keys, layer_rules, merge, schemes
from .formats import Format
from .notation import Template, parse_template
from .row import Row, parse_rows
from .shipped import Shipped, own

BASE = "_base"  # ends the name of the table of a base model
_SAME = (
    "match",
    "sizes",
    "defaults",
    "model",
    "one_of",
    "layers",
    "optional",
    "extra",
    "tied",
    "towers",
    "quantization",
    "scheme",
)
_SHIPPED = Shipped("families", "family")
shipped, nearest = _SHIPPED.names, _SHIPPED.nearest


@dataclass(frozen=True)
class Family:
    """A family table, with `like` and compounds resolved. `chain`: the tables that it was read from,
    as their authors wrote them.
    """

    name: str
    rows: tuple[Row, ...]
    chain: merge.Chain = field(compare=False, repr=False)
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
    # kind of the layers beyond `layer` → config key with their number
    extra: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    towers: tuple[str, ...] = ()  # what the names of components other than the language model begin with
    quantization: tuple[dict[str, Any], ...] = ()
    scheme: str = ""  # of quantisation, whose rows stand in place of those of matrices

    @property
    def plain(self) -> str:
        """The name without that of its scheme."""
        return self.name.removesuffix(f".{self.scheme}") if self.scheme else self.name

    @property
    def parts(self) -> frozenset[str]:
        """What tensors of quantised matrices are called after the name of their matrix; empty without a scheme."""
        return schemes.load(self.scheme).parts if self.scheme else frozenset()

    @property
    def texts(self) -> dict[str, str]:
        """Every TOML text that it was read from, by name."""
        return self.chain.texts

    @property
    def written(self) -> dict[str, Any]:
        """The table as its author wrote it, as data, with `like` resolved."""
        return merge.merged(self.chain.tables)

    @property
    def said(self) -> dict[str, Any]:
        """What a reader of shards takes from the table beside its rows: the facts that a model is run by."""
        return {"model": self.model, "defaults": self.defaults}

    @cached_property
    def published(self) -> Format:
        """The format in which checkpoints of this family are published: its rows, and nothing is cut."""
        return Format(self.name, self.rows, self.texts, self.axes)

    @property
    def runs(self) -> bool:
        """Whether the facts that a decoder needs are there."""
        return "cache" in self.model and self.model.get("runs") is not False

    @property
    def around(self) -> str:
        """Of a table with other components, the family of its language model, where that has a table of its own."""
        names = [*self.texts][2 if self.scheme else 1 :]
        return names[0] if names and self.towers else ""

    @property
    def counts_apart(self) -> bool:
        """Whether extra layers have names of their own."""
        return any(row.name.extra for row in self.rows)

    def leaves(self) -> set[str]:
        """The logical tensors that its rows hold, without their variants; and the matrices whose parts they hold."""
        found = {leaf.partition("@")[0] for row in self.rows for leaf in row.leaves}
        return found | {leaf.removesuffix(f"_{part}") for part in self.parts for leaf in found}

    def claimed(self) -> set[str]:
        """The names, folded, that its rows and `aside` have; those of other components left out."""
        return {template.folded for template in (*(row.name for row in self.rows if not row.tower), *self.aside)}


@cache
def load(name: str) -> Family:
    """A shipped family."""
    return parse(_SHIPPED.text(name), f"{name}.toml", _SHIPPED.text)


def load_file(path: Path) -> Family:
    """A user's own table; `like` may name a shipped one."""
    return parse(own(path), path.name, _SHIPPED.text)


def parse(text: str, where: str, parent: merge.Parent | None = None) -> Family:
    """A family from TOML; `parent(name)` gives the text of the table that `like` names."""
    chain = merge.chain(text, where, keys.check_family, parent)
    return of_chain(chain)


def of_chain(chain: merge.Chain, data: merge.Data | None = None) -> Family:
    """A family from the tables of a chain, or from `data` in their stead: the same with a change."""
    data = merge.merged(chain.tables) if data is None else data
    name = keys.name_of(data)
    where = f'table "{name}"'
    with keys.well_formed(where):
        table = convert(data, keys.FamilyTable)
        kinds = {kind for group in table.one_of for kind in group}
        for named, what in ((table.extra, "extra layers"), (table.layers, "layers")):
            if missing := sorted(set(named) - kinds):
                raise ReshardError(f"{where}: {what} of kind {missing[0]}, which no set of one_of has")
        rows, compounds = parse_rows(data, where, table.one_of)
        same = {key: getattr(table, key) for key in _SAME}
        return _consistent(
            Family(
                name=name,
                rows=rows,
                chain=chain,
                prefixes=(table.prefix,) if isinstance(table.prefix, str) else table.prefix,
                aside=tuple(map(parse_template, table.aside)),
                axes=compounds,
                **same,
            )
        )


def _consistent(table: Family) -> Family:
    """The same family, if what it says about axes, tags and logical tensors is about some that it has."""
    where = f'table "{table.name}"'
    keys.check_axes(where, {"sizes": table.sizes}, table.rows, table.axes)
    tags = {tag for row in table.rows for tag in row.tags}
    leaves = {name for row in table.rows for leaf in row.leaves for name in (leaf, _matrix(leaf))}
    for key, what, names, known in (
        ("optional", "tag", table.optional, tags),
        ("tied", "logical tensor", [name for pair in table.tied.items() for name in pair], leaves),
        ("model.cache", "logical tensor", table.model.get("cache", ()), leaves),
    ):
        if missing := [name for name in names if name not in known]:
            raise ReshardError(f"{where}: {key} names the {what} {missing[0]}, which no row has")
    layered = {
        _matrix(leaf)
        for row in table.rows
        for leaf, path in zip(row.leaves, row.pattern.axes, strict=True)
        if "layer" in (*row.name.axes, *path)
    }
    if odd := [name for name in table.model.get("cache", ()) if name.partition("@")[0] not in layered]:
        raise ReshardError(f"{where}: model.cache names the logical tensor {odd[0]}, which has no layers")
    for key, texts in (("sizes", table.sizes), ("optional", table.optional), ("extra", table.extra)):
        for name, text in texts.items():
            with expression.within(f"{where}: {key}.{name}"):
                expression.parse(text)
    for kind, rule in table.layers.items():
        with expression.within(f"{where}: layers.{kind}"):
            layer_rules.parse(rule)
    return table


def _matrix(leaf: str) -> str:
    """The matrix that a logical tensor is, or whose numbers it holds packed, without its variant."""
    return leaf.partition("@")[0].removesuffix(schemes.PACKED)


def digest(name: str) -> str:
    """Changes when a shipped family table, or one that it is like, does."""
    return crc32("\0".join(load(name).texts.values()).encode()).to_bytes(4, "big").hex()


def base(family: Family) -> Family:
    """The table of a family's base model, stored without `model.` and perhaps without a head; without one it runs if
    that is tied.
    """
    name = f"{family.name}{BASE}"
    rows = [[*row[:3], " ".join([*row[3:], "head?"])] for row in family.written["rows"] if row[2] == "head"]
    own: dict[str, Any] = {"name": name, "rows": rows, "names": {"model.": [""]}}
    text = f'name = "{name}"\nlike = "{family.name}"\nrows = {json.dumps(rows)}\n[names]\n"model." = [""]\n'
    if "runs" not in family.model:
        own["model"] = {"runs": ["tie_word_embeddings"]}
        text += '[model]\nruns = ["tie_word_embeddings"]\n'
    return of_chain(family.chain.on(own, text))


def family_of(model_type: str | None, architectures: Iterable[str]) -> Family | None:
    """The shipped family for a config's model_type or, failing that, one of its architectures."""
    names = shipped()
    if model_type in names:
        return load(model_type)
    wanted = {model_type, *architectures}
    return next((family for family in map(load, names) if wanted & set(family.match)), None)
