"""Memory: how much this process may use, and how running out of it is reported."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import sysconf
from pathlib import Path

from reshard.errors import PlaceError
from reshard.text.units import binary

_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup v2, v1
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def limit() -> int:
    """The memory limit in bytes: the least of the machine's, the container's, and that of `ulimit`."""
    found = [sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")]
    asked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    found += [soft for soft in asked if soft != resource.RLIM_INFINITY]
    for name in _CGROUPS:
        with suppress(OSError, ValueError):  # none, or "max"
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def exhausted(error: BaseException) -> bool:
    """Whether an error of Python, the system or torch means that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (OSError, RuntimeError)) and any(word in str(error) for word in _WORDS)
    )


@contextmanager
def reported(what: str, hint: str) -> Iterator[None]:
    """Report memory that ran out as PlaceError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise PlaceError(f"{what}: out of memory: this process may use {binary(limit())}", hint) from error
