"""Tensors of quantised checkpoints whose values follow from others: they are kept and given to no rank, so they must
say what whoever reads the ranks will assume."""

import numpy as np

from ..checkpoints.source_kinds import Source
from ..containers.dtypes import DTYPES
from ..errors import Problems
from ..model.quantized import Derived, derived
from ..store.local import Pool


def check_derived(source: Source) -> None:
    """Raises ReshardError naming every tensor that says something else than config.json and the shapes, with both."""
    model, problems = source.layout.model, Problems()
    if not model.aside:
        return
    stored = {name: entry for name, (_, entry) in source.tensors.items()}
    wanted = [one for one in derived(model.family, source.config, stored) if one.rule]
    if not wanted:
        return
    pool = Pool(stamps=source.stamps)
    try:
        for one in wanted:
            entry, (_, length, place, at) = source.buffer(one.name)
            dtype = DTYPES[entry.dtype]
            if dtype.code is None or dtype.floating:
                problems.add(f"{one.name} is {entry.dtype}, integers are needed")
            elif said := _contradiction(one, np.frombuffer(pool.read(place, at, length), f"<{dtype.code}")):
                problems.add(said)
    finally:
        pool.close()
    problems.raise_if_any(
        f"{source.where}: tensors that say something else than their matrices:",
        "with act-order, config.json says desc_act = true; else download both again",
    )


def _contradiction(one: Derived, values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> str:
    """What a tensor says and what it has to, if these differ."""
    if one.rule == "out in":
        ranges = (one.matrix.out, one.matrix.inner)
        if len(values) == 2 and all(low <= value <= high for (low, high), value in zip(ranges, values, strict=True)):
            return ""
        return f"{one.name} says {values.tolist()[:4]}, the shapes of the others {list(one.matrix.shape[-2:])}"
    wanted = np.arange(len(values)) // (one.group if one.group > 0 else max(len(values), 1))
    differs = np.flatnonzero(values != wanted)
    if not len(differs):
        return ""
    at = int(differs[0])
    return (
        f"{one.name} puts input {at} into group {values[at]}, group_size {one.group} into group {wanted[at]}, "
        "and config.json does not say desc_act"
    )
