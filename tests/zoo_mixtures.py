"""Decoders with mixtures of experts: one tiny checkpoint for each variant of each family."""

from pathlib import Path
from typing import Any

import torch
from fixtures import DEEPSEEK, SHARD, add_mtp, configure, define, rewrite, sizes, write

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
    """In the names of transformers 5; layer 1 is dense."""
    from transformers import Qwen3MoeConfig

    facts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
    write(directory, seed, Qwen3MoeConfig(**sizes(8, 4, 14, 72, 88, 331, 3), **facts))
    fuse(directory)


@define("deepseek_v3", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4))
def deepseek_v3_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; layer 0 is dense."""
    from transformers import DeepseekV3Config

    facts: dict[str, Any] = {"hidden_size": 56, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    facts |= {"q_lora_rank": 36, "kv_lora_rank": 28, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
    facts |= {"intermediate_size": 104, "moe_intermediate_size": 40, "first_k_dense_replace": 1, "num_mtp_layers": 0}
    write(directory, seed, DeepseekV3Config(**DEEPSEEK, **facts))
    fuse(directory)


def qwen2_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import Qwen2MoeConfig

    base = sizes(8, 2, 14, 72, 88, 331, 3) | {"num_key_value_heads": kv}
    base |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48}
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
    """In the names of transformers 5; queries, keys and values are clipped, weights of experts normalized."""
    write(directory, seed, olmoe_config(clip_qkv=0.7, norm_topk_prob=True))
    fuse(directory)


SIGMOID: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 40}
SIGMOID |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}


@define("dots1", heads=8, kv=4, layers=3, **EXPERTS)
def dots1(directory: Path, seed: str) -> None:
    """Experts are chosen by a corrected score; layer 0 is dense, and the last layer has a window."""
    from transformers import Dots1Config

    write(directory, seed, Dots1Config(**sizes(8, 4, 14, 72, 88, 331, 3), **SIGMOID, sliding_window=7, max_window_layers=2))
    configure(directory, "layer_types")


def glm4_moe_config(kv: int, **facts: Any) -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(**sizes(8, 2, 12, 72, 88, 331, 3) | {"num_key_value_heads": kv}, **SIGMOID | facts)


@define("glm4_moe", heads=8, kv=4, layers=3, mtp=1, **EXPERTS)
def glm4_moe(directory: Path, seed: str) -> None:
    """As GLM-4.5: bias on q, k and v, norms on q and k, half of each head is rotated; a multi-token prediction layer."""
    write(directory, seed, glm4_moe_config(4, attention_bias=True, use_qk_norm=True, num_mtp_layers=0))
    rewrite(directory, lambda state: add_mtp(state, seed, 3, torch.bfloat16))
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("glm4_moe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def glm4_moe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; no biases, no norms; experts in groups."""
    write(directory, seed, glm4_moe_config(2, n_group=4, topk_group=2, num_mtp_layers=0))
    fuse(directory)


GRANITE: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 3, "tie_word_embeddings": True, "embedding_multiplier": 12.0}
GRANITE |= {"attention_multiplier": 0.3, "residual_multiplier": 0.22, "logits_scaling": 8.0}


@define("granitemoe", heads=8, kv=4, layers=3, **EXPERTS)
def granitemoe(directory: Path, seed: str) -> None:
    """Experts are stacked as published; tied; what granite scales is scaled."""
    from transformers import GraniteMoeConfig

    write(directory, seed, GraniteMoeConfig(**sizes(8, 4, 14, 72, 40, 331, 3), **GRANITE))


@define("granitemoe", heads=8, kv=2, layers=3, weights=False, **EXPERTS)
def granitemoe_fused(directory: Path, seed: str) -> None:
    """In the names of transformers 5; a head of its own."""
    from transformers import GraniteMoeConfig

    write(directory, seed, GraniteMoeConfig(**sizes(8, 2, 14, 72, 40, 331, 3), **GRANITE | {"tie_word_embeddings": False}))
    fuse(directory)


@define("granitemoeshared", heads=8, kv=4, layers=3, **EXPERTS)
def granitemoeshared(directory: Path, seed: str) -> None:
    """A shared expert beside the others, gate and up fused."""
    from transformers import GraniteMoeSharedConfig

    write(directory, seed, GraniteMoeSharedConfig(**sizes(8, 4, 14, 72, 40, 331, 3), **GRANITE, shared_intermediate_size=48))
