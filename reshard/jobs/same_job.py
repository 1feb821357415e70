"""A re-run: whether a finished destination is what this job would write, and what --overwrite may delete.

Content decides, not times. In this order:

    plan, names and sizes           of what the destination and the source hold
    integrity                       by the digests of the destination; Hugging Face files have none, there everything is compared
    small files, headers, buffers   by digest
    weights                         the same SHA-256 (the Hub's cache names files by it) or commit; the same size and mtime, and a sample
                                    of each tensor; where that does not say, every byte

Only `remember` writes: times, nothing else.
"""

import os
import re
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

import xxhash

from ..checkpoints import manifest
from ..checkpoints.companions import CHECKPOINT
from ..checkpoints.manifest import Manifest
from ..checkpoints.source import check_small_files
from ..engine import worker
from ..engine.sample import sample
from ..engine.worker import Key
from ..errors import MismatchError, ReshardError, failed
from ..store import publish
from ..store.local import Pool
from ..text.progress import Progress, until

if TYPE_CHECKING:
    from .convert import Job, Options

# Files of a shard directory, by their names: what --overwrite may delete where its manifest is lost or torn.
_SHARDS = re.compile(
    r"manifest\.json|rank-[0-9]{5}/(tensors\.json|model\.safetensors)"
    r"|source/([^/]+\.json|SHA256SUMS|(families|formats)/[^/]+\.toml|.+\.residue)"
)


def irreplaceable(out: Path, job: "Job") -> str | None:
    """An entry of a directory that is no part of a checkpoint, so that --overwrite must not delete it; None if all are."""
    files = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = [name for name in files if name.split("/")[0] not in publish.NOBODYS]
    broken = manifest.broken(out)
    if manifest.present(out) and not broken:
        try:
            known = {manifest.NAME, manifest.LEFT, *(file.name for file in manifest.load(out).files())}
        except ReshardError as error:
            raise ReshardError(
                f"{out}: --overwrite cannot tell what it would delete: {error.message}",
                "delete the directory, or choose another destination",
            ) from None
        return next((name for name in files if name not in known), None)
    known = {*job.output.sizes, *job.output.whole, *(file.name for file in job.source.carried)}
    beside = next(
        (name for name in files if not (name in known or CHECKPOINT.fullmatch(name) or (broken and _SHARDS.fullmatch(name)))), None
    )
    if broken:
        return beside
    return beside if beside is not None or (out / "config.json").is_file() else next(iter(files), "directories")


@dataclass(frozen=True)
class Finished:
    """Why nothing is to be written. `by`: what told that the source is the same: sha256, commit, sample or content, the weakest of them.

    `checked`: whether the destination was read, too. `times`: mtimes of its files that let the next re-run do without reading everything.
    """

    by: str
    checked: bool
    times: dict[Path, int]

    def remember(self) -> None:
        """Content was found equal, times were not: the next re-run need not ask again. Where OUT cannot be written to, it will."""
        for path, mtime in self.times.items():
            with suppress(OSError):
                os.utime(path, ns=(mtime, mtime))


def finished(job: "Job", out: Path, options: "Options", progress: Progress) -> Finished:
    """How it is known that `out` is what this job would write.

    Raises ReshardError if it is not, naming what is different; MismatchError if it was, and has been damaged.
    """
    try:
        return _shards(job, out, options, progress) if job.output.shards else _published(job, out, options, progress)
    except _Other as error:
        raise ReshardError(f"{out}: is not empty, and {error}", "choose another destination, or --overwrite to replace it") from None
    except MismatchError as error:
        raise MismatchError(f"{out}: is damaged: {error.message}", "--overwrite writes it anew") from None
    except OSError as error:
        raise failed("comparing", out, error) from error


class _Other(Exception):
    """The destination holds something else; the text says what."""


