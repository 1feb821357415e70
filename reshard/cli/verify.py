"""`reshard verify`."""

import sys
from typing import Any

import click

from . import options
from .output import Talk, say, show


@click.command("verify", short_help="Check OUT by its manifest, and against the original.")
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="SRC", help="Compare every element with the original, bit by bit.")
@click.option("--sha256", is_flag=True, help="Hash the files that merging would write; an error where no digest of them is known.")
@click.option("--hub", metavar="ID", help="Compare these hashes with those that the Hub publishes; downloads no file.")
@click.option("--strict", is_flag=True, help="Files that the manifest does not list are a mismatch; otherwise they are unproven.")
@click.option("--only", metavar="RUNG", help="One of integrity, weights, sha256, numerics.")
@click.option("--numerics/--no-numerics", default=None, help="Run the model against the original (default: where it can be run here).")
@click.option("--exhaustive", is_flag=True, help="Run it on every row of the vocabulary.")
@click.option("--layers", is_flag=True, help="Run it layer by layer, in the memory of one, if it is larger than the machine's.")
@click.option("--processes", is_flag=True, help="Run it with a process per rank, connected by gloo, in place of threads.")
@click.option("--require", metavar="CHECKS", help="Exit 1 unless these pass: names with commas, or proven for all four, whole.")
@options.source
@options.workers
@options.talk
def command(out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Check OUT, rung by rung; "proven" only where all four passed. Exit 1 on a mismatch, or where --require is not met.

    \b
    integrity  sizes and digests, by the manifest
    weights    every element is the original's    --against SRC
    sha256     merging makes the published files  digests recorded, or --hub ID
    numerics   the model computes the same        --against SRC, transformers

    Digests prove integrity, not authenticity: whoever can change OUT can change its digests,
    too. Compare the root digest (reshard inspect OUT) with one from a source you trust, or use --hub.
    """
    from .. import api

    with Talk(progress_kind, quiet) as progress:
        report = api.verify(out, **options.arguments(given), progress=progress)
    if as_json:
        from ..jobs.convert import usage

        show(report.to_json() | usage())
    else:
        say(quiet and report.ok, *report.lines())
    if not report.ok:
        sys.exit(1)
