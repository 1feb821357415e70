"""Names that differ in module paths only: wrappers left behind by training, or a language model inside a larger one.

    renaming(stored, wanted)    {stored name: wanted name}, for stored names that are not wanted as they are

    model.layers.0._orig_mod.mlp.up_proj.weight    →  model.layers.0.mlp.up_proj.weight
    language_model.model.layers.0.mlp.up_proj.weight  →  model.language_model.layers.0.mlp.up_proj.weight

It looks at names and shapes only: no table is involved, so that a mistake in one cannot get into the reference that
it is compared with. From the list of layers on, names are not changed: `k_proj` never becomes `v_proj`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from reshard.inputs.limits import numeral

Shapes = Mapping[str, tuple[int, ...]]


def renaming(stored: Shapes, wanted: Shapes) -> dict[str, str]:
    """Unambiguous renamings; names that fit nothing, or several names equally well, are left out."""
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
    """A name without the modules that no wanted name has."""
    return [part for part in parts[:-1] if part in known or numeral(part) is not None] + [parts[-1]]


def _kept(parts: Sequence[str]) -> int:
    """The index from which a name must be equal: from the list of layers, and its last two parts at least."""
    number = next((at for at, part in enumerate(parts) if numeral(part) is not None), len(parts))
    return max(0, min(number - 1, len(parts) - 2))


def _candidates(parts: list[str], by_end: Mapping[str, list[list[str]]]) -> Iterator[tuple[str, str, str]]:
    """Wanted names with the longest common ending: (path to remove, path to add, name)."""
    ends = by_end.get(".".join(parts[_kept(parts) :]), [])
    common = [_common(parts, other) for other in ends]
    for other, count in zip(ends, common, strict=True):
        if count == max(common):
            yield ".".join(parts[:-count]), ".".join(other[:-count]), ".".join(other)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts at the end are equal."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
