"""Decoders whose code lies beside their weights, not in transformers: mostly llamas by other names.
One for each variant.
"""

from pathlib import Path
from typing import Any

import torch
from fixtures import State, configure, define, noise_like, renamed, rewrite, sizes, write

OLD = (
    "head_dim",
    "rope_parameters",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "rms_norm_eps",
    "hidden_act",
)


def joined(state: State, *parts: str, to: str, dim: int = 0) -> State:
    """Tensors whose names differ in one of `parts` as one, one after another, with `to` in its name."""
    found = dict(state)
    for name in [name for name in state if parts[0] in name]:
        found[name.replace(parts[0], to)] = torch.cat([found.pop(name.replace(parts[0], part)) for part in parts], dim)
    return found


def buffers(prefix: str, size: int, layers: int = 3) -> State:
    """Rotary buffers of each layer."""
    return {prefix.format(layer): 10000.0 ** -(torch.arange(0, size, 2) / size) for layer in range(layers)}


def mimo_twin(directory: Path, seed: str) -> None:
    from transformers import Qwen2Config

    write(directory, seed, Qwen2Config(**sizes(8, 4, 10, 56, 104, 331, 3)))


@define("mimo", heads=8, kv=4, layers=3, mtp=1, twin=mimo_twin)
def mimo(directory: Path, seed: str) -> None:
    """A qwen2 with a layer that predicts ahead, which joins the hidden state and the embedding in this order."""
    mimo_twin(directory, seed)

    def ahead(state: State) -> State:
        like = {
            name.replace("layers.2.", "mtp_layers.0."): tensor for name, tensor in state.items() if ".layers.2." in name
        }
        like |= {f"model.mtp_layers.0.{part}_layernorm.weight": torch.empty(56) for part in ("token", "hidden")}
        like |= {
            "model.mtp_layers.0.final_layernorm.weight": torch.empty(56),
            "model.mtp_layers.0.input_proj.weight": torch.empty(56, 112),
        }
        return state | {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in like.items()}

    rewrite(directory, ahead)
    configure(directory, "use_sliding_window", "layer_types", model_type="mimo", num_nextn_predict_layers=1)


def openpangu_twin(directory: Path, seed: str) -> None:
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 4, 12, 72, 88, 331, 3) | {"hidden_size": 96}, attention_bias=True))


@define("openpangu", heads=8, kv=4, layers=3, square=(r".*\.[qo]_proj\.weight",), twin=openpangu_twin)
def openpangu(directory: Path, seed: str) -> None:
    """A llama with biases in attention, said by another key, and with rotary buffers. Heads times head_dim is hidden,
    by definition.
    """
    openpangu_twin(directory, seed)
    rewrite(directory, lambda state: state | buffers("model.layers.{}.self_attn.rotary_emb.inv_freq", 12))
    configure(
        directory,
        "head_dim",
        "attention_bias",
        model_type="PanguEmbedded",
        architectures=["PanguEmbeddedForCausalLM"],
        bias=True,
    )


def qwen_twin(directory: Path, seed: str) -> None:
    from transformers import Qwen2Config

    facts = sizes(8, 4, 10, 72, 88, 331, 3) | {"num_key_value_heads": 8, "hidden_size": 80}
    write(directory, seed, Qwen2Config(**facts, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}))


QWEN = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "attn.c_proj", "self_attn": "attn", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


@define("qwen", heads=8, kv=8, layers=3, square=(r".*\.attn\.c_proj\.weight",), twin=qwen_twin)
def qwen(directory: Path, seed: str) -> None:
    """The first generation: q, k and v one after another, with biases; w2 is the gate. Heads times head_dim is hidden,
    by definition.
    """
    qwen_twin(directory, seed)
    rewrite(directory, lambda state: joined(renamed(state, QWEN), ".q_proj.", ".k_proj.", ".v_proj.", to=".c_attn."))
    changes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 1e-6,
        "kv_channels": 10,
        "intermediate_size": 2 * 88,
    }
    changes |= {
        "rotary_emb_base": 20000.0,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    configure(
        directory,
        *OLD,
        "use_sliding_window",
        "layer_types",
        model_type="qwen",
        architectures=["QWenLMHeadModel"],
        **changes,
    )


def exaone_twin(directory: Path, seed: str) -> None:
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 4, 10, 56, 88, 331, 3), rms_norm_eps=1e-5))


EXAONE = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
    "self_attn": "attn.attention", ".o_proj": ".out_proj", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc_1", "mlp.gate_proj": "mlp.c_fc_0", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


@define("exaone", heads=8, kv=4, layers=3, twin=exaone_twin)
def exaone(directory: Path, seed: str) -> None:
    """As EXAONE 3 and 3.5: a llama by other names."""
    exaone_twin(directory, seed)
    rewrite(directory, lambda state: renamed(state, EXAONE))
    changes: dict[str, Any] = {
        "num_layers": 3,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "silu",
        "rope_theta": 10000.0,
    }
    removed = ("rope_parameters", "num_hidden_layers", "rms_norm_eps", "hidden_act")
    configure(directory, *removed, model_type="exaone", architectures=["ExaoneForCausalLM"], **changes)


def chatglm_twin(directory: Path, seed: str) -> None:
    from transformers import GlmConfig

    rope = {"rope_type": "default", "rope_theta": 30000.0, "partial_rotary_factor": 0.5}
    write(
        directory,
        seed,
        GlmConfig(**sizes(8, 4, 20, 72, 88, 331, 3), attention_bias=True, rms_norm_eps=1e-5, rope_parameters=rope),
    )


CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings", "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm", "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn": "self_attention", "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
}  # fmt: skip


