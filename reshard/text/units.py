"""Sizes in words: decimal units for files, binary ones for memory; and durations. Never mixed in a row."""

from collections.abc import Iterable


def decimal(n: int) -> str:
    """Bytes of files: 17.64 GB, 1.50 MB, 12 B."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"


def binary(n: int) -> str:
    """Bytes of memory: 1.25 GiB, 65.0 MiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 100 << 20 else f"{n / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """`75` → "1:15", `4000` → "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive numbers folded, first and last of each run: 0, 1, 2, 5 → (0, 2), (5, 5)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def folded(numbers: Iterable[int], least: int = 2) -> str:
    """Numbers as people write them, runs of `least` or more folded: 0-7, 9."""
    parts: list[str] = []
    for low, high in runs(numbers):
        parts += [f"{low}-{high}"] if high - low + 1 >= least else map(str, range(low, high + 1))
    return ", ".join(parts)
