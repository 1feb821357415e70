"""Checkpoints on the Hugging Face Hub: their headers by range request for a plan, their files through the Hub's cache for a conversion.

Knows ids and revisions, and how the Hub and the way to it fail, in words. Knows nothing about what headers mean, or about shards.
Everything goes through public names of huggingface_hub, 0.30 and later, so that HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean
what they mean everywhere. Its HTTP library has changed twice (requests, httpx, httpx2): `_opened` and `_transport` know them all.
"""

import inspect
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hf
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not said so to type checkers
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from .. import __version__
from ..containers.container import of_file
from ..containers.entry import Entry
from ..errors import PlaceError, ReshardError, failed
from ..inputs import decode, limits
from ..model.understand import Config
from ..store.digest import FileDigest
from ..tables.families import Family
from ..text.progress import Progress, Silent
from . import manifest
from .companions import MODULES, Carried, Left, sort_out
from .published import Origin, Original, Published, Tally, choose, merge, open_published, parse_json, read_json
from .source import Source, from_published, open_source

# Bytes asked for before the length of a header is known: 97 % of headers are shorter (huggingface_hub's count over the top 1000 models).
AHEAD = 100_000
SCATTERED = 4096  # bytes asked for at a time in a .bin file, whose tensors have a short header each
UNRANGED = 1 << 20  # bytes received in vain at most, from a server that ignores Range
PARALLEL = 8  # requests at a time, as huggingface_hub has it
PAUSES = (0.5, 2.0)  # seconds before the second and third attempt
BUSY = (408, 429, 500, 502, 503, 504)  # status codes that may be others in a moment

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?P<plain>{_NAME}/{_NAME})|hf://(?P<id>{_NAME}/{_NAME})(?:@(?P<revision>.+))?")
_US: dict[str, Any] = {"library_name": "reshard", "library_version": __version__}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ref:
    """A model on the Hub, at a branch, tag or commit; None is the default branch."""

    id: str
    revision: str | None


@dataclass(frozen=True)
class Repo:
    """What the Hub says of a model at one commit. `files`: every path in it → size in bytes, and SHA-256 where it is kept in LFS.

    `blobs`: path → the id that git gives the file, or its LFS pointer.
    """

    id: str
    commit: str
    license: str | None
    files: dict[str, tuple[int, str | None]]
    blobs: dict[str, str] = field(default_factory=dict)

    def check_size(self, name: str) -> None:
        """Refuse, before any of it is fetched, a file to be read whole that is too large for that by what the Hub says of it."""
        decode.fits(self.files[name][0], limits.CONFIG if name == "config.json" else limits.INDEX, f"{self.id}/{name}")

    def url(self, name: str) -> str:
        return hf_hub_url(self.id, name, revision=self.commit)


def is_id(text: str) -> bool:
    """Whether a text reads as a Hub id: org/name, hf://org/name or hf://org/name@revision. Whether there is such a model is not asked."""
    return _ID.fullmatch(text) is not None


def resolve(
    text: str, revision: str | None, *, headers_only: bool, family: Family | None = None, progress: Progress | None = None
) -> Source:
    """The source that a text means: a local path if there is one, else a Hub id. With `headers_only` no weights are fetched.

    Raises ReshardError for what is neither, and where the Hub refuses; PlaceError where the Hub or the way to it fails.
    """
    path = Path(text)
    if not text.startswith("hf://") and path.exists():
        if revision is not None:
            raise ReshardError(f"--revision {revision}: {text} is a local path", "revisions belong to Hub ids")
        return open_source(path, family)
    if headers_only:
        return open_remote(text, revision, family)
    root, beside = _fetch(ref(text, revision), progress)
    found = _local(root, ref(text, revision))
    if beside is not None:  # the cache may hold parts of folders that are left out
        names, left = beside
        found = replace(found, carried=tuple(file for file in found.carried if file.name in names), left=left)
    return from_published(found, family)


def open_remote(text: str, revision: str | None, family: Family | None = None) -> Source:
    """A checkpoint on the Hub, from config.json, the index and the headers alone; offline from the Hub's cache."""
    return from_published(published(text, revision), family)


