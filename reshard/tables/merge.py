"""`like`: a table as what it changes in another one."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ReshardError
from ..inputs import decode

Data = dict[str, Any]
Parent = Callable[[str], str]  # the text of the table that `like` names


class Chain(NamedTuple):
    """A table as its author wrote it, and those that it is like, each after its child: data without `like`,
    and TOML by name.
    """

    tables: tuple[Data, ...]
    texts: dict[str, str]

    def on(self, child: Data, text: str) -> "Chain":
        """The same with one more table in front. `text`: `child` as TOML, which shard directories keep."""
        if child["name"] in self.texts:
            raise leads_nowhere(child["name"], next(iter(self.texts)))
        return Chain((child, *self.tables), {child["name"]: text, **self.texts})


def chain(text: str, where: str, check: Callable[[Data, str], None], parent: Parent | None) -> Chain:
    """A table and all that it is like. `check` refuses data that is none."""
    tables: list[Data] = []
    texts: dict[str, str] = {}
    while True:
        data = decode.toml_of(text, where)
        texts[str(data.get("name"))] = text
        check(data, where)
        tables.append(data)
        like = data.pop("like", None)
        if like is None:
            return Chain(tuple(tables), texts)
        if like in texts or parent is None:
            raise leads_nowhere(where, like)
        text, where = parent(like), f"{like}.toml"


def leads_nowhere(where: str, like: str) -> ReshardError:
    return ReshardError(f'{where}: like = "{like}" leads nowhere')


def merged(tables: Sequence[Data]) -> Data:
    """The tables of a chain as one. Each adds rows and keys to those of the next; a row of the same stored name
    replaces its.
    """
    whole: Data = {}
    for child in reversed(tables):
        whole = _on(child, whole)
    return whole


def _on(child: Data, parent: Data) -> Data:
    parent = _respelled(parent, child.get("names", {}))
    gone = child.get("without", ())
    there = {row[0] for row in parent.get("rows", ())}
    if missing := next((name for name in gone if name not in there), None):
        raise ReshardError(f'table "{child.get("name")}": no table that it is like has the row {missing}')
    parent = _without(parent, gone)
    # what another table is for, this one is not
    found = {key: value for key, value in parent.items() if key != "match"}
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(parent.get(key), dict):
            found[key] = {**parent[key], **value}
        elif key == "rows":
            found[key] = _replaced(parent.get(key, ()), value)
        elif key in ("aside", "one_of", "towers"):
            found[key] = [*parent.get(key, ()), *value]
        elif key != "without":
            found[key] = value
    return found


def _replaced(rows: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows, those of the same stored name replaced by all that `others` have of it, and the rest of `others`."""
    own = defaultdict(list)
    for row in others:
        own[row[0]].append(row)
    there = {row[0] for row in rows}
    placed: set[str] = set()
    found: list[Sequence[str]] = []
    for row in rows:
        if row[0] not in own:
            found.append(row)
        elif row[0] not in placed:
            placed.add(row[0])
            found += own[row[0]]
    return found + [row for row in others if row[0] not in there]


def _without(parent: Data, gone: Sequence[str]) -> Data:
    """A table without some of its rows, and without what it says of tags that only these had."""
    if not gone:
        return parent
    rows = [row for row in parent["rows"] if row[0] not in gone]
    words = {word for row in rows for word in (row[3] if len(row) > 3 else "").split()}
    return parent | {
        "rows": rows,
        "optional": {tag: key for tag, key in parent.get("optional", {}).items() if tag in words},
    }


def _respelled(parent: Data, names: Mapping[str, list[str]]) -> Data:
    """The rows of a table whose names begin in other ways: `"model." = ["language_model.model.",
    "model.language_model."]`.
    """

    def spelled(text: str) -> list[str]:
        start = next((start for start in sorted(names, key=len, reverse=True) if text.startswith(start)), None)
        return [text] if start is None else [other + text[len(start) :] for other in names[start]]

    if not names:
        return parent
    found = dict(parent)
    prefix = parent.get("prefix", [])
    found["prefix"] = [other for text in ([prefix] if isinstance(prefix, str) else prefix) for other in spelled(text)]
    found["rows"] = [
        [" | ".join(other for text in row[0].split(" | ") for other in spelled(text)), *row[1:]]
        for row in parent.get("rows", ())
    ]
    found["aside"] = [other for text in parent.get("aside", ()) for other in spelled(text)]
    return found
