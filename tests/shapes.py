"""Headers of published models, written down from their configs: name → dtype and shape, no files. Knows nothing of
`reshard`.
"""

from typing import Any, NamedTuple


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


Headers = dict[str, Stored]
Config = dict[str, Any]

LLAMA_70B: Config = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}

GEMMA2_27B: Config = {
    "model_type": "gemma2",
    "hidden_size": 4608,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 36864,
    "vocab_size": 256000,
    "sliding_window": 4096,
}

DEEPSEEK_V3: Config = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}

DEEPSEEK_V4: Config = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "head_dim": 512,
    "o_lora_rank": 1024,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}

DEEPSEEK_V4_FLASH: Config = DEEPSEEK_V4 | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}

DEEPSEEK_V4_DSPARK: Config = DEEPSEEK_V4_FLASH | {
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_target_layer_ids": [40, 41, 42],
}

DEEPSEEK_V4_PRO: Config = DEEPSEEK_V4 | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}

FP8 = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
}


def llama(config: Config) -> Headers:
    """Llama and what is spelled like it: embeddings, per layer q k v o, gate up down and two norms."""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", config["model_type"] == "gemma2"):
        shapes["lm_head.weight"] = (vocab, hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{norm}.weight": (hidden,) for norm in norms}
        shapes |= {
            f"{at}self_attn.q_proj.weight": (heads, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, heads),
            f"{at}mlp.gate_proj.weight": (inter, hidden),
            f"{at}mlp.up_proj.weight": (inter, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inter),
        }
    return {name: Stored("BF16", shape) for name, shape in shapes.items()}


def deepseek_v3(config: Config) -> Headers:
    """DeepSeek-V3 as published: layer 61 is the multi-token prediction, linear layers in FP8 have an fp32 scale per 128
    × 128.
    """
    fp8 = "quantization_config" in config
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    q_lora, kv_lora, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v_dim, experts = config["qk_nope_head_dim"], config["v_head_dim"], config["n_routed_experts"]
    found: Headers = {}

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        found[f"{name}"] = Stored(dtype, shape)

    def linear(name: str, out: int, into: int) -> None:
        plain(f"{name}.weight", out, into, dtype="F8_E4M3" if fp8 else "BF16")
        if fp8:
            plain(f"{name}.weight_scale_inv", -(-out // 128), -(-into // 128), dtype="F32")

    def mlp(name: str, inter: int) -> None:
        linear(f"{name}.gate_proj", inter, hidden)
        linear(f"{name}.up_proj", inter, hidden)
        linear(f"{name}.down_proj", hidden, inter)

    plain("model.embed_tokens.weight", vocab, hidden)
    plain("model.norm.weight", hidden)
    plain("lm_head.weight", vocab, hidden)
    main = config["num_hidden_layers"]
    for layer in range(main + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}."
        plain(f"{at}input_layernorm.weight", hidden)
        plain(f"{at}post_attention_layernorm.weight", hidden)
        linear(f"{at}self_attn.q_a_proj", q_lora, hidden)
        plain(f"{at}self_attn.q_a_layernorm.weight", q_lora)
        linear(f"{at}self_attn.q_b_proj", heads * (nope + rope), q_lora)
        linear(f"{at}self_attn.kv_a_proj_with_mqa", kv_lora + rope, hidden)
        plain(f"{at}self_attn.kv_a_layernorm.weight", kv_lora)
        linear(f"{at}self_attn.kv_b_proj", heads * (nope + v_dim), kv_lora)
        linear(f"{at}self_attn.o_proj", hidden, heads * v_dim)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}mlp", config["intermediate_size"])
        else:
            plain(f"{at}mlp.gate.weight", experts, hidden)
            plain(f"{at}mlp.gate.e_score_correction_bias", experts, dtype="F32")
            mlp(f"{at}mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
            for expert in range(experts):
                mlp(f"{at}mlp.experts.{expert}", config["moe_intermediate_size"])
        if layer >= main:
            plain(f"{at}enorm.weight", hidden)
            plain(f"{at}hnorm.weight", hidden)
            plain(f"{at}eh_proj.weight", hidden, 2 * hidden)
            plain(f"{at}embed_tokens.weight", vocab, hidden)
            plain(f"{at}shared_head.norm.weight", hidden)
            plain(f"{at}shared_head.head.weight", vocab, hidden)
    return found


def deepseek_v4(config: Config) -> Headers:
    """DeepSeek-V4 as published: FP8 with a scale of a power of two per 128 × 128, experts in FP4, two to a byte,
    with a scale per 32.
    """
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q_lora, o_groups, o_lora = config["q_lora_rank"], config["o_groups"], config["o_groups"] * config["o_lora_rank"]
    inter, experts, streams = config["moe_intermediate_size"], config["n_routed_experts"], config["hc_mult"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    found: Headers = {}

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        found[name] = Stored(dtype, shape)

    def linear(name: str, out: int, into: int) -> None:
        plain(f"{name}.weight", out, into, dtype="F8_E4M3")
        plain(f"{name}.scale", -(-out // 128), -(-into // 128), dtype="F8_E8M0")

    def mixed(name: str, out: int, parts: int | None) -> None:
        plain(f"{name}_fn", out, streams * hidden, dtype="F32")
        plain(f"{name}_base", out, dtype="F32")
        plain(f"{name}_scale", parts or 1, dtype="F32")

    def pooled(name: str, tokens: int, features: int) -> None:
        series = 2 if tokens == 4 else 1
        plain(f"{name}.ape", tokens, series * features, dtype="F32")
        plain(f"{name}.norm.weight", features)
        plain(f"{name}.wgate.weight", series * features, hidden)
        plain(f"{name}.wkv.weight", series * features, hidden)

    plain("embed.weight", config["vocab_size"], hidden)
    plain("norm.weight", hidden)
    plain("head.weight", config["vocab_size"], hidden)
    mixed("hc_head", streams, None)
    main = config["num_hidden_layers"]
    for layer, tokens in enumerate(config["compress_ratios"]):
        at = f"layers.{layer}." if layer < main else f"mtp.{layer - main}."
        plain(f"{at}attn.attn_sink", heads, dtype="F32")
        plain(f"{at}attn.q_norm.weight", q_lora)
        plain(f"{at}attn.kv_norm.weight", head_dim)
        linear(f"{at}attn.wq_a", q_lora, hidden)
        linear(f"{at}attn.wq_b", heads * head_dim, q_lora)
        linear(f"{at}attn.wkv", head_dim, hidden)
        linear(f"{at}attn.wo_a", o_lora, heads * head_dim // o_groups)
        linear(f"{at}attn.wo_b", hidden, o_lora)
        if tokens:
            pooled(f"{at}attn.compressor", tokens, head_dim)
        if tokens == 4:
            pooled(f"{at}attn.indexer.compressor", tokens, index_dim)
            plain(f"{at}attn.indexer.weights_proj.weight", index_heads, hidden)
            linear(f"{at}attn.indexer.wq_b", index_heads * index_dim, q_lora)
        for part in ("attn", "ffn"):
            plain(f"{at}{part}_norm.weight", hidden)
            mixed(f"{at}hc_{part}", (2 + streams) * streams, 3)
        plain(f"{at}ffn.gate.weight", experts, hidden)
        if layer < config["num_hash_layers"]:
            plain(f"{at}ffn.gate.tid2eid", config["vocab_size"], config["num_experts_per_tok"], dtype="I64")
        else:
            plain(f"{at}ffn.gate.bias", experts, dtype="F32")
        for name, out, into in (("w1", inter, hidden), ("w2", hidden, inter), ("w3", inter, hidden)):
            linear(f"{at}ffn.shared_experts.{name}", out, into)
            for expert in range(experts):
                plain(f"{at}ffn.experts.{expert}.{name}.weight", out, into // 2, dtype="I8")
                plain(f"{at}ffn.experts.{expert}.{name}.scale", out, into // 32, dtype="F8_E8M0")
        if layer >= main and "dspark_block_size" not in config:
            linear(f"{at}e_proj", hidden, hidden)
            linear(f"{at}h_proj", hidden, hidden)
            mixed(f"{at}hc_head", streams, None)
            for norm in ("enorm", "hnorm", "norm"):
                plain(f"{at}{norm}.weight", hidden)
    if "dspark_block_size" in config:
        rank = config["dspark_markov_rank"]
        linear("mtp.0.main_proj", hidden, len(config["dspark_target_layer_ids"]) * hidden)
        plain("mtp.0.main_norm.weight", hidden)
        plain("mtp.2.markov_head.markov_w1.weight", config["vocab_size"], rank)
        plain("mtp.2.markov_head.markov_w2.weight", config["vocab_size"], rank)
        plain("mtp.2.confidence_head.proj.weight", 1, hidden + rank)
        mixed("mtp.2.hc_head", streams, None)
        plain("mtp.2.norm.weight", hidden)
    return found
