"""A re-run: whether a finished destination is what this job would write, and what --overwrite may delete.

Content decides, not times. In this order:

    plan, names and sizes           of what the destination and the source hold
    integrity                       by the digests of the destination; without any (Hugging Face files) all is compared
    small files, headers, buffers   by digest
    weights                         the same SHA-256 (the Hub's cache names files by it) or commit; the same size
                                    and mtime, and a sample of each tensor; otherwise every byte

Only `remember` writes: times, nothing else.
"""

import re
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from threading import Event, Lock

from ..checkpoints import manifest
from ..checkpoints.companions import CHECKPOINT
from ..checkpoints.target import Finished, Other
from ..engine import worker
from ..engine.sample import sample
from ..engine.worker import Key
from ..errors import MismatchError, ReshardError, failed
from ..store import publish
from ..store.local import Pool
from ..text.progress import Progress, until
from .job import Job, Options

# Files of a shard directory, by their names: what --overwrite may delete where its manifest is lost or torn.
_SHARDS = re.compile(
    r"manifest\.json|rank-[0-9]{5}/(tensors\.json|model\.safetensors)"
    r"|source/([^/]+\.json|SHA256SUMS|(families|formats)/[^/]+\.toml|.+\.residue)"
)


def irreplaceable(out: Path, job: Job) -> str | None:
    """An entry of a directory that is no part of a checkpoint, so that --overwrite must not delete it; None without."""
    files = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = [name for name in files if name.split("/")[0] not in publish.NOBODYS]
    broken = manifest.broken(out)
    if manifest.present(out) and not broken:
        try:
            known = {manifest.NAME, manifest.LEFT, *(file.name for file in manifest.load(out).files())}
            return next((name for name in files if name not in known), None)
        except ReshardError as error:
            if not (isinstance(error, MismatchError) and manifest.remains(out)):
                raise ReshardError(
                    f"{out}: --overwrite cannot tell what it would delete: {error.message}",
                    "delete the directory, or choose another destination",
                ) from None
            broken = True  # what it lists is not to be relied on
    known = job.target.names | {file.name for file in job.source.carried}
    beside = next(
        (
            name
            for name in files
            if not (name in known or CHECKPOINT.fullmatch(name) or (broken and _SHARDS.fullmatch(name)))
        ),
        None,
    )
    if broken:
        return beside
    return beside if beside is not None or (out / "config.json").is_file() else next(iter(files), "directories")


def finished(job: Job, out: Path, options: Options, progress: Progress) -> Finished:
    """How it is known that `out` is what this job would write.

    Raises ReshardError if it is not, naming what is different; MismatchError if it was, and has been damaged.
    """

    def intact() -> None:
        from .verify import integrity

        if failures := integrity(out, options.threads, progress).failures:
            raise MismatchError(failures[0] + (f" (and {len(failures) - 1} more)" if failures[1:] else ""))

    try:
        found = job.target.recognise(out, job.source, job.engine, intact if options.check else None, options.checksum)
        if found.by in ("sample", "content"):
            _compare(job, out, options, progress, found.by == "sample")
        return found
    except Other as error:
        raise ReshardError(
            f"{out}: is not empty, and {error}", "choose another destination, or --overwrite to replace it"
        ) from None
    except MismatchError as error:
        raise MismatchError(f"{out}: is damaged: {error.message}", "--overwrite writes it again") from None
    except OSError as error:
        raise failed("comparing", out, error) from error


def _compare(job: Job, out: Path, options: Options, progress: Progress, sampled: bool) -> None:
    """All weights, or a sample of each tensor, are those that this job would write."""
    from .verdict import Check
    from .verify import Comparer, check_tied

    source, target = job.source, job.target.below(out)
    check_tied(source, job.target.layout, options.threads, progress, sampled)
    joined = sample(job.plan, source, target) if sampled else job.plan
    check, lock, halt = Check("weights"), Lock(), Event()
    sinks: list[Comparer] = []
    with closing(Pool(stamps=source.stamps)) as pool:

        class Counting(Comparer):
            def done(self, keys: Iterable[Key]) -> None:
                super().done(keys := list(keys))
                progress.advance(len(keys) * sampled)

        def sink() -> Comparer:
            sinks.append(Counting(target, pool, check, lock, padded=False))
            return sinks[-1]

        if sampled:
            progress.start(
                "comparing a sample", len({(copy.dst.rank, copy.dst_name) for copy in joined.copies()}), "tensors"
            )
        else:
            progress.start("comparing weights", job.reads)
        advance = until(halt, (lambda _: None) if sampled else progress.advance)
        worker.run(joined, source, target, sink, workers=options.threads, pool=pool, progress=advance, stop=halt)
    progress.finish()
    if check.failures:
        stored, failure = min(found for sink in sinks for found in sink.bad.items())
        raise Other(f"it holds other weights than the source: {_sources(job, stored)} ({failure})")


def _sources(job: Job, stored: Key, most: int = 3) -> str:
    """The tensors of the source that a stored tensor is made of, and their files."""
    made = {
        copy.src_name: (copy.src.rank, copy.src_name)
        for copy in job.plan.copies()
        if (copy.dst.rank, copy.dst_name) == stored
    }
    named = [f"{job.source.relative(job.source.locate(key)[0])}: {name}" for name, key in sorted(made.items())]
    return " or ".join(named[:most]) + " …" * (len(named) > most)
