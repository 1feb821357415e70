"""The bench measures what it says: its controls can fail, its verdicts follow from the numbers, it leaves nothing
behind.
"""

import importlib.util
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import shapes
from running import WATCHDOG
from safetensors import safe_open

from reshard import api
from reshard.jobs import plan

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench"
SIZE = 4_000_000


def loaded() -> ModuleType:
    loader = SourceFileLoader("bench", str(SCRIPT))
    spec = importlib.util.spec_from_loader("bench", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    loader.exec_module(module)
    return module


bench: Any = loaded()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "source"
    bench.write_llama(folder, SIZE, SIZE // 8)
    return folder


def samples(rounds: int = 9, **walls: float) -> dict[str, list[Any]]:
    """Made-up rounds in which cp takes a second of time and of CPU, and the others what is said; each round slower than
    the last.
    """
    taken = {
        "cp": 1.0,
        "again": 1.0,
        "two": 0.7,
        "slow": 1.25,
        "ours": 0.9,
        "cpu": 1.7,
        "again_cpu": 1.0,
        "wait": 0.0,
    } | walls
    cpus = {"ours": taken["cpu"], "again": taken["again_cpu"]}
    names = {"cp": bench.CP, "again": bench.AGAIN, "two": bench.TWO, "slow": bench.SLOW, "ours": bench.OURS}
    drift = [1 + number / 10 for number in range(rounds)]
    return {
        name: [bench.Sample((taken[key] + taken["wait"]) * d, cpus.get(key, 1.0) * d, 0, 0) for d in drift]
        for key, name in names.items()
    }


def verdicts(**walls: Any) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in bench.findings(samples(**walls))}


TIME, PARALLEL, CPU = "convert / cp -r, time", "convert / two parallel cp, time", "convert / cp -r, CPU"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_everything_within_its_bound_passes_and_drift_from_round_to_round_does_not_matter() -> None:
    found = verdicts()
    assert (found[TIME], found[PARALLEL], found[CPU]) == ("pass", "pass", "pass")
    assert bench.overall(bench.findings(samples())) == 0


@pytest.mark.parametrize(
    ("walls", "failing"),
    [({"ours": 1.02}, TIME), ({"two": 0.55}, PARALLEL), ({"cpu": 2.1}, CPU)],
    ids=["time", "parallel", "CPU"],
)
def test_a_bound_that_is_exceeded_fails_and_the_others_do_not(walls: dict[str, float], failing: str) -> None:
    found = verdicts(**walls)
    assert [what for what in (TIME, PARALLEL, CPU) if found[what] != "pass"] == [failing]
    assert found[failing] == "fail"
    assert bench.overall(bench.findings(samples(**walls))) == 1


@pytest.mark.parametrize("again", [0.94, 1.06])
def test_there_is_no_verdict_where_cp_against_cp_is_not_equal(again: float) -> None:
    found = verdicts(again=again, ours=2.0)
    assert found["control: cp / cp, time"] == "does not"
    assert (found[TIME], found[PARALLEL], found[CPU]) == ("no verdict", "no verdict", "pass")
    assert verdicts(again_cpu=again)[CPU] == "no verdict"
    assert bench.overall(bench.findings(samples(again=again))) == 2


@pytest.mark.parametrize("again", [0.96, 1.04])
def test_a_control_within_five_percent_holds(again: float) -> None:
    assert verdicts(again=again)[TIME] == "pass"


def test_there_is_no_verdict_where_the_planted_slow_copier_was_not_seen() -> None:
    found = verdicts(slow=1.0)
    assert found["control: slow cp / cp, time"] == "does not"
    assert (found[TIME], found[PARALLEL], found[CPU]) == ("no verdict", "no verdict", "pass")


def test_there_is_no_verdict_where_cp_had_to_wait_for_a_cpu() -> None:
    found = verdicts(wait=0.5)
    assert found["control: CPU / time of cp -r"] == "does not"
    assert {found[what] for what in (TIME, PARALLEL, CPU)} == {"no verdict"}


def test_there_is_no_verdict_below_nine_rounds() -> None:
    found = verdicts(rounds=8)
    assert {found[what] for what in (TIME, PARALLEL, CPU)} == {"no verdict"}


def test_the_median_of_the_ratios_counts_not_the_ratio_of_the_medians() -> None:
    one = [SimpleNamespace(wall=wall) for wall in (1.0, 2.0, 9.0)]
    other = [SimpleNamespace(wall=wall) for wall in (4.0, 1.0, 10.0)]
    assert statistics.median(bench.ratios({"a": one, "b": other}, "a", "b", "wall")) == 0.9


def test_a_failure_outweighs_a_missing_verdict_and_that_a_pass() -> None:
    of = {
        word: bench.Finding("", (), "", word)
        for word in ("pass", "fail", "no verdict", "not measured", "reported", "holds")
    }
    assert bench.overall([of["pass"], of["holds"], of["reported"]]) == 0
    assert bench.overall([of["pass"], of["no verdict"]]) == bench.overall([of["not measured"]]) == 2
    assert bench.overall([of["fail"], of["no verdict"], of["pass"]]) == 1


def test_what_people_read_keeps_within_80_columns() -> None:
    made = samples(ours=123.4)
    long = [
        bench.bound("--tp 16 --ep 16, memory / 150 MB", [1234.5], 1.02),
        bench.Finding("x", (), "0.95–1.05", "not measured"),
    ]
    medians = {name: bench.summary(runs, 3 * 10**9) for name, runs in made.items()}
    section = bench.Section("convert", medians, [*bench.findings(made), *long], ["word " * 40])
    lines = "\n".join(section.lines()).splitlines()
    assert len(lines) > 15
    assert max(map(len, lines)) <= 80


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [300 * 10**6, 3 * 10**9, 30 * 10**9])
def test_the_llama_is_about_as_large_as_asked(size: int) -> None:
    config = bench.llama(size)
    total = sum(
        2 * stored.shape[0] * (stored.shape[1] if len(stored.shape) > 1 else 1)
        for stored in shapes.llama(config).values()
    )
    assert abs(total - size) < size / 10
    assert size < 10**9 or (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (
        4096,
        14336,
        128,
    )


def test_the_checkpoint_is_several_valid_files_of_incompressible_bytes_and_converts_and_verifies(
    source: Path, tmp_path: Path
) -> None:
    files = sorted(source.glob("*.safetensors"))
    held = set()
    for path in files:
        with safe_open(path, "np") as file:  # the library checks the header
            held |= set(file.keys())
    assert len(files) >= 8
    assert held == set(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    assert len(set(files[0].read_bytes()[-65536:])) == 256
    api.convert(source, tmp_path / "out", tp=bench.TP)
    assert api.verify(tmp_path / "out", against=source, numerics=False).ok


def test_a_sparse_checkpoint_takes_no_space(tmp_path: Path) -> None:
    bench.write_llama(tmp_path / "sparse", 300 * 10**6, 10**9, True)
    assert bench.nbytes(tmp_path / "sparse") > 250 * 10**6
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "sparse").iterdir()) < 10**6


