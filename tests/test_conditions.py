"""What tables make depend on config.json: keys that are true, that are not, that are compared; which sets must be
there, and what runs.
"""

import json
import re
from pathlib import Path

import pytest
from fixtures import copy, read, rewrite

from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.runtime.model.spec import Spec
from reshard.runtime.model.spec_values import Facts
from reshard.tables import families
from reshard.tables.config import Config
from reshard.tables.facts import Fact

CONFIG = Config({"on": True, "off": False, "null": None, "four": 4, "also": 4, "five": 5})


def test_a_config_says_what_is_true() -> None:
    wanted = {
        "on": True,
        "!on": False,
        "off": False,
        "!off": True,
        "null": False,
        "!null": True,
        "absent": False,
        "!absent": True,
    }
    wanted |= {
        "four == also": True,
        "four != also": False,
        "four == five": False,
        "four != five": True,
        "four == 4": True,
        "five != 4": True,
    }
    wanted |= {"four <= 4": True, "five <= four": False, "four + 1 <= five": True, "absent <= 4": False}
    wanted |= {"absent == 4": False, "absent != 4": False, "four != absent": True}
    assert {key: CONFIG.says(key) for key in wanted} == wanted


def test_a_fact_is_the_first_alternative_that_is_not_null() -> None:
    def value(text: str | list[str]) -> object:
        return Facts({"fact": text}, CONFIG, {"fact": Fact("number", "")}).value("fact")

    assert [value(text) for text in ("null | five", "absent | 2.5", "null | =gelu", "four / five", "absent / 2")] == [
        5,
        2.5,
        "gelu",
        0.8,
        None,
    ]
    assert [
        value(text) for text in ("!absent", "four == 4", "four != 4", ["off", "four == also"], ["off", "null"])
    ] == [*(True, True, False, True, False)]


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        (
            "opt",
            r"decoder\.final_layer_norm\.",
            "do_layer_norm_before = True, yet ~final_layer_norm.weight, ~final_layer_norm.bias are missing",
        ),
        ("opt", r"_norm\.", "layer_norm_elementwise_affine = True, yet .*self_attn_layer_norm.weight"),
        (
            "opt_350m",
            r"project_",
            "word_embed_proj_dim != hidden_size, yet ~project_in.weight, ~project_out.weight are missing",
        ),
    ],
)
def test_a_set_that_config_json_promises_is_missed(name: str, lost: str, words: str, tmp_path: Path) -> None:
    copy(name, tmp_path / name)
    rewrite(tmp_path / name, lambda state: {key: tensor for key, tensor in state.items() if not re.search(lost, key)})
    with pytest.raises(ReshardError) as refused:
        open_source(tmp_path / name)
    assert re.search(words, str(refused.value).replace("model.decoder.", "~").replace("decoder.", "~"))


def test_rows_with_two_words_are_there_if_both_are(tmp_path: Path) -> None:
    """OPT without weights of norms has none at the end either, whatever else config.json says."""
    copy("opt_bare", tmp_path / "opt")
    config = json.loads((tmp_path / "opt/config.json").read_text())
    assert config["do_layer_norm_before"] and not config["layer_norm_elementwise_affine"]
    assert not [name for name in read(tmp_path / "opt") if "norm" in name]
    open_source(tmp_path / "opt")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "!apply_residual_connection_post_layernorm"),
        ("gpt_bigcode", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi"),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "!logit_scale"),
    ],
)
def test_what_no_fact_describes_does_not_run(name: str, changes: dict[str, object], words: str, tmp_path: Path) -> None:
    """It converts all the same."""
    copy(name, tmp_path / name)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    source = open_source(tmp_path / name)
    with pytest.raises(ReshardError, match=f"runs only with {re.escape(words)}"):
        Spec.of(families.load(source.layout.model.family.name), source.config, source.layout.model)
