"""Wrappers: the tables of multimodal checkpoints, each around the family of its language model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ReshardError
from ..inputs import decode
from . import families, keys, schemes
from .config import Config
from .families import BASE, Family
from .shipped import Shipped

_SHIPPED = Shipped("wrappers", "wrapper")


def wrapper_of(config: Config, key: str | None = None) -> Family | None:
    """The table of a multimodal checkpoint: a shipped wrapper around the family of its language model, which
    config.json names.

    The wrapper that lists its `model_type`, or `key`: "*" is for whatever names the family. Raises ReshardError where a
    wrapper lists it and there is no table for the language model.
    """
    kind = config.model_type
    for name in _SHIPPED.names() if kind is not None else ():
        text = _SHIPPED.text(name)
        about = decode.toml_of(text, name)
        usual = about["wraps"].get(key or kind)
        if usual is None:
            continue
        inner = config.inner_type or usual
        family = families.family_of(inner, ())
        if family is not None:
            return _wrapped(str(kind), family, text, about)
        if key is None:
            hint = f"{families.nearest(str(inner))}; or bring one with --family my.toml (docs/notation.md)"
            raise ReshardError(
                f'config.json: "{kind}" around a language model "{inner}", for which there is no table', hint
            )
    return None


def _wrapped(kind: str, family: Family, text: str, about: Mapping[str, Any]) -> Family:
    """The family with what a wrapper says; `text`: its TOML, of which what stands before [wraps] is kept as the author
    wrote it.
    """
    left_out = about.get("left_out", {})
    defaults = left_out.get(family.name, {}) | left_out.get(kind, {})
    own = {key: value for key, value in about.items() if key not in ("wraps", "left_out")}
    own |= {"name": kind, "defaults": defaults}
    keys.check_family(own, kind)
    written = "".join(f"{key} = {value}\n" for key, value in defaults.items())
    head = text.partition("\n[wraps]")[0]
    return families.of_chain(
        family.chain.on(own, f'name = "{kind}"\nlike = "{family.name}"\n{head}\n[defaults]\n{written}')
    )


def named(name: str, config: Config) -> Family:
    """The shipped family of that name, which may be that of a multimodal checkpoint, of a base model, or of quantised
    ones, whose rows depend on the checkpoint.
    """
    stem, dot, scheme = name.rpartition(".")
    if dot and scheme in schemes.shipped():
        return replace(named(stem, config), name=name, scheme=scheme)
    if name.endswith(BASE):
        return families.base(families.load(name.removesuffix(BASE)))
    if (
        name not in families.shipped()
        and (wrapper := wrapper_of(config) or wrapper_of(config, "*")) is not None
        and wrapper.name == name
    ):
        return wrapper
    return families.load(name)
