"""Multimodal checkpoints, written by `transformers`: the language model is cut as its family is, the other towers are carried whole."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gauntlet import convert_and_back
from running import reshard
from safetensors.torch import load_file

from reshard.source import open_source

TEXT: dict[str, Any] = {
    "hidden_size": 56,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 331,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {"depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 56}


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
    )
    return LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", **TEXT}, vision_config={"model_type": "pixtral", "head_dim": 12, **VISION}
    )
    return Mistral3ForConditionalGeneration(config)


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config={"model_type": "siglip_vision_model", **VISION}))


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]}
    text |= {"hidden_size": 80, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config={**QWEN_VISION, "fullatt_block_indexes": [1], "out_hidden_size": 80})
    )


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 36}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=vision))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (llava, "llama"),
    "mistral3": (mistral3, "mistral"),
    "gemma3": (gemma3, "gemma3_text"),
    "qwen2_5_vl": (qwen2_5_vl, "qwen2"),
    "qwen3_vl": (qwen3_vl, "qwen3"),
}


@cache
def written(name: str, scratch: Path) -> Path:
    directory = scratch / name
    model = MODELS[name][0]().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_cut_and_the_towers_are_whole_on_the_first_stage(name: str, scratch: Path, tmp_path: Path) -> None:
    source = written(name, scratch)
    model = open_source(source).layout.model
    assert model.family.name == name and MODELS[name][1] in model.family.texts
    convert_and_back(source, [{"tp": 2, "pp": 2}, {"tp": 8}], tmp_path)
    state = load_file(source / "model.safetensors")
    towers = {row.tower for row in model.family.rows if row.tower}
    beside = {key for key in state if any(key.startswith(f"{tower}.") for tower in towers)}
    assert len(beside) > 20 and len(state) - len(beside) > 20
    for rank in range(4):
        mine = load_file(tmp_path / "0" / f"rank-{rank:05}" / "model.safetensors")
        assert beside & mine.keys() == (beside if rank < 2 else set())
        assert all(torch.equal(mine[key], state[key]) for key in beside & mine.keys())
        assert any(key.endswith("attn.qkv") for key in mine)


def test_plan_says_what_is_carried(scratch: Path) -> None:
    done = reshard("plan", written("llava", scratch), "--tp", "4")
    assert done.code == 0
    assert "other towers, which are not cut, whole on every rank" in done.out
    assert "vision_tower  39 tensors" in done.out, done.out
    assert "vision_tower, " in reshard("inspect", written("llava", scratch)).out


def test_a_language_model_without_a_table_is_refused_by_its_name(scratch: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in written("llava", scratch).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "hermit"'))
    done = reshard("plan", source, "--tp", "2")
    assert done.code == 2 and '"llava" around a language model "hermit"' in done.err, done.err
