"""The same job again: what a destination holds already, and what --overwrite may delete.

The same job means the same plan and format version, and for every source file the same size, time and, where known, commit and SHA-256.
Writes nothing.
"""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from . import manifest, publish
from .companions import CHECKPOINT
from .errors import ReshardError
from .files import CHUNK, Pool
from .progress import Progress

if TYPE_CHECKING:
    from .conversion import Job, Options


def irreplaceable(out: Path, job: "Job") -> str | None:
    """An entry of a directory that is no part of a checkpoint, so that --overwrite must not delete it; None if all are."""
    files = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = [name for name in files if name.split("/")[0] not in publish.NOBODYS]
    if manifest.present(out):
        try:
            known = {manifest.NAME, manifest.LEFT, *(file.name for file in manifest.load(out).files())}
        except ReshardError as error:
            raise ReshardError(
                f"{out}: --overwrite cannot tell what it would delete: {error.message}",
                "delete the directory, or choose another destination",
            ) from None
        return next((name for name in files if name not in known), None)
    known = {*job.output.sizes, *job.output.whole, *(file.name for file in job.source.carried)}
    beside = next((name for name in files if name not in known and not CHECKPOINT.fullmatch(name)), None)
    return beside if beside is not None or (out / "config.json").is_file() else next(iter(files), "directories")


def same(job: "Job", out: Path, options: "Options", progress: Progress) -> str | None:
    """None if `out` is what this job would write; else what is different, in words.

    The same plan and format version, and every source file of the same size, time and, where known, commit and SHA-256.
    """
    try:
        return _same_shards(job, out, options, progress) if job.output.shards else _same_files(job, out, options, progress)
    except ReshardError as error:
        return f"it is not what this job would write: {error.message}"
    except OSError as error:
        return f"it is not what this job would write: {error}"


def _same_shards(job: "Job", out: Path, options: "Options", progress: Progress) -> str | None:
    if not manifest.present(out):
        return "it holds no shards"
    known, source = manifest.load(out), job.source
    if known.plan != job.output.plan or known.engine != job.engine:
        return f"it holds another conversion ({known.family}, {known.format}, {known.mesh})"
    for file in known.files():
        path = out / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return f"{file.name} is missing or has another size than its manifest says"
    if source.origin.commit and known.origin.commit and source.origin.commit != known.origin.commit:
        return f"it was made from commit {known.origin.commit}, the source is {source.origin.commit}"
    if options.checksum:
        from . import verification

        report = verification.against(out, source, options.threads, progress)
        return None if report.ok else f"the source has other contents: {report.failures[0]}"
    earlier = {original.name: original for original in manifest.load_originals(out)}
    for original in source.originals:
        other = earlier.pop(original.name, None)
        if other is None:
            return f"{original.name} was not among its source files"
        if (other.size, other.holes) != (original.size, original.holes):
            return f"{original.name} has {original.size} bytes, it was made from {other.size}"
        if other.sha256 and original.sha256 and other.sha256 != original.sha256:
            return f"{original.name} has SHA-256 {original.sha256}, it was made from {other.sha256}"
        known_only_there = source.manifest is not None or source.residues  # nothing that this job could add
        if options.sha256 and not other.sha256 and not known_only_there:
            return f"it was made without --sha256, so that it does not know that of {original.name}"
        if other.mtime_ns != original.mtime_ns:
            return f"{original.name} was modified at another time than the file that it was made from (--checksum compares contents)"
    if earlier:
        return f"{next(iter(earlier))} was among its source files and is gone"
    mine = {file.name: (file.size, file.mtime_ns) for file in source.carried}
    there = {file.name: (file.size, (out / file.name).stat().st_mtime_ns) for file in known.carried}
    for name in sorted(mine.keys() | there.keys()):
        if mine.get(name) != there.get(name):
            return f"{name} is not the file that it was made with (--checksum compares contents)"
    return None


def _same_files(job: "Job", out: Path, options: "Options", progress: Progress) -> str | None:
    source = job.source
    newest = max((original.mtime_ns for original in source.originals), default=0)
    wanted = {name: (size, job.output.mtimes.get(name, newest)) for name, size in job.output.sizes.items()}
    wanted |= {name: (len(data), newest) for name, data in job.output.whole.items()}
    wanted |= {file.name: (file.size, file.mtime_ns) for file in source.carried}
    for name, (size, mtime) in wanted.items():
        path = out / name
        if not path.is_file():
            return f"it lacks {name}"
        status = path.stat()
        if status.st_size != size or (status.st_mtime_ns != mtime and not options.checksum):
            return f"its {name} is another one"
    extra = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - wanted.keys()
    if extra:
        return f"it also holds {min(extra)}"
    return _same_contents(job, out, options, progress) if options.checksum else None


def _same_contents(job: "Job", out: Path, options: "Options", progress: Progress) -> str | None:
    """Whether every byte of Hugging Face files is what this job would write; they have no digests, so all is read."""
    from . import verification

    report = verification.against(out, job.source, options.threads, progress)
    if not report.ok:
        return f"the source has other contents: {report.failures[0]}"
    with closing(Pool()) as pool:
        parts = [(name, offset, memoryview(data)) for name, parts in job.output.literals.items() for offset, data in parts]
        parts += [(name, 0, memoryview(data)) for name, data in job.output.whole.items()]
        for name, offset, data in parts:
            if pool.read(out / name, offset, len(data)) != data:
                return f"its {name} has another header"
        for name, extents in job.output.moved.items():
            for offset, length, path, at in extents:
                for start in range(0, length, CHUNK):
                    n = min(CHUNK, length - start)
                    if pool.read(path, at + start, n) != pool.read(out / name, offset + start, n):
                        return f"the header or a buffer of {name} differs from the source"
    return None
