"""The Hugging Face Hub as a store: the files of one model at one commit, read by range, or fetched into the Hub's
cache.

Knows ids and revisions. Knows nothing about checkpoints. Everything goes through public names of huggingface_hub, so
that HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere; it follows redirects, and gives
its token to the Hub alone.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hf
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not said so to type checkers
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from .. import __version__
from ..errors import PlaceError, ReshardError
from ..inputs import decode, limits
from ..text.progress import Progress
from .digest import FileDigest
from .hub_errors import Ref, asking, patiently
from .store import File, Store

UNRANGED = 1 << 20  # bytes received in vain at most, from a server that ignores Range
PARALLEL = 8  # requests at a time, as huggingface_hub has it

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?P<plain>{_NAME}/{_NAME})|hf://(?P<id>{_NAME}/{_NAME})(?:@(?P<revision>.+))?")
_US: dict[str, Any] = {"library_name": "reshard", "library_version": __version__}


@dataclass(frozen=True, kw_only=True)
class Repo(Store):
    """A model at one commit. `snapshot`: its directory in the Hub's cache, where its files are to be fetched to;
    None: read by range.
    """

    id: str
    commit: str
    license: str | None
    snapshot: Path | None = None

    @property
    def origin(self) -> tuple[str | None, str | None, str | None]:
        return self.id, self.commit, self.license

    @property
    def at(self) -> Ref:
        return Ref(self.id, self.commit)

    def url(self, name: str) -> str:
        return hf_hub_url(self.id, name, revision=self.commit)

    def read(self, name: str, offset: int, length: int) -> bytes:
        where, size = f"{self.id}/{name}", self.files[name].size
        with asking(self.at, name):
            data, total = patiently(lambda: _range(self.url(name), offset, offset + length, where))
        if total not in (None, size):
            hint = (
                "the server gives the LFS pointer instead of the file"
                if data.startswith(b"version https://git-lfs")
                else None
            )
            raise PlaceError(
                f"{where}: has {total} bytes, the Hub's list says {size}",
                hint or "is it a proxy or a mirror? try again",
            )
        return data

    def whole(self, name: str, most: int) -> bytes:
        if self.snapshot is None:
            return super().whole(name, most)
        decode.fits(self.files[name].size, most, f"{self.where}/{name}")
        return decode.read(_download(self.at, name), most)

    def fetch(self, names: list[str], progress: Progress) -> Path | None:
        """Files that are complete are never fetched again, so that an interrupted download goes on where it was."""
        if self.snapshot is not None:
            _download_all(self, names, progress)
        return self.snapshot


def opened(text: str, revision: str | None, *, keep: bool) -> Repo | Path:
    """The model that a text and `--revision` name; with `keep`, its files are fetched into the Hub's cache. Offline,
    what is there.

    Raises ReshardError where the text is no id or the Hub refuses, PlaceError where it cannot be reached.
    """
    where = ref(text, revision)
    repo = _listing(where)
    if repo is None:
        return _cached(where)
    if not keep or "config.json" not in repo.files:
        return repo
    decode.fits(repo.files["config.json"].size, limits.CONFIG, f"{repo.id}/config.json")
    # by revision, so that the cache notes which commit it is, for later use offline
    root = _download(where, "config.json").parent
    if root.name != repo.commit:  # the branch has moved on since
        repo = _listing(Ref(where.id, root.name)) or repo
    return replace(repo, snapshot=root)


def is_id(text: str) -> bool:
    """Whether a text reads as a Hub id: org/name, hf://org/name or hf://org/name@revision. Whether there is such a
    model is not asked.
    """
    return _ID.fullmatch(text) is not None


def ref(text: str, revision: str | None) -> Ref:
    """The id and revision that a text and `--revision` name. Raises ReshardError if it is no id, or if they contradict
    each other.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise ReshardError(
            f"{text}: no such file or directory, and it does not read as a Hub id",
            "check the path; a Hub id is org/name (with --revision) or hf://org/name@revision",
        )
    if revision and found["revision"] and revision != found["revision"]:
        raise ReshardError(f"--revision {revision}: {text} names another revision", "leave one of them out")
    return Ref(found["plain"] or found["id"], revision or found["revision"])


