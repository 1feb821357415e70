"""Quantisation schemes: how one matrix (out, in) is stored as several tensors. docs/extend/scheme.md: to add one.

    rows = [[".qweight", "in/pack out", "packed", "I32"], …]
              suffix      pattern        part      dtypes

`out` and `in` stand for whatever a family's row says of that matrix; `/pack` counts blocks of a unit that the
checkpoint's quantization_config gives. A scheme knows no family, a family no scheme.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from msgspec import Struct

from ..errors import ReshardError
from ..inputs import decode
from ..inputs.limits import numeral
from . import keys
from .expression import parse as parse_expression
from .notation import Pattern, parse_pattern
from .shipped import Shipped

_SHIPPED = Shipped("quantization", "scheme")
shipped = _SHIPPED.names

PACKED, SCALE = "_packed", "_scale"  # parts, after the name of their matrix
Units = Mapping[str, int]  # of a checkpoint: how many inputs make a group, how many numbers a word


class Part(NamedTuple):
    """One tensor of a matrix. `suffix` stands in place of ".weight", or after a name without one; `name`: "" for what
    is called like the matrix itself.
    """

    suffix: str
    patterns: tuple[str, ...]
    name: str
    dtypes: frozenset[str]
    optional: bool

    def forms(self, units: Units) -> Iterator[tuple[Pattern, dict[str, int]]]:
        """Each pattern with units in numbers, and the sizes of axes that a scheme brings; those left out that use a
        unit which is not known.
        """
        for text in self.patterns:
            if (found := _with_units(text, units)) is not None:
                yield parse_pattern(found[0], {}), found[1]


class Layout(NamedTuple):
    """The tensors that make one matrix. `aside`: suffixes of those whose value follows from the others, and how."""

    parts: tuple[Part, ...]
    aside: Mapping[str, str]
    condition: str
    exclusion: str

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of its tensors end in."""
        return (*(part.suffix for part in self.parts), *self.aside)

    @property
    def bare(self) -> bool:
        """Whether it is one of matrices whose names do not end in ".weight"."""
        return not all(part.suffix.startswith(".") for part in self.parts)

    def holds(self, said: Mapping[str, Any]) -> bool:
        """Whether a quantization_config lets a matrix be stored so."""
        return (not self.condition or _says(self.condition, said)) and not (
            self.exclusion and _says(self.exclusion, said)
        )


