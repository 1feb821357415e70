"""What the documentation says is so: the format contract, the notation, the vocabulary, and every command,
example and list shown.
"""

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import fixtures
import jsonschema
import numpy as np
import pytest
import safetensors
import torch
import transformers
import xxhash
from running import reshard as command
from safetensors.torch import load_file

import reshard
from reshard import cli
from reshard.containers.dtypes import BITS
from reshard.tables import families, formats
from reshard.tables import keys as keys_of
from reshard.tables.facts import FACTS, ROUTING
from reshard.tables.notation import parse_pattern
from reshard.tables.row import STAGES, Row

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
BLOCK = 8 << 20


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, reader = _module(ROOT / "docs/generate.py"), _module(ROOT / "docs/reader.py")
rooms = generate.rooms


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _fences(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", _text(document), re.M | re.S)


def _first_column(document: str, heading: str) -> Iterator[str]:
    """Every name in back quotes in the first column of the tables below a heading."""
    _, _, rest = _text(document).partition(f"\n## {heading}\n")
    assert rest, f"{document} has no section {heading}"
    for row in re.findall(r"^\| (.*?) \|", re.split(r"^## ", rest, maxsplit=1, flags=re.M)[0], re.M):
        yield from re.findall(r"`([^`]+)`", row)


# --- generated parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "name"), [(document, name) for document, parts in generate.PARTS.items() for name in parts]
)
def test_generated_parts_are_current(document: str, name: str) -> None:
    """Families, file tree, console session and reader in the documents are what docs/generate.py makes of the
    code today.
    """
    text = _text(document)
    low, high = generate.part(text, name)
    assert generate.comparable(text[low:high]) == generate.comparable(generate.PARTS[document][name]()), (
        "run docs/generate.py"
    )


SESSION = """```console
$ reshard convert model /tmp/demo/tp4 --tp 4
/tmp/demo/tp4: 3.28 MB written in 0.1 s (35.91 MB/s)
root digest: 06e70a15c8987d9153ffc3d1b86096a0

$ reshard verify /tmp/demo/tp4 --against model
weights    ok         180 tensors, 10 files, 3.26 MB, 0.1 s
numerics   ok         transformers 5.23.0; logits off by 0.83 × its own error;
                      128 tokens agreed, 6.1 s
           float32: max 1.5e-05 (at most 7.1e-05), rms 1.7e-06, KL 4.7e-13
           bfloat16: max 0.16, rms 0.03 (at most 0.046), KL 0.00015
           covered: 259 of 259 rows of the vocabulary
proven: all

$ reshard plan model --tp 4
  memory while converting at most 64.1 MiB (2 workers)
```"""


@pytest.mark.parametrize(
    "changes",
    [
        {"7.1e-05": "5.2e-05", "1.5e-05": "9e-06", "4.7e-13": "-2e-16"},
        {"max 0.16": "max 1", "0.03 (": "0.031 (", "0.83": "1", "128 tokens": "97 tokens"},
        {"0.1 s (35.91 MB/s)": "12.5 s (1.2 kB/s)", "6.1 s": "106.3 s", "3.26 MB, 0.1 s": "3.26 MB, 1.0 s"},
        {"5.23.0": "5.24.0.dev0"},
        {"64.1 MiB (2 workers)": "56.1 MiB (1 worker)"},
        {"0.83 × its own error;\n" + " " * 22: "0.830001 × its own\n" + " " * 22 + "error; "},
    ],
    ids=["float32", "bfloat16", "times", "version", "workers", "line breaks"],
)
def test_what_depends_on_the_cpu_does_not_count(changes: dict[str, str]) -> None:
    other = SESSION
    for old, new in changes.items():
        assert old in other
        other = other.replace(old, new)
    assert generate.comparable(other) == generate.comparable(SESSION)


@pytest.mark.parametrize(
    "old", ["06e70a15", "180 tensors", "3.28 MB written", "259 of 259", " ok ", "its own error", "float32", "proven"]
)
def test_what_is_the_same_on_every_cpu_counts(old: str) -> None:
    assert generate.comparable(SESSION.replace(old, "7", 1)) != generate.comparable(SESSION)


def test_rooms_import_one_way() -> None:
    """No import runs upwards or in a circle: those inside functions, for type checkers,
    and by `import_module` included.
    """
    assert rooms.faults() == []


