"""Every damage is refused, by ReshardError and before anything is written: to tensors, to config.json, to a table, to a
shard directory.

Headers are all that understanding needs, so thousands of damages take seconds. What is accepted all the same stands
here, with the reason.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures import FIXTURES, checkpoint, copy, zoo
from strategies import Headers, Stored, headers, invented, model_of, table_of, unused_rows

from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.cut import lay_out
from reshard.layout.join import plan
from reshard.layout.mesh import Mesh
from reshard.model.quantized import quantized
from reshard.model.understand import Config, Model, understand
from reshard.store.destination import LocalDestination
from reshard.tables import families, formats
from reshard.tables.families import Family
from reshard.tables.notation import fold, parse_template
from reshard.tables.row import Row
from reshard.tables.shipped import HOME

each_fixture = pytest.mark.parametrize("name", FIXTURES)
Damages = Iterator[tuple[str, Headers]]

# A stored twin of a tied tensor is another name for what is still there: its loss cannot be told from a checkpoint
# without it.
TWINS = {
    "qwen3_tied_stored": {"lm_head.weight", "model.embed_tokens.weight"},
    "falcon_40b": {"lm_head.weight", "transformer.word_embeddings.weight"},
}


def fits(name: str, stored: Headers, config: dict[str, Any] | None = None, table: Family | None = None) -> bool:
    """Whether `reshard` would convert this: understood, laid out in its own format, and joined. Any error but
    ReshardError is a failure.
    """
    try:
        model = understand(table or table_of(name), Config(config or headers(name)[0]), stored, name)
        source = lay_out(model.family.published, model, Mesh(), model.active)
        plan(source, lay_out(formats.load("native"), model, Mesh()))
    except ReshardError as error:
        assert error.message
        return False
    return True


def weights(name: str) -> Headers:
    """The stored tensors that mean something: losing a buffer that an engine recomputes is no damage."""
    aside = model_of(name).aside
    return {key: stored for key, stored in headers(name)[1].items() if key not in aside}


def without(name: str, lost: set[str]) -> Headers:
    return {key: stored for key, stored in headers(name)[1].items() if key not in lost}


def folded(name: str) -> dict[str, set[str]]:
    """Stored names by their folded form."""
    kinds: dict[str, set[str]] = {}
    for key in weights(name):
        kinds.setdefault(fold(key)[0], set()).add(key)
    return kinds


def one_each(name: str) -> Headers:
    """One tensor of each kind, from a layer in the middle."""
    return {key: headers(name)[1][key] for keys in folded(name).values() for key in [sorted(keys)[len(keys) // 2]]}


def accepted(name: str, damages: Damages) -> list[str]:
    found = [what for what, stored in damages if fits(name, stored)]
    return sorted(found)


# Tensors


@each_fixture
def test_the_fixture_itself_is_accepted(name: str) -> None:
    assert fits(name, headers(name)[1])


@each_fixture
def test_the_loss_of_any_tensor_is_refused(name: str) -> None:
    assert accepted(name, ((key, without(name, {key})) for key in weights(name))) == sorted(TWINS.get(name, ()))


@each_fixture
def test_the_loss_of_a_tensor_in_every_layer_is_refused(name: str) -> None:
    assert accepted(name, ((kind, without(name, keys)) for kind, keys in folded(name).items())) == sorted(
        TWINS.get(name, ())
    )


@each_fixture
def test_the_loss_of_both_twins_is_refused(name: str) -> None:
    assert accepted(name, [("both", without(name, TWINS[name]))] if name in TWINS else iter(())) == []


@each_fixture
def test_an_additional_tensor_is_refused(name: str) -> None:
    stored = headers(name)[1]
    layers = FIXTURES[name].layers + FIXTURES[name].mtp

    def damages() -> Damages:
        for key, tensor in one_each(name).items():
            yield f"{key}.x", stored | {f"{key}.x": tensor}
            yield f"x.{key}", stored | {f"x.{key}": tensor}
            kind, numbers = fold(key)
            for at, most in enumerate((layers, FIXTURES[name].experts)[: len(numbers)]):
                beyond = kind
                for other, number in enumerate(numbers):
                    beyond = beyond.replace("{}", str(most if other == at else number), 1)
                yield beyond, stored | {beyond: tensor}
            if kind != key:  # `layers.03` is no other spelling of `layers.3`
                padded = re.sub(r"\.(\d+)\.", r".0\1.", key, count=1)
                yield padded, stored | {padded: tensor}

    assert accepted(name, damages()) == []


@each_fixture
def test_a_dimension_that_is_one_larger_or_smaller_is_refused(name: str) -> None:
    stored = headers(name)[1]

    def damages() -> Damages:
        for key, (dtype, shape) in weights(name).items():
            for at, by in itertools.product(range(len(shape)), (1, -1)):
                yield f"{key} {at} {by}", stored | {key: Stored(dtype, (*shape[:at], shape[at] + by, *shape[at + 1 :]))}

    assert accepted(name, damages()) == []


@each_fixture
def test_a_dimension_that_is_larger_in_every_layer_is_refused(name: str) -> None:
    stored = headers(name)[1]

    def damages() -> Damages:
        for kind, keys in folded(name).items():
            for at in range(len(stored[min(keys)].shape)):
                grown = {
                    key: (*stored[key].shape[:at], stored[key].shape[at] + 1, *stored[key].shape[at + 1 :])
                    for key in keys
                }
                yield f"{kind} {at}", stored | {key: Stored(stored[key].dtype, shape) for key, shape in grown.items()}

    assert accepted(name, damages()) == []


@each_fixture
def test_another_number_of_dimensions_is_refused(name: str) -> None:
    stored = headers(name)[1]

    def damages() -> Damages:
        for key, (dtype, shape) in one_each(name).items():
            for other in ((*shape, 1), (1, *shape), shape[1:], (), (0,) * len(shape), (0,), (1 << 62, 1 << 62)):
                yield f"{key} {other}", stored | {key: Stored(dtype, other)}

    assert accepted(name, damages()) == []


@each_fixture
def test_a_transposed_matrix_is_refused(name: str) -> None:
    stored = headers(name)[1]
    turned = (
        (key, stored | {key: Stored(dtype, shape[::-1])})
        for key, (dtype, shape) in one_each(name).items()
        if shape != shape[::-1]
    )
    assert accepted(name, turned) == []


# Of these the native format fuses several into one tensor, which has one dtype.
FUSED = re.compile(
    r".*\.(([qkv]|q_a|kv_a)_proj(_with_mqa)?|mlp\.(shared_experts\.)?(gate|up)_proj|experts\.\d+\.\w+(_proj)?)\.(weight|bias|weight_scale_inv)"
)


@each_fixture
def test_a_dtype_of_its_own_inside_a_fused_group_is_refused(name: str) -> None:
    """A whole stored tensor of another dtype is nobody's damage: published checkpoints mix them (routers, norms)."""
    stored = headers(name)[1]
    fused = {key for key in weights(name) if FUSED.fullmatch(key)}
    if name == "deepseek_v3_whole":
        # alone where q has no low rank
        fused -= {key for key in fused if re.search(r"\.(kv_a_proj_with_mqa|q_proj)\.", key)}
    assert fused or FIXTURES[name].family in ("phi3", "gpt2", "gpt_neox", "falcon", "gpt_oss")
    assert accepted(name, ((key, stored | {key: Stored("F64", stored[key].shape)}) for key in fused)) == []


