"""Decoders whose layers choose the tokens that they attend to."""

from pathlib import Path
from typing import Any

import torch
from fixtures import BLOCK, DEEPSEEK, QUANTIZED, State, add_mtp, configure, define, quantize, rewrite, write

LATENT: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 56, "q_lora_rank": 36, "kv_lora_rank": 28}
LATENT |= {"qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "intermediate_size": 104, "moe_intermediate_size": 40}
LATENT |= {"index_n_heads": 6, "index_head_dim": 16, "index_topk": 7, "first_k_dense_replace": 1, "num_mtp_layers": 0}


@define("deepseek_v32", heads=8, kv=8, layers=3, experts=4, mtp=1, ep=(1, 2, 4))
def deepseek_v32(directory: Path, seed: str) -> None:
    """Each layer has an indexer, and sees seven tokens; layer 0 dense; one multi-token prediction layer."""
    from transformers import DeepseekV32Config

    write(directory, seed, DeepseekV32Config(**DEEPSEEK, **LATENT, num_hidden_layers=3))
    rewrite(directory, lambda state: add_mtp(state, seed, 3, torch.bfloat16))
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("deepseek_v32", heads=8, kv=8, layers=2, experts=4, ep=(1, 2, 4), tp=(1, 2, 4), runs=False)
def deepseek_v32_fp8(directory: Path, seed: str) -> None:
    """As DeepSeek-V3.2: the projections of the indexers are block-scaled too, the weights of their heads are not."""
    from transformers import DeepseekV32Config

    sizes: dict[str, Any] = {"hidden_size": 160, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    sizes |= {"v_head_dim": 256, "intermediate_size": 2560, "moe_intermediate_size": 512, "index_head_dim": 96}
    write(directory, seed, DeepseekV32Config(**DEEPSEEK, **LATENT | sizes, num_hidden_layers=2), dtype=torch.float32)

    def to_fp8(state: State) -> State:
        result = {}
        for name, tensor in state.items():
            if QUANTIZED.fullmatch(name) or name.endswith((".wq_b.weight", ".wk.weight")):
                result[name], result[name + "_scale_inv"] = quantize(tensor)
            else:
                result[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        return result

    rewrite(directory, to_fp8, shard=2_500_000)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=0, dtype="bfloat16", quantization_config=quantization)


@define("glm_moe_dsa", heads=8, kv=8, layers=4, experts=4, mtp=1, ep=(1, 2, 4))
def glm_moe_dsa(directory: Path, seed: str) -> None:
    """As GLM-5: the multi-token prediction layer shares embedding and head; layer 1 sees what layer 0 chose."""
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(**DEEPSEEK, **LATENT, num_hidden_layers=4, indexer_types=["full", "shared", "full", "full"])
    write(directory, seed, config)

    def age(state: State) -> State:
        shared = ("layers.4.embed_tokens.weight", "layers.4.shared_head.head.weight")
        return {name: tensor for name, tensor in add_mtp(state, seed, 4, torch.bfloat16).items() if not name.endswith(shared)}

    rewrite(directory, age)
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("glm_moe_dsa", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4))
def glm_moe_dsa_each(directory: Path, seed: str) -> None:
    """An indexer in every layer, as published."""
    from transformers import GlmMoeDsaConfig

    write(directory, seed, GlmMoeDsaConfig(**DEEPSEEK, **LATENT, num_hidden_layers=3))
