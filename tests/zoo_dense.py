"""Decoders built like Llama, and those that differ from it by a norm, a bias or a scale: one tiny checkpoint for each variant."""

from pathlib import Path

from fixtures import configure, define, sizes, write


@define("smollm3", heads=8, kv=2, layers=5, weights=False)
def smollm3(directory: Path, seed: str) -> None:
    """Every fourth layer has no rotary positions."""
    from transformers import SmolLM3Config

    write(directory, seed, SmolLM3Config(**sizes(8, 2, 14, 72, 104, 331, 5)))


@define("ministral", heads=8, kv=4, layers=3)
def ministral(directory: Path, seed: str) -> None:
    """Layers with a window and without."""
    from transformers import MinistralConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    write(directory, seed, MinistralConfig(**sizes(8, 4, 14, 72, 88, 331, 3), sliding_window=7, layer_types=kinds))


@define("gemma", heads=8, kv=1, layers=3, weights=False)
def gemma(directory: Path, seed: str) -> None:
    """Multi-query, tied without a word, and hidden_act is gelu where its approximation is meant: as the first release was published."""
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
