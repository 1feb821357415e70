"""Decoders of which most layers keep a state instead of keys and values: linear attention, state spaces,
short convolutions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixtures import State, configure, define, noise_like, rewrite, sizes, write

SLIM: Mapping[str, Any] = {  # of linear attention layers
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
}


def ahead(seed: str, state: State, layer: int, hidden: int) -> State:
    """A multi-token prediction layer as Qwen publishes it: one like layer `layer`, with three norms and a projection
    around it.
    """
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    shapes = {f"mtp.{name}.weight": torch.empty(hidden) for name in names} | {
        "mtp.fc.weight": torch.empty(hidden, 2 * hidden)
    }
    start = f"model.layers.{layer}."
    shapes |= {
        f"mtp.layers.0.{name.removeprefix(start)}": tensor for name, tensor in state.items() if name.startswith(start)
    }
    return {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in shapes.items()}


def fused(state: State, start: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> State:
    """The experts of one layer, whose names begin with `start`, as one stack, gate and up together,
    instead of a tensor each.
    """
    experts = range(len([name for name in state if name.startswith(start) and name.endswith(f"{names[2]}.weight")]))
    if not experts:
        return state
    gate, up, down = (torch.stack([state[f"{start}{n}.{part}.weight"] for n in experts]) for part in names)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(start)}
    return rest | {f"{start}gate_up_proj": torch.cat((gate, up), 1), f"{start}down_proj": down}


@define("qwen3_next", heads=8, kv=4, layers=5, mtp=1, experts=4, ep=(1, 2, 4))
def qwen3_next(directory: Path, seed: str) -> None:
    """As published: every fourth layer attends, the others keep a state; one layer predicts ahead, said by no key.
    Layer 1 is dense.
    """
    from transformers import Qwen3NextConfig

    write(directory, seed, Qwen3NextConfig(**sizes(8, 4, 12, 72, 88, 331, 5), **SLIM, **EXPERTS, mlp_only_layers=[1]))
    rewrite(directory, lambda state: state | ahead(seed, state, 3, 72))
    configure(directory, "layer_types", full_attention_interval=4)


@define("qwen3_next", heads=8, kv=2, layers=4, mtp=1, experts=4, ep=(1, 2), weights=False)
def qwen3_next_fused(directory: Path, seed: str) -> None:
    """Experts in stacks, also of the layer that predicts ahead; tied; layers as they come; biases in attention."""
    from transformers import Qwen3NextConfig

    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    facts = dict(SLIM) | {"tie_word_embeddings": True, "attention_bias": True}
    facts |= {
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 6,
        "linear_key_head_dim": 10,
    }
    config = Qwen3NextConfig(**sizes(8, 2, 14, 72, 88, 331, 4), **facts, **EXPERTS, layer_types=kinds)
    write(directory, seed, config)

    def age(state: State) -> State:
        state |= ahead(seed, state, 3, 72)
        for start in (*(f"model.layers.{layer}" for layer in range(4)), "mtp.layers.0"):
            state = fused(state, f"{start}.mlp.experts.")
        return state

    rewrite(directory, age)


@define("qwen3_5_text", heads=8, kv=4, layers=5, mtp=1)
def qwen3_5(directory: Path, seed: str) -> None:
    """Dense; four projections into the linear layers; one layer predicts ahead; biases in attention."""
    from transformers import Qwen3_5TextConfig

    write(directory, seed, Qwen3_5TextConfig(**sizes(8, 4, 12, 72, 88, 331, 5), **SLIM, attention_bias=True))
    rewrite(directory, lambda state: state | ahead(seed, state, 3, 72))
    configure(directory, "layer_types", full_attention_interval=4, mtp_num_hidden_layers=1)


@define("qwen3_5_text", heads=8, kv=2, layers=4, weights=False)
def qwen3_5_tied(directory: Path, seed: str) -> None:
    """Tied, and nothing predicts ahead: as transformers writes it."""
    from transformers import Qwen3_5TextConfig

    write(directory, seed, Qwen3_5TextConfig(**sizes(8, 2, 14, 72, 88, 331, 4), **SLIM, tie_word_embeddings=True))


@define("qwen3_5_moe_text", heads=8, kv=2, layers=4, mtp=1, experts=4, ep=(1, 2, 4), weights=False)
def qwen3_5_moe(directory: Path, seed: str) -> None:
    """As published: stacks of experts in the main layers, a tensor for each expert in the layer that predicts ahead."""
    from transformers import Qwen3_5MoeTextConfig

    given = sizes(8, 2, 14, 72, 88, 331, 4)
    write(
        directory,
        seed,
        Qwen3_5MoeTextConfig(**{k: v for k, v in given.items() if k != "intermediate_size"}, **SLIM, **EXPERTS),
    )

    def age(state: State) -> State:
        ahead_of = ahead(seed, state, 3, 72)
        for layer in range(4):
            state = fused(state, f"model.layers.{layer}.mlp.experts.")
        return state | ahead_of

    rewrite(directory, age)


@define("qwen3_5_moe_text", heads=8, kv=4, layers=5, mtp=1, experts=4, ep=(1, 2))
def qwen3_5_moe_each(directory: Path, seed: str) -> None:
    """As transformers writes it, and the other way round in the layer that predicts ahead; biases in attention."""
    from transformers import Qwen3_5MoeTextConfig

    given = sizes(8, 4, 12, 72, 88, 331, 5) | {"attention_bias": True}
    write(
        directory,
        seed,
        Qwen3_5MoeTextConfig(**{k: v for k, v in given.items() if k != "intermediate_size"}, **SLIM, **EXPERTS),
    )
    rewrite(directory, lambda state: state | fused(ahead(seed, state, 3, 72), "mtp.layers.0.mlp.experts."))


STATES: Mapping[str, Any] = {"mamba_n_heads": 16, "mamba_d_state": 10, "mamba_d_conv": 3}  # of state space layers
ATTENDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]  # as transformers 5 says it


@define("granitemoehybrid", heads=8, kv=4, layers=5, experts=4, ep=(1, 2, 4))
def granitemoehybrid(directory: Path, seed: str) -> None:
    """Most layers keep a state, one group of heads; experts in stacks beside one that every token uses."""
    from transformers import GraniteMoeHybridConfig

    facts: dict[str, Any] = {
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "mamba_d_head": 9,
        "mamba_n_groups": 1,
    }
    facts["layer_types"] = [*ATTENDS, "linear_attention"]
    write(directory, seed, GraniteMoeHybridConfig(**sizes(8, 4, 12, 72, 88, 331, 5), **STATES, **facts))


@define("granitemoehybrid", heads=8, kv=2, layers=4, weights=False)
def granitemoehybrid_dense(directory: Path, seed: str) -> None:
    """As the small ones are published: without experts; tied; two groups of heads; no bias of the convolution."""
    from transformers import GraniteMoeHybridConfig

    facts: dict[str, Any] = {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "mamba_d_head": 9,
        "mamba_n_groups": 2,
        "layer_types": ATTENDS,
    }
    facts |= {"mamba_conv_bias": False, "mamba_proj_bias": True, "tie_word_embeddings": True}
    write(directory, seed, GraniteMoeHybridConfig(**sizes(8, 2, 14, 72, 88, 331, 4), **STATES, **facts))


@define("granitemoehybrid", heads=8, kv=4, layers=3)
def granitemoehybrid_attends(directory: Path, seed: str) -> None:
    """As some are published: no layer keeps a state, though config.json says what one would look like."""
    from transformers import GraniteMoeHybridConfig

    facts: dict[str, Any] = {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "mamba_d_head": 9,
        "mamba_n_groups": 1,
    }
    facts |= {"layer_types": ["full_attention"] * 3, "attention_bias": True}
    write(directory, seed, GraniteMoeHybridConfig(**sizes(8, 4, 14, 72, 88, 331, 3), **STATES, **facts))


@define("bamba", heads=8, kv=4, layers=5)
def bamba(directory: Path, seed: str) -> None:
    """One group of heads; a dense feed-forward; biases everywhere."""
    from transformers import BambaConfig

    facts = {"mamba_d_head": 9, "mamba_n_groups": 1, "attn_layer_indices": [1], "attention_bias": True}
    facts |= {"mamba_proj_bias": True, "mlp_bias": True}
    write(directory, seed, BambaConfig(**sizes(8, 4, 12, 72, 88, 331, 5), **STATES, **facts))


@define("falcon_h1", heads=8, kv=4, layers=3)
def falcon_h1(directory: Path, seed: str) -> None:
    """Every layer attends and keeps a state, from one norm; the state space has no norm of its own."""
    from transformers import FalconH1Config

    facts = {"mamba_d_ssm": 96, "mamba_d_head": 6, "mamba_n_groups": 1}
    write(directory, seed, FalconH1Config(**sizes(8, 4, 14, 72, 88, 331, 3), **STATES, **facts))


@define("falcon_h1", heads=8, kv=2, layers=3, weights=False)
def falcon_h1_norm(directory: Path, seed: str) -> None:
    """With that norm, two groups of heads, tied; biases everywhere."""
    from transformers import FalconH1Config

    facts = {
        "mamba_d_ssm": 96,
        "mamba_d_head": 6,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "tie_word_embeddings": True,
    }
    facts |= dict.fromkeys(("attention_bias", "mamba_proj_bias", "projectors_bias", "mlp_bias"), True)
    write(directory, seed, FalconH1Config(**sizes(8, 2, 14, 72, 88, 331, 3), **STATES, **facts))


@define("mamba2", heads=8, kv=8, layers=4, tp=(1, 2, 4, 8))
def mamba2(directory: Path, seed: str) -> None:
    """State spaces and nothing else, four groups of heads."""
    from transformers import Mamba2Config

    facts = {"num_heads": 16, "head_dim": 9, "state_size": 10, "n_groups": 4, "conv_kernel": 3, "use_bias": True}
    write(directory, seed, Mamba2Config(vocab_size=331, hidden_size=72, num_hidden_layers=4, **facts))


LFM_SQUARE = (r".*\.(q_proj|self_attn\.out_proj|conv\.out_proj)\.weight",)


@define("lfm2", heads=8, kv=4, layers=4, square=LFM_SQUARE)
def lfm2(directory: Path, seed: str) -> None:
    """As published: most layers are a short convolution; tied,
    and the feed-forward is not as wide as config.json says.
    """
    from transformers import Lfm2Config

    kinds = ["conv", "conv", "full_attention", "conv"]
    given = {
        key: value
        for key, value in sizes(8, 4, 12, 72, 88, 331, 5).items()
        if key not in ("head_dim", "num_hidden_layers")
    }
    write(directory, seed, Lfm2Config(**given, num_hidden_layers=4, layer_types=kinds, block_multiple_of=40))
    configure(directory, "tie_word_embeddings", "layer_types", tie_embedding=True, full_attn_idxs=[2])


@define("lfm2", heads=8, kv=2, layers=3, weights=False, square=LFM_SQUARE)
def lfm2_untied(directory: Path, seed: str) -> None:
    """With a head; the feed-forward as wide as config.json says."""
    from transformers import Lfm2Config

    kinds = ["conv", "full_attention", "conv"]
    facts = {"tie_word_embeddings": False, "block_auto_adjust_ff_dim": False, "layer_types": kinds, "conv_bias": True}
    given = {key: value for key, value in sizes(8, 2, 12, 72, 88, 331, 3).items() if key != "head_dim"}
    write(directory, seed, Lfm2Config(**given, **facts))


def lfm2_moe_config(layers: int, **facts: Any) -> Any:
    from transformers import Lfm2MoeConfig

    kinds = ["conv", "full_attention", "conv", "conv"][:layers]
    given = {
        key: value
        for key, value in sizes(8, 4, 12, 72, 88, 331, 5).items()
        if key not in ("head_dim", "num_hidden_layers")
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_dense_layers": 1}
    return Lfm2MoeConfig(**given, **experts, num_hidden_layers=layers, layer_types=kinds, **facts)


@define("lfm2_moe", heads=8, kv=4, layers=4, experts=4, ep=(1, 2, 4), square=LFM_SQUARE)
def lfm2_moe(directory: Path, seed: str) -> None:
    """The first layers dense, the others of experts with a bias that only their choice sees; tied."""
    write(directory, seed, lfm2_moe_config(4))


@define("lfm2_moe", heads=8, kv=4, layers=3, experts=4, ep=(1, 2), square=LFM_SQUARE)
def lfm2_moe_fused(directory: Path, seed: str) -> None:
    """Experts in stacks, no such bias, but biases of convolutions; a head."""
    write(directory, seed, lfm2_moe_config(3, use_expert_bias=False, conv_bias=True, tie_word_embeddings=False))

    def age(state: State) -> State:
        for layer in range(3):
            state = fused(state, f"model.layers.{layer}.feed_forward.experts.", ("w1", "w3", "w2"))
        return state

    rewrite(directory, age)


def jamba_config(layers: int, **facts: Any) -> Any:
    from transformers import JambaConfig

    state = {"mamba_d_state": 10, "mamba_d_conv": 3, "mamba_dt_rank": 5, "mamba_expand": 2}
    experts = {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1}
    given = {
        key: value
        for key, value in sizes(8, 4, 12, 72, 88, 331, 5).items()
        if key not in ("head_dim", "num_hidden_layers")
    }
    return JambaConfig(**given, **state, **experts, num_hidden_layers=layers, **facts)


JAMBA_SQUARE = (r".*\.self_attn\.[qo]_proj\.weight",)


@define("jamba", heads=8, kv=4, layers=4, experts=4, ep=(1, 2, 4), square=JAMBA_SQUARE)
def jamba(directory: Path, seed: str) -> None:
    """State spaces without heads, norms inside them; every other layer of experts. Heads times head_dim is hidden,
    by definition.
    """
    write(directory, seed, jamba_config(4))


@define("jamba", heads=8, kv=4, layers=3, experts=4, ep=(1, 2), square=JAMBA_SQUARE)
def jamba_fused(directory: Path, seed: str) -> None:
    """Experts in stacks; tied; no bias of the convolution, but of the projections around it."""
    write(directory, seed, jamba_config(3, mamba_conv_bias=False, mamba_proj_bias=True, tie_word_embeddings=True))

    def age(state: State) -> State:
        for layer in range(3):
            state = fused(state, f"model.layers.{layer}.feed_forward.experts.")
        return state

    rewrite(directory, age)


@define("mamba", heads=8, kv=8, layers=4)
def mamba(directory: Path, seed: str) -> None:
    """State spaces without heads, and nothing else; tied without a word."""
    from transformers import MambaConfig

    facts = {"state_size": 10, "conv_kernel": 3, "time_step_rank": 5}
    write(directory, seed, MambaConfig(vocab_size=331, hidden_size=72, num_hidden_layers=4, **facts))
    configure(directory, "tie_word_embeddings")


@define("mamba", name="falcon_mamba", heads=8, kv=8, layers=3)
def falcon_mamba(directory: Path, seed: str) -> None:
    """The same tensors; with a head."""
    from transformers import FalconMambaConfig

    facts = {"state_size": 10, "conv_kernel": 3, "time_step_rank": 5, "tie_word_embeddings": False, "use_bias": True}
    write(directory, seed, FalconMambaConfig(vocab_size=331, hidden_size=72, num_hidden_layers=3, **facts))


def nemotron_h_config(heads: int, kv: int, head_dim: int, groups: int, **facts: Any) -> Any:
    from transformers import NemotronHConfig

    given = {
        key: value for key, value in sizes(heads, kv, head_dim, 72, 88, 331, 5).items() if key != "num_hidden_layers"
    }
    state = {"ssm_state_size": 10, "mamba_num_heads": 16, "mamba_head_dim": 6, "conv_kernel": 3, "n_groups": groups}
    experts = {
        "n_routed_experts": 4,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 48,
        "num_experts_per_tok": 2,
    }
    return NemotronHConfig(**given, **state, **experts, **facts)


def nemotron_ahead(seed: str, state: State, like: tuple[str, str]) -> State:
    """Layers that predict ahead: two like those whose names begin so, and the norms and the projection around them."""
    shapes = {"mtp.layers.0.eh_proj.weight": torch.empty(72, 144)}
    shapes |= {f"mtp.layers.{name}.weight": torch.empty(72) for name in ("0.enorm", "0.hnorm", "1.final_layernorm")}
    for layer, start in enumerate(like):
        shapes |= {
            f"mtp.layers.{layer}.{name.removeprefix(start)}": old
            for name, old in state.items()
            if name.startswith(start)
        }
    return {name: noise_like(seed, name, tensor, 1.0, torch.bfloat16) for name, tensor in shapes.items()}


@define("nemotron_h", heads=8, kv=4, layers=5, experts=4, ep=(1, 2, 4))
def nemotron_h(directory: Path, seed: str) -> None:
    """A layer does one thing: it keeps a state, attends, or is a feed-forward, dense or of experts; one group;
    biases everywhere.
    """
    kinds = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]
    facts = {"moe_latent_size": 36, "use_bias": True, "mlp_bias": True}
    write(directory, seed, nemotron_h_config(8, 4, 14, 1, layers_block_type=kinds, **facts))


@define("nemotron_h", heads=8, kv=2, layers=3, mtp=2, experts=4, ep=(1, 2), weights=False)
def nemotron_h_ahead(directory: Path, seed: str) -> None:
    """As the larger ones are published: experts of compressed features, two layers that predict ahead,
    config.json in the older words.
    """
    kinds = ["linear_attention", "moe", "full_attention"]
    facts = {"moe_latent_size": 36, "num_nextn_predict_layers": 1, "use_conv_bias": False, "tie_word_embeddings": False}
    write(directory, seed, nemotron_h_config(8, 2, 14, 2, layers_block_type=kinds, **facts))

    rewrite(directory, lambda state: state | nemotron_ahead(seed, state, ("backbone.layers.2.", "backbone.layers.1.")))
    configure(
        directory,
        "layers_block_type",
        "mtp_layers_block_type",
        hybrid_override_pattern="ME*",
        mtp_hybrid_override_pattern="*E",
    )
    configure(directory, num_hidden_layers=3)


@define("nemotron_h", heads=8, kv=4, layers=3, mtp=2, experts=4, ep=(1, 2))
def nemotron_h_fused(directory: Path, seed: str) -> None:
    """Experts in stacks, also of the layers that predict ahead, and the prefix of today's transformers."""
    kinds = ["moe", "full_attention", "linear_attention"]
    write(directory, seed, nemotron_h_config(8, 4, 14, 1, layers_block_type=kinds, num_nextn_predict_layers=1))

    def age(state: State) -> State:
        state = {name.replace("backbone.", "model."): tensor for name, tensor in state.items()}
        state |= nemotron_ahead(seed, state, ("model.layers.1.", "model.layers.0."))
        for start in ("model.layers.0.mixer.experts.", "mtp.layers.1.mixer.experts."):
            for part in ("up_proj", "down_proj"):
                each = [state.pop(f"{start}{n}.{part}.weight") for n in range(4)]
                state[f"{start}{part}"] = torch.stack(each)
        return state

    rewrite(directory, age)


