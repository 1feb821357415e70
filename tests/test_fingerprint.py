"""Fingerprints: equal in every layout of the same weights, different for every other content, and the sum of what the
ranks have.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import checkpoint
from msgspec.structs import replace
from running import BITS, LLAMA, Tensors, llama, llama_tensors, noise

import reshard
from reshard.checkpoints.source import open_source
from reshard.errors import MismatchError, ReshardError
from reshard.jobs import fingerprint
from reshard.jobs.fingerprint import LANES, Box, Fingerprint, Keys, P, Summer
from reshard.layout.cut import Layout, lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, understand
from reshard.tables import families

of = fingerprint.of_directory


def lines(found: Fingerprint) -> dict[str, str]:
    return {line.name: line.text for line in found.lines}


def changed(one: Fingerprint, other: Fingerprint) -> set[str]:
    """Names whose lines differ; the model's line must differ exactly if any does."""
    assert one.lines and lines(one).keys() == lines(other).keys()
    names = {name for name, text in lines(one).items() if lines(other)[name] != text}
    assert bool(names) == (one.model != other.model)
    return names


# The sum


def naive(keys: Keys, box: Box, values: list[int], parts: int) -> tuple[int, ...]:
    """K·v over a box, element by element, in whole numbers."""
    total = [0] * LANES
    for point in itertools.product(*(range(high - low) for _, low, high, _ in box.dims)):
        offset = box.offset + sum(i * stride for i, (_, _, _, stride) in zip(point, box.dims, strict=True))
        for lane in range(LANES):
            key = int(box.factor[lane])
            for i, (axis, low, high, _) in zip(point, box.dims, strict=True):
                key = key * int(keys.axis(axis, high)[low + i, lane]) % P
            value = values[offset * parts : (offset + 1) * parts]
            units = [1] if parts == 1 else [int(u) for u in keys.axis("\0part", parts)[:, lane]]
            total[lane] += key * sum(u * v for u, v in zip(units, value, strict=True))
    return tuple(number % P for number in total)


def numbers(data: bytes, bits: int) -> list[int]:
    """Elements as the format has them: signed parts of 16 bits, or whole narrow elements, lowest bits first."""
    if bits >= 16:
        return [int.from_bytes(data[at : at + 2], "little", signed=True) for at in range(0, len(data), 2)]
    whole = int.from_bytes(data, "little")
    return [whole >> at & (1 << bits) - 1 for at in range(0, 8 * len(data), bits)]


BOXES: dict[str, list[tuple[int, tuple[tuple[str, int, int, int], ...]]]] = {
    "rows": [(0, (("a", 3, 8, 40), ("b", 0, 40, 1)))],
    "columns": [(8, (("a", 0, 5, 40), ("b", 8, 20, 1)))],
    "by turns": [(0, (("a", 0, 5, 40), ("b", 1, 21, 2))), (1, (("a", 0, 5, 40), ("b", 1, 21, 2)))],
    "three axes": [(12, (("a", 0, 4, 44), ("c", 2, 4, 16), ("b", 0, 8, 1)))],
    "a scalar": [(4, ())],
}


