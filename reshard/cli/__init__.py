"""The command line: one module per command, named for it, with a click command called `command`. Only this package prints or exits.

Imports nothing heavy before a command needs it, so that `reshard --help` is instant: a command's module is imported when it is asked for,
and what the command uses when it runs.
"""

import atexit
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module

import click

from .. import __version__
from ..errors import ReshardError
from .exits import DEFECT, STOPS, defect, ended_by, fail, interrupted, starved
from .output import hush

__all__ = ["COMMANDS", "DEFECT", "cli", "main"]

COMMANDS = ("check-table", "convert", "diff", "explain", "fingerprint", "generate", "inspect", "plan", "verify")


class _Commands(Mapping[str, click.Command]):
    """Commands by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        command: click.Command = import_module(f"{__name__}.{name.replace('-', '_')}").command
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@click.group(commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reshard")
def cli() -> None:
    """Convert checkpoints between parallel layouts: exactly, at the speed of cp, in little memory.

    \b
    SRC: a checkpoint directory, a Hub id (org/name), or what convert wrote.
      reshard plan    SRC --tp 8         what would be written, and what it needs
      reshard convert SRC OUT --tp 8     write one directory per rank
      reshard verify  OUT --against SRC  prove it
      reshard convert OUT BACK --to hf   the original files again, byte for byte
      reshard generate OUT --prompt "…"  run the model
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the one place where errors are printed and exit codes are chosen."""
    gc.set_threshold(50_000)  # plans are many small values, few of them garbage: looking for cycles so often takes a tenth of starting up
    atexit.register(gc.freeze)  # nor is there need to look for them at the end
    _open_all()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy moves bytes here; its linear algebra need not start threads
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes; in JSON this is how to write them
    try:
        sys.exit(cli.main(arguments, prog_name="reshard", standalone_mode=False) or 0)
    except ReshardError as error:
        fail(error.message, error.hint, error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        fail("interrupted; what was not finished has been removed", None, ended_by(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.ClickException as error:
        usage = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "reshard"
        fail(error.format_message(), f"{usage} --help shows what there is", 2)
    except OSError as error:
        hush(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", None, 3)
    except Exception as error:
        if (words := starved(error)) is not None:
            fail(*words, 3)
        fail(*defect(error), DEFECT)


def _open_all() -> None:
    """Standard streams that were closed (`2>&-`) lead nowhere, or files would be opened in their place, and written to as such."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
