"""Files from strangers: what is read whole is bounded, what is nested or expands is bounded, and what is wrong is named
with its path.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta, Struct
from running import LLAMA, llama, llama_tensors, process, refused, reshard, save_index, sign

from reshard.checkpoints import manifest
from reshard.errors import MismatchError, ReshardError
from reshard.inputs import decode, limits
from reshard.tables import families, formats

GIB = 1 << 30
DEEP = 200_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("limits") / "source")


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    out = source.parent / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    return out


def copy(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


def grown(path: Path, size: int = 50 * GIB) -> Path:
    """A file that claims to be so large, and takes no space: its end is a hole."""
    os.truncate(path, size)
    return path


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    data = change(data) or data
    path.write_text(json.dumps(data))


# A file larger than its limit


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_a_checkpoint_that_is_too_large_is_refused_with_both_sizes(name: str, tmp_path: Path) -> None:
    out = llama(tmp_path / "source")
    if name.endswith(".index.json"):
        (out / "model.safetensors").unlink()
        save_index(out, {"a.safetensors": llama_tensors()})
    grown(out / name)
    limit = limits.CONFIG if name == "config.json" else limits.INDEX
    for words in (("plan", out, "--tp", "2"), ("convert", out, tmp_path / "out", "--tp", "2"), ("inspect", out)):
        refused(reshard(*words), 2, name, f"has {50 * GIB} bytes, at most {limit} are read")


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("manifest.json", limits.MANIFEST),
        ("source/files.json", limits.FILES),
        ("source/families/llama.toml", limits.TABLE),
        ("config.json", limits.CONFIG),
    ],
)
def test_a_file_of_shards_that_is_too_large_is_refused(name: str, limit: int, shards: Path, tmp_path: Path) -> None:
    out = copy(shards, tmp_path / "out")
    grown(out / name, 3 * limit)
    data = json.loads((out / "manifest.json").read_text()) if name != "manifest.json" else {}
    for file in [*data.get("carried", ()), *data.get("source", ())]:
        if file["file"] == name:
            file["size"] = 3 * limit
            (out / "manifest.json").write_text(json.dumps(data))
    for words in (("convert", out, tmp_path / "back", "--to", "hf"), ("verify", out)):
        done = reshard(*words)
        assert done.code in (1, 2) and name.rpartition("/")[2] in done.out + done.err, (words, done)


@pytest.mark.parametrize(("place", "key"), [("carried", None), ("ranks", "tensors"), ("source", None)])
def test_a_manifest_that_lists_a_small_file_of_50_gb_is_refused(
    place: str, key: str | None, shards: Path, tmp_path: Path
) -> None:
    out = copy(shards, tmp_path / "out")
    data = json.loads((out / "manifest.json").read_text())
    entry = data[place][0] if key is None else data[place][0][key]
    entry["size"] = 50 * GIB
    grown(out / entry["file"])
    (out / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(
        MismatchError, match=rf"{re.escape(entry['file'])}: has {50 * GIB} bytes, at most [0-9]+ are read"
    ):
        manifest.load(out)


def test_an_index_of_a_petabyte_among_the_originals_is_refused(shards: Path, tmp_path: Path) -> None:
    out = copy(shards, tmp_path / "out")
    big = {"name": "a.index.json", "size": 10**15, "container": "plain", "holes": [[0, 10**15]]}
    edit(out / "source" / "files.json", lambda files: [*files, big])
    (out / "source" / "a.index.json.residue").touch()
    edit(
        out / "manifest.json",
        lambda data: data["source"].append({"file": "source/a.index.json.residue", "size": 0, "digest": "0" * 32}),
    )
    sign(out)
    refused(
        reshard("convert", out, tmp_path / "back", "--to", "hf"), 1, "a.index.json: has 1000000000000000 bytes, at most"
    )


def test_a_share_and_a_table_that_are_too_large_are_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    grown(tmp_path / "a.json")
    refused(reshard("fingerprint", "--combine", tmp_path / "a.json"), 2, "a.json", f"at most {limits.SHARE} are read")
    refused(
        reshard("plan", source, "--tp", "2", "--family", tmp_path / "a.json"), 2, f"at most {limits.TABLE} are read"
    )


# Nesting


@pytest.mark.parametrize(
    "text",
    ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300],
)
def test_deep_json_is_refused_wherever_json_is_read(text: str, shards: Path, tmp_path: Path) -> None:
    """Also where it stands below a key that nobody asks for."""
    for whole in (text, f'{{"x": {text}}}'):
        with pytest.raises(
            ReshardError,
            match=r"^f: (not JSON|(unsupported JSON: )?nested more than 100 levels)",
        ):
            decode.json_of(whole.encode(), limits.CONFIG, "f")
    directory = llama(tmp_path / "source")
    (directory / "config.json").write_text(json.dumps(LLAMA)[:-1] + f', "x": {text}}}')
    refused(reshard("plan", directory, "--tp", "2"), 2, "config.json")
    for name in ("manifest.json", "source/files.json", "config.json", "rank-00000/tensors.json"):
        out = copy(shards, tmp_path / name.replace("/", "-"))
        (out / name).write_text(f'{{"reshard": "1.0", "x": {text}}}')
        if name != "manifest.json":
            sign_small(out)
        for words in (("verify", out), ("convert", out, tmp_path / "back", "--tp", "1")):
            done = reshard(*words)
            assert done.code in (0, 1, 2) and (done.code or name == "rank-00000/tensors.json"), (words, done)


def sign_small(out: Path) -> None:
    """Sizes and digests of the small files made right, whatever is in them."""
    from running import digest, root_signed

    data = json.loads((out / "manifest.json").read_text())
    for file in [*(rank["tensors"] for rank in data["ranks"]), *data["carried"], *data["source"]]:
        content = (out / file["file"]).read_bytes()
        file |= {"size": len(content), "digest": digest(content)}
    (out / "manifest.json").write_text(root_signed(data))


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "[" * 200 + "]" * 200,
        "a = " + "{b = " * 5000 + "1" + "}" * 5000,
        "[" + "a." * 5000 + "a]",
        "a." * 5000 + "a = 1",
        '"a" . ' * 5000 + "a = 1",
        "z = " + "9" * 5000,
        "\0" * 1000,
    ],
)
def test_deep_or_odd_toml_is_refused_at_once(text: str, tmp_path: Path, source: Path) -> None:
    with pytest.raises(ReshardError, match=r"^t\.toml: "):
        families.parse(text, "t.toml")
    (tmp_path / "t.toml").write_text(text)
    refused(reshard("plan", source, "--tp", "2", "--family", tmp_path / "t.toml"), 2, "t.toml")


# What expands


def table(**keys: str) -> str:
    rows = keys.pop("rows", 'rows = [["a.weight", "a0", "x"]]')
    return f'name = "t"\n{rows}\n' + "".join(f"[{key}]\n{text}\n" for key, text in keys.items())


def test_compound_axes_that_double_forty_times_are_refused_with_their_number() -> None:
    axes = "\n".join(f'a{at} = "a{at + 1} a{at + 1}"' for at in range(40))
    with pytest.raises(
        ReshardError, match=f"compound axis a0 stands for {2**40} axes, at most {limits.ATOMS} are allowed"
    ):
        families.parse(table(axes=axes), "t.toml")
    chain = "\n".join(f'a{at} = "a{at + 1}"' for at in range(5000))
    with pytest.raises(ReshardError, match="5000 compound axes"):
        families.parse(table(axes=chain), "t.toml")
    assert families.parse(table(axes='a0 = "b c"'), "t.toml").axes == {"a0": ("b", "c")}


def test_compound_axes_that_double_in_the_tables_of_shards(shards: Path, tmp_path: Path) -> None:
    """Signed anew, as anybody can who can write the directory."""
    out = copy(shards, tmp_path / "out")
    path = out / "source" / "families" / "llama.toml"
    text = path.read_text()
    more = "\n".join(f'a{at} = "a{at + 1} a{at + 1}"' for at in range(40))
    path.write_text(text.replace("[axes]\n", f"[axes]\n{more}\n") if "[axes]" in text else f"{text}\n[axes]\n{more}\n")
    sign(out)
    for words in (("convert", out, tmp_path / "back", "--to", "hf"), ("inspect", out)):
        refused(reshard(*words), 2, f"{2**40} axes")
    done = reshard("verify", out)
    assert done.code == 1 and str(2**40) in done.out + done.err


def test_a_table_of_too_many_rows_is_refused() -> None:
    rows = ",".join(f'["a{at}", "x", "l{at}"]' for at in range(limits.ROWS + 1))
    with pytest.raises(ReshardError, match=f"{limits.ROWS + 1} rows, at most {limits.ROWS} are read"):
        families.parse(f'name = "t"\nrows = [{rows}]', "t.toml")


@pytest.mark.parametrize(
    "text", ["{rank:>999999999}", "{rank:099999999}", "{rank!r}", "{rank.__class__}", "{rank:{tp}}", "{{rank}}"]
)
def test_a_file_name_that_expands_is_refused_in_tables_of_shards_too(text: str) -> None:
    for leaves in (None, frozenset({"x"})):
        with pytest.raises(ReshardError, match="does not name a file for every rank"):
            formats.parse(table(files=f'shard = "{text}"'), "t.toml", leaves=leaves)


# Headers


def test_headers_and_tensors_of_a_checkpoint_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file behind three names counts three times, and is refused before a third is read."""
    directory = llama(tmp_path / "source")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    names = [f"{letter}.safetensors" for letter in "abc"]
    for name in names[1:]:
        os.link(directory / "a.safetensors", directory / name)
    weight_map = {f"{name}{at}": names[at % 3] for at, name in enumerate(llama_tensors())}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    count = len(llama_tensors())
    monkeypatch.setattr(limits, "TENSORS", 2 * count - 1)
    refused(
        reshard("plan", directory, "--tp", "2"),
        2,
        "b.safetensors",
        f"{2 * count} tensors",
        f"at most {2 * count - 1}",
        "several names",
    )
    monkeypatch.setattr(limits, "TENSORS", 10 * count)
    monkeypatch.setattr(limits, "NAMES", 1000)
    refused(reshard("plan", directory, "--tp", "2"), 2, "a.safetensors", "characters", "at most 1000")


