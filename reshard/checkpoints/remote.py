"""Checkpoints in a store that is no local directory: headers by range for a plan; for a conversion the store's cache,
or ranges again.

Knows nothing about any particular store.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..containers.container import of_file
from ..containers.entry import Entry
from ..errors import PlaceError, ReshardError, failed
from ..inputs import decode, limits
from ..model.understand import Config
from ..store.store import Address, Ahead, Store
from ..tables.families import Family
from ..text.progress import Progress, Silent
from . import manifest
from .companions import MODULES, Carried, Left, sort_out
from .published import Origin, Original, Published, Tally, choose, merge, open_published, parse_json, quantization_of
from .source_kinds import Source, from_published

# Bytes asked for before the length of a header is known: 97 % of headers are shorter (huggingface_hub's count over the
# top 1000 models).
AHEAD = 100_000
SCATTERED = 4096  # bytes asked for at a time in a .bin file, whose tensors have a short header each
PARALLEL = 8  # files at a time


def open_remote(
    store: Store | Path, where: str, *, headers_only: bool, family: Family | None, progress: Progress | None
) -> Source:
    """The source in a store, or in the local directory that stands for it; with `headers_only` no weights are fetched.

    Raises ReshardError for what is no checkpoint, PlaceError where the store fails.
    """
    if isinstance(store, Path):
        return from_published(_offline(store, where), family)
    files = _files(store)
    if not headers_only and (root := store.fetch([*files.weights, *files.carried], progress or Silent())) is not None:
        found = _local(root, store.where)
        # The cache may hold parts of folders that are left out.
        kept = tuple(file for file in found.carried if file.name in files.carried)
        return from_published(replace(found, carried=kept, left=files.left), family)
    return from_published(_published(store, files), family)


def published(store: Store | Path, where: str) -> Published:
    """The headers of a checkpoint, not yet understood; of a store, `root` is None, and `originals` have no time."""
    return _offline(store, where) if isinstance(store, Path) else _published(store, _files(store))


@dataclass(frozen=True)
class _Files:
    """What is read of a store to know what to fetch. `index`: the name of the index and what it says, if there is
    one; `carried`: the small files that are copied as they are.
    """

    config: Config
    weights: list[str]
    index: tuple[str, dict[str, str] | None] | None
    carried: list[str]
    left: tuple[Left, ...]


def _published(store: Store, files: _Files) -> Published:
    tally = Tally()
    with ThreadPoolExecutor(PARALLEL) as pool:
        headers = [
            (o, tally.checked(entries, o.name))
            for o, entries in pool.map(lambda name: _header(store, name), files.weights)
        ]
    originals = [original for original, _ in headers]
    name, index = files.index or (files.weights[0], None)
    tensors = merge(files.weights, [entries for _, entries in headers], index, name)
    if not tensors:
        raise ReshardError(f"{store.where}: the weights files hold no tensors", "is the upload complete?")
    if files.index is not None:
        originals.append(Original(name, store.files[name].size, "plain", 0))
    carried = tuple(Carried(name, Address(store, name), store.files[name].size, 0) for name in files.carried)
    return Published(
        store.where,
        None,
        files.config,
        tuple(originals),
        tensors,
        carried,
        files.left,
        Origin(*store.origin),
        store=store,
    )


def _files(store: Store) -> _Files:
    """config.json, the index and the list of modules of a store, each read once."""
    top = [name for name in store.files if "/" not in name]
    if manifest.NAME in top and "rank-00000/tensors.json" in store.files:
        raise ReshardError(
            f"{store.where}: holds shards that reshard wrote; only local directories of shards are read",
            "download it, then give the directory; from the Hub: hf download ID --local-dir DIR",
        )
    if "config.json" not in top:
        seen = ", ".join(top[:8]) + (" …" if len(top) > 8 else "")
        raise ReshardError(
            f"{store.where}: has no config.json; it holds {seen or 'nothing'}",
            "every checkpoint has one; is this the right model?",
        )
    config = Config(parse_json(store.whole("config.json", limits.CONFIG), f"{store.where}/config.json"))
    said = quantization_of(config, top, lambda name: store.whole(name, limits.CONFIG), store.where)
    config = config.with_quantization(said)
    files, name, index = choose(top, store.where, lambda name: store.whole(name, limits.INDEX), config.weights)
    lost = next((file for file in files if file not in store.files), None)
    if lost is not None:
        at = f" at {store.origin[1]}" if store.origin[1] else ""
        raise ReshardError(
            f"{store.where}: {name} names {lost}, which is not in the repository{at}",
            "the upload is not complete: choose another --revision, or ask its authors",
        )
    taken = {*files, *([name] if name else ())}
    sizes = {name: file.size for name, file in store.files.items()}
    carried, left = sort_out(sizes, taken, lambda: store.whole(MODULES, limits.INDEX))
    return _Files(config, files, (name, index) if name else None, carried, left)


def _header(store: Store, name: str) -> tuple[Original, dict[str, Entry]]:
    container, known = of_file(name), store.files[name]
    file = Ahead(store, name, SCATTERED if container.scattered else AHEAD)
    entries = container.read(file, known.size, f"{store.where}/{name}").entries
    return Original(name, known.size, container.name, 0, known.sha256), entries


# --- where a local directory stands for the store ---------------------------------------------------------------------


def _offline(root: Path, where: str) -> Published:
    """What a cache holds, without asking whether that is all of it. Raises PlaceError where weights are missing."""
    config = Config(parse_json(decode.read(root / "config.json", limits.CONFIG), str(root / "config.json")))
    names = [path.name for path in root.iterdir() if path.exists()]
    files, _, _ = choose(
        names, f"{where} in {root}", lambda name: decode.read(root / name, limits.INDEX), config.weights
    )
    if lost := [file for file in files if not (root / file).exists()]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise PlaceError(
            f"{where}: HF_HUB_OFFLINE is set, and the Hub's cache does not hold {lost[0]}{more} of {len(files)} files",
            "unset HF_HUB_OFFLINE to fetch it",
        )
    return _local(root, where)


def _local(root: Path, where: str) -> Published:
    try:
        return open_published(root, where)
    except OSError as error:
        raise failed("reading", root, error) from error