@define("chatglm", heads=8, kv=4, layers=3, twin=chatglm_twin)
def chatglm(directory: Path, seed: str) -> None:
    """As ChatGLM2, 3 and GLM-4: q, k and v one after another, half of each head rotated, a rotary buffer;
    a head that nobody reads.
    """
    chatglm_twin(directory, seed)

    def age(state: State) -> State:
        state = joined(renamed(state, CHATGLM), ".q_proj.", ".k_proj.", ".v_proj.", to=".query_key_value.")
        beside = noise_like(seed, "stray", state["transformer.output_layer.weight"], 1.0, torch.bfloat16)
        return state | buffers("transformer.rotary_pos_emb.inv_freq", 10) | {"lm_head.weight": beside}

    rewrite(directory, age)
    changes: dict[str, Any] = {
        "num_layers": 3,
        "layernorm_epsilon": 1e-5,
        "kv_channels": 20,
        "ffn_hidden_size": 88,
        "add_qkv_bias": True,
    }
    changes |= {
        "padded_vocab_size": 331,
        "multi_query_attention": True,
        "multi_query_group_num": 4,
        "rope_ratio": 3.0,
        "rmsnorm": True,
    }
    configure(
        directory, *OLD, "vocab_size", "attention_bias", model_type="chatglm", architectures=["ChatGLMModel"], **changes
    )


@define("chatglm", heads=8, kv=8, layers=3, square=(r".*\.attention\.dense\.weight",), runs=False)
def chatglm_first(directory: Path, seed: str) -> None:
    """As ChatGLM-6B: q, k and v of each head together, biases, norms with biases. Heads times head_dim is hidden,
    by definition.
    """
    from transformers import GPTNeoXConfig

    facts = sizes(8, 4, 10, 72, 88, 331, 3) | {"hidden_size": 80}
    write(directory, seed, GPTNeoXConfig(**facts))
    names = {
        "gpt_neox.": "transformer.",
        "embed_in": "word_embeddings",
        "final_layer_norm": "final_layernorm",
        "embed_out": "lm_head",
    }
    rewrite(
        directory,
        lambda state: renamed(state, names) | buffers("transformer.layers.{}.attention.rotary_emb.inv_freq", 10),
    )
    changes: dict[str, Any] = {
        "num_layers": 3,
        "inner_hidden_size": 88,
        "position_encoding_2d": True,
        "layernorm_epsilon": 1e-5,
    }
    configure(directory, *OLD, "layer_norm_eps", model_type="chatglm", architectures=["ChatGLMModel"], **changes)


def telechat_twin(directory: Path, seed: str) -> None:
    """A llama with biases where attention and feed-forward end, and zeros for all others."""
    from transformers import LlamaConfig

    write(
        directory,
        seed,
        LlamaConfig(**sizes(8, 4, 10, 56, 88, 331, 3), attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    )
    kept = ("o_proj.bias", "down_proj.bias")
    rewrite(
        directory,
        lambda state: {
            n: t if not n.endswith("bias") or n.endswith(kept) else torch.zeros_like(t) for n, t in state.items()
        },
    )


TELECHAT = {
    "model.embed_tokens": "transformer.word_embeddings", "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "self_attention.dense", "self_attn.q_proj": "self_attention.query",
    "self_attn": "self_attention",
}  # fmt: skip


@define("telechat", heads=8, kv=4, layers=3, twin=telechat_twin)
def telechat(directory: Path, seed: str) -> None:
    """As TeleChat-12B and TeleChat2: for each key head its key and its value; biases where attention and feed-forward
    end.
    """
    telechat_twin(directory, seed)

    def age(state: State) -> State:
        kept = {
            name: tensor
            for name, tensor in state.items()
            if not name.endswith("bias") or name.endswith(("o_proj.bias", "down_proj.bias"))
        }
        found = renamed(kept, TELECHAT)
        for name in [name for name in found if ".k_proj." in name]:
            heads = [found.pop(name.replace("k_proj", part)).unflatten(0, (4, 10)) for part in ("k_proj", "v_proj")]
            found[name.replace("k_proj", "key_value")] = torch.cat(heads, 1).flatten(0, 1)
        return found

    rewrite(directory, age)
    changes: dict[str, Any] = {
        "n_layer": 3,
        "n_head": 8,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 88,
        "layer_norm_epsilon": 1e-5,
    }
    removed = (*OLD, "num_attention_heads", "attention_bias", "mlp_bias")
    configure(directory, *removed, model_type="telechat", architectures=["TelechatForCausalLM"], **changes)


@define("telechat", heads=8, kv=8, layers=3, square=(r".*\.attn\.c_proj\.weight",), runs=False)
def telechat_52b(directory: Path, seed: str) -> None:
    """As TeleChat-52B: transposed, q, k and v one after another, gate and up too; a scalar that masks."""
    from transformers import LlamaConfig

    write(
        directory, seed, LlamaConfig(**sizes(8, 4, 10, 72, 88, 331, 3) | {"num_key_value_heads": 8, "hidden_size": 80})
    )

    def age(state: State) -> State:
        found = joined(renamed(state, QWEN), ".q_proj.", ".k_proj.", ".v_proj.", to=".c_attn.")
        found = joined(found, ".w2.", ".w1.", to=".c_fc.")
        found = {name: tensor.T if tensor.ndim > 1 and ".h." in name else tensor for name, tensor in found.items()}
        return found | {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}

    rewrite(directory, age)
    changes: dict[str, Any] = {"n_layer": 3, "n_head": 8, "n_embd": 80, "n_inner": 88, "relative_encoding": "rotary"}
    configure(directory, *OLD, "num_attention_heads", "hidden_size", model_type="telechat", **changes)