@pytest.mark.parametrize(
    ("where", "line", "fault"),
    [
        ("reshard/tables/config.py", "from ..layout import mesh\n", "layout is above tables"),
        ("reshard/errors.py", "def late():\n    from .jobs import plan\n", "jobs is above errors"),
        (
            "reshard/store/digest.py",
            "from importlib import import_module\nimport_module('reshard.jobs.plan')\n",
            "jobs is above store",
        ),
        ("reshard/layout/mesh.py", "import reshard.runtime.load\n", "only reshard.cli.generate"),
        ("reshard/text/units.py", "from . import progress\n", "in a circle"),
    ],
)
def test_an_import_that_runs_upwards_is_noticed(
    where: str, line: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("reshard", "runtime"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.toml", "__pycache__", "runtime")
        )
    with (tmp_path / where).open("a") as file:
        file.write(line)
    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    assert any(fault in found for found in rooms.faults()), rooms.faults()


@pytest.mark.parametrize("document", generate.WHOLE)
def test_generated_files_are_current(document: str) -> None:
    """The picture of the rooms is of the imports, the JSON Schemas are of the types that read and write files."""
    assert _text(document) == generate.WHOLE[document](), "run docs/generate.py"


def test_every_module_says_what_it_is() -> None:
    """Every module and every room has a docstring that begins with a whole sentence."""
    for path in rooms.modules().values():
        assert re.search(r"\w.*\.$", generate.sentence(path)), path


def test_the_top_of_the_package_is_a_handful_of_modules() -> None:
    assert len([path for path in (ROOT / "reshard").glob("*.py") if not path.stem.startswith("__")]) <= 5


# --- commands and examples --------------------------------------------------------------------------------------------


def _commands() -> Iterator[tuple[str, str, list[str]]]:
    for document in DOCUMENTS:
        text = _text(document)
        spans = [
            *re.findall(r"`(reshard [^`\n]+)`", text),
            *re.findall(r"^(?:\$ )?(?:.*?bin/)?(reshard [^\n]+)$", text, re.M),
        ]
        for span in spans:
            words = span.split("#")[0].split()
            yield document, words[1], [word.split("=")[0] for word in words[2:] if word.startswith("--")]


def test_commands_shown_exist() -> None:
    """Every command in the documents exists and has the options that it is shown with."""
    found = list(_commands())
    assert len(found) > 10
    for document, name, options in found:
        if name.startswith("-"):
            continue
        command = cli.cli.commands.get(name)
        assert command is not None, f"{document}: reshard {name}"
        known = {
            option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts
        }
        known |= {"--help"}
        assert set(options) <= known, f"{document}: reshard {name} has no {set(options) - known}"


def test_every_command_is_shown() -> None:
    """Every command is in the documentation, and what a newcomer runs is in the README."""
    assert set(cli.cli.commands) <= {name for _, name, _ in _commands()}
    assert {"plan", "convert", "verify", "generate", "inspect"} <= {
        name for document, name, _ in _commands() if document == "README.md"
    }
    for script in ("scripts/test", "scripts/demo", "scripts/docs"):
        assert script in _text("README.md")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """As scripts/docs builds it: links within it lead somewhere, and docstrings are well formed."""
    pytest.importorskip("sphinx")
    build = (sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html")
    done = subprocess.run([*build, "-d", tmp_path / "trees", "docs", tmp_path / "html"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "html" / "index.html").stat().st_size > 0


def test_the_readme_is_short() -> None:
    assert len(_text("README.md").encode()) < 9000


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python examples of the documentation do what they say."""
    (running,), (converting,) = _fences("docs/serve.md", "python"), _fences("docs/operate.md", "python")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/model").symlink_to(ROOT / "demo/model")
    monkeypatch.chdir(tmp_path)
    exec(compile(converting, "docs/operate.md", "exec"), {})
    assert (tmp_path / "out/manifest.json").exists()
    torch = pytest.importorskip("torch")
    names = {"input_ids": torch.tensor([[1, 2, 3]]), "positions": None, "cache": None}
    exec(compile(running, "docs/serve.md", "exec"), names)
    assert names["logits"].shape == (1, 3, 259)
    assert names["tensors"]["embed"].shape == (65, 144)


def test_links_lead_somewhere() -> None:
    """Every relative link and every path in back quotes that looks like one of ours exists."""
    for document in (*DOCUMENTS, "SECURITY.md", "CHANGELOG.md"):
        text = _text(document)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), f"{document}: {link}"
        for path in re.findall(r"`((?:docs|scripts|tests|reshard|runtime|demo)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{document}: {path}"


def test_changelog_has_this_version() -> None:
    """The changelog has an entry for the version in the code."""
    assert f"## {reshard.__version__}" in _text("CHANGELOG.md")


# --- docs/format.md ---------------------------------------------------------------------------------------------------

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tp4": ("llama", {"tp": 4}),
    "qwen3_tied tp8 pp2": ("qwen3_tied", {"tp": 8, "pp": 2}),
    "deepseek_v3_fp8 tp4 ep2": ("deepseek_v3_fp8", {"tp": 4, "ep": 2}),
    "llama vllm tp4": ("llama", {"tp": 4, "to": "vllm"}),
    "large tp1": ("large", {"tp": 1}),
}


def _large(directory: Path) -> Path:
    """A llama of one layer whose embedding takes more than one block of digests."""
    config = transformers.LlamaConfig(
        vocab_size=70_000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=JOBS)
def shards(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A shard directory as `reshard convert` writes it."""
    name, options = JOBS[request.param]
    folder = tmp_path_factory.mktemp("docs")
    source = _large(folder / "large") if name == "large" else checkpoint(name)
    reshard.convert(source, folder / "out", **options)
    return folder / "out"


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _ranks(shards: Path) -> Iterator[tuple[int, Path, Any]]:
    """(rank, weights, tensors.json) of each rank."""
    for rank, listed in enumerate(_json(shards / "manifest.json")["ranks"]):
        yield rank, shards / listed["weights"]["file"], _json(shards / listed["tensors"]["file"])


def _closed(schema: Any) -> Any:
    """A schema that allows no key it does not name."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return (
        {"additionalProperties": False, **closed}
        if "properties" in schema and schema.get("type") == "object"
        else closed
    )


def test_output_fits_the_schemas(shards: Path) -> None:
    """manifest.json and tensors.json are valid under the published schemas,
    and have no key that these do not describe.
    """
    manifest, tensors = (_json(ROOT / f"docs/{name}.schema.json") for name in ("manifest", "tensors"))
    for schema in (manifest, tensors):
        jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(_closed(manifest)).validate(_json(shards / "manifest.json"))
    for _, _, index in _ranks(shards):
        jsonschema.Draft202012Validator(_closed(tensors)).validate(index)


RESULTS = {
    "convert": ("convert SRC NEW --tp 2", "convert SRC OUT --tp 2", "convert SRC BACK --to hf"),
    "verify": ("verify OUT --against SRC --no-numerics", "verify OUT --only weights --against OTHER"),
    "inspect": ("inspect SRC", "inspect OUT", "inspect UNKNOWN"),
    "explain": ("explain OUT 0:layers.1.attn.qkv[0,0]", "explain OUT attn.q", "explain SRC lm_head.weight[1]"),
    "diff": ("diff SRC OUT", "diff OUT OTHER"),
    "fingerprint": ("fingerprint OUT",),
    "fingerprint-share": ("fingerprint OUT --rank 1",),
    "check-table": ("check-table llama --sample 3",),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_fit_their_schemas(name: str, tmp_path: Path) -> None:
    """What a command prints with --json is valid under its schema, has no key that this does not describe, and is
    not without any that it requires.
    """
    places = {word: tmp_path / word.lower() for word in ("NEW", "OUT", "BACK", "OTHER", "UNKNOWN")}
    places["SRC"] = fixtures.checkpoint("llama")
    reshard.convert(places["SRC"], places["OUT"], tp=2)
    fixtures.copy("llama", places["OTHER"])
    weights = next(places["OTHER"].glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x12\x34\x56\x3c"
    weights.write_bytes(data)
    config = _json(fixtures.copy("llama", places["UNKNOWN"]) / "config.json") | {
        "model_type": "odd",
        "architectures": [],
    }
    (places["UNKNOWN"] / "config.json").write_text(json.dumps(config))
    schema = _closed(_json(ROOT / f"docs/json/{name}.schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for line in RESULTS[name]:
        done = command(*(places.get(word, word) for word in line.split()), "--json")
        assert done.code in (0, 1), done
        validator.validate(done.json)
        for key in schema["required"]:
            assert not validator.is_valid({other: value for other, value in done.json.items() if other != key}), key


def test_schemas_refuse_what_is_wrong(shards: Path) -> None:
    """The schemas are not empty talk: another major version, a missing key and a negative size are invalid."""
    validator = jsonschema.Draft202012Validator(_json(ROOT / "docs/manifest.schema.json"))
    good = _json(shards / "manifest.json")
    for wrong in ({"reshard": "2.0"}, {"ranks": []}, {"root": "x"}, {"sizes": {"hidden": -1}}):
        assert not validator.is_valid(good | wrong)
    assert not validator.is_valid({key: value for key, value in good.items() if key != "plan"})


def test_format_page_names_every_key() -> None:
    """The page describes each top-level key of the manifest, and each key that the schemas know is one that it or they
    describe.
    """
    keys = set(_json(ROOT / "docs/manifest.schema.json")["properties"])
    assert keys == set(_first_column("docs/format.md", "manifest.json"))


def test_reader_equals_safetensors(shards: Path) -> None:
    """docs/reader.py returns the names, dtypes, shapes and bytes that the safetensors library reads, for every rank."""
    for rank, path, _ in _ranks(shards):
        tensors, segments = reader.open_rank(shards, rank)
        library = dict(safetensors.deserialize(path.read_bytes()))
        assert library.keys() == tensors.keys() == segments.keys()
        for name, (dtype, shape, data) in tensors.items():
            wanted = library[name]
            assert (dtype, list(shape), bytes(data)) == (
                wanted["dtype"],
                list(wanted["shape"]),
                bytes(wanted["data"]),
            ), name


def test_reader_is_short_and_alone() -> None:
    """The reader imports nothing but the standard library, and fits on a screen."""
    text = _text("docs/reader.py")
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) <= {"json", "mmap", "struct", "sys", "pathlib"}
    assert len(text.splitlines()) <= 55


def test_reader_prints_what_a_rank_holds(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """`python docs/reader.py OUT 3` names the tensors of rank 3 and their parts of the model."""
    reshard.convert(checkpoint("llama"), tmp_path / "out", tp=4)
    done = subprocess.run(
        [sys.executable, ROOT / "docs/reader.py", tmp_path / "out", "3"], capture_output=True, text=True, check=True
    )
    assert "layers.0.attn.qkv  BF16 [40, 56]" in done.stdout
    assert "attn.k, kv 3:4 of 4" in done.stdout


def test_reader_refuses(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """It refuses another major version, a truncated file, another rank's file and tensors outside the data,
    and ignores unknown keys.
    """
    out = tmp_path / "out"
    reshard.convert(checkpoint("llama"), out, tp=2)
    text, path = (out / "manifest.json").read_text(), out / "rank-00000/model.safetensors"
    (out / "manifest.json").write_text(text.replace('"reshard": "1.1"', '"reshard": "1.9", "news": [1]'))
    reader.open_rank(out, 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"no rank {rank}, only ranks 0 to 1"):
            reader.open_rank(out, rank)
    (out / "manifest.json").write_text(text.replace('"reshard": "1.1"', '"reshard": "2.0"'))
    with pytest.raises(ValueError, match=r"2\.0"):
        reader.open_rank(out, 0)
    (out / "manifest.json").write_text(text)
    data, index = path.read_bytes(), out / "rank-00000/tensors.json"
    listed = index.read_text()
    for wrong in (0, len(data)):
        index.write_text(re.sub('"offset": [0-9]+, "nbytes"', f'"offset": {wrong}, "nbytes"', listed, count=1))
        with pytest.raises(ValueError, match=f"byte {wrong}, which is not in the data"):
            reader.open_rank(out, 0)
    index.write_text(listed)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{len(data) - 1} bytes"):
        reader.open_rank(out, 0)
    path.write_bytes((out / "rank-00001/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another rank"):
        reader.open_rank(out, 0)


def signed(manifest: str) -> str:
    """A manifest with the root digest that it must have."""
    data = json.loads(manifest)
    unsigned = manifest.replace(f'"root": "{data["root"]}"', '"root": ""')
    pairs = [file for rank in data["ranks"] for file in (rank["weights"], rank["tensors"])]
    lines = [
        f"{file['file']} {file['size']} {file['digest']}\n" for file in [*pairs, *data["carried"], *data["source"]]
    ]
    lines.append(f"manifest.json {len(unsigned.encode())} {xxhash.xxh3_128_hexdigest(unsigned.encode())}\n")
    root = xxhash.xxh3_128_hexdigest("".join(sorted(lines, key=lambda line: line.split(" ")[0])).encode())
    return unsigned.replace('"root": ""', f'"root": "{root}"')


def test_reshard_follows_the_version_policy(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """reshard itself ignores unknown keys of the manifest and refuses an unknown major version."""
    out = tmp_path / "out"
    reshard.convert(checkpoint("llama"), out, tp=2)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"notation": 1,', '"notation": 1, "news": {"a": 1},'))
    assert reshard.plan(out, tp=4)
    assert not reshard.verify(out).ok  # whoever writes the key makes it part of the root digest
    (out / "manifest.json").write_text(signed((out / "manifest.json").read_text()))
    assert reshard.verify(out).ok
    (out / "manifest.json").write_text(text.replace('"reshard": "1.1"', '"reshard": "2.0"'))
    with pytest.raises(reshard.ReshardError, match=r"version 2\.0"):
        reshard.verify(out)


def test_alignment(shards: Path) -> None:
    """Data starts at a multiple of 4096; tensors of whole 64-byte lines come first, each on a line;
    the rest falls in element size.
    """
    for _, path, index in _ranks(shards):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        assert (8 + length) % 4096 == 0
        sizes = [(tensor["nbytes"] % 64 != 0, tensor["nbytes"]) for tensor in index["tensors"]]
        assert [late for late, _ in sizes] == sorted(late for late, _ in sizes)
        assert all(tensor["offset"] % 64 == 0 for tensor in index["tensors"] if tensor["nbytes"] % 64 == 0)
        rest = [(tensor["offset"], BITS[tensor["dtype"]]) for tensor in index["tensors"] if tensor["nbytes"] % 64]
        assert [bits for _, bits in rest] == sorted((bits for _, bits in rest), reverse=True)
        assert all(offset * 8 % bits == 0 for offset, bits in rest)
        at = 8 + length
        for tensor in index["tensors"]:
            assert tensor["offset"] == at
            at += tensor["nbytes"]
        assert at == path.stat().st_size


def test_metadata_of_a_shard(shards: Path) -> None:
    """`__metadata__` has exactly the keys of the page, and they agree with the manifest."""
    manifest = _json(shards / "manifest.json")
    for rank, path, _ in _ranks(shards):
        data = path.read_bytes()
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert set(about) == set(_first_column("docs/format.md", "model.safetensors"))
        mesh = manifest["mesh"]
        assert about == {
            "format": "pt",
            "reshard.version": manifest["reshard"],
            "reshard.layout": manifest["format"],
            "reshard.rank": str(rank),
            "reshard.world": str(mesh["tp"] * mesh["pp"]),
            "reshard.mesh": f"tp={mesh['tp']} pp={mesh['pp']} ep={mesh['ep']}",
            "reshard.plan": manifest["plan"],
        }


def test_digests(shards: Path) -> None:
    """Every digest of the directory is what the page says it is over, computed here a second time."""
    manifest = _json(shards / "manifest.json")
    several = 0
    for (_, path, index), listed in zip(_ranks(shards), manifest["ranks"], strict=True):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        digests = []
        for tensor in index["tensors"]:
            body = data[tensor["offset"] : tensor["offset"] + tensor["nbytes"]]
            assert index["block"] == BLOCK
            blocks = [xxhash.xxh3_128_digest(body[at : at + BLOCK]) for at in range(0, len(body), BLOCK)]
            digests.append(xxhash.xxh3_128_digest(b"".join(blocks)))
            assert tensor["digest"] == digests[-1].hex()
            assert tensor.get("blocks", []) == ([block.hex() for block in blocks] if len(blocks) > 1 else [])
            several += len(blocks) > 1
        assert listed["weights"]["digest"] == xxhash.xxh3_128_hexdigest(
            xxhash.xxh3_128_digest(data[:start]) + b"".join(digests)
        )
        assert listed["weights"]["size"] == len(data)
    assert several or manifest["sizes"]["vocab"] < 70_000  # the large one has a tensor of two blocks
    weights, tensors = ([rank[key] for rank in manifest["ranks"]] for key in ("weights", "tensors"))
    small = [*tensors, *manifest["carried"], *manifest["source"]]
    for file in small:
        content = (shards / file["file"]).read_bytes()
        assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (file["size"], file["digest"]), file["file"]
    unsigned = (shards / "manifest.json").read_bytes().replace(f'"root": "{manifest["root"]}"'.encode(), b'"root": ""')
    itself = {"file": "manifest.json", "size": len(unsigned), "digest": xxhash.xxh3_128_hexdigest(unsigned)}
    every = sorted([*weights, *small, itself], key=lambda file: file["file"])
    lines = "".join(f"{file['file']} {file['size']} {file['digest']}\n" for file in every)
    assert manifest["root"] == xxhash.xxh3_128_hexdigest(lines.encode())
    there = {str(path.relative_to(shards)) for path in shards.rglob("*") if path.is_file()}
    assert there == {file["file"] for file in [*weights, *small]} | {"manifest.json"}


def test_segments_say_where_everything_is(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """By segments alone the published q, k and head come together again from all ranks; repeated heads agree,
    the rest is zero.
    """
    source, out = checkpoint("llama"), tmp_path / "out"
    reshard.convert(source, out, tp=8)
    assert _json(out / "manifest.json")["repeats"] == {"kv": 2}
    published: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        published |= load_file(path)
    found: dict[str, np.ndarray] = {}
    for rank in range(8):
        tensors, segments = reader.open_rank(out, rank)
        for name in ("layers.1.attn.qkv", "head"):
            _, shape, data = tensors[name]
            flat, covered = np.frombuffer(data, np.uint16), np.zeros(np.prod(shape), bool)
            for segment in segments[name]:
                axes = list(segment["box"])
                extents = [high - low for low, high in segment["box"].values()]
                steps = [segment["strides"][axis] for axis in axes]
                index = segment["offset"] + sum(
                    np.arange(extent).reshape([-1 if d == at else 1 for d in range(len(axes))]) * step
                    for at, (extent, step) in enumerate(zip(extents, steps, strict=True))
                )
                covered[index] = True
                whole = found.setdefault(segment["tensor"], np.full(list(segment["of"].values()), -1, np.int32))
                box = tuple(slice(low, high) for low, high in segment["box"].values())
                assert np.all((whole[box] == -1) | (whole[box] == flat[index]))
                whole[box] = flat[index]
            assert not flat[~covered].any()
    for tensor, stored in {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "head": "lm_head"}.items():
        name = f"model.layers.1.self_attn.{stored}.weight" if tensor != "head" else "lm_head.weight"
        wanted = published[name].view(torch.uint16).numpy()
        assert np.array_equal(found[tensor].reshape(wanted.shape), wanted), tensor


# --- docs/notation.md and docs/vocabulary.md --------------------------------------------------------------------------


def _example() -> str:
    match = re.search(r"<!-- example -->\n```toml\n(.*?)```", _text("docs/notation.md"), re.S)
    assert match is not None
    return match[1]


def test_example_table_works(tmp_path: Path) -> None:
    """The table of the notation page converts a checkpoint of a family that is not shipped, written by transformers,
    and merges it back.
    """
    assert "biogpt" not in families.shipped()
    config = transformers.BioGptConfig(
        vocab_size=101,
        hidden_size=56,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=30,
    )
    torch.manual_seed(0)
    model = transformers.BioGptForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "biogpt.toml").write_text(_example(), encoding="utf-8")
    reshard.convert(tmp_path / "model", tmp_path / "out", tp=4, pp=2, family=str(tmp_path / "biogpt.toml"))
    assert reshard.verify(
        tmp_path / "out", against=tmp_path / "model", family=str(tmp_path / "biogpt.toml"), numerics=False
    ).ok
    reshard.convert(tmp_path / "out", tmp_path / "back", to="hf")
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_patterns_shown_are_patterns() -> None:
    """Every pattern in the table of the notation page can be parsed,
    and the shipped tables or the example use its axes.
    """
    shown = list(_first_column("docs/notation.md", "Rows"))
    assert len(shown) >= 10
    axes = set(_axes_of_tables())
    for text in shown:
        pattern = parse_pattern(text, {})
        assert {axis.partition("/")[0].split()[-1] for path in pattern.axes for axis in path} <= axes, text


def test_every_key_and_word_is_described() -> None:
    """The keys of tables and the words of rows on the notation page are those that the parser knows."""
    family, form = (set(_first_column("docs/notation.md", f"Keys of a {kind} table")) for kind in ("family", "format"))
    keys = {re.sub(r"^\[?(\w+)[\].\w]*$", r"\1", key) for key in family | form}
    words = {"first", "last", "every", "whole", "cut=AXIS", "zero"}
    assert keys - words == keys_of.FAMILY | keys_of.FORMAT | FACTS.keys() | ROUTING.keys()
    assert words <= form
    for word in (*STAGES, "whole", "zero"):
        families.parse(f'name = "x"\nrows = [["embed", "vocab hidden", "embed", "{word}"]]', "x")


def _rows_of_tables() -> Iterator[Row]:
    for name in families.shipped():
        yield from families.load(name).rows
    for format in map(formats.load, formats.shipped()):
        yield from format.rows
        for family in format.overrides:
            yield from format.for_family(family).rows


def _axes_of_tables() -> Iterator[str]:
    for row in _rows_of_tables():
        for path in row.pattern.axes:
            for axis in (*row.name.axes, *path):
                yield from (base.partition("@")[0] for base in axis.partition("/")[0].split())
    for table in (*map(families.load, families.shipped()), *map(formats.load, formats.shipped())):
        yield from (axis for axis in table.axes if "@" not in axis)


def _vocabulary() -> dict[str, list[str]]:
    """Logical tensor → its axes, as the vocabulary page has them."""
    text = _text("docs/vocabulary.md").partition("## Outside the layers")[2]
    found = re.findall(r"^\| `([\w.]+)` \| (`[^|]+`) \|", text, re.M)
    assert len(found) == len(dict(found)), "a tensor appears twice on the page"
    return {name: re.findall("`([^`]+)`", axes) for name, axes in found}


# What is written for short: in families whose queries share keys, whose outputs lie in groups, whose heads lie in
# several parts, whose linear values share keys, whose state space heads share what goes into the state.
SHORT: tuple[dict[str, tuple[str, ...]], ...] = (
    {},
    {"heads": ("kv", "group")},
    {"heads": ("o_groups", "o_heads")},
    dict.fromkeys(("heads", "kv"), ("cores", "core_heads")),
    {"lv": ("lk", "lgroup")},
    {"ssm_heads": ("ssm_groups", "ssm_group")},
)


def test_vocabulary_is_that_of_the_tables() -> None:
    """The vocabulary page lists every logical tensor of every table, each with the axes that the tables give it,
    and no other.
    """
    vocabulary = {
        name: {frozenset(parse_pattern(axes, short).axes[0]) for axes in alternatives for short in SHORT}
        for name, alternatives in _vocabulary().items()
    }
    used: dict[str, set[frozenset[str]]] = {}
    for row in _rows_of_tables():
        for pattern in (row.pattern, *row.layouts):
            for leaf, path in zip(row.leaves, pattern.axes, strict=True):
                plain = frozenset(re.sub("@[a-z_0-9]+", "", axis) for axis in (*row.name.axes, *path))
                used.setdefault(leaf.partition("@")[0], set()).add(plain)
    assert vocabulary.keys() == used.keys()
    for name, axes in used.items():
        assert axes <= vocabulary[name], f"{name}: the tables say {[sorted(a) for a in axes]}"


def test_axes_are_those_of_the_tables() -> None:
    """The vocabulary page lists every axis of every table, and no other."""
    assert set(_first_column("docs/vocabulary.md", "Axes")) - {"kv group"} == set(_axes_of_tables())


def test_help_is_instant_to_read() -> None:
    """`reshard --help` names every command with a line of its own, and exits 0."""
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "reshard", "--help"], capture_output=True, text=True, check=True, env=environment
    )
    for name in cli.cli.commands:
        assert re.search(rf"^  {name}  ", done.stdout, re.M)
