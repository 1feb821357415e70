"""What is wrong with a source is said before anything is written: which file, which tensor, both numbers,
and what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import (
    LLAMA,
    Tensors,
    command,
    environment,
    header,
    llama,
    llama_shapes,
    llama_tensors,
    names,
    noise,
    refused,
    reshard,
    save,
    save_index,
    stamps,
)

from reshard.errors import unusable

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def refuses(source: Path, *parts: str, code: int = 2) -> None:
    """Both a plan and a conversion refuse, in the same words, and the conversion touches nothing."""
    before = stamps(source.parent)
    planned = refused(reshard("plan", source, "--tp", "2"), code, *parts)
    converted = refused(reshard("convert", source, source.parent / "out", "--tp", "2"), code, *parts)
    assert planned.err == converted.err
    assert stamps(source.parent) == before


# No checkpoint


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where/at/all", "no/where/at/all"])
def test_no_such_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("plan", name, "--tp", "2"), ("convert", name, "out", "--tp", "2"), ("inspect", name)):
        refused(reshard(*words), 2, f"{name}: no such file or directory", "Hub id")
    assert names(tmp_path) == []


def test_an_empty_directory_and_one_without_config(source: Path) -> None:
    (source / "config.json").unlink()
    refuses(source, "config.json: no such file", "is this the right directory")
    (source / "model.safetensors").unlink()
    refuses(source, "config.json: no such file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"a":' * 100_000, "unsupported JSON: nested"),
        ("<html>", "not JSON"),
    ],
)
def test_a_config_that_is_none(text: str, said: str, source: Path) -> None:
    (source / "config.json").write_text(text)
    refuses(source, "config.json", said)


def test_a_config_that_is_a_directory_or_no_text(source: Path) -> None:
    (source / "config.json").write_bytes(b"\x80{}")
    refuses(source, "config.json")
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    refuses(source, "config.json: is not a regular file")


JUNK: list[Any] = [None, True, 0, -1, 3.5, 1e400, 10**30, "", "three", "\ud800", [], [1], {}, {"a": 1}, 7]


@pytest.mark.parametrize(
    "key",
    [*LLAMA, "text_config", "quantization_config", "rope_scaling", "torch_dtype", "attention_bias", "num_experts"],
)
def test_no_value_in_a_config_makes_a_traceback(key: str, source: Path) -> None:
    for value in JUNK:
        (source / "config.json").write_text(json.dumps(LLAMA | {key: value}))
        assert reshard("plan", source, "--tp", "2").code in (0, 2), (key, value)
    assert reshard("plan", source, "--tp", "auto", "--device-memory", "1GiB", "--context", "99").code in (0, 2)
    assert reshard("inspect", source).code in (0, 2)


def test_no_weights(source: Path) -> None:
    """Neither one file nor an index; what lies there instead is named."""
    (source / "model.safetensors").rename(source / "weights.safetensors")
    refuses(
        source,
        "no weights",
        "model.safetensors.index.json",
        "weights.safetensors",
        "single one is named model.safetensors",
    )
    (source / "weights.safetensors").unlink()
    refuses(source, "no weights")


def test_a_link_that_leads_nowhere(source: Path) -> None:
    """As in a cache of the Hub whose download was interrupted."""
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("../../blobs/0123")
    refuses(source, "model.safetensors", "../../blobs/0123")


def test_weights_that_are_no_regular_file(source: Path) -> None:
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    refuses(source, "model.safetensors: is not a regular file")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refuses(source, "model.safetensors: is not a regular file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_files_that_may_not_be_read(source: Path) -> None:
    """Said as the storage says it, exit 3; root, which may read everything, becomes nobody for it."""
    demote = "import os, sys\nfrom reshard.cli import main\nimport reshard.api, reshard.jobs.convert, reshard.jobs.plan\nos.setresuid(65534, 65534, 65534)\nmain(sys.argv[1:])"  # noqa: E501
    for path in (source, *source.parents):
        if path.stat().st_uid == 0 and path.stat().st_mode & 0o777 == 0o700:
            path.chmod(0o711)
    for name in ("model.safetensors", "config.json"):
        (source / name).chmod(0)
        line = [sys.executable, "-c", demote, "plan", str(source), "--tp", "2"]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert name in done.stderr and "Permission denied" in done.stderr and "check the permissions" in done.stderr
        (source / name).chmod(0o644)
    llama(source / "below")
    source.chmod(0o711)
    done = subprocess.run([*line[:4], str(source), "--tp", "2"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "") and "Permission denied" in done.stderr, done.stderr


# No table fits


def test_an_unknown_family_is_described_and_how_to_bring_a_table_is_said(source: Path) -> None:
    """What it holds, folded, with counts and shapes."""
    (source / "config.json").write_text(
        json.dumps(LLAMA | {"model_type": "lama3", "architectures": ["Lama3ForCausalLM"]})
    )
    refuses(
        source,
        'no table for model_type "lama3"',
        "3 × model.layers.{}.self_attn.q_proj.weight  [80, 56]",
        "1 × lm_head.weight  [331, 56]",
        "--family my.toml",
        "docs/notation.md",
        "llama",
    )
    assert reshard("plan", source, "--tp", "2", "--family", "llama").code == 0
    told = reshard("inspect", source)
    assert (
        told.code == 0
        and "unknown (model_type lama3)" in told.out
        and "3 × model.layers.{}.self_attn.q_proj.weight" in told.out
    )


@pytest.mark.parametrize(
    "config", [{}, {"model_type": None}, {"model_type": "x" * 1000}, {"architectures": ["Unknown"]}]
)
def test_a_config_that_names_no_family(config: dict[str, Any], source: Path) -> None:
    (source / "config.json").write_text(json.dumps(config))
    refuses(
        source, "no table for model_type" if config.get("model_type") else "config.json has no model_type", "--family"
    )


def broken(tensors: Tensors, source: Path) -> Path:
    save(source / "model.safetensors", tensors)
    return source


def test_a_tensor_that_no_row_claims(source: Path) -> None:
    refuses(
        broken(llama_tensors() | {"model.layers.1.lora.weight": noise("BF16", 4, 5)}, source),
        "no row claims",
        "lora.weight",
        "[4, 5]",
    )


def test_tensors_that_are_missing_are_told_together(source: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in llama_tensors().items()
        if "up_proj" not in name and name != "model.norm.weight"
    }
    refuses(broken(tensors, source), "3 × missing model.layers.{layer}.mlp.up_proj.weight", "missing model.norm.weight")


def test_a_layer_that_is_missing_or_too_many(source: Path) -> None:
    tensors = llama_tensors()
    refuses(
        broken({name: tensor for name, tensor in tensors.items() if ".2." not in name}, source),
        "missing model.layers.{layer}",
        "layers.2",
    )
    more = llama_tensors(LLAMA | {"num_hidden_layers": 4})
    refuses(broken(more, source), "unexpected model.layers.{layer}.self_attn.q_proj.weight", "model.layers.3")


def test_a_missing_head_that_is_not_tied(source: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    refuses(broken(tensors, source), "missing lm_head.weight", "tie_word_embeddings = False")


def test_a_bias_that_config_promises(source: Path) -> None:
    (source / "config.json").write_text(json.dumps(LLAMA | {"attention_bias": True}))
    refuses(source, "attention_bias", "q_proj.bias")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("hidden_size", 64, ("dimension 1 is 56", "64")),
        ("vocab_size", 300, ("model.embed_tokens.weight", "331", "300")),
        ("intermediate_size", 90, ("mlp.gate_proj.weight", "88", "90")),
        ("num_attention_heads", 16, ("q_proj.weight", "80")),
        ("num_key_value_heads", 8, ("k_proj.weight", "40")),
        ("num_key_value_heads", 3, ("heads is 8", "kv = 3")),
    ],
)
def test_shapes_that_contradict_the_config(key: str, value: int, parts: tuple[str, ...], source: Path) -> None:
    (source / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    refuses(source, 'does not fit the table of family "llama"', *parts)


def test_one_tensor_of_another_shape_or_dtype(source: Path) -> None:
    tensors = llama_tensors()
    refuses(
        broken(tensors | {Q: noise("BF16", 40, 56)}, source),
        "q_proj.weight",
        "shape [40, 56] here, [80, 56] elsewhere",
        Q,
    )
    refuses(broken(tensors | {Q: noise("BF16", 80, 56, 1)}, source), "[80, 56, 1]")
    key = Q.replace("q_proj", "k_proj")
    refuses(broken(tensors | {key: noise("F32", 40, 56)}, source), "attn.qkv", "different dtypes", "F32", "BF16")


def test_all_problems_are_told_at_once_and_grouped(source: Path) -> None:
    tensors = llama_tensors(LLAMA | {"num_hidden_layers": 50})
    del tensors["model.norm.weight"]
    tensors["odd"] = noise("BF16", 3)
    (source / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 60}))
    done = reshard("plan", broken(tensors, source), "--tp", "2")
    refused(
        done,
        2,
        "no row claims odd",
        "missing model.norm.weight",
        "10 × missing model.layers.{layer}.self_attn.q_proj.weight",
    )
    assert len(done.err.splitlines()) < 30


def test_a_config_that_promises_millions_of_tensors(source: Path) -> None:
    (source / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 10**9}))
    refuses(source, "promises 1000000000 layers", "27 tensors")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ('"gptq"', "bits 4", "group_size 128")),
        ({"quant_method": "awq", "bits": 4}, ('"awq"',)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ('"bitsandbytes"', "load_in_4bit")),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            ('"compressed-tensors"', "pack-quantized"),
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, ('"fp8"', "[64, 64]")),
        ({"quant_method": "aqlm"}, ('"aqlm"', "not supported", "gptq")),
        ({"quant_method": "mxfp4"}, ('"mxfp4"',)),
        ({"quant_algo": "NVFP4"}, ('"NVFP4"',)),
        ({"bits": 4}, ('"unnamed"', "bits 4", "not supported")),
        ("int8", ('"int8"', "not supported")),
    ],
)
def test_quantizations_are_refused_by_name(config: Any, parts: tuple[str, ...], source: Path) -> None:
    (source / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": config}))
    refuses(source, "quantization_config", *parts)


# Index


def indexed(source: Path, weight_map: Any, **more: Any) -> Path:
    (source / "model.safetensors").rename(source / "a.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map} | more))
    return source


MAP = dict.fromkeys(llama_shapes(LLAMA), "a.safetensors")


def test_an_index_that_names_a_missing_file(source: Path) -> None:
    refuses(
        indexed(source, MAP | {Q: "b.safetensors"}),
        "model.safetensors.index.json",
        "b.safetensors, which does not exist",
        "download",
    )


def test_an_index_that_names_a_tensor_which_its_file_lacks(source: Path) -> None:
    refuses(
        indexed(source, MAP | {"model.extra": "a.safetensors"}),
        "model.extra",
        "a.safetensors, which does not hold it",
        "do not belong",
    )


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/../a.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        ".//a.safetensors",
        "a.safetensors/",
    ],
)
def test_an_index_that_leads_out_of_the_directory(file: str, source: Path) -> None:
    shutil.copy(source / "model.safetensors", source.parent / "a.safetensors")
    refuses(indexed(source, MAP | {Q: file}), Q, "outside of the directory", "do not use this checkpoint")


def test_two_files_with_one_tensor(source: Path) -> None:
    tensors = llama_tensors()
    (source / "model.safetensors").unlink()
    files = {"a.safetensors": tensors, "b.safetensors": {"odd": noise("BF16", 2), Q: tensors[Q]}}
    save_index(source, files)
    text = (source / "model.safetensors.index.json").read_text()
    weight_map = json.loads(text)["weight_map"] | {"odd": "b.safetensors"}
    del weight_map[Q]
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuses(source, Q, "a.safetensors", "b.safetensors", "which one counts")


@pytest.mark.parametrize("weight_map", [None, [], "a", 5, {Q: 5}, {Q: None}, {Q: []}, {}])
def test_an_index_without_a_map(weight_map: Any, source: Path) -> None:
    refuses(indexed(source, weight_map), "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("text", ["", "[]", "{", "version https://git-lfs.github.com/spec/v1\n", "null"])
def test_an_index_that_is_no_json(text: str, source: Path) -> None:
    (indexed(source, MAP) / "model.safetensors.index.json").write_text(text)
    refuses(source, "model.safetensors.index.json")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_an_index_that_names_what_is_no_weights_file(file: str, source: Path) -> None:
    refuses(indexed(source, MAP | {Q: file}), file)


# Damaged files


def test_a_truncated_file_at_every_kind_of_length(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    lengths = [0, 1, 7, 8, 9, 100, start - 1, start, start + 1, len(data) // 2, len(data) - 4096, len(data) - 1]
    for length in lengths:
        (source / "model.safetensors").write_bytes(data[:length])
        refuses(source, "model.safetensors", str(length))
    for more in (1, 4096):
        (source / "model.safetensors").write_bytes(data + bytes(more))
        refuses(source, "model.safetensors", "too long", str(len(data)), str(len(data) + more))


def raw(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "length of nothing": lambda _: struct.pack("<Q", 0),
    "length over the end": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "length over all": lambda data: b"\xff" * 8 + data[8:],
    "length too short": lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] - 1) + data[8:],
    "no JSON": lambda _: raw(b"not json"),
    "not UTF-8": lambda _: raw(b'{"\xff": 1}'),
    "a list": lambda _: raw(b"[]"),
    "cut JSON": lambda _: raw(b'{"a": {"dtype": "F32"'),
    "bytes after the JSON": lambda _: raw(b"{}x"),
    "NaN": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}') + bytes(4),
    "true as a size": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}') + bytes(4),
    "negative size": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
    "unknown dtype": lambda _: raw(b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    "no shape": lambda _: raw(b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}') + bytes(4),
    "no offsets": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [1]}}') + bytes(4),
    "offsets do not fit the shape": lambda _: (
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + bytes(4)
    ),
    "offsets backwards": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + bytes(4),
    "a hole": lambda _: raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}') + bytes(8),
    "an overlap": lambda _: (
        raw(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": '
            b'[1], "data_offsets": [2, 6]}}'
        )
        + bytes(6)
    ),
    "half a surrogate": lambda _: (
        raw(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4)
    ),
    "a torn byte": lambda _: raw(b'{"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}') + bytes(2),
    "metadata of numbers": lambda _: raw(b'{"__metadata__": {"a": 1}}'),
    "too large to be": lambda _: (
        raw(b'{"a": {"dtype": "F32", "shape": [9999999999, 9999999999], "data_offsets": [0, 4]}}') + bytes(4)
    ),
    "nested": lambda _: raw(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a git-lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "a page": lambda _: b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "a pickle": lambda _: b"\x80\x02}q\x00." + bytes(20),
    "a zip": lambda _: b"PK\x03\x04" + bytes(30),
    "GGUF": lambda _: b"GGUF" + bytes(30),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_malformed_header(kind: str, source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(HEADERS[kind](path.read_bytes()))
    refuses(source, "model.safetensors", "hint: ")


def test_a_checkpoint_without_tensors(source: Path) -> None:
    (source / "model.safetensors").write_bytes(header({}))
    refuses(source, "hold no tensors", "download")
    (source / "model.safetensors").write_bytes(header({}, metadata={"format": "pt"}))
    refuses(source, "hold no tensors")


def test_a_carried_file_in_the_place_of_our_own(source: Path) -> None:
    """What shards have of their own is never written over, whatever lies beside the weights."""
    for name in ("manifest.json", "source", "rank-00000"):
        (source / name).write_text("{}")
        refused(reshard("convert", source, source.parent / "out", "--tp", "2"), 2, name, "rename or move it")
        (source / name).unlink()
    assert names(source.parent) == ["model"]


def test_a_carried_file_whose_name_is_no_text_is_left_behind(source: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.json")
    (source / odd).write_text("{}")
    done = reshard("convert", source, source.parent / "out", "--tp", "2", "--json")
    assert done.code == 0, done.err
    assert [entry["name"] for entry in done.json["left"]] == [odd]
    assert reshard("verify", source.parent / "out", "--against", source).code == 0


def test_a_file_that_cannot_be_read_to_the_end_is_an_error_of_the_machine(source: Path) -> None:
    """A read error in the middle of the weights: exit 3, the file is named, nothing is left."""
    code = """
import errno, os, sys
from reshard.cli import main
read = os.preadv
def bad(descriptor, buffers, offset):
    if offset > 100_000 and os.readlink(f"/proc/self/fd/{descriptor}").endswith("model/model.safetensors"):
        raise OSError(errno.EIO, "Input/output error")
    return read(descriptor, buffers, offset)
os.preadv = bad
main(sys.argv[1:])
"""
    line = [sys.executable, "-c", code, *command("convert", source, source.parent / "out", "--tp", "2")[3:]]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith(
        f"error: reading {source / 'model.safetensors'} failed: Input/output error\n\nhint: the storage"
    )
    assert names(source.parent) == ["model"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('libx.so: cannot open shared object file')", "It cannot be imported: OSError: libx.so: cannot"),
        ("import no_such_module_of_its_own", "It cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("def f(:", "It cannot be imported: SyntaxError"),
        (None, "It is not installed"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named_with_the_reason(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "a_broken_package.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = unusable("a_broken_package", "It")
    assert found is not None and found.startswith(said)
    assert unusable("json", "It") is None
