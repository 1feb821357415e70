"""Verdicts: what each check of a verification found, and what that proves. Does nothing itself."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from msgspec import UNSET, Struct, UnsetType

from ..checkpoints.companions import Left, words
from ..errors import ReshardError
from ..inputs.decode import about
from ..text.units import decimal
from .json_result import Usage, as_json

MOST = 20  # failures listed for people
WIDTH = 80  # columns
Name = Literal["integrity", "weights", "sha256", "numerics"]
CHECKS: tuple[str, ...] = get_args(Name)
PROVEN = "proven"  # what can be required besides the checks: all of them, with nothing left out

# What became of a check. Only OK is a pass; agreement with oneself and a comparison that says nothing are no passes,
# and no failures.
Status = Literal["ok", "failed", "skipped", "self-consistent", "unproven"]
_STATUSES: tuple[Status, ...] = get_args(Status)
OK, FAILED, SKIPPED, SELF_CONSISTENT, UNPROVEN = _STATUSES


class CheckResult(Struct, frozen=True, kw_only=True):
    """What one check found."""

    check: Name
    status: Status
    ok: Annotated[bool | None, about("True where it passed, false where it failed, null where it did neither.")]
    skipped: Annotated[str | None, about("Why it did not run.")]
    bytes: int
    tensors: int
    files: int
    seconds: float
    failures: list[str]
    failed: Annotated[int, about("How many failures there are.")]
    unproven: Annotated[list[str], about("What could not be compared.")]
    hint: str | UnsetType = UNSET
    numbers: Annotated[dict[str, Any] | UnsetType, about("What a check measured; its keys are the check's own.")] = (
        UNSET
    )


class VerifyResult(Usage, frozen=True, kw_only=True):
    """reshard verify --json, version 2."""

    out: str
    ok: Annotated[bool, about("The exit code: nothing failed, and what was required was reached.")]
    proven: Annotated[bool, about("Every check passed, with nothing left out.")]
    passed: Annotated[int, about("How many of the four checks passed.")]
    required: Annotated[tuple[str, ...], about("What --require says.")]
    unmet: Annotated[list[str], about("What was required and not reached.")]
    verdict: str
    checks: tuple[CheckResult, ...]
    left: Annotated[tuple[Left, ...], about("What a conversion left out.")]


@dataclass
class Check:
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
    best: Status = OK
    hint: str = ""

    @property
    def status(self) -> Status:
        """OK, FAILED, SKIPPED, SELF_CONSISTENT or UNPROVEN."""
        return FAILED if self.failures else SKIPPED if self.skipped is not None else self.best

    @property
    def ok(self) -> bool:
        """Whether it passed; what was skipped or proves nothing did not."""
        return self.status == OK

    @property
    def whole(self) -> bool:
        """Whether it passed, with nothing left out."""
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

    @property
    def result(self) -> CheckResult:
        return CheckResult(
            check=cast(Name, self.name),
            status=self.status,
            ok={OK: True, FAILED: False}.get(self.status),
            skipped=self.skipped,
            bytes=self.bytes,
            tensors=self.tensors,
            files=self.files,
            seconds=round(self.seconds, 3),
            failures=self.failures,
            failed=len(self.failures),
            unproven=self.notes,
            hint=self.hint or UNSET,
            numbers=self.numbers or UNSET,
        )


@dataclass(frozen=True)
class Report:
    """What a verification found, check by check. `required`: what had to pass, names of checks, or PROVEN."""

    out: Path
    checks: tuple[Check, ...]
    left: tuple[Left, ...] = ()  # what a conversion left out
    required: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and what was required was reached."""
        return not self.failures and not self.unmet

    @property
    def failures(self) -> list[str]:
        return [failure for check in self.checks for failure in check.failures]

    @property
    def proven(self) -> bool:
        """Whether every check passed and left nothing out."""
        return {check.name for check in self.checks if check.whole} == set(CHECKS)

    @property
    def passed(self) -> int:
        """Of the four checks, how many passed."""
        return sum(check.ok for check in self.checks)

    @property
    def unmet(self) -> list[str]:
        """What was required and was not reached, in words."""
        became = {check.name: check for check in self.checks}

        def lacking(names: Sequence[str], whole: bool) -> Iterator[str]:
            for name in names:
                check = became.get(name)
                if check is None or not check.ok:
                    yield f"{name}: {check.status if check is not None else 'not run'}"
                elif whole and not check.whole:
                    yield f"{name}: only in part"

        found = lacking([name for name in self.required if name != PROVEN], False)
        return list(dict.fromkeys([*found, *(lacking(CHECKS, True) if PROVEN in self.required else ())]))

    @property
    def verdict(self) -> str:
        """In a line."""
        if self.failures:
            return "FAILED: " + ", ".join(check.name for check in self.checks if check.failures)
        if self.proven:
            return (
                f"proven: {len(CHECKS)} of {len(CHECKS)} checks passed: the files are intact, every element "
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
        if any(check.name == "integrity" and check.notes for check in self.checks):
            said["integrity", OK] = "the files that the manifest lists are intact"
        done = [said[check.name, check.status] for check in self.checks if (check.name, check.status) in said] or [
            "nothing is proven"
        ]
        if [check.name for check in self.checks if check.skipped is None] == ["integrity"] and len(self.checks) > 1:
            done.append("--against SRC compares every element with the original")
        return f"{self.passed} of {len(CHECKS)} checks passed: {'; '.join(done)}"

    def lines(self) -> list[str]:
        """What a person wants to know."""
        found = [
            *(line for check in self.checks for line in check.lines()),
            *words(self.left, WIDTH),
            *textwrap.wrap(self.verdict, WIDTH),
        ]
        if self.unmet:
            found += textwrap.wrap(f"NOT MET: --require {','.join(self.required)}: {', '.join(self.unmet)}", WIDTH)
        return found

    def to_json(self) -> dict[str, Any]:
        """As VerifyResult."""
        found: dict[str, Any] = as_json(
            VerifyResult(
                out=str(self.out),
                ok=self.ok,
                proven=self.proven,
                passed=self.passed,
                required=self.required,
                unmet=self.unmet,
                verdict=self.verdict,
                checks=tuple(check.result for check in self.checks),
                left=self.left,
            )
        )
        return found


def required(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """What `--require` says: PROVEN, or names of checks, separated by commas.
    Raises ReshardError for what is neither.
    """
    names = given.split(",") if isinstance(given, str) else given or ()
    names = tuple(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in (*CHECKS, PROVEN):
            raise ReshardError(
                f"--require {name or given!r}: no such check",
                f"checks are {', '.join(CHECKS)}; {PROVEN} is all of them",
            )
    return names
