"""Values of a family table's `[model]` section, evaluated with a config.

A value is a constant (a number, true, false), or alternatives `a | b | …`, the first of which that is not null counts:
a number, `true`, `false`, `=word` (that word), a key of config.json, a quotient or product `a / b`, `a * b`, or a
condition `!key`, `key == other`, `key != other`. `a if key` counts only where that key is true. A list of conditions is
true if one of them is.
"""

from collections.abc import Mapping
from typing import Any

from reshard.errors import ReshardError
from reshard.tables.config import Config
from reshard.tables.facts import FACTS, Fact


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
        given = self.given(fact, default)
        if isinstance(given, list):
            return any(self._first(text) for text in given)
        return self._first(given) if isinstance(given, str) else given

    def _first(self, text: str) -> Any:
        for word in map(str.strip, text.split("|")):
            found = self._one(word)
            if found is not None:
                return found
        return None

    def _one(self, word: str) -> Any:
        if word in ("true", "false"):
            return word == "true"
        if " if " in word:
            value, _, key = word.partition(" if ")
            return self._one(value) if self.config.says(key) else None
        if word.startswith("="):
            return word[1:]
        if word.startswith("!") or " == " in word or " != " in word:
            return self.config.says(word)
        for sign in (" / ", " * "):
            if sign in word:
                one, other = (self._one(part.strip()) for part in word.split(sign))
                return None if one is None or other is None else one / other if sign == " / " else one * other
        try:
            return float(word)
        except ValueError:
            return self.config.get(word)

    def number(self, fact: str, default: Any = None) -> float:
        found = self.value(fact, default)
        if isinstance(found, list) and found and all(one == found[0] for one in found):
            found = found[0]  # one per layer, all equal
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ReshardError(f"config.json: {self.given(fact, default)} is {found!r}; {fact} needs a number")
        return float(found)

    def optional(self, fact: str) -> float | None:
        """A number, or None where nothing says it."""
        return None if self.value(fact) is None else self.number(fact)

    def true(self, fact: str) -> bool:
        return bool(self.value(fact))
