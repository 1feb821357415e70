"""Quantised checkpoints: what a rank holds stands for the same numbers as its slice of the original."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantizing import WAYS, Parts, Way, checkpoint, values
from running import LLAMA, Tensors, llama_shapes, noise, refused, reshard, save, tree

DENSE = LLAMA | {"num_hidden_layers": 2, "hidden_size": 256, "head_dim": 32, "intermediate_size": 512, "vocab_size": 64}
MIXTURE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 256,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
USUAL = {"dense": "tp4", "mixture": "tp2pp2"}
MESHES = {"tp2": ["--tp", "2"], "tp4": ["--tp", "4"], "tp2pp2": ["--tp", "2", "--pp", "2"]}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if config is DENSE:
        return llama_shapes(config)
    hidden, inter, found = config["hidden_size"], config["moe_intermediate_size"], {}
    for name, shape in llama_shapes(config).items():
        start, mlp, _ = name.partition("mlp.")
        if not mlp:
            found[name] = shape
        elif "gate_proj" in name:
            found[f"{start}mlp.gate.weight"] = (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                at = f"{start}mlp.experts.{expert}."
                found |= {f"{at}gate_proj.weight": (inter, hidden), f"{at}up_proj.weight": (inter, hidden)}
                found[f"{at}down_proj.weight"] = (hidden, inter)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn."
        found |= {f"{at}q_norm.weight": (config["head_dim"],), f"{at}k_norm.weight": (config["head_dim"],)}
    return found


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as numbers."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            found[name] = values(entry["dtype"], raw[8 + size + low : 8 + size + high], tuple(entry["shape"]))
    return found


def whole(tensors: Tensors, name: str, way: Way) -> np.ndarray:
    """A matrix of the original as numbers."""
    parts = {
        part: values(dtype, data, shape)
        for suffix, part in way.names.items()
        if (found := tensors.get(name + suffix)) is not None
        for dtype, shape, data in [found]
    }
    rows = parts.get("packed", parts.get(""))
    assert rows is not None
    count = ROWS(name) if way.config["quant_method"] == "bitsandbytes" else 0
    return way.numbers(parts, [count or _rows(way, parts)])


def ROWS(name: str) -> int:
    return shapes(MIXTURE if "experts" in name else DENSE)[f"{name}.weight"][0]


def _rows(way: Way, parts: Parts) -> int:
    return len(parts["packed"] if "packed" in parts else parts[""])


def held(rank: dict[str, np.ndarray], name: str, rows: list[int], way: Way, expert: int | None = None) -> np.ndarray:
    """A matrix of a rank as numbers."""
    parts: Parts = {}
    for part in way.names.values():
        stored = rank.get(f"{name}_{part}" if part else name)
        if stored is not None:
            parts[part] = stored if expert is None else stored[expert]
    return way.numbers(parts, rows)


def matrices(config: dict[str, Any], tp: int, rank: int) -> Iterator[tuple[str, int | None, list[tuple[str, Any]]]]:
    """Of a layer: each stored matrix, an expert of it, and the originals with the slices that a rank holds."""

    def part(size: int) -> slice:
        return slice(size * rank // tp, size * (rank + 1) // tp)

    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    at = "self_attn."
    yield "attn.qkv", None, [(f"{at}{n}_proj", np.s_[part(size)]) for n, size in (("q", q), ("k", kv), ("v", kv))]
    yield "attn.o", None, [(f"{at}o_proj", np.s_[:, part(q)])]
    moe = "num_experts" in config
    inner = part(config["moe_intermediate_size" if moe else "intermediate_size"])
    for expert in range(config["num_experts"]) if moe else [None]:
        at = "mlp." if expert is None else f"mlp.experts.{expert}."
        start = "mlp" if expert is None else "moe"
        yield f"{start}.gate_up", expert, [(f"{at}gate_proj", np.s_[inner]), (f"{at}up_proj", np.s_[inner])]
        yield f"{start}.down", expert, [(f"{at}down_proj", np.s_[:, inner])]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("name", WAYS)
def test_ranks_hold_the_numbers_of_their_slices(name: str, kind: str, mesh: str, tmp_path: Path) -> None:
    way, config = WAYS[name], DENSE if kind == "dense" else MIXTURE
    if mesh != USUAL[kind] and not os.environ.get("RESHARD_ALL_MESHES"):
        pytest.skip("RESHARD_ALL_MESHES=1: all")
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = checkpoint(source, shapes(config), config, way)
    done = reshard("convert", source, out, *MESHES[mesh], "-q")
    assert done.code == 0, done.err
    tp = int(MESHES[mesh][1])
    ranks = [read(path) for path in sorted(out.glob("rank-*/model.safetensors"))]
    for number, rank in enumerate(ranks):
        for layer in range(config["num_hidden_layers"]):
            if len(ranks) > tp and number // tp != layer:
                continue
            for stored, expert, originals in matrices(config, tp, number % tp):
                want = [whole(tensors, f"model.layers.{layer}.{one}", way)[cut] for one, cut in originals]
                got = held(rank, f"layers.{layer}.{stored}", [len(each) for each in want], way, expert)
                np.testing.assert_array_equal(got, np.concatenate(want), f"{stored} on rank {number}")
    assert (done := reshard("verify", out, "--against", source, "--no-numerics")).code == 0, done.out + done.err
    assert reshard("convert", out, tmp_path / "back", "--to", "hf", "-q").code == 0
    assert tree(tmp_path / "back") == tree(source)


def test_another_rank_has_other_numbers(tmp_path: Path) -> None:
    """The comparison notices: a slice of the wrong rank, of every way."""
    for name, way in WAYS.items():
        source, out = tmp_path / name / "source", tmp_path / name / "out"
        tensors = checkpoint(source, shapes(DENSE), DENSE, way)
        assert reshard("convert", source, out, "--tp", "2", "-q").code == 0
        rank = read(out / "rank-00001/model.safetensors")
        want = whole(tensors, "model.layers.0.self_attn.o_proj", way)[:, :128]
        assert not np.array_equal(held(rank, "layers.0.attn.o", [len(want)], way), want), name


def made(directory: Path, name: str, **changes: Any) -> tuple[Path, Tensors]:
    way = WAYS[name]
    source = directory / "source"
    tensors = checkpoint(source, shapes(DENSE), DENSE, way._replace(config=way.config | changes))
    return source, tensors


DAMAGES: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {
    "scales lost": ("gptq-4", ".scales", None, ("q_proj", ".scales is missing")),
    "scale lost": ("fp8-block", ".weight_scale_inv", None, ("q_proj", "F8_E4M3", ".weight_scale_inv")),
    "scales transposed": ("w4a16", ".weight_scale", (4, 256), ("q_proj", "[4, 256]", "[256, 4]")),
    "of another group": ("gptq-4", ".scales", (8, 256), ("q_proj", "[8, 256]", "[4, 256]", "group 64")),
    "zeros lost": ("awq", ".qzeros", None, ("q_proj", ".qzeros is missing")),
    "whole scale lost": ("ct-nvfp4", ".weight_global_scale", None, ("q_proj", ".weight_global_scale is missing")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_contradict_one_another_are_named(damage: str, tmp_path: Path) -> None:
    name, suffix, shape, parts = DAMAGES[damage]
    source, tensors = made(tmp_path, name)
    key = f"model.layers.1.self_attn.q_proj{suffix}"
    dtype, _, data = tensors.pop(key)
    if shape is not None:
        tensors[key] = (dtype, shape, (data * 2)[: 2 * int(np.prod(shape))])
    save(source / "model.safetensors", tensors)
    out = tmp_path / "out"
    refused(reshard("convert", source, out, "--tp", "2"), 2, *parts)
    assert not out.exists()


def test_matrices_may_be_stored_in_several_ways(tmp_path: Path) -> None:
    """Whole in one layer, of other bits in another, next to one another in a fused row."""
    source = tmp_path / "source"
    plain = checkpoint(
        source, shapes(DENSE), DENSE, WAYS["gptq-4"], skip=["layers.0.self_attn.q_proj", "layers.1.mlp.up"]
    )
    eight = WAYS["gptq-8"].store(256, 512, 99)
    tensors = {key: each for key, each in plain.items() if "layers.1.mlp.down_proj" not in key}
    tensors |= {f"model.layers.1.mlp.down_proj{suffix}": each for suffix, each in eight.items()}
    save(source / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"+:.*1.*down.*": {"bits": 8}, "-:.*q_proj": {}}
    (source / "config.json").write_text(json.dumps(config))
    for at, mesh in enumerate(MESHES.values()):
        out, back = tmp_path / f"out{at}", tmp_path / f"back{at}"
        assert (done := reshard("convert", source, out, *mesh, "-q")).code == 0, done.err
        assert reshard("verify", out, "--against", source, "--no-numerics").code == 0
        assert reshard("convert", out, back, "--to", "hf", "-q").code == 0
        assert tree(back) == tree(source)
    rank = read(tmp_path / "out0/rank-00000/model.safetensors")
    assert {"layers.0.attn.q", "layers.0.attn.kv_packed", "layers.1.attn.qkv_packed", "layers.1.mlp.up"} <= rank.keys()
    way = WAYS["gptq-8"]
    want = whole(tensors, "model.layers.1.mlp.down_proj", way)[:, :256]
    np.testing.assert_array_equal(held(rank, "layers.1.mlp.down", [len(want)], way), want)


@pytest.mark.parametrize("value", ["swapped", "beyond"])
def test_a_group_index_that_is_not_what_config_json_says_is_refused(value: str, tmp_path: Path) -> None:
    source, tensors = made(tmp_path, "gptq-4")
    key = "model.layers.1.mlp.down_proj.g_idx"
    index = np.frombuffer(tensors[key][2], "<i4").copy()
    index[[3, 100]] = index[[100, 3]] if value == "swapped" else 99
    tensors[key] = ("I32", tensors[key][1], index.tobytes())
    save(source / "model.safetensors", tensors)
    done = refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, key, "group_size 64", "desc_act")
    assert "1" in done.err and not (tmp_path / "out").exists()


def test_what_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "gptq-4")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "nbits_per_codebook": 16}
    (source / "config.json").write_text(json.dumps(config))
    refused(reshard("plan", source, "--tp", "2"), 2, '"aqlm"', "gptq", "compressed-tensors")


def test_groups_say_which_sizes_are_legal(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "gptq-4")
    done = refused(reshard("plan", source, "--tp", "8"), 2, "a block of 64")
    assert "TP sizes that work: 1, 2, 4" in done.err
    shutil.rmtree(source)


PHI = {key: value for key, value in DENSE.items() if key != "head_dim"} | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
}


def fused(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a model that is published with q, k and v, and gate and up, in one."""
    found = {}
    for name, (first, *rest) in llama_shapes(config).items():
        if not any(one in name for one in ("k_proj", "v_proj", "mlp.up_proj")):
            name = name.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
            found[name] = (first * 2 if "qkv" in name or "gate_up" in name else first, *rest)
    return found


