"""Checkpoints as they are found: which files count, how they may be laid, what goes along; all of it there and back,
byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from running import (
    BITS,
    LLAMA,
    Tensors,
    llama,
    llama_tensors,
    names,
    noise,
    refused,
    reshard,
    save,
    save_index,
    tree,
)
from safetensors import safe_open

OUR_TABLE = """
name = "mine"
rows = [
 ["emb.weight",                 "vocab hidden",            "embed"],
 ["blocks.{layer}.q.weight",    "(heads head_dim) hidden", "attn.q"],
 ["blocks.{layer}.k.weight",    "(kv head_dim) hidden",    "attn.k"],
 ["blocks.{layer}.v.weight",    "(kv head_dim) hidden",    "attn.v"],
 ["blocks.{layer}.o.weight",    "hidden (heads head_dim)", "attn.o"],
 ["blocks.{layer}.up.weight",   "inter hidden",            "mlp.up"],
 ["blocks.{layer}.down.weight", "hidden inter",            "mlp.down"],
 ["out.weight",                 "vocab hidden",            "head"],
]
aside = ["counter", "blocks.{layer}.mask", "empty"]
[sizes]
heads = "n_heads"
kv = "n_kv"
[axes]
heads = "kv group"
"""


def there_and_back(
    source: Path, *words: str, meshes: tuple[tuple[str, ...], ...] = (("--tp", "2"), ("--tp", "4", "--pp", "2"))
) -> Path:
    """Convert, verify, merge: the same files, byte for byte; the last shard directory."""
    for number, mesh in enumerate(meshes):
        out, back = source.parent / f"out{number}", source.parent / f"back{number}"
        done = reshard("convert", source, out, *mesh, *words)
        assert done.code == 0, done.err
        assert reshard("verify", out, "--against", source, *words).code == 0
        done = reshard("convert", out, back, "--to", "hf")
        assert done.code == 0, done.err
        whole = tree(source)
        assert tree(back) == {name: whole[name] for name in tree(back)}
        originals = {file["name"] for file in json.loads((out / "source" / "files.json").read_text())}
        assert originals | {"config.json"} <= tree(back).keys()
    return out


# Which files count


def test_one_file(tmp_path: Path) -> None:
    there_and_back(llama(tmp_path / "model"))


def test_the_index_decides_which_files_count_whatever_their_names(tmp_path: Path) -> None:
    """Files in odd names and in folders; everything else of a repository is left, and named."""
    source = llama(tmp_path / "model", {"a": noise("F32", 1)})
    (source / "model.safetensors").unlink()
    tensors = list(llama_tensors().items())
    (source / "part two").mkdir()
    save_index(
        source,
        {
            "zweiter teil.safetensors": dict(tensors[:9]),
            "part two/x.safetensors": dict(tensors[9:20]),
            "1.bin.safetensors": dict(tensors[20:]),
        },
    )
    extra = llama_tensors(seed=1)
    save(source / "consolidated.safetensors", extra)
    save(source / "model.fp16.safetensors", extra)
    save(source / "adapter_model.safetensors", {"lora": noise("F32", 5)})
    (source / "original").mkdir()
    save(source / "original" / "consolidated.00.safetensors", extra)
    for name in (
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "model.onnx",
        "training_args.bin",
        "optimizer.pt",
    ):
        (source / name).write_bytes(b"weights of another kind")
    (source / "tokenizer.json").write_text("{}")
    done = reshard("convert", source, tmp_path / "out", "--tp", "2")
    assert done.code == 0, done.err
    left = {"adapter_model.safetensors", "consolidated.safetensors", "original/", "pytorch_model.bin", "tf_model.h5"}
    left |= {
        "flax_model.msgpack",
        "model.gguf",
        "model.onnx",
        "training_args.bin",
        "optimizer.pt",
        "model.fp16.safetensors",
    }
    told = reshard("convert", source, tmp_path / "out", "--tp", "2", "--json").json["left"]
    assert {entry["name"] for entry in told} == left
    assert "left behind: " in done.out
    assert {name for name in tree(tmp_path / "out") if "/" not in name} == {
        "config.json",
        "manifest.json",
        "tokenizer.json",
    }
    assert reshard("convert", tmp_path / "out", tmp_path / "back", "--to", "hf").code == 0
    back = tree(tmp_path / "back")
    assert back.keys() == {"config.json", "tokenizer.json", "model.safetensors.index.json"} | {
        "zweiter teil.safetensors",
        "part two/x.safetensors",
        "1.bin.safetensors",
    }
    assert all(tree(source)[name] == data for name, data in back.items())


def test_one_file_counts_before_an_index_as_for_transformers(tmp_path: Path) -> None:
    """An old set of files beside a new single one; unless the index names just that."""
    source = llama(tmp_path / "model", llama_tensors(seed=5))
    save_index(source, {"a.safetensors": llama_tensors(seed=1)})
    out = tmp_path / "first"
    left = reshard("convert", source, out, "--tp", "2", "--json").json["left"]
    assert {entry["name"] for entry in left} == {"a.safetensors", "model.safetensors.index.json"}
    (source / "a.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink()
    assert reshard("verify", out, "--against", source, "--no-numerics").code == 0
    save_index(source, {"./model.safetensors": llama_tensors(seed=5)})
    there_and_back(source)


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "mixtral"])
def test_base_models_are_stored_without_model_and_perhaps_without_a_head(name: str, tmp_path: Path) -> None:
    """As embedding models are published. One whose head is its embedding runs, too."""
    source = fixtures.copy(name, tmp_path / "model")
    fixtures.rewrite(
        source,
        lambda state: {key.removeprefix("model."): tensor for key, tensor in state.items() if key != "lm_head.weight"},
    )
    there_and_back(source, meshes=(("--tp", "2"), ("--tp", "2", "--pp", "2")))
    done = reshard("verify", tmp_path / "out0", "--against", source, "--only", "numerics", "--json")
    assert done.code == 0 and ("numbers" in done.json["checks"][0]) == (name == "qwen3_tied"), done
    fixtures.rewrite(
        source, lambda state: {key: tensor for key, tensor in state.items() if "layers.1.input" not in key}
    )
    refused(
        reshard("plan", source, "--tp", "2"),
        2,
        "missing layers.{layer}.input_layernorm.weight",
        "layers.1.input_layernorm.weight",
    )


def test_config_json_may_name_the_weights(tmp_path: Path) -> None:
    source = llama(tmp_path / "model", transformers_weights="other.safetensors")
    refused(reshard("convert", source, tmp_path / "no", "--tp", "2"), 2, "other.safetensors", "does not exist")
    save(source / "other.safetensors", llama_tensors(seed=3))
    out = there_and_back(source)
    assert [file["name"] for file in json.loads((out / "source" / "files.json").read_text())] == ["other.safetensors"]


def test_pipes_and_what_cannot_be_read_are_refused_at_once(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    os.mkfifo(source / "README.md")
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, "README.md: not a regular file")
    (source / "README.md").unlink()
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    refused(reshard("plan", source, "--tp", "2"), 2, "config.json: is not a regular file")


def test_of_two_files_with_one_tensor_the_index_says_which_counts(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    tensors = llama_tensors()
    name = "model.norm.weight"
    save_index(source, {"a.safetensors": tensors, "b.safetensors": {name: noise("BF16", 56, seed=9)}})
    assert json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name] == "b.safetensors"
    out = there_and_back(source)
    with safe_open(out / "rank-00007" / "model.safetensors", "np") as file:
        stored = json.loads((out / "rank-00007" / "tensors.json").read_text())["tensors"]
        at = next(t for t in stored if t["name"] == "norm")
        data = (out / "rank-00007" / "model.safetensors").read_bytes()[at["offset"] :][: at["nbytes"]]
        assert data == noise("BF16", 56, seed=9)[2]
        assert "norm" in file.keys()  # noqa: SIM118


def test_large_files_are_left_behind(tmp_path: Path) -> None:
    """64 MiB go along, one byte more does not."""
    source = llama(tmp_path / "model")
    for name, size in (("goes.along", 64 << 20), ("stays.behind", (64 << 20) + 1)):
        with (source / name).open("wb") as file:
            file.truncate(size)
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--json")
    assert done.json["left"] == [{"name": "stays.behind", "size": (64 << 20) + 1, "why": "over 64 MiB"}]
    assert (tmp_path / "out" / "goes.along").stat().st_size == 64 << 20
    assert not (tmp_path / "out" / "stays.behind").exists()


def test_carried_files_keep_their_bytes_times_and_odd_names(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    odd = ["tokenizer.json", "ünïcode file.txt", "-rf", "$HOME", "a;b", ".hidden", "manifest.json.bak"]
    for number, name in enumerate(odd):
        (source / name).write_bytes(os.urandom(1000 + number))
        os.utime(source / name, ns=(10**18 + number, 10**18 + number))
    out = there_and_back(source)
    for name in odd:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert (out / name).stat().st_mtime_ns == (source / name).stat().st_mtime_ns


# How a file may be laid


def test_tensors_out_of_the_header_s_order(tmp_path: Path) -> None:
    source, tensors = llama(tmp_path / "model"), llama_tensors()
    save(
        source / "model.safetensors",
        tensors,
        order=sorted(tensors, key=lambda name: hashlib.sha1(name.encode()).digest()),
    )
    there_and_back(source)


@pytest.mark.parametrize("align", [1, 2, 7, 64])
def test_data_that_is_not_aligned(align: int, tmp_path: Path) -> None:
    """However long the header is: data of F32 may start anywhere."""
    source = llama(tmp_path / "model")
    save(source / "model.safetensors", llama_tensors(dtype="F32"), align=align, metadata={"a": "b" * align})
    there_and_back(source)


def test_elements_at_odd_offsets(tmp_path: Path) -> None:
    """A tensor of three bytes before all others: F32 at offsets that are not a multiple of four."""
    source = llama(tmp_path / "model", {})
    tensors = {"model.rotary_emb.inv_freq": noise("U8", 3)} | llama_tensors(dtype="F32")
    save(source / "model.safetensors", tensors)
    there_and_back(source)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(", ", " ,\n\t ").replace(": ", "\t:\r\n"),
        lambda text: text + " " * 1001,
        lambda text: text.replace('"model.norm.weight"', '"model.nor\\u006d.weight"'),
        lambda text: text.replace('"dtype": "BF16", ', '"later": {"a": [1, null, "x"]}, "dtype": "BF16", ', 1),
        lambda text: text.replace('"dtype": "BF16", "shape": [56]', '"shape": [56], "dtype": "BF16"'),
        lambda text: '{"__metadata__": {"ключ": "значение \\u2603", "": ""}, ' + text[1:],
    ],
    ids=["whitespace", "padding", "escapes", "unknown keys", "order of keys", "metadata"],
)
def test_odd_headers_that_are_valid(spoil: Any, tmp_path: Path) -> None:
    """Restored as they are, whatever white space and escapes; the safetensors library reads the same."""
    source = llama(tmp_path / "model")
    path = source / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + n])
    text.pop("__metadata__", None)
    raw = spoil(json.dumps(text)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + n :])
    with safe_open(path, "np") as file:
        assert len(file.keys()) == 30
    there_and_back(source)


# Which tensors there may be


def mine(tmp_path: Path, dtype: str = "BF16", more: Tensors | None = None, inter: int = 32) -> tuple[Path, str]:
    """A checkpoint of nobody's family, and the option that brings its table."""
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"n_heads": 8, "n_kv": 4}))
    table = tmp_path / "mine.toml"
    table.write_text(OUR_TABLE)
    tensors = {"emb.weight": noise(dtype, 36, 24)}
    for layer in range(2):
        at = f"blocks.{layer}."
        tensors[at + "q.weight"] = noise(dtype, 8 * 16, 24, seed=layer)
        tensors[at + "k.weight"] = noise(dtype, 4 * 16, 24, seed=layer + 10)
        tensors[at + "v.weight"] = noise(dtype, 4 * 16, 24, seed=layer + 20)
        tensors[at + "o.weight"] = noise(dtype, 24, 8 * 16, seed=layer + 30)
        tensors[at + "up.weight"] = noise(dtype, inter, 24, seed=layer + 40)
        tensors[at + "down.weight"] = noise(dtype, 24, inter, seed=layer + 50)
    tensors["out.weight"] = noise(dtype, 36, 24, seed=3)
    save(source / "model.safetensors", tensors | (more or {}))
    return source, f"--family={table}"


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_goes_there_and_back(dtype: str, tmp_path: Path) -> None:
    """Through a table of one's own; the shards hold it in the same dtype;
    sub-byte elements are cut only between bytes.
    """
    source, option = mine(tmp_path, dtype)
    out = there_and_back(source, option, meshes=(("--tp", "2"), ("--tp", "4"), ("--pp", "2")))
    stored = json.loads((out / "rank-00000" / "tensors.json").read_text())["tensors"]
    assert {tensor["dtype"] for tensor in stored} == {dtype}


