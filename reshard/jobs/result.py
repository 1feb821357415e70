"""What a conversion did, as data and as text."""

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, UnsetType

from ..checkpoints.companions import Left, words
from ..inputs.decode import about
from ..store.digest import Digest
from ..text.units import decimal
from .json_result import Usage, as_json, usage
from .verdict import WIDTH


class ConvertResult(Usage, frozen=True, kw_only=True):
    """reshard convert --json, version 1."""

    out: str
    already: Annotated[bool, about("Whether the conversion was finished before: nothing was written.")]
    decided_by: Annotated[
        str | UnsetType | None,
        about("What showed that the source is the same: sha256, commit, sample, content; with `already`."),
    ] = UNSET
    checked: Annotated[bool | UnsetType, about("Whether OUT was checked against its digests; with `already`.")] = UNSET
    added: Annotated[tuple[str, ...] | UnsetType, about("What was added to OUT; with `already`.")] = UNSET
    root: Annotated[Digest | None, about("The digest over all files; null for Hugging Face files.")]
    bytes_read: int
    bytes_written: int
    seconds: float
    left: Annotated[tuple[Left, ...], about("What is not copied.")]
    towers: Annotated[tuple[str, ...], about("Components that several ranks store whole.")]
    notes: Annotated[tuple[str, ...], about("What killed conversions left nearby.")]


@dataclass(frozen=True)
class Result:
    """What a conversion did. Times in seconds, sizes in bytes.

    `root`: the digest over all files, None for Hugging Face files. `already`: OUT held it; then `decided_by` is what
    showed that the source is the same (see `same_job`), `checked` whether OUT was found whole, and `added` what was
    added to it.
    """

    out: Path | str
    already: bool
    root: str | None
    read: int
    written: int
    seconds: float
    left: tuple[Left, ...] = ()
    towers: tuple[str, ...] = ()  # that stand whole on several ranks
    decided_by: str | None = None
    checked: bool = False
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what killed conversions to other destinations have left near this one

    def to_json(self) -> dict[str, Any]:
        """As ConvertResult."""
        result = ConvertResult(
            out=str(self.out),
            already=self.already,
            decided_by=self.decided_by if self.already else UNSET,
            checked=self.checked if self.already else UNSET,
            added=self.added if self.already else UNSET,
            root=self.root,
            bytes_read=self.read,
            bytes_written=self.written,
            seconds=round(self.seconds, 3),
            left=self.left,
            towers=self.towers,
            notes=self.notes,
        )
        found: dict[str, Any] = as_json(result)
        return found | usage()

    def lines(self, src: str, *options: str) -> list[str]:
        """What a person wants to know, the next command last; `options` are what it must say of the source, too."""
        if self.already:
            how = {
                "sample": "same source, by a sample; --checksum compares everything",
                "content": "same source, byte by byte",
            }
            unchecked = "" if self.checked else "; OUT was not checked"
            why = f"same plan, {how.get(self.decided_by or '', f'same source, by {self.decided_by}')}{unchecked}"
            done = textwrap.wrap(f"{self.out} is up to date ({why})", WIDTH, break_on_hyphens=False)
            done += [f"added: {', '.join(self.added)}"] if self.added else []
        else:
            rate = decimal(round(self.read / max(self.seconds, 1e-9)))
            done = [f"{self.out}: {decimal(self.written)} written in {self.seconds:.1f} s ({rate}/s)"]
        if self.towers:
            done += textwrap.wrap(
                f"kept whole: {', '.join(self.towers)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
            )
        done += words(self.left, WIDTH)
        if self.root is not None:
            done.append(f"root digest: {self.root}")
        done += [f"note: {note}" for note in self.notes]
        out, src = (f"./{name}" if name.startswith("-") else name for name in (str(self.out), src))
        return [*done, f"next: {shlex.join(['reshard', 'verify', out, '--against', src, *options])}"]
