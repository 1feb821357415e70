"""Lost ranks: they died, hung, or diverged."""

from collections.abc import Mapping

from reshard.errors import PlaceError


class Lost(PlaceError):
    """A rank of the job died, hung or diverged; the message names it and the phase."""


def differing(texts: Mapping[int, str]) -> tuple[int, str] | None:
    """The first rank whose text differs from most, and how; of two ranks, the lower one is right."""
    said = [texts[rank] for rank in sorted(texts)]
    usual = max(said, key=said.count)
    for rank in sorted(texts):
        if texts[rank] != usual:
            other = min(r for r in texts if texts[r] == usual)
            return rank, f"it is at {texts[rank]}, rank {other} at {usual}"
    return None