def test_two_parallel_copies_take_every_file_once_and_about_half_of_the_bytes_each(
    source: Path, tmp_path: Path
) -> None:
    one, other = bench.halves(source)
    assert sorted(one + other) == sorted(source.iterdir())
    assert abs(sum(path.stat().st_size for path in one) / bench.nbytes(source) - 0.5) < 0.1
    bench.measure(*bench.two_copies(source)(tmp_path / "out"))
    assert same(source, tmp_path / "out")


def test_the_planted_slow_copier_copies_everything_and_a_fifth_of_it_twice(source: Path, tmp_path: Path) -> None:
    (command,) = bench.slow_copy(source)(tmp_path / "out")
    again = [Path(word) for word in command if Path(word).parent == source]
    assert 0.2 <= sum(path.stat().st_size for path in again) / bench.nbytes(source) <= 0.4
    bench.measure(command)
    assert same(source, tmp_path / "out")


def test_the_usual_script_writes_every_rank(source: Path, tmp_path: Path) -> None:
    bench.measure(*bench.usual(source)(tmp_path / "out"))
    assert len(list((tmp_path / "out").iterdir())) == bench.TP
    with safe_open(tmp_path / "out" / "rank-3.safetensors", "np") as file:
        width = file.get_slice("model.layers.0.mlp.down_proj.weight").get_shape()[1]
    assert width * bench.TP == bench.llama(SIZE)["intermediate_size"]


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_slow_copier_is_flagged_when_it_is_really_run(source: Path, tmp_path: Path) -> None:
    many = 'for n in $(seq 50); do rm -rf "$2"; cp -r "$1" "$2"; done'  # whatever slows one copy slows fifty
    late: Callable[[Path], Any] = lambda out: [("sh", "-c", many, "sh", str(source), str(out))]  # noqa: E731
    taken = bench.race({"cp": bench.copy(source), "late": late}, 3, tmp_path)
    assert bench.judge(bench.ratios(taken, "late", "cp", "wall"), bench.WALL) == "fail"


def test_a_race_discards_one_round_and_changes_the_order_and_leaves_no_output(tmp_path: Path) -> None:
    ran: list[str] = []
    looked: list[str] = []

    def runner(name: str) -> Callable[[Path], Any]:
        def commands(out: Path) -> Any:
            assert not out.exists()
            ran.append(name)
            return [("mkdir", str(out))]

        return commands

    taken = bench.race({name: runner(name) for name in "abcde"}, 9, tmp_path, lambda name, out: looked.append(name))
    rounds = ["".join(ran[at : at + 5]) for at in range(0, len(ran), 5)]
    assert len(rounds) == 10
    assert {"".join(sorted(each)) for each in rounds} == {"abcde"}
    assert {len(runs) for runs in taken.values()} == {9}
    assert sorted(looked) == list("abcde")
    assert {each[0] for each in rounds} == {each[-1] for each in rounds} == set("abcde")
    assert not list(tmp_path.iterdir())


