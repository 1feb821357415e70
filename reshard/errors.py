"""What goes wrong, in words for the person who can mend it. Knows nothing about checkpoints."""

import errno
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path

from .text.escapes import in_line


class ReshardError(Exception):
    """Usage or refused input: `message` says what, where (tensor, file) and both numbers; `hint` says the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return with_hint(self.message, self.hint)


def unusable(package: str, called: str) -> str | None:
    """Why a package cannot be imported, whatever its installation raises; None where it can be."""
    try:
        import_module(package)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]:
            return f"{called} is not installed"
        reason, *_ = str(error).split("\n")
        return f"{called} cannot be imported: {type(error).__name__}: {reason}"
    return None


def with_hint(message: str, hint: str | None) -> str:
    """A message and its hint as one text. Lines of the message but the first are indented: a name with newlines in it
    forges no hint.
    """
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


def failed(doing: str, path: Path | str, error: OSError) -> PlaceError:
    """An OSError in words, with what can be done about it."""
    hints = {
        errno.ENOSPC: "free some space, or choose another destination; what was written has been removed",
        errno.EDQUOT: "the quota is used up: free some space, or choose another destination",
        errno.EACCES: "check the permissions of the path",
        errno.EPERM: "check the permissions of the path",
        errno.EROFS: "the file system is mounted read-only",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.ENOMEM: "raise the memory limit (ulimit -v, or the container's), or use fewer --workers",
        errno.EIO: "the storage reports a failure: check it, then try again",
        errno.ENOENT: "the file disappeared: was it moved or deleted meanwhile?",
    }
    where = error.filename if isinstance(error.filename, str) else path  # what was being read of a directory
    return PlaceError(f"{doing} {where} failed: {error.strerror or error}", hints.get(error.errno or 0))
