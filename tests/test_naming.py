"""What one checkpoint spells otherwise than another of its family: names, prefixes, layers beyond the main ones,
towers, other sizes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import reshard
from safetensors.numpy import load_file, save_file
from strategies import Stored

from reshard.errors import ReshardError
from reshard.layout.cut import lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import understand
from reshard.tables import families, formats
from reshard.tables.config import Config

TABLE = """
name = "made"
prefix = ["model.", "text.model.", ""]
towers = ["vision", "text.projector"]
one_of = [["dense", "each", "fused"], ["near", "far"], ["plain", "mtp"]]
extra = { mtp = "extra_layers" }
rows = [
 ["~embed.weight",                                           "vocab hidden",                 "embed"],
 ["~layers.{layer}.q.weight",  "(heads head_dim) hidden",  "attn.q",  "near"],
 ["~layers.{layer}.k.weight",  "(kv head_dim) hidden",  "attn.k",  "near"],
 ["~layers.{layer}.v.weight",  "(kv head_dim) hidden",  "attn.v",  "near"],
 ["~layers.{layer}.o.weight",  "hidden (heads head_dim)",  "attn.o",  "near"],
 ["~layers.{layer}.wide_q.weight",  "(heads@far head_dim@far) hidden", "attn.q@far",  "far"],
 ["~layers.{layer}.wide_k.weight",  "(kv@far head_dim@far) hidden", "attn.k@far",  "far"],
 ["~layers.{layer}.wide_v.weight",  "(kv@far head_dim@far) hidden", "attn.v@far",  "far"],
 ["~layers.{layer}.wide_o.weight",  "hidden (heads@far head_dim@far)", "attn.o@far",  "far"],
 ["~layers.{layer}.up.weight",  "inter hidden",  "mlp.up",  "dense"],
 ["~layers.{layer}.down.weight",  "hidden inter",  "mlp.down",  "dense"],
 ["~layers.{layer}.router.weight | ~layers.{layer}.gate.weight", "routes hidden",  "moe.router",  "each|fused"],
 ["~layers.{layer}.experts.{experts}.gate.weight",  "moe_inter hidden",  "moe.gate",  "each"],
 ["~layers.{layer}.experts.{experts}.up.weight",  "moe_inter hidden",  "moe.up",  "each"],
 ["~layers.{layer}.experts.{experts}.down.weight",  "hidden moe_inter",  "moe.down",  "each"],
 ["~layers.{layer}.experts.gate_up",  "experts (moe_inter + moe_inter) hidden", "moe.gate moe.up", "fused"],
 ["~layers.{layer}.experts.down",  "experts hidden moe_inter | experts moe_inter hidden", "moe.down",  "fused"],
 ["mtp.{layer:extra}.q.weight",  "(heads head_dim) hidden",  "attn.q",  "near mtp"],
 ["mtp.{layer:extra}.k.weight",  "(kv head_dim) hidden",  "attn.k",  "near mtp"],
 ["mtp.{layer:extra}.v.weight",  "(kv head_dim) hidden",  "attn.v",  "near mtp"],
 ["mtp.{layer:extra}.o.weight",  "hidden (heads head_dim)",  "attn.o",  "near mtp"],
 ["mtp.{layer:extra}.up.weight",  "inter hidden",  "mlp.up",  "dense mtp"],
 ["mtp.{layer:extra}.down.weight",  "hidden inter",  "mlp.down",  "dense mtp"],
]
[axes]
heads = "kv group"
[sizes]
layer = "layers"
hidden = "hidden"
kv = "kv"
"kv@far" = "wide_kv"
[model]
cache = ["attn.k", "attn.v", "attn.k@far", "attn.v@far"]
runs = false
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "made.toml"
    path.write_text(TABLE)
    return path


