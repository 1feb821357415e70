"""The numeric check: whole shards pass, whatever computes something else does not, and the step and tensor at fault are
named.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES, copy, rewrite
from msgspec import to_builtins
from running import ROOT, big_llama, environment, reshard, sign
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reshard as api
from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh
from reshard.runtime.comm.threads import alone
from reshard.runtime.load import load_model
from reshard.runtime.model.experts import route
from reshard.runtime.model.spec import Routing
from reshard.runtime.model.weights import Weights
from reshard.runtime.proof import on_ranks
from reshard.runtime.proof.bounds import TIMES
from reshard.runtime.proof.reference import reference_for

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
    (check,) = report.checks
    assert report.ok, check.failures
    numbers = check.numbers
    assert ("transformers" in numbers["reference"] and "TP 1" not in numbers["reference"]) == ("fp8" not in name)
    assert check.status == ("self-consistent" if "fp8" in name else "ok")
    assert 0 < numbers["float32"]["own_max"] < 1e-2
    assert numbers["float32"]["max"] <= TIMES * numbers["float32"]["own_max"]
    assert numbers["coverage"]["rows"] == numbers["coverage"]["vocabulary"]
    assert numbers["continuations"]["tokens"] == 4 * 32
    if name == "mixtral":
        assert numbers["coverage"]["experts"] == numbers["coverage"]["of"]
        assert numbers["float32"]["imposed"] < 0.01
    assert not report.proven  # three checks were not run
    told = "\n".join(report.lines())
    assert re.search(r"\n {11}float32: max [\d.e-]+ \(bound [\d.e-]+\), rms [\d.e-]+, KL -?[\d.e-]+\n", told), told
    assert (
        f"covered: {numbers['coverage']['rows']} of {numbers['coverage']['vocabulary']} rows of the vocabulary" in told
    )


def test_every_check_run_and_nothing_left_out_is_proven(checkpoint: Get, tmp_path: Path) -> None:
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
    [
        ("layers.1.attn.qkv", "layer 1, attention"),
        ("layers.0.mlp.gate_up", "layer 0, feed-forward"),
        ("embed", "the embedding"),
    ],
)
def test_a_fault_that_every_digest_hides_is_found_and_named(
    checkpoint: Get, tmp_path: Path, name: str, step: str
) -> None:
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


# Mixtures


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture in float32 whose first two experts are almost equally good for every token, and shards of it."""
    source = copy("mixtral", tmp_path_factory.mktemp("twins") / "model")
    generator = torch.Generator().manual_seed(0)
    for path in source.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if name.endswith("gate.weight"):
                tensor[1] = tensor[0] + 3e-7 * tensor[0].abs().max() * torch.randn(tensor[0].shape, generator=generator)
        save_file(tensors, path, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    api.convert(source, source.parent / "out", tp=4, ep=2)
    return source, source.parent / "out"


@pytest.mark.parametrize("layers", [False, True])
def test_where_a_router_tosses_up_the_choice_of_the_reference_is_imposed(
    twins: tuple[Path, Path], layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = twins
    report = api.verify(out, against=source, only="numerics", layers=layers)
    assert report.ok, report.failures
    numbers = report.checks[0].numbers
    assert 0.01 < (numbers if layers else numbers["float32"])["imposed"] < 0.5
    assert "% routing ties" in "\n".join(report.lines()).replace("\n" + " " * 22, " ")
    if not layers:
        monkeypatch.setattr(on_ranks, "impose", lambda *_: None)
        report = api.verify(out, against=source, only="numerics")
        assert any("float32: logits differ by" in failure for failure in report.failures), (
            "the same shards, left to toss up"
        )


def test_a_router_that_is_sure_of_the_wrong_is_left_to_it(checkpoint: Get, tmp_path: Path) -> None:
    """Two experts exchanged in the router of every rank."""
    out = tmp_path / "out"
    api.convert(checkpoint("mixtral"), out, tp=2)
    for rank in range(2):
        exchanged(out, "layers.0.moe.router", slice(2, 3), slice(5, 6), rank)
    for layers in (False, True):
        report = api.verify(out, against=checkpoint("mixtral"), only="numerics", layers=layers)
        assert any(
            "layer 0, feed-forward" in failure and "moe.router differs" in failure for failure in report.failures
        ), report.failures


def test_margins_are_those_of_experts_and_of_groups() -> None:
    """Four groups of two, of which two are taken: an expert of theirs, or the groups, may be a toss-up."""
    routing = Routing(2, "chosen", 0, 0, 1, groups=4, group_top=2, group_best=1, weigh_input=False, wide=False)
    logits = torch.tensor(
        [[9, 3, 8, 2, 7, 1, 0, 0], [9, 3, 8, 2, 7.75, 1, 0, 0], [9, 8, 8.5, 2, 7.75, 1, 0, 0]], dtype=torch.float64
    )
    weights = Weights({"moe.router": torch.eye(8, dtype=torch.float64)})
    weights.routers["moe"].decisions = []
    chosen, _, _ = route(logits, weights, routing)
    ((seen, margins),) = weights.routers["moe"].decisions
    assert torch.equal(seen, chosen)
    assert margins.tolist() == [1.0, 0.25, 0.5]


# Ranks that are processes


def test_processes_give_the_report_of_threads(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums are taken in one order
    api.convert(checkpoint("llama"), out, tp=2)
    threads = api.verify(out, against=checkpoint("llama"), only="numerics")
    monkeypatch.setattr(on_ranks, "run_threads", None)
    processes = api.verify(out, against=checkpoint("llama"), only="numerics", processes=True)
    assert processes.ok, processes.failures
    one, other = (
        {key: value for key, value in to_builtins(report.checks[0].result).items() if key != "seconds"}
        for report in (threads, processes)
    )
    assert one == other


def test_processes_find_and_name_a_fault(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama_bin"), out, tp=2)
    exchanged(out, "layers.0.attn.o", slice(0, 3), slice(3, 6), rank=1)
    monkeypatch.setattr(on_ranks, "run_threads", None)
    done = reshard("verify", out, "--against", checkpoint("llama_bin"), "--only", "numerics", "--processes")
    assert done.code == 1
    assert (
        "the first step to differ is layer 0, attention: rank-00001/model.safetensors: layers.0.attn.o differs"
        in done.out
    ), done.out


def test_what_a_process_fails_with_is_raised(tmp_path: Path) -> None:
    given = {"out": tmp_path / "absent", "dtype": torch.float32, "prompts": torch.zeros(1, 2, dtype=torch.int64)}
    with pytest.raises(ReshardError, match=r"absent: no such"):
        on_ranks.on_ranks(Mesh(2), True, on_ranks.compute, **given)


def test_layer_by_layer_ranks_are_threads(checkpoint: Get) -> None:
    done = reshard("verify", checkpoint("llama"), "--against", checkpoint("llama"), "--layers", "--processes")
    assert done.code == 2
    assert "--layers and --processes" in done.err


# Layer by layer


@pytest.mark.parametrize("name", SAMPLE)
def test_layer_by_layer_finds_the_same(checkpoint: Get, tmp_path: Path, name: str) -> None:
    api.convert(checkpoint(name), tmp_path / "out", **SAMPLE[name])
    (check,) = api.verify(tmp_path / "out", against=checkpoint(name), only="numerics", layers=True).checks
    assert check.status == "self-consistent", check.failures
    assert check.numbers["worst"] <= TIMES
    assert check.notes


def test_layer_by_layer_names_the_step_and_the_tensor(checkpoint: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2, pp=2)
    exchanged(out, f"layers.{FIXTURES['llama'].layers - 1}.attn.o", slice(0, 3), slice(3, 6), rank=3)
    done = reshard("verify", out, "--against", checkpoint("llama"), "--only", "numerics", "--layers")
    assert done.code == 1
    assert re.search(
        r"float32: layer \d, attention differs by .*rank-00003/model.safetensors: layers.\d.attn.o differs", done.out
    ), done.out


LIMITED = """
import resource, sys, threading
from pathlib import Path
import torch, reshard
from reshard.errors import ReshardError
from reshard.runtime import memory
from reshard.runtime.proof import layerwise, numerics, on_ranks, reference  # what is imported counts for nobody
torch.set_num_threads(1)
threading.stack_size(1 << 20)
out, source, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + size, now + size))
whole = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
assert size < whole
try:
    bytearray(whole)
    sys.exit("not enforced")
except MemoryError:
    pass

def verify(**given):
    try:
        return "ok" if reshard.verify(out, against=source, only="numerics", **given).ok else "failed"
    except ReshardError as error:
        return f"{error.exit_code}: {error}"

print(verify(layers=True))
print(repr(verify()))
memory.limit = lambda: 1 << 60  # had it not been foreseen
print(repr(verify()))
"""


def test_layer_by_layer_runs_a_model_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    """A model of 380 MB in 16 bits where a process may have 330 MB: what is in memory is a part of a layer,
    in float64.
    """
    source = big_llama(tmp_path / "model", 380, sparse=True)
    api.convert(source, tmp_path / "out", tp=2)
    line = [sys.executable, "-c", LIMITED, str(tmp_path / "out"), str(source), str(330_000_000)]
    done = subprocess.run(
        line, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2")
    )
    if "not enforced" in done.stderr:
        pytest.skip("RLIMIT_DATA is not enforced here")
    assert done.returncode == 0, done.stderr
    layers, foreseen, met = done.stdout.splitlines()
    assert layers == "ok", layers
    assert (
        foreseen.startswith("'2: numerics: needs at least 2.") and "GiB of memory, this process may use 0." in foreseen
    )
    assert met.startswith("'3: numerics: out of memory: this process may use")
    assert "--layers" in foreseen and "--layers" in met


def test_what_stands_against_it_is_said(checkpoint: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2)
    report = api.verify(out)
    assert "nothing to compare with: --against SRC" in "\n".join(report.lines())
    api.convert(out, tmp_path / "other", tp=4)
    done = reshard("verify", tmp_path / "other", "--against", out, "--only", "numerics")
    assert done.code == 2
    assert "is not a published checkpoint" in done.err


def test_a_family_that_does_not_run_skips_the_check_and_says_why(checkpoint: Get, tmp_path: Path) -> None:
    text, out, table = (ROOT / "reshard/families/llama.toml").read_text(), tmp_path / "out", tmp_path / "llama.toml"
    table.write_text(text.replace("[model]\n", "[model]\nruns = false\n"))
    assert reshard("convert", checkpoint("llama"), out, "--tp", "2", "--sha256", "--family", table).code == 0
    why = 'cannot run it: family "llama" converts and merges but does not run: its table'
    for options in (("--numerics",), ("--only", "numerics", "--layers")):
        done = reshard("verify", out, "--against", checkpoint("llama"), "--family", table, *options)
        assert (done.code, done.err) == (0, "")
        words = " ".join(done.out.split())
        assert f"numerics skipped {why}" in words
        assert "proven: the files" not in words
        assert words.endswith("nothing is proven") == ("--only" in options)
    report = api.verify(out, against=checkpoint("llama"), family=str(table))
    assert str(report.checks[3].skipped).startswith(why)


def test_a_reference_that_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    source = copy("llama", tmp_path / "model")
    for path in source.glob("*.safetensors"):
        save_file({name: tensor * float("inf") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    api.convert(source, tmp_path / "out", tp=2)
    (check,) = api.verify(tmp_path / "out", against=source, only="numerics").checks
    assert "not finite" in str(check.skipped)


def test_the_reference_adds_alibi_once(checkpoint: Get) -> None:
    """transformers' eager attention, which is the reference elsewhere, adds it twice for Falcon."""
    source, ids = open_source(checkpoint("falcon_rw")), torch.arange(20)[None]
    reference = reference_for(source)
    assert reference.independent
    ours = load_model(source, torch.float32, world=alone())(ids)
    assert (reference.logits(ids, torch.float32) - ours).abs().max() < 1e-4


@pytest.mark.parametrize("positions", [6, 33])
def test_models_of_few_positions_are_run_as_far_as_these_go(tmp_path: Path, positions: int) -> None:
    source = copy("gpt2", tmp_path / "source")
    rewrite(
        source,
        lambda state: {name: t[:positions].clone() if name.endswith("wpe.weight") else t for name, t in state.items()},
    )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_positions": positions}))
    api.convert(source, tmp_path / "out", tp=2)
    report = api.verify(tmp_path / "out", against=source, only="numerics")
    assert report.ok and 0 < report.checks[0].numbers["continuations"]["tokens"] <= 4 * positions


def test_what_an_engine_wrote_is_no_original(checkpoint: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama_tied"), out, tp=2, to="vllm")
    for path in (out / "manifest.json", out / "source", *out.glob("rank-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (check,) = [check for check in api.verify(out, against=out).checks if check.name == "numerics"]
    assert check.skipped is not None and "is not a published checkpoint" in check.skipped
