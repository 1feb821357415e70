"""Adding SHA-256 to shards that are finished, without writing their weights again."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..checkpoints import manifest
from ..checkpoints.manifest import Listed
from ..checkpoints.source import open_source
from ..checkpoints.target import Finished
from ..checkpoints.target_shards import original_texts
from ..errors import PlaceError, ReshardError, failed
from ..store import publish
from ..store.destination import check_replaceable
from ..store.digest import FileDigest, of
from ..store.local import check_unchanged
from ..text.progress import Progress
from . import verify_sha256
from .job import Job, Options


def add_sha256(
    job: Job, out: Path, found: Finished, options: Options, progress: Progress
) -> tuple[Finished, tuple[str, ...]]:
    """Add to finished shards the SHA-256 of the source's files where they lack it, as `convert --sha256` writes it.

    Merging the shards must make files of these digests, which proves the content. Everything else is linked into a new
    directory, which takes the place of the old as any conversion does: a reader finds the one or the other.
    """
    lacking = job.target.lacks_sha256(out)
    if lacking and job.source.published_paths:
        source = verify_sha256.hashed(job.source, options.threads, progress)
    elif any(original.sha256 and original.name in lacking for original in job.source.originals):
        source = job.source
    else:
        return found, ()
    wanted = {name: FileDigest("sha256", digest, "is that of the source's") for name, digest in source.sha256().items()}
    if failures := verify_sha256.sha256(open_source(out), wanted, options.threads, progress).failures:
        raise ReshardError(
            f"{out}: is not empty, and the source has other contents: {failures[0]}",
            "choose another destination, or --overwrite to replace it",
        )
    known, texts = manifest.load(out), original_texts(source)
    kept = [file for file in known.source if file.name not in texts]
    kept += [Listed(name, len(text), of(text)) for name, text in texts.items()]
    made = manifest.made(
        job.target.layout,
        engine=job.engine,
        origin=known.origin,
        plan=known.plan,
        ranks=known.ranks,
        carried=known.carried,
        source=kept,
    )
    texts[manifest.NAME] = manifest.dump(made)
    check_replaceable(out)
    with publish.Publication(out, manifest.NAME, replace=True, durable=options.fsync) as publication:
        try:
            _link(out, publication.work)
            for name, text in texts.items():
                (publication.work / name).unlink(missing_ok=True)  # never through the link
                publication.put(name, text)
            check_unchanged(source.stamps)
        except OSError as error:
            raise failed("writing", out, error) from error
        publication.commit(options.threads)
    return replace(found, by="sha256"), ("SHA-256",)


def _link(out: Path, work: Path) -> None:
    """The same files in another directory of the same file system, whatever they are."""

    def theirs(folder_: str, names: list[str]) -> list[str]:
        return [name for name in names if name in publish.NOBODYS] if Path(folder_) == out else []

    def link(path: str, to: str) -> None:
        try:
            os.link(path, to, follow_symlinks=False)
        except OSError as error:
            raise PlaceError(
                f"{path}: cannot be linked to {to}: {error.strerror}",
                "--sha256 adds to a finished directory through hard links; use --overwrite --sha256 to write "
                "all of it again",
            ) from error

    shutil.copytree(out, work, symlinks=True, ignore=theirs, copy_function=link, dirs_exist_ok=True)
