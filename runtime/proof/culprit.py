"""Which stored tensor makes a step go wrong."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source


def culprit(step: str, out: "Source", source: "Source") -> str:
    """Which tensor of a step differs from the original's, in words; "" if none does."""
    from reshard.jobs import verify

    layer = step.partition(",")[0].replace("layer ", "layers.") + "." if step.startswith("layer ") else ""
    odd = [failure for failure in verify.weights(out, source, 2).failures if layer in failure]
    return f": {odd[0]}" if odd else ""
