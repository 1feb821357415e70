"""Which layers a rule of `[model]` names: alternatives `a | b`, of which the first counts that config.json answers.

    all             every layer
    even            0, 2, 4, …
    layer_types     the "sliding_attention" entries of that list
    KEY WORD        the entries of another such list that are this word, or number; the list may be of pairs, of a list and how often it
                    comes
    from KEY        layers ≥ that number
    last KEY        so many layers at the end
    each KEY        each KEY-th: of 4 these are 3, 7, 11, …
    but KEY         all but these
    RULE before KEY those of a rule that come before that layer
    windowed        the layers that have a window; no answer where config.json gives no window
    KEY             those for which that list, of one entry for each layer, says 1 or true

A KEY of `from`, `each`, `but` and `before` may be a number.
"""

from collections.abc import Callable

from ..errors import ReshardError
from ..inputs.limits import numeral
from .config import Config
from .notation import evaluate


def layers_named(rule: str, layers: int, config: Config, windowed: Callable[[], tuple[int, ...] | None]) -> tuple[int, ...]:
    """The layers, of so many, that a rule names; none where config.json answers no alternative."""
    for alternative in rule.split("|"):
        found = _named(alternative.strip(), layers, config, windowed)
        if found is not None:
            return found
    return ()


def _named(rule: str, layers: int, config: Config, windowed: Callable[[], tuple[int, ...] | None]) -> tuple[int, ...] | None:
    before, said, end = rule.partition(" before ")
    if said:
        found, number = _named(before, layers, config, windowed), evaluate(end, config.get)
        return None if found is None or number is None else tuple(at for at in found if at < number)
    word, _, key = rule.partition(" ")
    if rule == "windowed":
        return windowed()
    if rule in ("all", "even"):
        return tuple(range(0, layers, 1 if rule == "all" else 2))
    if key and word in ("from", "each", "but", "last"):
        number = evaluate(key, config.get)
        if number is None:
            return None
        if word == "last":
            return tuple(range(max(layers - number, 0), layers))
        if word == "from":
            return tuple(range(number, layers))
        each = {at for at in range(layers) if number and (at + 1) % number == 0}
        return tuple(sorted(each if word == "each" else set(range(layers)) - each))
    if key and word.isidentifier():
        return _listed(word, layers, config, key)
    if key or not rule.isidentifier():
        raise ReshardError(
            f'[model]: "{rule}" does not name layers',
            'rules are all, even, layer_types, windowed, "from KEY", "each KEY", "but KEY", "KEY WORD", KEY, and one of these "before KEY"',
        )
    return _listed(rule, layers, config)


def _listed(key: str, layers: int, config: Config, word: str = "sliding_attention") -> tuple[int, ...] | None:
    """What a list of config.json says, of one entry for each layer."""
    entries = config.get(key)
    if not isinstance(entries, list) or not entries:
        return None
    if all(isinstance(entry, list) for entry in entries):
        entries = [one for some, times in entries for one in some * times]
    if len(entries) < layers:
        raise ReshardError(f"config.json: {key} names {len(entries)} layers, the model has {layers}")
    return tuple(at for at in range(layers) if _is(entries[at], word))


def _is(entry: object, word: str) -> bool:
    """Whether an entry is this word, or this number; or true, where no number is asked for."""
    return entry == word if isinstance(entry, str) else str(entry) == word if numeral(word) is not None else bool(entry)
