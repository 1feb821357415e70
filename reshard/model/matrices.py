"""How the matrices of a quantised checkpoint are stored: by which tensors, in which units.

The stored names say it, matrix by matrix, and the shapes say in which units; config.json has to agree. Knows a scheme,
no family.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ..errors import Problems
from ..tables import schemes
from ..tables.notation import Pattern, block_of
from ..tables.schemes import GROUPS, Layout, Part, Scheme

PLAIN = ".weight"
There = Mapping[str, Any]  # suffix → the tensor of a matrix whose name ends so


class Range(NamedTuple):
    """Least and most of what is known of a size."""

    low: int = 0
    high: int = 1 << 62

    @property
    def size(self) -> int:
        """The most that it can be, 0 where nothing is known."""
        return self.high if self.high < Range().high else 0


class Matrix(NamedTuple):
    """How one matrix is stored. `parts`: of those that are there, the pattern in (out, in); `sizes`: of axes that the
    scheme brings; `aside`: suffixes; `claim`: which of those that quantization_config makes.
    """

    layout: int
    parts: tuple[tuple[Part, Pattern], ...]
    sizes: tuple[tuple[str, int], ...]
    aside: tuple[str, ...]
    claim: int


class Found(NamedTuple):
    """A matrix and, as far as its parts tell, its shape: the dimensions before (out, in), and these."""

    matrix: Matrix
    lead: tuple[int, ...]
    out: Range
    inner: Range

    @property
    def shape(self) -> tuple[int, ...]:
        """0 for what the parts do not tell."""
        return (*self.lead, self.out.size, self.inner.size)


class Misfit(NamedTuple):
    """Why a matrix is not stored in a layout, and how many of its parts were right before."""

    fitted: int
    why: str


class Matrices:
    """The matrices of a checkpoint that a scheme stores, by the names that they would have if they were not quantised.

    `problems` collects those whose tensors contradict one another or config.json.
    """

    def __init__(
        self, scheme: Scheme, said: Mapping[str, Any], stored: Mapping[str, Any], towers: Sequence[str] = ()
    ) -> None:
        self.scheme, self.stored, self.problems = scheme, stored, Problems()
        self.claims = scheme.claims(said)
        self._towers = tuple(f"{tower}." for tower in towers)
        self._suffixes = tuple(dict.fromkeys(suffix for layout in scheme.layouts for suffix in layout.suffixes))
        self._known: dict[Any, Found | Misfit | None] = {}
        self.found: dict[str, Found] = {}
        for name in self._names():
            match self._of(name):
                case Found() as found:
                    self.found[name] = found
                case Misfit() as misfit:
                    self.problems.add(misfit.why, name.removesuffix(PLAIN))

    def plain(self) -> dict[str, Any]:
        """The tensors that would be there if nothing were quantised; a matrix has the shape that its parts tell."""
        gone = {
            name.removesuffix(PLAIN) + suffix
            for name, (matrix, *_) in self.found.items()
            for suffix in (*(part.suffix for part, _ in matrix.parts), *matrix.aside)
        }
        return {name: each for name, each in self.stored.items() if name not in gone} | self.found

    def _names(self) -> Iterator[str]:
        """The matrices that have a tensor that only quantised ones have."""
        telling = sorted(self.scheme.telling, key=len, reverse=True)
        seen = set()
        for name in self.stored:
            suffix = next((each for each in telling if name.endswith(each)), None)
            if suffix is None or name.startswith(self._towers):
                continue
            found = name[: -len(suffix)] + (PLAIN if suffix.startswith(".") else "")
            if found not in seen:
                seen.add(found)
                yield found

    def _of(self, name: str) -> Found | Misfit | None:
        """How a matrix is stored; None for what is called like a part of one, and is none."""
        stem = name.removesuffix(PLAIN)
        there = {suffix: self.stored[stem + suffix] for suffix in self._suffixes if stem + suffix in self.stored}
        key = (stem != name, *((suffix, each.dtype, each.shape) for suffix, each in there.items()))
        if key not in self._known:
            self._known[key] = self._fitted(there, bare=stem == name)
        return self._known[key]

    def _fitted(self, there: There, bare: bool) -> Found | Misfit | None:
        if not any(sum(part.suffix in there for part in layout.parts) > 1 for layout in self.scheme.layouts):
            return None
        misfits: list[Misfit] = []
        for at, layout in enumerate(self.scheme.layouts):
            if layout.bare != bare:
                continue
            for claim, (said, units) in enumerate(self.claims):
                if not layout.holds(said):
                    continue
                found = _fitting(layout, there, units)
                if not isinstance(found, Misfit):
                    parts, sizes, lead, known = found
                    aside = tuple(suffix for suffix in layout.aside if suffix in there)
                    matrix = Matrix(at, parts, tuple(sorted(sizes.items())), aside, claim)
                    return Found(matrix, lead, known["out"], known["in"])
                misfits.append(found)
        none = Misfit(0, "config.json allows none of its layouts")
        return max(misfits, key=lambda misfit: misfit.fitted, default=none)


# --- shapes -----------------------------------------------------------------------------------------------------------

Known = dict[str, Range]


def _fitting(
    layout: Layout, there: There, units: schemes.Units
) -> tuple[tuple[tuple[Part, Pattern], ...], dict[str, int], tuple[int, ...], Known] | Misfit:
    """The parts that are there, each with the pattern that its shape has, the sizes of axes that these bring, and what
    is known of the matrix then; or why they are no matrix of this layout.
    """
    known: Known = {"out": Range(), "in": Range()}
    parts: list[tuple[Part, Pattern]] = []
    sizes: dict[str, int] = {}
    lead: tuple[int, ...] | None = None
    for part in layout.parts:
        each = there.get(part.suffix)
        shown = part.suffix or "the matrix"
        if each is None:
            if part.optional:
                continue
            return Misfit(len(parts), f"{shown} is missing")
        if part.dtypes and each.dtype not in part.dtypes:
            return Misfit(len(parts), f"{shown} is {each.dtype}, {' or '.join(sorted(part.dtypes))} is needed")
        forms = list(part.forms(units))
        if not forms:
            return Misfit(len(parts), f"{shown}: config.json does not say in which units")
        for pattern, own in forms:
            before = len(each.shape) - len(pattern.dims)
            if before < 0 or (lead is not None and each.shape[:before] != lead):
                continue
            tried = _narrowed(pattern, each.shape[before:], own, known)
            if tried is not None:
                known, lead = tried, each.shape[:before]
                parts.append((part, pattern))
                sizes |= own
                break
        else:
            wanted = " or ".join(str(list(_wanted(pattern, own, known))) for pattern, own in forms)
            said = ", ".join(f"{name} {value}" for name, value in units.items())
            return Misfit(len(parts), f"{shown} is {list(each.shape)}, {said or 'the scheme'} wants {wanted}")
    return tuple(parts), sizes, lead or (), known


def _counted(axis: str) -> str:
    """An axis of groups as one that counts blocks, which has their number."""
    return f"in/{axis.removeprefix(GROUPS)}" if axis.startswith(GROUPS) else axis


def _narrowed(pattern: Pattern, shape: Sequence[int], own: Mapping[str, int], known: Known) -> Known | None:
    """What is known of `out` and `in` after a shape, None where it contradicts that."""
    found = dict(known)
    for dim, size in zip(pattern.dims, shape, strict=True):
        nodes = [_counted(str(node)) for node in dim]
        rest = [node for node in nodes if node not in own]
        size, left = divmod(size, prod(own[node] for node in nodes if node in own))
        if left or (not rest and size != 1):
            return None
        if len(rest) != 1:
            continue  # of a flat matrix the family's sizes tell what it is
        (node,) = rest
        bases, unit = block_of(node) or ((node,), 1)
        if len(bases) > 1 or bases[0] not in found:
            continue
        low, high = found[bases[0]]
        low, high = max(low, unit * (size - 1) + 1), min(high, unit * size)
        if low > high:
            return None
        found[bases[0]] = Range(low, high)
    return found


def _wanted(pattern: Pattern, own: Mapping[str, int], known: Known) -> Iterator[int | str]:
    """The shape that a pattern has after what is known; ? where nothing is."""
    for dim in pattern.dims:
        total: int | str = 1
        for node in dim:
            axis = _counted(str(node))
            bases, unit = block_of(axis) or ((axis,), 1)
            size = own.get(axis, known.get(bases[0], (0, Range().high))[1] if len(bases) == 1 else Range().high)
            total = "?" if size == Range().high or total == "?" else int(total) * -(-size // unit)
        yield total
