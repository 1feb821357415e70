"""URLs are refused by name, by every command and by the Python API, and write nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from running import llama, names, refused, reshard

import reshard as api
from reshard.errors import ReshardError

URLS = [
    "s3://bucket/out",
    "gs://bucket/out",
    "az://container/out",
    "hf://org/name",
    "https://host/out",
    "file:///data/out",
    "S3://b",
]
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "destination": (("convert", "model", "URL", "--tp", "2"), ("convert", "model", "URL", "--to", "hf")),
    "directory": (
        ("verify", "URL"),
        ("generate", "URL", "--prompt", "a"),
        ("fingerprint", "--combine", "URL"),
        ("check-table", "llama", "--with", "URL"),
    ),
    "source": (
        ("convert", "URL", "out", "--tp", "2"),
        ("plan", "URL", "--tp", "2"),
        ("inspect", "URL"),
        ("inspect", "URL", "--draft-table"),
        ("verify", "model", "--against", "URL"),
        ("diff", "model", "URL"),
        ("diff", "URL", "model"),
        ("fingerprint", "URL"),
        ("fingerprint", "URL", "--rank", "0"),
        ("explain", "URL", "norm"),
    ),
    "table": (("plan", "model", "--tp", "2", "--family", "URL"),),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("words", [words for group in COMMANDS.values() for words in group], ids=" ".join)
def test_every_command_refuses_urls_by_name(words: tuple[str, ...], url: str, here: Path) -> None:
    if url.startswith("hf://") and words in COMMANDS["source"]:
        return  # what hf:// means there is a matter of the Hub
    scheme = url.partition(":")[0]
    done = refused(
        reshard(*(word.replace("URL", url) for word in words)),
        2,
        url,
        f"{scheme.lower()}:// locations",
        "local",
        "hint: ",
    )
    assert f"./{scheme}:/" in done.err
    assert names(here) == ["model"]


CALLS: list[Callable[[str | Path], object]] = [
    lambda out: api.convert("model", out, tp=2),
    lambda src: api.plan(src, tp=2),
    lambda src: api.convert(src, "out", tp=2),
    lambda out: api.verify(out),
    lambda src: api.verify("model", against=src),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_the_python_api_refuses_them_too_also_as_a_path(number: int, here: Path) -> None:
    """pathlib makes `s3:/bucket/out` of it."""
    for given in ("s3://bucket/out", Path("s3://bucket/out")):
        with pytest.raises(ReshardError, match=r"s3:// locations are not supported .*, only local paths"):
            CALLS[number](given)
    assert names(here) == ["model"]


def test_loading_refuses_them() -> None:
    load = pytest.importorskip("reshard.runtime.load")
    for call in (lambda: load.load_shard("s3://bucket/out", 0), lambda: load.load_model("gs://bucket/out")):
        with pytest.raises(ReshardError, match=r"(s3|gs):// locations are not supported"):
            call()


def test_a_folder_of_such_a_name_can_be_reached(here: Path) -> None:
    assert reshard("convert", "model", "./s3:/out", "--tp", "2").code == 0
    assert reshard("verify", "./s3:/out", "--against", "model").code == 0
    assert api.verify(Path("./s3:/out"), numerics=False).ok
    refused(reshard("verify", "s3://out"), 2, "./s3:/")
    assert names(here) == ["model", "s3:"]


def test_hints_say_what_works() -> None:
    said = {url: reshard("convert", "model", url, "--tp", "2").err for url in URLS}
    assert "mounted" in said["s3://bucket/out"] and "mounted" in said["gs://bucket/out"]
    assert "hf upload" in said["hf://org/name"] and "org/name" in said["https://host/out"]
    assert re.search(r"hint: give the path alone", said["file:///data/out"])
    assert names(Path.cwd()) == ["model"]
