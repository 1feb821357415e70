"""The zoo's older families: the first open GPTs and their kin, ALiBi, learned positions, and two that transformers
never had.
"""

from pathlib import Path
from typing import Any

import torch
from fixtures import COMMON, State, configure, define, renamed, rewrite, sizes, write

GPT: dict[str, Any] = {"n_embd": 80, "n_head": 8, "n_inner": 104, "n_layer": 3, "n_positions": 72, "vocab_size": 331}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


@define("phi", heads=8, kv=4, layers=3)
def phi(directory: Path, seed: str) -> None:
    """One norm for both branches, half of each head rotated, biases everywhere, on the head too; the fraction is said
    by no key.
    """
    from transformers import PhiConfig

    write(directory, seed, PhiConfig(**sizes(8, 4, 12, 72, 88, 331, 3)))


@define("phi", heads=8, kv=8, layers=3, square=(r".*\.(q_proj|k_proj|v_proj|dense)\.weight",))
def phi_norms(directory: Path, seed: str) -> None:
    """qk_layernorm: a norm with bias on each head of q and k; the keys of transformers 4. Heads times head_dim is
    hidden, by definition.
    """
    from transformers import PhiConfig

    facts = sizes(8, 4, 12, 72, 88, 317, 3) | {"hidden_size": 96, "num_key_value_heads": 8}
    write(directory, seed, PhiConfig(**facts, qk_layernorm=True))
    configure(
        directory,
        "rope_parameters",
        "head_dim",
        num_key_value_heads=None,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
    )


@define("gptj", heads=8, kv=8, layers=3, square=(r".*_proj\.weight",))
def gptj(directory: Path, seed: str) -> None:
    """Part of each head is rotated, in pairs that stand beside each other; a bias on the head, none in attention."""
    from transformers import GPTJConfig

    write(directory, seed, GPTJConfig(**GPT, **TOKENS, rotary_dim=6))


@define("gptj", heads=8, kv=8, layers=3, square=(r".*_proj\.weight",))
def gptj_old(directory: Path, seed: str) -> None:
    """With the mask and the scalar that masks, as GPT-J-6B was published; n_inner null means four times hidden."""
    from transformers import GPTJConfig

    write(directory, seed, GPTJConfig(**GPT | {"n_inner": None}, **TOKENS, rotary_dim=4))
    rewrite(directory, lambda state: state | masks("transformer.h.{}.attn.", 3))


def masks(prefix: str, layers: int) -> State:
    """The buffers that attention had in each layer."""
    found: State = {}
    for layer in range(layers):
        found[prefix.format(layer) + "bias"] = torch.ones(72, 72, dtype=torch.bool).tril()[None, None]
        found[prefix.format(layer) + "masked_bias"] = torch.tensor(-1e9)
    return found


@define("codegen", heads=8, kv=8, layers=3, square=(r".*\.out_proj\.weight",))
def codegen(directory: Path, seed: str) -> None:
    """q, v and k of two heads, four times over."""
    from transformers import CodeGenConfig

    write(directory, seed, CodeGenConfig(**GPT, **TOKENS, rotary_dim=6))


@define("codegen", heads=16, kv=16, layers=3, square=(r".*\.out_proj\.weight",))
def codegen_old(directory: Path, seed: str) -> None:
    """With the mask of each layer, as the first release."""
    from transformers import CodeGenConfig

    write(directory, seed, CodeGenConfig(**GPT | {"n_head": 16, "n_embd": 128}, **TOKENS, rotary_dim=4))
    mask = torch.ones(72, 72, dtype=torch.bool).tril()[None, None]
    rewrite(directory, lambda state: state | {f"transformer.h.{layer}.attn.causal_mask": mask for layer in range(3)})


NEO: dict[str, Any] = {
    "hidden_size": 80,
    "num_heads": 8,
    "intermediate_size": 104,
    "max_position_embeddings": 72,
    "vocab_size": 331,
}


