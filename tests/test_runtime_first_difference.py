"""Where a table is wrong, the first step that computes something else than transformers is named, with its tensors and
facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, checkpoint, sizes, write
from running import ROOT, reshard

import reshard as api
from reshard.authoring.check_table import check_table
from reshard.checkpoints.source import open_source
from reshard.jobs.verdict import WIDTH
from reshard.runtime.model.decoder import ATTENTION, EMBEDDING, FEED_FORWARD, HEAD, RESIDUAL
from reshard.runtime.model.step_inputs import Used, kinds
from reshard.runtime.proof.first_difference import first_to_differ
from reshard.runtime.proof.reference import Reference, reference_for
from reshard.tables import families
from reshard.tables.facts import PARTS

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
Edit = Callable[[str], str]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def given(line: str) -> Edit:
    """A table's text with one more fact."""
    return lambda text: text.replace("[model]\n", f"[model]\n{line}\n")


def without(fact: str) -> Edit:
    return lambda text: re.sub(rf"(?m)^{fact} = .*\n", "", text)


def exchanged(one: str, other: str) -> Edit:
    return lambda text: text.replace(one, "@").replace(other, one).replace("@", other)


def replaced(one: str, other: str) -> Edit:
    return lambda text: text.replace(one, other)


def wrong(family: str, edit: Edit, directory: Path) -> Path:
    """A family's table that is wrong in one place."""
    text = (ROOT / f"reshard/families/{family}.toml").read_text()
    path = directory / f"{family}.toml"
    path.write_text(edit(text))
    assert path.read_text() != text
    return path


@cache
def reference(name: str) -> Reference:
    found = reference_for(open_source(checkpoint(name)))
    assert found.independent
    return found


def told(name: str, edit: Edit, directory: Path) -> Used:
    source = open_source(checkpoint(name), families.load_file(wrong(FIXTURES[name].family, edit, directory)))
    found = first_to_differ(source, reference(name), IDS)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_neox", "gpt2", "falcon_7b", "falcon_40b", "olmo2", "deepseek_v3"]
)
def test_of_a_right_table_no_step_differs(name: str) -> None:
    assert first_to_differ(open_source(checkpoint(name)), reference(name), IDS) is None


# checkpoint, fact, what is wrong, the step named, and what would be right
WRONG: list[tuple[str, str, Edit, str, Any]] = [
    ("llama", "rope_interleaved", given("rope_interleaved = true"), "layer 0, attention", None),
    ("llama", "norm_offset", given("norm_offset = 1"), "layer 0, attention: attn_norm", None),
    ("llama", "norm", given('norm = "layer"'), "layer 0, attention: attn_norm", None),
    ("llama", "eps", given("eps = 0.001"), "layer 0, attention: attn_norm", None),
    ("llama", "attn_scale", given("attn_scale = 7"), "layer 0, attention", None),
    ("llama", "parallel", given("parallel = true"), "layer 0, attention and feed-forward: feed-forward", None),
    ("llama", "post_norm", given("post_norm = true"), "layer 0, attention", None),
    ("llama", "window", given('window = "5"'), "layer 0, attention", None),
    ("llama", "residual_factor", given("residual_factor = 0.5"), "layer 0, attention: residual", None),
    ("llama", "logit_factor", given("logit_factor = 0.5"), "the head", None),
    ("gemma2", "norm_offset", without("norm_offset"), "layer 0, attention: attn_norm", 1),
    ("gemma2", "activation", without("activation"), "layer 0, feed-forward", "=gelu_new"),
    ("gemma2", "embed_scale", without("embed_scale"), "the embedding", "hidden_size"),
    ("gemma2", "attn_scale", without("attn_scale"), "layer 0, attention", "query_pre_attn_scalar"),
    ("gemma2", "attn_cap", without("attn_cap"), "layer 0, attention", "attn_logit_softcapping"),
    ("gemma2", "logit_cap", without("logit_cap"), "the head", "final_logit_softcapping"),
    ("gpt_neox", "norm", without("norm"), "layer 0, attention and feed-forward: attn_norm", "layer"),
    (
        "gpt_neox",
        "rope_fraction",
        without("rope_fraction"),
        "layer 0, attention and feed-forward: attention",
        "partial_rotary_factor | 1",
    ),
    ("gpt_neox", "parallel", without("parallel"), "layer 0, attention: residual", True),
    (
        "mixtral",
        "routing.renormalize",
        replaced("renormalize = true", "renormalize = false"),
        "layer 0, feed-forward",
        True,
    ),
    ("deepseek_v3", "rope_interleaved", given("rope_interleaved = false"), "layer 0, attention", True),
    (
        "deepseek_v3",
        "routing.score",
        replaced('score = "sigmoid"', 'score = "softmax"'),
        "layer 2, feed-forward",
        "sigmoid",
    ),
]


