"""Decoders built like Llama, and those that differ from it by a norm, a bias or a scale: one tiny checkpoint for each
variant.
"""

from pathlib import Path
from typing import Any

from fixtures import HUNYUAN_ROPE, configure, define, rewrite, sizes, write


@define("qwen2", heads=8, kv=4, layers=5, square=(r".*\.[qo]_proj\.weight",))
def qwen2_plain(directory: Path, seed: str) -> None:
    """Heads that make up the hidden size, as vLLM takes for granted."""
    from transformers import Qwen2Config

    write(directory, seed, Qwen2Config(**sizes(8, 4, 10, 56, 104, 341, 5) | {"hidden_size": 80}), shard=None)


@define("smollm3", heads=8, kv=2, layers=5, weights=False)
def smollm3(directory: Path, seed: str) -> None:
    """Every fourth layer has no rotary positions; tied without a word, and an angle base that nobody says."""
    from transformers import SmolLM3Config

    write(directory, seed, SmolLM3Config(**sizes(8, 2, 14, 72, 104, 331, 5)))
    configure(directory, "tie_word_embeddings", "rope_parameters")


@define("smollm3", heads=8, kv=4, layers=4)
def smollm3_listed(directory: Path, seed: str) -> None:
    """The layers without positions are listed, and a head is stored."""
    from transformers import SmolLM3Config

    facts = {"no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": False}
    write(directory, seed, SmolLM3Config(**sizes(8, 2, 14, 72, 104, 331, 4) | {"num_key_value_heads": 4}, **facts))


@define("ministral", heads=8, kv=4, layers=3)
def ministral(directory: Path, seed: str) -> None:
    """Layers with a window and without."""
    from transformers import MinistralConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    write(directory, seed, MinistralConfig(**sizes(8, 4, 14, 72, 88, 331, 3), sliding_window=7, layer_types=kinds))


@define("gemma", heads=8, kv=1, layers=3, weights=False)
def gemma(directory: Path, seed: str) -> None:
    """Multi-query, tied without a word, and hidden_act is gelu where its approximation is meant: as the first release
    was published.
    """
    from transformers import GemmaConfig

    write(directory, seed, GemmaConfig(**sizes(8, 2, 14, 72, 88, 331, 3) | {"num_key_value_heads": 1}))
    configure(directory, "tie_word_embeddings", hidden_act="gelu")


@define("seed_oss", heads=8, kv=4, layers=3)
def seed_oss(directory: Path, seed: str) -> None:
    """Bias on q, k and v, said by no key; none on o."""
    from transformers import SeedOssConfig

    write(directory, seed, SeedOssConfig(**sizes(8, 4, 14, 72, 88, 331, 3)))
    configure(directory, "attention_bias", "attention_out_bias")


@define("glm", heads=8, kv=2, layers=3, weights=False)
def glm(directory: Path, seed: str) -> None:
    """Bias on q, k and v; gate and up fused; half of each head is rotated, in pairs that stand beside each other."""
    from transformers import GlmConfig

    write(directory, seed, GlmConfig(**sizes(8, 2, 12, 72, 88, 331, 3)))


@define("glm", heads=8, kv=4, layers=3)
def glm_plain(directory: Path, seed: str) -> None:
    """Without biases, tied."""
    from transformers import GlmConfig

    write(directory, seed, GlmConfig(**sizes(8, 4, 12, 72, 88, 331, 3), attention_bias=False, tie_word_embeddings=True))


@define("glm4", heads=8, kv=4, layers=3)
def glm4(directory: Path, seed: str) -> None:
    """A norm before and after attention, and before and after the feed-forward."""
    from transformers import Glm4Config

    write(directory, seed, Glm4Config(**sizes(8, 4, 12, 72, 88, 331, 3)))


@define("helium", heads=8, kv=4, layers=3, square=(r".*\.[qo]_proj\.weight",))
def helium(directory: Path, seed: str) -> None:
    """Rotated in pairs that stand beside each other. Heads times head_dim is hidden, by definition."""
    from transformers import HeliumConfig

    write(directory, seed, HeliumConfig(**sizes(8, 4, 12, 72, 88, 331, 3) | {"hidden_size": 96}))


