"""What the JSON results of commands share: the form of their values, and what the process used."""

import json
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType, to_builtins

from ..inputs.decode import about

_KEYS = {"/proc/self/status": {"VmHWM": "peak_memory"}, "/proc/self/io": {"rchar": "io_read", "wchar": "io_written"}}


def as_json(value: Any) -> Any:
    """A typed value as JSON has it, tuples as lists. A file's name in it may not be valid Unicode."""
    return json.loads(json.dumps(to_builtins(value)))


class Usage(Struct, frozen=True, kw_only=True):
    """What the process used, in bytes, as far as the system says."""

    peak_memory: Annotated[int | UnsetType, about("Peak resident memory.")] = UNSET
    io_read: Annotated[int | UnsetType, about("Read by system calls.")] = UNSET
    io_written: Annotated[int | UnsetType, about("Written by system calls.")] = UNSET


def usage() -> dict[str, int]:
    """The keys of `Usage`, of this process, up to now."""
    found = {}
    for path, keys in _KEYS.items():
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key in keys:
                number, _, unit = value.strip().partition(" ")
                found[keys[key]] = int(number) * (1024 if unit == "kB" else 1)
    return found
