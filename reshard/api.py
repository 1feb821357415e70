"""The functions behind the commands, for use from Python: `reshard.plan`, `reshard.convert`, `reshard.verify`.

Paths or Hub ids in, frozen results out; prints nothing, exits nowhere. Raises ReshardError. What one function alone
needs is imported there: starting up is a quarter of converting a small checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import threads
from .checkpoints.opening import open_any, table_of
from .checkpoints.source import Source
from .errors import ReshardError
from .layout.mesh import Mesh
from .store import location
from .store.directory import unchanged
from .store.workfolder import check_whole
from .text.progress import Progress

if TYPE_CHECKING:
    from .authoring.check_table import TableCheck
    from .jobs.diff import Difference
    from .jobs.explain import Explanation
    from .jobs.fingerprint import Fingerprint, Share
    from .jobs.job import Job, Options
    from .jobs.plan import Report
    from .jobs.result import Result
    from .jobs.verdict import Check
    from .jobs.verdict import Report as Verdict
    from .store.digest import FileDigest

__all__ = ["convert", "open_any", "plan", "verify"]


def plan(
    src: str | Path,
    *,
    tp: int | str | None = None,
    pp: int = 1,
    ep: int = 1,
    split: Sequence[int] | None = None,
    pp_layers: Sequence[int] | None = None,
    to: str = "native",
    revision: str | None = None,
    family: str | None = None,
    engine_version: str | None = None,
    pad: bool = True,
    repeat: bool = True,
    workers: int = 0,
    max_file_size: str | int | None = None,
    device_memory: str | int | None = None,
    context: int | None = None,
    batch: int = 1,
) -> "Report":
    """A dry run: what converting `src` would write and keep in memory, and whether it fits a device.
    Reads headers only.
    """
    from .jobs.job import Options
    from .jobs.plan import build, facts, said

    source = open_any(src, revision, family)
    options = Options(workers=workers, pad=pad, repeat=repeat, engine_version=engine_version)
    memory = _size("--device-memory", device_memory)
    mesh = choose_mesh(source, to, tp, pp, ep, split, pp_layers, memory, context, batch)
    job = prepare(source, to, mesh, options, _size("--max-file-size", max_file_size))
    return build(
        source.layout,
        job.target.layout,
        config=source.config,
        source=facts(source, str(src), *said(revision, family)),
        workers=options.threads,
        device_memory=memory,
        context=context,
        batch=batch,
    )


def convert(
    src: str | Path,
    out: str | Path,
    *,
    tp: int | str | None = None,
    pp: int = 1,
    ep: int = 1,
    split: Sequence[int] | None = None,
    pp_layers: Sequence[int] | None = None,
    to: str = "native",
    revision: str | None = None,
    family: str | None = None,
    engine_version: str | None = None,
    pad: bool = True,
    repeat: bool = True,
    workers: int = 0,
    overwrite: bool = False,
    checksum: bool = False,
    sha256: bool = False,
    fsync: bool = True,
    check: bool = True,
    max_file_size: str | int | None = None,
    device_memory: str | int | None = None,
    context: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> "Result":
    """Convert a checkpoint or a shard directory to `out`: shards for a mesh, or Hugging Face files (`to="hf"`).

    A re-run of a finished job writes nothing (`Result.already`), once OUT was found whole (unless `check` is False) and
    the source the same. Raises ReshardError before anything is written for whatever can be known before.
    """
    from .jobs.convert import convert as convert_job
    from .jobs.job import Options

    options = Options(workers, overwrite, checksum, sha256, fsync, pad, repeat, engine_version, check)
    if not str(out):
        raise ReshardError("the destination is an empty name", "give a directory that does not exist yet")
    destination = location.destination(out)
    source = open_any(src, revision, family, headers_only=False, progress=progress)
    mesh = choose_mesh(
        source, to, tp, pp, ep, split, pp_layers, _size("--device-memory", device_memory), context, batch
    )
    job = prepare(source, to, mesh, options, _size("--max-file-size", max_file_size))
    with unchanged(source.directory, finally_too=False):  # before it publishes, the job itself asks
        return convert_job(job, destination, options, progress)


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    sha256: bool = False,
    hub: str | None = None,
    strict: bool = False,
    only: str | None = None,
    numerics: bool | None = None,
    exhaustive: bool = False,
    layers: bool = False,
    processes: bool = False,
    require: str | Sequence[str] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> "Verdict":
    """Run the checks of a directory. `Report.ok`: nothing failed, and what was required passed; `Report.proven`: all
    four passed whole.

    - integrity: by its manifest.
    - weights: bit-exact, `against` the original.
    - sha256: the files that merging would write have the digests that were recorded, or those that the Hub publishes
      of the model `hub`. With `sha256` it is an error if none is known.
    - numerics: the model computes what the original does. None: where it can be run here. `exhaustive`: with prompts
      for every row of the vocabulary. `layers`: layer by layer, in the memory of one. `processes`: ranks are processes
      connected by gloo, not threads.

    `only` names one check. `strict`: files that the manifest does not list are a mismatch, not just unproven.
    `require`: checks that have to pass, or "proven"; what was skipped, or compared with this runtime alone, has not
    passed.
    """
    from .jobs.verdict import CHECKS, PROVEN, required
    from .jobs.verify import Wish
    from .jobs.verify import verify as verify_directory

    path = location.local(out, "a shard directory")
    if str(out):
        check_whole(path)
    if not str(out) or not path.is_dir():
        what = "is a file" if str(out) and path.exists() else "no such directory"
        raise ReshardError(f"{out}: {what}", "give the directory that convert wrote")
    if only is not None and only not in CHECKS:
        raise ReshardError(f"--only {only}: no such check", f"checks are {', '.join(CHECKS)}")
    musts = required(require)
    run_it = bool({PROVEN, "numerics"} & set(musts))
    if only is not None and set(musts) - {only}:
        raise ReshardError(f"--require {','.join(musts)}: --only {only} runs no other check", "leave out one of them")
    if numerics is False and run_it and only is None:
        raise ReshardError(
            f"--require {','.join(musts)}: --no-numerics leaves out a check that is required", "leave out one of them"
        )
    source = open_any(against, revision, family, headers_only=False, progress=progress) if against is not None else None
    published = _published(path, hub) if hub is not None and only in (None, "sha256") else None
    if strict and only not in (None, "integrity"):
        raise ReshardError(
            f"--strict belongs to the integrity check, which --only {only} leaves out", "leave out one of them"
        )
    wish = Wish(
        only, sha256, published, _numerics(numerics, only, exhaustive, layers, processes, run_it), strict, musts
    )
    with unchanged(source.directory if source is not None else None):
        return verify_directory(path, source, threads.count(workers), progress, wish)


def check_table(
    family: str, *, given: str | Path | None = None, sample: int | None = None, progress: Progress | None = None
) -> "TableCheck":
    """Mutate each row and axis of a family table, and report which mutations go undetected; see `reshard.authoring`."""
    from .authoring.check_table import check_table as check

    table = table_of(family)
    assert table is not None
    return check(
        table, location.local(given, "a checkpoint to try a table on") if given is not None else None, sample, progress
    )


def explain(out: str | Path, element: str, *, revision: str | None = None, family: str | None = None) -> "Explanation":
    """What an element is, where it came from, and everything that holds it;
    see `reshard.explain` for how it is named.
    """
    from .jobs.explain import explain as explain_element

    source = open_any(out, revision, family)
    with unchanged(source.directory):
        return explain_element(source, element)


def diff(
    a: str | Path, b: str | Path, *, family: str | None = None, workers: int = 0, progress: Progress | None = None
) -> "Difference":
    """Two checkpoints of any layouts, tensor by tensor. `Difference.equal`: every bit is."""
    from .jobs.diff import difference

    one, other = (open_any(path, None, family, headers_only=False, progress=progress) for path in (a, b))
    with unchanged(one.directory, other.directory):
        return difference(one, other, threads.count(workers), progress)


def fingerprint(
    src: str | Path,
    *,
    rank: int | None = None,
    seed: str = "",
    revision: str | None = None,
    family: str | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> "Fingerprint | Share":
    """The fingerprint of a model, the same in every layout; of one `rank` its share, for
    `reshard.jobs.fingerprint.combine`.
    """
    from .jobs import fingerprint as prints

    count = threads.count(workers)
    if rank is not None and Path(src).is_dir() and family is None and revision is None:
        return prints.of_rank(Path(src), rank, seed=seed, threads=count, progress=progress)
    source = open_any(src, revision, family, headers_only=False, progress=progress)
    share = prints.of_source(source, None if rank is None else [rank], seed=seed, threads=count, progress=progress)
    return share if rank is not None else prints.combine([share])


def _numerics(
    wanted: bool | None, only: str | None, exhaustive: bool, layers: bool, processes: bool, required: bool
) -> "Callable[[Path, Source | None, Progress], Check] | None":
    """The numerics check, which is the runtime's; imported when it runs."""
    if layers and processes:
        raise ReshardError(
            "--layers and --processes cannot be combined: layer by layer, ranks are threads", "leave out one of them"
        )
    if wanted is False and only != "numerics":
        return None

    def run(out: Path, source: Source | None, progress: Progress) -> "Check":
        from importlib import import_module

        must = bool(wanted) or only == "numerics" or exhaustive or layers or processes
        check: Check = import_module("reshard.runtime.proof.numerics").numerics(
            out,
            source,
            progress,
            must=must,
            asked=must or required,
            exhaustive=exhaustive,
            layers=layers,
            processes=processes,
        )
        return check

    return run


