"""What counts as a proof: only a reference that is not this runtime, and that has read every tensor of the checkpoint
as it is stored.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import EXCHANGED, UNKNOWN, WRAPPED, much_in_common, respelled, unknown, wrapped
from fixtures import State, checkpoint, configure, copy, rewrite
from planted import without_transformers
from running import environment, process, refused, reshard, sign

import reshard as api
from reshard.checkpoints.opening import table_of
from reshard.checkpoints.source import open_source
from reshard.jobs.verdict import Check
from reshard.runtime.proof import numerics as module
from reshard.runtime.proof.reference import reference_for
from reshard.runtime.proof.renaming import renaming
from reshard.text.progress import Silent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def numerics(out: Path, source: Path, **given: Any) -> Check:
    return api.verify(out, against=source, only="numerics", **given).checks[0]


def swapped(path: Path) -> Path:
    """The llama table with k and v exchanged: it fits, and merges back byte for byte."""
    return respelled(path, {}, EXCHANGED)


@pytest.mark.parametrize("text", ["raise RuntimeError('boom')", "1 / 0", "def f(:", "import no_such_module_of_its_own"])
def test_a_transformers_that_cannot_be_imported_is_no_reference(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a broken installation raises is told as the reason, and nothing is proven."""
    (tmp_path / "transformers.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    found = reference_for(open_source(checkpoint("llama")))
    assert not found.independent
    assert re.search("transformers cannot be imported: (RuntimeError|ZeroDivision|Syntax|ModuleNotFound)", found.name)


def test_a_pytorch_that_cannot_be_imported_skips_numerics_with_the_reason(tmp_path: Path) -> None:
    """As where a shared library of CUDA is missing."""
    source, out, stub = checkpoint("llama"), tmp_path / "out", tmp_path / "stub"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    stub.mkdir()
    (stub / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    env = environment() | {"PYTHONPATH": f"{stub}:{environment()['PYTHONPATH']}"}
    done = process("verify", out, "--against", source, env=env)
    assert done.code == 0 and "proven" not in done.out
    assert "PyTorch cannot be imported: OSError: libcudart.so.12" in " ".join(done.out.split())
    refused(process("generate", out, "--tokens", "1 2", env=env), 2, "libcudart.so.12", "pip install")


# --- without transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which transformers cannot be imported."""
    return without_transformers(tmp_path_factory.mktemp("bare"))


def test_names_exchanged_in_a_table_are_not_proven_where_transformers_is_missing(
    tmp_path: Path, bare: dict[str, str]
) -> None:
    """Shards and their reference would be cut by the same wrong table: they agree, which proves nothing."""
    source, out, mine = checkpoint("llama"), tmp_path / "out", swapped(tmp_path / "mine.toml")
    assert reshard("convert", source, out, "--tp", "2", "--sha256", "--family", mine).code == 0
    done = process("verify", out, "--against", source, "--family", mine, env=bare)
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert (
        "numerics self-consistent agrees with this runtime at TP 1 (transformers is not installed), not independent;"
        in words
    )
    assert "hint: pip install 'reshard[reference]'" in words
    assert words.endswith(
        "3 of 4 checks passed: the files are intact; every element equals the original's, bit by bit;"
        " merging restores the published files;"
        " the shards agree with this runtime at TP 1, which is not independent"
    )
    assert "proven" not in words.replace("unproven", "")
    said = process("verify", out, "--against", source, "--family", mine, "--json", "--require", "proven", env=bare)
    assert said.code == 1
    found = json.loads(said.out)
    assert (found["ok"], found["proven"], found["passed"], found["unmet"]) == (
        False,
        False,
        3,
        ["numerics: self-consistent"],
    )
    assert (found["checks"][3]["status"], found["checks"][3]["ok"]) == ("self-consistent", None)
    assert found["checks"][3]["hint"] == "pip install 'reshard[reference]'"
    assert (
        process(
            "verify", out, "--against", source, "--family", mine, "--require", "integrity,weights,sha256", env=bare
        ).code
        == 0
    )


def test_the_same_table_fails_where_transformers_is_there(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", str(swapped(tmp_path / "mine.toml"))
    api.convert(checkpoint("llama"), out, tp=2, family=mine)
    check = numerics(out, checkpoint("llama"), family=mine)
    assert check.status == "failed" and "logits differ" in check.failures[0]


def test_disagreeing_with_oneself_is_a_failure(tmp_path: Path, bare: dict[str, str]) -> None:
    api.convert(checkpoint("llama"), tmp_path / "out", tp=2)
    rewrite(
        source := copy("llama", tmp_path / "other"),
        lambda state: {name: tensor * 1.5 for name, tensor in state.items()},
    )
    done = process("verify", tmp_path / "out", "--against", source, "--only", "numerics", env=bare)
    assert done.code == 1 and re.search(r"numerics +\d FAILED", done.out), done.out


def test_a_table_is_not_called_caught_by_a_reference_that_is_not_independent(
    tmp_path: Path, bare: dict[str, str]
) -> None:
    mine = swapped(tmp_path / "mine.toml")
    line = ("check-table", mine, "--with", checkpoint("llama"), "--sample", "1")
    done = process(*line, env=bare)
    assert "all caught" not in done.out, done.out
    assert "no independent reference" in " ".join(done.out.split()) and "pip install 'reshard[reference]'" in " ".join(
        done.out.split()
    ), done.out
    assert json.loads(process(*line, "--json", env=bare).out)["proven"] is False


# --- names that transformers does not know ----------------------------------------------------------------------------


def adapted(state: State) -> State:
    return {re.sub(r"(v_proj|o_proj)\.", r"\1.base_layer.", name): tensor for name, tensor in state.items()}


KINDS = {
    "layers": (wrapped, WRAPPED),
    "modules": (adapted, {f"self_attn.{part}": f"self_attn.{part}.base_layer" for part in ("v_proj", "o_proj")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_in_names_do_not_make_a_reference_random(kind: str, tmp_path: Path) -> None:
    """transformers would fill what it does not find with random numbers: right tables are proven, those with exchanged
    names fail.
    """
    edit, names = KINDS[kind]
    rewrite(source := copy("llama", tmp_path / "model"), edit)
    right = respelled(tmp_path / "right.toml", names, {})
    wrong = respelled(tmp_path / "wrong.toml", names, EXCHANGED)
    for family, status in ((right, "ok"), (wrong, "failed")):
        out = tmp_path / family.stem
        api.convert(source, out, tp=2, family=str(family))
        check = numerics(out, source, family=str(family))
        assert check.status == status, (family.stem, check)
        assert check.numbers["reference"].startswith("transformers "), check.numbers["reference"]


def test_names_that_say_something_else_make_no_reference_and_are_named(tmp_path: Path) -> None:
    """Whatever the table says of them: it could be what is wrong."""
    rewrite(source := copy("llama", tmp_path / "model"), unknown)
    family = str(respelled(tmp_path / "mine.toml", UNKNOWN, {}))
    api.convert(source, tmp_path / "out", tp=2, family=family)
    check = numerics(tmp_path / "out", source, family=family)
    assert check.status == "self-consistent" and not check.whole
    name = check.numbers["reference"]
    assert re.search(
        r"transformers does not use .*model\.layers\.0\.mlp\.w3\.weight.*, misses .*up_proj\.weight", name
    ), name


def test_a_tensor_beyond_what_transformers_reads_makes_no_reference(tmp_path: Path) -> None:
    """It may be left aside by the table, too, which would then agree."""
    extra = "model.layers.0.mlp.gate_proj.scale"
    rewrite(source := copy("llama", tmp_path / "model"), lambda state: state | {extra: torch.ones(3)})
    assert extra in reference_for(open_source(source, table_of(str(aside(tmp_path, extra))))).name


def aside(folder: Path, name: str) -> Path:
    (folder / "mine.toml").write_text(f'name = "mine"\nlike = "llama"\naside = ["{name}"]\n')
    return folder / "mine.toml"


@pytest.mark.parametrize("name", ["llama_inv_freq", "deepseek_v3", "qwen3_tied_stored", "gpt2_bare", "gpt_neox_old"])
def test_buffers_layers_ahead_and_tied_heads_are_no_objection(name: str) -> None:
    assert reference_for(open_source(checkpoint(name))).independent


def test_biases_that_are_stored_are_read_whatever_config_says(tmp_path: Path) -> None:
    source = copy("llama", tmp_path / "model")

    def edit(state: State) -> State:
        parts = [name for name in state if re.search(r"\.[qkv]_proj\.weight", name)]
        return state | {
            name.replace("weight", "bias"): torch.randn(len(state[name])).to(state[name].dtype) for name in parts
        }

    rewrite(source, edit)
    api.convert(source, tmp_path / "out", tp=2)
    check = numerics(tmp_path / "out", source)
    assert check.status == "ok", check
    assert "attention_bias" in check.numbers["reference"]


@pytest.mark.parametrize("key", ["module", "state_dict"])
def test_a_state_dict_inside_of_another_is_read(key: str, tmp_path: Path) -> None:
    source = copy("llama_bin", tmp_path / "model")
    for path in source.glob("*.bin"):
        torch.save({key: torch.load(path, weights_only=True), "epoch": 3}, path)
    found = reference_for(open_source(source))
    assert found.independent, found.name
    ids = torch.arange(12)[None]
    wanted = reference_for(open_source(checkpoint("llama_bin"))).logits(ids, torch.float32)
    assert torch.equal(found.logits(ids, torch.float32), wanted)


def test_names_are_changed_by_module_paths_alone() -> None:
    layer = "layers.0.self_attn"
    wanted = {f"model.language_model.{layer}.{part}_proj.weight": (4, 4) for part in "qkv"} | {"lm_head.weight": (9, 4)}
    wanted |= {f"model.visual.blocks.{layer}.{part}_proj.weight": (4, 4) for part in "kv"}
    stored = {f"language_model.model.{layer}.{part}_proj.weight": (4, 4) for part in "qkv"} | {
        "language_model.lm_head.weight": (9, 4)
    }
    found = renaming(stored, wanted)
    assert found == {
        **{
            f"language_model.model.{layer}.{part}_proj.weight": f"model.language_model.{layer}.{part}_proj.weight"
            for part in "qkv"
        },
        "language_model.lm_head.weight": "lm_head.weight",
    }
    assert renaming({"model.layers.0.attn.k.weight": (4, 4)}, {"model.layers.0.attn.v.weight": (4, 4)}) == {}
    assert (
        renaming({f"x.{layer}.k.weight": (4, 4)}, {f"a.{layer}.k.weight": (4, 4), f"b.{layer}.k.weight": (4, 4)}) == {}
    ), "either"
    assert renaming({f"x.{layer}.k.weight": (4, 4)}, {f"a.{layer}.k.weight": (4, 5)}) == {}, "another shape"
    both = {f"x.{layer}.k.weight": (4, 4), f"y.{layer}.k.weight": (4, 4)}
    assert renaming(both, {f"a.{layer}.k.weight": (4, 4)}) == {}, "two for one"


# --- a reference that says little -------------------------------------------------------------------------------------


def test_a_reference_that_is_off_by_more_than_rounding_is_refused(tmp_path: Path) -> None:
    """All logits have so much in common that float32 has lost what sets them apart: four times such an error would let
    anything pass.
    """
    source = copy("llama", tmp_path / "model")
    rewrite(source, much_in_common)
    api.convert(source, tmp_path / "out", tp=2)
    check = numerics(tmp_path / "out", source)
    assert check.status == "self-consistent" and not check.whole, check
    assert re.search(
        r"TP 1 \(the float32 error of transformers [\d.]+ is [\d.e-]+ of the scale of logits",
        check.numbers["reference"],
    ), check


def test_where_no_token_agrees_nothing_is_ok(tmp_path: Path) -> None:
    api.convert(checkpoint("llama"), tmp_path / "out", tp=2)
    found = module._Numerics(tmp_path / "out", open_source(checkpoint("llama")), Silent(), False, False)
    theirs, _ = found.reference.greedy(found._starts, 1)
    found._continuations([[int(token) ^ 1] for (token,) in theirs.tolist()], limit=math.inf)
    assert found.check.failures == [] and found.check.status == "unproven" and found.check.notes


@pytest.mark.parametrize("original", [20, 30])
def test_positions_that_change_on_the_way_are_no_fault(original: int, tmp_path: Path) -> None:
    """longrope takes other angles beyond the original length, and what a cache holds was turned by the ones before."""
    source = copy("phi4_mini", tmp_path / "model")
    configure(source, original_max_position_embeddings=original)
    api.convert(source, tmp_path / "out", tp=2)
    check = numerics(tmp_path / "out", source)
    assert check.status == "ok", check
    assert check.numbers["continuations"]["tokens"] == 4 * 32
    scaling = json.loads((source / "config.json").read_text())["rope_scaling"]
    configure(tmp_path / "out", rope_scaling=scaling | {"long_factor": scaling["long_factor"][::-1]})
    sign(tmp_path / "out")
    wrong = numerics(tmp_path / "out", source)
    assert any(failure.startswith("float32: token by token") for failure in wrong.failures), wrong


# --- what is required, and what is said -------------------------------------------------------------------------------


def test_what_is_skipped_is_neither_ok_nor_wrong(tmp_path: Path) -> None:
    assert reshard("convert", checkpoint("llama"), tmp_path / "out", "--tp", "2").code == 0
    done = reshard("verify", tmp_path / "out", "--json")
    assert [(check["check"], check["status"], check["ok"]) for check in done.json["checks"]] == [
        ("integrity", "ok", True),
        ("weights", "skipped", None),
        ("sha256", "skipped", None),
        ("numerics", "skipped", None),
    ]
    assert (done.code, done.json["ok"], done.json["proven"], done.json["passed"]) == (0, True, False, 1)
    assert (
        reshard("verify", tmp_path / "out")
        .out.splitlines()[-2]
        .startswith("1 of 4 checks passed: the files are intact;")
    )


@pytest.mark.parametrize(
    ("needed", "code", "unmet"),
    [
        ("integrity", 0, []),
        ("integrity,weights", 1, ["weights: skipped"]),
        ("proven", 1, ["weights: skipped", "sha256: skipped", "numerics: skipped"]),
    ],
)
def test_what_is_required_and_not_reached_ends_with_1(needed: str, code: int, unmet: list[str], tmp_path: Path) -> None:
    assert reshard("convert", checkpoint("llama"), tmp_path / "out", "--tp", "2").code == 0
    done = reshard("verify", tmp_path / "out", "--require", needed, "--json")
    assert (done.code, done.json["ok"], done.json["unmet"], done.json["required"]) == (
        code,
        not code,
        unmet,
        needed.split(","),
    )
    words = " ".join(reshard("verify", tmp_path / "out", "--require", needed, "--quiet").out.split())
    assert words.endswith(f"NOT MET: --require {needed}: {', '.join(unmet)}" if unmet else "")
    report = api.verify(tmp_path / "out", require=needed.split(","))
    assert (report.ok, report.unmet) == (not code, unmet)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--require", "proved"), "no such check"),
        (("--require", ""), "no such check"),
        (("--require", "proven", "--only", "weights"), "--only weights runs no other check"),
        (("--require", "numerics", "--no-numerics"), "--no-numerics leaves out"),
    ],
)
def test_what_cannot_be_required_is_refused(words: tuple[str, ...], part: str, tmp_path: Path) -> None:
    assert reshard("convert", checkpoint("llama"), tmp_path / "out", "--tp", "2").code == 0
    refused(reshard("verify", tmp_path / "out", *words), 2, part)