def published(text: str, revision: str | None) -> Published:
    """The headers of a checkpoint on the Hub, not yet understood; `root` is None, and `originals` have no time."""
    where = ref(text, revision)
    repo = _listing(where)
    if repo is None:
        return _local(_cached(where), where)

    @cache
    def read(name: str) -> bytes:
        repo.check_size(name)
        return _File(repo, name, AHEAD)(repo.files[name][0], 0)

    names, index_name, index = _weights(repo, read)
    config = Config(parse_json(read("config.json"), f"{repo.id}/config.json"))
    tally = Tally()
    with ThreadPoolExecutor(PARALLEL) as pool:
        headers = [(o, tally.checked(entries, o.name)) for o, entries in pool.map(lambda name: _header(repo, name), names)]
    originals = [original for original, _ in headers]
    tensors = merge(names, [entries for _, entries in headers], index, index_name or names[0])
    if not tensors:
        raise ReshardError(f"{repo.id}: the weights files hold no tensors", "is the upload complete?")
    if index_name is not None:
        originals.append(Original(index_name, repo.files[index_name][0], "plain", 0))
    carried, left = _beside(repo, {original.name for original in originals}, read)
    along = tuple(Carried(name, Path(name), repo.files[name][0], 0) for name in carried)
    return Published(repo.id, None, config, tuple(originals), tensors, along, left, Origin(repo.id, repo.commit, repo.license))


def digests(text: str, revision: str | None) -> tuple[str, dict[str, FileDigest]]:
    """The commit that a text names, and what the Hub publishes of every file: the SHA-256 of those in LFS, the git id of the others.

    Only metadata is asked for. Raises ReshardError where the Hub refuses or says nothing; PlaceError where it cannot be reached.
    """
    where = ref(text, revision)
    repo = _listing(where)
    if repo is None:
        raise ReshardError(f"{text}: HF_HUB_OFFLINE forbids to ask the Hub for its digests", "unset it, or leave out --hub")
    found = {name: FileDigest("sha256", digest, "is published") for name, (_, digest) in repo.files.items() if digest}
    found |= {name: FileDigest("git", blob, "is published") for name, blob in repo.blobs.items() if name not in found}
    return repo.commit, found


def fetch(text: str, revision: str | None, progress: Progress | None = None) -> Path:
    """The directory of a snapshot in the Hub's cache that has everything a conversion needs, downloaded as far as it is not there.

    That is config.json, the index, the weights files that it names, and the small files beside them. Files that are complete are never
    fetched again, so that an interrupted download goes on where it was.
    """
    return _fetch(ref(text, revision), progress)[0]


def ref(text: str, revision: str | None) -> Ref:
    """The id and revision that a text and `--revision` name. Raises ReshardError if it is no id, or if they contradict each other."""
    found = _ID.fullmatch(text)
    if found is None:
        raise ReshardError(
            f"{text}: no such file or directory, and it does not read as a Hub id",
            "check the path; a Hub id is org/name (with --revision) or hf://org/name@revision",
        )
    if revision and found["revision"] and revision != found["revision"]:
        raise ReshardError(f"--revision {revision}: {text} names another revision", "leave one of them out")
    return Ref(found["plain"] or found["id"], revision or found["revision"])


# --- what is there ----------------------------------------------------------------------------------------------------------


def _listing(where: Ref) -> Repo | None:
    """What the Hub holds, all of one commit; None where HF_HUB_OFFLINE forbids to ask."""
    api, timeout = HfApi(**_US), constants.HF_HUB_DOWNLOAD_TIMEOUT
    with _asking(where, "its list of files"):
        try:
            info = _patiently(lambda: api.model_info(where.id, revision=where.revision, files_metadata=True, timeout=timeout))
        except hf.OfflineModeIsEnabled:
            return None
        tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
        licenses = [name for name in (getattr(info.card_data, "license", None), *tags) if isinstance(name, str)]
        if info.sha is None:
            raise ValueError("no commit is named")
        repo = Repo(where.id, info.sha, licenses[0] if licenses else None, {})
        unknown = []
        for file in info.siblings or ():
            size = file.lfs.size if file.lfs else file.size
            if size is None:  # mirrors may leave it out
                unknown.append(file.rfilename)
            repo.files[file.rfilename] = size or 0, file.lfs.sha256 if file.lfs else None
            if file.blob_id:
                repo.blobs[file.rfilename] = file.blob_id
        with ThreadPoolExecutor(PARALLEL) as pool:
            metadata = pool.map(lambda name: _patiently(lambda: get_hf_file_metadata(repo.url(name), timeout=timeout)), unknown)
            for name, found in zip(unknown, metadata, strict=True):
                repo.files[name] = found.size or 0, None
    return repo