def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = llama(tmp_path / "source", {"a": ("U8", (1,), b"x")})
    (directory / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b'"data_offsets"' + b" " * 6)
    refused(reshard("plan", directory, "--tp", "2"), 2, "not a safetensors header")
    monkeypatch.setattr(limits, "TENSORS", 0)
    refused(reshard("plan", directory, "--tp", "2"), 2, "its header names 1 tensors, at most 0 are read")


@pytest.mark.parametrize("limit", ["HEADER_KEYS", "VALUES"])
def test_a_header_of_too_much_is_refused(limit: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds, not its bytes, decides how much memory it takes: two-letter texts take twenty times their size."""
    monkeypatch.setattr(limits, limit, 100)
    refused(reshard("plan", source, "--tp", "2"), 2, "model.safetensors: has", "at most 100 are read")


def test_json_of_too_many_keys_or_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "VALUES", 10)
    assert decode.json_of("[1, 2, 3]", 100, "f") == [1, 2, 3]
    for text, words in (
        ("[[],[],[],[],[],[]]", "f: has 12 commas and opening brackets, at most 10"),
        (b'{"a":1,"b":2}', "2 colons, at most 1"),
    ):
        with pytest.raises(MismatchError, match=words):
            decode.json_of(text, 100, "f", kind=MismatchError, keys=1)


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    directory = llama(tmp_path / "source", llama_tensors() | {"odd": ("U8", (1,) * 100_000, b"\0")})
    for words in (("plan", directory, "--tp", "2"), ("inspect", directory)):
        done = reshard(*words)
        assert done.code == 2 and f"odd has 100000 dimensions, at most {limits.DIMENSIONS} are read" in done.err, done


# A type, and the path of what is not of it


class Inner(Struct):
    d: Annotated[str, Meta(pattern="^[0-9a-f]{2}$", max_length=2)]


class Outer(Struct, kw_only=True):
    a: Annotated[int, Meta(ge=0, le=2)]
    b: tuple[str, ...] = ()
    c: dict[str, Inner | None]


GOOD = {"a": 2, "c": {"k": None, "l": {"d": "0f", "further": 1}}, "unknown": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": 3}, r"\$\.a is 3, expected int <= 2"),
        ({"a": 10**30}, r"\$\.a is 1000.*0000, expected int <= 2"),
        ({"a": True}, r"\$\.a is True"),
        ({"a": 1.0}, r"\$\.a is 1\.0"),
        ({"a": float("nan")}, r"\$\.a is nan, expected int, got float"),
        ({"later": float("nan")}, "numbers like NaN"),
        ({"b": ["x", 5]}, r"\$\.b\[1\] is 5, expected str, got int"),
        ({"b": {}}, r"\$\.b is {}, expected array, got object"),
        ({"b": ["\ud800"]}, "not valid Unicode"),
        ({"c": {"ok": {"d": "0f"}, "l": {"d": "0F"}}}, r"\$\.c\.l\.d is '0F', expected str matching"),
        ({"c": {"l": {"d": "0f\n"}}}, r"\$\.c\.l\.d is '0f\\n', expected str"),
        ({"c": {"ok": None, "l": {}}}, r"\$\.c\.l\.d is missing"),
        ({"c": {"ok": None, "l": 5}, "b": 5}, r"\$\.c\.l is 5"),  # and not $.c.ok
        ({"c": {"ok": None, "l": 5}}, r"\$\.c\.l is 5, expected object \| null, got int"),
        ({"c": {"\ud800": None}}, "not valid Unicode"),
    ],
)
def test_what_is_not_of_a_type_is_reported_with_its_path_and_value(change: dict[str, Any], words: str) -> None:
    assert decode.typed(GOOD, Outer, "file").a == 2
    before = copy_of(data := GOOD | change)
    with pytest.raises(MismatchError, match=f"^file: .*{words}"):
        decode.json_of(json.dumps(data).encode(), 1000, "file", Outer, MismatchError)
    if words.startswith("not") or "NaN" in words:
        return
    with pytest.raises(MismatchError, match=f"^file: .*{words}"):
        decode.typed(data, Outer, "file", MismatchError)
    assert repr(data) == repr(before)
    with pytest.raises(ReshardError, match=r"^file: \$\.a is missing$"):
        decode.typed({key: value for key, value in GOOD.items() if key != "a"}, Outer, "file")


def test_a_key_that_a_type_forbids_is_named() -> None:
    class Closed(Struct, forbid_unknown_fields=True):
        a: int = 0

    class Around(Struct):
        c: tuple[Closed, ...]

    with pytest.raises(ReshardError, match=r"^file: unknown key b in \$\.c\[1\]$"):
        decode.typed({"c": [{}, {"b": 1}]}, Around, "file")
    with pytest.raises(ReshardError, match=r"^file: unknown key b$"):
        decode.typed({"b": 1}, Closed, "file", path="")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["tensors"][0].update(offset=-5),
        lambda t: t["tensors"][0].update(offset="a"),
        lambda t: t["tensors"][0].update(offset=10**18),
        lambda t: t["tensors"][0].update(nbytes=10**18),
        lambda t: t["tensors"][0].update(nbytes=None),
        lambda t: t["tensors"][0].update(digest=5),
        lambda t: t["tensors"][0].update(digest="x"),
        lambda t: t["tensors"][0].update(blocks=["zz"]),
        lambda t: t["tensors"][0].update(name=None),
        lambda t: t["tensors"][0].pop("offset"),
        lambda t: t.update(tensors=None),
        lambda t: t.update(tensors=[5]),
        lambda t: t.pop("tensors"),
    ],
)
def test_a_tensors_json_of_another_form_is_a_failure_with_a_path(
    change: Callable[[Any], Any], shards: Path, tmp_path: Path
) -> None:
    """verify, and load_shard with hash: no error of Python's, and exit 1."""
    out = copy(shards, tmp_path / "out")
    path = out / "rank-00000" / "tensors.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    sign_small(out)
    done = reshard("verify", out)
    assert done.code == 1 and "rank-00000/tensors.json" in done.out + done.err, done
    assert "Traceback" not in done.err


def test_null_and_a_list_for_a_tensors_json(shards: Path, tmp_path: Path) -> None:
    for number, text in enumerate(("null", "[1]", "5", '"x"')):
        out = copy(shards, tmp_path / str(number))
        (out / "rank-00000" / "tensors.json").write_text(text)
        sign_small(out)
        assert reshard("verify", out).code == 1


# Memory


def test_the_memory_of_a_refusal_is_small(tmp_path: Path) -> None:
    """Under an address space of 3 GB: a config.json of 20 GB, and one header of 80 MB behind three names."""
    directory = llama(tmp_path / "source")
    grown(directory / "config.json", 20 * GIB)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); from reshard "
        "import cli; cli.main(sys.argv[1:])"
    )
    refused(process("plan", directory, "--tp", "2", code=code), 2, "config.json", f"{20 * GIB}")


