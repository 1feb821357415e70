"""`reshard check-table`."""

import sys

import click

from . import options
from .output import Talk, show


@click.command("check-table", short_help="Damage a family table in every way, and see what notices.")
@click.argument("family", metavar="FAMILY")
@click.option("--with", "given", metavar="PATH", help="A checkpoint of the family to try it on, beside made-up ones.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only so many damages, spread over all.")
@click.option("--all", "each", is_flag=True, help="List every damage, and what noticed it.")
@options.talk
def command(family: str, given: str | None, sample: int | None, each: bool, as_json: bool, progress_kind: str, quiet: bool) -> None:
    """Exchange, transpose, shift and drop every row and axis of a table, and say what notices each damage.

    FAMILY is the name of a shipped table, or a TOML file of your own: what is not noticed in it, nothing protects. Exit 1 if there is any.
    """
    from .. import api

    with Talk(progress_kind, quiet) as progress:
        found = api.check_table(family, given=given, sample=sample, progress=progress)
    show(found.to_json() if as_json else "\n".join(found.lines(each)), quiet and found.ok and not as_json)
    if not found.ok:
        sys.exit(1)