@each_fixture
def test_the_loss_of_a_layer_is_refused(name: str) -> None:
    """But for the multi-token prediction: transformers itself drops that layer on writing, and leaves the key in
    config.json.
    """
    fixture = FIXTURES[name]

    def damages() -> Damages:
        for layer in range(fixture.layers + fixture.mtp):
            yield (
                f"layer {layer}",
                without(name, {key for key in headers(name)[1] if re.search(rf"(^|\.)(layers|h)\.{layer}\.", key)}),
            )

    assert accepted(name, damages()) == ([f"layer {fixture.layers}"] if fixture.mtp else [])


@each_fixture
def test_the_loss_of_an_expert_is_refused(name: str) -> None:
    """In one layer, and in all of them."""
    keys = [key for key in weights(name) if ".experts." in key and len(fold(key)[1]) == 2]

    def damages() -> Damages:
        for layer, expert in sorted({fold(key)[1] for key in keys}):
            yield f"{layer} {expert}", without(name, {key for key in keys if fold(key)[1] == (layer, expert)})
            yield f"all {expert}", without(name, {key for key in keys if fold(key)[1][1] == expert})

    assert bool(keys) == (FIXTURES[name].experts > 0 and FIXTURES[name].family != "gpt_oss")
    assert accepted(name, damages()) == []


