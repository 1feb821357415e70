"""Rotary positions: the angles of each position, for every variant that config.json can name, and the rotation itself.

The variants are those of transformers' modeling_rope_utils; some depend on the length of the sequence.
"""

import math

import torch
from torch import Tensor

from .spec import Rope, mscale


def angles(rope: Rope | None, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [batch, seq, size/2] for positions [batch, seq]; computed in float32."""
    if rope is None:
        return None
    reach = int(positions.max()) + 1 if rope.kind in ("dynamic", "longrope") else 0
    frequencies, factor = _frequencies(rope, reach, positions.device)
    turns = positions[..., None].float() * frequencies
    return (turns.cos() * factor).to(dtype), (turns.sin() * factor).to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """x [batch, heads, seq, features] with the first features of each head rotated; interleaved pairs become halves."""
    if turn is None:
        return x
    cos, sin = (part[:, None] for part in turn)
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _frequencies(rope: Rope, reach: int, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies [size/2], and what cosines and sines are multiplied by."""
    said, size, base = rope.scaling, rope.size, rope.base
    factor = said.get("factor") or rope.positions / rope.original
    if rope.kind == "dynamic":  # depends on the sequence length, or a given `alpha`
        stretched = factor * max(reach, rope.positions) / rope.positions - (factor - 1)
        base *= (said.get("alpha") or stretched) ** (size / (size - 2))
    steps = base ** (torch.arange(0, size, 2, device=device).float() / size)
    plain = 1.0 / steps
    if rope.kind == "proportional":
        turning = int(said.get("partial_rotary_factor", 1.0) * size // 2)
        return torch.where(torch.arange(len(plain), device=device) < turning, plain / said.get("factor", 1.0), 0.0), 1.0
    if rope.kind == "linear":
        return plain / factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope, factor), 1.0
    if rope.kind == "yarn":
        return _yarn(steps, rope, factor), _yarn_factor(rope, factor)
    if rope.kind == "longrope":
        side = "long" if reach > rope.original else "short"
        correction = math.sqrt(1 + math.log(factor) / math.log(rope.original)) if factor > 1 else 1.0
        correction = said.get(f"{side}_mscale") or said.get("attention_factor") or correction
        return 1.0 / (torch.tensor(said[f"{side}_factor"], device=device).float() * steps), correction
    return plain, 1.0


def _llama3(plain: Tensor, rope: Rope, factor: float) -> Tensor:
    """Long wavelengths are stretched, short ones are kept, those between are blended."""
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    waves = 2 * math.pi / plain
    blend = (rope.original / waves - low) / (high - low)
    mixed = (1 - blend) * plain / factor + blend * plain
    between = (waves >= rope.original / high) & (waves <= rope.original / low)
    return torch.where(between, mixed, torch.where(waves > rope.original / low, plain / factor, plain))


def _yarn(steps: Tensor, rope: Rope, factor: float) -> Tensor:
    """A ramp between stretched and plain frequencies."""

    def dimension(rotations: float) -> float:
        return rope.size * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = (
        dimension(rope.scaling.get("beta_fast", 32.0)),
        dimension(rope.scaling.get("beta_slow", 1.0)),
    )
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    ramp = ((torch.arange(len(steps), device=steps.device).float() - low) / (high - low or 0.001)).clamp(0, 1)
    return ramp / (factor * steps) + (1 - ramp) / steps


def _yarn_factor(rope: Rope, factor: float) -> float:
    said = rope.scaling
    if "attention_factor" in said:
        return float(said["attention_factor"])
    if said.get("mscale") and said.get("mscale_all_dim"):
        return mscale(factor, said["mscale"]) / mscale(factor, said["mscale_all_dim"])
    return mscale(factor, 1.0)
