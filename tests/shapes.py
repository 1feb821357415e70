"""Headers of published models, written down from their configs: name → dtype and shape, no files. Knows nothing of `reshard`."""

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

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}


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
    """DeepSeek-V3 as published: layer 61 is the multi-token prediction, linear layers in FP8 have an fp32 scale per 128 × 128."""
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