def _shards(job: "Job", out: Path, options: "Options", progress: Progress) -> Finished:
    if not manifest.present(out):
        manifest.check_lost(out)
        raise _Other("it holds no shards")
    try:
        known = manifest.load(out)
    except MismatchError as error:
        manifest.check_lost(out)
        raise _Other(error.message) from None
    if manifest.root_of(out, known) != known.root:
        raise MismatchError(f"{manifest.NAME}: its root digest is not that of what it says")
    if known.plan != job.output.plan or known.engine != job.engine:
        raise _Other(f"it holds another conversion ({known.family}, {known.format}, {known.mesh})")
    check_small_files(out, known)
    for weights, _ in known.ranks:
        if not (path := out / weights.name).is_file() or path.stat().st_size != weights.size:
            raise MismatchError(f"{weights.name} is missing or has another size than its manifest says")
    stale = _same_files(job, out, known)
    if options.check:
        from .verify import integrity

        if failures := integrity(out, options.threads, progress).failures:
            raise MismatchError(failures[0] + (f" (and {len(failures) - 1} more)" if failures[1:] else ""))
    _same_digests(job, known)
    by = "content" if options.checksum else _told(job, out, known, stale)
    if by in ("sample", "content"):
        _compare(job, out, options, progress, by == "sample")
    return Finished(by, options.check, stale)


def _same_files(job: "Job", out: Path, known: Manifest) -> dict[Path, int]:
    """The source has the files that the destination was made from, by names, sizes and what is known of them.

    Those whose mtimes are others: the residue that has it in the destination → what it should be.
    """
    source, stale = job.source, {}
    if source.origin.commit and known.origin.commit and source.origin.commit != known.origin.commit:
        raise _Other(f"it was made from commit {known.origin.commit}, the source is {source.origin.commit}")
    earlier = {original.name: original for original in manifest.load_originals(out)}
    for original in source.originals:
        other = earlier.pop(original.name, None)
        if other is None:
            raise _Other(f"{original.name} was not among its source files")
        if other.size != original.size:
            raise _Other(f"{original.name} has {original.size} bytes, it was made from {other.size}")
        if other.holes != original.holes:
            raise _Other(f"{original.name} has its tensors at other places than the file that it was made from")
        if other.sha256 and original.sha256 and other.sha256 != original.sha256:
            raise _Other(f"{original.name} has SHA-256 {original.sha256}, it was made from {other.sha256}")
        if other.mtime_ns != original.mtime_ns:
            stale[manifest.residue_path(out, original.name)] = original.mtime_ns
    if earlier:
        raise _Other(f"{next(iter(earlier))} was among its source files and is gone")
    mine, there = ({file.name: file.size for file in files} for files in (source.carried, known.carried))
    for name in sorted(mine.keys() ^ there.keys()):
        raise _Other(f"{name} was not there when it was made" if name in mine else f"{name}, which it was made with, is gone")
    for name in sorted(mine):
        if mine[name] != there[name]:
            raise _Other(f"{name} has {mine[name]} bytes, it was made with {there[name]}")
    return stale


def _same_digests(job: "Job", known: Manifest) -> None:
    """Whatever of the source is no tensor has the digests that the destination has of it."""
    source = job.source
    digests = {file.name: file.digest for file in (*known.carried, *known.source)}
    with closing(Pool(stamps=source.stamps)) as pool:
        for file in source.carried:
            if _digest(pool.chunks(file.path, 0, file.size)) != digests[file.name]:
                raise _Other(f"{file.name} is not the file that it was made with: it has other contents")
        for original in source.originals:
            pieces = (piece for _, length, path, at in source.residue(original) for piece in pool.chunks(path, at, length))
            if _digest(pieces) != digests[str(manifest.residue_path(Path(), original.name))]:
                raise _Other(f"{original.name} is not the file that it was made from: its header or its buffers are others")


def _told(job: "Job", out: Path, known: Manifest, stale: dict[Path, int]) -> str:
    """What tells that the weights are the same, without reading all of them: the weakest of what tells it of one file."""
    recorded = {original.name: original.sha256 for original in manifest.load_originals(out)}
    commit = job.source.origin.commit is not None and job.source.origin.commit == known.origin.commit
    told = set()
    for original in job.source.originals:
        if original.container == "plain":
            continue  # all of it is residue
        if original.sha256 and recorded[original.name] == original.sha256:
            told.add("sha256")
        elif manifest.residue_path(out, original.name) in stale:
            told.add("content")
        else:
            told.add("commit" if commit else "sample")
    return next(by for by in ("content", "sample", "commit", "sha256") if by in told)