KIMI_SQUARE = (r".*\.A_log",)  # [1, 1, heads, 1]


def kimi_linear_config(layers: int, **facts: Any) -> Any:
    from transformers import KimiLinearConfig

    given = {
        key: value
        for key, value in sizes(8, 4, 12, 72, 88, 331, 5).items()
        if key not in ("head_dim", "num_hidden_layers")
    }
    latent = {
        "num_key_value_heads": 8,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "qk_nope_head_dim": 10,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    state = {"linear_head_dim": 10, "linear_num_heads": 8, "linear_conv_kernel_dim": 3}
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"][:layers]
    return KimiLinearConfig(**given | latent, **experts, **state, num_hidden_layers=layers, layer_types=kinds, **facts)


@define("kimi_linear", heads=8, kv=8, layers=4, experts=4, ep=(1, 2, 4), square=KIMI_SQUARE)
def kimi_linear(directory: Path, seed: str) -> None:
    """As published: latent attention without positions and a delta net whose decay is of each feature;
    config.json in its own words.
    """
    write(directory, seed, kimi_linear_config(4))
    rewrite(
        directory,
        lambda state: {name.replace("layers.0.block_sparse_moe", "layers.0.mlp"): one for name, one in state.items()},
    )
    own = {
        "head_dim": 10,
        "num_heads": 8,
        "short_conv_kernel_size": 3,
        "full_attn_layers": [3],
        "kda_layers": [1, 2, 4],
    }
    configure(
        directory, "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim", "layer_types", "mlp_layer_types"
    )
    configure(directory, linear_attn_config=own, first_k_dense_replace=1)


@define("kimi_linear", heads=8, kv=8, layers=3, experts=4, ep=(1, 2), square=KIMI_SQUARE)
def kimi_linear_stacked(directory: Path, seed: str) -> None:
    """As transformers holds it: experts and convolutions in stacks; biases in attention."""
    write(directory, seed, kimi_linear_config(3, attention_bias=True))

    def age(state: State) -> State:
        for layer in range(3):
            start = f"model.layers.{layer}.self_attn."
            parts = [state.pop(f"{start}{part}_conv1d.weight", None) for part in "qkv"]
            if parts[0] is not None:
                state[f"{start}conv1d.weight"] = torch.cat([part for part in parts if part is not None])
            for name in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"):
                if start + name in state:
                    state[f"{start}forget_gate.{name}"] = state.pop(start + name)
            state = fused(state, f"model.layers.{layer}.block_sparse_moe.experts.", ("w1", "w3", "w2"))
        return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}

    rewrite(directory, age)


