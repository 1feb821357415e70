"""What a checkpoint holds: logical tensors, understood from a family table, config.json and the headers.

Strict: every stored tensor is claimed by exactly one row or is on the family's `aside` list, every row is present as
the table says, and every dimension of every tensor is an equation that must hold. All problems are found and reported
together. Knows nothing about files, ranks or other formats.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from ..errors import Problems as Problems
from ..errors import ReshardError
from ..tables.config import Config as Config
from ..tables.families import Family
from ..tables.layer_rules import layers_named
from ..tables.notation import block_of, fold
from ..tables.row import Row
from ..tables.schemes import PACKED
from .naming import settle
from .quantized import quantized
from .sizes import axis_size as axis_size
from .sizes import dotted, solve


class Stored(Protocol):
    """What understanding needs of a stored tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """A logical tensor, the same in every layout. `layers`: where it exists; `dtypes`: one, or one per layer."""

    name: str
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    layers: tuple[int, ...] | None = None

    def dtype(self, point: Mapping[str, int]) -> str:
        if len(self.dtypes) == 1 or self.layers is None:
            return self.dtypes[0]
        return self.dtypes[self.layers.index(point["layer"])]

    def count(self, box: Sequence[tuple[int, int]]) -> int:
        """Elements in a box; along `layer` only layers that exist count."""
        return math.prod(
            sum(low <= layer < high for layer in self.layers or ()) if axis == "layer" else high - low
            for axis, (low, high) in zip(self.axes, box, strict=True)
        )

    @property
    def elements(self) -> int:
        return self.count([(0, size) for size in self.sizes])


@dataclass(frozen=True)
class Model:
    """All logical tensors of a checkpoint. `family`: as this checkpoint spells it; `active`: the rows in use and the
    layers of each; `alias`: tied names."""

    family: Family
    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    active: dict[int, tuple[int, ...] | None]
    alias: dict[str, str] = field(default_factory=dict)
    main_layers: int = 0
    aside: tuple[str, ...] = ()

    def form(self, name: str, layer: int) -> Tensor | None:
        """The tensor of that name as a layer has it, in whatever sizes; None where it has none. Of a packed matrix, the
        name is that of its numbers, the axes are those of the matrix.
        """
        found = (self._whole(self.tensors[key]) for key in self.forms(name))
        return next((other for other in found if other.layers is not None and layer in other.layers), None)

    def forms(self, name: str) -> list[str]:
        """The tensors that a matrix is stored in, packed or not, and those of other sizes or units."""
        return [key for key in self.tensors if key.partition("@")[0] in (name, f"{name}{PACKED}")]

    def _whole(self, tensor: Tensor) -> Tensor:
        axes = tuple(base for axis in tensor.axes for base in (block_of(axis) or ((axis,), 1))[0])
        sizes = tuple(self.sizes[axis] for axis in axes) if axes != tensor.axes else tensor.sizes
        return replace(tensor, axes=axes, sizes=sizes)

    @property
    def units(self) -> dict[str, int]:
        """Per axis, the unit in which weighted cuts must fall so that no block of a block-quantised weight is split."""
        units: dict[str, int] = {}
        for axis in {axis for tensor in self.tensors.values() for axis in tensor.axes}:
            if block := block_of(axis):
                (first, *rest), unit = block
                step = unit // math.gcd(unit, math.prod(self.sizes[other] for other in rest))
                units[first] = math.lcm(units.get(first, 1), step)
        return units


def understand(table: Family, config: Config, stored: Mapping[str, Stored], where: str = "checkpoint") -> Model:
    """The model in a directory that the family table describes; `stored` maps stored names to dtype and shape.

    Raises ReshardError listing every unclaimed, missing, doubled or misshapen tensor, every unknown or contradictory
    size.
    """
    config = config.with_defaults(table.defaults)
    table = quantized(table, config, stored, where)
    problems = Problems()
    sizes = _from_config(table, config)
    table = settle(table, stored, sizes)
    ruled = _ruled(table, config, sizes, stored)
    points, aside = _claim(table, sizes, stored, ruled, problems)
    layers = _layers(table, config, sizes, points)
    sizes |= {axis: int(axis[1:]) for row in table.rows if row.tower for axis in (*row.name.axes, *row.pattern.axes[0])}
    kind_of = _kinds(table, points, layers, ruled, problems)
    tags = _tags(table, config, points, kind_of, problems)
    active = _presence(table, sizes, points, layers, kind_of, tags, problems)
    alias = _tied(table, config, active, problems)
    if not active and not stored:
        raise ReshardError(f"{where}: holds no tensors", "is this the directory with the weights?")
    solve(table, stored, sizes, {row: points[row] for row in active}, problems)
    problems.raise_if_any(
        f'{where}: does not fit the table of family "{table.name}":',
        "if the checkpoint is right, bring a table of your own with --family my.toml; inspect --draft-table "
        "writes one to start from",
    )
    tensors = _tensors(table, stored, sizes, points, active, alias, problems)
    problems.raise_if_any(f'{where}: does not fit the table of family "{table.name}":')
    return Model(table, tensors, sizes, active, alias, layers.main, tuple(aside))