def _published(job: "Job", out: Path, options: "Options", progress: Progress) -> Finished:
    wanted = job.output.sizes | {name: len(data) for name, data in job.output.whole.items()}
    wanted |= {file.name: file.size for file in job.source.carried}
    stale = {}
    for name, size in wanted.items():
        path = out / name
        if not path.is_file():
            raise _Other(f"it lacks {name}")
        status = path.stat()
        if status.st_size != size:
            raise _Other(f"its {name} has {status.st_size} bytes, this job would write {size}")
        if status.st_mtime_ns != (mtime := job.output.mtimes.get(name, status.st_mtime_ns)):
            stale[path] = mtime
    extra = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - wanted.keys()
    extra = {name for name in extra if name.split("/")[0] not in publish.NOBODYS}
    if extra:
        raise _Other(f"it also holds {min(extra)}")
    _same_bytes(job, out)
    whole = options.check or options.checksum or bool(stale)
    _compare(job, out, options, progress, not whole)
    return Finished("content" if whole else "sample", whole, stale)


def _same_bytes(job: "Job", out: Path) -> None:
    """Whatever of Hugging Face files is no tensor is what this job would write."""
    output = job.output
    with closing(Pool(stamps=job.source.stamps)) as pool:

        def check(name: str, offset: int, path: Path | bytes, at: int, length: int, what: str) -> None:
            mine, theirs = pool.chunks(path, at, length), pool.chunks(out / name, offset, length)
            if any(one != other for one, other in zip(mine, theirs, strict=True)):
                raise _Other(f"{what} {name} differs from the source")

        for name, literals in output.literals.items():
            for offset, data in literals:
                check(name, offset, data, 0, len(data), "the header of its")
        for name, data in output.whole.items():
            check(name, 0, data, 0, len(data), "its")
        for name, extents in output.moved.items():
            for offset, length, path, at in extents:
                check(name, offset, path, at, length, "the header or a buffer of its")
        for file in job.source.carried:
            check(file.name, 0, file.path, 0, file.size, "its")


def _compare(job: "Job", out: Path, options: "Options", progress: Progress, sampled: bool) -> None:
    """All weights, or a sample of each tensor, are those that this job would write."""
    from .verdict import Rung
    from .verify import Comparer, check_tied

    source, output = job.source, job.output
    check_tied(source, output.layout, options.threads, progress, sampled)
    output.below(out)
    joined = sample(job.plan, source, output) if sampled else job.plan
    rung, lock, halt = Rung("weights"), Lock(), Event()
    sinks: list[Comparer] = []
    with closing(Pool(stamps=source.stamps)) as pool:

        class Counting(Comparer):
            def done(self, keys: Iterable[Key]) -> None:
                super().done(keys := list(keys))
                progress.advance(len(keys) * sampled)

        def sink() -> Comparer:
            sinks.append(Counting(output, pool, rung, lock, padded=False))
            return sinks[-1]

        if sampled:
            progress.start("comparing a sample", len({(copy.dst.rank, copy.dst_name) for copy in joined.copies()}), "tensors")
        else:
            progress.start("comparing weights", job.reads)
        advance = until(halt, (lambda _: None) if sampled else progress.advance)
        worker.run(joined, source, output, sink, workers=options.threads, pool=pool, progress=advance, stop=halt)
    progress.finish()
    if rung.failures:
        stored, failure = min(found for sink in sinks for found in sink.bad.items())
        raise _Other(f"it holds other weights than the source: {_sources(job, stored)} ({failure})")


def _sources(job: "Job", stored: Key, most: int = 3) -> str:
    """The tensors of the source that a stored tensor is made of, and their files."""
    made = {copy.src_name: (copy.src.rank, copy.src_name) for copy in job.plan.copies() if (copy.dst.rank, copy.dst_name) == stored}
    named = [f"{job.source.relative(job.source.locate(key)[0])}: {name}" for name, key in sorted(made.items())]
    return " or ".join(named[:most]) + " …" * (len(named) > most)


def _digest(pieces: Iterable[bytearray]) -> str:
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()
