"""The keys of tables, and the form of each. A typo is refused: it must not mean nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import ReshardError
from ..inputs import decode, limits
from . import facts
from .row import Row, axes_of_rows

# The form of every key: [form] is a list of it, {"": form} a TOML table of it, a tuple says "one of".
COMMON: dict[str, Any] = {
    "name": str,
    "like": str,
    "rows": [[str]],
    "without": [str],
    "axes": {"": str},
    "towers": [str],
}
FAMILY: dict[str, Any] = COMMON | {
    "match": [str],
    "prefix": (str, [str]),
    "names": {"": [str]},
    "aside": [str],
    "sizes": {"": str},
    "defaults": {"": object},
    "model": {"": object},
    "one_of": [[str]],
    "layers": {"": str},
    "optional": {"": str},
    "extra": {"": str},
    "tied": {"": str},
    "quantization": [{"": object}],
}
FORMAT: dict[str, Any] = COMMON | {
    "tied": str,
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


def family(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The same data, if it has the form of a family table."""
    if wrong := next((key for key in data if key in FORMAT and key not in FAMILY), None):
        raise ReshardError(
            f'{where}: "{data.get("name")}" is the table of a format, not of a family: it has "{wrong}"',
            "give that of a family; shipped ones go by name",
        )
    _checked(data, where, FAMILY)
    facts.check(data.get("model", {}), where)
    return data


def format(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The same data, if it has the form of a format table."""
    if wrong := next((key for key in data if key in FAMILY and key not in FORMAT), None):
        raise ReshardError(f'{where}: "{data.get("name")}" is the table of a family, not of a format: it has "{wrong}"')
    return _checked(data, where, FORMAT)


def _checked(data: dict[str, Any], where: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(data) - keys.keys()):
        raise ReshardError(f"{where}: unknown key {unknown[0]}", f"keys are {', '.join(sorted(keys))}")
    for key, value in data.items():
        if said := decode.wrong(value, keys[key], key):
            raise ReshardError(f"{where}: {said}", "docs/notation.md shows the form of every key")
    if (count := len(data.get("rows", ()))) > limits.ROWS:
        raise ReshardError(f"{where}: {count} rows, at most {limits.ROWS} are read")
    for row in data.get("rows", ()):
        if not 3 <= len(row) <= 4:
            raise ReshardError(f'{where}: row {row!r} is not ["stored name", "pattern", "logical names", "words"]')
    return data


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
