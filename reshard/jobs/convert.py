"""Converting: lay out the files, move the tensors, seal, publish. Re-running a finished conversion is a no-op.

    lay(job, work)             creates every file at its full size: headers, constants, what else of ours is in it
    move(job, work) → digests  reads each byte of the source's tensors once and writes it wherever it belongs
    seal(job, work, digests)   copies companions and writes what follows from the rest, the manifest last

Knows the order of things; how each is done is known elsewhere.
"""

import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..checkpoints import manifest
from ..checkpoints.companions import Carried
from ..checkpoints.manifest import Listed
from ..checkpoints.target import Below, Digests
from ..engine import worker
from ..engine.worker import Key, Writer
from ..errors import PlaceError, ReshardError, failed
from ..store import publish
from ..store.directory import Directory, unchanged
from ..store.local import Pool, check_unchanged
from ..store.whole import write, write_pieces
from ..store.workfolder import left_by_killed, told
from ..text.progress import Progress, Silent, until
from . import same_job
from .job import Job, Options, prepare
from .result import Result, usage

__all__ = ["Job", "Options", "Result", "convert", "lay", "move", "prepare", "seal", "usage"]


@dataclass(frozen=True)
class Work:
    """Where a job is being written, and the open files through which it writes there and reads the source."""

    files: Below
    writer: Pool
    reader: Pool  # refuses files that are no longer what they were when the source was opened


def convert(job: Job, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Write the target of a job to `out` and publish it; nothing where `out` holds it already.

    Raises ReshardError for what can be refused, before anything is written; PlaceError where writing fails or a source
    changes.
    """
    progress, began = progress or Silent(), time.monotonic()
    source, target, threads = job.source, job.target, options.threads
    publish.check_destination(out, source.root, source.stamps)
    publish.recover(out)
    busy = publish.occupied(out)
    if busy and not options.overwrite:
        return _rerun(job, out, options, progress, began)
    if busy:
        if (theirs := same_job.irreplaceable(out, job)) is not None:
            raise ReshardError(
                f"{out}: holds {theirs}, which is not part of a checkpoint: --overwrite would delete it",
                "choose another destination, or move it away",
            )
        publish.check_replaceable(out)
    _check_names(job)
    publish.check_space(out, target.bytes + sum(file.size for file in source.carried) + target.kept(source))
    if source.layout.beyond(target.layout):
        from .verify import check_tied

        check_tied(source, target.layout, threads, progress)
    if options.sha256:
        from . import verify_sha256

        source = verify_sha256.hashed(source, threads, progress)
        job = replace(job, source=source)
    with (
        publish.Publication(out, replace=busy, durable=options.fsync) as publication,
        closing(Pool(os.O_RDWR)) as writer,
        closing(Pool(stamps=source.stamps)) as reader,
    ):
        work = Work(target.below(publication.work), writer, reader)
        try:
            lay(job, work)
            progress.start("converting", job.reads)
            digests = move(job, work, threads, progress)
            root = seal(job, work, digests)
            writer.close()
            check_unchanged(source.stamps)
            if source.directory is not None:
                source.directory.check()
        except OSError as error:
            raise failed("writing", out, error) from error
        if options.fsync:
            publication.sync(threads)
        try:
            publication.commit(target.last)
        except KeyboardInterrupt:
            if publish.published is None:  # else it came while names were moved, and the job is done
                raise
    progress.finish()
    seconds = time.monotonic() - began
    return Result(out, False, root, job.reads, target.bytes, seconds, source.left, job.towers, notes=_notes(out))


def lay(job: Job, work: Work) -> None:
    """Create every file at its full size, with everything in it that is no tensor of the source.

    Raises OSError where that cannot be written, PlaceError where the source has changed.
    """
    target, files = job.target, work.files
    for name, size in target.sizes.items():
        path = files.paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        for offset, data in target.literals.get(name, ()):
            work.writer.write(path, offset, data)
        for offset, length, place, at in target.moved.get(name, ()):
            for piece in work.reader.chunks(place, at, length):
                work.writer.write(path, offset, piece)
                offset += len(piece)
    for name, data in target.whole.items():
        write(files.root / name, data)


def move(job: Job, work: Work, threads: int, progress: Progress) -> Digests:
    """Copy all tensors to where they belong; digests of what the target now holds, constants included, if it needs any.

    Raises as `lay` does; the first failure stops all threads.
    """
    halt = threading.Event()
    digests: dict[Key, list[bytes]] = {}
    wanted = digests if job.target.digested else None
    worker.run(
        job.plan,
        job.source,
        work.files,
        lambda: Writer(work.files, work.writer, wanted),
        workers=threads,
        pool=work.reader,
        progress=until(halt, progress.advance),
        stop=halt,
    )
    rest = [key for key in work.files.entries if key not in digests]  # constants, padding alone, empty tensors
    Writer(work.files, work.writer, wanted).done(rest)
    return digests


def seal(job: Job, work: Work, digests: Digests) -> str | None:
    """Write everything else: files copied as is, and what the target adds.

    The digest over all files, None if none is recorded. Raises as `lay` does.
    """
    root = work.files.root
    carried = [_copy(file, root, work.reader) for file in job.source.carried]
    return job.target.seal(root, job.source, job.engine, carried, digests, work.reader)


def _copy(file: Carried, root: Path, reader: Pool) -> Listed:
    path = root / file.name
    if path.exists():
        raise PlaceError(
            f"{file.name}: another file was written under this name: the file system takes upper and lower "
            f"case for the same",
            "choose a destination that tells them apart",
        )
    size, digest = write_pieces(path, reader.chunks(file.path, 0, file.size))
    if file.mtime_ns:  # else it came from a store, which keeps no times
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    return Listed(file.name, size, digest)


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
    return Result(
        out, True, root, 0, 0, seconds, job.source.left, job.towers, found.by, found.checked, added, _notes(out)
    )


def _notes(out: Path) -> tuple[str, ...]:
    """What killed conversions to other destinations have left in the same folder."""
    return tuple(map(told, left_by_killed(Path(os.path.realpath(out)).parent)))
