"""`reshard check-table`."""

import sys

import click

from . import options
from .output import Talk, show


@click.command("check-table", short_help="Test a family table by mutating it.")
@click.argument("family", metavar="FAMILY")
@click.option(
    "--with",
    "given",
    metavar="PATH",
    help="Also test on this checkpoint of the family, next to synthetic ones.",
)
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Try only N mutations, spread over all of them.")
@click.option("--all", "each", is_flag=True, help="List every mutation and what detected it.")
@options.talk
def command(
    family: str,
    given: str | None,
    sample: int | None,
    each: bool,
    as_json: bool,
    progress_kind: str,
    quiet: bool,
) -> None:
    """Test a family table: mutate each row and axis, and report undetected mutations.

    FAMILY is the name of a shipped table, or your own TOML file. An undetected mutation is a mistake that no check
    would catch. Exit 1 if there are any, or if the table is found to be wrong.
    """
    from .. import api

    with Talk(progress_kind, quiet) as progress:
        found = api.check_table(family, given=given, sample=sample, progress=progress)
    show(found.to_json() if as_json else "\n".join(found.lines(each)), quiet and found.ok and not as_json)
    if not found.ok:
        sys.exit(1)