def test_a_cut_that_would_tear_a_byte_is_refused(tmp_path: Path) -> None:
    """Half of 5 columns of four bits invalid size."""
    source, option = mine(tmp_path, "F4", inter=40)
    refused(
        reshard("convert", source, tmp_path / "out", "--tp", "8", option),
        2,
        "blocks.0.down.weight",
        "F4",
        "tearing a byte",
    )
    assert not (tmp_path / "out").exists()


def test_scalars_and_empty_tensors_are_kept_aside(tmp_path: Path) -> None:
    more = {
        "counter": noise("I64"),
        "blocks.1.mask": noise("BOOL", 1, 1, 7, 7),
        "empty": noise("F32", 0, 5),
        "blocks.0.mask": noise("U8", 0),
    }
    source, option = mine(tmp_path, more=more)
    out = there_and_back(source, option)
    assert "counter" not in (out / "rank-00000" / "tensors.json").read_text()


def test_scalars_and_empty_tensors_are_converted(tmp_path: Path) -> None:
    """Where a table has rows for them: a scalar is whole on every rank, a tensor without elements has none anywhere."""
    more = {"counter": noise("I64"), "empty": noise("F32", 0, 24)}
    source, option = mine(tmp_path, more=more)
    text = OUR_TABLE.replace('aside = ["counter", "blocks.{layer}.mask", "empty"]\n', "").replace(
        '["out.weight",', '["counter", "", "head_scale"],\n ["empty", "none hidden", "lost"],\n ["out.weight",'
    )
    (tmp_path / "mine.toml").write_text(text)
    refused(
        reshard("convert", source, tmp_path / "out", "--tp", "2", option),
        2,
        "no row for the logical tensor",
        "head_scale",
        "lost",
    )


