"""A store that is written to is one class and one row: parts in any order, nothing to be seen before all of it is."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import pytest
from fixtures import copy
from hypothesis import given
from hypothesis import strategies as st
from running import tree
from strategies import law

from reshard import api
from reshard.api import open_any
from reshard.errors import PlaceError, ReshardError
from reshard.store import location
from reshard.store.location import Scheme
from reshard.store.objects import CLAIM, Filling, Objects
from reshard.store.store import File, Store

PART = 2048  # bytes: smaller than any tensor, so that parts hold ends of several and tensors lie in many


@dataclass
class Server:
    """What a store keeps, and a note of each request; `fails` is the number of the one that does not succeed;
    `appears`: a request, and the file that somebody else puts just before it.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fails: int | None = None
    appears: dict[str, str] = field(default_factory=dict)
    open: int = 0  # uploads, neither finished nor aborted
    lock: Lock = field(default_factory=Lock)

    def ask(self, what: str, name: str) -> None:
        with self.lock:
            self.asked.append(f"{what} {name}")
            if self.fails == len(self.asked):
                raise PlaceError(f"{name}: the store does not answer")
            if (other := self.appears.get(self.asked[-1])) is not None:
                self.files[other] = b"theirs"


@dataclass
class Upload:
    server: Server
    name: str
    total: int
    size: int = PART
    sent: dict[int, bytes] = field(default_factory=dict)

    def send(self, number: int, data: bytes | bytearray | memoryview) -> None:
        self.server.ask("send", self.name)
        assert number not in self.sent and len(data) == min(self.size, self.total - number * self.size) > 0
        self.sent[number] = bytes(data)

    def finish(self) -> None:
        self.server.ask("finish", self.name)
        assert sorted(self.sent) == list(range(-(-self.total // self.size)))
        self.server.files[self.name] = b"".join(data for _, data in sorted(self.sent.items()))
        self.server.open -= 1

    def abort(self) -> None:
        self.server.ask("abort", self.name)
        self.server.open -= self.name not in self.server.files


class Bucket(Objects):
    def __init__(self, given: str, server: Server) -> None:
        self.given, self.server = given, server

    def names(self) -> Iterable[str]:
        self.server.ask("list", "")
        return list(self.server.files)

    def begin(self, name: str, size: int) -> Upload:
        self.server.ask("begin", name)
        self.server.open += 1
        return Upload(self.server, name, size)

    def put(self, name: str, data: bytes, *, new: bool = False) -> bool:
        self.server.ask("put", name)
        return self.server.files.setdefault(name, data) == data if new else not self.server.files.update({name: data})

    def delete(self, name: str) -> None:
        self.server.ask("delete", name)
        self.server.files.pop(name, None)


@dataclass(frozen=True, kw_only=True)
class Reading(Store):
    server: Server

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self.server.files[name][offset : offset + length]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """What mem://out is: it is added by a row, and nothing else."""
    server = Server()

    def source(text: str, revision: str | None, keep: bool) -> Store:
        files = {name: File(len(data)) for name, data in server.files.items()}
        return Reading(where=text, files=files, server=server)

    row = Scheme(source, lambda text: Bucket(text, server))
    monkeypatch.setitem(location.SCHEMES, "mem", row)
    monkeypatch.setattr("reshard.store.objects.SMALL", 1000)
    return server


@pytest.mark.parametrize(
    "name", ["llama", "llama_bin", "gpt_oss", "mixtral", "falcon_7b", "deepseek_v3_fp8", "qwen2_plain"]
)
def test_what_is_written_to_a_store_is_what_would_be_written_here(name: str, server: Server, tmp_path: Path) -> None:
    """Shards, shards of an engine's format, and the published files: the same names and bytes, sent once each."""
    model = copy(name, tmp_path / "model")
    wishes = [{"tp": 2, "pp": 2}, {"tp": 1}, {"to": "hf"}, {"to": "hf", "max_file_size": "90kB"}]
    for number, wish in enumerate([*wishes, *([{"tp": 2, "to": "vllm"}] if name == "qwen2_plain" else [])]):
        server.files.clear()
        api.convert(model, here := tmp_path / str(number), **wish)
        result = api.convert(model, "mem://out", workers=3, **wish)
        assert server.files == tree(here) and server.open == 0
        assert result.to_json()["out"] == "mem://out" and not result.already


def test_a_checkpoint_is_converted_into_a_store_and_verified_from_it(server: Server, tmp_path: Path) -> None:
    """There and back: what was merged into a store opens there, proves the shards, and a changed bit of it does not."""
    model = copy("llama", tmp_path / "model")
    api.convert(model, tmp_path / "shards", tp=4)
    api.convert(tmp_path / "shards", "mem://out", to="hf")
    assert server.files == tree(model)
    assert open_any("mem://out").tensors == open_any(model).tensors
    assert api.verify(tmp_path / "shards", against="mem://out", only="weights").ok
    assert api.diff(model, "mem://out").equal
    name = max(server.files, key=lambda name: len(server.files[name]))
    server.files[name] = server.files[name][:-1] + bytes([server.files[name][-1] ^ 1])
    assert not api.verify(tmp_path / "shards", against="mem://out", only="weights").ok


def test_what_opens_the_rest_appears_last(server: Server, tmp_path: Path) -> None:
    """A claim comes first, manifest.json is put when everything else is there, and then the claim goes."""
    api.convert(copy("llama", tmp_path / "model"), "mem://out", tp=2)
    puts = [what for what in server.asked if what.split()[0] in ("put", "finish", "delete")]
    assert puts[0] == f"put {CLAIM}" and puts[-2:] == ["put manifest.json", f"delete {CLAIM}"]


def test_whatever_fails_nothing_is_left(server: Server, tmp_path: Path) -> None:
    """Each request in turn: either the error is told and neither a file nor an upload remains, or, once the manifest
    is there, all of it is, and but the claim may be left.
    """
    model = copy("llama", tmp_path / "model")
    api.convert(model, "mem://out", tp=2, workers=1)
    whole, count = dict(server.files), len(server.asked)
    for number in range(1, count + 1):
        server.files.clear()
        server.asked, server.fails = [], number
        if number == count:  # the claim's removal: it is tried again
            api.convert(model, "mem://out", tp=2, workers=1)
            assert server.files == whole
            continue
        with pytest.raises(PlaceError, match="does not answer"):
            api.convert(model, "mem://out", tp=2, workers=1)
        assert (server.files, server.open) == ({}, 0), server.asked[-5:]
    assert count > 30


def test_what_is_there_is_not_touched(server: Server, tmp_path: Path) -> None:
    """A finished conversion, a stranger's file and another job's claim are refused with the place's name, also where
    --overwrite is given.
    """
    model = copy("llama", tmp_path / "model")
    api.convert(model, "mem://out", tp=2)
    for there in (dict(server.files), {"notes.txt": b"mine"}, {CLAIM: b"1"}):
        server.files = dict(there)
        for overwrite in (False, True):
            with pytest.raises(ReshardError, match="mem://out: is not empty"):
                api.convert(model, "mem://out", tp=2, overwrite=overwrite)
        assert server.files == there


@pytest.mark.parametrize(
    ("asked", "name"), [(f"put {CLAIM}", CLAIM), (f"put {CLAIM}", "notes.txt"), ("put manifest.json", "manifest.json")]
)
def test_of_two_jobs_one_succeeds(asked: str, name: str, server: Server, tmp_path: Path) -> None:
    """What appears between the look and the claim, or before the manifest is put, stays; this job's files go."""
    server.appears = {asked: name}
    with pytest.raises(PlaceError, match=r"mem://out: (another job|appeared|manifest.json appeared)"):
        api.convert(copy("llama", tmp_path / "model"), "mem://out", tp=2)
    assert (server.files, server.open) == ({name: b"theirs"}, 0)


# A file that is assembled


@st.composite
def drafts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]]:
    """A size, the stretches of a file, and the writes in the order in which they come: (stretch, offset, length)."""
    size = draw(st.integers(1, 60))
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    stretches = [(low, high - low) for low, high in draw(st.lists(ends, max_size=6))]
    writes = []
    for number, (offset, length) in enumerate(stretches):
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))})
        writes += [(number, offset + a, b - a) for a, b in itertools.pairwise(cuts)]
    return size, stretches, draw(st.permutations(writes))


