"""Ranks that are lost: died, hung, or went another way than the others."""

from collections.abc import Mapping

from reshard.errors import PlaceError


class Lost(PlaceError):
    """A rank of the job died, hung or went another way; the message names it and the phase."""


def differing(texts: Mapping[int, str]) -> tuple[int, str] | None:
    """The first rank that says something else than most do, and that in words; of two ranks, the lower one is right."""
    said = [texts[rank] for rank in sorted(texts)]
    usual = max(said, key=said.count)
    for rank in sorted(texts):
        if texts[rank] != usual:
            other = min(r for r in texts if texts[r] == usual)
            return rank, f"it brought {texts[rank]}; rank {other} brought {usual}"
    return None