NEO_SQUARE = (r".*\.(q_proj|k_proj|v_proj|out_proj)\.weight",)


@define("gpt_neo", heads=8, kv=8, layers=4, square=NEO_SQUARE, equal=(("lm_head.weight", "transformer.wte.weight"),))
def gpt_neo(directory: Path, seed: str) -> None:
    """Every other layer has a window; scores are not scaled; tied, and the head is stored all the same."""
    from transformers import GPTNeoConfig

    kinds = [[["global", "local"], 2]]
    write(directory, seed, GPTNeoConfig(**NEO, **TOKENS, num_layers=4, attention_types=kinds, window_size=5))
    rewrite(directory, lambda state: state | {"lm_head.weight": state["transformer.wte.weight"]})


@define("gpt_neo", heads=8, kv=8, layers=3, square=NEO_SQUARE)
def gpt_neo_old(directory: Path, seed: str) -> None:
    """With the mask and the scalar that masks, no prefix, as a model without a head is saved; kinds of layers under one
    key only.
    """
    from transformers import GPTNeoConfig

    kinds = [[["local"], 1], [["global", "local"], 1]]
    write(directory, seed, GPTNeoConfig(**NEO, **TOKENS, num_layers=3, attention_types=kinds, window_size=5))
    configure(directory, "attention_layers", "tie_word_embeddings")

    def age(state: State) -> State:
        return {name.removeprefix("transformer."): tensor for name, tensor in state.items()} | masks(
            "h.{}.attn.attention.", 3
        )

    rewrite(directory, age)


@define("gpt_bigcode", heads=8, kv=1, layers=3, weights=False, square=(r".*\.attn\.c_proj\.weight",))
def gpt_bigcode(directory: Path, seed: str) -> None:
    """Multi-query: all q, then k, then v; tied."""
    from transformers import GPTBigCodeConfig

    write(directory, seed, GPTBigCodeConfig(**GPT, **TOKENS))


@define(
    "gpt_bigcode",
    heads=8,
    kv=8,
    layers=3,
    square=(r".*\.attn\.c_proj\.weight",),
    equal=(("lm_head.weight", "transformer.wte.weight"),),
)
def gpt_bigcode_heads(directory: Path, seed: str) -> None:
    """multi_query false: q, k and v of each head together; tied, and the head is stored all the same,
    as StarCoder was published.
    """
    from transformers import GPTBigCodeConfig

    write(directory, seed, GPTBigCodeConfig(**GPT, **TOKENS, multi_query=False))
    rewrite(directory, lambda state: state | {"lm_head.weight": state["transformer.wte.weight"]})


@define("bloom", heads=8, kv=8, layers=3, square=(r".*\.self_attention\.dense\.weight",))
def bloom(directory: Path, seed: str) -> None:
    """ALiBi, a norm after the embedding; not tied. Heads times head_dim is hidden, by definition."""
    from transformers import BloomConfig

    write(
        directory,
        seed,
        BloomConfig(hidden_size=80, n_head=8, n_layer=3, vocab_size=331, **TOKENS, tie_word_embeddings=False),
    )


@define("bloom", heads=12, kv=12, layers=3, tp=(1, 2, 4), square=(r".*\.self_attention\.dense\.weight",))
def bloom_bare(directory: Path, seed: str) -> None:
    """As the largest was published: no prefix, older keys, tied; a number of heads that is no power of two."""
    from transformers import BloomConfig

    write(directory, seed, BloomConfig(hidden_size=120, n_head=12, n_layer=3, vocab_size=331, **TOKENS))
    rewrite(directory, lambda state: {name.removeprefix("transformer."): tensor for name, tensor in state.items()})
    configure(
        directory,
        "hidden_size",
        "n_head",
        "tie_word_embeddings",
        "layer_norm_epsilon",
        n_embed=120,
        num_attention_heads=12,
    )


