"""Memory: how much of it this process may have, and what it looks like when it does not get it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import sysconf
from pathlib import Path

from reshard.errors import PlaceError
from reshard.text.units import binary

_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # of the second version, of the first
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def limit() -> int:
    """Bytes: what the machine has, the container gives, and `ulimit` allows, whichever is least."""
    found = [sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")]
    asked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    found += [soft for soft in asked if soft != resource.RLIM_INFINITY]
    for name in _CGROUPS:
        with suppress(OSError, ValueError):  # none, or "max"
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def exhausted(error: BaseException) -> bool:
    """Whether this is memory that was not given, by Python, the system or torch."""
    return isinstance(error, MemoryError) or (isinstance(error, (OSError, RuntimeError)) and any(word in str(error) for word in _WORDS))


@contextmanager
def told(what: str, hint: str) -> Iterator[None]:
    """Memory that is not given raises PlaceError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise PlaceError(f"{what}: there is not enough memory: this process may have {binary(limit())}", hint) from error