@define("ernie4_5", heads=8, kv=2, layers=3, weights=False)
def ernie4_5(directory: Path, seed: str) -> None:
    """Tied, rotated in pairs that stand beside each other."""
    from transformers import Ernie4_5Config

    write(directory, seed, Ernie4_5Config(**sizes(8, 2, 14, 72, 88, 331, 3)))


@define("ernie4_5", heads=8, kv=4, layers=3)
def ernie4_5_bias(directory: Path, seed: str) -> None:
    """use_bias: on every projection; a head of its own."""
    from transformers import Ernie4_5Config

    write(directory, seed, Ernie4_5Config(**sizes(8, 4, 14, 72, 88, 331, 3), use_bias=True, tie_word_embeddings=False))


@define("gemma3_text", heads=8, kv=2, layers=7, weights=False)
def gemma3_text(directory: Path, seed: str) -> None:
    """Norms on q and k, a window in five layers of six, two sets of rotary angles."""
    from transformers import Gemma3TextConfig

    write(directory, seed, Gemma3TextConfig(**sizes(8, 2, 14, 72, 88, 331, 7), sliding_window=5))


@define("gemma3_text", heads=8, kv=4, layers=3)
def gemma3_text_old(directory: Path, seed: str) -> None:
    """As Google published it: the angles and the window's layers under the keys of transformers 4."""
    from transformers import Gemma3TextConfig

    write(
        directory, seed, Gemma3TextConfig(**sizes(8, 4, 10, 72, 88, 317, 3), sliding_window=5, sliding_window_pattern=2)
    )
    rope = {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    configure(directory, "rope_parameters", "layer_types", "_sliding_window_pattern", sliding_window_pattern=2, **rope)


@define("olmo", heads=8, kv=4, layers=3)
def olmo(directory: Path, seed: str) -> None:
    """Norms without weights; q, k and v are clipped."""
    from transformers import OlmoConfig

    write(directory, seed, OlmoConfig(**sizes(8, 4, 14, 72, 88, 331, 3), clip_qkv=0.7))


@define("olmo", heads=8, kv=8, layers=3)
def olmo_tied(directory: Path, seed: str) -> None:
    """Tied, not clipped, as OLMo 1B was published: as many key heads as query heads, said by null;
    biases in attention.
    """
    from transformers import OlmoConfig

    facts = {"num_key_value_heads": 8, "tie_word_embeddings": True, "attention_bias": True}
    write(directory, seed, OlmoConfig(**sizes(8, 4, 14, 72, 88, 331, 3) | facts))
    configure(directory, num_key_value_heads=None, clip_qkv=None)


@define("olmo3", heads=8, kv=4, layers=5)
def olmo3(directory: Path, seed: str) -> None:
    """Windows in three layers of four."""
    from transformers import Olmo3Config

    write(directory, seed, Olmo3Config(**sizes(8, 4, 14, 72, 88, 331, 5), sliding_window=5))


@define("olmo3", heads=8, kv=2, layers=5, weights=False)
def olmo3_yarn(directory: Path, seed: str) -> None:
    """The layers without a window have stretched angles, under the keys of transformers 4, as published."""
    from transformers import Olmo3Config

    write(directory, seed, Olmo3Config(**sizes(8, 2, 14, 72, 88, 331, 5), sliding_window=5))
    rope = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    rope |= {"attention_factor": 1.2079441541679836}
    configure(directory, "rope_parameters", rope_theta=500000.0, rope_scaling=rope)


@define("granite", heads=8, kv=4, layers=3)
def granite(directory: Path, seed: str) -> None:
    """Embeddings, scores, what layers add, and logits are scaled by numbers of config.json."""
    from transformers import GraniteConfig

    scales = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }
    write(directory, seed, GraniteConfig(**sizes(8, 4, 14, 72, 88, 331, 3), **scales))


