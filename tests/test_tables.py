"""Tables are read strictly: an unknown key, word, axis, tag or name is refused, a typo never means nothing."""

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from strategies import headers, model_of

from reshard.errors import ReshardError
from reshard.layout.cut import lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, understand
from reshard.tables import families, formats, keys
from reshard.tables.shipped import HOME

KINDS: dict[str, Any] = {"families": families, "formats": formats}
SHIPPED = [(kind, name) for kind in ("families", "formats") for name in KINDS[kind].shipped()]


def shipped(kind: str, name: str) -> dict[str, Any]:
    """A table as it is written; of one with versions, the newest."""
    versions = sorted((HOME / kind / name).glob("*.toml"))
    return tomllib.loads((versions or [HOME / kind / f"{name}.toml"])[-1].read_text(encoding="utf-8"))


def toml(data: dict[str, Any]) -> str:
    """What `tomllib.loads` reads back as the same."""

    def word(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {word(one)}" for key, one in value.items()) + "}"
        return "[" + ", ".join(map(word, value)) + "]" if isinstance(value, list) else json.dumps(value)

    return "\n".join(f"{json.dumps(key)} = {word(value)}" for key, value in data.items())


def read(data: dict[str, Any], kind: str = "families") -> Any:
    def parent(name: str) -> str:
        path = HOME / kind / f"{name}.toml"
        if not path.is_file():
            raise ReshardError(f'no table "{name}"')
        return path.read_text(encoding="utf-8")

    return KINDS[kind].parse(toml(data), "mine", parent)


FAMILY: dict[str, Any] = {
    "name": "mine",
    "rows": [
        ["embed", "vocab hidden", "embed"],
        ["head", "vocab hidden", "head"],
        ["layers.{layer}.q", "(heads head_dim) hidden", "attn.q"],
        ["layers.{layer}.q_bias", "(heads head_dim)", "attn.q_bias", "bias?"],
    ],
    "axes": {"heads": "kv group"},
    "sizes": {"hidden": "hidden_size", "layer": "num_hidden_layers"},
    "tied": {"head": "embed"},
    "optional": {"bias?": "attention_bias"},
}
FORMAT: dict[str, Any] = {
    "name": "mine",
    "rows": [
        ["e", "vocab hidden", "embed", "first"],
        ["h", "vocab hidden", "head", "last"],
        ["q.{layer}", "(kv group head_dim) hidden", "attn.q"],
    ],
    "cut": {"tp": ["kv", "vocab"], "pp": ["layer"]},
    "pad": {"vocab": "128*tp"},
    "replicate": ["kv"],
    "uneven": ["layer"],
    "tied": "embed",
    "files": {"shard": "rank-{rank:05}/model.safetensors"},
    "constants": [["q.{layer}.scale", "F32", 1.0, "attn.q"]],
    "engine": {"name": "Mine", "versions": ["1.0"]},
}


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_every_shipped_table_is_read_and_keeps_its_texts(kind: str, name: str) -> None:
    table = KINDS[kind].load(name)
    assert table.name == name and name in table.texts
    data = shipped(kind, name)
    assert {row.name.text for row in table.rows} >= {row[0].partition(" | ")[0] for row in data.get("rows", ())}
    again = KINDS[kind].parse(table.texts[name], name, table.texts.__getitem__)
    assert again == table


def test_the_tables_that_are_damaged_below_are_whole() -> None:
    assert len(read(FAMILY).rows) == 4 and len(read(FORMAT, "formats").constants) == 1


# One change each, and what is said about it.


