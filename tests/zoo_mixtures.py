"""Decoders with mixtures of experts: one tiny checkpoint for each variant of each family."""

import json
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fixtures import (
    BLOCK,
    BLOCK_SCALED,
    DEEPSEEK,
    HUNYUAN_ROPE,
    SHARD,
    State,
    add_mtp,
    configure,
    define,
    distinct,
    noise_like,
    quantize,
    renamed,
    rewrite,
    sizes,
    write,
)

EXPERTS: dict[str, Any] = {"experts": 8, "ep": (1, 2, 4)}


def fuse(directory: Path) -> None:
    """Write the checkpoint again as transformers 5 holds it in memory, with all experts of a layer in one tensor."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    model.save_pretrained(directory, max_shard_size=f"{SHARD // 1000}KB", save_original_format=False)


@define("mixtral", heads=8, kv=4, layers=3, **EXPERTS)
def mixtral_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5."""
    from transformers import MixtralConfig

    write(directory, seed, MixtralConfig(**sizes(8, 4, 14, 72, 40, 331, 3), num_local_experts=8, num_experts_per_tok=2))
    fuse(directory)


@define("qwen3_moe", heads=8, kv=4, layers=3, **EXPERTS)
def qwen3_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; layer 1 is dense; biases in attention."""
    from transformers import Qwen3MoeConfig

    facts = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "attention_bias": True,
    }
    write(directory, seed, Qwen3MoeConfig(**sizes(8, 4, 14, 72, 88, 331, 3), **facts))
    fuse(directory)


def qwen3_vl_moe_twin(directory: Path, seed: str) -> None:
    from transformers import Qwen3MoeConfig

    facts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
    write(directory, seed, Qwen3MoeConfig(**sizes(8, 4, 14, 72, 88, 331, 3), **facts))
    fuse(directory)


def qwen3_vl_moe_stacked(directory: Path, seed: str, turned: bool) -> None:
    qwen3_vl_moe_twin(directory, seed)
    if turned:
        rewrite(directory, lambda state: {name: t.transpose(1, 2) if t.ndim == 3 else t for name, t in state.items()})
    configure(directory, "norm_topk_prob", model_type="qwen3_vl_moe_text")


@define("qwen3_vl_moe_text", heads=8, kv=4, layers=3, twin=qwen3_vl_moe_twin, **EXPERTS)
def qwen3_vl_moe(directory: Path, seed: str) -> None:
    """As published inside of a multimodal checkpoint: stacks of experts whose last axis are outputs."""
    qwen3_vl_moe_stacked(directory, seed, turned=True)


@define("qwen3_vl_moe_text", heads=8, kv=4, layers=3, twin=qwen3_vl_moe_twin, **EXPERTS)
def qwen3_vl_moe_plain(directory: Path, seed: str) -> None:
    """With stacks as Qwen3 has them."""
    qwen3_vl_moe_stacked(directory, seed, turned=False)


@define("deepseek_v3", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4))
def deepseek_v3_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; layer 0 is dense."""
    from transformers import DeepseekV3Config

    facts: dict[str, Any] = {
        "hidden_size": 56,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 3,
    }
    facts |= {"q_lora_rank": 36, "kv_lora_rank": 28, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
    facts |= {"intermediate_size": 104, "moe_intermediate_size": 40, "first_k_dense_replace": 1, "num_mtp_layers": 0}
    write(directory, seed, DeepseekV3Config(**DEEPSEEK, **facts))
    fuse(directory)


def qwen2_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import Qwen2MoeConfig

    base = sizes(8, 2, 14, 72, 88, 331, 3) | {"num_key_value_heads": kv}
    base |= {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
    }
    return Qwen2MoeConfig(**base, **facts)


@define("qwen2_moe", heads=8, kv=4, layers=3, **EXPERTS)
def qwen2_moe(directory: Path, seed: str) -> None:
    """Bias on q, k and v, said by no key; a shared expert with a gate; layer 1 is dense."""
    write(directory, seed, qwen2_moe_config(4, mlp_only_layers=[1]))
    configure(directory, "qkv_bias")


@define("qwen2_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def qwen2_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; weights of experts are normalized."""
    write(directory, seed, qwen2_moe_config(2, norm_topk_prob=True))
    fuse(directory)


def olmoe_config(**facts: Any) -> Any:
    from transformers import OlmoeConfig

    base = sizes(8, 4, 14, 72, 40, 331, 3) | {"hidden_size": 112}
    return OlmoeConfig(**base, num_experts=8, num_experts_per_tok=3, **facts)


OLMOE_SQUARE = (r".*\.[qo]_proj\.weight",)


@define("olmoe", heads=8, kv=4, layers=3, square=OLMOE_SQUARE, **EXPERTS)
def olmoe(directory: Path, seed: str) -> None:
    """A norm over all of q and over all of k. Heads times head_dim is hidden, by definition."""
    write(directory, seed, olmoe_config())


@define("olmoe", heads=8, kv=4, layers=3, square=OLMOE_SQUARE, **EXPERTS)
def olmoe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; queries, keys and values are clipped and have biases, weights of experts
    normalized.
    """
    write(directory, seed, olmoe_config(clip_qkv=0.7, norm_topk_prob=True, attention_bias=True))
    fuse(directory)


SIGMOID: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
}
SIGMOID |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}


@define("dots1", heads=8, kv=4, layers=3, **EXPERTS)
def dots1(directory: Path, seed: str) -> None:
    """Experts are chosen by a corrected score; layer 0 is dense, and the last layer has a window."""
    from transformers import Dots1Config

    write(
        directory,
        seed,
        Dots1Config(**sizes(8, 4, 14, 72, 88, 331, 3), **SIGMOID, sliding_window=7, max_window_layers=2),
    )
    configure(directory, "layer_types")


def glm4_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(**sizes(8, 2, 12, 72, 88, 331, 3) | {"num_key_value_heads": kv}, **SIGMOID | facts)


@define("glm4_moe", heads=8, kv=4, layers=3, mtp=1, **EXPERTS)
def glm4_moe(directory: Path, seed: str) -> None:
    """As GLM-4.5: bias on q, k and v, norms on q and k, half of each head is rotated;
    a multi-token prediction layer.
    """
    write(directory, seed, glm4_moe_config(4, attention_bias=True, use_qk_norm=True, num_mtp_layers=0))
    rewrite(directory, lambda state: add_mtp(state, seed, 3, torch.bfloat16))
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("glm4_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def glm4_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; no biases, no norms; experts in groups."""
    write(directory, seed, glm4_moe_config(2, n_group=4, topk_group=2, num_mtp_layers=0))
    fuse(directory)


GRANITE: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
}
GRANITE |= {"attention_multiplier": 0.3, "residual_multiplier": 0.22, "logits_scaling": 8.0}


@define("granitemoe", heads=8, kv=4, layers=3, **EXPERTS)
def granitemoe(directory: Path, seed: str) -> None:
    """Experts are stacked as published; tied; what granite scales is scaled."""
    from transformers import GraniteMoeConfig

    write(directory, seed, GraniteMoeConfig(**sizes(8, 4, 14, 72, 40, 331, 3), **GRANITE))


@define("granitemoe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def granitemoe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; a head of its own; biases in attention."""
    from transformers import GraniteMoeConfig

    facts = GRANITE | {"tie_word_embeddings": False, "attention_bias": True}
    write(directory, seed, GraniteMoeConfig(**sizes(8, 2, 14, 72, 40, 331, 3), **facts))
    fuse(directory)


@define("granitemoeshared", heads=8, kv=4, layers=3, **EXPERTS)
def granitemoeshared(directory: Path, seed: str) -> None:
    """A shared expert beside the others, gate and up fused."""
    from transformers import GraniteMoeSharedConfig

    write(
        directory,
        seed,
        GraniteMoeSharedConfig(**sizes(8, 4, 14, 72, 40, 331, 3), **GRANITE, shared_intermediate_size=48),
    )


LATENT: dict[str, Any] = {
    **DEEPSEEK,
    "hidden_size": 56,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 3,
}
LATENT |= {"kv_lora_rank": 28, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
LATENT |= {"intermediate_size": 104, "moe_intermediate_size": 40, "n_routed_experts": 8}


@define("deepseek_v2", heads=8, kv=8, layers=3, **EXPERTS)
def deepseek_v2(directory: Path, seed: str) -> None:
    """Experts of the groups that have the best one; biases on all but the outputs of low ranks."""
    from transformers import DeepseekV2Config

    facts = {
        "q_lora_rank": 36,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    }
    facts |= {"attention_bias": True, "mlp_bias": True}
    write(directory, seed, DeepseekV2Config(**LATENT | facts, first_k_dense_replace=1))


@define("deepseek_v2", heads=8, kv=8, layers=3, **EXPERTS)
def deepseek_v2_lite(directory: Path, seed: str) -> None:
    """The query is not compressed, experts are in no groups; stretched angles; in the names of transformers 5."""
    from transformers import DeepseekV2Config

    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32,
    }
    rope |= {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
    facts = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": rope}
    write(directory, seed, DeepseekV2Config(**LATENT | facts, first_k_dense_replace=1))
    fuse(directory)


def deepseek_ocr2_whole(directory: Path, seed: str) -> None:
    """The language model and its towers, as transformers writes them."""
    from transformers import AutoModelForImageTextToText, DeepseekOcr2Config

    text = sizes(8, 4, 14, 72, 104, 331, 3) | {
        "hidden_size": 112,
        "head_dim": None,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    }
    text |= {"n_routed_experts": 8, "n_shared_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    text |= {"routed_scaling_factor": 1.5}
    sam = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "output_channels": 12,
        "window_size": 2,
    }
    encoder = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    vision = {"sam_config": sam | {"downsample_channels": [20, 24]}, "encoder_config": encoder | {"vocab_size": 11}}
    model = AutoModelForImageTextToText.from_config(DeepseekOcr2Config(text_config=text, vision_config=vision)).to(
        torch.bfloat16
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "vision_tower" not in name and "multi_modal" not in name:
                tensor.copy_(noise_like(seed, name, tensor, 1.0, torch.bfloat16))
    model.save_pretrained(directory)


DEEPSEEK_OCR: dict[str, Any] = {"heads": 8, "kv": 4, "layers": 3, "twin": deepseek_ocr2_whole, **EXPERTS}
DEEPSEEK_OCR |= {"square": (r"model\.layers\.\d\.self_attn\.[qo]_proj\.weight",)}


def deepseek_ocr2_language(directory: Path, seed: str) -> None:
    deepseek_ocr2_whole(directory, seed)
    towers = (
        "model.projector",
        "model.qwen2_model",
        "model.sam_model",
        "model.view_seperator",
        "model.vision",
        "model.multi",
    )
    rewrite(directory, lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(towers)})
    text = json.loads((directory / "config.json").read_text())["text_config"]
    configure(directory, "text_config", "vision_config", **text)


@define("deepseek_ocr2_text", **DEEPSEEK_OCR)
def deepseek_ocr2(directory: Path, seed: str) -> None:
    """The language model alone: ordinary attention, experts as DeepSeek-V2 has them."""
    deepseek_ocr2_language(directory, seed)


@define("deepseek_ocr2_text", **DEEPSEEK_OCR)
def deepseek_ocr2_stacked(directory: Path, seed: str) -> None:
    """With experts as transformers has them in memory."""
    deepseek_ocr2_language(directory, seed)

    def edit(state: State) -> State:
        found = {name: tensor for name, tensor in state.items() if ".experts." not in name}
        for part in (1, 2):
            start = f"model.layers.{part}.mlp.experts"
            gate, up, down = (
                torch.stack([state[f"{start}.{n}.{of}_proj.weight"] for n in range(8)]) for of in ("gate", "up", "down")
            )
            found |= {f"{start}.gate_up_proj": torch.cat((gate, up), 1), f"{start}.down_proj": down}
        return found

    rewrite(directory, edit)


def kimi_k2_twin(directory: Path, seed: str) -> None:
    from transformers import DeepseekV3Config

    facts = {"q_lora_rank": 36, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_mtp_layers": 0}
    write(directory, seed, DeepseekV3Config(**LATENT | facts, first_k_dense_replace=1))


@define("kimi_k2", heads=8, kv=8, layers=3, twin=kimi_k2_twin, **EXPERTS)
def kimi_k2(directory: Path, seed: str) -> None:
    """DeepSeek-V3 by another name, with the rotary buffers that it was published with."""
    kimi_k2_twin(directory, seed)
    inv_freq = (50000.0 ** -(torch.arange(0, 6, 2) / 6)).to(torch.bfloat16)
    rewrite(
        directory, lambda state: state | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": inv_freq for n in range(3)}
    )
    configure(directory, "num_mtp_layers", model_type="kimi_k2", num_nextn_predict_layers=0)


def grouped(matrix: torch.Tensor, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from -8 to 7 in the place of weights, and a scale for each 32, no two rows of them equal,
    and bf16 has every product.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    shape, scales = (len(matrix), matrix.shape[-1] // 32), torch.zeros(2, 1)
    while not distinct(scales):
        scales = torch.randint(16, 32, shape, generator=generator) * 2.0 ** torch.randint(
            -11, -7, shape, generator=generator
        )
    wide = matrix.float() / scales.repeat_interleave(32, -1)
    return wide.round().clamp(-8, 7), scales


def four_bits(directory: Path, seed: str, apart: bool) -> None:
    """A model whose experts have 4 bits: numbers eight in one and their scales apart, or both multiplied."""
    from transformers import DeepseekV3Config

    facts = {"q_lora_rank": 36, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_mtp_layers": 0}
    facts |= {"hidden_size": 96, "moe_intermediate_size": 256, "n_routed_experts": 4}
    write(directory, seed, DeepseekV3Config(**LATENT | facts, first_k_dense_replace=1))

    def edit(state: State) -> State:
        found = {name: tensor for name, tensor in state.items() if ".experts." not in name}
        for name in state.keys() - found.keys():
            numbers, scales = grouped(state[name], f"{seed} {name}")
            if not apart:
                found[name] = (numbers * scales.repeat_interleave(32, -1)).to(torch.bfloat16)
                continue
            lifted = (numbers.to(torch.int64) + 8).unflatten(-1, (-1, 8))
            found[f"{name}_packed"] = (lifted << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
            found[f"{name}_scale"] = scales.to(torch.bfloat16)
            found[f"{name}_shape"] = torch.tensor(numbers.shape)
        return found

    rewrite(directory, edit)


@define("kimi_k2", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4), twin=partial(four_bits, apart=False))
def kimi_k2_int4(directory: Path, seed: str) -> None:
    """Experts in 4 bits, as Kimi-K2-Thinking and the language model of Kimi-K2.5 are published."""
    four_bits(directory, seed, apart=True)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    how = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    configure(directory, "num_mtp_layers", model_type="kimi_k2", num_nextn_predict_layers=0, quantization_config=how)


@define("glm4_moe_lite", heads=8, kv=8, layers=3, mtp=1, **EXPERTS)
def glm4_moe_lite(directory: Path, seed: str) -> None:
    """DeepSeek-V3 with another norm's epsilon."""
    from transformers import Glm4MoeLiteConfig

    write(directory, seed, Glm4MoeLiteConfig(**LATENT | {"q_lora_rank": 36}))
    rewrite(directory, lambda state: add_mtp(state, seed, 3, torch.bfloat16))
    configure(directory, "rms_norm_eps", num_nextn_predict_layers=1)


@define("phimoe", heads=8, kv=4, layers=3, **EXPERTS)
def phimoe(directory: Path, seed: str) -> None:
    """Norms with biases, biases on attention and head, one expert after another,
    angles of two lists and two factors.
    """
    from transformers import PhimoeConfig

    short, long = [1.0 + at / 10 for at in range(7)], [2.0 + at for at in range(7)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": long,
        "short_mscale": 1.1,
    }
    rope |= {"long_mscale": 1.3, "original_max_position_embeddings": 64}  # beyond these transformers mixes the two
    facts = {
        "attention_bias": True,
        "lm_head_bias": True,
        "num_local_experts": 8,
        "sliding_window": 17,
        "rope_parameters": rope,
    }
    write(directory, seed, PhimoeConfig(**sizes(8, 4, 14, 72, 40, 331, 3), **facts))


@define("phimoe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def phimoe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; no biases but those of norms."""
    from transformers import PhimoeConfig

    write(
        directory, seed, PhimoeConfig(**sizes(8, 2, 14, 72, 40, 331, 3), num_local_experts=8, router_jitter_noise=0.3)
    )
    fuse(directory)


@define("hunyuan_v1_moe", heads=8, kv=4, layers=3, **EXPERTS)
def hunyuan_v1_moe(directory: Path, seed: str) -> None:
    """A shared expert, norms on q and k after their rotation, angles stretched by alpha; numbers listed for each layer,
    as published.
    """
    from transformers import HunYuanMoEV1Config

    write(directory, seed, HunYuanMoEV1Config(**sizes(8, 4, 14, 72, 40, 331, 3), num_experts=8, moe_topk=[3, 3, 3]))
    configure(directory, "rope_parameters", rope_theta=10000.0, rope_scaling=HUNYUAN_ROPE, num_shared_expert=[1, 1, 1])


@define("hunyuan_v1_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def hunyuan_v1_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; tied; biases in attention."""
    from transformers import HunYuanMoEV1Config

    facts = {"num_experts": 8, "moe_topk": 3, "tie_word_embeddings": True, "attention_bias": True}
    write(directory, seed, HunYuanMoEV1Config(**sizes(8, 2, 14, 72, 40, 331, 3), **facts))
    fuse(directory)


def ernie4_5_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import Ernie4_5_MoeConfig

    base = sizes(8, 2, 14, 72, 88, 331, 3) | {
        "num_key_value_heads": kv,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 40,
    }
    return Ernie4_5_MoeConfig(**base, **facts)


def add_ernie_mtp(state: State, seed: str) -> State:
    """What ERNIE 4.5 was published with for predicting one token more: a dense layer like the first,
    and three names beside it.
    """
    first = "model.layers.0."
    found = {
        "model.mtp_block.0." + name.removeprefix(first): tensor
        for name, tensor in state.items()
        if name.startswith(first)
    }
    hidden = state["model.norm.weight"].shape[0]
    found |= {f"model.{name}.0.weight": torch.empty(hidden) for name in ("mtp_emb_norm", "mtp_hidden_norm")}
    found["model.mtp_linear_proj.0.weight"] = torch.empty(hidden, 2 * hidden)
    return state | {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in found.items()}


@define("ernie4_5_moe", heads=8, kv=4, layers=3, mtp=1, **EXPERTS)
def ernie4_5_moe(directory: Path, seed: str) -> None:
    """Tied, layer 0 is dense, experts are chosen by a corrected score; as published with a layer that predicts one
    token more.
    """
    write(directory, seed, ernie4_5_moe_config(4))
    rewrite(directory, lambda state: add_ernie_mtp(state, seed))
    configure(directory, num_nextn_predict_layers=1)


@define("ernie4_5_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def ernie4_5_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; a head of its own, no shared experts."""
    write(directory, seed, ernie4_5_moe_config(2, tie_word_embeddings=False, moe_num_shared_experts=0))
    fuse(directory)


@define("ernie4_5_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def ernie4_5_moe_bias(directory: Path, seed: str) -> None:
    """Biases on all but what experts have, the head's too."""
    write(directory, seed, ernie4_5_moe_config(2, use_bias=True))


def ernie4_5_paddle_twin(directory: Path, seed: str) -> None:
    write(directory, seed, ernie4_5_moe_config(4))


@define("ernie4_5_moe", heads=8, kv=4, layers=3, twin=ernie4_5_paddle_twin, **EXPERTS)
def ernie4_5_paddle(directory: Path, seed: str) -> None:
    """As Paddle stores them: transposed, q, k and v one after another, gate and up too; by another prefix."""
    ernie4_5_paddle_twin(directory, seed)

    def age(state: State) -> State:
        found: State = {}
        for name, tensor in state.items():
            if any(f".{part}_proj." in name for part in ("k", "v", "up")):
                continue
            if ".q_proj." in name:
                tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            if ".gate_proj." in name:
                tensor = torch.cat([tensor, state[name.replace("gate_proj", "up_proj")]])
            name = name.replace("model.", "ernie.").replace("q_proj", "qkv_proj").replace(".gate_proj", ".up_gate_proj")
            found[name] = tensor.T if "_proj." in name or name.endswith("mlp.gate.weight") else tensor
        return found

    rewrite(directory, age)


@define("minimax_m2", heads=8, kv=4, layers=3, **EXPERTS)
def minimax_m2(directory: Path, seed: str) -> None:
    """Norms over all of q and over all of k, a part of each head is rotated: the keys of the published files."""
    from transformers import MiniMaxM2Config

    write(
        directory,
        seed,
        MiniMaxM2Config(**sizes(8, 4, 14, 72, 40, 331, 3), num_local_experts=8, num_experts_per_tok=3, rotary_dim=6),
    )
    configure(directory, "rope_parameters", "partial_rotary_factor", rope_theta=5000000, rotary_dim=6)


@define("minimax_m2", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def minimax_m2_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5."""
    from transformers import MiniMaxM2Config

    write(
        directory, seed, MiniMaxM2Config(**sizes(8, 2, 14, 72, 40, 331, 3), num_local_experts=8, num_experts_per_tok=3)
    )
    fuse(directory)


def dbrx_twin(directory: Path, seed: str) -> None:
    """With the base of the angles where transformers 5 reads it."""
    from transformers import DbrxConfig

    attention = {"clip_qkv": 0.7, "kv_n_heads": 4, "rope_theta": 500000.0}
    experts = {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3, "ffn_act_fn": {"name": "silu"}}
    facts = {
        "attn_config": attention,
        "ffn_config": experts,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    config = DbrxConfig(d_model=112, n_heads=8, n_layers=3, vocab_size=331, max_seq_len=128, **facts)
    write(directory, seed, config)


@define("dbrx", heads=8, kv=4, layers=3, square=(r".*\.out_proj\.weight",), twin=dbrx_twin, **EXPERTS)
def dbrx(directory: Path, seed: str) -> None:
    """Experts one after another in one matrix; q, k and v fused and clipped. Heads times head_dim is hidden,
    by definition.
    """
    dbrx_twin(directory, seed)
    configure(directory, "rope_parameters")


def llama4_config(kv: int, **facts: Any) -> Any:
    from transformers import Llama4TextConfig

    base = sizes(8, 4, 14, 72, 40, 331, 5) | {
        "num_key_value_heads": kv,
        "intermediate_size_mlp": 88,
        "attention_chunk_size": 5,
    }
    return Llama4TextConfig(**base, num_local_experts=8, num_experts_per_tok=2, **facts)


@define("llama4_text", heads=8, kv=4, layers=5, **EXPERTS)
def llama4_text(directory: Path, seed: str) -> None:
    """Experts stacked and transposed, their inputs weighed; chunks, norms without weights,
    a layer without positions.
    """
    write(directory, seed, llama4_config(4, floor_scale=8))
    configure(directory, "layer_types", "moe_layers")


@define("llama4_text", heads=8, kv=2, layers=5, weights=False, **EXPERTS)
def llama4_text_dense(directory: Path, seed: str) -> None:
    """Every second layer is dense; biases in attention, no norms, no growth; as published, no word of layers without
    positions.
    """
    facts = {
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
    }
    write(directory, seed, llama4_config(2, **facts))
    configure(directory, "layer_types", "moe_layers", "no_rope_layers")


@define("solar_open", heads=8, kv=4, layers=3, **EXPERTS)
def solar_open(directory: Path, seed: str) -> None:
    """Every layer has experts, and all of a head is rotated."""
    from transformers import SolarOpenConfig

    facts = {key: value for key, value in SIGMOID.items() if key != "first_k_dense_replace"}
    base = {key: value for key, value in sizes(8, 4, 14, 72, 88, 331, 3).items() if key != "intermediate_size"}
    write(directory, seed, SolarOpenConfig(**base, **facts))


def exaone_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import ExaoneMoeConfig

    base = sizes(8, 2, 14, 72, 88, 331, 5) | {"num_key_value_heads": kv, "sliding_window": 5}
    return ExaoneMoeConfig(**base, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, **facts)


def add_exaone_mtp(state: State, seed: str) -> State:
    """What K-EXAONE was published with for predicting one token more: a dense layer like the first,
    and four names beside it.
    """
    first = "model.layers.0."
    found = {
        "mtp.layers.0." + name.removeprefix(first): tensor for name, tensor in state.items() if name.startswith(first)
    }
    hidden = state["model.norm.weight"].shape[0]
    found |= {
        f"mtp.{name}.weight": torch.empty(hidden) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    found["mtp.fc.weight"] = torch.empty(hidden, 2 * hidden)
    return state | {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in found.items()}


@define("exaone_moe", heads=8, kv=4, layers=5, mtp=1, **EXPERTS)
def exaone_moe(directory: Path, seed: str) -> None:
    """Three layers of four have a window, the others no positions; a layer that predicts one token more."""
    write(directory, seed, exaone_moe_config(4))
    rewrite(directory, lambda state: add_exaone_mtp(state, seed))
    configure(directory, num_nextn_predict_layers=1)


@define("exaone_moe", heads=8, kv=2, layers=5, weights=False, **EXPERTS)
def exaone_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; experts in groups."""
    write(directory, seed, exaone_moe_config(2, n_group=4, topk_group=2))
    fuse(directory)


def afmoe_config(kv: int, **facts: Any) -> Any:
    from transformers import AfmoeConfig

    base = sizes(8, 2, 14, 72, 88, 331, 5) | {"num_key_value_heads": kv, "num_experts": 8, "num_experts_per_tok": 3}
    return AfmoeConfig(**base, moe_intermediate_size=40, route_scale=2.5, sliding_window=5, **facts)


@define("afmoe", heads=8, kv=4, layers=5, **EXPERTS)
def afmoe(directory: Path, seed: str) -> None:
    """Norms before and after attention and feed-forward, attention's output has a gate, layers without a window have no
    positions.
    """
    write(directory, seed, afmoe_config(4, mup_enabled=True))


@define("afmoe", heads=8, kv=2, layers=5, weights=False, **EXPERTS)
def afmoe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; embeddings are not scaled; biases in attention."""
    write(directory, seed, afmoe_config(2, attention_bias=True))
    fuse(directory)


BAILING = {".self_attn.": ".attention.", "o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm"}
BAILING |= {"embed_tokens": "word_embeddings", "gate.e_score_correction_bias": "gate.expert_bias"}


def to_bailing(state: State) -> State:
    """As Ling and Ring are published: q, k and v one after another, and other names."""
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj", "query_key_value")] = torch.cat(parts)
    return renamed(state, BAILING)


def bailing_v2_twin(directory: Path, seed: str) -> None:
    write(
        directory,
        seed,
        glm4_moe_config(4, n_group=4, topk_group=2, use_qk_norm=True, num_mtp_layers=0, rms_norm_eps=1e-6),
    )


def add_bailing_mtp(state: State, seed: str) -> State:
    """Layer 3: a whole layer with experts, and four names beside it."""
    last, extra = "model.layers.2.", "model.layers.3."
    found = {extra + name.removeprefix(last): tensor for name, tensor in state.items() if name.startswith(last)}
    hidden = state["model.norm.weight"].shape[0]
    found |= {f"{extra}{name}.weight": torch.empty(hidden) for name in ("enorm", "hnorm", "final_layernorm")}
    found[f"{extra}eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
    kept = {name: torch.float32 for name in found if name.endswith("expert_bias")}
    return state | {
        name: noise_like(seed, name, tensor, 1.0, kept.get(name, torch.bfloat16)) for name, tensor in found.items()
    }


@define("bailing_moe", heads=8, kv=4, layers=3, mtp=1, twin=bailing_v2_twin, **EXPERTS)
def bailing_v2(directory: Path, seed: str) -> None:
    """The second generation, which is GLM-4.5 by other names; a multi-token prediction layer."""
    bailing_v2_twin(directory, seed)
    rewrite(directory, lambda state: add_bailing_mtp(to_bailing(state), seed))
    changes = {"num_experts": 8, "num_shared_experts": 2, "use_qk_norm": True, "moe_router_enable_expert_bias": True}
    changes |= {
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
    }
    changes |= {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"], "partial_rotary_factor": 0.5}
    configure(
        directory,
        "rope_parameters",
        "n_routed_experts",
        "n_shared_experts",
        "num_mtp_layers",
        rope_theta=10000,
        **changes,
    )


def bailing_twin(directory: Path, seed: str) -> None:
    from transformers import GraniteMoeSharedConfig

    facts = {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 48,
        "attention_multiplier": 14**-0.5,
    }
    write(directory, seed, GraniteMoeSharedConfig(**sizes(8, 4, 14, 72, 24, 331, 3), **facts))


def split_granite(state: State) -> State:
    """Each expert and each part in a tensor of its own."""
    found: State = {}
    for name, tensor in state.items():
        prefix, _, part = name.partition(".block_sparse_moe.")
        prefix, shared = (prefix, False) if part else (name.partition(".shared_mlp.")[0], ".shared_mlp." in name)
        if part == "router.layer.weight":
            found[f"{prefix}.mlp.gate.weight"] = tensor
        elif "input_linear" in name or "output_linear" in name:
            places = [f"{prefix}.mlp.shared_experts"] if shared else [f"{prefix}.mlp.experts.{at}" for at in range(8)]
            for place, each in zip(places, [tensor] if shared else tensor, strict=True):
                kinds = ("gate_proj", "up_proj") if "input_linear" in name else ("down_proj",)
                found |= {
                    f"{place}.{kind}.weight": part for kind, part in zip(kinds, each.chunk(len(kinds)), strict=True)
                }
        else:
            found[name] = tensor
    return found


@define("bailing_moe", heads=8, kv=4, layers=3, twin=bailing_twin, **EXPERTS)
def bailing(directory: Path, seed: str) -> None:
    """The first generation: experts by softmax, every layer has them, no norms on q and k."""
    bailing_twin(directory, seed)
    rewrite(directory, lambda state: to_bailing(split_granite(state)))
    changes = {
        "num_experts": 8,
        "num_shared_experts": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "norm_head": False,
    }
    changes |= {"model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"], "rope_theta": 10000}
    configure(directory, "rope_parameters", "num_local_experts", "shared_intermediate_size", **changes)


# FP8


def by_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F8_E4M3 [out, in] and fp32 [out, 1]: weight = quantized * scale."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scale for each element, of one for each block or row."""
    if scale.shape[1] == 1 and scale.shape[0] == weight.shape[0]:
        return scale
    return scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]


Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
FP8 = r".*\.(self_attn\.[qkvo]_proj|[\w.]*(gate_proj|up_proj|down_proj)|w[123]|shared_head\.head)\.weight"


def to_fp8(state: State, quantizer: Quantizer, suffix: str, back: bool = False) -> State:
    """Matrices of attention and feed-forward in FP8, with their scales; with `back`, what they then stand for."""
    found: State = {}
    for name, tensor in state.items():
        if not re.fullmatch(FP8, name):
            found[name] = tensor if back or name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
            continue
        weight, scale = quantizer(tensor)
        found |= {name: weight.float() * spread(scale, weight)} if back else {name: weight, name + suffix: scale}
    return found


def minimax_m2_fp8_model(directory: Path, seed: str) -> None:
    from transformers import MiniMaxM2Config

    facts = sizes(8, 4, 128, 160, 768, 331, 2) | {"num_local_experts": 4, "num_experts_per_tok": 2}
    write(directory, seed, MiniMaxM2Config(**facts), dtype=torch.float32, shard=None)


def minimax_m2_fp8_twin(directory: Path, seed: str) -> None:
    minimax_m2_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_bfloat16(to_fp8(state, quantize, "", back=True)), shard=2_500_000)


def to_bfloat16(state: State) -> State:
    """What no quantization touches, rounded as it is stored beside FP8."""
    return {
        name: tensor.to(torch.bfloat16).float() if not re.fullmatch(FP8, name) and "correction" not in name else tensor
        for name, tensor in state.items()
    }


@define("minimax_m2", heads=8, kv=4, layers=2, experts=4, tp=(1, 2), ep=(1, 2), weights=False, twin=minimax_m2_fp8_twin)
def minimax_m2_fp8(directory: Path, seed: str) -> None:
    """As published: F8_E4M3, a scale for each block of 128 by 128."""
    minimax_m2_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_fp8(state, quantize, "_scale_inv"), shard=2_500_000)
    configure(directory, dtype="bfloat16", quantization_config=BLOCK_SCALED | {"fmt": "float8_e4m3fn"})


def qwen3_moe_fp8_model(directory: Path, seed: str) -> None:
    from transformers import Qwen3MoeConfig

    facts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "mlp_only_layers": [0],
    }
    write(
        directory, seed, Qwen3MoeConfig(**sizes(8, 2, 128, 320, 768, 331, 3), **facts), dtype=torch.float32, shard=None
    )


def qwen3_moe_fp8_twin(directory: Path, seed: str) -> None:
    qwen3_moe_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_bfloat16(to_fp8(state, quantize, "", back=True)), shard=2_500_000)


@define("qwen3_moe", heads=8, kv=2, layers=3, experts=4, tp=(1, 2), ep=(1, 2), weights=False, twin=qwen3_moe_fp8_twin)
def qwen3_moe_fp8(directory: Path, seed: str) -> None:
    """As published in FP8: a scale for each block of 128 by 128; layer 0 is dense."""
    qwen3_moe_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_fp8(state, quantize, "_scale_inv"), shard=2_500_000)
    configure(directory, dtype="bfloat16", quantization_config=BLOCK_SCALED)


def glm4_moe_fp8_model(directory: Path, seed: str) -> None:
    config = glm4_moe_config(4, attention_bias=True, use_qk_norm=True, num_mtp_layers=0)
    write(directory, seed, config, dtype=torch.float32, shard=None)


def glm4_moe_fp8_twin(directory: Path, seed: str) -> None:
    glm4_moe_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_bfloat16(to_fp8(state, by_rows, "", back=True)))


@define("glm4_moe", heads=8, kv=4, layers=3, mtp=1, twin=glm4_moe_fp8_twin, **EXPERTS)
def glm4_moe_fp8(directory: Path, seed: str) -> None:
    """As GLM-4.5-FP8: F8_E4M3, a scale for each row, also in the multi-token prediction layer."""
    glm4_moe_fp8_model(directory, seed)
    rewrite(directory, lambda state: to_fp8(add_mtp(state, seed, 3, torch.float32), by_rows, "_scale"))
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
    }
    configure(
        directory, "num_mtp_layers", num_nextn_predict_layers=1, dtype="bfloat16", quantization_config=quantization
    )


def jetmoe_config(**facts: Any) -> Any:
    from transformers import JetMoeConfig

    base = {
        key: value
        for key, value in sizes(8, 4, 14, 72, 40, 331, 3).items()
        if key not in ("num_attention_heads", "head_dim")
    }
    return JetMoeConfig(**base, kv_channels=14, num_local_experts=8, num_experts_per_tok=2, **facts)


@define("jetmoe", heads=4, kv=4, layers=3, **EXPERTS)
def jetmoe(directory: Path, seed: str) -> None:
    """Attention has experts too; tied."""
    write(directory, seed, jetmoe_config())


@define("jetmoe", heads=4, kv=4, layers=3, **EXPERTS)
def jetmoe_head(directory: Path, seed: str) -> None:
    """A head of its own."""
    write(directory, seed, jetmoe_config(tie_word_embeddings=False))


def add_longcat_mtp(state: State, seed: str) -> State:
    """What LongCat-Flash was published with for predicting one token more: half a layer,
    and names of its own beside it.
    """
    found: State = {}
    for name, tensor in state.items():
        for old, new in (
            (".self_attn.1.", ".self_attn."),
            (".mlps.1.", ".transformer_layer.mlp."),
            ("_layernorm.1.", "_layernorm."),
        ):
            if name.startswith("model.layers.0.") and old in name:
                found[name.replace("model.layers.0.", "model.mtp.layers.0.").replace(old, new)] = tensor
    hidden = state["model.norm.weight"].shape[0]
    found |= {
        f"model.mtp.{name}.weight": torch.empty(hidden) for name in ("norm", "layers.0.enorm.m", "layers.0.hnorm.m")
    }
    found |= {"model.mtp.layers.0.eh_proj.weight": torch.empty(hidden, 2 * hidden)}
    found |= {"model.mtp.embed_tokens.weight": torch.empty_like(state["model.embed_tokens.weight"])}
    return state | {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in found.items()}


LONGCAT = {"heads": 8, "kv": 8, "layers": 6, "runs": False, "experts": 4}


def write_longcat(directory: Path, seed: str) -> None:
    from transformers import LongcatFlashConfig

    facts: dict[str, Any] = {
        "vocab_size": 331,
        "hidden_size": 56,
        "ffn_hidden_size": 88,
        "num_layers": 3,
        "num_attention_heads": 8,
    }
    facts |= {
        "q_lora_rank": 36,
        "kv_lora_rank": 28,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "head_dim": 6,
    }
    facts |= {"moe_topk": 3, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 40}
    write(directory, seed, LongcatFlashConfig(**facts))


@define("longcat_flash", mtp=1, ep=(1, 2, 4), **LONGCAT)
def longcat_flash(directory: Path, seed: str) -> None:
    """Each layer is two, as it was published: without what transformers writes for experts that do nothing."""
    write_longcat(directory, seed)
    unused = re.compile(r".*\.experts\.[45]\..*")
    rewrite(directory, lambda state: {k: t for k, t in add_longcat_mtp(state, seed).items() if not unused.fullmatch(k)})
    configure(directory, num_nextn_predict_layers=1)


@define("longcat_flash", **LONGCAT)
def longcat_flash_idle(directory: Path, seed: str) -> None:
    """As transformers writes it: experts that do nothing have weights, too, which are kept aside."""
    write_longcat(directory, seed)
