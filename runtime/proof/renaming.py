"""Names that differ by module paths alone: wrappers that training leaves behind, and where a language model stands inside a larger one.

    renaming(stored, wanted)    {stored name: wanted name}, for the stored names that are not wanted as they are

    model.layers.0._orig_mod.mlp.up_proj.weight    →  model.layers.0.mlp.up_proj.weight
    language_model.model.layers.0.mlp.up_proj.weight  →  model.language_model.layers.0.mlp.up_proj.weight

Names and shapes are all it looks at: no table has a say, so that an error in one cannot get into the reference that it is held against.
From the list of layers on, names stay what they are: `k_proj` never becomes `v_proj`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from reshard.inputs.limits import numeral

Shapes = Mapping[str, tuple[int, ...]]


def renaming(stored: Shapes, wanted: Shapes) -> dict[str, str]:
    """What can be told without doubt; names that fit nothing, or several things equally well, are left out."""
    known = {part for name in wanted for part in name.split(".")}
    free = {name: shape for name, shape in wanted.items() if name not in stored}
    by_end: dict[str, list[list[str]]] = defaultdict(list)
    for name in free:
        parts = name.split(".")
        by_end[".".join(parts[_kept(parts) :])].append(parts)
    candidates: dict[str, list[tuple[str, str, str]]] = {}
    for name, shape in stored.items():
        if name not in wanted:
            bare = _bare(name.split("."), known)
            candidates[name] = [found for found in _candidates(bare, by_end) if free[found[2]] == shape]
    votes = Counter((old, new) for found in candidates.values() for old, new, _ in found)
    chosen: dict[str, str] = {}
    for name, found in candidates.items():
        best = sorted(found, key=lambda each: -votes[each[:2]])
        if best and (len(best) == 1 or votes[best[0][:2]] > votes[best[1][:2]]):
            chosen[name] = best[0][2]
    taken = Counter(chosen.values())
    return {name: new for name, new in chosen.items() if taken[new] == 1}


def _bare(parts: Sequence[str], known: set[str]) -> list[str]:
    """A name without the modules that occur nowhere in the names that are wanted."""
    return [part for part in parts[:-1] if part in known or numeral(part) is not None] + [parts[-1]]


def _kept(parts: Sequence[str]) -> int:
    """From where on a name has to be the same: from the list of layers, and by its last two parts at least."""
    number = next((at for at, part in enumerate(parts) if numeral(part) is not None), len(parts))
    return max(0, min(number - 1, len(parts) - 2))


def _candidates(parts: list[str], by_end: Mapping[str, list[list[str]]]) -> Iterator[tuple[str, str, str]]:
    """The wanted names that end as this one does, as far as possible: (path that goes, path that comes, name)."""
    ends = by_end.get(".".join(parts[_kept(parts) :]), [])
    common = [_common(parts, other) for other in ends]
    for other, count in zip(ends, common, strict=True):
        if count == max(common):
            yield ".".join(parts[:-count]), ".".join(other[:-count]), ".".join(other)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts at the end are the same."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