def _weights(repo: Repo, read: Callable[[str], bytes]) -> tuple[list[str], str | None, dict[str, str] | None]:
    """The weights files, and the index that names them and what it says, if there is one. `read` gives the bytes of a small file."""
    top = [name for name in repo.files if "/" not in name]
    if manifest.NAME in top and "rank-00000/tensors.json" in repo.files:
        raise ReshardError(
            f"{repo.id}: holds shards that reshard wrote; from the Hub only published checkpoints are read",
            f"download it, then give the directory: hf download {repo.id} --local-dir DIR",
        )
    if "config.json" not in top:
        seen = ", ".join(top[:8]) + (" …" if len(top) > 8 else "")
        raise ReshardError(
            f"{repo.id}: has no config.json; it holds {seen or 'nothing'}", "every checkpoint has one; is this the right model?"
        )
    said = Config(parse_json(read("config.json"), f"{repo.id}/config.json")).weights
    files, name, index = choose(top, repo.id, read, said)
    lost = next((file for file in files if file not in repo.files), None)
    if lost is not None:
        raise ReshardError(
            f"{repo.id}: {name} names {lost}, which is not in the repository at {repo.commit}",
            "the upload is not complete: choose another --revision, or ask its authors",
        )
    return files, name, index


def _beside(repo: Repo, taken: Collection[str], read: Callable[[str], bytes]) -> tuple[list[str], tuple[Left, ...]]:
    """The small files that are copied, and what is left out."""
    return sort_out({name: size for name, (size, _) in repo.files.items()}, taken, lambda: read(MODULES))


# --- headers ----------------------------------------------------------------------------------------------------------------


def _header(repo: Repo, name: str) -> tuple[Original, dict[str, Entry]]:
    size, sha256 = repo.files[name]
    container = of_file(name)
    entries = container.read(_File(repo, name, SCATTERED if container.scattered else AHEAD), size, f"{repo.id}/{name}").entries
    return Original(name, size, container.name, 0, sha256), entries