TIED: dict[str, Any] = {"tie_word_embeddings": True}


@pytest.mark.parametrize("stored", ["embed", "head", "both equal", "both different"])
@pytest.mark.parametrize("to", ["native", "vllm"])
def test_tied_embeddings_stored_once_twice_or_as_head(stored: str, to: str, tmp_path: Path) -> None:
    """Whichever is stored comes back; with pipeline stages the first and the last have it."""
    tensors = llama_tensors(LLAMA)
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if stored == "embed":
        del tensors[head]
    elif stored == "head":
        del tensors[embed]
    elif stored == "both equal":
        tensors[head] = tensors[embed]
    source = llama(tmp_path / "model", tensors, **TIED)
    if to == "vllm" and stored == "both different":  # vLLM ties them, and then refuses to load a second one
        refused(
            reshard("convert", source, tmp_path / "out", "--tp", "2", "--to", to),
            2,
            "tie_word_embeddings",
            "embed and head",
        )
        return
    out = there_and_back(source, meshes=(("--to", to, "--tp", "2"), ("--to", to, "--pp", "3")))
    ranks = [
        {t["name"] for t in json.loads((out / f"rank-0000{rank}" / "tensors.json").read_text())["tensors"]}
        for rank in range(3)
    ]
    mine, last = ("embed", "head") if to == "native" else (embed, head)
    assert [mine in rank for rank in ranks] == [True, False, False]
    assert [last in rank for rank in ranks] == [False, False, True]