def damaged(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same table with another value at `rows.0.1`; None takes it away."""
    result = copy.deepcopy(data)
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    node: Any = result
    for part in way:
        node = node[part]
    if value is None:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return result


@pytest.mark.parametrize(
    ("data", "path", "value", "words"),
    [
        (FAMILY, "name", None, "name = None is no name"),
        (FAMILY, "name", "a b", "name = 'a b' is no name"),
        (FAMILY, "name", "../x", "name = '../x' is no name"),
        (FAMILY, "colour", "red", "unknown key colour"),
        (FAMILY, "model", {"atention": 1}, "unknown key atention in [model]"),
        (FAMILY, "model", {"growth": {"bye": 1}}, "unknown key bye in [model] growth"),
        (FAMILY, "model", {"routing": {"topp": 1}}, "unknown key topp in [model] routing"),
        (FAMILY, "model", {"routing": 5}, "model.routing is 5, expected object"),
        (FAMILY, "model", {"window": 5}, "model.window is 5, expected str"),
        (FAMILY, "model", {"cache": "attn.k"}, "model.cache is 'attn.k', expected array"),
        (FAMILY, "rows", "x", "rows is 'x', expected array"),
        (FAMILY, "rows/0", ["embed", "vocab hidden"], 'is not ["stored name", "pattern", "logical names", "words"]'),
        (FAMILY, "rows/0", ["a", "b", "c", "d", "e"], 'is not ["stored name"'),
        (FAMILY, "rows/0", [], 'is not ["stored name"'),
        (FAMILY, "rows/0/0", "x.{", "a brace that is no placeholder"),
        (FAMILY, "rows/0/0", "head", "head has two rows"),
        (FAMILY, "rows/2/0", "layers.{layer}.q_bias", "layers.{}.q_bias has two rows"),
        (FAMILY, "rows/0/1", "(vocab hidden", "a parenthesis is not closed"),
        (FAMILY, "rows/0/2", "embed head", "has 1 leaves, 2 logical names are given"),
        (FAMILY, "rows/0", ["x", "(vocab + vocab)", "a a"], "a logical tensor is named twice"),
        (FAMILY, "rows/2/1", "layer hidden", "axis layer is in both the name and in the pattern"),
        (FAMILY, "rows/3/3", "bais", 'unknown word "bais"'),
        (FAMILY, "rows/3/3", "first last", "first and last: one word says the stage"),
        (FAMILY, "rows/3/3", "cut=heads", "cut=heads, but the row's axes are group, head_dim, kv, layer"),
        (FAMILY, "rows/3/3", "cut=", "cut=, but the row's axes are"),
        (FAMILY, "axes/heads", 5, "axes.heads is 5, expected str"),
        (FAMILY, "axes/heads", "kv heads", "compound axis heads contains itself"),
        (FAMILY, "sizes/hiden", "hidden_size", "sizes names the axis hiden, which no row has"),
        (FAMILY, "sizes/hidden", 8, "sizes.hidden is 8, expected str"),
        (FAMILY, "tied/head", "embedding", "tied names the logical tensor embedding, which no row has"),
        (FAMILY, "tied", "embedding", "tied is 'embedding', expected object"),
        (FAMILY, "cut", {"tp": ["kv"]}, '"mine" is the table of a format, not of a family: it has "cut"'),
        (FAMILY, "optional/biass?", "attention_bias", "optional names the tag biass?, which no row has"),
        (FAMILY, "optional/bias?", True, "optional.bias? is True, expected str"),
        (FAMILY, "extra", {"mtp": "n"}, "extra layers of kind mtp, which no set of one_of has"),
        (FAMILY, "one_of", ["dense", "moe"], "one_of[0] is 'dense', expected array"),
        (FAMILY, "prefix", 5, "prefix is 5, expected str | array"),
        (FAMILY, "aside", ["x.{"], "a brace that is no placeholder"),
        (FAMILY, "like", 5, "like is 5, expected str"),
        (FAMILY, "like", "mine", 'like = "mine" leads nowhere'),
        (FAMILY, "like", "nobody", 'no table "nobody"'),
        (FORMAT, "tied", "embedding", "tied names the logical tensor embedding, which no row has"),
        (FORMAT, "tied", {"head": "embed"}, "tied is {'head': 'embed'}, expected str"),
        (FORMAT, "sizes", {"kv": "kv"}, '"mine" is the table of a family, not of a format: it has "sizes"'),
        (FORMAT, "cut/tpp", ["kv"], "tpp is not a mesh axis; those are tp, ep, pp"),
        (FORMAT, "cut/tp/0", "kvs", "cut names the axis kvs, which no row has"),
        (FORMAT, "cut/tp", "kv", "cut.tp is 'kv', expected array"),
        (FORMAT, "weighted", ["dp"], "dp is not a mesh axis"),
        (FORMAT, "pad/vocab", "tpp", 'pad vocab = "tpp" is not a product'),
        (FORMAT, "pad/vocab", "0", 'pad vocab = "0" is not a product'),
        (FORMAT, "pad/vocab", "64*", 'pad vocab = "64*" is not a product'),
        (FORMAT, "pad/vocab", "²", 'pad vocab = "²" is not a product'),
        (FORMAT, "pad/vocabulary", "64", "pad names the axis vocabulary, which no row has"),
        (FORMAT, "replicate/0", "kw", "replicate names the axis kw, which no row has"),
        (FORMAT, "uneven/0", "layers", "uneven names the axis layers, which no row has"),
        (FORMAT, "constants/0/3", "attn.p", "goes with attn.p, which no row has"),
        (FORMAT, "constants/0/1", "I7", "is not [name, F32 or F64, value, logical tensor]"),
        (FORMAT, "constants/0/2", "1.0", "is not [name, F32 or F64, value, logical tensor]"),
        (FORMAT, "constants/0/2", True, "is not [name, F32 or F64, value, logical tensor]"),
        (FORMAT, "constants/0", ["x"], "is not [name, F32 or F64, value, logical tensor]"),
        (FORMAT, "files/shard", "model.safetensors", "does not name a file for every rank"),
        (FORMAT, "files/shard", "../{rank}", "does not name a file for every rank"),
        (FORMAT, "files/shard", "/{rank}", "does not name a file for every rank"),
        (FORMAT, "files/shard", "{nobody}", "does not name a file for every rank"),
        (FORMAT, "files/shard", "{rank.real.__class__}", "does not name a file for every rank"),
        (FORMAT, "files/shard", "{", "does not name a file for every rank"),
        (FORMAT, "files/staged", "pp-{pp}", "does not name a file for every rank"),
        (FORMAT, "files/other", "{rank}", "does not name a file for every rank"),
        (FORMAT, "engine", {"name": "Mine"}, "wants a name and a list of versions"),
        (FORMAT, "engine", {"name": "Mine", "versions": []}, "wants a name and a list of versions"),
        (FORMAT, "family", {"llama": []}, "family.llama is [], expected object"),
    ],
)
def test_a_damaged_table_is_refused_and_told_what_is_wrong(
    data: dict[str, Any], path: str, value: Any, words: str
) -> None:
    with pytest.raises(ReshardError, match=re.escape(words)):
        read(damaged(data, path, value), "families" if data is FAMILY else "formats")


def test_a_table_that_is_no_toml_is_refused() -> None:
    with pytest.raises(ReshardError, match=r"mine\.toml: not TOML"):
        families.parse("rows = [", "mine.toml")


STRANGE = [
    5,
    1.5,
    True,
    "x",
    "",
    [],
    [5],
    ["x"],
    [["x"]],
    [[]],
    {},
    {"a": 1},
    {"a": "b"},
    {"a": ["b"]},
    {"a": {}},
    [{"a": 1}],
]
STRANGE += ["²", "kv group", "x?"]
USED = [("families", "falcon"), ("families", "deepseek_v3"), ("formats", "vllm"), ("formats", "native")]


@pytest.mark.parametrize(("kind", "name"), USED)
def test_no_value_of_any_key_makes_a_table_fail_otherwise_than_by_refusing(kind: str, name: str) -> None:
    """Tables in a manifest come from strangers. Those that are still read must also be usable,
    or be refused when used.
    """
    data = shipped(kind, name)
    places = [key for key in sorted(keys.FAMILY | keys.FORMAT) if key != "rows"]
    places += [f"{key}/{one}" for key, value in data.items() if isinstance(value, dict) for one in list(value)[:3]]
    places += [f"rows/{at}" for at in (0, len(data["rows"]) - 1)] + [f"rows/1/{at}" for at in range(4)]
    refused = 0
    for path in places:
        for value in STRANGE:
            try:
                changed = damaged(data, path, value)
            except IndexError:
                continue
            try:
                use(read(changed, kind), kind, name)
            except ReshardError as error:
                assert error.message
                refused += 1
    assert refused > len(places) * len(STRANGE) / 2


def use(table: Any, kind: str, name: str) -> None:
    if kind == "formats":
        lay_out(table.for_family("llama"), model_of("llama"), Mesh(tp=4, pp=2))
    else:
        config, stored = headers("falcon_rw" if name == "falcon" else name)
        model = understand(table, Config(config), stored)
        lay_out(table.published, model, Mesh(), model.active)
        lay_out(formats.load("native"), model, Mesh(tp=2))


# like


def test_like_adds_rows_and_keys_and_replaces_rows_of_one_name() -> None:
    child = {
        "name": "child",
        "like": "llama",
        "rows": [["model.norm.weight", "hidden", "norm", "last"], ["model.extra", "hidden", "extra"]],
        "sizes": {"hidden": "width"},
        "aside": ["model.mask"],
    }
    parent, table = families.load("llama"), read(child)
    names = [row.name.text for row in table.rows]
    assert names == [*(row.name.text for row in parent.rows), "model.extra"]
    assert next(row for row in table.rows if row.name.text == "model.norm.weight").stage == "last"
    assert table.sizes == parent.sizes | {"hidden": "width"}
    assert [one.text for one in table.aside] == [*(one.text for one in parent.aside), "model.mask"]
    assert table.tied == parent.tied and table.name == "child"
    assert set(table.texts) == {"child", "llama"}


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_what_is_like_llama_has_its_rows(name: str) -> None:
    table = families.load(name)
    assert {tag for row in table.rows for tag in row.tags} == {"qkv_bias?", "o_bias?", "mlp_bias?"}
    assert len(table.rows) == len(families.load("llama").rows) + (2 if name == "qwen3" else 0)


def test_a_user_brings_a_table_like_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('name = "my"\nlike = "llama"\n')
    assert families.load_file(path).rows == families.load("llama").rows
    with pytest.raises(ReshardError, match=r"gone\.toml: no such file"):
        families.load_file(tmp_path / "gone.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ReshardError, match=r"my\.toml: cannot be read as a table"):
        families.load_file(path)


@pytest.mark.parametrize("name", ["nobody", "../formats/native", "llama.toml", "", "."])
def test_a_table_that_is_not_shipped_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ReshardError, match=r"no family table") as caught:
        families.load(name)
    assert "there are" in (caught.value.hint or "")


# Families and formats


@pytest.mark.parametrize(
    ("model_type", "architectures", "family"),
    [
        ("llama", (), "llama"),
        ("RefinedWeb", (), "falcon"),
        (None, ("FalconForCausalLM",), "falcon"),
        ("custom", ("LlamaForCausalLM",), "llama"),
        ("custom", (), None),
        (None, (), None),
    ],
)
def test_a_family_is_found_by_model_type_or_architecture(
    model_type: str | None, architectures: tuple[str, ...], family: str | None
) -> None:
    found = families.family_of(model_type, architectures)
    assert (found.name if found else None) == family


def test_rows_of_a_family_come_before_the_common_ones() -> None:
    common = formats.load("vllm")
    mixtral, llama = common.for_family("mixtral"), common.for_family("llama")
    assert set(llama.rows) <= set(common.rows)
    shared = [row for row in mixtral.rows if row in common.rows]
    assert shared and list(mixtral.rows[-len(shared) :]) == shared
    first = next(row for row in mixtral.rows if row.leaves == ("moe.router",))
    assert first.name.text == "model.layers.{layer}.block_sparse_moe.gate.weight"


def test_a_format_that_names_its_families_refuses_others_by_name() -> None:
    with pytest.raises(ReshardError, match=r'"vllm" has no names for family "mpt"; it has them for [0-9]+ others'):
        formats.load("vllm").for_family("mpt")


def test_compounds_of_the_family_are_written_out_in_the_format_too() -> None:
    """Two layouts meet at the atoms of both; an axis of the same name that the format has itself stays as it is."""
    native, llama = formats.load("native"), families.load("llama")
    refined = native.refined(llama.axes)
    row = next(row for row in refined.rows if row.name.text.endswith(".attn.qkv"))
    assert row.pattern.axes[0] == ("kv", "group", "head_dim", "hidden")
    assert native.refined(families.load("deepseek_v3").axes) is native
    assert refined.refined(llama.axes) is refined
