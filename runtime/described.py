"""The model described by one rank's own folder, for a node that has only the manifest, companion files and that folder.

Logical tensors, axes and sizes are in tensors.json; tables are the shipped ones. Layers of other stages are unknown and
not needed. Knows nothing about torch.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from reshard.checkpoints.blocks import read_described
from reshard.checkpoints.manifest import Manifest
from reshard.checkpoints.published import read_json
from reshard.checkpoints.shards import Described, Shards
from reshard.containers.container import of_file
from reshard.containers.entry import Entry
from reshard.containers.reading import of_descriptor
from reshard.errors import MismatchError
from reshard.layout.cut import Layout, lay_out
from reshard.model.naming import tower_rows
from reshard.model.understand import Model, Tensor
from reshard.tables import formats, wrappers
from reshard.tables.config import Config
from reshard.tables.notation import fold, parse_template


def described(root: Path, known: Manifest, rank: int) -> tuple[Config, Layout]:
    """The config, and a layout with this rank's tensors. Raises MismatchError where the rank's file has others."""
    said = read_described(root / known.ranks[rank].tensors.name)
    config = Config(read_json(root / "config.json"))
    family = wrappers.named(known.family, config)
    config = config.with_defaults(family.defaults)
    try:
        tensors = _tensors(said, known.sizes)
        alias: dict[str, str] = {}
        for name, other in known.tied.items():
            if (t := tensors.get(name) or tensors.get(other)) is not None:
                alias[name] = other
                tensors |= {each: Tensor(each, t.axes, t.sizes, t.dtypes, t.layers) for each in (name, other)}
        beside = tower_rows(family.towers, {tensor.name: tensor for tensor in said.tensors})
        family = replace(family, rows=(*family.rows, *beside))
        main = config.size(family.sizes["layer"]) if "layer" in family.sizes else None
        model = Model(family, tensors, dict(known.sizes), {}, alias, known.cut.stages[-1][1] if main is None else main)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MismatchError(
            f"{root}: cannot read the description of rank {rank}: {error!r}", "fetch its tensors.json again"
        ) from None
    table, mesh = formats.load(known.format).for_family(family.plain), known.mesh
    if not any(axis in tensor.axes for tensor in tensors.values() for axis in table.cut.get("ep", ())):
        mesh = replace(mesh, ep=1)  # a stage without experts: EP cuts nothing
    layout = replace(lay_out(table, model, mesh), mesh=known.mesh)
    path = root / known.ranks[rank].weights.name
    with path.open("rb") as file:
        pread = of_descriptor(file.fileno(), str(path))
        found = of_file(path.name).read(pread, known.ranks[rank].weights.size, str(path))
    wanted = Shards(layout).shard(rank).header
    if found.entries != wanted.entries:
        odd = min(
            name
            for name in found.entries.keys() | wanted.entries
            if found.entries.get(name) != wanted.entries.get(name)
        )
        raise MismatchError(
            f"{path}: {odd} is {_shown(found.entries.get(odd))}, "
            f"by the shipped tables it is {_shown(wanted.entries.get(odd))}",
            "the conversion may have used other tables: fetch its folder `source` too",
        )
    return config, layout


def _tensors(said: Described, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Logical tensors, as far as a rank's rows and names describe them."""
    by_row: dict[int, dict[int, str]] = defaultdict(dict)  # row → layer (-1: belongs to none) → dtype
    templates = [parse_template(row.name) for row in said.rows]
    for tensor in said.tensors:
        axes, numbers = templates[tensor.row].axes, fold(tensor.name)[1]
        by_row[tensor.row][numbers[axes.index("layer")] if "layer" in axes else -1] = tensor.dtype
    found: dict[str, Tensor] = {}
    for number, row in enumerate(said.rows):
        layered = "layer" in templates[number].axes
        dtypes = by_row[number]
        kinds = tuple(dtypes[layer] for layer in sorted(dtypes))
        for segment in row.segments or ():
            axes, extents = tuple(segment.of), tuple(segment.of.values())
            found[segment.tensor] = Tensor(
                segment.tensor,
                ("layer", *axes) if layered else axes,
                (sizes["layer"], *extents) if layered else extents,
                kinds[:1] if len(set(kinds)) == 1 else kinds,
                tuple(sorted(dtypes)) if layered else tuple(range(segment.of["layer"])) if "layer" in axes else None,
            )
    return found


def _shown(entry: Entry | None) -> str:
    return "not there" if entry is None else json.dumps([entry.dtype, list(entry.shape), entry.offset])