# The Hub's cache


def hub_cache(place: Path, source: Path) -> Path:
    """The files of a checkpoint as huggingface_hub keeps them: a snapshot of links into blobs, large ones named by
    their SHA-256.
    """
    repo = place / "models--our-org--Llama-3"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        summed = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(data).hexdigest()
        (repo / "blobs" / summed).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{summed}")
    return snapshot


def test_a_snapshot_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Links are followed; id, commit, licence and SHA-256 are known without a read, and recorded."""
    source = llama(tmp_path / "model")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    snapshot = hub_cache(tmp_path / "hub", source)
    out = tmp_path / "out"
    assert reshard("convert", snapshot, out, "--tp", "2").code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == {"id": "our-org/Llama-3", "commit": snapshot.name, "license": "apache-2.0"}
    files = json.loads((out / "source" / "files.json").read_text())
    assert [file.get("sha256") for file in files] == [
        hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    ]
    told = reshard("inspect", out, "--json").json
    assert (told["model"], told["commit"], told["license"]) == ("our-org/Llama-3", snapshot.name, "apache-2.0")
    assert reshard("convert", out, tmp_path / "back", "--to", "hf").code == 0
    assert tree(tmp_path / "back") == tree(source)
    assert not any(path.is_symlink() for path in [*out.rglob("*"), *(tmp_path / "back").rglob("*")])


def test_sha256_of_every_file_on_request(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    tensors = list(llama_tensors().items())
    save_index(source, {"a.safetensors": dict(tensors[:9]), "b.safetensors": dict(tensors[9:])})
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", "--sha256").code == 0
    recorded = {
        file["name"]: file.get("sha256")
        for file in json.loads((tmp_path / "out" / "source" / "files.json").read_text())
    }
    wanted = {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in sorted(recorded)}
    assert recorded == wanted
    assert len(wanted) == 3


# Spellings of config.json


@pytest.mark.parametrize(
    "spelling",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_scaling": None, "quantization_config": None, "text_config": None},
        {"head_dim": None},
        {"architectures": None},
        {"model_type": None},
        {"tie_word_embeddings": None},
        {"vocab_size": None},
    ],
    ids=str,
)
def test_spellings_of_config(spelling: dict[str, Any], tmp_path: Path) -> None:
    """Old and new names, missing and null keys: the same shards."""
    plain = llama(tmp_path / "plain")
    assert reshard("convert", plain, tmp_path / "wanted", "--tp", "2").code == 0
    source = tmp_path / "model"
    shutil.copytree(plain, source)
    (source / "config.json").write_text(json.dumps(LLAMA | spelling))
    out = there_and_back(source, meshes=(("--tp", "2"),))
    for rank in ("rank-00000", "rank-00001"):
        assert tree(out / rank) == tree(tmp_path / "wanted" / rank)


def test_a_missing_head_dim_follows_from_the_shapes(tmp_path: Path) -> None:
    source = llama(tmp_path / "model", head_dim=10)
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    (source / "config.json").write_text(json.dumps(config))
    assert reshard("inspect", source, "--json").json["sizes"]["head_dim"] == 10


def test_a_missing_number_of_kv_heads_means_all_heads(tmp_path: Path) -> None:
    source = llama(tmp_path / "model", llama_tensors(LLAMA | {"num_key_value_heads": 8}), num_key_value_heads=None)
    assert reshard("inspect", source, "--json").json["sizes"]["kv"] == 8
    there_and_back(source)


def test_a_nested_text_config(tmp_path: Path) -> None:
    """The model's facts, and its model_type, stand one level below."""
    source = llama(tmp_path / "model")
    (source / "config.json").write_text(
        json.dumps({"model_type": "some_wrapper", "architectures": ["Wrapper"], "text_config": LLAMA})
    )
    there_and_back(source)
    assert reshard("inspect", source, "--json").json["family"] == "llama"


