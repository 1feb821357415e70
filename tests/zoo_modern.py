"""Decoders whose layers differ among themselves in the sizes of their heads, or attend to a choice of tokens:
one for each variant.
"""

from pathlib import Path
from typing import Any

import torch
from fixtures import BLOCK_SCALED, State, configure, define, floats, noise_like, quantize, rewrite, sizes, write

NEAR, FULL = "sliding_attention", "full_attention"


@define("gemma4_text", heads=8, kv=2, layers=6, weights=False)
def gemma4_text(directory: Path, seed: str) -> None:
    """Layers without a window have larger heads; the last three look up keys and values of earlier ones,
    are twice as wide; biases.
    """
    from transformers import Gemma4TextConfig

    facts: dict[str, Any] = {
        "layer_types": [NEAR, NEAR, FULL, NEAR, NEAR, FULL],
        "global_head_dim": 20,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 341,
        "sliding_window": 5,
        "attention_bias": True,
    }
    write(directory, seed, Gemma4TextConfig(**sizes(8, 2, 14, 72, 88, 331, 6), **facts))


@define("gemma4_text", heads=8, kv=4, layers=3, experts=4, ep=(1, 2, 4), weights=False)
def gemma4_moe(directory: Path, seed: str) -> None:
    """Values that are the keys, fewer of them in layers without a window; experts beside a dense feed-forward;
    keys as published.
    """
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


MIMO: dict[str, Any] = {
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "sliding_window": 6,
}


@define("mimo_v2_flash", heads=8, kv=2, layers=4, experts=4, ep=(1, 2, 4), weights=False)
def mimo_v2_flash(directory: Path, seed: str) -> None:
    """Layers with a window have twice the key heads, and sinks; values are narrower than keys; layer 0 dense."""
    from transformers import MiMoV2FlashConfig

    facts: dict[str, Any] = {"layer_types": [FULL, NEAR, NEAR, FULL]}
    write(directory, seed, MiMoV2FlashConfig(**sizes(8, 2, 14, 72, 88, 331, 4) | MIMO | facts))


@define("mimo_v2_flash", heads=8, kv=2, layers=2, experts=4, ep=(1, 2, 4), weights=False)
def mimo_v2_flash_stacked(directory: Path, seed: str) -> None:
    """Experts stacked, as transformers holds them, and sinks by its name; biases of q, k and v."""
    from transformers import MiMoV2FlashConfig

    facts: dict[str, Any] = {
        "layer_types": [FULL, NEAR],
        "mlp_layer_types": ["sparse", "sparse"],
        "attention_bias": True,
    }
    facts["num_hidden_layers"] = 2
    write(directory, seed, MiMoV2FlashConfig(**sizes(8, 2, 14, 72, 88, 331, 3) | MIMO | facts))

    def stack(state: State) -> State:
        for layer in range(2):
            mlp = f"model.layers.{layer}.mlp.experts."
            parts = [
                [state.pop(f"{mlp}{expert}.{part}_proj.weight") for expert in range(4)]
                for part in ("gate", "up", "down")
            ]
            gate, up, state[mlp + "down_proj"] = map(torch.stack, parts)
            state[mlp + "gate_up_proj"] = torch.cat((gate, up), 1)
        return {name.replace("attention_sink_bias", "sinks"): tensor for name, tensor in state.items()}

    rewrite(directory, stack)


def write_mimo_fp8(directory: Path, seed: str) -> None:
    """Float8, as published, with three layers that predict ahead; config.json as transformers has it."""
    from transformers import MiMoV2FlashConfig

    facts: dict[str, Any] = {"head_dim": 256, "v_head_dim": 128, "hidden_size": 160, "intermediate_size": 1024}
    facts |= {"moe_intermediate_size": 512, "layer_types": [FULL, NEAR], "num_hidden_layers": 2}
    write(directory, seed, MiMoV2FlashConfig(**sizes(8, 2, 14, 72, 88, 331, 3) | MIMO | facts), dtype=torch.float32)

    def to_fp8(state: State) -> State:
        like: State = {}
        for number in range(3):
            ahead, hidden = f"model.mtp.layers.{number}.", facts["hidden_size"]
            for part in ("self_attn.", "input_layernorm."):
                like |= {
                    ahead + n.partition("layers.1.")[2]: t
                    for n, t in state.items()
                    if n.startswith(f"model.layers.1.{part}")
                }
            like |= {
                ahead + n.partition("layers.0.")[2]: t for n, t in state.items() if n.startswith("model.layers.0.mlp.")
            }
            like |= {
                f"{ahead}{norm}.weight": torch.empty(hidden)
                for norm in ("enorm", "hnorm", "pre_mlp_layernorm", "final_layernorm")
            }
            like[ahead + "eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
        state |= {name: noise_like(seed, name, tensor, 1.0, torch.float32) for name, tensor in like.items()}
        result: State = {}
        for name, tensor in state.items():
            if name.endswith("_proj.weight") and not name.endswith(("o_proj.weight", "eh_proj.weight")):
                result[name], result[name + "_scale_inv"] = quantize(tensor)
            else:
                result[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        return result

    rewrite(directory, to_fp8, shard=2_500_000)


def mimo_twin(directory: Path, seed: str) -> None:
    """As transformers has it without FP8."""
    write_mimo_fp8(directory, seed)
    rewrite(directory, floats, shard=2_500_000)


MIMO_FP8: dict[str, Any] = {
    "layers": 2,
    "mtp": 3,
    "tp": (1, 2, 4),
    "square": (r"model\.layers\.0\.self_attn\.v_proj\.weight_scale_inv",),
}


@define("mimo_v2_flash", heads=8, kv=2, experts=4, ep=(1, 2, 4), weights=False, twin=mimo_twin, **MIMO_FP8)
def mimo_v2_flash_fp8(directory: Path, seed: str) -> None:
    """As published: FP8 but for the outputs of attention, sizes of layers with a window by keys of their own, and
    layers that predict ahead, which nothing announces. TP 8 would fall inside blocks."""
    write_mimo_fp8(directory, seed)
    near: dict[str, Any] = {
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 256,
        "swa_v_head_dim": 128,
    }
    near |= {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": 1e-5,
    }
    near |= {"sliding_window_size": 5, "rope_theta": 5000000, "swa_rope_theta": 10000, "partial_rotary_factor": 0.334}
    configure(
        directory,
        "layer_types",
        "mlp_layer_types",
        "rope_parameters",
        "rms_norm_eps",
        **near,
        dtype="bfloat16",
        quantization_config=BLOCK_SCALED,
    )