def test_a_tensor_of_too_long_a_name_is_refused_without_all_of_it(tmp_path: Path) -> None:
    out = llama(tmp_path / "source", {**llama_tensors(), "a" * (limits.NAME + 1): ("U8", (1,), b"x")})
    done = reshard("inspect", out)
    refused(done, 2, f"has a name of {limits.NAME + 1} characters, at most {limits.NAME} are read")
    assert len(done.err) < 1000


@pytest.mark.parametrize("key", ["sizes", "repeats", "tied", "padding"])
def test_a_manifest_that_says_more_of_the_model_than_there_is_fails(key: str, shards: Path, tmp_path: Path) -> None:
    """Signed again. A key that this version does not know is ignored, as a later one might write it."""
    out = copy(shards, tmp_path / "out")
    edit(out / "manifest.json", lambda data: data.update(later={"a": 1}))
    sign(out)
    assert reshard("verify", out).code == 0
    value = {"sizes": 7, "repeats": 2, "tied": "embed", "padding": [100, 128]}[key]
    edit(out / "manifest.json", lambda data: data[key].update(imagined=value))
    sign(out)
    done = reshard("verify", out)
    assert done.code == 1 and "manifest.json: contradicts the tables" in done.out, done


@pytest.mark.parametrize(
    "mesh", [{"tp": 2.0}, {"tp": True}, {"split": [float("inf"), 1]}, {"split": [float("nan"), 1]}, {"pp": [2]}]
)
def test_a_mesh_of_other_numbers_in_a_signed_manifest_is_a_mismatch(
    mesh: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    out = copy(shards, tmp_path / "out")
    edit(out / "manifest.json", lambda data: data["mesh"].update(mesh))
    sign(out)
    for words in (("verify", out), ("inspect", out), ("convert", out, tmp_path / "back", "--to", "hf")):
        done = reshard(*words)
        assert done.code == 1 and re.search(r"\$\.mesh\.|numbers like NaN", done.out + done.err), (words, done)