Points = dict[tuple[int, ...], str]  # numbers of the placeholders → stored name


# sets of kinds of which config.json gives each layer one, and which
Ruled = list[tuple[frozenset[str], dict[int, str]]]


def _ruled(table: Family, config: Config, sizes: Mapping[str, int], stored: Iterable[str]) -> Ruled:
    """The kinds that config.json gives the main layers: of each set those that a rule names, the others the first kind
    without a rule.
    """
    found: Ruled = []
    for group in table.one_of:
        if not table.layers.keys() & set(group):
            continue
        main = (
            sizes["layer"]
            if "layer" in sizes
            else 1 + max((max(fold(name)[1], default=-1) for name in stored), default=-1)
        )
        rest = next((kind for kind in group if kind not in table.layers), group[-1])
        kind_of = dict.fromkeys(range(main), rest)
        for kind in group:
            if kind in table.layers:
                kind_of |= dict.fromkeys(layers_named(table.layers[kind], main, config, lambda: None), kind)
        found.append((frozenset(group), kind_of))
    return found


def _is_in(row: Row, numbers: Sequence[int], ruled: Ruled) -> bool:
    """Whether a row can be in the layer that the numbers of its placeholders name,
    as far as config.json gives it kinds.
    """
    layer = _layer(row, numbers)
    return (row.layers is None or layer in row.layers) and all(
        kind_of.get(layer) in row.kinds for group, kind_of in ruled if row.kinds & group and layer in kind_of
    )


