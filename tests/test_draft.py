"""An unknown family is no dead end: a drafted table, edited where it says TODO, converts, merges, reshapes,
and is checked.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, checkpoint, configure, sizes, write, zoo
from running import LLAMA, llama, llama_tensors, noise, reshard
from safetensors.torch import load_file
from strategies import differing

from reshard.authoring import similar
from reshard.authoring.draft import draft
from reshard.checkpoints.published import open_published
from reshard.model.understand import understand
from reshard.tables import families


@pytest.fixture(scope="session")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that transformers has and we do not, with two norms that no table of ours calls so."""
    from transformers import HyperCLOVAXConfig

    assert "hyperclovax" not in families.shipped()
    directory = tmp_path_factory.mktemp("unknown") / "model"
    write(directory, "hyperclovax", HyperCLOVAXConfig(**sizes(8, 4, 10, 56, 88, 331, 5)))
    return directory


def test_a_drafted_table_is_edited_and_then_converts_merges_and_reshapes(unknown: Path, tmp_path: Path) -> None:
    """The five minutes of CONTRIBUTING.md."""
    refused = reshard("convert", unknown, tmp_path / "out", "--tp", "2")
    assert refused.code == 2 and "--draft-table > my.toml" in refused.err
    assert "5 × model.layers.{}.post_norm1.weight  [56]" in refused.err

    drafted = reshard("inspect", unknown, "--draft-table")
    assert drafted.code == 0 and "2 left to fill in (TODO)" in drafted.err
    table = tmp_path / "my.toml"
    table.write_text(drafted.out)
    refused = reshard("convert", unknown, tmp_path / "out", "--tp", "2", "--family", table)
    assert refused.code == 2 and "no row claims model.layers.{}.post_norm1.weight" in refused.err

    text = re.sub(r" # TODO 5 tensors.*\n", "", drafted.out)
    for name, leaf in (("post_norm1", "post_attn_norm"), ("post_norm2", "post_mlp_norm")):
        text = re.sub(rf' # (\["model.layers.{{layer}}.{name}.weight", "hidden", )"\?"', rf' \1"{leaf}"', text)
    table.write_text(text)
    for out, mesh in {
        "two": ("--tp", "2"),
        "six": ("--tp", "3", "--pp", "2", "--split", "2:1:1"),
        "eight": ("--tp", "8"),
    }.items():
        arguments = mesh[2:] if out == "six" else mesh
        assert reshard("convert", unknown, tmp_path / out, *arguments, "--family", table).code == 0
        assert reshard("convert", tmp_path / out, tmp_path / f"{out}-back", "--to", "hf").code == 0
        assert differing(unknown, tmp_path / f"{out}-back") == []
    assert reshard("convert", tmp_path / "two", tmp_path / "again", "--tp", "8").code == 0
    assert differing(tmp_path / "eight", tmp_path / "again") == []
    checked = reshard("check-table", table, "--with", unknown)
    assert checked.code == 0 and "not run" in checked.out, checked.out + checked.err
    assert reshard("convert", unknown, tmp_path / "left", "--tp", "2", "--family", table, "--json").code == 0


