"""Mutation testing of a table: every row and axis is exchanged, transposed, shifted, renamed or dropped; a check must
fail.

    rows attn.k and attn.v exchanged            numerics: logits differ by 1.3, rounding is 4e-16
    row norm dropped                            opening: no row claims model.norm.weight

A wrong table that fits is consistent: what it converts, it merges back, so that `verify` finds nothing by digests,
weights or files. It is caught only where it does not fit a checkpoint, or where the model is run. Checkpoints are a
given one and synthetic ones, random and generated from the table: no square matrix, no two axes of the same size unless
the table forces it, and one for each set of optional rows.

Mutated tables are compared with the table as it is, on one rank. A given checkpoint is also run by transformers, which
says whether the table itself is right; without such a reference, nothing does.
"""

import tempfile
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Struct

from ..errors import ReshardError, unusable
from ..inputs.decode import about
from ..jobs.json_result import as_json
from ..jobs.verdict import WIDTH
from ..tables.families import Family
from ..text.progress import Progress, Silent
from .mutation_trial import CHECKS, EQUIVALENT, MISSED, OPEN, Bench, Trial, one_thread, tried
from .mutations import Mutation, mutations
from .synthetic import made_up

SHOWN = 40  # undetected mutations listed


class CheckTableResult(Struct, frozen=True, kw_only=True):
    """reshard check-table --json, version 1."""

    family: str
    ok: Annotated[bool, about("The table is not known to be wrong, nothing escaped, every row is in a checkpoint.")]
    proven: Annotated[bool, about("Every mutation was caught, and on a given checkpoint the table is right.")]
    rows: int
    axes: int
    checkpoints: tuple[str, ...]
    uncovered: Annotated[tuple[str, ...], about("Rows that no checkpoint has.")]
    rounding: Annotated[float | None, about("The largest difference that counts as none; null: nothing was run.")]
    itself: Annotated[str | None, about("The given checkpoint by the table as it is.")]
    right: Annotated[bool | None, about("Whether an independent implementation agrees; null where there is none.")]
    wrong: bool
    first: Annotated[dict[str, Any] | None, about("The first step to differ, where the table is wrong.")]
    skipped: Annotated[str | None, about("Why nothing was run.")]
    count: Annotated[dict[str, int], about("Mutations by what caught them.")]
    mutations: tuple[Trial, ...]


@dataclass(frozen=True)
class TableCheck:
    """What became of each mutation. `rounding`: the largest difference that counts as none; None where nothing was run.

    `right`: whether an independent implementation agrees with the table as it is, on a given checkpoint; None where
    there is none. Mutations are compared with the table as it is, so they say nothing about whether that is right.
    """

    family: str
    rows: int
    axes: int
    checkpoints: tuple[str, ...]
    trials: tuple[Trial, ...]
    uncovered: tuple[str, ...] = ()
    rounding: float | None = None
    itself: str = ""  # the given checkpoint by the table as it is, against transformers
    right: bool | None = None
    skipped: str | None = None  # why nothing was run
    first: Any = None  # runtime.used.Used: the first step to differ from transformers, where the table is wrong
    given: bool = False  # whether there was a checkpoint to try it on

    @property
    def count(self) -> Counter[str]:
        return Counter(trial.by for trial in self.trials)

    @property
    def missed(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.by == MISSED)

    @property
    def ok(self) -> bool:
        """The table is not known to be wrong, nothing escaped, and every row stands in a checkpoint;
        what was not run does not count.
        """
        return not self.missed and not self.uncovered and not self.wrong

    @property
    def wrong(self) -> bool:
        return self.right is False

    @property
    def proven(self) -> bool:
        """Every mutation was caught and, on a given checkpoint, the table agrees with an independent implementation."""
        return self.ok and not self.count[OPEN] and (self.right is not None or not self.given)

    def lines(self, each: bool = False) -> list[str]:
        """A report for people, the verdict first; with `each`, every mutation and what caught it."""
        count, wrong = self.count, len(self.trials) - self.count[EQUIVALENT]
        caught = sum(count[check] for check in CHECKS)
        share = f"{caught} of {wrong}" if caught < wrong else "all" if self.right or not self.given else f"{wrong}"
        caught_by = "differ from the table itself" if self.given and not self.right else "caught"
        found = [f"{self.family}: {share} {caught_by}: {wrong} mutations of {self.rows} rows and {self.axes} axes"]
        found += _wrapped(self.itself, 2) if self.itself else []
        found += [line for text in (self.first.lines() if self.first is not None else ()) for line in _wrapped(text, 4)]
        found += _wrapped(f"NOT CAUGHT: {len(self.missed)}", 2) if self.missed else []
        for trial in self.missed[:SHOWN]:
            found += _wrapped(f"{trial.name}: {trial.words}" if trial.words else trial.name, 4)
        found += [f"    … and {len(self.missed) - SHOWN} more"] if len(self.missed) > SHOWN else []
        for check, what in CHECKS.items():
            words = what
            if check == "numerics" and self.rounding is not None:
                words += f" (by more than {self.rounding:.1g})"
            found += _wrapped(f"{check:<11} {count[check]:>5}  {words}", 2, 21)
        found += _wrapped(f"{EQUIVALENT:<11} {count[EQUIVALENT]:>5}  the same layout, written differently", 2, 21)
        if count[OPEN]:
            found += _wrapped(f"{OPEN:<11} {count[OPEN]:>5}  fits, but the model was not run: {self.skipped}", 2, 21)
        found += _wrapped("What fits passes integrity, weights and sha256: a wrong table merges back what it split.", 0)
        for name in self.uncovered:
            found += _wrapped(f"no checkpoint has row {name}: provide one, --with PATH", 0)
        found += [line for name in self.checkpoints for line in _wrapped(f"checkpoint: {name}", 0, 2)]
        if each:
            for trial in self.trials:
                found += _wrapped(f"{trial.by:<11} {trial.name}{': ' + trial.words if trial.words else ''}", 0, 14)
        return found

    def to_json(self) -> dict[str, Any]:
        """As CheckTableResult."""
        found: dict[str, Any] = as_json(
            CheckTableResult(
                family=self.family,
                ok=self.ok,
                proven=self.proven,
                rows=self.rows,
                axes=self.axes,
                checkpoints=self.checkpoints,
                uncovered=self.uncovered,
                rounding=self.rounding,
                itself=self.itself or None,
                right=self.right,
                wrong=self.wrong,
                first=None if self.first is None else self.first.to_json(),
                skipped=self.skipped,
                count=dict(self.count),
                mutations=self.trials,
            )
        )
        return found


