"""Decoders with mixtures of experts: one tiny checkpoint for each variant of each family."""

from pathlib import Path
from typing import Any

import torch
from fixtures import DEEPSEEK, SHARD, define, sizes, write

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
