"""The tensor names of checkpoints as they were published plan without error; quantized ones are refused by name.

`published.json` holds names only (facts read from indexes and headers; `source` says where). Shapes are made up to fit.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import shapes
from shapes import FP8

from reshard.errors import ReshardError
from reshard.layout.capacity import sizes_that_work, weight_bytes
from reshard.layout.cut import lay_out
from reshard.layout.join import plan
from reshard.layout.mesh import Mesh
from reshard.model.quantized import turned
from reshard.model.understand import Config, axis_size, understand
from reshard.tables import families, formats, schemes, wrappers
from reshard.tables.families import Family
from reshard.tables.layer_rules import layers_named
from reshard.tables.notation import Pattern, fold
from reshard.tables.row import Row

ENTRIES = json.loads((Path(__file__).parent / "published.json").read_text())

# One config per family, small; layers and experts are taken from the names.
LLAMA = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48, "intermediate_size": 64, "vocab_size": 100,
    "head_dim": 10,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
LATENT = {
    "num_attention_heads": 8, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "vocab_size": 100, "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
INDEX = {"index_n_heads": 6, "index_head_dim": 96, "index_topk": 64}
INT4 = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
    }
}
CONFIGS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA,
    "smollm3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "olmo2": LLAMA,
    "phi3": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 8},
    "qwen3_moe": LLAMA | {"num_experts": 128, "moe_intermediate_size": 32},
    "gpt_oss": LLAMA | {"num_local_experts": 4},
    "granitemoe": LLAMA | {"num_local_experts": 32},
    "gpt2": {"n_head": 4, "n_embd": 40, "vocab_size": 100, "n_positions": 30},
    "gpt_neox": {"num_attention_heads": 8, "hidden_size": 48, "intermediate_size": 64, "vocab_size": 100},
    "falcon": {"n_head": 8, "hidden_size": 80, "vocab_size": 100, "new_decoder_architecture": True,
    "parallel_attn": True},
    "phi": {"num_attention_heads": 8, "hidden_size": 80, "intermediate_size": 64, "vocab_size": 100},
    "gpt_bigcode": {"n_head": 8, "n_embd": 80, "n_inner": 64, "n_positions": 30, "vocab_size": 100},
    "gptj": {"n_head": 8, "n_embd": 80, "n_inner": 64, "vocab_size": 100},
    "bloom": {"n_head": 8, "hidden_size": 80, "vocab_size": 100},
    "mpt": {"n_heads": 8, "d_model": 80, "expansion_ratio": 4, "vocab_size": 100},
    "internlm": {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"hidden_size": 80,
    "num_key_value_heads": 8},
    "internlm2": {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"hidden_size": 80},
    "minimax": LLAMA | {"num_local_experts": 32},
    "qwen3_next": LLAMA | LINEAR | {"num_experts": 512, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24},
    "qwen3_5_moe": LLAMA | LINEAR | {"num_experts": 256, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24},
    "phimoe": LLAMA | {"num_local_experts": 16, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": LLAMA | FP8 | {"num_local_experts": 256, "hidden_size": 256, "intermediate_size": 256,
    "head_dim": 128},
    "glm4_moe": LLAMA | {
        "n_routed_experts": 160, "n_shared_experts": 1, "moe_intermediate_size": 32, "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "compressed-tensors",
        "format": "float-quantized"},
    },
    "deepseek_v2": LATENT | {"n_routed_experts": 64, "q_lora_rank": None},
    "deepseek_v3": LATENT | FP8 | {"n_routed_experts": 256, "q_lora_rank": 384, "num_nextn_predict_layers": 1},
    "kimi_k2": LATENT | FP8 | {"n_routed_experts": 384, "q_lora_rank": 384},
    "deepseek_v32": LATENT | FP8 | INDEX | {"n_routed_experts": 256, "q_lora_rank": 384, "num_nextn_predict_layers": 1},
    "glm_moe_dsa": LATENT | INDEX | {"n_routed_experts": 256, "q_lora_rank": 384, "num_nextn_predict_layers": 1},
    "glm4_moe_lite": LATENT | {"n_routed_experts": 64, "q_lora_rank": 384, "num_nextn_predict_layers": 1},
    "gemma3": LLAMA,
    "gemma4": LLAMA | {"num_experts": 128, "moe_intermediate_size": 32, "global_head_dim": 14,
    "num_global_key_value_heads": 2},
    "paligemma": LLAMA,
    "llava": LLAMA,
    "llava_llama": LLAMA,
    "mistral3": LLAMA,
    "qwen2_vl": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": LLAMA,
    "qwen3_vl_moe": LLAMA | {"num_experts": 128, "moe_intermediate_size": 32},
    "glm4v_moe": LLAMA | {"n_routed_experts": 128, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "attention_bias": True},
    "kimi_k25": LATENT | INT4 | {"n_routed_experts": 384, "q_lora_rank": 384},
    "deepseek_vl2_ocr": LLAMA | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 32},
}  # fmt: skip
DEEPSEEK_V4 = {
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 256,
    "moe_intermediate_size": 256, "vocab_size": 100,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "q_lora_rank": 384, "o_groups": 4,
    "o_lora_rank": 128,
    "hc_mult": 4, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
CONFIGS |= {
    "ernie4_5_moe": LLAMA | {"moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_intermediate_size": 32},
    "mimo": LLAMA | {"num_nextn_predict_layers": 1},
    "openpangu": LLAMA,
    "qwen": {"num_attention_heads": 8, "kv_channels": 10, "hidden_size": 80, "vocab_size": 100},
    "chatglm": {
        "num_attention_heads": 8, "kv_channels": 10, "hidden_size": 80, "ffn_hidden_size": 64, "padded_vocab_size": 100,
        "multi_query_attention": True,
    },
    "telechat": {"n_head": 8, "hidden_size": 80, "ffn_hidden_size": 64, "vocab_size": 100},
}  # fmt: skip
CONFIGS["deepseek_v4"] = DEEPSEEK_V4 | INDEX | FP8
SIZES = {
    "head_dim": 10,
    "inter": 64,
    "moe_inter": 32,
    "group": 2,
    "kv": 4,
    "heads": 8,
    "pos": 30,
    "shared_inter": 256,
    "lk": 4,
    "lv": 8,
}
SIZES |= {"inter@late": 56, "group@full": 4, "draft_in": 768}
# Families without an entry: `transformers` writes them in the zoo.
NAMELESS = """
mimo_v2_flash exaone
olmo2 ministral seed_oss glm glm4 helium ernie4_5 olmo olmo3 granite cohere cohere2 arcee nemotron stablelm exaone4
hunyuan_v1_dense
ministral3 apertus qwen2_moe olmoe dots1 granitemoeshared codegen gpt_neo opt starcoder2 persimmon baichuan
qwen3_5_text granitemoehybrid bamba falcon_h1 mamba2 mamba lfm2 lfm2_moe jamba nemotron_h kimi_linear minimax_m3_vl_text
hunyuan_v1_moe dbrx llama4_text solar_open exaone_moe afmoe bailing_moe jetmoe longcat_flash
"""
QUANTIZED = {
    "qweight": {"quant_method": "awq", "bits": 4, "group_size": 8},
    "SCB": {"quant_method": "bitsandbytes"},
    "down_proj_blocks": {"quant_method": "mxfp4"},
    "weight_packed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "embed_tokens.biases": {"bits": 4, "group_size": 64, "mode": "affine"},
}
DSPARK = {"dspark_block_size": 5, "dspark_markov_rank": 24, "dspark_target_layer_ids": [40, 41, 42]}
ALSO = {
    "THUDM/chatglm-6b-int4": {"multi_query_attention": False},
    "TheBloke/Llama-2-7B-AWQ": {"head_dim": 16},
    "Tele-AI/TeleChat-52B": {"relative_encoding": "rotary"},
    "deepseek-ai/DeepSeek-V4-Flash-0731": DSPARK,
}
# what config.json calls what is known by another name
LABELS = {"llava_lisa": "llava", "ernie4_5_paddle": "ernie4_5_moe"}


@dataclass(frozen=True)
class Made:
    dtype: str
    shape: tuple[int, ...]


def expand(pattern: str) -> list[str]:
    """`layers.{0..2,5}.x` → its four names."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = []
    for at, part in enumerate(parts):
        if at % 2 == 0:
            choices.append([part])
            continue
        spans = [item.split("..") for item in part.split(",")]
        choices.append([str(n) for span in spans for n in range(int(span[0]), int(span[-1]) + 1)])
    return ["".join(choice) for choice in itertools.product(*choices)]