def _beyond(row: Row, numbers: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Whether the numbers of a row's placeholders are beyond its axes; how many layers there are is not known from
    config.json alone.
    """
    return any(
        axis != "layer" and number >= sizes.get(axis, number + 1)
        for axis, number in zip(row.name.axes, numbers, strict=True)
    )


def _claim(
    table: Family, sizes: Mapping[str, int], stored: Mapping[str, Stored], ruled: Ruled, problems: Problems
) -> tuple[dict[int, Points], list[str]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(table.rows):
        rows[row.name.folded].append(at)
    beside = {template.folded for template in table.aside}
    points: dict[int, Points] = defaultdict(dict)
    aside = []

    def claims(name: str, key: str, numbers: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """The rows that a tensor can be of, each with the numbers of its placeholders."""
        all_found = [
            (at, table.rows[at].name.numbers(numbers if name not in rows else ()))
            for at in rows.get(name, rows.get(key, ()))
        ]
        return [(at, found) for at, found in all_found if found is not None and _is_in(table.rows[at], found, ruled)]

    def place(at: int, found: tuple[int, ...], name: str) -> None:
        if (other := points[at].setdefault(found, name)) != name:
            problems.add(f"{dotted(table.rows[at])}: two stored names for one tensor", f"{other!a} and {name!a}")

    unclear = {}
    for name in stored:
        key, numbers = fold(name)
        here = claims(name, key, numbers)
        if key in beside:  # a row's tensors come first; aside are those beyond
            here = [(at, found) for at, found in here if not _beyond(table.rows[at], found, sizes)]
        if len(here) == 1:
            place(*here[0], name)
        elif here:
            unclear[name] = here
        elif key in beside or name in beside:
            aside.append(name)
        else:
            problems.add(f"no row claims {key}", f"{name} {list(stored[name].shape)}")
    seen = _seen(table, points)
    for name, here in unclear.items():  # one name in layers of several kinds: the other tensors of the layer tell
        at, found = next(
            (one for one in here if table.rows[one[0]].within(seen[_layer(table.rows[one[0]], one[1])])), here[0]
        )
        place(at, found, name)
    return points, aside


def _layer(row: Row, numbers: Sequence[int]) -> int:
    """The layer that the numbers of a row's placeholders name; of a row without layers, -1."""
    return numbers[row.name.axes.index("layer")] if "layer" in row.name.axes else -1


def _seen(table: Family, points: Mapping[int, Points]) -> dict[int, set[str]]:
    """The kinds of which a layer has tensors."""
    seen: dict[int, set[str]] = defaultdict(set)
    for at, found in points.items():
        for numbers in found:
            seen[_layer(table.rows[at], numbers)].update(table.rows[at].kinds)
    return seen


def _from_config(table: Family, config: Config) -> dict[str, int]:
    told = {axis: config.size(expression) for axis, expression in table.sizes.items()}
    return {axis: size for axis, size in told.items() if size is not None}


@dataclass(frozen=True)
class _Layers:
    main: int
    total: int
    extra: str | None  # the kind of the layers from `main` on

    def of(self, row: Row, table: Family) -> range:
        """The layers that a row's name can mean: where a table counts the extra ones apart, no name means both."""
        if row.name.extra:
            return range(self.main, self.total)
        return range(self.main if table.counts_apart else self.total)


def _layers(table: Family, config: Config, sizes: dict[str, int], points: Mapping[int, Points]) -> _Layers:
    seen = [
        _layer(row, numbers)
        for at, row in enumerate(table.rows)
        if "layer" in row.name.axes
        for numbers in points.get(at, ())
    ]
    stacked = any("layer" in path for row in table.rows for path in row.pattern.axes)
    main = sizes.get("layer", max(seen, default=-1) + 1)
    kind, key = next(iter(table.extra.items()), (None, ""))
    number = (config.size(key) or 0) if kind else 0
    extra = number if kind and number and max(seen, default=-1) >= main else 0
    if main + extra > 4 * len(seen) + 1000:  # all that follows is as large as the number of layers
        raise ReshardError(
            f"config.json or a name promises {main + extra} layers, the files hold {len(seen)} tensors of layers"
        )
    if not stacked:
        sizes["layer"] = main + extra
    return _Layers(main, main + extra, kind if extra else None)


def _tags(
    table: Family,
    config: Config,
    points: Mapping[int, Points],
    kind_of: Mapping[int, frozenset[str]],
    problems: Problems,
) -> set[str]:
    """The tags whose rows are there. A tag bound to a config key that is true must be, where a layer is of the kind; of
    rows with several tags, all."""
    on = {tag for at, row in enumerate(table.rows) if points.get(at) for tag in row.tags}
    for tag, key in table.optional.items():
        if tag not in on and config.says(key):
            mine = (row for row in table.rows if tag in row.tags and row.tags - {tag} <= on)
            names = [
                row.name.text for row in mine if not (row.kinds or row.either) or any(map(row.within, kind_of.values()))
            ]
            if names:
                said = key if "=" in key else f"{key.lstrip('!')} = {config.get(key.lstrip('!'))!r}"
                problems.add(f"config.json says {said}, yet {', '.join(names)} are missing")
    return on


def _presence(
    table: Family,
    sizes: dict[str, int],
    points: Mapping[int, Points],
    layers: _Layers,
    kind_of: Mapping[int, frozenset[str]],
    tags: set[str],
    problems: Problems,
) -> dict[int, tuple[int, ...] | None]:
    """Which rows are in use and in which layers; reports every tensor that should be there and is not,
    or should not and is.
    """
    held = _held(table, points)
    tied = _alias_names(table) - held  # `_tied` decides about these
    active: dict[int, tuple[int, ...] | None] = {}
    for at, row in enumerate(table.rows):
        have = points.get(at, {})
        if row.tags - tags and not have:
            continue
        at_layer = row.name.axes.index("layer") if "layer" in row.name.axes else None
        if at_layer is None:
            mine: tuple[int, ...] | None = None
            # some layer is of the kind
            beside = not (row.kinds or row.either) or any(map(row.within, kind_of.values()))
            wanted_layers: tuple[int, ...] = (0,) if beside else ()
        else:
            mine = tuple(
                layer
                for layer in layers.of(row, table)
                if row.within(kind_of[layer]) and (row.layers is None or layer in row.layers)
            )
            wanted_layers = mine
        if not wanted_layers and not have:
            continue
        ranges: list[Iterable[int]] = []
        count = 1
        for number, axis in enumerate(row.name.axes):
            if number == at_layer:
                ranges.append(wanted_layers)
                count *= len(wanted_layers)
            else:
                seen = 1 + max((numbers[number] for numbers in have), default=-1)
                ranges.append(range(sizes.setdefault(axis, seen)))
                count *= sizes[axis]
        if count > 4 * len(have) + 100_000:
            problems.add(
                f"{row.name.text}: config.json promises far more tensors than the files hold", f"{len(have)} are there"
            )
            continue
        wanted = set(product(*ranges)) if wanted_layers else set()
        if at not in points and row.leaves[0] in tied:
            continue
        for numbers in sorted(wanted - have.keys()):
            problems.add(f"missing {dotted(row)}", row.name.name(dict(zip(row.name.axes, numbers, strict=True))))
        for numbers in sorted(have.keys() - wanted):
            problems.add(f"unexpected {dotted(row)}", have[numbers])
        active[at] = mine
    return active


def _held(table: Family, rows: Iterable[int]) -> set[str]:
    """The logical tensors of rows, and the matrices whose numbers they hold packed."""
    leaves = {leaf for at in rows for leaf in table.rows[at].leaves}
    return leaves | {leaf.removesuffix(PACKED) for leaf in leaves}


def _alias_names(table: Family) -> set[str]:
    return {name for pair in table.tied.items() for name in pair}


def _kinds(
    table: Family, points: Mapping[int, Points], layers: _Layers, ruled: Ruled, problems: Problems
) -> dict[int, frozenset[str]]:
    """The kinds of each layer: one of every set of `one_of`, as config.json or the headers say; a kind without rows is
    what is left.
    """
    seen: dict[int, set[str]] = {layer: set() for layer in range(layers.total)}
    seen |= {layer: kinds for layer, kinds in _seen(table, points).items() if layer >= 0 and kinds}
    result = {}
    for layer, kinds in seen.items():
        mine = set()
        for group in table.one_of:
            given = next((kind_of for kinds_of, kind_of in ruled if set(group) == kinds_of), {}).get(layer)
            if given is not None:
                mine.add(given)
                continue
            rowless = [kind for kind in group if not any(kind in row.kinds for row in table.rows)]
            here = [kind for kind in group if kind in kinds] or rowless[:1]
            if len(here) != 1:
                found = " and ".join(here) if here else "none"
                problems.add(f"a layer must be one of {', '.join(group)}: {found} found", f"layer {layer}")
            mine.update(here)
        if layers.extra and layer >= layers.main and layer < layers.total and layers.extra not in mine:
            problems.add(
                f"layer {layer} lies beyond the {layers.main} of config.json and is not of kind {layers.extra}"
            )
        beyond = mine & table.extra.keys()
        if beyond and layer < layers.main:
            problems.add(
                f"layer {layer} is of kind {min(beyond)}, yet config.json counts it among its {layers.main} layers"
            )
        result[layer] = frozenset(mine)
    return result


def _tied(table: Family, config: Config, active: Mapping[int, Any], problems: Problems) -> dict[str, str]:
    """Tied names: either may be missing if config says that they are one;
    where both are stored they are two tensors.
    """
    alias = {}
    held = _held(table, active)
    for head, embed in table.tied.items():
        missing = [name for name in (head, embed) if name not in held]
        if not missing:
            continue
        if len(missing) == 1 and config.tied:
            alias[missing[0]] = embed if missing[0] == head else head
            continue
        for name in missing:
            row = next((row for row in table.rows if name in row.leaves), None)
            if row is not None and row.tags:
                continue  # may be missing
            said = config.get("tie_word_embeddings")
            text = row.name.text if row else name
            problems.add(f"missing {text}: config.json says tie_word_embeddings = {said!r}")
    return alias


def _tensors(
    table: Family,
    stored: Mapping[str, Stored],
    sizes: Mapping[str, int],
    points: Mapping[int, Points],
    active: Mapping[int, tuple[int, ...] | None],
    alias: Mapping[str, str],
    problems: Problems,
) -> dict[str, Tensor]:
    found: dict[str, tuple[tuple[str, ...], dict[int, str]]] = {}
    for at in active:
        row = table.rows[at]
        dtypes: dict[int, str] = {}
        for numbers, name in points[at].items():
            layer = _layer(row, numbers)
            if dtypes.setdefault(layer, stored[name].dtype) != stored[name].dtype:
                problems.add(f"{dotted(row)}: dtype {stored[name].dtype} next to {dtypes[layer]} in one layer", name)
        for leaf, path in zip(row.leaves, row.pattern.axes, strict=True):
            axes = (*row.name.axes, *path)
            if leaf in found and sorted(found[leaf][0]) == sorted(axes):
                axes = found[leaf][0]  # rows of other layers may have them in another order
            known, elsewhere = found.get(leaf, (axes, {}))
            if sorted(known) != sorted(axes) or elsewhere.keys() & dtypes.keys():
                problems.add(f"logical tensor {leaf} has two rows in one layer ({dotted(row)})")
            found[leaf] = (known, elsewhere | dtypes)
    tensors = {}
    for name, (axes, by_layer) in found.items():
        layers = tuple(sorted(by_layer)) if "layer" in axes and -1 not in by_layer else None
        if "layer" in axes and layers is None:
            layers = tuple(range(sizes["layer"]))
        dtypes_in_order = tuple(by_layer[layer] for layer in sorted(by_layer))
        tensors[name] = Tensor(
            name,
            axes,
            tuple(axis_size(axis, sizes) for axis in axes),
            dtypes_in_order[:1] if len(set(dtypes_in_order)) == 1 else dtypes_in_order,
            layers,
        )
    return tensors | {name: replace(tensors[target], name=name) for name, target in alias.items()}