@define("cohere", heads=8, kv=4, layers=3)
def cohere(directory: Path, seed: str) -> None:
    """One norm, without bias, feeds attention and feed-forward; tied; logits are scaled."""
    from transformers import CohereConfig

    write(directory, seed, CohereConfig(**sizes(8, 4, 14, 72, 88, 331, 3), logit_scale=0.8))


@define("cohere", heads=8, kv=2, layers=3, weights=False)
def cohere_norms(directory: Path, seed: str) -> None:
    """use_qk_norm: each head has a norm of its own, as in Command R+; the head is stored; biases in attention."""
    from transformers import CohereConfig

    facts = {"use_qk_norm": True, "tie_word_embeddings": False, "attention_bias": True}
    write(directory, seed, CohereConfig(**sizes(8, 2, 14, 72, 88, 331, 3), **facts))


@define("cohere2", heads=8, kv=4, layers=5, square=(r".*\.[qo]_proj\.weight",))
def cohere2(directory: Path, seed: str) -> None:
    """Three layers of four have a window, and the others no positions. Heads times head_dim is hidden,
    by definition.
    """
    from transformers import Cohere2Config

    write(directory, seed, Cohere2Config(**sizes(8, 4, 12, 72, 88, 331, 5) | {"hidden_size": 96}, sliding_window=5))


@define("arcee", heads=8, kv=4, layers=3)
def arcee(directory: Path, seed: str) -> None:
    """No gate: the square of what is positive; biases everywhere."""
    from transformers import ArceeConfig

    write(directory, seed, ArceeConfig(**sizes(8, 4, 14, 72, 88, 331, 3), attention_bias=True, mlp_bias=True))


@define("nemotron", heads=8, kv=2, layers=3, weights=False)
def nemotron(directory: Path, seed: str) -> None:
    """As Arcee, with norms that subtract the mean and multiply by 1 + weight; half of each head is rotated."""
    from transformers import NemotronConfig

    write(directory, seed, NemotronConfig(**sizes(8, 2, 12, 72, 88, 331, 3)))


def stablelm_config(kv: int, **facts: Any) -> Any:
    from transformers import StableLmConfig

    return StableLmConfig(**sizes(8, 2, 16, 72, 88, 331, 3) | {"num_key_value_heads": kv, "hidden_size": 128}, **facts)


STABLELM_SQUARE = (r".*\.[qo]_proj\.weight",)


@define("stablelm", heads=8, kv=4, layers=3, square=STABLELM_SQUARE)
def stablelm(directory: Path, seed: str) -> None:
    """Norms with biases, a quarter of each head is rotated. Heads times head_dim is hidden, by definition."""
    write(directory, seed, stablelm_config(4))


@define("stablelm", heads=8, kv=8, layers=3, square=(r".*\.[qkvo]_proj\.weight",))
def stablelm_bias(directory: Path, seed: str) -> None:
    """Bias on q, k and v; attention and feed-forward start from one norm."""
    write(directory, seed, stablelm_config(8, use_qkv_bias=True, use_parallel_residual=True))


@define("stablelm", heads=8, kv=4, layers=3, square=STABLELM_SQUARE)
def stablelm_norms(directory: Path, seed: str) -> None:
    """qk_layernorm: a norm of each head, one tensor for each; attention and feed-forward start from one norm,
    as in the 12B model.
    """
    write(directory, seed, stablelm_config(4, qk_layernorm=True, use_parallel_residual=True))


@define("exaone4", heads=8, kv=4, layers=5)
def exaone4(directory: Path, seed: str) -> None:
    """Norms after attention and feed-forward, and on q and k; layers without a window have no positions."""
    from transformers import Exaone4Config

    write(directory, seed, Exaone4Config(**sizes(8, 4, 14, 72, 88, 331, 5), sliding_window=5))
    configure(directory, sliding_window_pattern="LLLG")


@define("exaone4", heads=8, kv=2, layers=3, weights=False)
def exaone4_small(directory: Path, seed: str) -> None:
    """Tied, no windows at all: every layer has positions."""
    from transformers import Exaone4Config

    facts = {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True}
    write(directory, seed, Exaone4Config(**sizes(8, 2, 14, 72, 88, 331, 3), **facts))
    configure(directory, sliding_window_pattern=None)


