"""A sample of a plan: a few windows of every source tensor. Comparing them is cheap, and notices another fine-tune; it
proves nothing.

The first and the last window of a tensor are in it, and one at a place that follows from its name, so that the sample
is always the same.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import xxhash

from ..containers.dtypes import BITS
from ..layout.cut import Point
from ..layout.join import Component, Copy, Plan
from .worker import Key, Place

WINDOW = 4096  # bytes
SPAN = 64 << 10  # bytes of a source from one row of a window to the last, at most
ROWS = 8  # of a window: each may take a system call
ALIGNED = 32  # elements: whole bytes, however small an element is
PARTS = 1000  # a place in a tensor is told in so many parts of it


def sample(plan: Plan, source: Place, destination: Place) -> Plan:
    """The plan that moves no more than the sample."""
    return replace(plan, components=tuple(_Sampled(c.joins, c.axes, source, destination) for c in plan.components))


@dataclass(frozen=True, eq=False)
class _Sampled(Component):
    source: Place
    destination: Place

    def copies(self, at: Point) -> Iterator[Copy]:
        held: dict[Key, list[Copy]] = defaultdict(list)
        for copy in super().copies(at):
            held[copy.src.rank, copy.src_name].append(copy)
        for key, copies in held.items():
            anywhere = xxhash.xxh3_64_intdigest(key[1].encode()) % (PARTS + 1)
            seen = set()
            for copy, share in (
                (copies[0], 0),
                (copies[len(copies) * anywhere // (PARTS + 1)], anywhere),
                (copies[-1], PARTS),
            ):
                window = self._window(copy, share)
                if (place := (window.dst.rank, window.dst_name, window.dst_offset)) not in seen:
                    seen.add(place)
                    yield window

    def _window(self, copy: Copy, share: int) -> Copy:
        """The part of a copy at `share` of each of its dimensions; all of a strided one, which cannot be cut before it
        is resolved.
        """
        entry = self.source.locate((copy.src.rank, copy.src_name))[1]
        if entry.strides is not None or self.destination.locate((copy.dst.rank, copy.dst_name))[1].strides is not None:
            return copy
        bits = BITS[entry.dtype]
        left = WINDOW * 8 // bits  # elements
        src, dst, dims = copy.src_offset, copy.dst_offset, []
        for n, s, d in reversed(copy.dims):
            if s == d == 1:
                low = max(n - left, 0) * share // PARTS // ALIGNED * ALIGNED
                count = n - low if share == PARTS else min(n - low, left)
            else:
                count = max(1, min(n, ROWS, left, SPAN * 8 // (s * bits) if s else 1))
                low = (n - count) * share // PARTS
            src, dst, left = src + low * s, dst + low * d, max(1, left // count)
            dims.append((count, s, d))
        return copy._replace(src_offset=src, dst_offset=dst, dims=tuple(dim for dim in reversed(dims) if dim[0] > 1))
