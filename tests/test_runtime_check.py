"""The numeric rung: whole shards pass, whatever computes something else does not, and the step and tensor at fault are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import copy
from running import reshard, sign
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reshard as api

Get = Callable[[str], Path]

SAMPLE = {  # fixture → mesh
    "llama": {"tp": 4},
    "gpt_neox": {"tp": 2, "pp": 2},
    "mixtral": {"tp": 4, "ep": 2},
    "gemma2": {"tp": 2},
    "deepseek_v3": {"tp": 2},
    "deepseek_v3_fp8": {"tp": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SAMPLE)
def test_whole_shards_compute_what_the_original_does(checkpoint: Get, tmp_path: Path, name: str) -> None:
    api.convert(checkpoint(name), tmp_path / "out", **SAMPLE[name])
    report = api.verify(tmp_path / "out", against=checkpoint(name), only="numerics")
    (rung,) = report.rungs
    assert report.ok, rung.failures
    numbers = rung.numbers
    assert ("transformers" in numbers["reference"] and "TP 1" not in numbers["reference"]) == ("fp8" not in name)
    assert 0 < numbers["float32"]["own_max"] < 1e-2
    assert numbers["float32"]["max"] <= 4 * numbers["float32"]["own_max"]
    assert numbers["coverage"]["rows"] == numbers["coverage"]["vocabulary"]
    assert numbers["continuations"]["tokens"] == 4 * 32
    if name == "mixtral":
        assert numbers["coverage"]["experts"] == numbers["coverage"]["of"]
    assert not report.proven  # three rungs were not climbed


def test_everything_climbed_and_nothing_left_out_is_proven(checkpoint: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", checkpoint("llama"), out, "--tp", "2", "--sha256").code == 0
    done = reshard("verify", out, "--against", checkpoint("llama"), "--numerics")
    assert done.code == 0, done.out
    assert "\nproven: " in done.out


def exchanged(out: Path, name: str, one: slice, other: slice, rank: int = 0) -> None:
    """Exchange two ranges of rows of a stored tensor, and make all digests right again."""
    path = out / f"rank-{rank:05}" / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name).clone()
    entry = next(t for t in json.loads((path.parent / "tensors.json").read_text())["tensors"] if t["name"] == name)
    tensor[one], tensor[other] = tensor[other].clone(), tensor[one].clone()
    with path.open("r+b") as file:
        file.seek(entry["offset"])
        file.write(tensor.view(torch.uint8).numpy().tobytes())
    sign(out)


@pytest.mark.parametrize(
    ("name", "step"),
    [("layers.1.attn.qkv", "layer 1, attention"), ("layers.0.mlp.gate_up", "layer 0, feed-forward"), ("embed", "the embedding")],
)
def test_a_fault_that_every_digest_hides_is_found_and_named(checkpoint: Get, tmp_path: Path, name: str, step: str) -> None:
    """Two halves of a tensor of rank 1 exchanged: k and v, gate and up, rows of the vocabulary."""
    out = tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2)
    path = out / "rank-00001/model.safetensors"
    with safe_open(path, "pt") as file:
        rows = file.get_slice(name).get_shape()[0]
    kv = rows // 4 if name.endswith("qkv") else rows // 2  # two query heads for each key head
    exchanged(out, name, slice(rows - 2 * kv, rows - kv), slice(rows - kv, rows), rank=1)
    assert reshard("verify", out).code == 0
    done = reshard("verify", out, "--against", checkpoint("llama"), "--only", "numerics")
    assert done.code == 1
    assert f"the first step to differ is {step}: rank-00001/model.safetensors: {name} differs" in done.out, done.out


def test_what_stands_against_it_is_said(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2)
    report = api.verify(out)
    assert "there is nothing to compare with: --against SRC" in "\n".join(report.lines())
    api.convert(out, tmp_path / "other", tp=4)
    done = reshard("verify", tmp_path / "other", "--against", out, "--only", "numerics")
    assert done.code == 2
    assert "is no published checkpoint" in done.err
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = api.verify(out, against=checkpoint("llama"), only="numerics")
    assert report.ok
    assert report.rungs[0].numbers["reference"] == "this runtime at TP 1 (transformers is not installed)"


def test_a_reference_that_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    source = copy("llama", tmp_path / "model")
    for path in source.glob("*.safetensors"):
        save_file({name: tensor * float("inf") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    api.convert(source, tmp_path / "out", tp=2)
    (rung,) = api.verify(tmp_path / "out", against=source, only="numerics").rungs
    assert "not finite" in str(rung.skipped)