def comes_back(source: Path, directory: Path, *mesh: str) -> None:
    out, back = directory / "out", directory / "back"
    assert (done := reshard("convert", source, out, *mesh, "-q")).code == 0, done.err
    assert (done := reshard("verify", out, "--against", source, "--no-numerics")).code == 0, done.out + done.err
    assert (done := reshard("convert", out, back, "--to", "hf", "-q")).code == 0, done.err
    assert tree(back) == tree(source)


@pytest.mark.parametrize("name", ["gptq-4", "gptq-act-order", "awq", "ct-fp8-tensor", "ct-nvfp4", "fp8-block", "nf4"])
def test_matrices_that_are_published_fused(name: str, tmp_path: Path) -> None:
    """What is one for all of such a matrix, a scale or an order, is no part's own; head_dim is in no config key."""
    checkpoint(tmp_path / "source", fused(DENSE), PHI, WAYS[name])
    comes_back(tmp_path / "source", tmp_path, "--tp", "2")


def test_a_quantised_head_is_a_head(tmp_path: Path) -> None:
    source, tensors = made(tmp_path, "w4a16")
    tensors.pop("lm_head.weight")
    tensors |= {f"lm_head{suffix}": each for suffix, each in WAYS["w4a16"].store(64, 256, 5).items()}
    save(source / "model.safetensors", tensors)
    comes_back(source, tmp_path, "--tp", "2")