class Companions(NamedTuple):
    """Tensors next to a logical tensor; a suffix with ^ stands in place of the last part of the matrix's name, too."""

    of: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Scheme:
    """A table of quantization/. `methods`: what quant_method says; `also`: where a quantization_config says more than
    one thing of its units.
    """

    name: str
    methods: tuple[str, ...]
    layouts: tuple[Layout, ...]
    units: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    beside: tuple[Companions, ...] = ()
    algorithms: str = ""

    @property
    def telling(self) -> frozenset[str]:
        """What only names of quantised matrices end in."""
        parts = (part for layout in self.layouts for part in layout.parts)
        return frozenset(part.suffix for part in parts if not part.optional and part.suffix not in ("", ".weight"))

    @property
    def parts(self) -> frozenset[str]:
        """What the tensors of a matrix are called after its name."""
        of_matrices = (layout.parts for layout in self.layouts)
        return frozenset(
            part.name for parts in (*of_matrices, *(each.parts for each in self.beside)) for part in parts if part.name
        )

    def speaks(self, said: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is one of this scheme."""
        method = said.get("quant_method")
        return method in self.methods if method else bool(self.algorithms and said.get(self.algorithms))

    def claims(self, said: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """All that a quantization_config says of a matrix: each with the units that follow, the general first."""
        all_said = [dict(said), *(dict(said) | found for path in self.also for found in _at(said, path.split(".")))]
        claims: list[tuple[dict[str, Any], dict[str, int]]] = []
        for each in all_said:
            units = {}
            for name, text in self.units.items():
                number = _number(text, each)
                if number is not None:
                    units[name] = number
            if all(units != other for _, other in claims):
                claims.append((each, units))
        return claims


class _Layout(Struct, frozen=True, forbid_unknown_fields=True, rename={"condition": "if", "exclusion": "unless"}):
    rows: list[list[str]]
    aside: dict[str, str] = {}
    condition: str = ""
    exclusion: str = ""


class _Beside(Struct, frozen=True, forbid_unknown_fields=True):
    of: str
    rows: list[list[str]]


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    methods: tuple[str, ...]
    layouts: list[_Layout]
    units: dict[str, str] = {}
    also: tuple[str, ...] = ()
    beside: list[_Beside] = []
    algorithms: str = ""


@cache
def load(name: str) -> Scheme:
    """A shipped scheme."""
    return parse(_SHIPPED.text(name), f"{name}.toml")


def parse(text: str, where: str) -> Scheme:
    """A scheme from TOML."""
    data = decode.toml_of(text, where)
    table: _Table = decode.typed(data, _Table, where, hint="docs/extend/scheme.md shows the form of every key", path="")
    with keys.well_formed(where):
        for expression in table.units.values():
            parse_expression(expression)
        return Scheme(
            keys.name_of(data),
            table.methods,
            tuple(
                Layout(_parts(each.rows, where), each.aside, each.condition, each.exclusion) for each in table.layouts
            ),
            table.units,
            table.also,
            tuple(Companions(each.of, _parts(each.rows, where)) for each in table.beside),
            table.algorithms,
        )


def scheme_of(said: Mapping[str, Any]) -> Scheme | None:
    """The shipped scheme of a quantization_config."""
    return next((scheme for scheme in map(load, shipped()) if scheme.speaks(said)), None)


def _parts(rows: list[list[str]], where: str) -> tuple[Part, ...]:
    parts = []
    for row in rows:
        if not 3 <= len(row) <= 4:
            raise ReshardError(f'{where}: row {row!r} is not ["suffix", "pattern", "part", "dtypes"]')
        suffix, patterns, name, *dtypes = row
        parts.append(
            Part(
                suffix,
                tuple(one.strip() for one in patterns.split("|")),
                name.rstrip("?"),
                frozenset(dtypes[0].split() if dtypes else ()),
                name.endswith("?"),
            )
        )
    return tuple(parts)


# --- units ------------------------------------------------------------------------------------------------------------

_UNIT = re.compile(r"/([a-z_]+)")
_AXIS = re.compile(r"<([a-z_]*?)([0-9]*)>")
_UNCUT = re.compile(r"\[in/([a-z_]+)\]")
OWN = re.compile(r"(words|levels|n)[0-9]+|groups[0-9]+_.*")  # axes of parts that matrices have not
WHOLE = -1  # a group of all that there is
GROUPS = "groups"  # the axis of groups that is never cut


def _with_units(text: str, units: Units) -> tuple[str, dict[str, int]] | None:
    """A pattern with numbers for units; None where one is not known."""
    sizes: dict[str, int] = {}

    def axis(match: re.Match[str]) -> str:
        name, number = match[1], int(match[2]) if match[2] else units[match[1]]
        sizes[f"{name or 'n'}{number}"] = number
        return f"{name or 'n'}{number}"

    def block(match: re.Match[str]) -> str:
        return f"/{units[match[1]]}"

    def groups(match: re.Match[str]) -> str:
        return f"{GROUPS}{units[match[1]]}" if units[match[1]] != WHOLE else "1"

    try:
        text = _UNIT.sub(block, _UNCUT.sub(groups, _AXIS.sub(axis, text)))
    except KeyError:
        return None
    if any(size < 1 for size in sizes.values()):
        return None
    return re.sub(r"/1\b", "", re.sub(rf"\b(in|out)/{WHOLE}\b", "1", text)), sizes


def _at(data: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    """The objects at a path in which * is every key."""
    if not path:
        if isinstance(data, dict):
            yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            if path[0] in ("*", key):
                yield from _at(value, path[1:])
    elif isinstance(data, list) and path[0] == "*":
        for value in data:
            yield from _at(value, path[1:])


def _get(said: Mapping[str, Any], key: str) -> Any:
    value: Any = said
    for part in key.split("."):
        number = numeral(part)
        if isinstance(value, list) and number is not None and number < len(value):
            value = value[number]
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            return None
    return value


def _says(text: str, said: Mapping[str, Any]) -> bool:
    return parse_expression(text).says(lambda key: _get(said, key))


def _number(text: str, said: Mapping[str, Any]) -> int | None:
    """A unit, None where nothing or no whole number is said of it."""
    try:
        found = parse_expression(text).value(lambda key: _get(said, key))
    except ReshardError:
        return None
    number = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1 << 31
    return int(found) if number and found == int(found) and (found > 0 or found == WHOLE) else None
