"""A small Hugging Face Hub on loopback: what huggingface_hub asks of the real one, and the ways in which the real one
fails.

Two servers: the Hub itself, and the storage that it redirects large files to, which must never see a token. Files come
from directories. Every answer is noted with the bytes of body that were handed to the socket. Knows nothing about
checkpoints.

    with Hub() as hub:
        hub.add("org/name", directory)
        ... HF_ENDPOINT=hub.url ...
        hub.asked          [Asked(method, path, range, status, sent)]
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".pth")  # what .gitattributes gives to LFS
TOKEN = "hf_token_of_the_tests"


@dataclass
class Asked:
    """One request, and how many bytes of body have been sent for it."""

    method: str
    path: str
    range: str | None
    status: int
    token: bool
    sent: int = 0


@dataclass
class Repo:
    """A model: directories by commit, commits by branch or tag."""

    commits: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)


@dataclass
class Fault:
    """How to fail: an HTTP status with the Hub's headers; or only once so many bytes have been sent;
    or after so many seconds.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    wait: float = 0.0
    body: bytes | None = None  # sent instead of the file
    times: int = 1_000_000


class Hub:
    """The server; a context manager. `fault(method, path)` says how a request shall fail, None that it shall not."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.ranges = True  # whether Range is honoured
        self.sizes = True  # whether the list of files tells sizes
        self.blobs: dict[str, Path] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) for _ in range(2)
        ]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        # Of another host, as the real storage is: redirects within one host are followed for metadata, which storage
        # has none of.
        self.url, self.storage = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(("127.0.0.1", "localhost"), self.servers, strict=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, directory: Path, revision: str = "main", **facts: Any) -> str:
        """Publish a directory as a revision of a model; the commit's id."""
        repo = self.repos.setdefault(name, Repo(**facts))
        commit = hashlib.sha1(f"{name} {revision} {directory} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = directory
        repo.revisions[revision] = commit
        return commit

    def clear(self) -> None:
        """Forget what was asked, and fail no more."""
        self.asked.clear()
        self.fault, self.ranges, self.sizes = lambda method, path: None, True, True

    def sent(self, suffix: str = "") -> int:
        """Bytes of body sent for paths that end so, by either server."""
        return sum(asked.sent for asked in self.asked if asked.path.endswith(suffix))

    def files(self) -> set[str]:
        """The names of the files of which anything was sent."""
        paths = [asked.path.partition("/resolve/")[2] for asked in self.asked if asked.sent]
        return {unquote(path.partition("/")[2]) for path in paths if path}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        fault = hub.fault(self.command, path)
        if fault is not None and not fault.times:
            fault = None
        if fault is not None:
            fault.times -= 1
            time.sleep(fault.wait)
        if fault is not None and fault.status:
            self._send(fault.status, fault.headers, json.dumps({"error": "it was told to fail"}).encode())
        elif fault is not None and fault.body is not None:
            self._send(200, {"ETag": '"other"', "X-Repo-Commit": "0" * 40}, fault.body)
        elif path.startswith("/storage/"):
            self._file(hub.blobs[path.split("/")[2]], {}, fault)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], unquote(found[2] or "main"))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]), fault)
        else:
            self._send(404, {}, b"{}")

    def _repo(self, name: str, revision: str, files: bool = False) -> tuple[str, Path] | None:
        """The commit and its directory; None if an error was sent, as the Hub sends it."""
        repo, known = self.hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self._send(
                404 if known else 401,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
                b"{}",
            )
        elif files and repo.gated:
            message = f"Access to model {name} is restricted."
            self._send(403 if known else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message}, b"{}")
        elif (commit := repo.revisions.get(revision, revision)) not in repo.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}")
        else:
            return commit, repo.commits[commit]
        return None

    def _files(self, root: Path) -> list[tuple[str, Path]]:
        return sorted((str(path.relative_to(root)), path) for path in root.rglob("*") if path.is_file())

    def _info(self, name: str, revision: str) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        siblings = []
        for file, path in self._files(found[1]):
            sibling: dict[str, Any] = {"rfilename": file}
            if self.hub.sizes:
                sibling |= {"size": path.stat().st_size, "blobId": git_sha1(path)}
                if path.suffix in LARGE:
                    sibling["lfs"] = {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 134}
            siblings.append(sibling)
        repo = self.hub.repos[name]
        info = {
            "id": name,
            "modelId": name,
            "sha": found[0],
            "private": repo.private,
            "gated": repo.gated,
            "tags": [],
            "downloads": 0,
        }
        self._send(
            200,
            {"Content-Type": "application/json"},
            json.dumps(info | {"cardData": repo.card, "siblings": siblings}).encode(),
        )

    def _resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        found = self._repo(name, revision, files=True)
        if found is None:
            return
        commit, root = found
        path = root / file
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            self._send(
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit},
                b"{}",
            )
        elif path.suffix in LARGE:
            blob = sha256(path)
            self.hub.blobs[blob] = path
            headers |= {"X-Linked-Etag": f'"{blob}"', "X-Linked-Size": str(path.stat().st_size)}
            self._send(302, headers | {"Location": f"{self.hub.storage}/storage/{blob}{self.path}"}, b"")
        else:
            self._file(path, headers | {"ETag": f'"{git_sha1(path)}"'}, fault)

    def _file(self, path: Path, headers: dict[str, str], fault: Fault | None) -> None:
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        drop = fault.drop_after if fault else None
        if wanted and self.hub.ranges:
            low, high = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
            if low < len(data):
                self._send(
                    206, headers | {"Content-Range": f"bytes {low}-{high - 1}/{len(data)}"}, data[low:high], drop
                )
            else:
                self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        else:
            self._send(200, headers, data, drop)

    def _send(self, status: int, headers: dict[str, str], body: bytes, drop: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        asked = Asked(
            self.command, urlsplit(self.path).path, self.headers.get("Range"), status, "Authorization" in self.headers
        )
        with self.hub.lock:
            self.hub.asked.append(asked)
        limit = 0 if self.command == "HEAD" else len(body) if drop is None else min(drop, len(body))
        try:
            while asked.sent < limit:
                asked.sent += self.connection.send(body[asked.sent : min(limit, asked.sent + 65536)])
        except OSError:
            self.close_connection = True
        self.close_connection |= drop is not None
