"""Laws of reshard.checkpoints.hf_split: what it writes is what transformers writes, byte for byte."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import law

from reshard.checkpoints.hf_split import HfFile, loaded_order, parse_size, resplit
from reshard.containers.dtypes import BITS
from reshard.containers.safetensors import parse
from reshard.errors import ReshardError

transformers = pytest.importorskip("transformers", minversion="5.23")  # version 4 neither stacks experts nor sorts

INDEX = "model.safetensors.index.json"
Described = list[tuple[str, str, tuple[int, ...]]]

# No two axes of one size, no heads that divide evenly into everything, more than ten layers or experts where numbers
# could sort as text.
DENSE = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
FUSED = {**DENSE, "hidden_size": 48, "head_dim": 8, "pad_token_id": 0}
NEOX = {
    "vocab_size": 131,
    "hidden_size": 45,
    "intermediate_size": 60,
    "num_hidden_layers": 11,
    "num_attention_heads": 5,
}
FALCON = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
MOE = {**DENSE, "num_experts_per_tok": 2}
LATENT = {
    **MOE,
    "head_dim": 8,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 32,
    "q_lora_rank": 18,
    "kv_lora_rank": 22,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DENSE),
    "llama with every bias": ("llama", {**DENSE, "attention_bias": True, "mlp_bias": True}),
    "llama, tied, 12 layers": ("llama", {**DENSE, "tie_word_embeddings": True, "num_hidden_layers": 12}),
    "mistral": ("mistral", DENSE),
    "qwen2": ("qwen2", DENSE),
    "qwen3": ("qwen3", {**DENSE, "attention_bias": True}),
    "qwen3, tied": ("qwen3", {**DENSE, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**MOE, "num_local_experts": 5}),
    "mixtral, one expert": ("mixtral", {**MOE, "num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 11, "moe_intermediate_size": 20, "mlp_only_layers": [1]}),
    "qwen3_moe, no layer with experts": ("qwen3_moe", {**MOE, "num_experts": 4, "mlp_only_layers": [0, 1, 2]}),
    "phi3": ("phi3", FUSED),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_embd": 45, "n_layer": 11, "n_head": 5, "n_positions": 33, "n_inner": 60}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, tied": ("gpt_neox", {**NEOX, "tie_word_embeddings": True}),
    "falcon 40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon 7b": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon rw": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "gemma2": ("gemma2", DENSE),
    "olmo2": ("olmo2", {key: size for key, size in FUSED.items() if key != "head_dim"}),
    "gpt_oss": ("gpt_oss", {**MOE, "num_local_experts": 5}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3, whole q": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
}


def model_of(name: str) -> Any:
    """A seeded random bf16 model; routing biases in fp32, as published and as transformers loads them."""
    torch.manual_seed(0)
    family, words = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **words), dtype=torch.bfloat16
    )
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.data = torch.rand(buffer.shape)
    return model


def head_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def written(folder: Path) -> dict[str, bytes]:
    """What transformers wrote: the header bytes of each file, the index whole."""
    files = {path.name: head_of(path) for path in folder.glob("*.safetensors")}
    index = folder / INDEX
    return {**files, INDEX: index.read_bytes()} if index.exists() else files


def ours(files: tuple[HfFile, ...], index: bytes | None) -> dict[str, bytes]:
    heads = {file.name: file.header for file in files}
    return heads if index is None else {**heads, INDEX: index}


def described(file: Path) -> Described:
    head = head_of(file)
    entries = parse(head[8:], file.stat().st_size, file.name).entries
    return [(name, entry.dtype, entry.shape) for name, entry in entries.items()]


def compare(model: Any, folder: Path) -> None:
    """Save `model` under limits that give one file, a file per tensor, and everything between; resplit must give the
    same each time.
    """
    model.save_pretrained(folder / "whole", max_shard_size="1GB")
    tensors = {name: (dtype, shape) for name, dtype, shape in described(folder / "whole" / "model.safetensors")}
    ordered = [(name, *tensors[name]) for name in loaded_order(sorted(tensors, reverse=True))]
    total = sum(BITS[dtype] // 8 * torch.Size(shape).numel() for _, dtype, shape in ordered)
    counts = set()
    for limit in (1, 2_000, 4_032, 7_919, 11_004, 20_011, 33_000, total // 3, total - 1, total, 10**9):
        target = folder / str(limit)
        model.save_pretrained(target, max_shard_size=limit)
        expected = written(target)
        counts.add(len(expected))
        got = ours(*resplit(ordered, limit))
        assert sorted(got) == sorted(expected), limit
        for name, content in expected.items():
            assert got[name] == content, (limit, name)
    assert 1 in counts
    assert len(counts) > 5


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_loaded(name: str, tmp_path: Path) -> None:
    """In the loaded order, they equal what save_pretrained writes for a model that from_pretrained read."""
    model_of(name).save_pretrained(tmp_path / "source", max_shard_size="50KB")
    compare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source"), tmp_path)


def test_fp8_with_block_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block scales of experts are stacked beside their weights."""
    check = "transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer.validate_environment"
    monkeypatch.setattr(check, lambda *_, **__: None)  # it wants a GPU; saving needs none
    model = model_of("deepseek_v3")
    model.save_pretrained(tmp_path / "bf16")
    packed = {}
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            packed[f"{name}_scale_inv"] = torch.rand(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16))
            tensor = tensor.to(torch.float8_e4m3fn)
        packed[name] = tensor
    source = tmp_path / "fp8"
    source.mkdir()
    save_file(packed, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    (source / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source)
    compare(loaded, tmp_path)
    assert {name for name, _, _ in described(tmp_path / "whole" / "model.safetensors")} == set(packed)


def test_tensors_of_another_dtype_beside_bf16(tmp_path: Path) -> None:
    """Small fp32 and fp64 tensors change sizes and the order within a file as they do for transformers."""
    model = model_of("llama with every bias")
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data = parameter.data.float()
        elif key.endswith("k_proj.bias"):
            parameter.data = parameter.data.double()
    model.save_pretrained(tmp_path / "source")
    compare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto"), tmp_path)


@law(200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_files_are_filled_as_huggingface_hub_fills_them(sizes: list[int], limit: int) -> None:
    """Whatever the sizes, the tensors of each numbered file are those that huggingface_hub puts there."""
    state = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    expected = huggingface_hub.split_torch_state_dict_into_shards(state, max_shard_size=limit).filename_to_tensors
    files, index = resplit([(name, "U8", tuple(tensor.shape)) for name, tensor in state.items()], limit)
    assert {file.name: sorted(name for name, _ in file.tensors) for file in files} == {
        name: sorted(held) for name, held in expected.items()
    }
    assert (index is None) == (len(files) == 1)


def test_entries_say_where_the_tensors_lie(tmp_path: Path) -> None:
    """Each file's header is that of the library, and its entries, in order, fill the file behind it."""
    state = {"b": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    save_file(state, tmp_path / "x", metadata={"format": "pt"})
    (file,), index = resplit([("b", "F32", (3, 5)), ("a", "BF16", (7,)), ("c", "F32", ())], 1000)
    assert index is None
    assert file.header == head_of(tmp_path / "x")
    assert [(name, entry.offset - len(file.header), entry.nbytes) for name, entry in file.tensors] == [
        ("b", 0, 60),
        ("c", 60, 4),
        ("a", 64, 14),
    ]


def test_an_oversized_tensor_is_numbered_before_the_open_file() -> None:
    """What is larger than the limit gets a file of its own, ahead of the file that was open, which stays open."""
    files, index = resplit([("a", "U8", (4,)), ("big", "U8", (11,)), ("b", "U8", (6,)), ("c", "U8", (1,))], 10)
    assert [[name for name, _ in file.tensors] for file in files] == [["big"], ["a", "b"], ["c"]]
    assert json.loads(index or b"")["metadata"] == {"total_parameters": 22, "total_size": 22}


def test_experts_of_one_stack_stay_together() -> None:
    """All w1 of a layer count as one tensor: they go to one file,
    a file of their own if together they pass the limit.
    """
    stack = [(f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight", "U8", (4,)) for n in range(3)]
    files, _ = resplit([("a", "U8", (2,)), *stack, ("b", "U8", (8,))], 11)
    assert [len(file.tensors) for file in files] == [3, 2]


def test_buffers_are_no_parameters() -> None:
    """total_parameters leaves buffers out, total_size does not."""
    tensors = [("a.weight", "F32", (3,)), ("a.e_score_correction_bias", "F32", (2,)), ("a.scale", "F32", (7,))]
    assert json.loads(resplit(tensors, 1)[1] or b"")["metadata"] == {"total_parameters": 10, "total_size": 48}
    assert json.loads(resplit(tensors, 1, buffers=("scale",))[1] or b"")["metadata"] == {
        "total_parameters": 5,
        "total_size": 48,
    }


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "empty"),
        ([("a", "F32", (1,)), ("b", "F32", (1,)), ("b", "F32", (2,))], "b: 2 tensors of one name"),
        ([("a", "F33", (1,))], "a: dtype F33"),
    ],
)
def test_refusals(tensors: Described, words: str) -> None:
    """Nothing to write, a name that comes twice and an unknown dtype are refused in words."""
    with pytest.raises(ReshardError, match=words):
        resplit(tensors, 10)


@given(
    st.lists(
        st.lists(
            st.sampled_from(["w", "w1", "w10", "w2", "7", "10", "ln_f", "ln_1", "a_b", "a"]), min_size=1, max_size=4
        ),
        max_size=8,
    )
)
def test_plain_names_are_sorted_as_transformers_sorts_them(words: list[list[str]]) -> None:
    """The loaded order of names that no conversion touches is transformers' natural order."""
    names = [".".join(parts) for parts in words]
    assert loaded_order(names) == sorted(names, key=transformers.core_model_loading.dot_natural_key)


@given(
    st.decimals(min_value=1, max_value=99_999, places=3),
    st.sampled_from(["KB", "MB", "GB", "TB", "kb", "Gb"]),
    st.sampled_from(["", " "]),
)
def test_decimal_sizes_are_read_as_transformers_reads_them(value: Any, unit: str, space: str) -> None:
    """A size with a decimal unit means the same number of bytes to both."""
    assert parse_size(f"{value}{space}{unit}") == parse_size_to_int(f"{value}{space}{unit}")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("500", 500),
        ("7B", 7),
        ("2k", 2000),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """GB is decimal, GiB binary, plain digits are bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "0",
        "0.0001KB",
        "-5GB",
        "5PB",
        "1e9",
        "inf",
        "nanGB",
        "5GBs",
        "5,5GB",
        "5 G B",
        "5iB",
        "٥GB",
        "9" * 5000,
    ],
)
def test_no_sizes(text: str) -> None:
    """Nonsense is refused, naming it."""
    with pytest.raises(ReshardError, match="is not a file size") as caught:
        parse_size(text)
    assert text[:20] in caught.value.message