def table_for(family: str) -> Family:
    """The table of a model_type, which may be that of a multimodal checkpoint."""
    family = LABELS.get(family, family)
    table = families.family_of(family, ()) or wrappers.wrapper_of(Config({"model_type": family}))
    assert table is not None, family
    return table


def made(entry: dict) -> tuple[dict, dict[str, Made]]:
    """A config and shapes for an entry's names."""
    family = LABELS.get(entry["family"], entry["family"])
    names = [name for pattern in entry["names"] for name in expand(pattern)]
    config = CONFIGS[family] | ALSO.get(entry["model"], {})
    table = table_for(family)
    own = [name for name in names if not name.startswith(tuple(f"{tower}." for tower in table.towers))]
    layers = 1 + max(int(n) for name in own for n in re.findall(r"(?:layers|h|blocks)\.(\d+)\.", name))
    config[table.sizes["layer"].split(" | ")[0]] = layers - (
        0 if table.counts_apart else config.get("num_nextn_predict_layers", 0)
    )
    config["tie_word_embeddings"] = not any(
        name.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for name in names
    )
    if family == "gpt2":  # only the first layer was read: the rest of a one-layer model beside it
        prefix = "transformer." if names[0].startswith("transformer.") else ""
        names += [prefix + name for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]
    view = Config(config, table.defaults)
    sizes = dict(SIZES)
    for axis, expression in table.sizes.items():
        value = view.size(expression)
        if value is not None:
            sizes[axis] = value
    sizes.setdefault("hidden", 80)
    if family in ("gpt2", "gpt_neox"):
        sizes |= {
            "kv": sizes["heads"],
            "group": 1,
            "head_dim": sizes["hidden"] // sizes["heads"],
            "inter": sizes.get("inter", 64),
        }
    sizes["group"] = sizes["heads"] // sizes["kv"]
    sizes["lgroup"] = sizes["lv"] // sizes["lk"]
    for axis, parts in table.axes.items():
        if axis in sizes and parts[-1] not in sizes:
            sizes[parts[-1]] = sizes[axis] // math.prod(sizes[part] for part in parts[:-1])
    prefix = next((p for p in table.prefixes if any(name.startswith(p) for name in names)), "")
    spelled = [(row, name.folded) for row in table.rows for name in (row.name, *row.others)]
    rows: dict[str, list[Row]] = {}
    for row, text in spelled:
        rows.setdefault(prefix + text[1:] if text[0] == "~" else text, []).append(row)
    named = {kind: layers_named(rule, layers, view, lambda: None) for kind, rule in table.layers.items()}
    shapes: dict[int, tuple[int, ...]] = {}
    stored = {}
    for name in names:
        key, numbers = fold(name)
        found = rows.get(name) or rows.get(key, [])
        row = next((row for row in found if len(found) == 1 or in_layer(row, numbers[0], table, named)), None)
        if id(row) not in shapes:
            shapes[id(row)] = row.pattern.measure(lambda leaf, axis: axis_size(axis, sizes))[0] if row else (3, 5)
        stored[name] = Made("BF16", shapes[id(row)])
    method = next(
        (method for suffix, method in QUANTIZED.items() if any(name.endswith(suffix) for name in names)), None
    )
    if method is not None:
        said = config.get("quantization_config", {})
        same = said.get("quant_method") == method.get("quant_method")
        config = config | {"quantization_config": said if said and same else method}
    said = Config(config).quantization
    scheme = schemes.scheme_of(said) if said else None
    if said is None or scheme is None:
        return config, stored

    def plain(name: str) -> tuple[int, ...] | None:
        """The shape of a matrix if it were not quantised, as (…, out, in)."""
        key, numbers = fold(name)
        found = rows.get(name) or rows.get(key, [])
        row = next((row for row in found if len(found) == 1 or in_layer(row, numbers[0], table, named)), None)
        shape = row.pattern.measure(lambda leaf, axis: axis_size(axis, sizes))[0] if row else ()
        if len(shape) < 2:
            return None
        return (*shape[:-2], shape[-1], shape[-2]) if row and turned(row) else shape

    there, done, tried = set(names), dict[str, Made](), set[str]()
    packed = any(name.endswith("weight_packed") for name in names)
    layouts = scheme.layouts if packed else scheme.layouts[::-1]
    for name in names:
        kind = fold(name)[0]
        for layout in () if kind in tried else layouts:
            needed = [one.suffix for one in layout.parts if not one.optional]
            for part in layout.parts:
                stem = name.removesuffix(part.suffix)
                if not part.suffix or not name.endswith(part.suffix) or not all(stem + one in there for one in needed):
                    continue
                shape = plain(stem + (".weight" if part.suffix.startswith(".") else ""))
                forms = list(part.forms(scheme.claims(said)[-1][1]))
                if shape is not None and forms:
                    done.setdefault(kind, Made(min(part.dtypes, default="F16"), sized(*forms[0], shape)))
        tried.add(kind)
        stored[name] = done.get(kind, stored[name])
    return config, stored


