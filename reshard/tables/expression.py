"""The one expression grammar of tables: sizes, facts, conditions and the numbers in layer rules, answered by
config.json.

    expression  = alternative { "|" alternative }        the first that config.json answers counts
    alternative = sum [ "if" condition ]                  answered only where the condition is true
    condition   = [ "!" ] KEY | sum ( "==" | "!=" | "<=" ) ( NUMBER | "="WORD | KEY )
    sum         = product { "+" product }
    product     = factor { ( "*" | "/" ) factor }
    factor      = NUMBER | "true" | "false" | "="WORD | "count" KEY | KEY | condition

A KEY is dotted: `a.b`. It answers nothing where config.json lacks it or has null, and so does what is computed from it.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from reprlib import Repr
from typing import Any, NamedTuple, NoReturn

from ..errors import ReshardError
from ..inputs.limits import DIGITS, numeral

Lookup = Callable[[str], Any]  # None for a key that config.json lacks

_TOKEN = re.compile(r"\s*(?:([|+*/]|==|!=|<=|!)|=([^\s|]+)|([0-9.](?:[eE][+-]|[\w.])*|[A-Za-z_][\w.-]*))", re.ASCII)
_NUMBER = re.compile(r"(?=[0-9]+[.eE])[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Node(NamedTuple):
    """`word`: an operator, `key`, `count`, or `constant`; `parts`: its operands, or what it says."""

    word: str
    parts: tuple[Any, ...]


class Expression(NamedTuple):
    """A parsed expression; `text`: as written."""

    text: str
    alternatives: tuple[Node, ...]

    def value(self, get: Lookup) -> Any:
        """What the first alternative that is answered comes to, None where none is. Raises ReshardError for arithmetic
        on no number.
        """
        return next((found for node in self.alternatives if (found := _value(node, get)) is not None), None)

    def says(self, get: Lookup) -> bool:
        """As a condition: whether any alternative is true."""
        return any(_value(node, get) for node in self.alternatives)

    def size(self, get: Lookup) -> int | None:
        """As a number of elements. Raises ReshardError where a key is no non-negative integer, or a quotient is not
        whole.
        """
        found = next(
            (found for node in self.alternatives if (found := _value(node, get, whole=True)) is not None), None
        )
        return None if found is None else _elements(self.text, found)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of config.json that it reads, in order."""
        return tuple(dict.fromkeys(key for node in self.alternatives for key in _keys(node)))


@cache
def parse(text: str) -> Expression:
    """Raises ReshardError naming the place where the text is no expression."""
    return _Parser(text).expression()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def expression(self) -> Expression:
        found = [self._alternative()]
        while self._takes("|"):
            found.append(self._alternative())
        if self.text[self.at :].strip():
            self._refuse("an operator")
        return Expression(self.text, tuple(found))

    def _alternative(self) -> Node:
        value = self._compared()
        return Node("if", (value, self._compared())) if self._takes("if") else value

    def _compared(self) -> Node:
        left = self._sum()
        for sign in ("==", "!=", "<="):
            if self._takes(sign):
                return Node(sign, (left, self._factor()))
        return left

    def _sum(self) -> Node:
        found = self._product()
        while self._takes("+"):
            found = Node("+", (found, self._product()))
        return found

    def _product(self) -> Node:
        found = self._factor()
        while sign := self._takes("*", "/"):
            found = Node(sign, (found, self._factor()))
        return found

    def _factor(self) -> Node:
        if self._takes("!"):
            return Node("!", (self._key(),))
        if self._takes("count"):
            return Node("count", (self._key(),))
        match = _TOKEN.match(self.text, self.at)
        if match is None or match[1] or match[3] == "if":
            self._refuse("a number, a key of config.json or =word")
        start, self.at = self.at, match.end()
        if match[2]:
            return Node("constant", (match[2],))
        word = match[3]
        if word in ("true", "false"):
            return Node("constant", (word == "true",))
        if word[0] not in "0123456789.":
            return Node("key", (word,))
        number = numeral(word)
        if number is None and not (_NUMBER.fullmatch(word) and math.isfinite(float(word))):
            self.at = start
            self._refuse(f"a number of at most {DIGITS} digits")
        return Node("constant", (float(word) if number is None else number,))

    def _key(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        if match is None or not match[3] or not re.match("[A-Za-z_]", match[3]):
            self._refuse("a key of config.json")
        self.at = match.end()
        return match[3]

    def _takes(self, *words: str) -> str:
        match = _TOKEN.match(self.text, self.at)
        if match is None or (match[1] or match[3]) not in words:
            return ""
        self.at = match.end()
        return match[1] or match[3]

    def _refuse(self, wanted: str) -> NoReturn:
        rest = self.text[self.at :].strip()
        raise ReshardError(
            f'"{self.text}" is not an expression: expected {wanted} at {repr(rest) if rest else "its end"}',
            'such as "head_dim | hidden_size / num_attention_heads"; docs/notation.md has the grammar',
        )


@contextmanager
def within(where: str) -> Iterator[None]:
    """What is refused is refused with the place where it stands."""
    try:
        yield
    except ReshardError as error:
        raise ReshardError(f"{where}: {error.message}", error.hint) from None


def _value(node: Node, get: Lookup, whole: bool = False) -> Any:
    """What a node comes to, None where config.json does not answer. `whole`: its numbers are numbers of elements."""
    word, parts = node
    if word == "constant":
        return parts[0]
    if word == "key":
        found = get(parts[0])
        return _elements(parts[0], found) if whole and found is not None else found
    if word == "count":
        found = get(parts[0])
        return (
            len(found)
            if isinstance(found, list | str)
            else found
            if found is None
            else _elements(node_text(node), found)
        )
    if word == "!":
        return not get(parts[0])
    if word == "if":
        return _value(parts[0], get, whole) if _value(parts[1], get) else None
    one, other = (_value(part, get, whole and word not in ("==", "!=", "<=")) for part in parts)
    if word in ("==", "!="):
        return one is not None and (one == other) == (word == "==")
    if word == "<=":
        return isinstance(one, int | float) and isinstance(other, int | float) and one <= other
    if one is None or other is None:
        return None
    for part, value in zip(parts, (one, other), strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 10**DIGITS or value != value:
            raise ReshardError(f"config.json: {node_text(part)} is {shown(value)}; {node_text(node)} needs a number")
    if word == "/":
        if not other or (whole and one % other):
            raise ReshardError(f"config.json: {node_text(node)}: {shown(one)} does not divide by {shown(other)}")
        return one // other if whole else one / other
    return one + other if word == "+" else one * other


def _elements(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**DIGITS:
        raise ReshardError(f"config.json: {key} is {shown(value)}, expected a non-negative integer")
    return value


def shown(value: Any) -> str:
    """A value of config.json for a message; long ones are cut short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**DIGITS:
        return f"a number of more than {DIGITS} digits"
    return _SHORT.repr(value)


def node_text(node: Node) -> str:
    """A node as it would be written."""
    word, parts = node
    if word in ("key", "constant"):
        return f"={parts[0]}" if word == "constant" and isinstance(parts[0], str) else str(parts[0])
    if word in ("!", "count"):
        return f"{word.replace('count', 'count ')}{parts[0]}"
    return f" {word} ".join(map(node_text, parts))


def _keys(node: Node) -> Iterator[str]:
    if node.word in ("key", "count", "!"):
        yield node.parts[0]
    elif node.word != "constant":
        for part in node.parts:
            yield from _keys(part)