def test_cpu_seconds_are_those_of_all_processes_and_time_is_that_of_the_longest(tmp_path: Path) -> None:
    spin = "import time\nwhile time.process_time() < 0.2: pass"
    busy = bench.measure((sys.executable, "-c", spin), (sys.executable, "-c", spin))
    idle = bench.measure(("sleep", "0.2"), ("sleep", "0.1"))
    assert idle.cpu < 0.4 <= busy.cpu
    assert idle.wall >= 0.2
    os.mkfifo(tmp_path / "pipe")  # whose two ends wait for one another: they run at once
    bench.measure(("sh", "-c", f"echo > '{tmp_path}/pipe'"), ("sh", "-c", f"cat '{tmp_path}/pipe'"))


def test_a_command_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(bench.Failed, match="exit code 1 of cp /nowhere"):
        bench.measure(("cp", "/nowhere", "/nowhere-else"))
    assert bench.measure(("false",), check=False).code == 1


def test_an_interruption_kills_what_runs_with_its_children() -> None:
    seen: list[int] = []

    def interrupt(pid: int) -> None:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            seen.extend([pid, int(children[0])])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(("sh", "-c", "sleep 60; true"), watch=interrupt)
    assert len(seen) == 2
    while any(running(pid) for pid in seen):  # until pytest's limit
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_mapped_source_file_is_noticed_and_one_that_is_only_open_is_not(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"x" * 4096)
    (tmp_path / "open").write_bytes(b"x" * 4096)
    maps = bench.Maps(tmp_path)
    with (tmp_path / "open").open("rb") as plain, (tmp_path / "mapped").open("rb") as file:
        plain.read()
        maps(os.getpid())
        assert (maps.looks, maps.mapped) == (1, set())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            maps(os.getpid())
    assert maps.mapped == {str(tmp_path.resolve() / "mapped")}


def test_the_formula_is_the_one_that_plan_prints() -> None:
    assert bench.formula(2, 700) == plan.memory(2, 700)


def test_one_convert_is_watched_and_stays_within_the_formula(tmp_path: Path) -> None:
    row = bench.one_memory(SIZE, tmp_path, 8)
    assert 10 << 20 < row["peak"] <= row["formula"]
    assert row["looks"] > 0
    assert row["mapped"] == []
    assert row["size"] <= row["read"] < row["size"] + (20 << 20)
    assert row["output"] <= row["written"] < row["output"] * 1.1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_deepseek(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key, value in {"num_hidden_layers": 4, "n_routed_experts": 16}.items():
        monkeypatch.setitem(shapes.DEEPSEEK_V3, key, value)
    yield


@pytest.mark.usefixtures("small_deepseek")
def test_plan_is_measured_on_both_meshes_from_headers_alone(tmp_path: Path) -> None:
    section = bench.bench_plan(tmp_path, 1)
    assert list(section.medians) == ["plan --tp 16", "plan --tp 16 --ep 16"]
    assert [finding.verdict for finding in section.findings if "memory" in finding.what] == ["pass", "pass"]
    assert section.extra["size"] > 10**9
    assert not list(tmp_path.iterdir())


def test_the_gate_runs_all_contenders_and_gives_no_verdict_off_tmpfs_or_for_few_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the usual script: importing torch takes long
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    section = bench.gate(SIZE, 1, tmp_path, "ext4")
    assert set(section.medians) == {bench.CP, bench.AGAIN, bench.TWO, bench.SLOW, bench.OURS}
    assert {finding.verdict for finding in section.findings} <= {"no verdict", "holds", "does not"}
    assert any("not tmpfs" in note for note in section.notes)
    assert any("1 rounds" in note for note in section.notes)
    json.dumps(section.to_json())


def test_what_does_not_fit_is_not_measured(tmp_path: Path) -> None:
    (section,) = bench.bench_convert(10**15, 9, tmp_path, None)
    assert [finding.verdict for finding in section.findings] == ["not measured"]
    assert bench.overall(section.findings) == 2


def test_an_interrupted_bench_leaves_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "convert",
        "--size",
        "40MB",
        "--rounds",
        "50",
        "--dir",
        str(tmp_path),
        "--disk",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1" in line:
                break
        assert list(tmp_path.glob("*/source/config.json"))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=WATCHDOG)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "interrupted" in said
    assert not list(tmp_path.iterdir())
