"""Checkpoints in every scheme of quantisation: random codes and scales, named and shaped as the producing libraries do,
and the numbers that they stand for, by arithmetic of its own.

`WAYS` has one entry for each way of storing a matrix: `store(out, in)` gives its tensors by suffix, `numbers(parts)`
the float64 matrix of the same tensors by the names that shards give them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from running import Tensors, noise, save

GROUP = 64
AWQ = [0, 4, 1, 5, 2, 6, 3, 7]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Parts = dict[str, np.ndarray]
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # suffix → tensor


class Way(NamedTuple):
    config: dict[str, Any]
    store: Callable[[int, int, int], Stored]
    numbers: Callable[[Parts, Sequence[int]], np.ndarray]  # of parts, and the rows of each matrix that is fused
    names: dict[str, str]  # suffix → part
    also: Callable[[str], Stored] = lambda name: {}
    file: str = ""  # which says it instead of config.json


def values(dtype: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What a tensor's bytes are as numbers."""
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):  # noise has NaN
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64).reshape(shape)
    if dtype == "F8_E4M3":
        code = np.frombuffer(data, np.uint8).astype(np.int64)
        sign, exponent, part = np.where(code & 128, -1.0, 1.0), (code >> 3) & 15, code & 7
        small = part / 8 * 2.0**-6
        found = np.where(exponent == 0, small, (1 + part / 8) * 2.0 ** (exponent - 7.0))
        return (sign * np.where(code & 127 == 127, np.nan, found)).reshape(shape)
    if dtype == "F8_E8M0":
        return (2.0 ** (np.frombuffer(data, np.uint8).astype(np.float64) - 127)).reshape(shape)
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I8": "i1", "U8": "u1", "I64": "<i8"}
    return np.frombuffer(data, kinds[dtype]).reshape(shape)


