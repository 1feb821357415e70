"""Verdicts: what each check of a verification found, and what that proves. Does nothing itself."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ..checkpoints.companions import Left, words
from ..errors import ReshardError
from ..text.units import decimal

MOST = 20  # failures told one by one to people
WIDTH = 80  # columns
RUNGS = ("integrity", "weights", "sha256", "numerics")
PROVEN = "proven"  # what can be required besides the rungs: all of them, with nothing left out

# What became of a check. Only OK is a pass; agreement with oneself and a comparison that says nothing are no passes,
# and no failures.
OK, FAILED, SKIPPED, SELF_CONSISTENT, UNPROVEN = "ok", "failed", "skipped", "self-consistent", "unproven"


@dataclass
class Rung:
    """One check: what was compared, what was found wrong, and what could not be compared. `skipped`: why nothing was;
    `words`: what was done, where that is more than counts, and `details`, a line each.

    `best`: its status where nothing failed: OK, or less where what it was compared with is worth less; `hint`: how to
    get a better one.
    """

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
    best: str = OK
    hint: str = ""

    @property
    def status(self) -> str:
        """OK, FAILED, SKIPPED, SELF_CONSISTENT or UNPROVEN."""
        return FAILED if self.failures else SKIPPED if self.skipped is not None else self.best

    @property
    def ok(self) -> bool:
        """Whether it passed; what was skipped or proves nothing did not."""
        return self.status == OK

    @property
    def whole(self) -> bool:
        """Whether it was climbed, and nothing left out."""
        return self.ok and not self.notes

    def lines(self) -> Iterator[str]:
        verdict = f"{len(self.failures)} FAILED" if self.failures else self.status
        counts = f"{self.tensors} tensors, " * bool(self.tensors) + f"{self.files} files, {decimal(self.bytes)}"
        done = self.skipped or self.words or counts
        done += f", {self.seconds:.1f} s" if self.skipped is None else ""
        yield from textwrap.wrap(
            f"{self.name:<10} {verdict:<10} {done}", WIDTH, subsequent_indent=" " * 22, break_on_hyphens=False
        )
        for detail in self.details:
            yield from textwrap.wrap(detail, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 22)
        yield from (f"  {failure}" for failure in self.failures[:MOST])
        if len(self.failures) > MOST:
            yield f"  … and {len(self.failures) - MOST} more"
        for note in self.notes:
            yield from textwrap.wrap(f"  unproven: {note}", WIDTH, subsequent_indent=" " * 12)
        if self.hint:
            yield from textwrap.wrap(f"  hint: {self.hint}", WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False)

    def to_json(self) -> dict[str, Any]:
        """`ok`: true where it passed, false where it failed, null where it did neither; `status` says which."""
        return {
            "rung": self.name,
            "status": self.status,
            "ok": {OK: True, FAILED: False}.get(self.status),
            "skipped": self.skipped,
            "bytes": self.bytes,
            "tensors": self.tensors,
            "files": self.files,
            "seconds": round(self.seconds, 3),
            "failures": self.failures,
            "failed": len(self.failures),
            "unproven": self.notes,
            **({"hint": self.hint} if self.hint else {}),
            **({"numbers": self.numbers} if self.numbers else {}),
        }


@dataclass(frozen=True)
class Report:
    """What a verification did, rung by rung. `required`: what had to pass, names of rungs, or PROVEN."""

    out: Path
    rungs: tuple[Rung, ...]
    left: tuple[Left, ...] = ()  # what a conversion left out
    required: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and what was required was reached."""
        return not self.failures and not self.unmet

    @property
    def failures(self) -> list[str]:
        return [failure for rung in self.rungs for failure in rung.failures]

    @property
    def proven(self) -> bool:
        """Whether every rung passed and left nothing out."""
        return {rung.name for rung in self.rungs if rung.whole} == set(RUNGS)

    @property
    def passed(self) -> int:
        """Of the four rungs, how many passed."""
        return sum(rung.ok for rung in self.rungs)

    @property
    def unmet(self) -> list[str]:
        """What was required and was not reached, in words."""
        became = {rung.name: rung for rung in self.rungs}

        def lacking(names: Sequence[str], whole: bool) -> Iterator[str]:
            for name in names:
                rung = became.get(name)
                if rung is None or not rung.ok:
                    yield f"{name}: {rung.status if rung is not None else 'not run'}"
                elif whole and not rung.whole:
                    yield f"{name}: only in part"

        found = lacking([name for name in self.required if name != PROVEN], False)
        return list(dict.fromkeys([*found, *(lacking(RUNGS, True) if PROVEN in self.required else ())]))

    @property
    def verdict(self) -> str:
        """In a line."""
        if self.failures:
            return "FAILED: " + ", ".join(rung.name for rung in self.rungs if rung.failures)
        if self.proven:
            return (
                f"proven: {len(RUNGS)} of {len(RUNGS)} checks passed: the files are intact, every element "
                f"equals the original's,"
                " merging restores the published files, and the model computes the same"
            )
        said = {
            ("integrity", OK): "the files are intact",
            ("weights", OK): "every element equals the original's, bit by bit",
            ("sha256", OK): "merging restores the published files",
            ("numerics", OK): "the model computes the same as the original",
            ("numerics", SELF_CONSISTENT): "the shards agree with this runtime at TP 1, which is not independent",
        }
        if any(rung.name == "integrity" and rung.notes for rung in self.rungs):
            said["integrity", OK] = "the files that the manifest lists are intact"
        done = [said[rung.name, rung.status] for rung in self.rungs if (rung.name, rung.status) in said] or [
            "nothing is proven"
        ]
        if [rung.name for rung in self.rungs if rung.skipped is None] == ["integrity"] and len(self.rungs) > 1:
            done.append("--against SRC compares every element with the original")
        return f"{self.passed} of {len(RUNGS)} checks passed: {'; '.join(done)}"

    def lines(self) -> list[str]:
        """What a person wants to know."""
        found = [
            *(line for rung in self.rungs for line in rung.lines()),
            *words(self.left, WIDTH),
            *textwrap.wrap(self.verdict, WIDTH),
        ]
        if self.unmet:
            found += textwrap.wrap(f"NOT MET: --require {','.join(self.required)}: {', '.join(self.unmet)}", WIDTH)
        return found

    def to_json(self) -> dict[str, Any]:
        """`ok` is the exit code: nothing failed, and what was required was reached."""
        return {
            "out": str(self.out),
            "ok": self.ok,
            "proven": self.proven,
            "passed": self.passed,
            "required": list(self.required),
            "unmet": self.unmet,
            "verdict": self.verdict,
            "rungs": [rung.to_json() for rung in self.rungs],
            "left": to_builtins(self.left),
        }


def required(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """What `--require` says: PROVEN, or names of rungs, separated by commas.
    Raises ReshardError for what is neither.
    """
    names = given.split(",") if isinstance(given, str) else given or ()
    names = tuple(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in (*RUNGS, PROVEN):
            raise ReshardError(
                f"--require {name or given!r}: no such check", f"checks are {', '.join(RUNGS)}; {PROVEN} is all of them"
            )
    return names