def checkpoint(
    directory: Path,
    prefix: str = "model.",
    router: str = "router",
    fused: bool = True,
    turned: bool = False,
    towers: bool = True,
    **other: Any,
) -> Path:
    """Layer 0 is dense and narrow, 1 has experts and is wide, 2 (beyond) is dense; 4 experts; KV heads 2 and 4,
    of 6 and 10 features.
    """
    draw = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray[Any, Any]:
        return draw.standard_normal(shape).astype(np.float32)

    state = {f"{prefix}embed.weight": noise(33, 20)}
    for start, wide, (kv, group, dim) in (
        (f"{prefix}layers.0.", "", (2, 4, 6)),
        (f"{prefix}layers.1.", "wide_", (4, 2, 10)),
        ("mtp.0.", "", (2, 4, 6)),
    ):
        state |= {
            f"{start}{wide}q.weight": noise(kv * group * dim, 20),
            f"{start}{wide}o.weight": noise(20, kv * group * dim),
        }
        state |= {f"{start}{wide}{name}.weight": noise(kv * dim, 20) for name in "kv"}
        if wide:
            state[f"{start}{router}.weight"] = noise(4, 20)
            gate, up, down = noise(4, 24, 20), noise(4, 24, 20), noise(4, 20, 24)
            if fused:
                state |= {
                    f"{start}experts.gate_up": np.concatenate((gate, up), 1),
                    f"{start}experts.down": down.swapaxes(1, 2).copy() if turned else down,
                }
            else:
                state |= {
                    f"{start}experts.{e}.{name}.weight": all_[e]
                    for name, all_ in (("gate", gate), ("up", up), ("down", down))
                    for e in range(4)
                }
        else:
            state |= {f"{start}up.weight": noise(40, 20), f"{start}down.weight": noise(20, 40)}
    if towers:
        state |= {f"vision.blocks.{n}.qkv.weight": noise(9, 9) for n in range(3)}
        state |= {
            "vision.pos": noise(5),
            "vision.blocks.0.odd": noise(2, 3),
            "text.projector.weight": noise(20, 9),
            "vision.scale": noise(),
        }
    directory.mkdir(parents=True)
    save_file(state | other, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps({"model_type": "made", "layers": 2, "hidden": 20, "kv": 2, "wide_kv": 4, "extra_layers": 1})
    )
    return directory


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"prefix": "text.model.", "router": "gate"},
    {"prefix": "", "fused": False},
    {"towers": False, "turned": True},
]
MESHES = [("--tp", "2"), ("--tp", "8"), ("--tp", "4", "--ep", "2", "--pp", "2"), ("--tp", "1", "--pp", "2")]


