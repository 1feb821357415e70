"""Decoders whose layers choose the tokens that they attend to."""

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from fixtures import (
    BLOCK,
    BLOCK_SCALED,
    DEEPSEEK,
    State,
    add_mtp,
    configure,
    define,
    in_blocks,
    noise_like,
    quantize,
    rewrite,
    write,
)

# Many heads in an indexer: what none of them finds is worth exactly nothing, and among such columns any choice is as
# good.
LATENT: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_size": 56,
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
}
LATENT |= {
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "intermediate_size": 104,
    "moe_intermediate_size": 40,
}
LATENT |= {"index_n_heads": 20, "index_head_dim": 16, "index_topk": 7, "first_k_dense_replace": 1, "num_mtp_layers": 0}


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

    sizes: dict[str, Any] = {
        "hidden_size": 160,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
    }
    sizes |= {"v_head_dim": 256, "intermediate_size": 2560, "moe_intermediate_size": 512, "index_head_dim": 96}
    write(directory, seed, DeepseekV32Config(**DEEPSEEK, **LATENT | sizes, num_hidden_layers=2), dtype=torch.float32)

    rewrite(directory, lambda state: in_blocks(state, ".wq_b.weight", ".wk.weight"), shard=2_500_000)
    configure(
        directory, "num_mtp_layers", num_nextn_predict_layers=0, dtype="bfloat16", quantization_config=BLOCK_SCALED
    )


@define("glm_moe_dsa", heads=8, kv=8, layers=4, experts=4, mtp=1, ep=(1, 2, 4))
def glm_moe_dsa(directory: Path, seed: str) -> None:
    """As GLM-5: the multi-token prediction layer shares embedding and head; layer 1 sees what layer 0 chose."""
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(
        **DEEPSEEK, **LATENT, num_hidden_layers=4, indexer_types=["full", "shared", "full", "full"]
    )
    write(directory, seed, config)

    def age(state: State) -> State:
        shared = ("layers.4.embed_tokens.weight", "layers.4.shared_head.head.weight")
        return {
            name: tensor
            for name, tensor in add_mtp(state, seed, 4, torch.bfloat16).items()
            if not name.endswith(shared)
        }

    rewrite(directory, age)
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("glm_moe_dsa", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4))
def glm_moe_dsa_each(directory: Path, seed: str) -> None:
    """An indexer in every layer, as published."""
    from transformers import GlmMoeDsaConfig

    write(directory, seed, GlmMoeDsaConfig(**DEEPSEEK, **LATENT, num_hidden_layers=3))


