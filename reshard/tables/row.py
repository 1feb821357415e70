"""Rows of a table: stored tensors, their layouts, and the logical tensors that they hold."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from ..containers.dtypes import CONSTANTS
from ..errors import ReshardError
from ..inputs import limits
from .axes import atoms
from .notation import Pattern, Template, bases, parse_pattern, parse_template, variant_of, varied

STAGES = ("first", "last", "every")


class Row(NamedTuple):
    """One stored tensor, or a regular set of them: its name, how it is laid out, and the logical tensors it holds."""

    name: Template
    pattern: Pattern
    leaves: tuple[str, ...]
    others: tuple[Template, ...] = ()  # other spellings of the name
    layouts: tuple[Pattern, ...] = ()  # other patterns, distinguished by the shape
    kinds: frozenset[str] = frozenset()  # of `one_of`
    either: tuple[frozenset[str], ...] = ()  # of each of these, one kind
    tags: frozenset[str] = frozenset()  # ending in ?
    stage: str = "every"
    whole: bool = False  # ignores tensor parallelism
    zero: bool = False  # content on coordinate 0, zeros elsewhere
    cut: str | None = None  # cut this axis instead
    layers: frozenset[int] | None = None  # the only ones that have it
    tower: str = ""  # the component that it belongs to, if that is not the language model: stored whole

    def within(self, kinds: Set[str]) -> bool:
        """Whether a layer of these kinds has this row."""
        return self.kinds <= kinds and all(one & kinds for one in self.either)


class Constant(NamedTuple):
    """A scalar that an engine wants and no checkpoint has; one per layer of the logical tensor `beside`."""

    name: Template
    dtype: str
    value: float
    beside: str


def parse_rows(
    data: Mapping[str, Any],
    where: str,
    groups: Sequence[Sequence[str]] = (),
    axes: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    once: bool = True,
) -> tuple[tuple[Row, ...], dict[str, tuple[str, ...]]]:
    """The rows of a table, and its compound axes with those of variants. `groups`: its `one_of`; `axes`:
    compounds defined elsewhere; `once`: no stored name has two rows (of a format it may: no rank has both).
    """
    compounds = {**axes, **atoms(data.get("axes", {}), where)}
    kinds = {kind for group in groups for kind in group}
    rows = tuple(_row(row, compounds, kinds, where) for row in data.get("rows", ()))
    compounds |= {
        varied(name, variant): tuple(varied(atom, variant) for atom in parts)
        for variant in sorted({variant_of(axis) for axis in axes_of_rows(rows)} - {""})
        for name, parts in tuple(compounds.items())
    }
    ruled = data.get("layers", {}).keys()
    told = [set(group) for group in groups if set(group) & ruled or _distinct(rows, group)]
    if once and (twice := _doubled(rows, told)):
        raise ReshardError(f"{where}: {twice} has two rows")
    return rows, compounds


def _doubled(rows: Iterable[Row], groups: Sequence[Set[str]]) -> str:
    """A stored name that two rows have in one layer, or nothing. `groups`: kinds of which each layer is known to have
    one.
    """
    seen: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name in (row.name, *row.others):
            if any(not _apart(row, other, groups) for other in seen[name.folded]):
                return name.folded
            seen[name.folded].append(row)
    return ""


def _distinct(rows: Sequence[Row], group: Sequence[str]) -> bool:
    """Whether every kind of a set shows itself in a layer by a tensor that layers of no other kind have."""
    count = Counter(name.folded for row in rows for name in (row.name, *row.others))
    telling = [
        row.kinds for row in rows if not row.tags and all(count[name.folded] == 1 for name in (row.name, *row.others))
    ]
    return all(any(kind in kinds for kinds in telling) for kind in group)


def _apart(row: Row, other: Row, groups: Sequence[Set[str]]) -> bool:
    if row.layers is not None and other.layers is not None and not row.layers & other.layers:
        return True
    ours, theirs = (one.kinds.union(*one.either) for one in (row, other))
    return any(ours & group and theirs & group and not ours & theirs & group for group in groups)


def axes_of_rows(rows: Iterable[Row]) -> set[str]:
    """The axes of these rows, in names and in patterns."""
    return bases(axis for row in rows for path in row.pattern.axes for axis in (*row.name.axes, *path))


def _row(entry: list[str], compounds: Mapping[str, tuple[str, ...]], kinds: set[str], where: str) -> Row:
    text, pattern_text, leaves_text, *rest = entry
    words = rest[0].split() if rest else []
    try:
        name, *others = [parse_template(one, compounds) for one in text.split(" | ")]
        pattern, *layouts = [parse_pattern(one, compounds) for one in pattern_text.split(" | ")]
    except ReshardError as error:
        raise ReshardError(f"{where}: {error.message}", error.hint) from None
    leaves = tuple(leaves_text.split())
    for one in (pattern, *layouts):
        if len(leaves) != len(one.axes):
            raise ReshardError(
                f'{where}: {text}: pattern "{pattern_text}" has {len(one.axes)} leaves, {len(leaves)} logical '
                f"names are given"
            )
    if len(set(leaves)) < len(leaves):
        raise ReshardError(f"{where}: {text}: a logical tensor is named twice")
    if odd := next((other for other in others if sorted(other.axes) != sorted(name.axes)), None):
        raise ReshardError(f"{where}: {odd.text} has other placeholders than {name.text}")
    both = [axis for axis in name.axes for one in (pattern, *layouts) for path in one.axes if axis in path]
    if both:
        raise ReshardError(f"{where}: {text}: axis {both[0]} is in both the name and in the pattern")
    cut = next((word[4:] for word in words if word.startswith("cut=")), None)
    layers = next((word[7:] for word in words if word.startswith("layers=")), None)
    plain = [word for word in words if not word.startswith(("cut=", "layers="))]
    axes = {axis for path in pattern.axes for axis in path} | set(name.axes)
    if cut is not None and cut not in axes:
        raise ReshardError(f"{where}: {text}: cut={cut}, but the row's axes are {', '.join(sorted(axes))}")
    if len(stages := [word for word in plain if word in STAGES]) > 1:
        raise ReshardError(f"{where}: {text}: {' and '.join(stages)}: one word says the stage")
    known = kinds | set(STAGES) | {"whole", "zero"}
    either = tuple(frozenset(word.split("|")) for word in plain if "|" in word)
    bad = [
        word
        for word in plain
        if word not in known and not word.endswith("?") and not ("|" in word and set(word.split("|")) <= kinds)
    ]
    if bad:
        raise ReshardError(
            f'{where}: {text}: unknown word "{bad[0]}"',
            f"words are {', '.join(sorted(known))}, cut=AXIS, layers=0-3,7, or a tag ending in ?",
        )
    return Row(
        name,
        pattern,
        leaves,
        tuple(others),
        tuple(layouts),
        kinds=frozenset(kinds & set(plain)),
        either=either,
        tags=frozenset(word for word in plain if word.endswith("?")),
        stage=next(iter(stages), "every"),
        whole="whole" in plain,
        zero="zero" in plain,
        cut=cut,
        layers=None if layers is None else _numbers(layers, f"{where}: {text}"),
    )


def _numbers(text: str, where: str) -> frozenset[int]:
    """0-3,7 as numbers."""
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        first, last = limits.numeral(low), limits.numeral(high or low)
        if first is None or last is None or not first <= last < limits.TENSORS:
            raise ReshardError(f"{where}: layers={text} names no layers", "write layers=0-3,7")
        found.update(range(first, last + 1))
    return frozenset(found)


def parse_constant(entry: Sequence[Any], where: str) -> Constant:
    if [type(part) for part in entry] not in ([str, str, int, str], [str, str, float, str]) or entry[
        1
    ] not in CONSTANTS:
        raise ReshardError(
            f"{where}: constant {entry!r} is not [name, {' or '.join(CONSTANTS)}, value, logical tensor]"
        )
    return Constant(parse_template(entry[0]), entry[1], float(entry[2]), entry[3])
