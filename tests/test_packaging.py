"""What gets installed: a wheel with every module and table, a command that starts at once, and no torch where only
conversion is wanted.
"""

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import reshard

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("numpy", "torch", "huggingface_hub", "transformers", "tqdm", "xxhash")
# what the base has not
EXTRAS = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "pytest", "hypothesis", "jsonschema")


def _run(*command: object, directory: object = "/", fails: bool = False) -> str:
    """What a command prints; on both streams, where it is to fail."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=str(directory))
    assert bool(done.returncode) == fails, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr if fails else done.stdout


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that nothing is left in the one that is tested."""
    home = tmp_path_factory.mktemp("checkout")
    for name in ("reshard", "runtime", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / name)
    return home


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` builds."""
    work = tmp_path_factory.mktemp("wheel")
    _run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", work, checkout)
    (found,) = work.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what the base requires, but nothing of the extras: they cannot be
    imported.
    """
    home = _environment(tmp_path_factory.mktemp("installed") / "with a space")
    _run(*PIP, "--python", home / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return home


def _environment(home: Path, *more: str) -> Path:
    """A virtual environment with what the base requires, and more."""
    _run(sys.executable, "-m", "venv", "--without-pip", home)
    (site,) = home.glob("lib/python*/site-packages")
    # The dependencies are those of this environment, one by one, so that an undeclared one is missed.
    for name in _closure([*PROJECT["dependencies"], *more]):
        for entry in _top_level(name):
            if not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return home


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an editable install of the copy."""
    home = _environment(tmp_path_factory.mktemp("editable") / "venv", "setuptools")
    _run(
        *PIP,
        "--python",
        home / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--editable",
        checkout,
    )
    return home


def _closure(requirements: Sequence[str]) -> set[str]:
    """Names of all distributions that these requirements bring here, without extras."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, metadata.requires(name) or ())
    return found


def _top_level(name: str) -> Iterator[Path]:
    """Files and folders of a distribution directly below site-packages."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in sorted(tops):
        yield Path(str(distribution.locate_file(top)))


def test_wheel_is_complete(wheel: Path) -> None:
    """The wheel has every module and every table, the licence and py.typed, and no tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "reshard").rglob("*")
        if path.suffix in (".py", ".toml", ".typed")
    }
    sources |= {f"reshard/runtime/{path.name}" for path in (ROOT / "runtime").glob("*.py")}
    assert len([name for name in sources if name.endswith(".toml")]) > 10
    assert sources <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "docs", "scripts"))]


def test_wheel_requires_no_torch(wheel: Path) -> None:
    """Without extras the wheel requires nothing of the runtime or the reference; its version is that of the code."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    required = [
        Requirement(line.partition(": ")[2]) for line in text.splitlines() if line.startswith("Requires-Dist: ")
    ]
    base = {r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert base and not base & set(EXTRAS)
    for extra, wanted in {"runtime": {"torch", "tokenizers", "jinja2"}, "reference": {"transformers"}}.items():
        assert wanted <= {r.name for r in required if r.marker is not None and r.marker.evaluate({"extra": extra})}
    assert f"\nVersion: {reshard.__version__}\n" in text


def test_command_works_without_extras(installed: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The installed command converts, verifies and merges in an environment that has the base requirements and
    nothing else.
    """
    command, source = installed / "bin/reshard", checkpoint("llama")
    for name in EXTRAS:
        assert subprocess.run(
            [installed / "bin/python", "-c", f"import {name}"], capture_output=True, cwd="/"
        ).returncode
    assert f"version {reshard.__version__}" in _run(command, "--version")
    _run(command, "convert", source, tmp_path / "out", "--tp", "4")
    assert json.loads(_run(command, "verify", tmp_path / "out", "--against", source, "--json"))["ok"]
    _run(command, "convert", tmp_path / "out", tmp_path / "back", "--to", "hf")
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


@pytest.mark.parametrize("way", ["wheel", "editable", "checkout", "checkout with the wheel installed"])
def test_the_runtime_is_found_wherever_reshard_is(
    way: str, checkout: Path, installed: Path, editable: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Python and mypy find `reshard.runtime` in each kind of install, and in a checkout with or without one;
    as one module, not two.
    """
    home = {"editable": editable, "checkout": _environment(tmp_path_factory.mktemp("bare") / "venv")}.get(
        way, installed
    )
    project = checkout if "checkout" in way else tmp_path_factory.mktemp("project")
    found = _run(home / "bin/python", "-c", "from reshard.runtime import load_model", directory=project, fails=True)
    assert "torch" in found  # which is not there: the module that needs it was
    if "checkout" not in way:  # there mypy is part of scripts/test
        (project / "uses.py").write_text(
            "from reshard.runtime import load_model, load_shard\nload_shard('out', 0).keys()\nload_model(1.5)\n"
        )
        mypy = (
            "mypy",
            "--strict",
            "--python-executable",
            home / "bin/python",
            "--cache-dir",
            checkout.parent / "mypy",
            "uses.py",
        )
        found = _run(sys.executable, "-m", *mypy, directory=project, fails=True)
        assert 'Argument 1 to "load_model" has incompatible type "float"' in found
        assert found.endswith("Found 1 error in 1 file (checked 1 source file)\n"), found
        return
    found = _run(home / "bin/python", "-c", "import runtime.launch", directory=project, fails=True)
    assert "this package is reshard.runtime" in found
    done = subprocess.run(
        [home / "bin/python", "-m", "reshard.runtime", "generate", "no"], cwd=project, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.partition("\n")[0]) == (2, "error: no prompt was given")


def test_module_works_like_the_command(installed: Path) -> None:
    """`python -m reshard` says the same as `reshard`."""
    assert _run(installed / "bin/python", "-m", "reshard", "--help") == _run(installed / "bin/reshard", "--help")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["plan", "--help"], ["verify", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Help and version need no numpy, torch or huggingface_hub, nor anything else that takes time."""
    script = f"""
import sys
from reshard.cli import main
try:
    main({arguments!r})
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_import_is_light() -> None:
    """`import reshard` imports nothing heavy, and its functions are there when they are used."""
    script = (
        f"import sys, reshard; print([n for n in {HEAVY!r} if n in sys.modules]); "
        f"print(callable(reshard.plan), callable(reshard.verify))"
    )
    assert _run(sys.executable, "-c", script).split("\n")[:2] == ["[]", "True True"]


def test_conversion_imports_no_torch(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A conversion imports neither torch nor transformers, even where they are installed."""
    script = f"""
import sys, reshard
reshard.convert({str(checkpoint("llama"))!r}, {str(tmp_path / "out")!r}, tp=2)
print([name for name in {EXTRAS!r} if name in sys.modules])
"""
    assert _run(sys.executable, "-c", script).strip() == "[]"


def test_constraints_pin_everything() -> None:
    """Every requirement, of every extra and of what they bring, is pinned in constraints.txt,
    at a version in its range.
    """
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    if metadata.version("torch").partition("+")[0] != pins["torch"]:
        pytest.skip("other versions are installed, which bring other packages")
    # which build pages, not tests
    extras = {name: texts for name, texts in PROJECT["optional-dependencies"].items() if name != "docs"}
    wanted = [*PROJECT["dependencies"], *(text for texts in extras.values() for text in texts)]
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name != "reshard":
            assert requirement.specifier.contains(pins[name]), text
    assert _closure([text for text in wanted if not text.startswith("reshard")]) <= pins.keys()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """constraints-oldest.txt pins what pyproject.toml admits at least, so that trying it tries the bounds."""
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    # which build pages, not tests
    extras = {name: texts for name, texts in PROJECT["optional-dependencies"].items() if name != "docs"}
    wanted = [*PROJECT["dependencies"], *(text for texts in extras.values() for text in texts)]
    bounds = {
        requirement.name.lower().replace("_", "-"): next(iter(requirement.specifier)).version
        for requirement in map(Requirement, wanted)
        if requirement.specifier
    }
    assert pins.keys() == bounds.keys() - {"mypy", "ruff"}  # what they say changes with every release
    newer = {"huggingface-hub", "click"}  # which transformers wants newer than the converter does
    for name in pins.keys() - newer:
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.[01])*", pins[name]), (name, bounds[name], pins[name])
    assert all(Requirement(f"x>={bounds[name]}").specifier.contains(pins[name]) for name in newer)


def test_setup_does_nothing_twice(tmp_path: Path) -> None:
    """scripts/setup leaves an environment alone that was installed from the same files, and asks no registry;
    it refuses an old Python.
    """
    home = tmp_path / "check out"
    (home / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup"):
        shutil.copy(ROOT / name, home / name)
    fake = home / ".venv/bin/python"
    fake.parent.mkdir(parents=True)
    log = tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    fake.chmod(0o755)
    _run(home / "scripts/setup", "dev")
    assert log.read_text().count(" install ") == 2
    for extra in ("dev", ""):
        _run(home / "scripts/setup", *[extra] * bool(extra))
        assert log.read_text().count(" install ") == 2
    with (home / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    _run(home / "scripts/setup")
    assert log.read_text().count(" install ") == 4
    assert "[dev]" in log.read_text().splitlines()[-1]  # never less than there was
    shutil.rmtree(home / ".venv")
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [home / "scripts/setup"], env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "3.9.2" in done.stderr and "hint: " in done.stderr
