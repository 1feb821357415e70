"""Decoders built like Llama, and those that differ from it by a norm, a bias or a scale: one tiny checkpoint for each variant."""

from pathlib import Path

from fixtures import define, sizes, write


@define("smollm3", heads=8, kv=2, layers=5, weights=False)
def smollm3(directory: Path, seed: str) -> None:
    """Every fourth layer has no rotary positions."""
    from transformers import SmolLM3Config

    write(directory, seed, SmolLM3Config(**sizes(8, 2, 14, 72, 104, 331, 5)))
