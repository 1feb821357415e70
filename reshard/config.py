"""config.json, read in either spelling: dotted keys, nested `text_config`, defaults of the family. Knows no key by name but these."""

from collections.abc import Mapping
from typing import Any


class Config:
    """A parsed config.json: dotted look-up, `text_config` first, then the top level, then the family's defaults."""

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.data = data
        text = data.get("text_config")
        self._levels: tuple[Mapping[str, Any], ...] = (text if isinstance(text, dict) else {}, data, defaults or {})

    def get(self, key: str) -> Any:
        """The value of `a.b`, None where it is missing or null; a default only stands in for what is missing."""
        *levels, defaults = self._levels
        said = False
        for level in levels:
            value, there = _follow(level, key)
            if value is not None:
                return value
            said = said or there
        return None if said else _follow(defaults, key)[0]

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        return Config(self.data, defaults)

    def says(self, key: str) -> bool:
        """Truth of a key; `!key` is its opposite."""
        return not self.get(key[1:]) if key.startswith("!") else bool(self.get(key))

    @property
    def model_type(self) -> str | None:
        top = self.data.get("model_type")
        return str(top) if top is not None else self.get("model_type")

    @property
    def architectures(self) -> tuple[str, ...]:
        names = self.data.get("architectures")
        return tuple(map(str, names)) if isinstance(names, list) else ()


def _follow(level: Mapping[str, Any], key: str) -> tuple[Any, bool]:
    """The value of a dotted key, and whether the key is there at all."""
    value: Any = level
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None, False
        value = value[part]
    return value, True
