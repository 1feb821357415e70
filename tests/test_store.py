"""A store is one class and one row: every command that reads a checkpoint reads it from there, as from a directory."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fixtures import copy

import reshard as api
from reshard.api import open_any
from reshard.errors import PlaceError, ReshardError
from reshard.jobs.inspect import describe
from reshard.store import location
from reshard.store.local import Pool
from reshard.store.store import Address, Ahead, File, Store


@dataclass(frozen=True, kw_only=True)
class Memory(Store):
    """Files in memory; `asked` notes what was read."""

    data: dict[str, bytes]
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.asked.append((name, offset, length))
        return self.data[name][offset : offset + length]


@pytest.fixture(params=["llama", "llama_bin"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copy(request.param, tmp_path / "model")


def stored(root: Path) -> Memory:
    data = tree(root)
    return Memory(where="mem://model", files={name: File(len(text)) for name, text in data.items()}, data=data)


@pytest.fixture
def memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Memory]]:
    """What mem://model is: the last of the list."""
    stores = [stored(model)]
    monkeypatch.setitem(location.SCHEMES, "mem", location.Scheme(lambda text, revision, keep: stores[-1]))
    yield stores


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def untimed(root: Path) -> dict[str, bytes]:
    """A store knows no times: all else of a conversion is the same."""
    return {name: text for name, text in tree(root).items() if name not in ("manifest.json", "source/files.json")}


def test_a_checkpoint_in_a_store_reads_as_the_local_one(model: Path, memory: list[Memory]) -> None:
    """What is inspected and planned from a store is what the directory would tell."""
    found, here = open_any("mem://model"), open_any(model)
    assert found.tensors == here.tensors and found.root is None
    assert [(file.name, file.size) for file in found.carried] == [(file.name, file.size) for file in here.carried]
    assert describe("mem://model").family == "llama"


def test_opening_for_a_conversion_reads_config_and_index_once(model: Path, memory: list[Memory]) -> None:
    """Of a store without a cache, too, what was read to know what to fetch is not read again."""
    open_any("mem://model", headers_only=False)
    small = [name for name, offset, _ in memory[0].asked if name.endswith(".json") and not offset]
    assert "config.json" in small and any(name.endswith(".index.json") for name in small)
    assert len(small) == len(set(small))


def test_every_job_reads_a_store_as_a_directory(model: Path, memory: list[Memory], tmp_path: Path) -> None:
    """Shards, merged and verified from a store are those of the directory; a re-run compares contents,
    since no time is known.
    """
    api.convert("mem://model", tmp_path / "a", tp=2)
    api.convert(model, tmp_path / "b", tp=2)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    api.convert(tmp_path / "a", tmp_path / "back", to="hf")
    api.convert("mem://model", tmp_path / "copy", to="hf")
    assert tree(tmp_path / "back") == tree(tmp_path / "copy") == tree(model)
    assert api.verify(tmp_path / "a", against="mem://model", only="weights").ok
    again = api.convert("mem://model", tmp_path / "a", tp=2)
    assert again.already and again.decided_by == "content"


def test_other_weights_of_the_same_sizes_are_noticed(model: Path, memory: list[Memory], tmp_path: Path) -> None:
    """A re-run from a store whose weights were exchanged is refused, and verify says where."""
    api.convert("mem://model", tmp_path / "a", tp=2)
    name, entry = next(
        (file, entry) for at, entry in open_any(model).tensors.values() for file in [open_any(model).originals[at].name]
    )
    text = bytearray(memory[0].data[name])
    text[entry.offset] ^= 1
    memory.append(replace(memory[0], data=memory[0].data | {name: bytes(text)}))
    with pytest.raises(ReshardError, match="other weights"):
        api.convert("mem://model", tmp_path / "a", tp=2)
    assert not api.verify(tmp_path / "a", against="mem://model", only="weights").ok


def test_a_store_that_gives_less_is_named(model: Path, memory: list[Memory], tmp_path: Path) -> None:
    """A file that ends early is an error of the place, with the store, the file and both numbers, and nothing is
    published.
    """
    name = max(memory[0].data, key=lambda name: len(memory[0].data[name]))
    memory.append(replace(memory[0], data=memory[0].data | {name: memory[0].data[name][:-3]}))
    with pytest.raises(PlaceError, match=rf"mem://model/{name}: expected [0-9]+ bytes at offset [0-9]+, got [0-9]+"):
        api.convert("mem://model", tmp_path / "a", tp=2)
    assert not (tmp_path / "a").exists()


def test_reading_ahead_asks_for_no_byte_twice() -> None:
    """Whatever is asked for, the requests do not overlap, and the bytes are right."""
    text = bytes(range(256)) * 4
    store = Memory(where="mem://x", files={"x": File(len(text))}, data={"x": text})
    ahead = Ahead(store, "x", 50)
    for offset, length in ((1000, 24), (0, 8), (8, 100), (900, 200), (40, 900), (2000, 5)):
        assert ahead(length, offset) == text[offset : offset + length]
    covered = [at for _, low, length in store.asked for at in range(low, low + length)]
    assert len(covered) == len(set(covered))


def test_a_file_has_its_store_in_its_address() -> None:
    """Files of one name in two stores are two files; of one store, one, however often it is addressed."""
    one, other = (Memory(where=f"mem://{name}", files={"x": File(1)}, data={"x": name.encode()}) for name in "ab")
    assert {Address(one, "x"), Address(other, "x"), Address(one, "x")} == {Address(one, "x"), Address(other, "x")}
    assert len({Address(one, "x"), Address(other, "x")}) == 2
    pool = Pool()
    assert [pool.read(Address(store, "x"), 0, 1) for store in (one, other)] == [b"a", b"b"]