def sized(pattern: Pattern, own: dict[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part of a matrix."""
    known = {"out": shape[-2], "in": shape[-1]} | own
    return (*shape[:-2], *(math.prod(axis_size(str(axis), known) for axis in dim) for dim in pattern.dims))


def in_layer(row: Row, layer: int, table: Family, named: dict[str, tuple[int, ...]]) -> bool:
    """Whether a row is of the kinds that rules give a layer; what no rule names is of the kind without one."""
    return all(
        (layer in named[kind]) == (kind in row.kinds)
        for group in table.one_of
        if row.kinds & set(group)
        for kind in group
        if kind in named
    )


IDS = [f"{entry['family']}-{(entry['model'] or 'unnamed').replace('/', '-')}-{n}" for n, entry in enumerate(ENTRIES)]


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_published_names_plan_without_error(entry: dict) -> None:
    """Every published checkpoint of our families plans at TP 2, and merges; quantised ones too, but for those of MLX,
    and none whose config.json says nothing of it.
    """
    config, stored = made(entry)
    table = table_for(entry["family"])
    if entry["model"] == "deepseek-ai/DeepSeek-R1 or V3 (AWQ)":
        pytest.skip("the names of the first layers only")
    if entry["family"] == "gemma4" and any(name.endswith("weight_packed") for name in stored):
        pytest.skip("llm-compressor takes gemma4's experts apart: no row has such names")
    said = Config(config).quantization
    if said is not None:
        bare = {key: value for key, value in config.items() if key != "quantization_config"}
        with pytest.raises(ReshardError, match="no row claims"):
            understand(table, Config(bare), stored)
        if "quant_method" not in said:
            with pytest.raises(ReshardError, match='"mlx"'):
                understand(table, Config(config), stored)
            return
    model = understand(table, Config(config), stored)
    assert len(stored) == len(model.aside) + sum(
        slot.count() for slot in lay_out(model.family.published, model, Mesh(), model.active).slots
    )
    published, shards = (
        lay_out(model.family.published, model, Mesh(), model.active),
        lay_out(formats.load("native"), model, Mesh(tp=2)),
    )
    assert plan(published, shards).components
    assert plan(shards, published).components


def test_a_section_that_says_next_to_nothing_means_what_its_class_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of llava-1.5-7b-hf, whose language model is as large as the class of its config has it."""
    monkeypatch.setitem(CONFIGS, "llava", LLAMA | {"num_attention_heads": 32, "num_key_value_heads": 32})
    _, stored = made(next(entry for entry in ENTRIES if entry["family"] == "llava"))
    section = {"model_type": "llama", "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    config = Config(
        {"model_type": "llava", "text_config": section, "vision_config": {"hidden_size": 24, "num_attention_heads": 3}}
    )
    table = wrappers.wrapper_of(config)
    assert table is not None
    sizes = understand(table, config, stored).sizes
    assert {axis: sizes[axis] for axis in ("heads", "kv", "head_dim", "hidden", "layer")} == {
        "heads": 32, "kv": 32, "head_dim": 10, "hidden": 48, "layer": 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tensors", "size", "tp"),
    [
        (shapes.DEEPSEEK_V4_FLASH, 69_187, 148.65, [1, 2, 4, 8, 16]),
        (shapes.DEEPSEEK_V4_DSPARK, 72_317, 155.42, [1, 2, 4, 8, 16]),
        (shapes.DEEPSEEK_V4_PRO, 145_116, 805.32, [1, 2, 4, 8]),
    ],
    ids=["flash", "dspark", "pro"],
)
def test_deepseek_v4_in_its_true_shapes_has_as_many_bytes_as_published(
    config: shapes.Config, tensors: int, size: float, tp: list[int]
) -> None:
    """Tensors and GiB are those of the published files; blocks of 128 inside the shared expert say how far it can be
    cut.
    """
    config = config | shapes.FP8
    stored = shapes.deepseek_v4(config)
    assert len(stored) == tensors
    model = understand(families.load("deepseek_v4"), Config(config), stored)
    native = formats.load("native")
    assert round(sum(weight_bytes(lay_out(native, model, Mesh()))) / 2**30, 2) == size
    works = sizes_that_work(native, model, Mesh())
    assert [n for n in works if n & (n - 1) == 0] == tp


def test_every_family_with_published_names_is_covered() -> None:
    """Of the shipped families only these have no published names at hand."""
    shipped = set(families.shipped())
    covered = {next(name for name in table_for(entry["family"]).texts if name in shipped) for entry in ENTRIES}
    assert shipped - covered == set(NAMELESS.split())
