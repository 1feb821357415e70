"""Verdicts: what a verification did, rung by rung, and what that proves. Does nothing itself."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .companions import Left, words
from .units import decimal

MOST = 20  # failures told one by one to people
WIDTH = 80  # columns
RUNGS = ("integrity", "weights", "sha256", "numerics")


@dataclass
class Rung:
    """One check: what was compared, what was found wrong, and what could not be compared. `skipped`: why nothing was; `words`: what was
    done, where that is more than counts, and `details`, a line each."""

    name: str
    bytes: int = 0
    tensors: int = 0
    files: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    words: str = ""
    details: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def whole(self) -> bool:
        """Whether it was climbed, and nothing left out."""
        return self.ok and self.skipped is None and not self.notes

    def lines(self) -> Iterator[str]:
        verdict = "skipped" if self.skipped is not None else "ok" if self.ok else f"{len(self.failures)} FAILED"
        counts = f"{self.tensors} tensors, " * bool(self.tensors) + f"{self.files} files, {decimal(self.bytes)}"
        done = self.skipped or self.words or counts
        done += f", {self.seconds:.1f} s" if self.skipped is None else ""
        yield from textwrap.wrap(f"{self.name:<10} {verdict:<10} {done}", WIDTH, subsequent_indent=" " * 22, break_on_hyphens=False)
        for detail in self.details:
            yield from textwrap.wrap(detail, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 22)
        yield from (f"  {failure}" for failure in self.failures[:MOST])
        if len(self.failures) > MOST:
            yield f"  … and {len(self.failures) - MOST} more"
        for note in self.notes:
            yield from textwrap.wrap(f"  unproven: {note}", WIDTH, subsequent_indent=" " * 12)

    def to_json(self) -> dict[str, Any]:
        return {
            "rung": self.name,
            "ok": self.ok,
            "skipped": self.skipped,
            "bytes": self.bytes,
            "tensors": self.tensors,
            "files": self.files,
            "seconds": round(self.seconds, 3),
            "failures": self.failures,
            "failed": len(self.failures),
            "unproven": self.notes,
            **({"numbers": self.numbers} if self.numbers else {}),
        }


@dataclass(frozen=True)
class Report:
    """What a verification did, rung by rung."""

    out: Path
    rungs: tuple[Rung, ...]
    left: tuple[Left, ...] = ()  # what a conversion left out

    @property
    def ok(self) -> bool:
        return all(rung.ok for rung in self.rungs)

    @property
    def failures(self) -> list[str]:
        return [failure for rung in self.rungs for failure in rung.failures]

    @property
    def proven(self) -> bool:
        """Whether every rung was climbed and left nothing out."""
        return {rung.name for rung in self.rungs if rung.whole} == set(RUNGS)

    @property
    def verdict(self) -> str:
        """In a line."""
        if not self.ok:
            return "FAILED: " + ", ".join(rung.name for rung in self.rungs if not rung.ok)
        if self.proven:
            return "proven: the files are whole, hold the original's bits, make its files again, and compute what it computes"
        said = {
            "integrity": "the directory is whole",
            "weights": "every element is the source's, bit by bit",
            "sha256": "merging makes the published files",
            "numerics": "the shards compute what the original does",
        }
        if any(rung.name == "integrity" and rung.notes for rung in self.rungs):
            said["integrity"] = "the files that the manifest lists are whole"
        done = [said[rung.name] for rung in self.rungs if rung.skipped is None]
        if not done:
            return "nothing was proven"
        if [rung.name for rung in self.rungs if rung.skipped is None] == ["integrity"] and len(self.rungs) > 1:
            done.append("--against SRC compares every element with the original")
        return "; ".join(done)

    def lines(self) -> list[str]:
        """What a person wants to know."""
        return [*(line for rung in self.rungs for line in rung.lines()), *words(self.left, WIDTH), *textwrap.wrap(self.verdict, WIDTH)]

    def to_json(self) -> dict[str, Any]:
        rungs = [rung.to_json() for rung in self.rungs]
        told = {"out": str(self.out), "ok": self.ok, "proven": self.proven, "verdict": self.verdict, "rungs": rungs}
        return told | {"left": [file._asdict() for file in self.left]}