def test_every_tensor_of_a_family_like_another_is_drafted_in_one_line(unknown: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    configure(source, model_type="lama", architectures=["LamaForCausalLM"])
    drafted = reshard("inspect", source, "--draft-table", "--json").json
    assert (drafted["like"], drafted["open"]) == ("llama", [])
    (tmp_path / "my.toml").write_text(drafted["table"])
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", "--family", tmp_path / "my.toml").code == 0


@pytest.mark.parametrize(
    "name", ["gpt_neox", "falcon_40b", "deepseek_v3", "qwen3_moe", "gpt2_bare", "gemma2", "gpt_oss", "phi3"]
)
def test_a_draft_of_a_known_family_without_its_own_table_is_true_where_it_is_filled_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other tables say of such names: whatever is filled in is what the family's own table says,
    or is one of few.
    """
    from reshard.authoring import draft as module

    family = FIXTURES[name].family
    rest = tuple(other for other in families.shipped() if family not in families.load(other).texts)
    for cached in (similar._known, similar._heirs, similar._outside, similar.buffers):
        cached.cache_clear()
    monkeypatch.setattr(families, "shipped", lambda: rest)
    published = open_published(checkpoint(name))
    found = draft(published)
    parsed = families.parse(found.text, "draft", module._text)
    for cached in (similar._known, similar._heirs, similar._outside, similar.buffers):
        cached.cache_clear()
    own = families.load(family)
    true = understand(own, published.config, {key: entry for key, (_, entry) in published.tensors.items()}).family
    meaning = {row.name.folded: (row.leaves, row.pattern.dims) for row in true.rows}
    wrong = [
        row.name.text
        for row in parsed.rows
        if row.name.folded in meaning and meaning[row.name.folded] != (row.leaves, row.pattern.dims)
    ]
    assert len(wrong) <= 0.5 * len(parsed.rows), wrong
    assert len(parsed.rows) >= 2 or found.open


def test_transformers_plan_is_a_second_opinion(unknown: Path, tmp_path: Path) -> None:
    """A projection that transformers cuts by its inputs, and the names suggest by its outputs."""
    from reshard.authoring import draft as module

    plan = module._tp_plan("llama")
    assert plan["self_attn.o_proj"].startswith("rowwise") and plan["self_attn.q_proj"].startswith("colwise")
    assert module._tp_plan("nobody knows") == {}
    assert draft(open_published(unknown)).doubts == ()
    monkey: dict[str, Any] = {**plan, "self_attn.q_proj": "rowwise", "post_norm1": "colwise"}
    original = module._tp_plan
    module._tp_plan = lambda _: monkey  # type: ignore[assignment]
    try:
        found = draft(open_published(unknown))
    finally:
        module._tp_plan = original  # type: ignore[assignment]
    assert [doubt for doubt in found.doubts if "self_attn.q_proj" in doubt and "rowwise" in doubt]
    assert "# TODO model.layers.{layer}.self_attn.q_proj.weight: transformers splits it rowwise" in found.text
    assert "transformers splits it colwise" in found.text


@pytest.mark.parametrize("name", [*FIXTURES, *zoo()])
def test_every_draft_can_be_read_as_a_table(name: str) -> None:
    """Whatever the checkpoint: no traceback, and TOML of the notation's form."""
    from reshard.authoring import draft as module

    found = draft(open_published(checkpoint(name)))
    assert "@" not in found.text  # variants of axes follow from config.json, of which a draft knows too little
    families.parse(found.text.replace('name = "', 'name = "x_', 1), "draft", module._text)


def test_strange_checkpoints_are_drafted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "it's odd", "num_hidden_layers": "three"}))
    save_file(
        {"a.0.1.2": torch.ones(2), "7": torch.ones(()), "x.y": torch.ones(3, 4, 5)}, tmp_path / "model.safetensors"
    )
    done = reshard("inspect", tmp_path, "--draft-table")
    assert done.code == 0 and "TODO" in done.out, done.err


def test_what_one_family_does_not_read_is_no_buffer_of_another() -> None:
    """gemma4_text keeps keys of borrowing layers aside, chatglm a head: a draft that did would convert,
    and leave weights out.
    """
    kept = similar.buffers()
    assert "self_attn.rotary_emb.inv_freq" in kept
    assert {"self_attn.k_proj.weight", "lm_head.weight"} & kept == set()


def test_whatever_stands_around_a_known_language_model_is_drafted_as_towers(tmp_path: Path) -> None:
    source, table = tmp_path / "model", tmp_path / "my.toml"
    tensors = {f"language_model.{name}": tensor for name, tensor in llama_tensors().items()}
    tensors |= {f"eye.blocks.{at}.w": noise("BF16", 8, 6, seed=at) for at in range(3)} | {
        "bridge.weight": noise("BF16", 56, 6)
    }
    llama(source, tensors)
    (source / "config.json").write_text(json.dumps({"model_type": "odd_vl", "vision_config": {}, "text_config": LLAMA}))
    done = reshard("plan", source, "--tp", "2")
    assert done.code == 2 and "no row claims bridge.weight" in done.err and "inspect --draft-table" in done.err
    drafted = reshard("inspect", source, "--draft-table")
    assert drafted.code == 0 and 'as in "llama"; whole on the first stage: bridge, eye' in drafted.err
    table.write_text(drafted.out)
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", "--pp", "2", "--family", table).code == 0
    assert reshard("verify", tmp_path / "out", "--against", source, "--family", table, "--no-numerics").code == 0
    held = [load_file(tmp_path / f"out/rank-{rank:05}/model.safetensors").keys() for rank in range(4)]
    assert ["bridge.weight" in names and "eye.blocks.2.w" in names for names in held] == [True, True, False, False]
    assert reshard("convert", tmp_path / "out", tmp_path / "back", "--to", "hf").code == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    llama(source, tensors | {"language_model.model.stray": noise("BF16", 5)})
    (source / "config.json").write_text(json.dumps({"model_type": "odd_vl", "vision_config": {}, "text_config": LLAMA}))
    assert 'like = "llama"' not in reshard("inspect", source, "--draft-table").out  # that is no tower