MPT: dict[str, Any] = {"d_model": 80, "n_heads": 8, "n_layers": 3, "max_seq_len": 72, "vocab_size": 331}
MPT_SQUARE = (r".*\.out_proj\.weight",)


@define("mpt", heads=8, kv=8, layers=3, square=MPT_SQUARE)
def mpt(directory: Path, seed: str) -> None:
    """ALiBi, norms without bias, q, k and v clipped; tied."""
    from transformers import MptConfig

    write(directory, seed, MptConfig(**MPT, **TOKENS, attn_config={"clip_qkv": 0.8}))
    configure(directory, "layer_norm_epsilon", "tie_word_embeddings")


@define("mpt", heads=12, kv=12, layers=3, tp=(1, 2, 4), square=MPT_SQUARE)
def mpt_scaled(directory: Path, seed: str) -> None:
    """A scale of its own for the scores, not tied; a number of heads that is no power of two."""
    from transformers import MptConfig

    facts = MPT | {"d_model": 120, "n_heads": 12}
    write(directory, seed, MptConfig(**facts, **TOKENS, attn_config={"softmax_scale": 0.2}, tie_word_embeddings=False))


@define("mpt", heads=8, kv=8, layers=3, square=MPT_SQUARE, runs=False)
def mpt_bias(directory: Path, seed: str) -> None:
    """no_bias false: biases everywhere, which transformers does not have."""
    from fixtures import noise
    from transformers import MptConfig

    write(directory, seed, MptConfig(**MPT, **TOKENS))
    configure(directory, no_bias=False)

    def biased(state: State) -> State:
        found = dict(state)
        for name, tensor in state.items():
            if "wte" not in name:
                bias = name.removesuffix("weight") + "bias"
                found[bias] = noise(f"{seed} {bias}", tensor.shape[:1], 0.1, 0.0, tensor.dtype)
        return found

    rewrite(directory, biased)


@define("starcoder2", heads=8, kv=2, layers=3, weights=False)
def starcoder2(directory: Path, seed: str) -> None:
    """Grouped, biases everywhere, a window, tied; what no key says: that it is tied, and the biases."""
    from transformers import Starcoder2Config

    facts = sizes(8, 4, 14, 72, 88, 331, 3) | {"num_key_value_heads": 2}
    write(directory, seed, Starcoder2Config(**facts, sliding_window=5))
    configure(directory, "tie_word_embeddings", "use_bias")


@define("starcoder2", heads=8, kv=4, layers=3)
def starcoder2_plain(directory: Path, seed: str) -> None:
    """Without biases, but in the norms; a head of its own."""
    from transformers import Starcoder2Config

    write(
        directory, seed, Starcoder2Config(**sizes(8, 4, 14, 72, 88, 317, 3), use_bias=False, tie_word_embeddings=False)
    )


PERSIMMON: dict[str, Any] = {
    **COMMON,
    "hidden_size": 96,
    "num_attention_heads": 8,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "vocab_size": 331,
}


@define("persimmon", heads=8, kv=8, layers=3, square=(r".*\.self_attn\.dense\.weight",))
def persimmon(directory: Path, seed: str) -> None:
    """q, k and v of each head together, with norms that have biases; half of each head is rotated;
    the square of a relu.
    """
    from transformers import PersimmonConfig

    write(directory, seed, PersimmonConfig(**PERSIMMON))


@define("persimmon", heads=8, kv=8, layers=3, square=(r".*\.self_attn\.dense\.weight",))
def persimmon_plain(directory: Path, seed: str) -> None:
    """Without these norms; the keys of transformers 4."""
    from transformers import PersimmonConfig

    write(directory, seed, PersimmonConfig(**PERSIMMON, qk_layernorm=False))
    configure(directory, "rope_parameters", rope_theta=25000.0, partial_rotary_factor=0.5)


