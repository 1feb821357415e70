"""What goes wrong, in words for the person who can mend it. Knows nothing about checkpoints."""

import re
from collections import defaultdict

from .escapes import in_line


class ReshardError(Exception):
    """Usage or refused input: `message` says what, where (tensor, file) and both numbers; `hint` says the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return told(self.message, self.hint)


def told(message: str, hint: str | None) -> str:
    """A message and its hint as one text. Lines of the message but the first are indented: a name with newlines in it forges no hint."""
    message = re.sub(r"\n(?! )", "\n  ", message)
    return message if hint is None else f"{message}\n\nhint: {hint}"


class MismatchError(ReshardError):
    """Two things that must be equal are not: a verification failed."""

    exit_code = 1


class PlaceError(ReshardError):
    """The machine refused: I/O, space, a lock, the network. A retry may help."""

    exit_code = 3


class Replaced(PlaceError):
    """A directory became another one while it was being read."""

    def __init__(self, path: object, what: str = "was replaced while being read") -> None:
        super().__init__(f"{path}: {what}", "another job writes it: try again")


class Problems:
    """Collects what is wrong, grouped: one line per kind of problem and folded name, with its count and an example."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = defaultdict(list)

    def add(self, line: str, example: str = "") -> None:
        self._found[in_line(line)].append(in_line(example))

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def raise_if_any(self, what: str, hint: str | None = None, most: int = 20) -> None:
        if not self._found:
            return
        lines = []
        for line, examples in list(self._found.items())[:most]:
            shown = next((example for example in examples if example), "")
            count = f"{len(examples)} × " if len(examples) > 1 else ""
            lines.append(f"  {count}{line}" + (f" (e.g. {shown})" if shown and shown not in line else ""))
        if len(self._found) > most:
            lines.append(f"  … and {len(self._found) - most} more kinds of problem")
        raise ReshardError("\n".join([what, *lines]), hint)
