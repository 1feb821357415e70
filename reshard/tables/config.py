"""config.json, read in either spelling: dotted keys, nested sections, defaults of the family. Knows no key by name but
theirs.
"""

from collections.abc import Mapping
from typing import Any

from .expression import parse

INNER = ("text_config", "llm_config", "language_config")  # where multimodal checkpoints keep what the language model is


class Config:
    """A parsed config.json: dotted look-up, the language model's section first, then the top level,
    then the family's defaults.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        self.data, self._quantization = data, quantization
        inner = [data[key] for key in INNER if isinstance(data.get(key), dict)]
        self._levels: tuple[Mapping[str, Any], ...] = (*inner, data, defaults or {})

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
        return Config(self.data, defaults, self._quantization)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What is said of a quantisation, here or in a file of its own; None where nothing is."""
        keys = ("quantization_config", "compression_config", "quantization")
        found = next((value for key in keys if (value := self.get(key))), None) or self._quantization
        return found if isinstance(found, dict) or found is None else {"quant_method": found}

    def with_quantization(self, said: Mapping[str, Any] | None) -> "Config":
        """The same where a file next to config.json says more."""
        return Config(self.data, self._levels[-1], said)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one: a multimodal checkpoint may say so outside or inside of its language
        model's section.
        """
        return self.says("tie_word_embeddings") or bool(self.data.get("tie_word_embeddings"))

    def value(self, text: str) -> Any:
        """What an expression comes to, None where nothing answers it."""
        return parse(text).value(self.get)

    def says(self, text: str) -> bool:
        """Whether an expression is true."""
        return parse(text).says(self.get)

    def size(self, text: str) -> int | None:
        """A number of elements, by an expression."""
        return parse(text).size(self.get)

    @property
    def model_type(self) -> str | None:
        top = self.data.get("model_type")
        return str(top) if top is not None else self.get("model_type")

    @property
    def inner_type(self) -> str | None:
        """What the section of the language model says that it is, if there is one."""
        found = next((data.get("model_type") for key in INNER if isinstance(data := self.data.get(key), dict)), None)
        return str(found) if found is not None else None

    @property
    def weights(self) -> str | None:
        """The file with the weights, or their index, where it is not one of the usual."""
        name = self.data.get("transformers_weights")
        return name if isinstance(name, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        names = self.data.get("architectures")
        return tuple(map(str, names)) if isinstance(names, list) else ()


def _follow(level: Mapping[str, Any], key: str) -> tuple[Any, bool]:
    """The value of a dotted key, and whether the key is there at all; a part `any` is the first entry,
    whatever its key.
    """
    value: Any = level
    for part in key.split("."):
        if part == "any" and isinstance(value, Mapping) and part not in value:
            part = next(iter(value), part)
        if not isinstance(value, Mapping) or part not in value:
            return None, False
        value = value[part]
    return value, True