class _File:
    """A file on the Hub that is read like a local one: a request brings `ahead` bytes at least, and no byte is asked for twice."""

    def __init__(self, repo: Repo, name: str, ahead: int) -> None:
        self.repo, self.name, self.size, self.ahead = repo, name, repo.files[name][0], ahead
        self.known: list[tuple[int, bytes]] = []  # offset, bytes from there on

    def __call__(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset` on; fewer at the end of the file."""
        at, end = offset, min(offset + length, self.size)
        parts = []
        while at < end:
            found = next(((low, data) for low, data in self.known if low <= at < low + len(data)), None)
            if found is None:
                wanted = end if at > offset else max(end, at + self.ahead)
                next_known = min((low for low, _ in self.known if low > at), default=self.size)
                found = at, self._ask(at, min(wanted, next_known))
                self.known.append(found)
            low, data = found
            parts.append(data[at - low : end - low])
            at += len(parts[-1])
        return b"".join(parts)

    def _ask(self, low: int, high: int) -> bytes:
        where = f"{self.repo.id}/{self.name}"
        with _asking(Ref(self.repo.id, self.repo.commit), self.name):
            data, total = _patiently(lambda: _range(self.repo.url(self.name), low, high, where))
        if total not in (None, self.size):
            hint = "the server gives the LFS pointer instead of the file" if data.startswith(b"version https://git-lfs") else None
            raise PlaceError(f"{where}: has {total} bytes, the Hub's list says {self.size}", hint or "is it a proxy or a mirror? try again")
        return data


def _range(url: str, low: int, high: int, where: str) -> tuple[bytes, int | None]:
    """Bytes `low` to `high` of a file, and the size of the whole, if told. Of an answer that is longer no more than that is read."""
    with _opened(url, {"Range": f"bytes={low}-{high - 1}", "Accept-Encoding": "identity"}) as (response, chunks):
        hf_raise_for_status(response)
        skip = 0
        if response.status_code == 206:
            said = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
            if said is None or int(said[1]) != low:
                raise ConnectionError(f"bytes from {low} on were asked for, the answer is {response.headers.get('Content-Range')!r}")
            total = None if said[2] == "*" else int(said[2])
        else:
            skip, length = low, response.headers.get("Content-Length")
            total = limits.numeral(length) if length and "Content-Encoding" not in response.headers else None
        if skip > UNRANGED:
            raise ReshardError(
                f"{where}: {constants.ENDPOINT} ignores range requests, bytes from {low} on would cost all before them",
                "download the model, then give its directory; or use another HF_ENDPOINT",
            )
        data = bytearray()
        for chunk in chunks(16384):
            data += chunk
            if len(data) >= skip + high - low:
                break
    if total is not None and total < high:
        return bytes(data), total  # another file than the list says: the caller tells
    if len(data) < skip + high - low:
        raise ConnectionError(f"the answer ended after {len(data)} of {skip + high - low} bytes")
    return bytes(data[skip : skip + high - low]), total


@contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Callable[[int], Iterator[bytes]]]]:
    """A response whose body has not been read yet, and the function that reads it in chunks; what is not read is not downloaded."""
    session: Any = get_session()
    asked = build_hf_headers(**_US) | headers
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
            yield response, response.iter_bytes
    else:  # requests
        with session.get(url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, stream=True) as response:
            yield response, response.iter_content


# --- files ------------------------------------------------------------------------------------------------------------------


def _fetch(where: Ref, progress: Progress | None) -> tuple[Path, tuple[list[str], tuple[Left, ...]] | None]:
    """The snapshot's directory, and what the Hub has beside the weights: fetched, and left out; None where it could not be asked."""
    repo = _listing(where)
    if repo is None:
        return _cached(where), None
    if "config.json" in repo.files:
        repo.check_size("config.json")
        root = _download(where, "config.json").parent  # by revision, so that the cache notes which commit it is, for later use offline
        if root.name != repo.commit:  # the branch has moved on since
            repo = _listing(Ref(where.id, root.name)) or repo
    at = Ref(repo.id, repo.commit)

    def read(name: str) -> bytes:
        repo.check_size(name)
        return decode.read(_download(at, name), limits.INDEX)

    names, index, _ = _weights(repo, read)
    carried, left = _beside(repo, {*names, *([index] if index else ())}, read)
    _download_all(repo, [*names, *carried], progress or Silent())
    return root, (carried, left)


def _download_all(repo: Repo, names: list[str], progress: Progress) -> None:
    """Bring files into the cache, several at a time; the first failure stops all of them."""
    at, stop = Ref(repo.id, repo.commit), threading.Event()
    names = [name for name in names if not isinstance(try_to_load_from_cache(repo.id, name, revision=repo.commit), str)]
    if not names:
        return
    bar = _bar(progress, stop)
    progress.start("downloading", sum(repo.files[name][0] for name in names))
    with ThreadPoolExecutor(PARALLEL) as pool:
        try:
            jobs = {pool.submit(_download, at, name, bar): name for name in names}
            for job in as_completed(jobs):
                job.result()
                if bar is None:
                    progress.advance(repo.files[jobs[job]][0])
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.finish()


def _download(where: Ref, name: str, bar: type | None = None) -> Path:
    """One file, from the cache if it is there."""
    options: dict[str, Any] = _US if bar is None else {**_US, "tqdm_class": bar}
    with _asking(where, name):
        return Path(str(_patiently(lambda: hf_hub_download(where.id, name, revision=where.revision, **options))))


def _bar(progress: Progress, stop: threading.Event) -> type | None:
    """What huggingface_hub takes for a tqdm class, which tells `progress` instead; None for versions that take none."""
    if "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
        disable_progress_bars()
        return None

    class Bar:
        n, total = 0, None

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, n: float = 1) -> None:
            if stop.is_set():
                raise InterruptedError("another download failed")
            progress.advance(int(n))

        def update_transfer(self, n: float = 1) -> None:
            """Bytes on the wire, where huggingface_hub counts them apart from bytes of the file."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar


def _cached(where: Ref) -> Path:
    """The snapshot in the Hub's cache, for work offline."""
    found = try_to_load_from_cache(where.id, "config.json", revision=where.revision)
    again = "unset HF_HUB_OFFLINE to fetch it"
    if not isinstance(found, str):
        at = f" at revision {where.revision}" if where.revision else ""
        raise PlaceError(
            f"{where.id}: there is no such path here, and HF_HUB_OFFLINE is set while the Hub's cache does not hold it{at}",
            f"{again}; the cache is {constants.HF_HUB_CACHE} (HF_HOME, HF_HUB_CACHE)",
        )
    root = Path(found).parent
    names = [path.name for path in root.iterdir() if path.exists()]
    said = Config(read_json(Path(found))).weights
    files, _, _ = choose(names, f"{where.id} in {root}", lambda name: decode.read(root / name, limits.INDEX), said)
    lost = [file for file in files if not (root / file).exists()]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise PlaceError(
            f"{where.id}: HF_HUB_OFFLINE is set, and the Hub's cache does not hold {lost[0]}{more} of {len(files)} files", again
        )
    return root


def _local(root: Path, where: Ref) -> Published:
    try:
        return open_published(root, where.id)
    except OSError as error:
        raise failed("reading", root, error) from error


# --- what goes wrong --------------------------------------------------------------------------------------------------------


def _patiently(ask: Callable[[], T]) -> T:
    """Ask again, a little later each time, where the Hub or the way to it fails for a moment."""
    for pause in PAUSES:
        try:
            return ask()
        except _transport() as error:
            response = getattr(error, "response", None)
            passes = response.status_code in BUSY if response is not None else not isinstance(error, hf.OfflineModeIsEnabled)
            if not passes:
                raise
            time.sleep(pause)
    return ask()


def _transport() -> tuple[type[Exception], ...]:
    """How HTTP libraries say that a request failed; the one that huggingface_hub uses has been imported by now."""
    names = (("requests", "RequestException"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    return (ConnectionError, *(getattr(sys.modules[module], name) for module, name in names if module in sys.modules))


@contextmanager
def _asking(where: Ref, what: str) -> Iterator[None]:
    """Whatever huggingface_hub raises, in words: its types differ from version to version, and some are those of its HTTP library."""
    try:
        yield
    except ReshardError:
        raise
    except Exception as error:
        raise _explained(error, where, what) from error


def _explained(error: BaseException, where: Ref, what: str) -> ReshardError:
    while isinstance(error, (hf.LocalEntryNotFoundError, hf.FileMetadataError)) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache", said where asking the Hub failed first
    hub, name = constants.ENDPOINT, where.id
    who = "this token (HF_TOKEN, or `hf auth login`)" if _logged_in() else "anyone who is not logged in"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__

    if isinstance(error, hf.GatedRepoError):
        return ReshardError(
            f"{name}: {what} is not given to {who}: the model is gated", f"accept its conditions at {hub}/{name}, and {log_in}"
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return ReshardError(
            f"{name}: there is no such path here, and no such model at {hub} that is open to {who}",
            f"check the spelling; if it is private, {log_in}",
        )
    if isinstance(error, hf.RevisionNotFoundError):
        return ReshardError(
            f"{name}: has no revision {where.revision or 'main'!r} at {hub}",
            f"a branch, tag or commit is needed; see {hub}/{name}/tree/main",
        )
    if isinstance(error, hf.EntryNotFoundError):
        return ReshardError(f"{name}: {what} is not there at revision {where.revision or 'main'}", "was it just removed? try again")
    if isinstance(error, hf.HFValidationError):
        return ReshardError(f"{name}: there is no such path here, and it is no Hub id: {said}", "a Hub id is org/name")
    if isinstance(error, hf.OfflineModeIsEnabled):
        return PlaceError(f"{name}: HF_HUB_OFFLINE is set, {what} cannot be fetched", "unset it")
    if status == 429:
        return PlaceError(
            f"{name}: {hub} refuses {what}: too many requests of {who} (429)", f"wait some minutes; or {log_in} for a higher limit"
        )
    if status in (401, 403):
        return ReshardError(f"{name}: {hub} refuses {what} to {who} ({status}): {said}", f"check the token and its permissions: {log_in}")
    if status is not None:
        return PlaceError(f"{name}: {hub} failed to give {what} ({status}): {said}", "try again later")
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return PlaceError(
            f"{name}: {hub} was silent for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s while {what} was asked for",
            "try again; HF_HUB_DOWNLOAD_TIMEOUT sets the limit in seconds",
        )
    if isinstance(error, _transport()) and not isinstance(error, ValueError):  # to requests an answer that is no JSON is one, too
        return PlaceError(
            f"{name}: there is no such path here, and {hub} cannot be reached for {what}: {said}",
            "check the network, HTTPS_PROXY and HF_ENDPOINT; HF_HUB_OFFLINE=1 works with what is in the cache",
        )
    if isinstance(error, OSError) and error.errno:
        return failed(f"{name}: using HF_HOME for {what}:", Path(error.filename or constants.HF_HUB_CACHE), error)
    return PlaceError(
        f"{name}: {what} could not be had from {hub}: {type(error).__name__}: {said}", "does a Hub answer there (HF_ENDPOINT)?"
    )


def _logged_in() -> bool:
    try:
        return get_token() is not None
    except OSError:
        return False