OPT: dict[str, Any] = {
    "hidden_size": 80,
    "num_attention_heads": 8,
    "ffn_dim": 104,
    "num_hidden_layers": 3,
    "vocab_size": 331,
}
OPT_SQUARE = (r".*\.(q_proj|k_proj|v_proj|out_proj)\.weight",)


@define("opt", heads=8, kv=8, layers=3, square=OPT_SQUARE)
def opt(directory: Path, seed: str) -> None:
    """Learned positions, two rows of which are no position; tied; biases and norms, said by no key."""
    from transformers import OPTConfig

    write(directory, seed, OPTConfig(**OPT, **COMMON))
    configure(directory, "tie_word_embeddings", "enable_bias", "layer_norm_elementwise_affine", "do_layer_norm_before")


@define("opt", heads=8, kv=8, layers=3, square=OPT_SQUARE, equal=(("lm_head.weight", "decoder.embed_tokens.weight"),))
def opt_350m(directory: Path, seed: str) -> None:
    """As OPT-350m: narrower embeddings, norms behind the branches, none at the end; another prefix,
    and the head is stored.
    """
    from transformers import OPTConfig

    write(directory, seed, OPTConfig(**OPT, **COMMON, word_embed_proj_dim=48, do_layer_norm_before=False))

    def age(state: State) -> State:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        return state | {"lm_head.weight": state["decoder.embed_tokens.weight"]}

    rewrite(directory, age)


@define("opt", heads=8, kv=8, layers=3, square=OPT_SQUARE)
def opt_bare(directory: Path, seed: str) -> None:
    """Without biases, norms without weights; a head of its own."""
    from transformers import OPTConfig

    facts = {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False}
    write(directory, seed, OPTConfig(**OPT, **COMMON, **facts))


INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def internlm2_twin(directory: Path, seed: str) -> None:
    from transformers import LlamaConfig

    write(
        directory,
        seed,
        LlamaConfig(**sizes(8, 4, 12, 72, 88, 331, 3) | {"hidden_size": 96}, attention_bias=seed.endswith("bias")),
    )


def to_internlm2(state: State) -> State:
    found = renamed(state, INTERNLM2)
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        grouped = [part.view(4, -1, 12, *part.shape[1:]) for part in parts]  # 4 key heads of 12 features
        found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(grouped, 1).flatten(0, 2)
    return found


def internlm_twin(directory: Path, seed: str) -> None:
    from transformers import LlamaConfig

    facts = sizes(8, 4, 10, 72, 88, 331, 3) | {"num_key_value_heads": 8, "hidden_size": 80}
    write(directory, seed, LlamaConfig(**facts, attention_bias=True))


@define("internlm", heads=8, kv=8, layers=3, square=(r".*\.[qkvo]_proj\.weight",), twin=internlm_twin)
def internlm(directory: Path, seed: str) -> None:
    """A llama with biases in attention, said by another key, and with rotary buffers."""
    internlm_twin(directory, seed)
    inv_freq = 10000.0 ** -(torch.arange(0, 10, 2) / 10)
    rewrite(
        directory, lambda state: state | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": inv_freq for n in range(3)}
    )
    configure(directory, "head_dim", "attention_bias", "num_key_value_heads", model_type="internlm", bias=True)


INTERNLM2_SQUARE = (r".*\.wo\.weight",)


@define("internlm2", heads=8, kv=4, layers=3, square=INTERNLM2_SQUARE, twin=internlm2_twin)
def internlm2(directory: Path, seed: str) -> None:
    """A llama by other names: for each key head its queries, its key and its value. Heads times head_dim is hidden,
    by definition.
    """
    internlm2_twin(directory, seed)
    rewrite(directory, to_internlm2)
    configure(directory, "head_dim", model_type="internlm2", architectures=["InternLM2ForCausalLM"], bias=False)