@pytest.mark.parametrize(
    ("name", "fact", "edit", "step", "right"), WRONG, ids=[f"{name}-{fact}" for name, fact, *_ in WRONG]
)
def test_a_table_that_is_wrong_in_one_fact_is_told_the_step_and_the_fact(
    name: str, fact: str, edit: Edit, step: str, right: Any, tmp_path: Path
) -> None:
    found = told(name, edit, tmp_path)
    assert found.name == step
    assert {"fact": fact, "value": right} in found.to_json()["agrees"]
    assert len(found.agrees) <= 3
    assert fact in {*found.facts, *found.absent} or fact == "post_norm"


# what is exchanged, the step named, and a tensor of it by its wrong name
EXCHANGED: list[tuple[Edit, str, str, str]] = [
    (exchanged("k_proj.weight", "v_proj.weight"), "layer 0, attention", "attn.k", "self_attn.v_proj.weight"),
    (exchanged("q_proj.weight", "k_proj.weight"), "layer 0, attention", "attn.q", "self_attn.k_proj.weight"),
    (exchanged("gate_proj.weight", "up_proj.weight"), "layer 0, feed-forward", "mlp.up", "mlp.gate_proj.weight"),
    (
        exchanged("input_layernorm", "post_attention_layernorm"),
        *("layer 0, attention: attn_norm", "attn_norm", "post_attention_layernorm.weight"),
    ),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with as many key heads as query heads: whatever is exchanged fits."""
    path = tmp_path_factory.mktemp("plain")
    facts: dict[str, Any] = sizes(8, 2, 14, 56, 104, 331, 3) | {"num_key_value_heads": 8}
    write(path, "plain", transformers.LlamaConfig(**facts))
    return path


@pytest.mark.parametrize(("edit", "step", "logical", "stored"), EXCHANGED)
def test_where_names_are_exchanged_the_tensors_of_the_step_are_named(
    plain: Path, edit: Edit, step: str, logical: str, stored: str, tmp_path: Path
) -> None:
    source = open_source(plain, families.load_file(wrong("llama", edit, tmp_path)))
    found = first_to_differ(source, reference_for(open_source(plain)), IDS)
    assert found is not None
    assert (found.name, found.agrees) == (step, ())
    assert found.weights[logical] == (f"model.layers.0.{stored}",)
    assert stored.rpartition(".weight")[0].rpartition(".")[2] in found.lines()[0]


def test_what_a_table_makes_infinite_is_told_the_fact(tmp_path: Path) -> None:
    table, out = wrong("llama", given("embed_factor = 1e39"), tmp_path), tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2, family=str(table))
    report = api.verify(out, against=checkpoint("llama"), family=str(table), only="numerics")
    (failure,) = report.failures
    assert "not finite in float32" in failure
    assert failure.endswith("are finite; the first step to differ is the embedding, also at TP 1")
    assert "would agree without embed_factor" in report.checks[0].details[0]
    json.dumps(report.to_json(), allow_nan=False)


def test_verify_tells_it_in_a_few_lines(tmp_path: Path) -> None:
    table, out = wrong("llama", given("rope_interleaved = true"), tmp_path), tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=1, family=str(table))
    done = reshard("verify", out, "--against", checkpoint("llama"), "--family", table, "--only", "numerics")
    assert done.code == 1
    words = " ".join(done.out.split())
    assert "the first step to differ is layer 0, attention, also at TP 1" in words
    assert "layer 0, attention would agree without rope_interleaved" in words
    assert "attn.q = q_proj.weight, attn.k = k_proj.weight" in words and "of model.layers.0.self_attn" in words
    lines = [line for line in done.out.splitlines() if re.match(r" {11}\S| {22}\S", line)]
    assert all(len(line) <= WIDTH for line in lines)
    said = reshard(
        "verify", out, "--against", checkpoint("llama"), "--family", table, "--only", "numerics", "--json"
    ).json
    first = said["checks"][0]["numbers"]["first"]
    assert first["step"] == "layer 0, attention" and first["facts"] == {"rope_interleaved": True}
    assert first["weights"]["attn.q"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert first["agrees"] == [{"fact": "rope_interleaved", "value": None}]


def test_check_table_tells_it_too(tmp_path: Path) -> None:
    table = wrong("gemma2", without("norm_offset"), tmp_path)
    found = check_table(families.load_file(table), checkpoint("gemma2"), sample=1)
    assert found.wrong
    text = "\n".join(found.lines())
    assert "the first step to differ is layer 0, attention: attn_norm" in " ".join(text.split())
    assert "would agree with norm_offset = 1" in " ".join(text.split())
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert json.loads(json.dumps(found.to_json()))["first"]["agrees"] == [{"fact": "norm_offset", "value": 1}]


def test_every_fact_bears_on_a_part_of_a_step() -> None:
    steps = (
        (EMBEDDING, EMBEDDING),
        (HEAD, HEAD),
        *(("layer 0", part) for part in (ATTENTION, FEED_FORWARD, RESIDUAL, "attn_norm")),
    )
    weights = {"moe.up": ()}
    found = {kind for step, part in steps for kind in kinds(step, part, ["attn_norm"], weights)}
    assert found == PARTS.keys() - {""}