def test_one_group_of_all_inputs(tmp_path: Path) -> None:
    source, tensors = made(tmp_path, "gptq-4", group_size=-1)
    for key, (_, shape, _) in list(tensors.items()):
        if key.endswith(".scales"):
            tensors[key] = noise("F16", 1, shape[1])
        elif key.endswith(".qzeros"):
            tensors[key] = noise("I32", 1, shape[1])
        elif key.endswith(".g_idx"):
            tensors[key] = ("I32", shape, bytes(4 * shape[0]))
    save(source / "model.safetensors", tensors)
    comes_back(source, tmp_path, "--tp", "8")


NONSENSE: list[dict[str, Any]] = [
    {"bits": None}, {"bits": 0}, {"bits": "4"}, {"bits": -4}, {"bits": -32}, {"group_size": 0}, {"group_size": 10**17},
    {"group_size": -2}, {"group_size": [64]}, {"desc_act": True}, {"dynamic": {"a": {"bits": {}}}, "bits": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", NONSENSE, ids=map(str, NONSENSE))
def test_units_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    source, _ = made(tmp_path, "awq" if "desc_act" in change else "gptq-4", **change)
    done = reshard("plan", source, "--tp", "2")
    assert done.code == (0 if "desc_act" in change else 2), done.out + done.err


def test_other_layouts_of_awq_are_refused(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "awq", version="gemv")
    refused(reshard("plan", source, "--tp", "2"), 2, "q_proj", "config.json allows none of its layouts")


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("fp8-block", "ct-fp8-rows")])
def test_what_the_runtime_does_not_dequantise_it_refuses(name: str, tmp_path: Path) -> None:
    from reshard.checkpoints.source import open_source
    from reshard.errors import ReshardError
    from reshard.runtime.model.spec import Spec

    source = open_source(made(tmp_path, name)[0])
    model = source.layout.model
    try:
        Spec.of(model.family, source.config, model)
    except ReshardError as error:
        assert "does not dequantise" in error.message
    else:
        assert name in ("fbgemm", "ct-int8", "torchao"), "a scale for each row, of whatever codes"


def test_a_norm_is_no_matrix(tmp_path: Path) -> None:
    source, tensors = made(tmp_path, "ct-fp8-rows")
    key = "model.layers.1.input_layernorm.weight"
    tensors |= {key: ("F8_E4M3", (256, 4), bytes(1024)), f"{key}_scale": noise("BF16", 256, 1)}
    save(source / "model.safetensors", tensors)
    refused(reshard("plan", source, "--tp", "2"), 2, "input_layernorm", "no matrix", ".weight_scale")
