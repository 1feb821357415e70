"""How a quantised model's matrices are stored, in words and in numbers: bits, groups, and which are not like others."""

import re
from collections.abc import Iterator
from math import prod

from ..tables import schemes
from ..tables.notation import block_of, varied
from ..tables.schemes import PACKED, SCALE
from .understand import Model, Tensor


def parameters(model: Model) -> int:
    """Parameters of all tensors, each once: a packed matrix has those that it stands for, scales are none."""
    return sum(_elements(tensor, model) for tensor in _main(model))


def ways(model: Model) -> list[str]:
    """Each way in which matrices are stored, and which those are: "I4, groups of 128: attn.q, mlp.gate"."""
    found: dict[str, dict[str, None]] = {}
    matrices = {leaf for row in model.family.rows if len(row.pattern.dims) > 1 for leaf in row.leaves}
    for tensor in _main(model) if model.family.scheme else ():
        if tensor.name in matrices and not tensor.name.endswith("_bias"):
            found.setdefault(_way(tensor, model), {})[tensor.name.partition("@")[0].removesuffix(PACKED)] = None
    return [f"{way}: {', '.join(names)}" for way, names in found.items()]


def _main(model: Model) -> Iterator[Tensor]:
    """The tensors that hold parameters."""
    parts = model.family.parts - {"packed"} or {"scale"}
    endings = tuple(f"_{part}" for part in parts)
    for name, tensor in model.tensors.items():
        if name not in model.alias and not name.partition("@")[0].endswith(endings):
            yield tensor


def _plain(tensor: Tensor) -> list[str]:
    """The axes of what a tensor stands for, those that count blocks written out; without layers."""
    axes = [base for axis in tensor.axes for base in (block_of(axis) or ((axis,), 1))[0]]
    return [axis for axis in axes if axis != "layer" and not schemes.OWN.fullmatch(axis)]


def _elements(tensor: Tensor, model: Model) -> int:
    layers = 1 if "layer" not in tensor.axes else len(tensor.layers or range(model.sizes["layer"]))
    return layers * prod(model.sizes[axis] for axis in _plain(tensor))


def _way(tensor: Tensor, model: Model) -> str:
    base, _, variant = tensor.name.partition("@")
    leaf, dtype = base.removesuffix(PACKED), "/".join(dict.fromkeys(tensor.dtypes))
    scale = model.tensors.get(varied(leaf + SCALE, variant)) or model.tensors.get(leaf + SCALE)
    if scale is None:
        return dtype
    units = [block[1] for axis in scale.axes if (block := block_of(axis))]
    groups = [match[1] for axis in scale.axes if (match := re.fullmatch(r"groups([0-9]+)_.*", axis))]
    if base != leaf:
        word = 32 if dtype == "I32" else 8
        count = next((int(axis[5:]) for axis in tensor.axes if re.fullmatch("words[0-9]+", axis)), 0)
        blocks = [block[1] for axis in tensor.axes if (block := block_of(axis))]
        dtype = f"{count or (4 if word == 8 else word // max(blocks, default=1))} bits in {dtype}"
    if len(units) > 1:
        return f"{dtype}, blocks of {' × '.join(map(str, units))}"
    if units or groups:
        return f"{dtype}, groups of {units[0] if units else groups[0]}"
    return f"{dtype}, a scale for each {'row' if len(_plain(scale)) > ('experts' in scale.axes) else 'matrix'}"