def rows_in_use(name: str) -> list[Row]:
    return [model_of(name).family.rows[at] for at in model_of(name).active]


def stored_names(name: str, rows: list[Row]) -> set[str]:
    kinds = {row.name.folded for row in rows}
    return {key for key in weights(name) if fold(key)[0] in kinds or key in kinds}


@each_fixture
def test_the_loss_of_an_optional_set_or_of_a_kind_is_refused(name: str) -> None:
    """Each is bound to a key of config.json, or leaves layers without a kind."""
    rows = rows_in_use(name)
    sets = {
        word: [row for row in rows if word in row.tags | row.kinds] for row in rows for word in row.tags | row.kinds
    }
    assert accepted(name, ((word, without(name, stored_names(name, mine))) for word, mine in sets.items())) == []


def test_every_tag_of_every_family_is_bound_to_a_key() -> None:
    """An unbound tag could not notice that its whole set was lost."""
    for family in families.shipped():
        table = families.load(family)
        unbound = {"own?"} if family == "glm_moe_dsa" else set()  # published with and without, and no key says which
        assert {tag for row in table.rows for tag in row.tags} - unbound == table.optional.keys(), family


# config.json

SIZES = re.compile(
    r"num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|hidden_size|(moe_)?intermediate_size|vocab_size|num_(local_)?experts"
    r"|n_(layer|head|embd|inner|positions)|ffn_hidden_size|num_kv_heads|n_(routed|shared)_experts|(q|kv)_lora_rank|qk_(nope|rope)_head_dim"
    r"|v_head_dim|num_nextn_predict_layers"
)

# Keys that do not say what they seem to, or that nothing stored depends on.
MEANINGLESS = {
    "falcon_7b num_kv_heads": "ignored where there is one key-value head for all: falcon-7b says 71",
    "falcon_40b num_kv_heads": "the key is only meant in this generation; shapes decide in all",
    "falcon_rw num_kv_heads": "the same",
    "deepseek_v3 head_dim": "the rotary part, as transformers writes it; heads have v_head_dim",
    "deepseek_v3 num_key_value_heads": "latent attention has none",
}


@each_fixture
def test_a_size_in_config_that_contradicts_the_shapes_is_refused(name: str) -> None:
    config, stored = headers(name)
    keys = [key for key, value in config.items() if SIZES.fullmatch(key) and isinstance(value, int)]
    assert len(keys) >= 4
    found = {f"{key} {by:+}" for key in keys for by in (1, -1) if fits(name, stored, config | {key: config[key] + by})}
    aside = {key.split()[1] for key in MEANINGLESS if name.startswith(key.split()[0])}
    if FIXTURES[name].family == "gpt2":
        found -= {"n_head -1"}  # 56 is 8 × 7 as well as 7 × 8, and nothing stored tells which
    if name == "deepseek_v3_whole":
        found -= {"num_nextn_predict_layers +1"}  # promised by many a config.json, and not stored
    assert found == {f"{key} {by}" for key in aside & set(keys) for by in ("+1", "-1")}


@each_fixture
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [], {}, ["x"], 10**12, 10**30, float("nan")], ids=repr)
def test_a_size_that_is_none_is_refused_and_costs_nothing(name: str, value: Any) -> None:
    """Config comes from strangers: no number in it may make a list as long as it says."""
    config, stored = headers(name)
    keys = [
        key for expression in table_of(name).sizes.values() for key in re.findall(r"\w+", expression) if key in config
    ]
    # zero says, as null does, that there is no low rank: then q_a is unexpected anyway
    known = {"q_lora_rank"} if value == 0 else set()
    found = [
        key
        for key in keys
        if key not in known and config[key] is not None and fits(name, stored, config | {key: value})
    ]
    assert found == []
    if "num_nextn_predict_layers" in config:
        fits(name, stored, config | {"num_nextn_predict_layers": value})


@each_fixture
def test_a_key_that_is_missing_or_null_is_either_solved_from_the_shapes_or_refused(name: str) -> None:
    config, stored = headers(name)
    model = model_of(name)
    for key in {
        key for expression in table_of(name).sizes.values() for key in re.findall(r"\w+", expression) if key in config
    }:
        for changed in ({k: v for k, v in config.items() if k != key}, config | {key: None}):
            try:
                other = understand(table_of(name), Config(changed), stored, name)
            except ReshardError:
                continue
            used = {axis for tensor in model.tensors.values() for axis in tensor.axes}
            assert {axis: other.sizes[axis] for axis in used if "/" not in axis} == {
                a: model.sizes[a] for a in used if "/" not in a
            }, key


