"""Values of a family table's `[model]` section, answered by one config.json and checked to be legal."""

from collections.abc import Mapping
from typing import Any

from reshard.errors import ReshardError
from reshard.tables.config import Config
from reshard.tables.expression import shown, within
from reshard.tables.facts import FACTS, Fact, Range, legal


class Facts:
    """The values of `[model]`, or of a table in it, for one config. `known`: all values that exist, with defaults."""

    def __init__(self, facts: Mapping[str, Any], config: Config, known: Mapping[str, Fact] = FACTS) -> None:
        self.facts, self.config, self.known = facts, config, known

    def given(self, fact: str, default: Any = None) -> Any:
        """What the table says, or else `default`, or else the default of the fact."""
        if fact in self.facts:
            return self.facts[fact]
        return self.known[fact].default if default is None else default

    def value(self, fact: str, default: Any = None) -> Any:
        """What that comes to, whatever it is."""
        given = self.given(fact, default)
        if isinstance(given, list):
            return any(self.config.value(text) for text in given)
        words = self.known[fact].legal if self.known[fact].kind == "name" else None
        return self.config.value(given) if isinstance(given, str) and given not in (words or ()) else given

    def legal(self, fact: str, default: Any = None) -> Any:
        """The same, if the fact may come to it. Raises ReshardError."""
        found = self.value(fact, default)
        if isinstance(found, list) and found and all(one == found[0] for one in found):
            found = found[0]  # one per layer, all equal
        with within(f"config.json: {fact} ({self.given(fact, default)})"):
            return legal(self.known[fact], found)

    def number(self, fact: str, default: Any = None) -> float:
        return float(self.legal(fact, default))

    def optional(self, fact: str) -> float | None:
        """A number, or None where nothing says it."""
        return None if self.value(fact) is None else self.number(fact)

    def count(self, fact: str) -> int:
        return int(self.legal(fact))

    def true(self, fact: str) -> bool:
        return bool(self.value(fact))


class Section:
    """Numbers in an object of config.json, such as `rope_scaling`; `where`: its key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    @classmethod
    def of(cls, value: Any, where: str) -> "Section":
        """Raises ReshardError for what is neither an object nor null."""
        if value is not None and not isinstance(value, dict):
            raise ReshardError(f"config.json: {where} is {shown(value)}, expected an object")
        return cls(value or {}, where)

    def number(self, key: str, legal: Range) -> float | None:
        """None where it is missing, null or zero."""
        found = self.data.get(key)
        return None if found is None or found is False else _checked(found, legal, f"{self.where}.{key}") or None

    def numbers(self, key: str, legal: Range) -> tuple[float, ...]:
        """A list of them. Raises ReshardError for anything else."""
        found = self.data.get(key)
        if not isinstance(found, list):
            raise ReshardError(f"config.json: {self.where}.{key} is {shown(found)}, expected a list of numbers")
        return tuple(_checked(each, legal, f"{self.where}.{key}[{at}]") for at, each in enumerate(found))

    def needed(self, key: str, legal: Range) -> float:
        found = self.number(key, legal)
        if found is None:
            raise ReshardError(
                f"config.json: {self.where}.{key} is {shown(self.data.get(key))}, expected {legal.words}"
            )
        return found


def first_number(config: Config, keys: tuple[str, ...], legal: Range) -> float | None:
    """The first of these keys that config.json says, neither null nor zero."""
    for key in keys:
        if (found := Section({key: config.get(key)}, "").number(key, legal)) is not None:
            return found
    return None


def _checked(value: Any, legal: Range, where: str) -> float:
    if value not in legal:
        raise ReshardError(f"config.json: {where.lstrip('.')} is {shown(value)}, expected {legal.words}")
    return float(value)