@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"prefix": "text.model.", "router": "gate"},
        {"prefix": "", "fused": False},
        {"towers": False, "turned": True},
    ],
)
def test_every_spelling_comes_back_byte_for_byte(
    spelling: dict[str, Any], mesh: tuple[str, ...], table: Path, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", **spelling)
    assert reshard("convert", source, tmp_path / "out", *mesh, "--family", table).code == 0
    assert reshard("verify", tmp_path / "out", "--against", source, "--family", table).code in (0, 1)
    assert reshard("convert", tmp_path / "out", tmp_path / "back", "--to", "hf").code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_spellings_of_one_model_become_the_same_shards(table: Path, tmp_path: Path) -> None:
    """Fused or one by one, with one prefix or another: logical tensors are the same."""
    for name, spelling in {
        "a": {},
        "b": {"prefix": "", "router": "gate", "fused": False},
        "c": {"turned": True},
    }.items():
        checkpoint(tmp_path / name, **spelling)
        assert reshard("convert", tmp_path / name, tmp_path / f"{name}-out", "--tp", "2", "--family", table).code == 0
    one, *others = (load_file(tmp_path / f"{name}-out" / "rank-00001" / "model.safetensors") for name in "abc")
    for other in others:
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_layers_of_other_sizes_are_cut_by_their_own_heads(table: Path, tmp_path: Path) -> None:
    """At TP 4 the two narrow key heads stand twice, the four wide ones once."""
    source = checkpoint(tmp_path / "source")
    assert reshard("convert", source, tmp_path / "out", "--tp", "4", "--family", table).code == 0
    state = load_file(source / "model.safetensors")
    for rank in range(4):
        mine = load_file(tmp_path / "out" / f"rank-{rank:05}" / "model.safetensors")
        narrow, wide = (
            state["model.layers.0.k.weight"].reshape(2, 6, 20),
            state["model.layers.1.wide_k.weight"].reshape(4, 10, 20),
        )
        assert np.array_equal(mine["layers.0.attn.qkv"][12:18], narrow[rank // 2])
        assert np.array_equal(mine["layers.1.attn.qkv"][20:30], wide[rank])
        assert np.array_equal(mine["layers.2.attn.qkv"][12:18], state["mtp.0.k.weight"].reshape(2, 6, 20)[rank // 2])


def test_towers_stand_whole_on_every_rank_of_the_first_stage_and_on_no_other(table: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--pp", "2", "--family", table)
    assert done.code == 0
    state = load_file(source / "model.safetensors")
    names = {name for name in state if name.startswith(("vision", "text.projector"))}
    assert len(names) == 7
    for rank in range(4):
        mine = load_file(tmp_path / "out" / f"rank-{rank:05}" / "model.safetensors")
        assert names & mine.keys() == (names if rank < 2 else set())
        assert all(np.array_equal(mine[name], state[name]) for name in names & mine.keys())
    told = reshard("plan", source, "--tp", "2", "--family", table)
    assert told.code == 0 and "other components" in told.out and "vision" in told.out, told.out


def test_what_lies_in_no_tower_is_still_refused(table: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **{"visionary.weight": np.ones((2, 2), np.float32)})
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--family", table)
    assert done.code == 2 and "no row claims visionary.weight" in done.err


def test_a_format_without_towers_refuses_them(table: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--to", "vllm", "--family", table)
    assert done.code == 2, done.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('["x.{layer} | y.{experts}", "hidden", "norm"]', "other placeholders"),
        ('["x | x", "hidden", "norm"]', "two rows"),
        ('["x.{experts:extra}", "hidden", "norm"]', "cannot be extra"),
        ('["x.{layer}", "hidden", "norm", "a|c"]', 'unknown word "a|c"'),
        ('["x.{layer}", "hidden@", "norm"]', "unexpected character '@'"),
    ],
)
def test_a_spelling_that_means_nothing_is_refused(row: str, message: str) -> None:
    with pytest.raises(ReshardError, match=message.replace("|", r"\|")):
        families.parse(f'name = "x"\none_of = [["a", "b"]]\nrows = [{row}]', "x")


RULED = """
name = "ruled"
one_of = [["near", "far"], ["own", "borrowed"]]
layers = { near = "layer_types", borrowed = "last borrowing" }
aside = ["layers.{layer}.k.weight"]
rows = [
 ["layers.{layer}.q.weight", "(heads head_dim) hidden",         "attn.q",     "near"],
 ["layers.{layer}.q.weight", "(heads head_dim@far) hidden",     "attn.q@far", "far"],
 ["layers.{layer}.k.weight", "(kv head_dim) hidden",            "attn.k",     "near own"],
 ["layers.{layer}.k.weight", "(kv@far head_dim@far) hidden",    "attn.k@far", "far own"],
 ["layers.{layer}.v.weight", "(kv head_dim) hidden",            "attn.v",     "near own"],
]
[sizes]
layer = "layers"
heads = "heads"
"""


def test_config_json_may_say_which_of_two_rows_of_one_name_a_layer_has() -> None:
    """What is read together in one layer stands alone in another; what a layer does not use is laid aside."""
    table = families.parse(RULED, "ruled.toml")
    shapes = {
        "layers.0.q": (8, 5),
        "layers.0.k": (4, 5),
        "layers.0.v": (4, 5),
        "layers.1.q": (12, 5),
        "layers.1.k": (3, 5),
    }
    shapes |= {"layers.2.q": (8, 5), "layers.2.k": (4, 5)}
    stored = {f"{name}.weight": Stored("BF16", shape) for name, shape in shapes.items()}
    config = {
        "heads": 4,
        "layers": 3,
        "borrowing": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    model = understand(table, Config(config), stored)
    assert {name: (tensor.layers, tensor.sizes[1:-1]) for name, tensor in model.tensors.items()} == {
        "attn.q": ((0, 2), (4, 2)),
        "attn.q@far": ((1,), (4, 3)),
        "attn.k": ((0,), (2, 2)),
        "attn.v": ((0,), (2, 2)),
        "attn.k@far": ((1,), (1, 3)),
    }
    assert model.aside == ("layers.2.k.weight",)
    layout = lay_out(formats.load("native"), model, Mesh(tp=2))
    shapes = {slot.name(point): slot.shape for slot in layout.by_rank[1] for point in slot.points()}
    assert shapes == {"layers.0.attn.qkv": (8, 5), "layers.1.attn.qk": (9, 5), "layers.2.attn.q": (4, 5)}
    with pytest.raises(ReshardError, match=r"no row claims layers\.\{\}\.v\.weight.*layers\.1\.v"):
        understand(table, Config(config), stored | {"layers.1.v.weight": Stored("BF16", (3, 5))})
    with pytest.raises(ReshardError, match=r"missing layers\.\{layer\}\.k\.weight"):
        understand(
            table,
            Config(config | {"borrowing": 0}),
            {name: each for name, each in stored.items() if name != "layers.2.k.weight"},
        )


TOLD = """
name = "told"
one_of = [["attends", "feeds"]]
rows = [
 ["layers.{layer}.norm", "hidden",                  "attn_norm", "attends"],
 ["layers.{layer}.norm", "hidden",                  "mlp_norm",  "feeds"],
 ["layers.{layer}.q",    "(heads head_dim) hidden", "attn.q",    "attends"],
 ["layers.{layer}.up",   "inter hidden",            "mlp.up",    "feeds"],
]
[sizes]
heads = "heads"
layer = "layers | count kinds"
"""


def test_of_two_rows_of_one_name_the_other_tensors_of_a_layer_tell_which_it_is() -> None:
    table = families.parse(TOLD, "told.toml")
    stored = {
        "layers.0.norm": Stored("BF16", (10,)),
        "layers.0.q": Stored("BF16", (24, 10)),
        "layers.1.norm": Stored("BF16", (10,)),
    }
    stored |= {
        "layers.1.up": Stored("BF16", (34, 10)),
        "layers.2.norm": Stored("BF16", (10,)),
        "layers.2.q": Stored("BF16", (24, 10)),
    }
    for kinds in (["a", "f", "a"], "afa"):
        model = understand(table, Config({"heads": 4, "kinds": kinds}), stored)
        assert {name: tensor.layers for name, tensor in model.tensors.items()} == {
            "attn_norm": (0, 2),
            "mlp_norm": (1,),
            "attn.q": (0, 2),
            "mlp.up": (1,),
        }
    with pytest.raises(ReshardError, match=r"norm has two rows"):
        families.parse(TOLD.replace("layers.{layer}.up", "layers.{layer}.q"), "told.toml")
    del stored["layers.2.q"]
    with pytest.raises(ReshardError, match=r"missing layers\.\{layer\}\.q"):
        understand(table, Config({"heads": 4, "layers": 3}), stored)


def test_two_rows_of_one_name_must_be_in_layers_of_kinds_that_config_json_tells_apart() -> None:
    with pytest.raises(ReshardError, match=r"q\.weight has two rows"):
        families.parse(RULED.replace('near = "layer_types", ', ""), "ruled.toml")
    with pytest.raises(ReshardError, match="layers of kind odd"):
        families.parse(RULED.replace("near = ", "odd = "), "ruled.toml")


HEADS = """
name = "headed"
rows = [
 ["layers.{layer}.q.{heads}.norm", "head_dim",                "attn.q_norm_heads"],
 ["layers.{layer}.q.weight",       "(heads head_dim) hidden", "attn.q"],
 ["layers.{layer}.k.weight",       "(kv head_dim) hidden",    "attn.k"],
]
[axes]
heads = "kv group"
[sizes]
heads = "heads"
kv = "kv"
"""


def test_a_placeholder_counts_the_parts_of_a_compound_row_major() -> None:
    """Head 5 of two for each KV head is the second of KV head 2; what is beyond, or missing, is told by its name."""
    shapes = {f"layers.0.q.{head}.norm": (3,) for head in range(6)} | {
        "layers.0.q.weight": (18, 7),
        "layers.0.k.weight": (9, 7),
    }
    stored = {name: Stored("BF16", shape) for name, shape in shapes.items()}
    table, config = families.parse(HEADS, "headed.toml"), Config({"heads": 6, "kv": 3})
    model = understand(table, config, stored)
    tensor, name = model.tensors["attn.q_norm_heads"], model.family.rows[0].name
    assert tensor.axes == ("layer", "kv", "group", "head_dim") and tensor.sizes == (1, 3, 2, 3)
    assert name.name({"layer": 0, "kv": 2, "group": 1}) == "layers.0.q.5.norm"
    assert name.numbers((0, 5)) == (0, 2, 1)
    with pytest.raises(ReshardError, match=r"layers\.0\.q\.5\.norm"):
        understand(table, config, {name: value for name, value in stored.items() if "5" not in name})
    with pytest.raises(ReshardError, match=r"unexpected layers\.\{layer\}"):
        understand(table, config, stored | {"layers.0.q.6.norm": Stored("BF16", (3,))})
    with pytest.raises(ReshardError, match=r"no row claims layers\.\{\}\.q"):
        understand(table, Config({}), stored)
