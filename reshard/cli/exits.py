"""Signals, errors and exit codes: the one place where errors are printed and exit codes are chosen."""

import os
import shlex
import signal
import sys
from types import FrameType

import click

from .. import __version__
from ..errors import with_hint
from ..text.escapes import visible
from .output import hush

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFECT = 70  # EX_SOFTWARE of sysexits.h: an internal error


def interrupted(number: int, _: FrameType | None) -> None:
    deaf()  # once is enough: cleaning up is not interrupted
    raise KeyboardInterrupt(number)


def deaf() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def ended_by(error: BaseException) -> int:
    """The exit code for a signal, as in a shell: 128 plus its number."""
    cause = error.__context__ if isinstance(error, click.exceptions.Abort) else error
    return 128 + int(next(iter(cause.args if cause else ()), signal.SIGINT))


def starved(error: Exception) -> tuple[str, str] | None:
    """Message and hint if the machine ran out of something; None for errors that are the program's own."""
    if isinstance(error, MemoryError):
        return "out of memory", "raise the limit (ulimit -v, or the container's), or use fewer --workers"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "cannot start another thread", "raise the limit (ulimit -u, ulimit -v), or use fewer --workers"
    if isinstance(error, ImportError) and not (error.name or "").startswith("reshard"):
        first = next(line for line in str(error.__cause__ or error).splitlines() if line.strip())
        return (
            f"cannot load a module: {first}",
            "raise the memory limit (ulimit -v) if there is one, or reinstall reshard",
        )
    return None


def defect(error: Exception) -> tuple[str, str]:
    """Message and hint for a bug. The traceback goes to a file or, with RESHARD_DEBUG set, to stderr."""
    import tempfile
    import traceback

    trace = "".join(traceback.format_exception(error))
    if os.environ.get("RESHARD_DEBUG"):
        click.echo(visible(trace), err=True)
        there = "the traceback is above"
    else:
        try:
            with tempfile.NamedTemporaryFile(
                "w",
                prefix="reshard-",
                suffix=".txt",
                encoding="utf-8",
                errors="replace",
                delete=False,
            ) as file:
                file.write(f"reshard {__version__}, Python {sys.version}\n{shlex.join(sys.argv)}\n\n{trace}")
            there = f"the traceback is in {file.name}"
        except OSError:
            there = "RESHARD_DEBUG=1 prints the traceback"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119
    first = str(error).partition("\n")[0][:200]
    return (
        f"internal error in reshard {__version__} at {where}: {type(error).__name__}: {first}",
        f"please report this bug: {there}",
    )


def fail(message: str, hint: str | None, code: int) -> None:
    try:
        click.echo(visible(f"error: {with_hint(message, hint)}"), err=True)
    except OSError:  # a full disk under stderr, a terminal that was closed
        hush(sys.stderr)
    sys.exit(code)
