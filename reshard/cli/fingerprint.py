"""`reshard fingerprint`."""

import click

from ..errors import ReshardError
from . import options
from .options import Whole
from .output import Talk, show


@click.command("fingerprint", short_help="Hash weights so that every layout of them agrees.")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@click.option("--rank", type=Whole(), metavar="N", help="Only this rank's share, as JSON.")
@click.option("--combine", is_flag=True, help="PATHs are the shares of all ranks: combine them.")
@click.option(
    "--seed",
    default="",
    metavar="TEXT",
    help="Use other multipliers; fingerprints compare only under the same seed.",
)
@options.source
@options.workers
@options.talk
def command(
    paths: tuple[str, ...],
    rank: int | None,
    combine: bool,
    seed: str,
    revision: str | None,
    family: str | None,
    workers: int | None,
    as_json: bool,
    progress_kind: str,
    quiet: bool,
) -> None:
    """Print a hash per logical tensor and one of the model, the same for every layout of the weights. Not
    cryptographic.

    Each node can hash its own rank's files; the shares are combined afterwards:

    \b
    reshard fingerprint OUT --rank 3 > share-3.json
    reshard fingerprint --combine share-*.json
    """
    from .. import api
    from ..jobs import fingerprint as prints
    from ..store.location import local

    found: prints.Fingerprint | prints.Share
    if combine:
        if rank is not None or seed:
            raise ReshardError(
                "--combine takes existing shares: it does not go with --rank or --seed",
                "leave them out",
            )
        found = prints.combine(prints.read_share(local(path, "a share")) for path in paths)
    elif len(paths) != 1:
        raise ReshardError(f"{len(paths)} paths were given, expected one", "to combine shares: --combine FILE…")
    else:
        with Talk(progress_kind, quiet) as progress:
            found = api.fingerprint(
                paths[0],
                rank=rank,
                seed=seed,
                revision=revision,
                family=family,
                workers=workers or 0,
                progress=progress,
            )
    show(found.to_json() if as_json or isinstance(found, prints.Share) else found.text())
