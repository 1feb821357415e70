"""Likeness: what the stored names of a checkpoint are, folded, and what tensors of such names hold in the tables that
are there.

Guesses by names and shapes alone; knows nothing of TOML or of what becomes of a guess.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ..checkpoints.published import Published
from ..model.sizes import axes_of, extent
from ..tables import families
from ..tables.notation import fold, parse_pattern

# what stands before the number of a layer
LAYERS = ("layers", "h", "blocks", "layer", "block", "decoder_layers", "mtp_layers")
Sizes = dict[str, int]


@dataclass(frozen=True)
class Found:
    """A folded stored name: how many tensors it stands for, their usual shape, and the layers they are in."""

    folded: str
    count: int
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None
    axes: tuple[str, ...]  # one per placeholder: layer, experts, or what has no name yet

    @property
    def name(self) -> str:
        """The name as a row has it: model.layers.{layer}.mlp.experts.{experts}.w1"""
        pieces = self.folded.split("{}")
        return "".join(
            piece + hole for piece, hole in zip(pieces, (*(f"{{{axis}}}" for axis in self.axes), ""), strict=True)
        )

    @property
    def end(self) -> str:
        """What stands behind the number of the layer, or the whole name."""
        return self.name.partition("{layer}.")[2] or self.name


@dataclass(frozen=True)
class Meaning:
    """What a stored tensor of some name holds in a shipped table."""

    pattern: str
    leaves: str
    table: str
    optional: bool = False


# --- what is there ----------------------------------------------------------------------------------------------------


def found_in(published: Published) -> list[Found]:
    """The folded names of a checkpoint, in the order of their first tensors."""
    groups: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    for name, (_, entry) in published.tensors.items():
        kind, numbers = fold(name)
        groups[kind].append((numbers, entry.shape))
    found = []
    for kind, members in groups.items():
        axes = _placeholders(kind)
        layers = tuple(sorted({numbers[axes.index("layer")] for numbers, _ in members})) if "layer" in axes else None
        shape = Counter(shape for _, shape in members).most_common(1)[0][0]
        found.append(Found(kind, len(members), shape, layers, axes))
    return found


def _placeholders(kind: str) -> tuple[str, ...]:
    axes: list[str] = []
    segments = kind.split(".")
    for at, segment in enumerate(segments):
        if segment == "{}":
            before = segments[at - 1] if at else ""
            axis = (
                "layer"
                if "layer" not in axes and (before in LAYERS or not axes)
                else "experts"
                if "expert" in before
                else f"n{len(axes)}"
            )
            axes.append(axis if axis not in axes else f"n{len(axes)}")
    return tuple(axes)


# --- what it is elsewhere ---------------------------------------------------------------------------------------------


@cache
def _known() -> dict[str, dict[str, Meaning]]:
    """Shipped table → end of a stored name → what it holds there."""
    return {name: dict(_ends(name)) for name in families.shipped()}


def _ends(family: str) -> Iterator[tuple[str, Meaning]]:
    table = families.load(family)
    data = table.written
    for row in data["rows"]:
        for spelling in row[0].split(" | "):
            text = spelling.lstrip("~")
            yield (
                text.partition("{layer}.")[2] or text.partition("{layer:extra}.")[2] or text,
                Meaning(_plain(row[1]), _plain(row[2]), family, "?" in " ".join(row[3:])),
            )


def _plain(text: str) -> str:
    """Without variants: of the kinds of layers that need them elsewhere, nothing is known here."""
    return re.sub(r"@\w+", "", text)


@cache
def buffers() -> set[str]:
    """Ends of the names that shipped tables keep aside, and none has a row for: what one does not read may be another's
    weights.
    """
    texts = {template.text.lstrip("~") for name in families.shipped() for template in families.load(name).aside}
    return {text.partition("{layer}.")[2] or text for text in texts} - {
        end for ends in _known().values() for end in ends
    }


def by_likeness(found: Iterable[Found]) -> list[str]:
    """Shipped tables, the one with most of these names and fewest others first; among equals the one that others are
    like.
    """
    ends = {each.end for each in found}

    def distance(name: str) -> tuple[float, int, str]:
        own = {end for end, meaning in _known()[name].items() if not meaning.optional}
        return len(ends ^ own) - 2 * len(ends & _known()[name].keys()), -_heirs()[name], name

    return sorted(_known(), key=distance)


@cache
def _heirs() -> Counter[str]:
    """Shipped table → how many others are like it."""
    return Counter(parent for name in families.shipped() for parent in families.load(name).texts if parent != name)


def meanings(each: Found, order: Iterable[str]) -> Iterator[Meaning]:
    """What the name is in the tables most alike; then what a name that ends like it is, by two words and by one."""
    tail = each.end.split(".")
    for words in (len(tail), 3, 2):
        end = ".".join(tail[-words:])
        for name in order:
            for known, meaning in _known()[name].items():
                same = known == end if words >= len(tail) else known.split(".")[-words:] == tail[-words:]
                if same and ("{layer}" in each.name) == (not _outside(name, known)):
                    for pattern in meaning.pattern.split(" | "):
                        yield Meaning(pattern, meaning.leaves, name)


@cache
def _outside(family: str, end: str) -> bool:
    """Whether the name stands outside the layers."""
    return any("{layer" not in row.name.text and row.name.text.lstrip("~") == end for row in families.load(family).rows)


def fits(meaning: Meaning, each: Found, sizes: Sizes) -> bool:
    """Whether the pattern has the dimensions of the shape, and those sizes that are known."""
    pattern = parse_pattern(meaning.pattern, _compounds(sizes))
    if len(pattern.dims) != len(each.shape) or any(axis in path for path in pattern.axes for axis in each.axes):
        return False
    return all(
        extent(dim, sizes) == size
        for dim, size in zip(pattern.dims, each.shape, strict=True)
        if axes_of(dim) <= sizes.keys()
    )


def free(meaning: Meaning, each: Found, used: Mapping[str, set[int | None]]) -> bool:
    """Whether nothing else in these layers is that logical tensor."""
    here = set(each.layers) if each.layers is not None else {None}
    return not any(used[leaf] & here for leaf in meaning.leaves.split() if leaf in used)


def _compounds(sizes: Sizes) -> dict[str, tuple[str, ...]]:
    return {"heads": ("kv", "group")} if "group" in sizes else {}