def test_a_layer_of_multi_token_prediction_is_no_layer_of_the_model() -> None:
    config, stored = headers("deepseek_v3")
    with pytest.raises(ReshardError, match=r"layer 4 is of kind mtp, yet config\.json counts it among its 5 layers"):
        understand(table_of("deepseek_v3"), Config(config | {"num_hidden_layers": 5}), stored)


def test_what_stands_beside_the_layers_of_a_kind_is_there_with_them_and_only_then() -> None:
    config, stored = headers("exaone_moe")
    table = families.load("exaone_moe")
    assert fits("exaone_moe", stored, table=table)
    assert fits(
        "exaone_moe", {name: entry for name, entry in stored.items() if not name.startswith("mtp.")}, table=table
    )
    for lost, said in (("mtp.fc.", "missing mtp.fc.weight"), ("mtp.layers.", "unexpected mtp.fc.weight")):
        with pytest.raises(ReshardError, match=said):
            understand(
                table, Config(config), {name: entry for name, entry in stored.items() if not name.startswith(lost)}
            )


def test_a_layer_number_out_of_all_proportion_is_refused() -> None:
    config, stored = headers("llama")
    far = {"model.layers.999999999.input_layernorm.weight": stored["model.layers.0.input_layernorm.weight"]}
    with pytest.raises(ReshardError, match=r"1000000000 layers, the files hold \d+ tensors"):
        understand(
            table_of("llama"), Config({k: v for k, v in config.items() if k != "num_hidden_layers"}), stored | far
        )


# Tables


# One fixture of each table suffices here; those of a large table are sampled.
each_table = pytest.mark.parametrize(
    "name", [name for name in FIXTURES if not re.fullmatch(r"\w+_(tied|inv_freq|bin|tied_stored|step|bare|old)", name)]
)


def laid_of(name: str) -> Family:
    """The table of a fixture, with the rows of the scheme by which it is quantised."""
    config, stored = headers(name)
    return quantized(table_of(name), Config(config), stored, name)