@given(drafts(), st.integers(1, 20))
@law(300)
def test_a_file_is_the_same_in_whatever_order_its_bytes_come(
    draft: tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]], part: int
) -> None:
    """Each part is sent once, by the time that the last stretch in it is settled, and is not held any longer."""
    size, stretches, writes = draft
    wanted = bytearray(size)
    for offset, length in stretches:
        wanted[offset : offset + length] = bytes(range(1 + offset, 1 + offset + length))
    server = Server()
    upload = Upload(server, "f", size, part)
    filling = Filling(upload, size, stretches)
    left = Counter(number for number, _, _ in writes)
    settled = [number for number in range(len(stretches)) if not left[number]]
    for number in settled:
        filling.settle(*stretches[number])
    for number, offset, length in writes:
        filling.write(offset, bytes(wanted[offset : offset + length]))
        left[number] -= 1
        if not left[number]:
            low, high = stretches[number][0], sum(stretches[number])
            assert bytes(filling.read(low, high - low)) == wanted[low:high]
            filling.settle(*stretches[number])
            settled.append(number)
            waiting = {at // part for n in range(len(stretches)) if n not in settled for at in covered(stretches[n])}
            assert not waiting & upload.sent.keys() and filling._held.keys() <= waiting
    filling.finish()
    assert server.files["f"] == wanted


def covered(stretch: tuple[int, int]) -> Iterator[int]:
    yield from range(stretch[0], sum(stretch))
