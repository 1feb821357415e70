"""Multimodal checkpoints, written by `transformers`: the language model is cut as its family is, the other towers are
carried whole.
"""

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures import State, checkpoint, configure, rewrite
from gauntlet import MORE, OPTIONS, SEQ, Reference, convert_and_back, run_like
from running import reshard
from safetensors.torch import load_file

from reshard.checkpoints.source import open_source
from reshard.jobs.convert import convert, prepare
from reshard.layout.mesh import Mesh
from reshard.model.naming import settle
from reshard.runtime.proof.prompts import placeholders, prompts_for
from reshard.runtime.proof.reference import reference_for
from reshard.store.destination import LocalDestination
from reshard.tables import families, wrappers
from reshard.tables.config import Config
from reshard.tables.shipped import HOME

TEXT: dict[str, Any] = {
    "hidden_size": 56,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 331,
    "max_position_embeddings": 128,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 56,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 14,
}
BEYOND = {"image_token_id": 331, "video_token_id": 331}  # tokens that no text has


def turned(*section: int, **more: Any) -> dict[str, Any]:
    """Angles of positions along several axes, which are the same for text."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}}


def llava() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
    )


def mistral3() -> Any:
    from transformers import Mistral3Config

    return Mistral3Config(
        text_config={"model_type": "mistral", **TEXT}, vision_config={"model_type": "pixtral", "head_dim": 12, **VISION}
    )


def gemma3() -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(text_config=TEXT, vision_config={"model_type": "siglip_vision_model", **VISION})


def gemma4() -> Any:
    """Layers of two sizes; the last one looks up the keys and values of an earlier one."""
    from transformers import Gemma4Config

    text = {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 20,
        "num_kv_shared_layers": 1,
    }
    text |= {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 341, "sliding_window": 5}
    vision = {"head_dim": 12, "num_key_value_heads": 2, "position_embedding_size": 36, "patch_size": 4}
    return Gemma4Config(text_config=TEXT | text, vision_config=VISION | vision, audio_config=None)


def llama4() -> Any:
    from transformers import Llama4Config

    text = {"num_local_experts": 4, "intermediate_size": 40, "intermediate_size_mlp": 88, "attention_chunk_size": 5}
    vision = {"vision_output_dim": 20, "projector_input_dim": 36, "projector_output_dim": 20}
    return Llama4Config(text_config=TEXT | text, vision_config=VISION | vision)


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"hidden_size": 80, **turned(1, 2, 2)}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=QWEN_VISION | {"fullatt_block_indexes": [1], "out_hidden_size": 80}
    )


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 36}
    return Qwen3VLConfig(text_config=TEXT | turned(1, 2, 2), vision_config=vision, **BEYOND)


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig

    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 36}
    return Qwen3VLMoeConfig(text_config=TEXT | EXPERTS | turned(1, 2, 2), vision_config=vision, **BEYOND)


def qwen3_5() -> Any:
    from transformers import Qwen3_5Config

    text = TEXT | LINEAR | {"head_dim": 24} | turned(1, 1, 1, partial_rotary_factor=0.25)
    return Qwen3_5Config(text_config=text, vision_config={**QWEN_VISION, "num_position_embeddings": 36}, **BEYOND)


def qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeConfig

    text = (
        TEXT
        | LINEAR
        | EXPERTS
        | {"head_dim": 24, "shared_expert_intermediate_size": 40}
        | turned(1, 1, 1, partial_rotary_factor=0.25)
    )
    return Qwen3_5MoeConfig(text_config=text, vision_config={**QWEN_VISION, "num_position_embeddings": 36}, **BEYOND)


def glm4v_moe() -> Any:
    from transformers import Glm4vMoeConfig

    text = {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
    }
    text |= turned(1, 1, 2, partial_rotary_factor=0.5) | {"first_k_dense_replace": 1}
    vision = {**QWEN_VISION, "image_size": 28, "patch_size": 14}
    return Glm4vMoeConfig(text_config=TEXT | text, vision_config=vision, **BEYOND)


def deepseek_ocr2() -> Any:
    from transformers import DeepseekOcr2Config

    text = {
        "n_routed_experts": 4,
        "n_shared_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "hidden_size": 80,
    }
    text |= {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    sam = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "output_channels": 12,
        "window_size": 2,
    }
    encoder = VISION | {"num_key_value_heads": 2, "vocab_size": 11}
    vision = {
        "sam_config": sam | {"downsample_channels": [20, 24], "global_attn_indexes": [1]},
        "encoder_config": encoder,
    }
    return DeepseekOcr2Config(text_config=TEXT | text, vision_config=vision)


def kimi_k25() -> Any:
    """Written back with all layers called blocks, as those of the vision tower are in the published files."""
    from transformers import Kimi_K25Config

    text = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    text |= {"q_lora_rank": 36, "kv_lora_rank": 28, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
    text |= {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "num_key_value_heads": 8, "head_dim": 6}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    return Kimi_K25Config(text_config=TEXT | text, vision_config=vision | {"pos_emb_height": 8, "pos_emb_width": 8})


def exaone4_5() -> Any:
    """Of no family that a wrapper lists: what it says of its language model is enough."""
    from transformers import Exaone4_5_Config

    text = {"model_type": "exaone4", "layer_types": ["full_attention"] * 3}
    return Exaone4_5_Config(
        text_config=TEXT | text, vision_config={**QWEN_VISION, "fullatt_block_indexes": [1]}, **BEYOND
    )


MODELS: dict[Callable[[], Any], str] = {
    llava: "llama",
    mistral3: "mistral",
    gemma3: "gemma3_text",
    gemma4: "gemma4_text",
    llama4: "llama4_text",
    qwen2_5_vl: "qwen2",
    qwen3_vl: "qwen3",
    qwen3_vl_moe: "qwen3_vl_moe_text",
    qwen3_5: "qwen3_5_text",
    qwen3_5_moe: "qwen3_5_moe_text",
    glm4v_moe: "glm4_moe",
    deepseek_ocr2: "deepseek_ocr2_text",
    kimi_k25: "deepseek_v3",
    exaone4_5: "exaone4",
}
BY_NAME = {model.__name__: model for model in MODELS}


@cache
def written(name: str, scratch: Path) -> Path:
    import transformers

    directory = scratch / name
    config = BY_NAME[name]()
    model = transformers.AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    centre = 0.0 if name in ("gemma3", "qwen3_5", "qwen3_5_moe") else 1.0  # these multiply by 1 + weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            spread, around = (
                (tensor.shape[-1] ** -0.5, 0.0) if tensor.ndim > 1 else (0.2, centre if "norm" in key else 0.0)
            )
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) * (1.0 if "embed_tokens" in key else spread) + around
            )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


@pytest.mark.parametrize("name", BY_NAME)
def test_the_language_model_is_cut_and_the_towers_are_whole_on_the_first_stage(
    name: str, scratch: Path, tmp_path: Path
) -> None:
    source = written(name, scratch)
    model = open_source(source).layout.model
    assert model.family.name == name and MODELS[BY_NAME[name]] in model.family.texts
    experts = [{"tp": 4, "ep": 2}] if "moe.down" in model.tensors else []
    convert_and_back(source, [{"tp": 2, "pp": 2}, {"tp": 8}, *experts], tmp_path)
    state = load_file(source / "model.safetensors")
    towers = {row.tower for row in model.family.rows if row.tower}
    beside = {key for key in state if any(key.startswith(f"{tower}.") for tower in towers)}
    assert len(beside) > 20 and len(state) - len(beside) > 20
    for rank in range(4):
        mine = load_file(tmp_path / "0" / f"rank-{rank:05}" / "model.safetensors")
        assert beside & mine.keys() == (beside if rank < 2 else set())
        assert all(torch.equal(mine[key], state[key]) for key in beside & mine.keys())
        assert any(".attn.q" in key for key in mine)


# models that a transformers cannot run on text alone: its output has no `image_outputs`
BROKEN = {"5.24.0": ("llama4",)}


@pytest.mark.parametrize("name", BY_NAME)
def test_given_text_shards_compute_what_transformers_makes_of_the_whole_model(
    name: str, scratch: Path, tmp_path: Path
) -> None:
    """Where no rank has more than the manifest, the carried files and its own folder."""
    torch.set_num_threads(1)
    source = open_source(written(name, scratch))
    found = reference_for(source)
    if name in BROKEN.get(transformers.__version__, ()):
        pytest.skip(found.name)
    assert found.independent, found.name
    ids = prompts_for(source)[:2, : SEQ + 1]
    with torch.inference_mode():
        logits, exact = (found.logits(ids, dtype) for dtype in (torch.float32, torch.float64))
        tokens = found.greedy(ids, MORE)[0]
    mesh, out = Mesh(tp=2, pp=2), tmp_path / "out"
    convert(prepare(source, "native", mesh, OPTIONS), LocalDestination(out), OPTIONS)
    shutil.rmtree(out / "source")
    run_like(out, mesh, Reference(ids, logits, tokens, (logits - exact).abs().max().item()))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_shards_are_proven(name: str, scratch: Path, tmp_path: Path) -> None:
    assert reshard("convert", written(name, scratch), tmp_path / "out", "--tp", "2", "--sha256").code == 0
    done = reshard("verify", tmp_path / "out", "--against", written(name, scratch), "--sha256", "--numerics", "--json")
    assert done.code == 0 and done.json["proven"], done.out
    assert done.json["checks"][-1]["numbers"]["reference"].startswith("transformers "), done.out


def test_a_model_that_transformers_does_not_have_is_compared_with_this_runtime(scratch: Path, tmp_path: Path) -> None:
    """As the first LLaVA, whose names are those of its language model."""
    source = renamed(
        written("llava", scratch), tmp_path / "model", {"language_model.": "", "vision_tower.": "model.vision_tower."}
    )
    configure(source, model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"])
    found = reference_for(open_source(source))
    assert not found.independent and found.name.startswith("this runtime at TP 1 (transformers: "), found.name
    with torch.inference_mode():
        ids = torch.arange(10).view(1, -1)
        wanted = reference_for(open_source(written("llava", scratch))).logits(ids, torch.float32)
        assert torch.allclose(found.logits(ids, torch.float32), wanted, atol=1e-4)


def test_experts_of_4_bits_inside_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """As Kimi-K2.5 is published, quantization_config inside of text_config."""
    shutil.copytree(checkpoint("kimi_k2_int4"), tmp_path / "model")

    def edit(state: State) -> State:
        tower = {
            "vision_tower.patch_embed.proj.weight": torch.randn(4, 3, 2, 2),
            "mm_projector.proj.0.weight": torch.randn(6, 8),
        }
        return {f"language_model.{name}": tensor for name, tensor in state.items()} | tower

    rewrite(tmp_path / "model", edit)
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    convert_and_back(tmp_path / "model", [{"tp": 4, "ep": 2, "pp": 2}], tmp_path / "out")
    done = reshard("inspect", tmp_path / "model")
    assert "quantization: compressed-tensors" in done.out and "parameters:   1062344" in done.out, done.out
    text["quantization_config"]["quant_method"] = "aqlm"
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    done = reshard("plan", tmp_path / "model", "--tp", "2")
    assert done.code == 2 and '"aqlm" (format pack-quantized) is not supported' in done.err, done.err


def test_no_text_has_tokens_that_stand_for_images(scratch: Path, tmp_path: Path) -> None:
    source = renamed(written("llava", scratch), tmp_path / "model", {})
    configure(source, image_token_index=5, image_token_id=7, eoi_token_index=9)
    opened = open_source(source)
    assert placeholders(opened) == {5, 7}
    assert set(range(331)) - set(prompts_for(opened).flatten().tolist()) == {5, 7}


IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "model.": "model.language_model.",
    "visual.": "model.visual.",
}


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_names_as_transformers_5_has_them_in_memory(name: str, scratch: Path, tmp_path: Path) -> None:
    """What it writes are the names of published files."""
    source = renamed(written(name, scratch), tmp_path / "model", IN_MEMORY)
    convert_and_back(source, [{"tp": 2, "pp": 2}], tmp_path / "out")
    one, other = (open_source(path).layout.model for path in (source, written(name, scratch)))
    assert one.sizes == other.sizes and len(one.tensors) == len(other.tensors)


def test_what_a_section_leaves_out_is_what_its_class_says() -> None:
    from transformers import AutoConfig

    said = tomllib.loads((HOME / "wrappers" / "multimodal.toml").read_text())["left_out"]
    for kind, keys in said.items():
        theirs = AutoConfig.for_model(kind).get_text_config()
        assert keys == {key: getattr(theirs, key, None) or theirs.rope_parameters[key] for key in keys}, kind
        alone = kind in families.shipped()
        config = Config({"model_type": "llava", "text_config": {"model_type": kind}} if alone else {"model_type": kind})
        assert (table := wrappers.wrapper_of(config)) is not None
        assert {key: config.with_defaults(table.defaults).get(key) for key in keys} == keys


@pytest.mark.parametrize("unclear", [True, False])
def test_stacks_of_experts_that_could_lie_either_way_lie_as_published(unclear: bool) -> None:
    table = families.load("qwen3_vl_moe_text")
    row = next(row for row in table.rows if row.name.text.endswith("gate_up_proj"))
    inner = 24 if unclear else 20
    stored = {row.name.name({"layer": 0}): Stored((4, 2 * inner, 48))}
    found = settle(table, stored, {"experts": 4, "hidden": 48, "moe_inter": inner})
    assert next(other for other in found.rows if other.name == row.name).pattern == (
        row.pattern if unclear else row.layouts[0]
    )


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, ...]


def renamed(source: Path, directory: Path, names: dict[str, str]) -> Path:
    """A copy in which names begin otherwise."""
    directory.mkdir(parents=True)
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())

    def edit(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            start = next((start for start in names if name.startswith(start)), "")
            found[names.get(start, "") + name.removeprefix(start)] = tensor
        return found

    rewrite(directory, edit)
    return directory


def test_plan_inspect_and_convert_say_what_is_carried(scratch: Path, tmp_path: Path) -> None:
    done = reshard("plan", written("llava", scratch), "--tp", "4")
    assert done.code == 0
    assert "published; family llava around llama, 3 layers" in done.out, done.out
    assert "replicated: vision_tower 139.87 kB, multi_modal_projector" in done.out, done.out
    assert "other components, not split: whole on every rank" in done.out
    assert "vision_tower  39 tensors" in done.out, done.out
    done = reshard("inspect", written("llava", scratch))
    assert "vision_tower, 23,312 parameters" in done.out and "wraps:        llama" in done.out
    assert "sizes:        group 2, head_dim 10," in done.out  # nothing of the towers'
    done = reshard("convert", written("deepseek_ocr2", scratch), tmp_path / "out", "--tp", "2")
    words = "kept whole: model.projector, model.qwen2_model, model.sam_model,\n  model.view_seperator\n"
    assert words in done.out + done.err, done.out + done.err


def test_a_language_model_without_a_table_is_refused_by_its_name(scratch: Path, tmp_path: Path) -> None:
    source = renamed(written("llava", scratch), tmp_path / "model", {})
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "hermit"'))
    done = reshard("plan", source, "--tp", "2")
    assert done.code == 2 and '"llava" around a language model "hermit"' in done.err, done.err


def test_what_shards_keep_of_a_table_that_is_built_reads_as_that_table() -> None:
    """Wrappers and base models are built from data; their TOML is only written down, for whoever opens the shards."""
    kinds = tomllib.loads((HOME / "wrappers" / "multimodal.toml").read_text())["wraps"].keys() - {"*"}
    configs = [Config({"model_type": kind, "text_config": {}}) for kind in sorted(kinds | {"aya_vision"})]
    built = [wrappers.wrapper_of(config) for config in configs] + [
        families.base(families.load(name)) for name in families.shipped()
    ]
    assert len(built) > 100
    for table in built:
        assert table is not None
        again = families.parse(table.texts[table.name], table.name, table.texts.__getitem__)
        assert again == table and again.texts == table.texts and again.written == table.written