def _published(out: Path, text: str) -> "dict[str, FileDigest]":
    """The digests that the Hub publishes of a model, at the commit that a directory remembers,
    or that the text names.
    """
    from .checkpoints import manifest
    from .store import hub

    origin = manifest.load(out).origin if manifest.present(out) else None
    ref = hub.ref(text, None)
    commit = origin.commit if origin is not None and origin.id == ref.id and ref.revision is None else None
    return hub.digests(text, commit)


def prepare(source: Source, to: str, mesh: Mesh, options: "Options", max_file_size: int | None) -> "Job":
    """A planned job; a mesh that does not fit is refused with the sizes that would."""
    from .checkpoints.form import form_of
    from .jobs.job import prepare as prepare_job

    try:
        return prepare_job(source, to, mesh, options, max_file_size)
    except ReshardError as error:
        raise form_of(to).explained(error, source, mesh) from None


def choose_mesh(
    source: Source,
    to: str,
    tp: int | str | None,
    pp: int,
    ep: int,
    split: Sequence[int] | None,
    pp_layers: Sequence[int] | None,
    device_memory: int | None,
    context: int | None,
    batch: int,
) -> Mesh:
    """The mesh asked for; `tp="auto"` is the smallest that fits the device, `split` and `pp_layers` alone say how many
    ranks there are.
    """
    split, pp_layers = _numbers("split", split), _numbers("pp_layers", pp_layers)
    if tp is None:
        tp = len(split) if split else 1
    if pp_layers and pp == 1:
        pp = len(pp_layers)
    if tp != "auto":
        return Mesh(int(tp), pp, ep, split, pp_layers)
    from .checkpoints.form import form_of

    return form_of(to).smallest_mesh(source, device_memory, context, batch, ep, pp if pp > 1 else None)


def _numbers(option: str, given: Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(number, int) for number in given):
        raise ReshardError(f"{option} = {given!r}: expected whole numbers", "such as (3, 3, 2)")
    return tuple(given)


def _size(option: str, text: str | int | None) -> int | None:
    from .checkpoints.hf_split import parse_size

    try:
        return text if text is None else parse_size(str(text))
    except ReshardError as error:
        raise ReshardError(f"{option} {text}: invalid size", error.hint) from None
