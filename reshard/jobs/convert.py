"""Converting: lay out the files, move the tensors, seal, publish. Re-running a finished conversion is a no-op.

    lay(job, to, reader) → files     creates every file at its full size: headers, what else is no tensor in it
    move(job, files, …) → digests    reads each byte of the source's tensors once and writes it wherever it belongs
    seal(job, to, reader, digests)   copies companions and writes what follows from the rest, the manifest last

Knows the order of things; how each is done is known elsewhere.
"""

import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..checkpoints import manifest
from ..checkpoints.companions import Carried
from ..checkpoints.manifest import Listed
from ..checkpoints.target import Digests, Files
from ..engine import worker
from ..engine.worker import Key
from ..engine.writer import Writer
from ..errors import ReshardError, failed
from ..store import writable
from ..store.destination import check_replaceable
from ..store.directory import Directory, unchanged
from ..store.local import Pool, check_unchanged
from ..store.writable import Destination, Transaction, Upload
from ..text.progress import Progress, Silent, until
from . import same_job
from .job import Job, Options, prepare
from .json_result import usage
from .result import Result

__all__ = ["Job", "Options", "Result", "convert", "lay", "move", "prepare", "seal", "usage"]


def convert(job: Job, out: Destination, options: Options, progress: Progress | None = None) -> Result:
    """Write the target of a job to `out` and publish it; nothing where `out` holds it already.

    Raises ReshardError for what can be refused, before anything is written; PlaceError where writing fails or a source
    changes.
    """
    progress, began = progress or Silent(), time.monotonic()
    source, target, threads = job.source, job.target, options.threads
    out.check(source.root, source.stamps)
    busy = out.occupied()
    if busy and not options.overwrite:
        return replace(_rerun(job, out.existing(), options, progress, began), notes=out.notes())
    if busy:
        old = out.existing()
        if (theirs := same_job.irreplaceable(old, job)) is not None:
            raise ReshardError(
                f"{old}: holds {theirs}, which is not part of a checkpoint: --overwrite would delete it",
                "choose another destination, or move it away",
            )
        check_replaceable(old)
    _check_names(job)
    out.check_space(target.bytes + sum(file.size for file in source.carried) + target.kept(source))
    if source.layout.model.family.scheme:
        from .derived import check_derived

        check_derived(source)
    if source.layout.beyond(target.layout):
        from .verify import check_tied

        check_tied(source, target.layout, threads, progress)
    if options.sha256:
        from . import verify_sha256

        source = verify_sha256.hashed(source, threads, progress)
        job = replace(job, source=source)
    with (
        out.transaction(target.last, replace=busy, durable=options.fsync) as to,
        closing(Pool(stamps=source.stamps)) as reader,  # refuses files that are no longer what they were when opened
    ):
        try:
            files = lay(job, to, reader)
            progress.start("converting", job.reads)
            digests = move(job, files, reader, threads, progress)
            root = seal(job, to, reader, digests)
            check_unchanged(source.stamps)
            if source.directory is not None:
                source.directory.check()
        except OSError as error:
            raise failed("writing", out.given, error) from error
        try:
            to.commit(threads)
        except KeyboardInterrupt:
            if writable.published is None:  # else it came while names were moved, and the job is done
                raise
    progress.finish()
    seconds = time.monotonic() - began
    return Result(out.given, False, root, job.reads, target.bytes, seconds, source.left, job.towers, notes=out.notes())


def lay(job: Job, to: Transaction, reader: Pool) -> Files[Upload]:
    """Create every file at its full size, with everything in it that is no tensor; the files of tensors.

    Raises as `to` does, and PlaceError where the source has changed.
    """
    target, files = job.target, {}
    for name, size in target.sizes.items():
        file = files[name] = to.create(name, size, target.stretches(name))
        for offset, data in target.literals.get(name, ()):
            file.write(offset, data)
            file.settle(offset, len(data))
        for start, length, place, at in target.moved.get(name, ()):
            offset = start
            for piece in reader.chunks(place, at, length):
                file.write(offset, piece)
                offset += len(piece)
            file.settle(start, length)
    for name, data in target.whole.items():
        to.put(name, data)
    return Files(target.entries, files)


def move(job: Job, files: Files[Upload], reader: Pool, threads: int, progress: Progress) -> Digests:
    """Copy all tensors to where they belong; digests of what the target now holds, constants included, if it needs any.

    Raises as `lay` does; the first failure stops all threads.
    """
    halt = threading.Event()
    target = job.target
    digests: dict[Key, list[bytes]] = {}

    def writer() -> Writer:
        return Writer(files, digests, target.digested)

    worker.run(
        job.plan,
        job.source,
        files,
        writer,
        workers=threads,
        pool=reader,
        progress=until(halt, progress.advance),
        stop=halt,
    )
    rest = writer()
    for key, data in target.constants.items():
        rest.put(key, 0, memoryview(data))
    rest.done([key for key in target.entries if key not in digests])  # constants, padding alone, empty tensors
    return digests


def seal(job: Job, to: Transaction, reader: Pool, digests: Digests) -> str | None:
    """Write everything else: files copied as is, and what the target adds.

    The digest over all files, None if none is recorded. Raises as `lay` does.
    """
    carried = [_copy(file, to, reader) for file in job.source.carried]
    return job.target.seal(to, job.source, job.engine, carried, digests, reader)


def _copy(file: Carried, to: Transaction, reader: Pool) -> Listed:
    mtime = file.mtime_ns or None  # 0: it came from a store, which keeps no times
    return Listed(file.name, file.size, to.write(file.name, file.size, reader.chunks(file.path, 0, file.size), mtime))


def _check_names(job: Job) -> None:
    """Raise ReshardError where a file copied as is would have the name of another, or config.json cannot be copied."""
    source, taken = job.source, job.target.reserved
    if "config.json" not in {file.name for file in source.carried}:
        why = next((file.why for file in source.left if file.name == "config.json"), "it is not there")
        raise ReshardError(
            f"{source.where}: config.json cannot be copied ({why})", "no loader can open a checkpoint without it"
        )
    above = {str(parent) for name in taken for parent in PurePosixPath(name).parents}
    for file in source.carried:
        name = file.name
        if name in above or any(part in taken for part in (name, *map(str, PurePosixPath(name).parents))):
            raise ReshardError(
                f"{source.where}: {name} would overwrite an output file of the same name", "rename or move it first"
            )


def _rerun(job: Job, out: Path, options: Options, progress: Progress, began: float) -> Result:
    """The result where `out` is what this job would write; ReshardError where it is not, naming the difference."""
    with unchanged(Directory(out)):
        found = same_job.finished(job, out, options, progress)
    added: tuple[str, ...] = ()
    if options.sha256:
        from .add_sha256 import add_sha256

        found, added = add_sha256(job, out, found, options, progress)
    check_unchanged(job.source.stamps)
    found.remember()
    root = manifest.load(out).root if manifest.present(out) else None
    seconds = time.monotonic() - began
    return Result(out, True, root, 0, 0, seconds, job.source.left, job.towers, found.by, found.checked, added)
