"""The keys of tables, and the type of each. A typo is refused: it must not mean nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from ..errors import ReshardError
from ..inputs import decode, limits
from . import facts
from .row import Row, axes_of_rows


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys that every table may have, with their types."""

    name: Any = None  # see name_of
    like: str = ""
    rows: list[list[str]] = []
    without: tuple[str, ...] = ()
    axes: dict[str, str] = {}
    towers: tuple[str, ...] = ()


class FamilyTable(Table, frozen=True, kw_only=True):
    """The keys of a family table."""

    match: tuple[str, ...] = ()
    prefix: str | tuple[str, ...] = ()
    names: dict[str, tuple[str, ...]] = {}
    aside: tuple[str, ...] = ()
    sizes: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    model: dict[str, Any] = {}  # see facts
    one_of: tuple[tuple[str, ...], ...] = ()
    layers: dict[str, str] = {}
    optional: dict[str, str] = {}
    extra: dict[str, str] = {}
    tied: dict[str, str] = {}
    quantization: tuple[dict[str, Any], ...] = ()
    scheme: str = ""


class FormatTable(Table, frozen=True, kw_only=True):
    """The keys of a format table."""

    tied: str = ""
    cut: dict[str, tuple[str, ...]] = {}
    replicate: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()
    weighted: tuple[str, ...] = ()
    pad: dict[str, str] = {}
    constants: tuple[tuple[Any, ...], ...] = ()
    files: dict[str, str] = {}
    engine: dict[str, Any] = {}
    parts: bool = False
    families: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    family: dict[str, dict[str, Any]] = {}


FAMILY, FORMAT = frozenset(FamilyTable.__struct_fields__), frozenset(FormatTable.__struct_fields__)


def check_family(data: dict[str, Any], where: str) -> None:
    """Raises ReshardError for what is no family table."""
    if wrong := next((key for key in data if key in FORMAT - FAMILY), None):
        raise ReshardError(
            f'{where}: "{data.get("name")}" is the table of a format, not of a family: it has "{wrong}"',
            "give that of a family; shipped ones go by name",
        )
    _check(data, where, FamilyTable)
    facts.check(data.get("model", {}), where)


def check_format(data: dict[str, Any], where: str) -> None:
    """Raises ReshardError for what is no format table."""
    if wrong := next((key for key in data if key in FAMILY - FORMAT), None):
        raise ReshardError(f'{where}: "{data.get("name")}" is the table of a family, not of a format: it has "{wrong}"')
    _check(data, where, FormatTable)


def _check(data: dict[str, Any], where: str, kind: type[Table]) -> None:
    if unknown := sorted(set(data) - {*kind.__struct_fields__}):
        raise ReshardError(
            f"{where}: unknown key {unknown[0]}", f"keys are {', '.join(sorted(kind.__struct_fields__))}"
        )
    rows = decode.typed(data, kind, where, hint="docs/notation.md shows the form of every key", path="").rows
    if len(rows) > limits.ROWS:
        raise ReshardError(f"{where}: {len(rows)} rows, at most {limits.ROWS} are read")
    for row in rows:
        if not 3 <= len(row) <= 4:
            raise ReshardError(f'{where}: row {row!r} is not ["stored name", "pattern", "logical names", "words"]')


def name_of(data: Mapping[str, Any]) -> str:
    """The name of a table."""
    name = data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ReshardError(f'table: name = {name!r} is no name (letters, digits, "_", "-", ".")')
    return name


def check_axes(where: str, named: Mapping[str, Iterable[str]], rows: Iterable[Row], compounds: Iterable[str]) -> None:
    """Keys that name axes name some that a row has."""
    axes = axes_of_rows(rows) | {"layer"} | set(compounds)
    for key, names in named.items():
        for axis in names:
            if axis not in axes:
                raise ReshardError(f"{where}: {key} names the axis {axis}, which no row has")


@contextmanager
def well_formed(where: str) -> Iterator[None]:
    """Whatever Python makes of a value that no check has foreseen is the table's fault."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ReshardError(f"{where}: malformed: {error}", "docs/notation.md shows the form of every key") from None
