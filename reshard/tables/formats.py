"""Formats: how an engine, or this runtime, names, fuses, cuts, pads and repeats tensors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from msgspec import convert

from ..errors import ReshardError
from ..inputs import limits
from . import expression, keys, merge, schemes
from .notation import Pattern, bases, parse_template, variant_of, varied
from .row import Constant, Row, parse_constant, parse_rows
from .shipped import Shipped

MESH = ("tp", "ep", "pp")
_SAME = (
    "tied",
    "towers",
    "cut",
    "replicate",
    "uneven",
    "weighted",
    "pad",
    "files",
    "engine",
    "families",
    "requires",
    "parts",
)
_SHIPPED = Shipped("formats", "format", ", and hf: Hugging Face files")
shipped, nearest = _SHIPPED.names, _SHIPPED.nearest


@dataclass(frozen=True)
class Format:
    """A format table, with `like` and compounds resolved. `texts`: every TOML text that it was read from, by name.

    That of published checkpoints (families.Family.published) has rows and axes alone.
    """

    name: str
    rows: tuple[Row, ...]
    texts: dict[str, str] = field(compare=False, default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # compounds
    tied: str = ""  # which of two tied tensors is stored where one rank would have both: "embed", "head", "both"
    towers: tuple[str, ...] = ()  # the stages that store components other than the language model, whole
    cut: dict[str, tuple[str, ...]] = field(default_factory=dict)  # mesh axis → axes
    replicate: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()
    weighted: tuple[str, ...] = ()
    pad: dict[str, str] = field(default_factory=dict)
    constants: tuple[Constant, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()  # conditions on sizes of axes and on tp, ep and pp
    parts: bool = False  # tensors of quantised matrices follow from the rows of the matrices
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # family → keys that are tried first

    @property
    def published(self) -> bool:
        """Whether it is that of published checkpoints: nothing is cut."""
        return not self.cut

    def for_family(self, family: str) -> "Format":
        """This format for one family: the rows of `[family.X]` before the common ones."""
        if self.families and family not in self.families:
            raise ReshardError(
                f'format "{self.name}" has no names for family "{family}"; it has them for {_listed(self.families)}',
                "convert --to native works for every family",
            )
        special = self.overrides.get(family)
        if special is None:
            return self
        where = f'table "{self.name}", [family.{family}]'
        keys.check_format(data := {**special, "name": self.name}, where)
        own = _of_data(data, {}, self.axes)
        return replace(
            self,
            rows=own.rows + tuple(row for row in self.rows if row.name.text not in special.get("without", ())),
            constants=own.constants if "constants" in special else self.constants,
            tied=own.tied or self.tied,
            requires=own.requires + self.requires,
        )

    def refined(self, axes: Mapping[str, tuple[str, ...]]) -> "Format":
        """The same format with the compounds of a family written out too: two layouts meet at the atoms of both."""
        new = {name: atoms for name, atoms in axes.items() if name not in self.axes}
        if not new:
            return self
        rows = tuple(
            row._replace(
                pattern=row.pattern.refined(new), layouts=tuple(pattern.refined(new) for pattern in row.layouts)
            )
            for row in self.rows
        )
        return replace(self, rows=rows, axes=self.axes | new)

    def varied(self, tensors: Mapping[str, tuple[str, ...]]) -> "Format":
        """This format with every row and every key about axes repeated for each variant among `tensors` (name
        → axes).
        """
        variants = sorted({variant_of(name) for name in tensors} - {""})
        if not variants:
            return self
        there = bases(axis for axes in tensors.values() for axis in axes)
        also_axes = sorted({variant_of(axis) for axis in there} - {""})

        def also(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for base in names for name in (base, *(varied(base, variant) for variant in also_axes)))

        rows = [
            other for row in self.rows for other in (row, *(_varied_row(row, variant, tensors) for variant in variants))
        ]
        axes = {
            varied(name, variant): tuple(varied(atom, variant) for atom in atoms)
            for name, atoms in self.axes.items()
            for variant in ("", *also_axes)
        }
        return replace(
            self,
            rows=tuple(row for row in rows if row is not None),
            axes={name: atoms for name, atoms in axes.items() if name in self.axes or set(atoms) <= there},
            cut={mesh: also(named) for mesh, named in self.cut.items()},
            replicate=also(self.replicate),
            uneven=also(self.uneven),
            pad={name: unit for axis, unit in self.pad.items() for name in also([axis])},
        )

    def parted(self, parts: Set[str], tensors: Mapping[str, tuple[str, ...]]) -> "Format":
        """This format with a row for every part of a quantised matrix, made of the row of the matrix: `attn.qkv` and
        its `_scale`. What a row would fuse and cannot, because the parts are of different kinds, gets rows of its own.
        """
        if not self.parts:
            return self
        matrices = [row for row in self.rows if len(row.pattern.dims) > 1]
        apart = [one for row in matrices if len(row.leaves) > 1 for one in _apart(row)]
        rows = [other for row in (*matrices, *apart) for other in _parted(row, parts, tensors)]
        there = {row.leaves for row in self.rows}
        own = {row.leaves: row for row in (*rows, *apart) if row.leaves not in there}
        return replace(self, rows=(*self.rows, *own.values()))


def _apart(row: Row) -> Iterator[Row]:
    """A row for each of the tensors that a row fuses."""
    start, dot, _ = row.name.text.rpartition(".")
    for at, leaf in enumerate(row.leaves):
        name = parse_template(f"{start}{dot}{leaf.partition('@')[0].rpartition('.')[2]}")
        pattern, *layouts = (pattern.only(at) for pattern in (row.pattern, *row.layouts))
        yield row._replace(name=name, pattern=pattern, layouts=tuple(layouts), leaves=(leaf,))


def _parted(row: Row, parts: Set[str], tensors: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
    """The rows of the parts of the matrices that a row stores."""
    for part in sorted(parts):
        stems = [f"{leaf.partition('@')[0]}_{part}" for leaf in row.leaves]
        for variant in sorted({variant_of(name) for name in tensors if name.partition("@")[0] == stems[0]}):
            leaves = tuple(varied(stem, variant) for stem in stems)
            pattern = _of_parts(row, leaves, tensors) if tensors.keys() >= set(leaves) else None
            if pattern is not None:
                name = parse_template(f"{row.name.text}_{part}")
                yield row._replace(name=name, pattern=pattern, layouts=(), leaves=leaves)


def _of_parts(row: Row, leaves: Sequence[str], tensors: Mapping[str, tuple[str, ...]]) -> Pattern | None:
    """The pattern of a row for parts that have these axes, in the order in which they have them; None where the parts
    cannot stand in one tensor.
    """
    named = set(row.name.axes)
    axes = [[axis for axis in tensors[leaf] if axis not in named] for leaf in leaves]
    for pattern in (row.pattern, *row.layouts):
        if (found := pattern.of_parts(axes, schemes.OWN.fullmatch)) is not None:
            return found
    return None


def _varied_row(row: Row, variant: str, tensors: Mapping[str, tuple[str, ...]]) -> Row | None:
    """A format's row for the tensors of a variant, which may have axes of other sizes; None where there are no such
    tensors.
    """
    leaves = tuple(varied(leaf, variant) for leaf in row.leaves)
    if not all(leaf in tensors for leaf in leaves):
        return None
    own = {axis.partition("@")[0]: axis for axis in bases(axis for leaf in leaves for axis in tensors[leaf])}
    pattern, *layouts = [one.renamed(lambda axis: own.get(axis, axis)) for one in (row.pattern, *row.layouts)]
    return row._replace(pattern=pattern, layouts=tuple(layouts), leaves=leaves)


@cache
def load(name: str) -> Format:
    """A shipped format."""
    return parse(_SHIPPED.text(name), f"{name}.toml", _SHIPPED.text)


def parse(text: str, where: str, parent: merge.Parent | None = None, leaves: Set[str] | None = None) -> Format:
    """A format from TOML; `parent(name)` gives the text of the table that `like` names.

    `leaves`: of a format that has been used before, only the rows of these logical tensors, which a family has; the
    rest is not looked at.
    """
    tables, texts = merge.chain(text, where, keys.check_format, parent)
    data = merge.merged(tables)
    if leaves is not None:
        return _of_data(
            data | {"rows": [row for row in data.get("rows", ()) if leaves >= set(row[2].split())]}, texts, {}
        )
    return _consistent(_of_data(data, texts, {}))


def _of_data(data: merge.Data, texts: dict[str, str], axes: Mapping[str, tuple[str, ...]]) -> Format:
    name = keys.name_of(data)
    where = f'table "{name}"'
    with keys.well_formed(where):
        table = convert(data, keys.FormatTable)
        _check_files(table.files, where)
        for condition in table.requires:
            with expression.within(f"{where}: requires"):
                expression.parse(condition)
        rows, compounds = parse_rows(data, where, axes=axes, once=False)
        return Format(
            name=name,
            rows=rows,
            texts=texts,
            axes=compounds,
            constants=tuple(parse_constant(entry, where) for entry in table.constants),
            overrides=table.family,
            **{key: getattr(table, key) for key in _SAME},
        )


def _consistent(table: Format) -> Format:
    """The same format, if what it says about axes and logical tensors is about some that it has."""
    where = f'table "{table.name}"'
    leaves = {leaf for row in table.rows for leaf in row.leaves}
    cut = [axis for named in table.cut.values() for axis in named]
    named = {"cut": cut, "replicate": table.replicate, "uneven": table.uneven, "pad": table.pad}
    patterns = [row[1] for own in table.overrides.values() for row in own.get("rows", ())]
    keys.check_axes(where, named, table.rows, {*table.axes, *re.findall(r"[a-z_]\w*", " ".join(patterns))})
    for mesh in (*table.cut, *table.weighted):
        if mesh not in MESH:
            raise ReshardError(f"{where}: {mesh} is not a mesh axis; those are {', '.join(MESH)}")
    for axis, unit in table.pad.items():
        if not all(factor == "tp" or limits.numeral(factor) for factor in unit.split("*")):
            raise ReshardError(f'{where}: pad {axis} = "{unit}" is not a product of "tp" and numbers, such as "128*tp"')
    if table.tied and table.tied not in leaves | {"both"}:
        raise ReshardError(f"{where}: tied names the logical tensor {table.tied}, which no row has")
    for constant in table.constants:
        if constant.beside not in leaves:
            raise ReshardError(f"{where}: constant {constant.name.text} goes with {constant.beside}, which no row has")
    engine = table.engine
    if engine and not (
        isinstance(engine.get("name"), str) and isinstance(engine.get("versions"), list) and engine["versions"]
    ):
        raise ReshardError(f"{where}: engine = {engine!r} wants a name and a list of versions")
    return table


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 12 else f"{len(names)} others, which docs/families.md marks"


_FILE = re.compile(r"([^{}]|\{(rank|tp|pp|part)(:0[1-9])?\})+")


def _check_files(files: Mapping[str, str], where: str) -> None:
    """Every rank has a file of its own, inside the directory."""
    for key, text in files.items():
        try:
            if not _FILE.fullmatch(text):
                raise ValueError
            names = {
                text.format(rank=2 * pp + tp, tp=tp, pp=pp, part=0)
                for pp in range(2 if key == "staged" else 1)
                for tp in range(2)
            }
        except (KeyError, ValueError, IndexError, AttributeError):
            names = set()
        outside = any(name.startswith("/") or ".." in name for name in names)
        if key not in ("shard", "staged") or len(names) < (4 if key == "staged" else 2) or outside:
            raise ReshardError(
                f'{where}: files.{key} = "{text}" does not name a file for every rank', "use {rank}, or {tp} and {pp}"
            )