@define("hunyuan_v1_dense", heads=8, kv=4, layers=3)
def hunyuan(directory: Path, seed: str) -> None:
    """Norms on q and k after their rotation; angles stretched by alpha, under the keys of transformers 4."""
    from transformers import HunYuanDenseV1Config

    write(directory, seed, HunYuanDenseV1Config(**sizes(8, 4, 14, 72, 88, 331, 3)))
    configure(directory, "rope_parameters", rope_theta=10000.0, rope_scaling=HUNYUAN_ROPE, use_qk_norm=True)


@define("hunyuan_v1_dense", heads=8, kv=2, layers=3, weights=False)
def hunyuan_tied(directory: Path, seed: str) -> None:
    """Tied, plain angles."""
    from transformers import HunYuanDenseV1Config

    write(directory, seed, HunYuanDenseV1Config(**sizes(8, 2, 14, 72, 88, 331, 3), tie_word_embeddings=True))


@define("ministral3", heads=8, kv=4, layers=3)
def ministral3(directory: Path, seed: str) -> None:
    """Queries grow with their positions; the limits are low, for a short prompt to reach them."""
    from transformers import Ministral3Config

    rope = {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
    }
    rope |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    write(directory, seed, Ministral3Config(**sizes(8, 4, 14, 72, 88, 331, 3), rope_parameters=rope))


@define("phi3", heads=8, kv=4, layers=3, square=(r".*\.o_proj\.weight",))
def phi4_mini(directory: Path, seed: str) -> None:
    """Three quarters of each head are rotated, by angles of two lists, under the keys of transformers 4; tied. Here
    heads times head_dim is hidden."""
    from transformers import Phi3Config

    short, long = [1.0 + at / 10 for at in range(6)], [2.0 + at for at in range(6)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": short,
        "long_factor": long,
    }
    facts = {"rope_parameters": rope, "original_max_position_embeddings": 8, "tie_word_embeddings": True}
    write(directory, seed, Phi3Config(**sizes(8, 4, 16, 72, 88, 331, 3) | {"hidden_size": 128}, **facts))
    old = {"type": "longrope", "short_factor": short, "long_factor": long}
    configure(
        directory, "rope_parameters", "head_dim", rope_theta=10000.0, partial_rotary_factor=0.75, rope_scaling=old
    )


@define("apertus", heads=8, kv=4, layers=3)
def apertus(directory: Path, seed: str) -> None:
    """No gate: an activation with two numbers of each layer that were learned, and two that were not;
    norms on q and k.
    """
    from transformers import ApertusConfig

    write(directory, f"{seed} 2", ApertusConfig(**sizes(8, 4, 14, 72, 88, 331, 3)))  # no two of these numbers are equal
    rewrite(
        directory, lambda state: {name: -tensor if name.endswith("eps") else tensor for name, tensor in state.items()}
    )


@define("apertus", heads=8, kv=2, layers=3, weights=False)
def apertus_old(directory: Path, seed: str) -> None:
    """The angles under the keys of transformers 4, as published; biases in attention."""
    from transformers import ApertusConfig

    write(directory, seed, ApertusConfig(**sizes(8, 2, 14, 72, 88, 331, 3), attention_bias=True))
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    configure(directory, "rope_parameters", rope_theta=12000000, rope_scaling=rope)


@define("gemma2", heads=8, kv=2, layers=3, weights=False)
def gemma2_bias(directory: Path, seed: str) -> None:
    """Biases in attention."""
    from transformers import Gemma2Config

    write(directory, seed, Gemma2Config(**sizes(8, 2, 14, 72, 104, 331, 3), sliding_window=9, attention_bias=True))


@define("olmo2", heads=8, kv=2, layers=3, weights=False)
def olmo2_bias(directory: Path, seed: str) -> None:
    """Biases in attention, before its norms."""
    from transformers import Olmo2Config

    write(directory, seed, Olmo2Config(**sizes(8, 2, 10, 56, 104, 331, 3), attention_bias=True))