def _wrapped(text: str, indent: int, more: int | None = None) -> list[str]:
    first = " " * indent
    rest = " " * (indent + 2 if more is None else more)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def check_table(
    table: Family, given: Path | None = None, sample: int | None = None, progress: Progress | None = None
) -> TableCheck:
    """Mutate each row and axis of a family table, and report what catches each mutation.

    `given`: a checkpoint of the family, opened with the table first, and run if it is small; rows that it lacks are
    tested on synthetic ones. `sample`: test at most this many mutations, spread over all. Raises ReshardError where the
    table itself does not fit, or no synthetic checkpoint can be generated from it.
    """
    progress = progress or Silent()
    why = unusable("torch", "PyTorch")
    skipped = None if why is None else f"{why}: pip install 'reshard[runtime]'"
    with tempfile.TemporaryDirectory(prefix="reshard-check-") as scratch, _quiet_torch(skipped):
        benches = [Bench(str(given), given, table, skipped)] if given is not None else []
        for number, root in enumerate(made_up(table, Path(scratch)), 1):
            name = f"synthetic {number}"
            try:
                benches.append(Bench(name, root, table, skipped))
            except ReshardError as error:
                if given is None:
                    raise ReshardError(
                        f'family "{table.name}": the synthetic checkpoint generated from its table does not '
                        f"fit it: {error.message}",
                        "the table contradicts itself, or needs a config key that cannot be guessed: --with "
                        "PATH gives a checkpoint",
                    ) from None
        itself, right = benches[0].against_transformers() if given is not None else ("", None)
        todo = _spread(list(mutations(table)), sample)
        trials = []
        progress.start("testing mutations", len(todo), " mutations")
        for mutation in todo:
            trials.append(tried(mutation, table, benches))
            progress.advance(1)
        progress.finish()
    active = {at for bench in benches for at in bench.active}
    axes = {axis for row in table.rows for path in row.pattern.axes for axis in (*row.name.axes, *path)}
    return TableCheck(
        table.name,
        len(table.rows),
        len(axes),
        tuple(bench.words for bench in benches),
        tuple(trials),
        tuple(row.name.text for at, row in enumerate(table.rows) if at not in active),
        max((bench.rounding for bench in benches if not bench.why), default=None),
        itself,
        right,
        next((bench.why for bench in benches if bench.why), None),
        benches[0].first if given is not None else None,
        given is not None,
    )


@contextmanager
def _quiet_torch(skipped: str | None) -> Iterator[None]:
    if skipped is not None:
        yield
        return
    with one_thread():
        yield


def _spread(found: list[Mutation], sample: int | None) -> list[Mutation]:
    """Some of all, in their order; which, depends on their names alone."""
    if sample is None or sample >= len(found):
        return found
    chosen = sorted(range(len(found)), key=lambda at: zlib.crc32(found[at].name.encode()))[:sample]
    return [found[at] for at in sorted(chosen)]