def minimax_config(kv: int, layers: int, **facts: Any) -> Any:
    from transformers import MiniMaxConfig

    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"][:layers]
    given = sizes(8, kv, 12, 72, 88, 331, 5) | {"num_hidden_layers": layers}
    return MiniMaxConfig(**given, num_local_experts=4, layer_types=kinds, block_size=6, **facts)


DECAYS = ("diagonal_decay", "key_decay", "query_decay", "slope_rate")


@define("minimax", heads=8, kv=4, layers=5, experts=4, ep=(1, 2, 4))
def minimax(directory: Path, seed: str) -> None:
    """As published: in most layers q, k and v of each head together, a norm over all heads and a gate;
    no decays are stored.
    """
    write(directory, seed, minimax_config(4, 5))
    rewrite(directory, lambda state: {name: one for name, one in state.items() if not name.endswith(DECAYS)})


@define("minimax", heads=8, kv=2, layers=4, experts=4, ep=(1, 2), weights=False)
def minimax_fused(directory: Path, seed: str) -> None:
    """As transformers holds it: with the decays that follow from the number of the layer,
    and experts in stacks; tied.
    """
    write(directory, seed, minimax_config(2, 4, tie_word_embeddings=True))

    def age(state: State) -> State:
        for layer in range(4):
            state = fused(state, f"model.layers.{layer}.block_sparse_moe.experts.", ("w1", "w3", "w2"))
        return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}

    rewrite(directory, age)


