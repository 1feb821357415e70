"""Which layers a rule of `[model]` names: alternatives `a | b`, of which the first counts that config.json answers.

    all             every layer
    even            0, 2, 4, …
    layer_types     the "sliding_attention" entries of that list
    KEY WORD        the entries of another such list that are this word, or number; the list may be of pairs, of a list
                    and how often it comes
    from KEY        layers ≥ that number
    last KEY        so many layers at the end
    each KEY        each KEY-th: of 4 these are 3, 7, 11, …
    but KEY         all but these
    RULE before KEY those of a rule that come before that layer
    windowed        the layers that have a window; no answer where config.json gives no window
    KEY             those for which that list, of one entry for each layer, says 1 or true

A KEY of `from`, `last`, `each`, `but` and `before` may be a number.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from ..errors import ReshardError
from ..inputs.limits import numeral
from .config import Config
from .expression import Expression, shown
from .expression import parse as parse_expression

Windowed = Callable[[], tuple[int, ...] | None]

_HINT = (
    'rules are all, even, layer_types, windowed, "from KEY", "last KEY", "each KEY", "but KEY", "KEY WORD", KEY, '
    'and one of these "before KEY"'
)


class Rule(NamedTuple):
    """One alternative: `word`, what it says about `key` or `number`, and the layers it ends `before`."""

    word: str
    key: str = ""
    number: Expression | None = None
    before: Expression | None = None


@cache
def parse(text: str) -> tuple[Rule, ...]:
    """The alternatives of a rule. Raises ReshardError for what names no layers."""
    return tuple(_parsed(part.strip(), text) for part in text.split("|"))


def _parsed(text: str, whole: str) -> Rule:
    rule, _, end = text.partition(" before ")
    before = parse_expression(end) if end else None
    word, _, key = rule.partition(" ")
    if rule in ("all", "even", "windowed"):
        return Rule(rule, before=before)
    if key and word in ("from", "each", "but", "last"):
        return Rule(word, number=parse_expression(key), before=before)
    if not all(part.isidentifier() for part in word.split(".")) or " " in key:
        raise ReshardError(f'"{whole}" does not name layers', _HINT)
    return Rule(key or "sliding_attention", word, before=before)


def layers_named(rule: str, layers: int, config: Config, windowed: Windowed) -> tuple[int, ...]:
    """The layers, of so many, that a rule names; none where config.json answers no alternative."""
    for alternative in parse(rule):
        found = _named(alternative, layers, config, windowed)
        end = alternative.before.size(config.get) if alternative.before else layers
        if found is not None and end is not None:
            return tuple(at for at in found if at < end)
    return ()


def _named(rule: Rule, layers: int, config: Config, windowed: Windowed) -> tuple[int, ...] | None:
    if rule.key:
        return _listed(rule.key, layers, config, rule.word)
    if rule.word == "windowed":
        return windowed()
    if rule.number is None:
        return tuple(range(0, layers, 1 if rule.word == "all" else 2))
    number = rule.number.size(config.get)
    if number is None:
        return None
    if rule.word in ("last", "from"):
        return tuple(range(max(layers - number, 0) if rule.word == "last" else number, layers))
    return tuple(at for at in range(layers) if (number > 0 and (at + 1) % number == 0) == (rule.word == "each"))


def _listed(key: str, layers: int, config: Config, word: str) -> tuple[int, ...] | None:
    """What a list of config.json says, of one entry for each layer."""
    entries = config.get(key)
    if not isinstance(entries, list) or not entries:
        return None
    if all(isinstance(entry, list) for entry in entries):
        entries = list(_repeated(key, entries, layers))
    if len(entries) < layers:
        raise ReshardError(f"config.json: {key} names {len(entries)} layers, the model has {layers}")
    return tuple(at for at in range(layers) if _is(entries[at], word))


def _repeated(key: str, entries: list[Any], layers: int) -> list[Any]:
    """Pairs of a list and how often it comes, written out as far as there are layers."""
    found: list[Any] = []
    for entry in entries:
        some, times = entry if len(entry) == 2 else (None, None)
        if not isinstance(some, list) or isinstance(times, bool) or not isinstance(times, int) or times < 0:
            raise ReshardError(f"config.json: {key} has the entry {shown(entry)}, expected a list and a count")
        found += some * min(times, layers)
    return found


def _is(entry: object, word: str) -> bool:
    """Whether an entry is this word, or this number; or true, where no number is asked for."""
    return entry == word if isinstance(entry, str) else str(entry) == word if numeral(word) is not None else bool(entry)