def test_a_nested_text_config_alone(tmp_path: Path) -> None:
    source = llama(tmp_path / "model", llama_tensors() | {"model.stray": noise("F32", 5)})
    (source / "config.json").write_text(json.dumps({"text_config": LLAMA}))
    refused(
        reshard("plan", source, "--tp", "2"), 2, 'does not fit the table of family "llama"', "no row claims model.stray"
    )
    (source / "config.json").write_text(json.dumps({"model_type": "some_wrapper", "text_config": LLAMA}))
    refused(
        reshard("plan", source, "--tp", "2"),
        2,
        'does not fit the table of family "some_wrapper"',
        "no row claims model.stray",
    )


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts"])
def test_either_spelling_of_the_number_of_experts(key: str, tmp_path: Path) -> None:
    source = fixtures.copy("qwen3_moe", tmp_path / "model")
    fixtures.configure(source, "num_local_experts", "num_experts", **{key: 4})
    there_and_back(source, meshes=(("--tp", "4", "--ep", "2"),))
    fixtures.configure(source, **{key: 5})
    refused(reshard("plan", source, "--tp", "2"), 2, "experts")


# A table of one's own


def test_a_table_of_one_s_own_goes_with_the_shards(tmp_path: Path) -> None:
    """Shards are read, verified and merged without it; its name may even be that of a shipped one."""
    source, option = mine(tmp_path)
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", option).code == 0
    (tmp_path / "mine.toml").unlink()
    assert reshard("verify", tmp_path / "out", "--against", tmp_path / "out").code == 0
    assert reshard("convert", tmp_path / "out", tmp_path / "four", "--tp", "4").code == 0
    assert reshard("convert", tmp_path / "four", tmp_path / "back", "--to", "hf").code == 0
    assert tree(tmp_path / "back") == tree(source)
    assert "mine.toml" in names(tmp_path / "four" / "source" / "families")


