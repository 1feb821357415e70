"""Whatever a table's `[model]` or config.json says, it is run or refused: no value of any fact or key ends in a
traceback.
"""

import math
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from fixtures import checkpoint
from strategies import headers, table_of
from test_tables import toml

from reshard.errors import ReshardError
from reshard.layout import capacity
from reshard.layout.cut import Layout, lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import understand
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.load import load_model
from reshard.runtime.model.decoder import Decoder
from reshard.runtime.model.experts import ACTIVATIONS, LEARNED, SCORES
from reshard.runtime.model.spec import Spec
from reshard.tables import expression, facts, families
from reshard.tables.config import Config

RUN: set[str] = set()  # what has run needs not run again
IDS = torch.arange(3, 27)[None]
NUMBERS = (0, 1, -1, 3, 0.5, 1e-40, 1e40, 2**40, 10**400, math.nan, math.inf)
ODD = (
    None,
    True,
    False,
    "",
    "x",
    "1",
    [],
    [1],
    [None],
    ["x", 1],
    {},
    {"a": 1},
    [[1, 2]],
    [[["x"], 2]],
    [["x"]],
    {"rope_type": 3},
)
TEXTS = (
    *(
        "all",
        "even",
        "last 2",
        "each 0",
        "but x",
        "from 1",
        "windowed",
        "rms_norm_eps",
        "hidden_size",
        "model_type",
        "absent",
    ),
    *(
        "hidden_size / 0",
        "hidden_size / model_type",
        "hidden_size * 1e300",
        "1 if",
        "a b",
        "| 1",
        "=gelu",
        "=x",
        "rms",
        "batch",
        "layer",
    ),
    *(
        "sigmoid",
        "count model_type",
        "count hidden_size",
        "!x == 1",
        "all before x",
        "each -1",
        "hidden_size +",
        "9" * 400,
        "nan",
    ),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def decoder(name: str) -> Decoder:
    def work(world: Any) -> Decoder:
        return load_model(checkpoint(name), torch.float32, mesh=Mesh(), world=world)

    return run_threads(1, work, 120)[0]


def laid_out(table: families.Family, config: Config, stored: Any) -> Layout:
    model = understand(table, config, stored)
    return lay_out(table.published, model, Mesh(), model.active)


@cache
def plain(name: str) -> Layout:
    config, stored = headers(name)
    return laid_out(table_of(name), Config(config), stored)


def outcome(
    name: str, model: dict[str, Any] | None = None, config: dict[str, Any] | None = None, angles: bool = False
) -> str:
    """Runs a checkpoint with another `[model]` or config.json, perhaps in its angles alone: "runs",
    or what is said instead.
    """
    run, (said, stored) = decoder(name), headers(name)
    try:
        table = table_of(name)
        if model is not None:
            facts.check(model, name)
            table = replace(table, model=model)
        about = Config(said if config is None else config)
        layout = replace(plain(name), model=replace(plain(name).model, family=table))
        if config is not None and not angles:
            layout = laid_out(table, about, stored)
        spec = Spec.of(table, about, layout.model)
        capacity.cache(layout, about, 64, 1)
        if repr((name, spec)) not in RUN:
            run.spec = spec
            run.__dict__.pop("carried", None)
            with torch.no_grad():
                run(IDS)
            RUN.add(repr((name, spec)))
    except ReshardError as refused:
        assert refused.message
        return refused.message
    return "runs"


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at `a/b`."""
    key, _, rest = path.partition("/")
    return data | {key: changed(dict(data.get(key) or {}), rest, value) if rest else value}


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", [*facts.FACTS]),
        ("llama", [f"growth/{key}" for key in facts.GROWTH]),
        ("deepseek_v3", [f"routing/{key}" for key in facts.ROUTING]),
        ("gemma2", ["window", "window_if", "window_layers", "rope_layers", "rope_near", "borrowed", "attn_cap", "eps"]),
    ],
)
def test_no_value_of_any_fact_ends_otherwise_than_in_running_or_refusing(name: str, paths: list[str]) -> None:
    model = table_of(name).model
    if paths[0].startswith("growth"):
        model = model | {"growth": {"by": 0.1, "span": 4}}
    assert outcome(name, model) == "runs"
    for path in paths:
        found = [outcome(name, changed(model, path, value)) for value in (*NUMBERS, *ODD, *TEXTS)]
        found += [outcome(name, changed(model, path, [text])) for text in TEXTS]
        assert any(one != "runs" for one in found), path


ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
ROPE: dict[str, Any] = {
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE |= {
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "attention_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ROPE |= {
    "beta_fast": 32,
    "beta_slow": 1,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
    "alpha": 2.0,
    "truncate": True,
}


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "gpt2"])
def test_no_value_of_any_key_of_config_json_ends_otherwise(name: str) -> None:
    config = headers(name)[0]
    assert outcome(name, config=config) == "runs"
    read = set(re.findall(r"[A-Za-z_]\w*", str(table_of(name).written)))
    for key in (
        *(key for key in config if key in read),
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "layer_types",
        "tie_word_embeddings",
    ):
        for value in (*NUMBERS, *ODD):
            outcome(name, config=config | {key: value})


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_no_parameter_of_rotary_positions_ends_otherwise(kind: str) -> None:
    config = headers("llama")[0] | {"rope_scaling": None, "rope_parameters": None, "max_position_embeddings": 64}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    whole = ROPE | {"rope_type": kind, "short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2)}
    for where in ("rope_scaling", "rope_parameters"):
        assert outcome("llama", config=config | {where: whole}, angles=True) == "runs"
    for key in whole:
        left = {name: value for name, value in whole.items() if name != key}
        for said in (left, *(left | {key: value} for value in (*NUMBERS, *ODD))):
            outcome("llama", config=config | {"rope_scaling": said}, angles=True)
            outcome(
                "llama",
                config=config | {"rope_parameters": {"full_attention": said, "sliding_attention": {}}},
                angles=True,
            )


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("llama", {"eps": "x / 0"}, "eps"),
        ("llama", {"attn_scale": -1}, "model.attn_scale: -1 is not a positive number"),
        ("llama", {"attn_scale": math.nan}, "nan is not a positive number"),
        ("llama", {"activation": "=swash"}, "unknown 'swash'; the runtime has silu"),
        ("llama", {"activation": "=xielu"}, "has weights of its own"),
        ("llama", {"norm": "batch"}, "unknown None; the runtime has rms, layer"),
        ("llama", {"rope_layers": "some of them"}, '"some of them" does not name layers'),
        ("llama", {"window": "4 +"}, "at its end"),
        ("llama", {"borrowed": "all"}, "layer 0 would borrow keys and values"),
        ("llama", {"rope_size": 10**6}, "1000000 features of a head of"),
        ("deepseek_v3", {"routing": {"top": 1000}}, "1000 experts are chosen per token, there are"),
        ("deepseek_v3", {"routing": {"groups": 3}}, "experts cannot be divided into 3 groups"),
        ("deepseek_v3", {"routing": {"group_top": 99}}, "99 groups are chosen, there are"),
        ("deepseek_v3", {"routing": {"group_best": 99}}, "99 best scores count for a group, there are"),
    ],
)
def test_what_cannot_be_is_refused_with_both_values(name: str, model: dict[str, Any], words: str) -> None:
    said = table_of(name).model
    routing = {"routing": said["routing"] | model["routing"]} if "routing" in model else model
    assert words in outcome(name, said | routing)


def test_the_runtime_has_the_words_that_facts_list() -> None:
    assert set(facts.ACTIVATIONS) == {*ACTIVATIONS, *LEARNED} and set(facts.SCORES) == set(SCORES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 3),
        ("absent | a", 3),
        ("a + a * b", 15),
        ("b / a * a", 4),
        ("a / b", 0.75),
        ("a if on | b", 3),
        ("a if off | b", 4),
        ("a if word == =yes | b", 3),
        ("absent + 1 | 7", 7),
        ("count list", 2),
        ("!on", False),
        ("a == 3", True),
        ("a + 1 == b", True),
        ("=x-y", "x-y"),
        ("1e-05", 1e-05),
        ("false", False),
    ],
)
def test_an_expression_is_what_config_json_answers(text: str, value: Any) -> None:
    config = Config({"a": 3, "b": 4, "on": True, "off": False, "word": "yes", "list": [1, 2]})
    assert config.value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|",
        "a |",
        "a b",
        "a +",
        "* a",
        "a if",
        "if a",
        "! 3",
        "count 3",
        "1x",
        "0x1",
        "1e",
        "a ==",
        "(a)",
        "a == =",
        "-1",
        "9" * 19,
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ReshardError, match=r"is not an expression: expected .*"):
        expression.parse(text)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("sizes.inter", "a b c"),
        ("optional.mlp_bias?", "a b c"),
        ("extra.y", "a b c"),
        ("layers.y", "a b c"),
        ("model.eps", "a b c"),
        ("model.window", "a b c"),
        ("model.runs", ["a b c"]),
        ("model.rope_layers", "a b c"),
    ],
)
def test_every_expression_of_a_table_is_parsed_when_it_is_read(key: str, text: Any) -> None:
    data: dict[str, Any] = dict(families.load("llama").written) | {"one_of": [["y", "z"]]}
    data["rows"] = [*data["rows"], ["z.{layer}", "hidden", "z", "z"], ["y.{layer}", "hidden", "y", "y"]]
    section, name = key.split(".")
    data[section] = data.get(section, {}) | {name: text}
    with pytest.raises(ReshardError, match=rf"{re.escape(name)}: .*a b c"):
        families.parse(toml(data), "t.toml")