def digests(text: str, revision: str | None) -> dict[str, FileDigest]:
    """What the Hub publishes of every file of a model: the SHA-256 of those in LFS, the git id of the others.

    Only metadata is asked for. Raises ReshardError where the Hub refuses or says nothing; PlaceError where it cannot be
    reached.
    """
    repo = _listing(ref(text, revision))
    if repo is None:
        raise ReshardError(
            f"{text}: HF_HUB_OFFLINE is set, so its digests cannot be fetched", "unset it, or leave out --hub"
        )
    known = {name: ("sha256", file.sha256) if file.sha256 else ("git", file.blob) for name, file in repo.files.items()}
    return {name: FileDigest(kind, digest, "is published") for name, (kind, digest) in known.items() if digest}


def _listing(where: Ref) -> Repo | None:
    """What the Hub holds, all of one commit; None where HF_HUB_OFFLINE is set."""
    api, timeout = HfApi(**_US), constants.HF_HUB_DOWNLOAD_TIMEOUT
    with asking(where, "its list of files"):
        try:
            info = patiently(
                lambda: api.model_info(where.id, revision=where.revision, files_metadata=True, timeout=timeout)
            )
        except hf.OfflineModeIsEnabled:
            return None
        tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
        licenses = [name for name in (getattr(info.card_data, "license", None), *tags) if isinstance(name, str)]
        if info.sha is None:
            raise ValueError("no commit is named")
        files: dict[str, File] = {}
        repo = Repo(
            where=where.id, files=files, id=where.id, commit=info.sha, license=licenses[0] if licenses else None
        )

        def add(file: Any) -> None:
            size = file.lfs.size if file.lfs else file.size
            if size is None:  # mirrors may leave it out
                size = patiently(lambda: get_hf_file_metadata(repo.url(file.rfilename), timeout=timeout)).size
            files[file.rfilename] = File(size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(add, info.siblings or ()))
    return repo


def _range(url: str, low: int, high: int, where: str) -> tuple[bytes, int | None]:
    """Bytes `low` to `high` of a file, and the size of the whole, if told. Of an answer that is longer no more than
    that is read.
    """
    headers = build_hf_headers(**_US) | {"Range": f"bytes={low}-{high - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        skip = 0
        if response.status_code == 206:
            said = re.fullmatch(
                r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", response.headers.get("Content-Range", "")
            )
            if said is None or int(said[1]) != low:
                raise ConnectionError(
                    f"bytes from {low} on were asked for, the answer is {response.headers.get('Content-Range')!r}"
                )
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
        for chunk in response.iter_bytes(16384):
            data += chunk
            if len(data) >= skip + high - low:
                break
    if total is not None and total < high:
        return bytes(data), total  # another file than the list says: the caller tells
    if len(data) < skip + high - low:
        raise ConnectionError(f"the answer ended after {len(data)} of {skip + high - low} bytes")
    return bytes(data[skip : skip + high - low]), total


# --- the cache --------------------------------------------------------------------------------------------------------


def _download_all(repo: Repo, names: list[str], progress: Progress) -> None:
    """Bring files into the cache, several at a time; the first failure stops all of them."""
    stop = threading.Event()
    names = [name for name in names if not isinstance(try_to_load_from_cache(repo.id, name, revision=repo.commit), str)]
    if not names:
        return
    bar = _bar(progress, stop)
    progress.start("downloading", sum(repo.files[name].size for name in names))
    with ThreadPoolExecutor(PARALLEL) as pool:
        try:
            for job in as_completed([pool.submit(_download, repo.at, name, bar) for name in names]):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.finish()


def _download(where: Ref, name: str, bar: type | None = None) -> Path:
    """One file, from the cache if it is there."""
    with asking(where, name):
        return Path(patiently(lambda: hf_hub_download(where.id, name, revision=where.revision, tqdm_class=bar, **_US)))


def _bar(progress: Progress, stop: threading.Event) -> type:
    """What huggingface_hub takes for a tqdm class; it tells `progress` instead."""

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
    if isinstance(found, str):
        return Path(found).parent
    at = f" at revision {where.revision}" if where.revision else ""
    raise PlaceError(
        f"{where.id}: there is no such path here, and HF_HUB_OFFLINE is set while the Hub's cache does not hold it{at}",
        f"unset HF_HUB_OFFLINE to fetch it; the cache is {constants.HF_HUB_CACHE} (HF_HOME, HF_HUB_CACHE)",
    )
