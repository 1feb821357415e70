"""The command line: one module per command. Only this package prints or exits.

To add a command, add a module named for it that defines a click command called `command`, and list the name in
COMMANDS. A command parses its options, calls the API and prints. Modules are imported when their command is asked for,
and what a command uses when it runs, so that `reshard --help` is instant.
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
    """Commands by name, imported on first use."""

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
    """Convert checkpoints between parallel layouts: bit-exact, as fast as cp, in little memory.

    \b
    SRC: a checkpoint directory, a Hub id (org/name), or an output of convert.
      reshard plan    SRC --tp 8         show what would be written
      reshard convert SRC OUT --tp 8     write one directory per rank
      reshard verify  OUT --against SRC  prove it correct
      reshard convert OUT BACK --to hf   restore the original files, bit for bit
      reshard generate OUT --prompt "…"  run the model
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the one place where errors are printed and exit codes are chosen."""
    gc.set_threshold(50_000)  # plans are many small values and little garbage: default collections cost 10 %
    atexit.register(gc.freeze)  # no final collection either
    _open_all()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy only moves bytes here: no thread pool for linear algebra
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may be any bytes; in JSON this is how to write them.
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(cli.main(arguments, prog_name="reshard", standalone_mode=False) or 0)
    except ReshardError as error:
        fail(error.message, error.hint, error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        fail("interrupted; unfinished output was removed", None, ended_by(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.ClickException as error:
        usage = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "reshard"
        fail(error.format_message(), f"see {usage} --help", 2)
    except OSError as error:
        hush(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", None, 3)
    except Exception as error:
        if (words := starved(error)) is not None:
            fail(*words, 3)
        fail(*defect(error), DEFECT)


def _open_all() -> None:
    """Open closed standard streams (`2>&-`) on /dev/null: the next file opened must not take their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
