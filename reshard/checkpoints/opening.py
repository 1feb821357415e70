"""Opening what a user names: a local directory, or a checkpoint in a store;
and the family table that is used for it.
"""

from pathlib import Path

from ..errors import ReshardError
from ..store import location
from ..store.workfolder import check_whole
from ..tables import families
from ..tables.families import Family
from ..text.progress import Progress
from .remote import open_remote
from .source import Source, open_source


def open_any(
    src: str | Path,
    revision: str | None = None,
    family: str | None = None,
    *,
    headers_only: bool = True,
    progress: Progress | None = None,
) -> Source:
    """Open a path or a Hub id (org/name, hf://org/name). An existing path wins.

    `family` names a shipped table, or is the path of one's own. With `headers_only` nothing but headers is fetched from
    the Hub.
    """
    table = table_of(family)
    if not str(src):
        raise ReshardError("the source is an empty name", "give a directory, or a Hub id such as org/name")
    path, remote = Path(location.source(src)), location.scheme(src) is not None
    if not remote:
        check_whole(path)
    if not remote and path.exists():
        if revision is not None:
            raise ReshardError(f"--revision {revision}: {src} is a local path", "revisions belong to Hub ids")
        return open_source(path, table)
    store = location.opened(str(src), revision, keep=not headers_only)
    return open_remote(store, str(src), headers_only=headers_only, family=table, progress=progress)


def table_of(family: str | None) -> Family | None:
    """The table that `--family` means: a path to TOML, or the name of a shipped one."""
    if family is None:
        return None
    if family in families.shipped():
        return families.load(family)
    path = location.local(family, "a family table")
    if path.is_file():
        return families.load_file(path)
    if path.suffix == ".toml" or "/" in family or path.exists():
        raise ReshardError(
            f"--family {family}: there is no such file", "give the TOML file of a table, or the name of a shipped one"
        )
    raise ReshardError(f'no family table "{family}"', f"{families.nearest(family)}; or give a TOML file of your own")