def codes(seed: int, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    """FP8 without NaN."""
    data = np.random.default_rng([seed, *shape]).integers(0, 127, math.prod(shape), np.uint8)
    return "F8_E4M3", shape, (data % 127).tobytes()


def scales(seed: int, *shape: int, dtype: str = "F32") -> tuple[str, tuple[int, ...], bytes]:
    """Positive scales, every one another."""
    number = 0.5 + np.random.default_rng([seed, 7, *shape]).random(shape or (1,))
    if dtype == "BF16":
        return dtype, shape, (number.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "F8_E8M0" or dtype == "U8":
        return dtype, shape, np.random.default_rng([seed, 8, *shape]).integers(120, 135, shape, np.uint8).tobytes()
    return dtype, shape, number.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def words(array: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned numbers out of 32-bit words, lowest bits first, along an axis; three bits: 32 to three words."""
    moved = np.moveaxis(array.astype("<i4").view("<u4") if array.dtype != np.uint32 else array, axis, -1)
    raw = np.ascontiguousarray(moved).view(np.uint8).reshape(*moved.shape[:-1], -1)
    stream = np.unpackbits(raw, axis=-1, bitorder="little")
    number = stream.reshape(*stream.shape[:-1], -1, bits)
    found = (number.astype(np.int64) << np.arange(bits)).sum(-1)
    return np.moveaxis(found, -1, axis)


def nibbles(array: np.ndarray) -> np.ndarray:
    """Two numbers to a byte, the low one first, along the last axis."""
    return np.stack([array & 15, array >> 4], -1).reshape(*array.shape[:-1], -1)


def spread(scale: np.ndarray, size: int, axis: int) -> np.ndarray:
    """A scale for every element along an axis."""
    return np.repeat(scale, -(-size // scale.shape[axis]), axis).take(np.arange(size), axis)


def each(scale: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """A scale for every row, of one for each matrix that is fused."""
    flat = scale.reshape(-1)
    return np.concatenate([np.full(count, flat[at if len(flat) > 1 else 0]) for at, count in enumerate(rows)])[:, None]


def gptq(bits: int, order: bool = False) -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        groups = inner // GROUP
        index = np.arange(inner, dtype="<i4") // GROUP
        if order:  # a mixture of all groups, the same for every matrix with that input, as quantisers have it
            index = np.random.default_rng([inner]).permutation(index)
        return {
            ".qweight": noise("I32", inner * bits // 32, out, seed=seed),
            ".qzeros": noise("I32", groups, out * bits // 32, seed=seed + 1),
            ".scales": scales(seed + 2, groups, out, dtype="F16"),
            ".g_idx": ("I32", (inner,), index.tobytes()),
        }

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        packed, zeros = parts["packed"], parts["zeros"]  # of three bits, three words may be an axis of their own
        code = words(packed.reshape(-1, packed.shape[-1]), bits, 0)
        zero = words(zeros.reshape(len(zeros), -1), bits, 1) + 1
        index = parts["order"].reshape(-1, len(code))[0] if "order" in parts else np.arange(len(code)) // GROUP
        return (parts["scale"].astype(float)[index] * (code - zero[index])).T

    names = {".qweight": "packed", ".qzeros": "zeros", ".scales": "scale"} | ({".g_idx": "order"} if order else {})
    return Way({"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order}, store, numbers, names)


def awq() -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        return {
            ".qweight": noise("I32", inner, out // 8, seed=seed),
            ".qzeros": noise("I32", inner // GROUP, out // 8, seed=seed + 1),
            ".scales": scales(seed + 2, inner // GROUP, out, dtype="F16"),
        }

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        def ordered(array: np.ndarray) -> np.ndarray:
            found = words(array, 4, 1)
            return found.reshape(len(found), -1, 8)[:, :, AWQ].reshape(len(found), -1)

        code, zero = ordered(parts["packed"]), ordered(parts["zeros"])
        index = np.arange(len(code)) // GROUP
        return (parts["scale"].astype(float)[index] * (code - zero[index])).T

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return Way(config, store, numbers, {".qweight": "packed", ".qzeros": "zeros", ".scales": "scale"})


def packed(bits: int, zeros: bool = False, channel: bool = False) -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        groups = 1 if channel else inner // GROUP
        found = {
            ".weight_packed": noise("I32", out, inner * bits // 32, seed=seed),
            ".weight_scale": scales(seed + 1, out, groups, dtype="BF16"),
            ".weight_shape": ("I64", (2,), np.array([out, inner], "<i8").tobytes()),
        }
        if zeros:
            found[".weight_zero_point"] = noise("I32", out * bits // 32, groups, seed=seed + 2)
        return found

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        code = words(parts["packed"].reshape(len(parts["packed"]), -1), bits, 1)
        size = code.shape[1]
        zero = words(parts["zeros"], bits, 0) if "zeros" in parts else np.full((len(code), 1), 1 << (bits - 1))
        return (code - spread(zero, size, 1)) * spread(parts["scale"], size, 1)

    weights = {"num_bits": bits, "type": "int", "group_size": None if channel else GROUP}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    names = {".weight_packed": "packed", ".weight_scale": "scale", ".weight_zero_point": "zeros"}
    return Way(config, store, numbers, names)


def eight(method: str, scale: str, shape: str, dtype: str = "F32", static: bool = False, **config: Any) -> Way:
    """FP8 with a scale per row, tensor or block."""

    def store(out: int, inner: int, seed: int) -> Stored:
        blocks = {"row": (out, 1), "one": (1,), "none": (), "block": (-(-out // 32), -(-inner // 32))}
        found = {".weight": codes(seed, out, inner), scale: scales(seed + 1, *blocks[shape], dtype=dtype)}
        if static:
            found[".input_scale"] = scales(seed + 2, *((1,) if shape == "one" else ()))
        return found

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        weight, factor = parts[""], parts["scale"]
        if shape == "block":
            return weight * np.repeat(np.repeat(factor, 32, 0)[: len(weight)], 32, 1)[:, : weight.shape[1]]
        return weight * (factor.reshape(-1, 1) if shape == "row" else each(factor, rows))

    return Way({"quant_method": method} | config, store, numbers, {".weight": "", scale: "scale"})


def fours(kind: str) -> Way:
    """FP4: NVFP4 of both producers, MXFP4."""
    modelopt, size = kind == "modelopt", 32 if kind == "mx" else 16
    weight = ".weight" if modelopt else ".weight_packed"
    whole = ".weight_scale_2" if modelopt else ".weight_global_scale"

    def store(out: int, inner: int, seed: int) -> Stored:
        scale = (
            scales(seed + 1, out, inner // size, dtype="U8") if kind == "mx" else codes(seed + 1, out, inner // size)
        )
        found = {weight: noise("U8", out, inner // 2, seed=seed), ".weight_scale": scale}
        if kind != "mx":
            found[whole] = scales(seed + 2, *(() if modelopt else (1,)))
            found[".input_scale" if modelopt else ".input_global_scale"] = scales(seed + 3, *(() if modelopt else (1,)))
        return found

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        code = FP4[nibbles(parts["packed"])]
        scale = 2.0 ** (parts["scale"].astype(float) - 127) if kind == "mx" else parts["scale"]
        found = code * spread(scale, code.shape[1], 1)
        if kind == "mx":
            return found
        factor = each(parts["tensor_scale"], rows)
        return found * factor if modelopt else found / factor

    names = {weight: "packed", ".weight_scale": "scale", whole: "tensor_scale"}
    weights = {"num_bits": 4, "type": "float", "group_size": size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": f"{kind}fp4-pack-quantized", "config_groups": groups}
    return Way({"quant_method": "modelopt", "quant_algo": "NVFP4"} if modelopt else config, store, numbers, names)


def nf4() -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [out, inner]}).encode()
        return {
            ".weight": noise("U8", out * inner // 2, 1, seed=seed),
            ".weight.absmax": scales(seed + 1, out * inner // 64),
            ".weight.quant_map": ("F32", (16,), np.linspace(-1, 1, 16, dtype="<f4").tobytes()),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", (len(state),), state),
        }

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        byte = parts["packed"].reshape(sum(rows), -1)
        code = np.stack([byte >> 4, byte & 15], -1).reshape(sum(rows), -1)
        level = parts["levels"].reshape(-1, 16)[0]
        return level[code] * np.repeat(parts["scale"].reshape(sum(rows), -1), 64, 1)

    names = {".weight": "packed", ".weight.absmax": "scale", ".weight.quant_map": "levels"}
    return Way({"quant_method": "bitsandbytes", "load_in_4bit": True}, store, numbers, names)


def int8(scale: str, **config: Any) -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        shape = (out,) if scale == ".SCB" else (out, 1)
        return {".weight": noise("I8", out, inner, seed=seed), scale: scales(seed + 1, *shape)}

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        return parts[""] * parts["scale"].reshape(-1, 1)

    return Way(config, store, numbers, {".weight": "", scale: "scale"})


def torchao() -> Way:
    def store(out: int, inner: int, seed: int) -> Stored:
        return {"._weight_qdata": codes(seed, out, inner), "._weight_scale": scales(seed + 1, out, 1)}

    def numbers(parts: Parts, rows: Sequence[int]) -> np.ndarray:
        return parts[""] * parts["scale"].reshape(-1, 1)

    names = {"._weight_qdata": "", "._weight_scale": "scale"}
    return Way({"quant_method": "torchao", "quant_type": {"default": {}}}, store, numbers, names)


BLOCKS = {"weight_block_size": [32, 32], "activation_scheme": "dynamic"}
CT = "compressed-tensors"
WAYS: dict[str, Way] = {
    "gptq-4": gptq(4),
    "gptq-3": gptq(3),
    "gptq-8": gptq(8),
    "gptq-2": gptq(2),
    "gptq-act-order": gptq(4, order=True),
    "awq": awq(),
    "auto-round": gptq(4)._replace(config={"quant_method": "auto-round", "bits": 4, "group_size": GROUP}),
    "auto-round-awq": awq()._replace(config={"quant_method": "auto-round", "bits": 4, "group_size": GROUP}),
    "w4a16": packed(4),
    "w4a16-zeros": packed(4, zeros=True),
    "w4a16-channel": packed(4, channel=True),
    "w8a16": packed(8),
    "w3a16": packed(3),
    "ct-fp8-rows": eight(CT, ".weight_scale", "row", "BF16", format="float-quantized"),
    "ct-fp8-tensor": eight(CT, ".weight_scale", "one", "BF16", static=True, format="float-quantized"),
    "ct-fp8-block": eight(
        CT, ".weight_scale", "block", config_groups={"group_0": {"weights": {"block_structure": [32, 32]}}}
    ),
    "ct-int8": int8(".weight_scale", quant_method=CT, format="int-quantized"),
    "ct-nvfp4": fours("nv"),
    "ct-mxfp4": fours("mx"),
    "fp8-block": eight("fp8", ".weight_scale_inv", "block", **BLOCKS),
    "fp8-ue8m0": eight("fp8", ".weight_scale_inv", "block", "F8_E8M0", scale_fmt="ue8m0", **BLOCKS),
    "fbgemm": eight("fbgemm_fp8", ".weight_scale", "row"),
    "modelopt-fp8": eight("modelopt", ".weight_scale", "none", static=True, quant_algo="FP8"),
    "modelopt-nvfp4": fours("modelopt"),
    "modelopt-alone": fours("modelopt")._replace(file="hf_quant_config.json"),
    "gptq-alone": gptq(4)._replace(file="quantize_config.json"),
    "nf4": nf4(),
    "llm-int8": int8(".SCB", quant_method="bitsandbytes", load_in_8bit=True),
    "torchao": torchao(),
}


def checkpoint(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], way: Way, skip: Sequence[str] = ()
) -> Tensors:
    """A checkpoint of which every projection but those of `skip` is stored in a way; all of its tensors."""
    tensors: Tensors = {}
    for at, (name, shape) in enumerate(shapes.items()):
        if "proj" in name and name.endswith(".weight") and not any(one in name for one in skip):
            stem = name.removesuffix(".weight")
            tensors |= {stem + suffix: tensor for suffix, tensor in way.store(*shape, 10 * at).items()}
        else:
            tensors[name] = noise("BF16", *shape, seed=at)
    directory.mkdir(parents=True)
    said = {"quantization": way.config} if way.file == "hf_quant_config.json" else way.config
    if way.file:
        (directory / way.file).write_text(json.dumps(said))
    (directory / "config.json").write_text(json.dumps(config | ({} if way.file else {"quantization_config": said})))
    save(directory / "model.safetensors", tensors, metadata={"format": "pt"})
    return tensors
