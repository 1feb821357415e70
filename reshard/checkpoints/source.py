"""Opening a directory that tensors can be read from, by what it holds. What a source is: `source_kinds`."""

from dataclasses import replace
from pathlib import Path

from ..errors import ReshardError, failed
from ..store.directory import reading
from ..store.workfolder import check_whole
from ..tables.families import Family
from . import manifest
from .published import open_published
from .shard_directory import check_small_files, open_rank, open_shards
from .source_kinds import Source, from_published

__all__ = ["Source", "check_small_files", "from_published", "open_rank", "open_source"]


def open_source(path: Path, family: Family | None = None) -> Source:
    """Open a local directory: shards by a manifest, an engine's by their file names, else a published checkpoint.

    Raises ReshardError for what is none of these; MismatchError for shards that are damaged; PlaceError for what cannot
    be read.
    """
    check_whole(path)
    if not path.exists():
        raise ReshardError(
            f"{path}: no such file or directory", "a path to a checkpoint directory, or a Hub id such as org/name"
        )
    if not path.is_dir():
        raise ReshardError(f"{path}: is a file; a checkpoint is a directory", f"give the directory: {path.parent}")
    try:
        return reading(path, lambda directory: replace(_open(path, family), directory=directory))
    except OSError as error:
        raise failed("reading", path, error) from error


def _open(path: Path, family: Family | None) -> Source:
    if manifest.present(path):
        return open_shards(path)
    from . import engine_shards

    if (table := engine_shards.recognised(path)) is not None:
        return engine_shards.open_shards(path, table, family)
    manifest.check_lost(path)
    return from_published(open_published(path), family)