V4: dict[str, Any] = {
    "vocab_size": 331,
    "num_attention_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
}
V4 |= {
    "index_n_heads": 20,
    "index_topk": 7,
    "sliding_window": 9,
    "o_groups": 4,
    "hc_mult": 3,
    "num_nextn_predict_layers": 0,
}
V4 |= {
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEAR, SPARSE, POOLED = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def listed(state: State, seed: str) -> State:
    """The same tensors, those that list the experts of each token with no two rows alike."""
    for name in [name for name in state if name.endswith("tid2eid")]:
        vocab, top = state[name].shape
        numbers = torch.randperm(
            8**top, generator=torch.Generator().manual_seed(len(seed + name) + int(name.split(".")[-4]))
        )[:vocab]
        state[name] = numbers[:, None] // 8 ** torch.arange(top) % 8
    return state


@define("deepseek_v4", heads=8, kv=1, layers=4, experts=8, ep=(1, 2, 4))
def deepseek_v4(directory: Path, seed: str) -> None:
    """As transformers writes it. Layer 0 sees a window; 1 and 3 also what an indexer chooses of the entries that are
    made of four tokens each; 2 all entries, of eight. A list says the experts of a token in layers 0 and 1."""
    from transformers import DeepseekV4Config

    sizes: dict[str, Any] = {
        "hidden_size": 56,
        "head_dim": 20,
        "q_lora_rank": 36,
        "o_lora_rank": 12,
        "moe_intermediate_size": 40,
    }
    sizes |= {"num_hidden_layers": 4, "layer_types": [NEAR, SPARSE, POOLED, SPARSE], "index_head_dim": 16}
    write(directory, seed, DeepseekV4Config(**V4, **sizes, mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"]))
    rewrite(directory, lambda state: listed(state, seed))


V4_FP8 = re.compile(r".*\.(wq_a|wq_b|wkv|wo_a|wo_b|e_proj|h_proj|main_proj|shared_experts\.w[123])\.weight")


def to_v4(state: State, seed: str, dspark: bool = False) -> State:
    """As DeepSeek-V4-Flash: its own names, one layer that predicts ahead, FP8 with scales that are powers of two,
    experts in FP4; or a drafter of three such layers."""
    found: State = {}
    for name, tensor in listed(state, seed).items():
        name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        found[name.replace(".attn.norm.", ".attn.kv_norm.")] = tensor
    last, hidden = "layers.2.", found["norm.weight"].numel()
    block, count = (
        {name.removeprefix(last): tensor for name, tensor in found.items() if name.startswith(last)},
        3 if dspark else 1,
    )
    like = {f"mtp.{number}.{name}": tensor for number in range(count) for name, tensor in block.items()}
    like |= {
        f"mtp.{count - 1}.{name}": found[name]
        for name in ("hc_head_base", "hc_head_fn", "hc_head_scale", "norm.weight")
    }
    if dspark:
        like |= {
            "mtp.0.main_norm.weight": torch.empty(hidden),
            "mtp.0.main_proj.weight": torch.empty(hidden, 3 * hidden),
        }
        like |= {
            f"mtp.2.markov_head.markov_w{number}.weight": torch.empty(found["embed.weight"].shape[0], 24)
            for number in (1, 2)
        }
        like["mtp.2.confidence_head.proj.weight"] = torch.empty(1, hidden + 24)
    else:
        like |= {f"mtp.0.{part}norm.weight": torch.empty(hidden) for part in "eh"}
        like |= {f"mtp.0.{part}_proj.weight": torch.empty(hidden, hidden) for part in "eh"}
    found |= {name: noise_like(seed, name, tensor, 1.0, torch.float32) for name, tensor in like.items()}
    result: State = {}
    for name, tensor in found.items():
        scale, draw = (
            name.removesuffix("weight") + "scale",
            torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())),
        )
        if ".experts." in name:
            rows, columns = tensor.shape
            result[name] = torch.randint(-128, 128, (rows, columns // 2), generator=draw).to(torch.int8)
            shape = rows, columns // 32
        elif V4_FP8.fullmatch(name) and ".compressor." not in name:
            result[name] = quantize(tensor)[0]
            shape = tuple(-(-size // BLOCK) for size in tensor.shape)
        else:
            plain = name.endswith(("weight",)) and not name.endswith("tid2eid")
            result[name] = tensor.to(torch.bfloat16) if plain else tensor
            continue
        result[scale] = torch.randint(30, 220, shape, generator=draw, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return result


@define(
    "deepseek_v4",
    heads=8,
    kv=1,
    layers=3,
    experts=8,
    mtp=1,
    tp=(1, 2, 4),
    ep=(1, 2, 4),
    square=(r"mtp\.0\.[eh]_proj\.(weight|scale)",),
)
def deepseek_v4_fp8(directory: Path, seed: str) -> None:
    """As published: what layers see by how many tokens make an entry. TP 8 would fall inside blocks,
    and cut the groups of outputs.
    """
    write_v4(directory, seed, False)


@define("deepseek_v4", heads=8, kv=1, layers=3, experts=8, mtp=3, tp=(1, 2, 4), ep=(1, 2, 4))
def deepseek_v4_dspark(directory: Path, seed: str) -> None:
    """As DeepSeek-V4-Flash-0731: with a drafter of several tokens."""
    write_v4(directory, seed, True)
    drafter: dict[str, Any] = {"dspark_block_size": 5, "dspark_markov_rank": 24, "dspark_target_layer_ids": [0, 1, 2]}
    configure(directory, compress_ratios=[4, 128, 0, 0, 0, 0], **drafter)


def write_v4(directory: Path, seed: str, dspark: bool) -> None:
    """As published, with a layer that predicts ahead, or with a drafter."""
    from transformers import DeepseekV4Config

    sizes: dict[str, Any] = {
        "hidden_size": 160,
        "head_dim": 64,
        "q_lora_rank": 384,
        "o_lora_rank": 128,
        "moe_intermediate_size": 512,
    }
    sizes |= {"num_hidden_layers": 3, "layer_types": [SPARSE, POOLED, NEAR], "index_head_dim": 32}
    sizes |= {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}}
    write(
        directory, seed, DeepseekV4Config(**V4 | sizes, mlp_layer_types=["hash_moe", "moe", "moe"]), dtype=torch.float32
    )
    rewrite(directory, lambda state: to_v4(state, seed, dspark), shard=2_500_000)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "scale_fmt": "ue8m0"}
    changes: dict[str, Any] = {"compress_ratios": [4, 128, 0, 0], "num_hash_layers": 1, "num_nextn_predict_layers": 1}
    configure(
        directory, "layer_types", "mlp_layer_types", "compress_rates", **changes, quantization_config=quantization
    )
