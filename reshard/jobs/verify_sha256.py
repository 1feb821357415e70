"""The proof without the original: digests of the published files, made from the shards alone, against known ones.

What merging would write is streamed and hashed; nothing is written, nothing but metadata is downloaded.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

from ..checkpoints.source import Source
from ..checkpoints.streams import Streams
from ..checkpoints.target_files import restored
from ..errors import ReshardError, failed
from ..layout.join import plan
from ..store.digest import FileDigest
from ..store.local import Pool
from ..store.store import AnyFile
from ..text.progress import Progress, Silent
from ..threads import each
from .verdict import Check

Job = tuple[str, int, Iterator[memoryview | bytearray]]  # name and size of a file, and its bytes in order


def recorded(out: Source) -> dict[str, FileDigest]:
    """The digests that a directory remembers of the published files: those of the Hub, or of `convert --sha256`."""
    return {name: FileDigest("sha256", digest, "was recorded") for name, digest in out.sha256().items()}


def sha256(out: Source, wanted: Mapping[str, FileDigest], threads: int, progress: Progress | None = None) -> Check:
    """Every published file that merging would write, and every file carried along, has the digest that is wanted of it.

    Raises ReshardError where no digest is known of any weights.
    """
    progress, check = progress or Silent(), Check("sha256")
    if not any(original.name in wanted for original in out.originals):
        raise ReshardError(
            f"{out.where}: the SHA-256 digests of the original files are not known",
            "convert --sha256 records them; --hub ID gets them from the Hub",
        )
    restored_files = restored(out)
    known = [original for original in out.originals if original.name in wanted]
    along = [file for file in out.carried if file.name in wanted]
    missing = len(out.originals) - len(known)
    if missing:
        check.notes.append(
            f"{missing} of {len(out.originals)} original files have no known digest: {_first(out, wanted)}"
        )
    progress.start(
        "hashing what merging would write", sum(file.size for file in known) + sum(file.size for file in along)
    )
    lock, halt = threading.Lock(), threading.Event()
    with closing(Pool()) as pool:
        streams = Streams(plan(out.layout, restored_files.layout), out, restored_files, pool)

        def compare(job: Job) -> None:
            name, size, windows = job
            digest = wanted[name]
            state = digest.state(size)
            for window in windows:
                if halt.is_set():
                    return
                state.update(window)
                progress.advance(len(window))
            if state.hexdigest() != digest.value:
                with lock:
                    kind = "SHA-256" if digest.kind == "sha256" else "git id"
                    check.failures.append(
                        f"{name}: merging gives {kind} {state.hexdigest()}, but {digest.value} {digest.by}"
                    )

        jobs: list[Job] = [(file.name, file.size, streams.windows(file.name)) for file in known]
        jobs += [(file.name, file.size, pool.chunks(file.path, 0, file.size)) for file in along]
        jobs.sort(key=lambda job: -job[1])  # the largest first: they end together
        try:
            each(jobs, compare, threads, halt)
        except OSError as error:
            raise failed("reading", out.where, error) from error
    check.failures.sort()
    check.files, check.bytes = len(jobs), sum(size for _, size, _ in jobs)
    progress.finish()
    return check


def _first(out: Source, wanted: Mapping[str, FileDigest]) -> str:
    names = [original.name for original in out.originals if original.name not in wanted]
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def hashed(source: Source, threads: int, progress: Progress) -> Source:
    """The source with the SHA-256 of every published file, and of every file copied as is, that is not known yet.

    Where the published files are not at hand it is returned as it is: of shards no more is known than they record.
    Raises PlaceError if a file is not what it was when its header was read.
    """
    import hashlib

    paths = source.published_paths
    if not paths:
        return source
    halt = threading.Event()
    files: dict[str, tuple[AnyFile, int]] = {
        original.name: (paths[original.name], original.size) for original in source.originals if not original.sha256
    }
    files |= {file.name: (file.path, file.size) for file in source.carried}
    found: dict[str, str] = {}
    progress.start("computing SHA-256", sum(size for _, size in files.values()))
    with closing(Pool(stamps=source.stamps)) as pool:

        def digest(item: tuple[str, tuple[AnyFile, int]]) -> None:
            name, (path, size) = item
            state = hashlib.sha256()
            for piece in pool.chunks(path, 0, size):
                if halt.is_set():
                    return
                state.update(piece)
                progress.advance(len(piece))
            found[name] = state.hexdigest()

        each(files.items(), digest, threads, halt)
    progress.finish()
    originals = tuple(
        original._replace(sha256=found.get(original.name, original.sha256)) for original in source.originals
    )
    return replace(source, originals=originals, sums={file.name: found[file.name] for file in source.carried})
