"""What a conversion did, as data and as text; and what this process used for it."""

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ..checkpoints.companions import Left, words
from ..text.units import decimal
from .verdict import WIDTH


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
        return {
            "out": str(self.out),
            "already": self.already,
            **(
                {"decided_by": self.decided_by, "checked": self.checked, "added": list(self.added)}
                if self.already
                else {}
            ),
            "root": self.root,
            "bytes_read": self.read,
            "bytes_written": self.written,
            "seconds": round(self.seconds, 3),
            "left": to_builtins(self.left),
            "towers": list(self.towers),
            "notes": list(self.notes),
            **usage(),
        }

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


def usage() -> dict[str, int]:
    """This process' own account of itself: peak memory and bytes moved by system calls."""
    found = {}
    for path, keys in (
        ("/proc/self/status", {"VmHWM": "peak_memory"}),
        ("/proc/self/io", {"rchar": "io_read", "wchar": "io_written"}),
    ):
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