@pytest.mark.parametrize("tile", [16, 1 << 20])
@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "BOOL", "F8_E4M3", "BF16", "F32", "F64", "C64"])
@pytest.mark.parametrize("shape", BOXES)
def test_a_sum_is_what_the_definition_says(dtype: str, shape: str, tile: int) -> None:
    """Every dtype, strided and interleaved boxes, in tiles of any size: exactly K·v modulo p."""
    keys, data = Keys("a seed"), noise(dtype, 200)[2]
    factor = np.arange(5, 5 + LANES)
    boxes = [Box(into, offset, dims, factor) for into, (offset, dims) in enumerate(BOXES[shape])]
    sums = np.zeros((len(boxes), LANES), np.int64)
    summer = Summer(keys)
    for part in fingerprint.tiles(boxes, tile, keys):
        assert max(box.end for box in part) - min(box.offset for box in part) <= tile
        for into, found in summer.tile(dtype, part, lambda low, high: np.frombuffer(data, np.uint8)[low:high]):
            sums[into] = (sums[into] + found) % P
    values = numbers(data, BITS[dtype])
    wanted = [naive(keys, box, values, max(1, BITS[dtype] // 16)) for box in boxes]
    assert [tuple(map(int, row)) for row in sums] == wanted


@pytest.mark.parametrize(("rows", "width"), [(1, 70_000), (3, 5_000), (300, 513), (130, 256)])
@pytest.mark.parametrize("fill", [-(1 << 15), (1 << 15) - 1])
def test_the_largest_numbers_stay_exact(rows: int, width: int, fill: int) -> None:
    """Nothing is rounded, although every product is as large as it can be."""
    keys = Keys()
    low, high = -(P // 2), P // 2  # as large as a multiplier gets on either side
    for multiplier in (low, high):
        full = np.full((-(-width // 256), 256, LANES), float(multiplier))
        full.reshape(-1, LANES)[width:] = 0
        found = Summer(keys)._rows(np.full((rows, width), fill, np.int16), full)
        assert np.array_equal(found, np.full((rows, LANES), fill * multiplier * width % P))


def test_multipliers_are_none_of_them_zero_and_do_not_depend_on_the_length() -> None:
    keys = Keys()
    short = keys.axis("hidden", 10).copy()
    long = keys.axis("hidden", 10_000)
    assert np.array_equal(short, long[:10])
    assert long.min() >= 1 and long.max() < P
    assert len(np.unique(long)) > long.size - 5
    assert not np.intersect1d(long[:100], Keys().axis("inter", 100)).size
    assert not np.intersect1d(long[:100], Keys("other").axis("hidden", 100)).size


def test_golden_fingerprint(tmp_path: Path) -> None:
    """The definition is a contract: shares of different versions of this program must add up."""
    assert [int(number) for number in Keys().axis("hidden", 2)[1]] == [1901010310, 92984711, 1561241794, 936272175]
    assert of(llama(tmp_path / "model")).model == "92ee39975b00ee3c40f971054d8c9c02"


# Layouts

ROUTES: list[tuple[str, list[dict[str, Any]]]] = [
    (
        "llama",
        [
            {"tp": 8},
            {"tp": 4, "pp": 2},
            {"tp": 3, "split": (2, 1, 1)},
            {"tp": 2, "to": "vllm"},
            {"tp": 8, "to": "vllm"},
        ],
    ),
    ("llama_bin", [{"tp": 2}, {"tp": 4, "to": "vllm"}]),
    ("qwen3_tied", [{"tp": 2, "pp": 3}, {"tp": 2, "to": "vllm"}]),
    ("qwen3_tied_stored", [{"tp": 2, "pp": 3}, {"tp": 2, "to": "vllm"}]),
    ("mixtral", [{"tp": 4, "ep": 2}, {"tp": 2, "to": "vllm"}]),
    ("gpt2", [{"tp": 4}]),
    ("gpt_oss", [{"tp": 4, "ep": 2, "pp": 2}, {"tp": 8}]),
    ("falcon_7b", [{"tp": 2, "pp": 2}]),
    ("deepseek_v3_fp8", [{"tp": 2, "ep": 2}]),
]


@pytest.mark.parametrize(("name", "meshes"), ROUTES, ids=[name for name, _ in ROUTES])
def test_every_layout_of_the_same_weights_has_the_same_lines(
    name: str, meshes: list[dict[str, Any]], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """And the shares of its ranks, made apart and in any order, add up to them."""
    source = checkpoint(name)
    wanted = of(source)
    assert len({line.value for line in wanted.lines}) > len(wanted.lines) - 2  # tied ones may be equal
    for number, mesh in enumerate(meshes):
        out = tmp_path / str(number)
        reshard.convert(source, out, **mesh)
        assert of(out) == wanted, mesh
        world = len(list(out.glob("rank-*")))
        assert fingerprint.combine(fingerprint.of_rank(out, rank) for rank in reversed(range(world))) == wanted, mesh


def test_threads_and_tiles_change_nothing(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("gpt_oss")
    wanted = of(source, threads=1)
    monkeypatch.setattr(fingerprint, "TILE", 192)
    assert of(source, threads=4) == wanted


def test_a_tensor_stored_once_or_twice_under_two_names_has_the_same_lines(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": True}
    once = llama_tensors(config)
    twice = once | {"lm_head.weight": once["model.embed_tokens.weight"]}
    one = of(llama(tmp_path / "once", once, tie_word_embeddings=True))
    two = of(llama(tmp_path / "twice", twice, tie_word_embeddings=True))
    assert one == two and one.model == two.model
    assert {line.value for line in one.lines if line.name == "head"} == {
        line.value for line in one.lines if line.name == "embed"
    }
    other = twice | {"lm_head.weight": noise("BF16", 331, 56, seed=99)}
    assert changed(one, of(llama(tmp_path / "other", other, tie_word_embeddings=True))) == {"head"}


def test_a_strided_storage_makes_no_difference(tmp_path: Path) -> None:
    """torch saves a transposed view as it lies in memory."""
    tensors = llama_tensors()
    wanted = of(llama(tmp_path / "model", tensors))
    place = llama(tmp_path / "bin", tensors)
    (place / "model.safetensors").unlink()
    state = {}
    for name, (_, shape, data) in tensors.items():
        tensor = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
        state[name] = tensor.t().contiguous().t() if "_proj" in name else tensor
    torch.save(state, place / "pytorch_model.bin")
    assert any(entry.strides is not None for _, entry in open_source(place).places.values())
    assert of(place) == wanted


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A Llama of 4 KV heads on 8 ranks, each head on two of them; a vocabulary that is padded."""
    reshard.convert(llama(tmp_path / "model"), tmp_path / "tp8", tp=8)
    return tmp_path / "tp8"


def flip(directory: Path, rank: int, name: str, byte: int) -> None:
    """Flip one bit of a stored tensor; a negative `byte` counts from its end."""
    path, entry = open_source(directory).locate((rank, name))
    with path.open("r+b") as file:
        file.seek(entry.offset + byte % entry.nbytes)
        old = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 16]))


def test_of_what_several_ranks_hold_the_copy_on_the_lowest_counts_and_padding_never(shards: Path) -> None:
    """As the documentation says: for the other copies there is `verify`."""
    wanted = of(shards)
    kv = next(name for rank, name in open_source(shards).places if rank == 1 and "qkv" in name and ".1." in name)
    for rank, name, byte, names in (
        (3, "norm", 0, set()),
        (7, "embed", -1, set()),  # padding
        (1, kv, -1, set()),  # v of a head that rank 0 holds, too
        (0, kv, -1, {"attn.v"}),
        (0, "norm", 0, {"norm"}),
        (7, "embed", 0, {"embed"}),
    ):
        flip(shards, rank, name, byte)
        assert changed(wanted, of(shards)) == names, (rank, name)
        flip(shards, rank, name, byte)
    assert of(shards) == wanted


def test_a_rank_needs_no_other_rank_s_files(shards: Path, tmp_path: Path) -> None:
    wanted = of(shards)
    found = []
    for rank in range(8):
        node = tmp_path / f"node{rank}"
        shutil.copytree(
            shards,
            node,
            ignore=lambda _, names, rank=rank: {n for n in names if n[:5] == "rank-"} - {f"rank-{rank:05}"},
        )
        (tmp_path / f"{rank}.json").write_text(json.dumps(fingerprint.of_rank(node, rank).to_json()))
        found.append(fingerprint.read_share(tmp_path / f"{rank}.json"))
    assert fingerprint.combine(found) == wanted
    with pytest.raises(ReshardError, match="rank-00001"):
        fingerprint.of_rank(tmp_path / "node0", 1)
    with pytest.raises(ReshardError, match="no rank 8, ranks are 0 to 7"):
        fingerprint.of_rank(shards, 8)


# What is seen


@dataclass(frozen=True)
class Stored:
    dtype: str
    shape: tuple[int, ...]


def published(layers: int, inter: int, hidden: int, *dtypes: str) -> Layout:
    """The layout of a model of one tensor per layer, `blocks.{layer}.up.weight`."""
    text = (
        'name = "tiny"\nrows = [["blocks.{layer}.up.weight", "inter hidden", "mlp.up"]]\n[sizes]\nlayer = '
        '"l"\ninter = "i"\nhidden = "h"\n'
    )
    kinds = dtypes if len(dtypes) == layers else dtypes * layers
    stored = {f"blocks.{i}.up.weight": Stored(kinds[i], (inter, hidden)) for i in range(layers)}
    model = understand(families.parse(text, "tiny"), Config({"l": layers, "i": inter, "h": hidden}), stored)
    return lay_out(model.family.published, model, Mesh(), model.active)


def sums(layout: Layout, data: Any) -> tuple[int, ...]:
    (line,) = fingerprint.of_tensors(layout, 0, {"blocks.0.up.weight": data}).lines
    return line.sums


Edit = Callable[[dict[str, np.ndarray]], None]


def exchange(one: str, other: str) -> Edit:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays[one], arrays[other] = arrays[other].copy(), arrays[one].copy()

    return edit


def at(name: str, change: Callable[[np.ndarray], None]) -> Edit:
    return lambda arrays: change(arrays[name])


def transpose(array: np.ndarray) -> None:
    array[:] = array.T.copy()


def swap(one: Any, other: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[one], array[other] = array[other].copy(), array[one].copy()

    return change


def flipped(index: tuple[int, ...], bit: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] ^= np.uint16(1 << bit)

    return change


def moved(array: np.ndarray) -> None:
    """A value moved to the place of a zero."""
    array[3, 4], array[5, 6] = 0, 77


L = "model.layers."
SEEN: dict[str, tuple[Edit, set[str]]] = {
    "the lowest bit of the first element": (at(f"{L}0.self_attn.q_proj.weight", flipped((0, 0), 0)), {"attn.q"}),
    "the sign of the last element": (at(f"{L}2.mlp.down_proj.weight", flipped((-1, -1), 15)), {"mlp.down"}),
    "two neighbours": (at(f"{L}1.mlp.up_proj.weight", swap((7, 8), (7, 9))), {"mlp.up"}),
    "two elements far apart": (at("lm_head.weight", swap((0, 3), (330, 50))), {"head"}),
    "two signs": (
        lambda a: (flipped((1, 2), 15)(a["lm_head.weight"]), flipped((2, 1), 15)(a["lm_head.weight"]))[0],
        {"head"},
    ),
    "a square of four": (lambda a: square(a["lm_head.weight"]), {"head"}),
    "two rows": (at("model.embed_tokens.weight", swap(17, 18)), {"embed"}),
    "two columns": (at("model.embed_tokens.weight", swap(np.s_[:, 0], np.s_[:, 55])), {"embed"}),
    "two heads of k": (at(f"{L}0.self_attn.k_proj.weight", swap(np.s_[0:10], np.s_[10:20])), {"attn.k"}),
    "a head of k in place of another": (lambda a: head(a[f"{L}0.self_attn.k_proj.weight"]), {"attn.k"}),
    "halves of the rotation": (at(f"{L}0.self_attn.q_proj.weight", swap(np.s_[0:5], np.s_[5:10])), {"attn.q"}),
    "q and k": (exchange(f"{L}0.self_attn.q_proj.weight", f"{L}0.self_attn.k_proj.weight"), {"attn.q", "attn.k"}),
    "k and v": (exchange(f"{L}1.self_attn.k_proj.weight", f"{L}1.self_attn.v_proj.weight"), {"attn.k", "attn.v"}),
    "gate and up": (exchange(f"{L}1.mlp.gate_proj.weight", f"{L}1.mlp.up_proj.weight"), {"mlp.gate", "mlp.up"}),
    "two layers": (exchange(f"{L}0.mlp.gate_proj.weight", f"{L}2.mlp.gate_proj.weight"), {"mlp.gate"}),
    "norms of two layers": (exchange(f"{L}0.input_layernorm.weight", f"{L}1.input_layernorm.weight"), {"attn_norm"}),
    "a transposed square": (at(f"{L}0.self_attn.o_proj.weight", transpose), {"attn.o"}),
    "a value in the place of a zero": (at(f"{L}0.self_attn.v_proj.weight", moved), {"attn.v"}),
    "minus zero": (at("model.norm.weight", lambda a: a.__setitem__(0, 0x8000)), {"norm"}),
}


def square(array: np.ndarray) -> None:
    """+1, -1, -1, +1 on the corners of a rectangle: rows and columns have the sums that they had."""
    for row, column, by in ((2, 5, 1), (2, 9, -1), (7, 5, -1), (7, 9, 1)):
        array[row : row + 1, column] += np.uint16(by % (1 << 16))  # an array wraps around without a warning


def head(array: np.ndarray) -> None:
    array[0:10] = array[10:20]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Fingerprint, Path]:
    """A Llama with q and k of one shape and a square o, some elements of which are zero, and what it gives."""
    place = tmp_path_factory.mktemp("seen")
    config = LLAMA | SQUARE
    tensors = llama_tensors(config)

    def zero(array: np.ndarray) -> None:
        array[3, 4], array[5, 6] = 77, 0

    for name, change in ((f"{L}0.self_attn.v_proj.weight", zero), ("model.norm.weight", lambda a: a.__setitem__(0, 0))):
        tensors = edited(tensors, at(name, change))
    return tensors, of(llama(place / "base", tensors, **SQUARE)), place


SQUARE = {"hidden_size": 80, "num_key_value_heads": 8}


def edited(tensors: Tensors, edit: Edit) -> Tensors:
    arrays = {name: np.frombuffer(data, np.uint16).reshape(shape).copy() for name, (_, shape, data) in tensors.items()}
    edit(arrays)
    return {name: ("BF16", tensors[name][1], array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("what", SEEN)
def test_another_content_has_another_line(what: str, base: tuple[Tensors, Fingerprint, Path]) -> None:
    """That of the tensor which differs, and no other but the model's."""
    tensors, wanted, place = base
    edit, names = SEEN[what]
    found = of(llama(place / what.replace(" ", "-"), edited(tensors, edit), **SQUARE))
    assert changed(wanted, found) == names


def test_every_single_bit_counts() -> None:
    """A change of one element changes every lane, not only one of them."""
    layout = published(1, 4, 6, "F32")
    data = np.random.default_rng(0).integers(0, 1 << 32, (4, 6), np.uint32)
    one = sums(layout, data)
    for bit in range(32):
        for index in np.ndindex(data.shape):
            other = data.copy()
            other[index] ^= np.uint32(1 << bit)
            assert all(a != b for a, b in zip(one, sums(layout, other), strict=True)), (bit, index)


def test_the_same_number_of_zeros_elsewhere_or_fewer_of_them_is_another_sum() -> None:
    """A zero counts by its position: zeros are not what nothing is, and more zeros are not fewer."""
    shapes = {(4, 6): sums(published(1, 4, 6, "F32"), np.zeros((4, 6), np.uint32))}
    shapes[5, 6] = sums(published(1, 5, 6, "F32"), np.zeros((5, 6), np.uint32))
    shapes[4, 5] = sums(published(1, 4, 5, "F32"), np.zeros((4, 5), np.uint32))
    assert len(set(shapes.values())) == 3
    assert all(all(value) for value in shapes.values())


def test_a_dtype_with_equal_bits_is_another_sum() -> None:
    data = np.zeros((4, 6), np.uint16)
    assert sums(published(1, 4, 6, "BF16"), data) != sums(published(1, 4, 6, "F16"), data)


def test_a_layer_of_another_dtype_is_seen_although_its_bits_are_zero() -> None:
    """The dtypes of a line are a set, its sum knows the layer of each."""
    zero = {"BF16": np.zeros((4, 6), np.uint16), "F16": np.zeros((4, 6), np.uint16)}
    found = set()
    for dtypes in (("BF16", "F16", "F16"), ("F16", "BF16", "F16")):
        layout = published(3, 4, 6, *dtypes)
        share = fingerprint.of_tensors(
            layout, 0, {f"blocks.{i}.up.weight": zero[dtype] for i, dtype in enumerate(dtypes)}
        )
        found.add(share.lines[0].sums)
    assert len(found) == 2


def test_another_seed_gives_other_lines(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    assert changed(of(source), of(source, seed="7")) == set(lines(of(source)))


def test_two_contents_collide_as_rarely_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small prime the bound can be seen: of 4,000 seeds not many more than d / (p - 1) have a lane that
    collides.
    """
    p = 251
    monkeypatch.setattr(fingerprint, "P", p)
    delta = np.zeros((4, 6), np.int16)
    delta[1, 2], delta[3, 4], delta[1, 4] = 1, 1, -2
    hits = 0
    for seed in range(1000):
        keys = Keys(str(seed))
        box = Box(0, 0, (("a", 0, 4, 6), ("b", 0, 6, 1)), np.ones(LANES, np.int64))
        ((_, found),) = Summer(keys).tile("I16", [box], lambda low, high: delta.view(np.uint8).reshape(-1)[low:high])
        hits += int((found % p == 0).sum())
    assert 0 < hits < 4000 * 2 / (p - 1) + 4 * math.sqrt(32)


# Live tensors


def test_an_engine_s_tensors_give_the_share_of_its_rank(shards: Path) -> None:
    """As torch tensors, numpy arrays of bits, or bytes; other tensors beside them do not matter."""
    runtime = pytest.importorskip("reshard.runtime")
    for rank in (0, 1, 7):
        wanted = fingerprint.of_rank(shards, rank)
        state = runtime.load_shard(shards, rank)
        assert fingerprint.of_tensors(shards, rank, state | {"rope.inv_freq": torch.zeros(5)}) == wanted
        strided = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
        assert fingerprint.of_tensors(shards, rank, strided) == wanted
        arrays = {name: tensor.view(torch.uint16).numpy() for name, tensor in state.items()}
        assert fingerprint.of_tensors(open_source(shards).layout, rank, arrays) == wanted
        assert fingerprint.of_tensors(shards, rank, {name: array.tobytes() for name, array in arrays.items()}) == wanted
        arrays["norm"] = arrays["norm"] ^ np.uint16(1)
        assert (fingerprint.of_tensors(shards, rank, arrays) != wanted) == (rank == 0)  # the lowest rank that holds it


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_live_tensors_of_torch_have_the_sum_of_their_bytes(device: str) -> None:
    """Of any dtype that torch has, on any device, in any order of memory, also as parameters."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    types = {
        "BF16": "bfloat16",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
        "BOOL": "bool",
        "C64": "complex64",
    }
    types |= {
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
    }
    types |= {"I8": "int8", "U8": "uint8", "U16": "uint16", "I64": "int64", "F4": "float4_e2m1fn_x2"}
    for dtype, name in types.items():
        data = bytes(range(24)) * 8 if dtype != "BOOL" else bytes(at % 2 for at in range(24))
        layout, kind = published(1, 4, 6, dtype), getattr(torch, name)
        size = 12 if dtype == "F4" else 24 * kind.itemsize
        tensor = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8).view(kind).view(4, -1)
        transposed = tensor.view(torch.uint8).view(4, -1, kind.itemsize).transpose(0, 1).contiguous().transpose(0, 1)
        strided = [] if kind.itemsize > 1 else [transposed.squeeze(-1).view(kind)]
        for live in (tensor, *strided, torch.nn.Parameter(tensor, requires_grad=False)):
            assert sums(layout, live.to(device)) == sums(layout, data[:size]), dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_s_block_scaled_weights_give_the_share_of_its_rank(device: str, tmp_path: Path) -> None:
    """FP8 and its scales."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    runtime = pytest.importorskip("reshard.runtime")
    reshard.convert(checkpoint("deepseek_v3_fp8"), tmp_path / "out", tp=2)
    state = {name: tensor.to(device) for name, tensor in runtime.load_shard(tmp_path / "out", 1).items()}
    assert any(tensor.dtype is torch.float8_e4m3fn for tensor in state.values())
    assert fingerprint.of_tensors(tmp_path / "out", 1, state) == fingerprint.of_rank(tmp_path / "out", 1)


def test_tensors_that_are_not_the_layout_s_are_refused() -> None:
    layout, name = published(1, 4, 6, "F32"), "blocks.0.up.weight"
    for tensor, words in (
        (np.zeros((6, 4), np.float32), r"shape \(6, 4\) in memory, \(4, 6\)"),
        (np.zeros((4, 6), np.int32), "int32 in memory, the layout says F32"),
        (np.zeros((4, 6), np.float64), "float64 in memory, the layout says F32"),
        (torch.zeros(6, 4), r"shape \(6, 4\) in memory, \(4, 6\)"),
        (torch.zeros(4, 6, dtype=torch.bfloat16), "bfloat16 in memory, the layout says F32"),
        (torch.zeros(4, 6, device="meta"), "on the meta device"),
        (bytes(95), "95 bytes in memory, F32 of shape .* has 96"),
    ):
        with pytest.raises(ReshardError, match=f"{name}.*{words}"):
            fingerprint.of_tensors(layout, 0, {name: tensor})
    with pytest.raises(ReshardError, match=f"{name} is not among the 1 tensors"):
        fingerprint.of_tensors(layout, 0, {"other": 1})
    with pytest.raises(ReshardError, match="no rank 1, ranks are 0 to 0"):
        fingerprint.of_tensors(layout, 1, {})


@pytest.mark.parametrize("dtype", ["F4", "F6_E3M2", "F8_E5M2", "BOOL", "C64"])
def test_every_dtype_has_a_sum(dtype: str) -> None:
    layout, data = published(1, 4, 6, dtype), noise(dtype, 4, 6)[2]
    other = bytes([data[0] ^ 1]) + data[1:]
    assert sums(layout, data) == sums(layout, bytearray(data)) != sums(layout, other)


def test_a_tensor_without_elements_has_a_line() -> None:
    share = fingerprint.of_tensors(published(1, 4, 0, "BF16"), 0, {"blocks.0.up.weight": b""})
    assert fingerprint.combine([share]).lines[0].elements == 0


# Combining


def test_shares_that_are_not_one_model_s_are_refused(shards: Path, tmp_path: Path) -> None:
    """A rank that is missing or there twice, another mesh, model, seed or version, elements that are missing."""
    shares = [fingerprint.of_rank(shards, rank) for rank in range(8)]
    reshard.convert(shards, tmp_path / "tp4", tp=4)
    reshard.convert(llama(tmp_path / "other", intermediate_size=96), tmp_path / "other8", tp=8)
    for found, words in (
        ([], "no share"),
        (shares[:3] + shares[4:], "1 of 8 ranks are missing: 3"),
        ([*shares, shares[2]], "rank 2 was given twice"),
        ([*shares[1:], fingerprint.of_rank(tmp_path / "tp4", 0)], "different models, layouts or seeds"),
        ([*shares[1:], fingerprint.of_rank(tmp_path / "other8", 0)], "different models, layouts or seeds"),
        ([*shares[1:], fingerprint.of_rank(shards, 0, seed="x")], "different models, layouts or seeds"),
    ):
        with pytest.raises(ReshardError, match=words):
            fingerprint.combine(found)
    less = replace(shares[0], lines=(replace(shares[0].lines[0], elements=1), *shares[0].lines[1:]))
    with pytest.raises(MismatchError, match=r"attn\.k: the shares have"):
        fingerprint.combine([less, *shares[1:]])
    one, two, *rest = shares[3].lines
    for lines, words in (
        ((two, *rest), r"ranks 0 have BF16 +attn\.k .*; ranks 3 have BF16 +attn\.o "),
        ((one, two, *rest[:-1]), r"ranks 0 have BF16 +norm \[hidden 56\]; ranks 3 have no more"),
        ((*shares[3].lines, replace(one, name="z")), r"ranks 0 have no more; ranks 3 have BF16 +z "),
        ((two, one, *rest), r"attn\.k .*attn\.o "),
        ((replace(one, name="attn.l"), two, *rest), r"attn\.k .*attn\.l "),
        ((replace(one, dtype="F16"), two, *rest), r"ranks 0 have BF16 +attn\.k .*; ranks 3 have F16 +attn\.k "),
        ((replace(one, axes=("group", *one.axes[1:])), two, *rest), r"attn\.k \[layer 3, .*attn\.k \[group 3, "),
        ((replace(one, sizes=(4, *one.sizes[1:])), two, *rest), r"attn\.k \[layer 3, .*attn\.k \[layer 4, "),
    ):
        with pytest.raises(ReshardError, match=f"different tensors: .*{words}"):
            fingerprint.combine([*shares[:3], replace(shares[3], lines=lines), *shares[4:]])


def test_a_file_that_is_no_share_is_refused_with_its_name(shards: Path, tmp_path: Path) -> None:
    good = fingerprint.of_rank(shards, 0).to_json()
    tensor = good["tensors"][0]
    path = tmp_path / "share.json"
    path.write_text(json.dumps(good))
    assert fingerprint.read_share(path).to_json() == good
    for bad in (
        "",
        "[]",
        "3",
        "{}",
        json.dumps(good | {"fingerprint": "0"}),
        json.dumps(good | {"ranks": ["a"]}),
        json.dumps(good | {"tensors": [tensor | {"fingerprint": "12"}]}),
        json.dumps(good | {"tensors": [tensor | {"fingerprint": "f" * 32}]}),
        json.dumps(good | {"tensors": [tensor | {"fingerprint": "z" * 32}]}),
        json.dumps(good | {"tensors": [{"name": "a"}]}),
    ):
        path.write_text(bad)
        with pytest.raises(ReshardError, match=r"share\.json"):
            fingerprint.read_share(path)
    name, other = tensor["name"], good["tensors"][1]
    edits: list[tuple[dict[str, Any], str]] = [
        ({"world": 10**9}, r"\$\.world is 1000000000, expected int <= 65536"),
        ({"world": 0}, r"\$\.world is 0"),
        ({"world": True}, r"\$\.world is True"),
        ({"ranks": [0, 8]}, "rank 8 of a world of 8"),
        ({"ranks": [-1, 0]}, r"\$\.ranks\[0\] is -1"),
        ({"ranks": [0.0]}, r"\$\.ranks\[0\] is 0\.0"),
        ({"ranks": [False]}, r"\$\.ranks\[0\] is False"),
        ({"ranks": "0"}, r"\$\.ranks is '0', expected array"),
        ({"seed": 3}, r"\$\.seed is 3, expected str, got int"),
        ({"facts": "\ud800"}, "not valid Unicode"),
        ({"tensors": {}}, r"\$\.tensors is {}, expected array"),
        ({"tensors": [other, tensor]}, f"tensor {name} follows {other['name']}"),
        ({"tensors": [tensor, tensor]}, f"tensor {name} follows {name}"),
        ({"tensors": [tensor | {"sizes": [*tensor["sizes"], 1]}]}, f"{name}: 4 axes have 5 sizes"),
        ({"tensors": [tensor | {"sizes": [1.0, *tensor["sizes"][1:]]}]}, r"\$\.tensors\[0\]\.sizes\[0\] is 1\.0"),
        ({"tensors": [tensor | {"axes": "abc"}]}, r"\$\.tensors\[0\]\.axes is 'abc', expected array"),
        ({"tensors": [tensor | {"elements": math.inf}]}, "numbers like NaN"),
        ({"tensors": [tensor | {"elements": True}]}, r"\$\.tensors\[0\]\.elements is True"),
        ({"tensors": [tensor | {"fingerprint": "0x" + "1" * 30}]}, r"\$\.tensors\[0\]\.fingerprint is '0x1"),
    ]
    for text, words in [
        *((json.dumps(good | edit), words) for edit, words in edits),
        ("[" * 200_000, "unsupported JSON: nested"),
    ]:
        path.write_text(text)
        with pytest.raises(ReshardError, match=rf"share\.json: .*{words}"):
            fingerprint.read_share(path)
    with pytest.raises(ReshardError, match=r"none\.json"):
        fingerprint.read_share(tmp_path / "none.json")