def pairs(name: str) -> Iterator[tuple[int, int]]:
    active = list(model_of(name).active)
    return (
        pair for n, pair in enumerate(itertools.permutations(active, 2)) if n % max(1, len(active) ** 2 // 150) == 0
    )


@each_fixture
def test_a_table_that_lacks_a_row_or_has_one_too_many_is_refused(name: str) -> None:
    stored, table = headers(name)[1], laid_of(name)
    found = []
    for at in model_of(name).active:
        row = table.rows[at]
        twin = row._replace(name=parse_template(row.name.text + ".twin"))
        for what, rows in (
            ("lost", table.rows[:at] + table.rows[at + 1 :]),
            ("twin", (*table.rows, twin)),
            ("first", (twin, *table.rows)),
        ):
            if fits(name, stored, table=replace(table, rows=rows)):
                found.append(f"{row.name.text} {what}")
    assert found == []


@pytest.mark.parametrize("family", sorted({fixture.family for fixture in FIXTURES.values()}))
def test_every_row_of_a_family_is_in_use_in_some_fixture(family: str) -> None:
    """Else the tests say nothing about it. Rows taken over by `like` are tested where they were written."""
    table = families.load(family)
    models = [model_of(name) for name, fixture in FIXTURES.items() if fixture.family == family]
    more = [open_source(checkpoint(name)).layout.model for name, fixture in zoo().items() if fixture.family == family]
    like = {row.name.text for parent in table.texts if parent != family for row in families.load(parent).rows}
    unused = unused_rows(table, [*models, *more]) - like
    # A tied model may store its head.
    known = {"gpt2": {"lm_head.weight"}, "gemma2": {"lm_head.weight"}}
    assert unused == known.get(family, set())


@pytest.mark.parametrize("family", families.shipped())
def test_a_doubled_row_is_refused_when_the_table_is_read(family: str) -> None:
    text = (HOME / "families" / f"{family}.toml").read_text()
    lines = text.splitlines()
    rows = [at for at, line in enumerate(lines) if re.match(r'\s*\["', line)]
    for at in rows:
        doubled = "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])
        with pytest.raises(ReshardError, match="has two rows"):
            families.parse(doubled, family, lambda name: (HOME / "families" / f"{name}.toml").read_text())
    assert rows or "\nlike = " in text


@each_table
def test_a_row_with_the_pattern_of_another_is_refused_where_the_shapes_differ(name: str) -> None:
    """Two patterns that are the same arithmetic cannot be told apart by shapes, only by numbers:
    tests/test_reference.py does.
    """
    stored, table = headers(name)[1], laid_of(name)
    found = []
    for at, other in pairs(name):
        row, like = table.rows[at], table.rows[other]
        if len(row.leaves) != len(like.leaves) or row.pattern == like.pattern:
            continue
        rows = tuple(r._replace(pattern=like.pattern) if n == at else r for n, r in enumerate(table.rows))
        if fits(name, stored, table=replace(table, rows=rows)):
            found.append(f"{row.name.text} as {like.name.text}")
    assert found == []


@each_table
def test_logical_names_exchanged_between_rows_of_different_axes_are_refused(name: str) -> None:
    """By name and with both lists of axes: a user's own table is checked against the shared vocabulary of the
    formats.
    """
    stored, table = headers(name)[1], laid_of(name)
    found = []
    for at, other in pairs(name):
        row, like = table.rows[at], table.rows[other]
        if len(row.leaves) != len(like.leaves) or axes(row) == axes(like):
            continue
        rows = list(table.rows)
        rows[at], rows[other] = row._replace(leaves=like.leaves), like._replace(leaves=row.leaves)
        if fits(name, stored, table=replace(table, rows=tuple(rows))):
            found.append(f"{row.name.text} and {like.name.text}")
    assert found == []


def axes(row: Row) -> list[list[str]]:
    return [sorted((*row.name.axes, *path)) for path in row.pattern.axes]


def test_a_table_whose_logical_tensor_has_other_axes_than_the_format_is_told_both() -> None:
    config, stored = headers("llama")
    text = (HOME / "families" / "llama.toml").read_text()
    table = families.parse(
        text.replace('"attn_norm"]', '"attn.o"]').replace('"attn.o"],\n', '"attn_norm"],\n', 1), "mine"
    )
    model = understand(table, Config(config), stored)
    with pytest.raises(
        ReshardError,
        match=r"stores attn\.o by .*layer, hidden, heads|stores attn\.o by \(layer, hidden, kv, group, head_dim\)",
    ):
        lay_out(formats.load("native"), model, Mesh())


# Shard directories


def shards(folder: Path, name: str = "llama") -> Path:
    options = Options(workers=1)
    convert(
        prepare(open_source(checkpoint(name)), "native", Mesh(tp=2, pp=2), options), LocalDestination(folder), options
    )
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("shards") / "out")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other numbers: every size, name and header is the same."""
    model = copy("llama", tmp_path_factory.mktemp("other") / "model")
    for path in model.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
    folder = tmp_path_factory.mktemp("other") / "out"
    convert(
        prepare(open_source(model), "native", Mesh(tp=2, pp=2), Options(workers=1)),
        LocalDestination(folder),
        Options(workers=1),
    )
    return folder


def members(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(damaged: Path, tmp_path: Path, to: str = "hf") -> ReshardError:
    """Converting is refused before anything is written: neither OUT nor a work directory is there afterwards."""
    out = tmp_path / "out"
    with pytest.raises(ReshardError) as caught:
        convert(
            prepare(open_source(damaged), to, Mesh() if to == "hf" else Mesh(tp=4), Options(workers=1)),
            LocalDestination(out),
            Options(workers=1),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [damaged.name]
    return caught.value


LISTED = [
    *(f"rank-{rank:05}/{file}" for rank in range(4) for file in ("model.safetensors", "tensors.json")),
    "config.json",
    "generation_config.json",
    "source/files.json",
    "source/families/llama.toml",
    "source/formats/native.toml",
    "source/model.safetensors.index.json.residue",
    "source/model-00001-of-00007.safetensors.residue",
    "source/model-00007-of-00007.safetensors.residue",
]


def test_the_list_of_files_to_damage_is_that_of_a_shard_directory(converted: Path) -> None:
    between = {f"source/model-0000{n}-of-00007.safetensors.residue" for n in range(2, 7)}
    assert set(members(converted)) == {*LISTED, *between, "manifest.json"}


@pytest.mark.parametrize("file", LISTED)
@pytest.mark.parametrize("damage", ["lost", "empty", "truncated", "longer"])
def test_a_lost_truncated_or_longer_file_of_a_shard_directory_is_refused_by_name(
    converted: Path, tmp_path: Path, file: str, damage: str
) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    path = damaged / file
    data = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": data[:-1], "longer": data + b"\0"}[damage])
    for to in ("hf", "native"):
        assert path.name in str(refused(damaged, tmp_path, to))


@pytest.mark.parametrize("file", [file for file in LISTED if not file.endswith((".safetensors", ".residue"))])
def test_a_changed_byte_in_what_describes_the_shards_is_refused(converted: Path, tmp_path: Path, file: str) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    data = bytearray((damaged / file).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / file).write_bytes(data)
    assert Path(file).name in str(refused(damaged, tmp_path))


@pytest.mark.parametrize("end", ["model.safetensors", "tensors.json"])
@pytest.mark.parametrize(("one", "two"), [(0, 1), (2, 3), (0, 2), (1, 3)])
def test_files_exchanged_between_ranks_are_refused(
    converted: Path, tmp_path: Path, one: int, two: int, end: str
) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    a, b = (damaged / f"rank-{rank:05}" / end for rank in (one, two))
    a.rename(damaged / "aside")
    b.rename(a)
    (damaged / "aside").rename(b)
    assert end in str(refused(damaged, tmp_path))


def test_residues_exchanged_between_original_files_are_refused(converted: Path, tmp_path: Path) -> None:
    residues = sorted((converted / "source").glob("*.safetensors.residue"))
    pairs = list(itertools.combinations(residues, 2))
    equal = [(a, b) for a, b in pairs if a.stat().st_size == b.stat().st_size]
    assert equal, "no two of one size: this test would only see sizes"
    for number, (a, b) in enumerate(equal + pairs[:3]):
        here = tmp_path / str(number)
        damaged = Path(shutil.copytree(converted, here / "damaged"))
        shutil.copy(a, damaged / "source" / b.name)
        shutil.copy(b, damaged / "source" / a.name)
        refused(damaged, here)


def test_a_rank_of_another_mesh_or_another_model_is_refused(converted: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    convert(
        prepare(open_source(checkpoint("llama")), "native", Mesh(tp=4), Options()),
        LocalDestination(tmp_path / "tp4"),
        Options(),
    )
    shutil.copy(tmp_path / "tp4" / "rank-00001" / "model.safetensors", damaged / "rank-00001")
    shutil.rmtree(tmp_path / "tp4")
    assert "rank-00001/model.safetensors" in str(refused(damaged, tmp_path))


def test_a_tensors_json_of_other_values_is_refused(converted: Path, other: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    for rank in range(4):
        file = f"rank-{rank:05}/tensors.json"
        if (other / file).read_bytes() != (converted / file).read_bytes():
            shutil.copy(other / file, damaged / file)
            assert file in str(refused(damaged, tmp_path))
            return
    raise AssertionError("the two conversions do not differ")


@pytest.mark.parametrize("key", ["tp", "pp"])
def test_a_manifest_of_another_mesh_is_refused(converted: Path, tmp_path: Path, key: str) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    text = json.loads((damaged / "manifest.json").read_text())
    text["mesh"] |= {"tp": 4, "pp": 1} if key == "tp" else {"tp": 1, "pp": 4}
    (damaged / "manifest.json").write_text(json.dumps(text))
    refused(damaged, tmp_path)


def test_a_manifest_without_any_of_its_keys_is_refused(converted: Path, tmp_path: Path) -> None:
    text = json.loads((converted / "manifest.json").read_text())
    for key in text:
        here = tmp_path / key
        damaged = Path(shutil.copytree(converted, here / "damaged"))
        (damaged / "manifest.json").write_text(json.dumps({k: v for k, v in text.items() if k != key}))
        refused(damaged, here)


# Invented checkpoints


def test_an_invented_checkpoint_is_one_that_fits() -> None:
    """What tests/test_laws.py builds on: the same headers as those that transformers writes for these sizes."""
    sizes = {"layer": 5, "kv": 4, "group": 2, "head_dim": 10, "hidden": 56, "inter": 88, "vocab": 331}
    config, stored = invented("llama", sizes)
    assert stored == headers("llama")[1]
    assert isinstance(understand(families.load("llama"), Config(config), stored), Model)
