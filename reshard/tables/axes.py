"""Compound axes of a table: `heads = "kv group"`."""

from collections.abc import Mapping

from ..errors import ReshardError
from ..inputs import limits


def atoms(axes: Mapping[str, str], where: str) -> dict[str, tuple[str, ...]]:
    """Compounds written out to the end: {"heads": "kv group"} → {"heads": ("kv", "group")}."""
    if len(axes) > limits.COMPOUNDS:
        raise ReshardError(f"{where}: {len(axes)} compound axes, at most {limits.COMPOUNDS} are read")
    parts = {name: text.split() for name, text in axes.items()}
    counts: dict[str, int] = {}

    def count(axis: str, seen: tuple[str, ...]) -> int:
        if axis in seen:
            raise ReshardError(f"{where}: compound axis {axis} contains itself")
        if axis not in counts:
            counts[axis] = sum(count(part, (*seen, axis)) for part in parts[axis]) if axis in parts else 1
        return counts[axis]

    for name in parts:
        if (atoms := count(name, ())) > limits.ATOMS:
            raise ReshardError(
                f"{where}: compound axis {name} stands for {atoms} axes, at most {limits.ATOMS} are allowed"
            )

    def expand(axis: str) -> tuple[str, ...]:
        return tuple(atom for part in parts[axis] for atom in expand(part)) if axis in parts else (axis,)

    return {name: expand(name) for name in parts}
