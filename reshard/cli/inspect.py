"""`reshard inspect`."""

import click

from ..text.escapes import in_json, visible
from . import options
from .output import show


@click.command("inspect", short_help="Show family, sizes, dtypes, files and layout.")
@click.argument("src", metavar="SRC")
@click.option("--draft-table", is_flag=True, help="Print a starter family table, inferred from names and shapes.")
@options.source
@options.talk
def command(
    src: str,
    draft_table: bool,
    revision: str | None,
    family: str | None,
    as_json: bool,
    progress_kind: str,
    quiet: bool,
) -> None:
    """Show what a checkpoint is: family, sizes, dtypes, files, layout, provenance.

    For a family without a table: --draft-table > my.toml, edit it, then convert with --family my.toml.
    """
    from ..jobs import inspect as describe

    if draft_table:
        from ..authoring import draft

        start = draft.draft(describe.published(src, revision))
        show(start.to_json() if as_json else in_json(start.text.rstrip("\n")))
        if not quiet and not as_json:
            click.echo(visible(start.words()), err=True)
        return
    found = describe.describe(src, revision, family)
    show(found.to_json() if as_json else found.text(), quiet and not as_json)