def minimax_m3_config(kv: int, layers: int) -> Any:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "dense_intermediate_size": 104,
    }
    kinds = {
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * (layers - 1)],
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
    }
    index = {"index_head_dim": 10, "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 6}
    given = sizes(8, kv, 12, 72, 40, 331, 5) | {"num_hidden_layers": layers}
    return MiniMaxM3VLTextConfig(**given, **experts, **kinds, **index)


@define("minimax_m3_vl_text", heads=8, kv=4, layers=4, experts=4, ep=(1, 2, 4))
def minimax_m3_fused(directory: Path, seed: str) -> None:
    """As transformers writes it: gate and up together, experts in stacks; later layers choose the blocks of tokens they
    attend to.
    """
    write(directory, seed, minimax_m3_config(4, 4))


@define("minimax_m3_vl_text", heads=8, kv=2, layers=3, experts=4, ep=(1, 2), weights=False, runs=False)
def minimax_m3(directory: Path, seed: str) -> None:
    """As published inside of a multimodal checkpoint: gate and up apart, a tensor for each expert, and older names."""
    write(directory, seed, minimax_m3_config(2, 3))

    def age(state: State) -> State:
        aged = {}
        for name, tensor in state.items():
            if ".mlp." in name and "layers.0." not in name:
                name = name.replace(".mlp.gate.e_score", ".mlp.e_score").replace(".mlp.", ".block_sparse_moe.")
            name = name.replace(".indexer.", ".index_")
            start, end = name.partition("gate_up_proj")[::2]
            if end == ".weight":
                aged |= dict(zip((f"{start}gate_proj.weight", f"{start}up_proj.weight"), tensor.chunk(2), strict=True))
            elif start.endswith("experts.") and name.endswith("gate_up_proj"):
                for part, stack in zip(("w1", "w3"), tensor.chunk(2, 1), strict=True):
                    aged |= {f"{start}{n}.{part}.weight": expert for n, expert in enumerate(stack)}
            elif name.endswith("experts.down_proj"):
                aged |= {f"{name.removesuffix('down_proj')}{n}.w2.weight": expert for n, expert in enumerate(tensor)}
            else:
                aged[name] = tensor
        return aged

    rewrite(directory, age)
