"""`reshard diff`."""

import sys
from typing import Any

import click

from . import options
from .output import Talk, show


@click.command("diff", short_help="Compare two checkpoints in any layouts, tensor by tensor.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--family", metavar="NAME|FILE", help="Family table to use for both.")
@options.workers
@options.talk
def command(a: str, b: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Compare the tensors of A and B bit by bit, whatever their layouts, and report differences.
    Exit 1 if any differ.
    """
    from .. import api

    with Talk(progress_kind, quiet) as progress:
        found = api.diff(a, b, **options.arguments(given), progress=progress)
    show(found.to_json() if as_json else "\n".join(found.lines()), quiet and found.equal and not as_json)
    if not found.equal:
        sys.exit(1)
