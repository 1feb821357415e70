"""What a step of a decoder uses: which stored tensors, by their names."""

from .model import EMBEDDING, OWN


def belongs(name: str, step: str, tied: bool) -> bool:
    """Whether a tensor of a rank, or a logical one under the name that it has in a layer, is needed in a step."""
    if step.startswith("layer "):
        layer, _, part = step.removeprefix("layer ").partition(", ")
        inside = name.removeprefix(f"layers.{layer}.")
        if name.startswith("ple_"):
            return part == OWN
        attends = "attn" in inside or inside.startswith(("lin.", "moa."))
        return inside != name and (part not in ("attention", "feed-forward") or attends == (part == "attention"))
    embeds = name in ("embed", "embed_proj", "pos_embed") or name.startswith("embed_norm")
    return not name.startswith("layers.") and (embeds if step == EMBEDDING else not embeds or (tied and name == "embed"))