def test_a_table_of_one_s_own_may_be_like_a_shipped_one(tmp_path: Path) -> None:
    tensors = llama_tensors() | {
        f"model.layers.{layer}.self_attn.q_norm.weight": noise("BF16", 10, seed=layer) for layer in range(3)
    }
    source = llama(tmp_path / "model", tensors, model_type="lama")
    (tmp_path / "t.toml").write_text(
        'name = "lama"\nlike = "llama"\nrows = [["model.layers.{layer}.self_attn.q_norm.weight", "head_dim", '
        '"attn.q_norm"]]'
    )
    there_and_back(source, f"--family={tmp_path / 't.toml'}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("name",)),
        ("name = ", ("TOML",)),
        ('name = "x y"', ("no name",)),
        ('name = "x"\nrow = []', ("unknown key row",)),
        ('name = "x"\nlike = "nothing"', ('"nothing"',)),
        ('name = "x"\nlike = "x"', ("x",)),
        ('name = "x"\nrows = [["a", "b"]]', ("a",)),
        ('name = "x"\nrows = [["a", "b c", "d e"]]', ("a", "leaves")),
        ('name = "x"\nrows = [["a", "(b", "d"]]', ("a",)),
        ('name = "x"\nrows = [["a", "b", "d", "often"]]', ("often",)),
        ('name = "x"\nrows = [["a", "b", "d"], ["a", "b", "e"]]', ("a has two rows",)),
        ('name = "x"\nrows = 5', ("5",)),
        ('name = "x"\nsizes = 5', ("5",)),
        ('name = "x"\n[axes]\na = "a b"', ("contains itself",)),
        ('name = "x"\nrows = [["{", "b", "d"]]', ("{",)),
    ],
)
def test_a_wrong_table_is_refused(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    (tmp_path / "t.toml").write_text(text)
    refused(reshard("plan", source, "--tp", "2", "--family", tmp_path / "t.toml"), 2, *parts)


def test_noise_is_noise() -> None:
    """No two tensors of these checkpoints are equal, so that an exchange would be seen."""
    seen = {np.frombuffer(data, np.uint8).tobytes() for _, _, data in llama_tensors().values()}
    assert len(seen) == len(llama_tensors())
