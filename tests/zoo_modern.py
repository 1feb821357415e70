"""Decoders whose layers differ among themselves in the sizes of their heads, or attend to a choice of tokens: one for each variant."""

from pathlib import Path
from typing import Any

from fixtures import configure, define, sizes, write

NEAR, FULL = "sliding_attention", "full_attention"


@define("gemma4_text", heads=8, kv=2, layers=6, weights=False)
def gemma4_text(directory: Path, seed: str) -> None:
    """Layers without a window have larger heads; the last three look up keys and values of earlier ones, and are twice as wide."""
    from transformers import Gemma4TextConfig

    facts: dict[str, Any] = {
        "layer_types": [NEAR, NEAR, FULL, NEAR, NEAR, FULL],
        "global_head_dim": 20,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 341,
        "sliding_window": 5,
    }
    write(directory, seed, Gemma4TextConfig(**sizes(8, 2, 14, 72, 88, 331, 6), **facts))


@define("gemma4_text", heads=8, kv=4, layers=3, experts=4, ep=(1, 2, 4), weights=False)
def gemma4_moe(directory: Path, seed: str) -> None:
    """Values that are the keys, fewer of them in layers without a window; experts beside a dense feed-forward; keys as published."""
    from transformers import Gemma4TextConfig

    facts: dict[str, Any] = {
        "layer_types": [NEAR, NEAR, FULL],
        "global_head_dim": 20,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 5,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": False,
    }
    write(directory, seed, Gemma4TextConfig(**sizes(8, 4, 10, 72, 88, 331, 3), **facts))
    configure(directory, "per_layer_config", global_head_dim=20, num_global_key_value_heads=2)
