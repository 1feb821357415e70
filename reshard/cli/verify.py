"""`reshard verify`."""

import sys
from typing import Any

import click

from . import options
from .output import Talk, say, show


@click.command("verify", short_help="Check OUT against its manifest and the original.")
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="SRC", help="Compare every element with the original checkpoint, bit by bit.")
@click.option(
    "--sha256",
    is_flag=True,
    help="Hash the files that merging would write; an error if no digests are known.",
)
@click.option("--hub", metavar="ID", help="Compare these hashes with those on the Hub; downloads no files.")
@click.option("--strict", is_flag=True, help="Fail on files that the manifest does not list (default: unproven).")
@click.option("--only", metavar="CHECK", help="Run one check: integrity, weights, sha256 or numerics.")
@click.option(
    "--numerics/--no-numerics",
    default=None,
    help="Run the model and compare it with the original (default: if possible here).",
)
@click.option("--exhaustive", is_flag=True, help="Numerics: cover every row of the vocabulary.")
@click.option("--layers", is_flag=True, help="Numerics: one layer at a time, for a model larger than memory.")
@click.option("--processes", is_flag=True, help="Numerics: one process per rank, over gloo, instead of threads.")
@click.option(
    "--require",
    metavar="CHECKS",
    help="Exit 1 unless these pass: comma-separated, or proven for all four in full.",
)
@options.source
@options.workers
@options.talk
def command(out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Run four checks on OUT, which is "proven" only if all pass in full. Exit 1 on a mismatch or an unmet --require.

    \b
    integrity  sizes and digests match the manifest
    weights    every element equals the original's   --against SRC
    sha256     merging restores the published files  recorded digests, or --hub ID
    numerics   the model computes the same           --against SRC, transformers

    Digests prove integrity, not authenticity: anyone who can change OUT can also change its digests.
    Compare the root digest (reshard inspect OUT) with one from a source you trust, or use --hub.
    """
    from .. import api

    with Talk(progress_kind, quiet) as progress:
        report = api.verify(out, **options.arguments(given), progress=progress)
    if as_json:
        from ..jobs.json_result import usage

        show(report.to_json() | usage())
    else:
        say(quiet and report.ok, *report.lines())
    if not report.ok:
        sys.exit(1)