@define("internlm2", heads=8, kv=4, layers=3, square=INTERNLM2_SQUARE, twin=internlm2_twin)
def internlm2_bias(directory: Path, seed: str) -> None:
    """bias: on q, k and v, and on the output of attention; the keys of transformers 4."""
    internlm2_twin(directory, seed)
    rewrite(directory, to_internlm2)
    changes = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": True, "rope_theta": 10000}
    configure(directory, "head_dim", "rope_parameters", "attention_bias", **changes)


BAICHUAN2_VOCAB = 125_696  # the only sign of the second generation, whose head has rows of length 1
BAICHUAN_SQUARE = (r".*\.o_proj\.weight",)


def baichuan_twin(directory: Path, seed: str) -> None:
    """A llama; of the second generation with the head as it is used."""
    from transformers import LlamaConfig

    second = seed.startswith("baichuan2")
    facts = sizes(8, 4, 10, 72, 88, 331, 3) | {"num_key_value_heads": 8, "hidden_size": 80}
    write(
        directory, seed, LlamaConfig(**facts | ({"vocab_size": BAICHUAN2_VOCAB} if second else {})), dtype=torch.float32
    )
    if second:
        rewrite(
            directory, lambda state: state | {"lm_head.weight": torch.nn.functional.normalize(state["lm_head.weight"])}
        )


def to_baichuan(directory: Path, seed: str, *removed: str, **changes: Any) -> None:
    """The llama that the twin is, without its head's normalisation, by other names."""
    baichuan_twin(directory, seed)

    def rename(state: State) -> State:
        for layer in range(3):
            prefix = f"model.layers.{layer}.self_attn."
            parts = [state.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
            state[prefix + "W_pack.weight"] = torch.cat(parts)
        if seed.startswith("baichuan2"):
            rows = torch.arange(1, BAICHUAN2_VOCAB + 1)[:, None] / BAICHUAN2_VOCAB + 0.5
            state["lm_head.weight"] = state["lm_head.weight"] * rows
        return state

    rewrite(directory, rename)
    configure(directory, "head_dim", "num_key_value_heads", *removed, model_type="baichuan", **changes)


@define("baichuan", heads=8, kv=8, layers=3, square=BAICHUAN_SQUARE, twin=baichuan_twin)
def baichuan(directory: Path, seed: str) -> None:
    """The smaller one of the first generation: q, k and v one after another, rotary, with the buffers that it was
    published with.
    """
    to_baichuan(directory, seed, architectures=["BaiChuanForCausalLM"])
    inv_freq = 10000.0 ** -(torch.arange(0, 10, 2) / 10)
    rewrite(
        directory, lambda state: state | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": inv_freq for n in range(3)}
    )


@define("baichuan", heads=8, kv=8, layers=3, square=BAICHUAN_SQUARE, twin=baichuan_twin)
def baichuan2(directory: Path, seed: str) -> None:
    """The second generation: the rows of the head are divided by their lengths."""
    to_baichuan(directory, seed, architectures=["BaichuanForCausalLM"])


def alibi(ids: torch.Tensor) -> dict[str, Any]:
    """What makes a llama of 8 heads one with ALiBi: no rotation, and a mask with a slope for each head."""
    seq = ids.shape[1]
    past = torch.arange(seq)[:, None] - torch.arange(seq)
    slopes = 2.0 ** -torch.arange(1, 9)
    mask = (-slopes[:, None, None] * past).masked_fill(past < 0, torch.finfo(torch.float32).min)
    return {"attention_mask": mask[None].expand(len(ids), -1, -1, -1), "position_ids": torch.zeros_like(ids)}


@define("baichuan", heads=8, kv=8, layers=3, square=BAICHUAN_SQUARE, twin=baichuan_twin, given=alibi)
def baichuan_13b(directory: Path, seed: str) -> None:
    """The larger one: ALiBi, which only the absence of max_position_embeddings says."""
    to_baichuan(directory, seed, "max_position_embeddings", architectures=["BaichuanForCausalLM"], model_max_length=128)
