"""Whatever is wrong in a table is caught, where it does not fit a checkpoint or where the model is run;
what is not caught is told.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES
from running import reshard as command

import reshard
from reshard.authoring import check_table as table_check
from reshard.authoring import mutation_trial
from reshard.authoring import mutations as damaging
from reshard.authoring.check_table import TableCheck, check_table
from reshard.authoring.mutation_trial import CHECKS, EQUIVALENT, MISSED, OPEN, Bench, Trial
from reshard.authoring.mutations import Mutation, mutations
from reshard.authoring.synthetic import made_up
from reshard.checkpoints.published import open_published
from reshard.errors import ReshardError
from reshard.jobs.verify import verify
from reshard.runtime.comm.collectives import World
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.load import load_model
from reshard.tables import families, formats
from reshard.tables.families import Family
from reshard.tables.shipped import Shipped
from reshard.text.progress import Lines

Get = Callable[[str], Path]
FAMILIES = sorted({fixture.family for fixture in FIXTURES.values()})
SAMPLE = {"llama": 200, "gpt_neox": 200, "mixtral": 200, "deepseek_v3": 200}


def family(name: str) -> Family:
    return families.load(name)


@cache
def all_mutations(name: str) -> dict[str, Mutation]:
    return {mutation.name: mutation for mutation in mutations(family(name))}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Bench]]:
    """The checkpoints made up for a family, opened and run once."""

    @cache
    def opened(name: str) -> list[Bench]:
        roots = made_up(family(name), tmp_path_factory.mktemp(name))
        return [Bench(root.name, root, family(name), None) for root in roots]

    return opened


def tried(name: str, words: str, benches: Callable[[str], list[Bench]]) -> Trial:
    return mutation_trial.tried(all_mutations(name)[words], family(name), benches(name))


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_of_the_mutations_of_every_family_is_caught(name: str) -> None:
    """Whole families take up to a minute: `reshard check-table FAMILY` tries all."""
    found = check_table(family(name), sample=SAMPLE.get(name, 40))
    assert found.skipped is None, "every one of these is run"
    assert found.uncovered == ()
    assert [trial for trial in found.trials if trial.by == MISSED] == []
    assert found.ok and found.proven
    assert found.count["numerics"] > 0
    assert found.rounding is not None and found.rounding < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_what_fits_and_is_wrong_is_caught_by_running(name: str, benches: Callable[[str], list[Bench]]) -> None:
    """A tensor read one further along an axis fits always: some of them, in every family."""
    shifts = [mutation for mutation in all_mutations(name).values() if mutation.shift is not None]
    for mutation in shifts[:: max(1, len(shifts) // 6)]:
        trial = mutation_trial.tried(mutation, family(name), benches(name))
        axis = mutation.shift[1] if mutation.shift else ""
        one = all(bench.source.layout.model.sizes.get(axis) == 1 for bench in benches(name))
        assert trial.by in ("numerics", "beyond") or (trial.by == EQUIVALENT and one), trial


@pytest.mark.parametrize("name", FAMILIES)
def test_no_wrong_table_can_hide_in_a_made_up_checkpoint(name: str, tmp_path: Path) -> None:
    """No matrix is square, no dimension of one tensor is another's by chance, no two rows are equal;
    every row stands in one.
    """
    covered: set[int] = set()
    for root in made_up(family(name), tmp_path):
        bench = Bench(root.name, root, family(name), "is not run here")
        covered |= bench.active
        for stored, (at, entry) in bench.published.tensors.items():
            assert len(set(entry.shape)) == len(entry.shape) or stored.endswith("scale_inv"), (stored, entry.shape)
            data = (root / bench.published.originals[at].name).read_bytes()[entry.offset : entry.offset + entry.nbytes]
            rows = math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else 1
            size = len(data) // rows
            if size > 8:
                assert len({data[n * size : (n + 1) * size] for n in range(rows)}) == rows, stored
    assert covered == set(range(len(family(name).rows)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_axis_and_size_is_mutated_and_no_mutation_twice(name: str) -> None:
    table, found = family(name), list(mutations(family(name)))
    assert len({mutation.name for mutation in found}) == len(found)
    keys = [damaging.identity(mutation.data) for mutation in found if mutation.data is not None]
    assert len(set(keys)) == len(keys)
    assert damaging.identity(table.written) not in keys
    assert sum(" dropped" in mutation.name and mutation.name.startswith("row ") for mutation in found) == len(
        table.rows
    )
    shifted = {mutation.shift for mutation in found if mutation.shift is not None and mutation.shift[0]}
    axes = {
        (leaf, axis)
        for row in table.rows
        for leaf, path in zip(row.leaves, row.pattern.axes, strict=True)
        for axis in path
    }
    assert shifted == axes
    for axis in table.written["sizes"]:
        assert {f"size of axis {axis} dropped", f"size of axis {axis} shifted by one"} <= {
            mutation.name for mutation in found
        }


# --- which check ------------------------------------------------------------------------------------------------------


NAMED = [
    ("llama", "row norm dropped", "opening"),
    ("llama", "rows attn.q and attn.k exchanged", "planning"),
    ("llama", "rows attn.k and attn.v exchanged", "numerics"),
    ("llama", "rows mlp.gate and mlp.up exchanged", "numerics"),
    ("llama", "rows embed and head exchanged", "numerics"),
    ("llama", "pattern of mlp.down transposed", "opening"),
    ("llama", "group and head_dim exchanged in the pattern of attn.o", "numerics"),
    ("llama", "axis inter of mlp.gate shifted by one", "numerics"),
    ("llama", "axis layer in the name of attn.o shifted by one", "numerics"),
    ("llama", "axis inter called hidden in the pattern of mlp.up", "reading"),
    ("llama", "compound axis heads dropped", EQUIVALENT),  # q is cut where its groups are
    ("llama", "parts kv and group of axis heads exchanged", "planning"),
    ("llama", "sizes of axes heads and kv exchanged", "opening"),
    ("llama", "placeholder {layer} of attn_norm dropped", "opening"),
    ("gpt_neox", "leaves of fused row attn.q+attn.k+attn.v shifted by one", "planning"),
    ("gpt_neox", "rows attn.o_bias and mlp.down_bias exchanged", "numerics"),
    ("gpt_oss", "moe_inter and (1 + 1) exchanged in the pattern of moe.gate+moe.up", "numerics"),
    ("gpt2", "axis head_dim of attn.k_bias shifted by one", "beyond"),
    ("mixtral", "axis experts of moe.down shifted by one", "numerics"),
    ("deepseek_v3", "rows mtp.e_norm and mtp.h_norm exchanged", "beyond"),
    ("deepseek_v3", "axis heads of attn.q_whole shifted by one", "numerics"),
    ("deepseek_v3", "axis routes of moe.score_bias shifted by one", "numerics"),
    ("llama", "rows in the opposite order", EQUIVALENT),
    ("llama", "size of axis hidden dropped", EQUIVALENT),
    ("gpt2", "compound axis heads dropped", EQUIVALENT),  # its groups are of one
]


@pytest.mark.parametrize(("name", "words", "by"), NAMED, ids=[f"{name}: {words}" for name, words, _ in NAMED])
def test_a_mutation_is_caught_where_one_would_think(
    name: str, words: str, by: str, benches: Callable[[str], list[Bench]]
) -> None:
    trial = tried(name, words, benches)
    assert (trial.by, trial.name) == (by, words), trial


FITTING = [
    ("llama", "rows attn.k and attn.v exchanged"),
    ("llama", "group and head_dim exchanged in the pattern of attn.o"),
    ("gpt_neox", "leaves attn.k and attn.v of attn.q+attn.k+attn.v exchanged"),
]


@pytest.mark.parametrize(("name", "words"), FITTING)
def test_what_fits_passes_all_checks_but_the_model_computes_something_else(
    name: str, words: str, tmp_path: Path, benches: Callable[[str], list[Bench]]
) -> None:
    """Written out: the mutated table converts, and integrity, weights and sha256 find nothing; logits are those that
    the check saw.
    """
    (bench,) = benches(name)
    assert bench.published.root is not None
    mutated = all_mutations(name)[words].data
    assert mutated is not None
    (tmp_path / "mine.toml").write_text(toml(mutated))
    reshard.convert(
        bench.published.root, out := tmp_path / "out", tp=2, family=str(tmp_path / "mine.toml"), sha256=True
    )
    source = reshard.api.open_any(bench.published.root, family=str(tmp_path / "mine.toml"))
    report = verify(out, source)
    assert report.ok and [check.name for check in report.checks if check.skipped is None] == [
        "integrity",
        "weights",
        "sha256",
    ]

    def work(world: World) -> torch.Tensor:
        found = load_model(out, torch.float64, world=world)(bench.ids, all_ranks=True)
        assert found is not None
        return found

    off = float((run_threads(2, work)[0] - bench.wanted).abs().max())
    assert tried(name, words, benches).words == f"logits differ by {off:.3g}"
    assert off > 1000 * bench.rounding


def toml(data: dict[str, object]) -> str:
    """TOML of the flat kind that tables are written in."""

    def value(found: object) -> str:
        if isinstance(found, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {value(one)}" for key, one in found.items()) + " }"
        if isinstance(found, list):
            return "[" + ", ".join(map(value, found)) + "]"
        return json.dumps(found)

    return "".join(f"{key} = {value(found)}\n" for key, found in data.items())


# --- what is not caught, and tables of one's own ----------------------------------------------------------------------


def test_what_a_checkpoint_cannot_tell_is_not_called_caught(checkpoint: Get) -> None:
    """Attention and feed-forward beside each other add both biases at one place: exchanged, the model is the same."""
    bench = Bench("given", checkpoint("gpt_neox"), family("gpt_neox"), None)
    mutation = all_mutations("gpt_neox")["rows attn.o_bias and mlp.down_bias exchanged"]
    assert mutation_trial.tried(mutation, family("gpt_neox"), [bench]).by == "beyond", (
        "run one after the other, they are told apart"
    )
    trial = Trial(mutation.name, MISSED, "the same logits: they differ")
    found = TableCheck("gpt_neox", 16, 7, ("given",), (trial, Trial("other", "opening", "why")))
    assert not found.ok and not found.proven
    assert found.lines()[:3] == [
        "gpt_neox: 1 of 2 caught: 2 mutations of 16 rows and 7 axes",
        "  NOT CAUGHT: 1",
        "    rows attn.o_bias and mlp.down_bias exchanged: the same logits: they differ",
    ]
    assert check_table(family("gpt_neox"), checkpoint("gpt_neox"), sample=1).ok


def test_a_given_checkpoint_is_tried_first_and_says_whether_the_table_itself_is_right(checkpoint: Get) -> None:
    found = check_table(family("llama"), checkpoint("llama"), sample=40)
    assert found.ok and found.proven and not found.wrong
    assert found.itself.startswith("the table itself: logits differ from transformers")
    assert {trial.checkpoint for trial in found.trials if trial.by == "numerics"} == {
        str(checkpoint("llama")),
        "synthetic 1",
    }
    assert found.uncovered == (), "its optional rows are in one made up"


def test_a_table_that_is_wrong_itself_is_told_by_a_given_checkpoint(checkpoint: Get, tmp_path: Path) -> None:
    """All its mutations are caught, for they are compared with itself: only an independent implementation knows."""
    rows = [
        ["model.layers.{layer}.self_attn.k_proj.weight", "(kv head_dim) hidden", "attn.v"],
        ["model.layers.{layer}.self_attn.v_proj.weight", "(kv head_dim) hidden", "attn.k"],
    ]
    (tmp_path / "mine.toml").write_text(f'name = "mine"\nlike = "llama"\nrows = {json.dumps(rows)}\n')
    table = families.load_file(tmp_path / "mine.toml")
    found = check_table(table, checkpoint("llama"), sample=20)
    assert found.wrong and not found.ok and found.missed == ()
    assert "caught" not in found.lines()[0]
    assert found.lines()[1].startswith("  WRONG: the table itself: logits differ from transformers")
    alone = check_table(table, sample=20)
    assert alone.ok and alone.itself == ""


def test_a_table_that_does_not_fit_the_given_checkpoint_is_refused(checkpoint: Get) -> None:
    with pytest.raises(ReshardError, match="does not fit the table of family"):
        check_table(family("mixtral"), checkpoint("llama"))


def test_a_table_of_axes_that_nobody_knows_is_checked_too(tmp_path: Path) -> None:
    """Axes of other names get sizes of their own; a table that the runtime cannot run is checked as far as it fits,
    and says so.
    """
    rows = [["wte", "tokens width", "embed"], ["h.{layer}.w", "(a b) width", "attn.o"], ["n", "width", "norm"]]
    sizes = {"layer": "layers", "a": "as"}
    (tmp_path / "mine.toml").write_text(toml({"name": "mine", "rows": rows, "sizes": sizes}))
    with pytest.raises(ReshardError, match="format"):
        check_table(families.load_file(tmp_path / "mine.toml"))
    rows = [["wte", "vocab hidden", "embed"], ["h.{layer}.n", "hidden", "attn_norm"], ["n", "hidden", "norm"]]
    (tmp_path / "mine.toml").write_text(
        toml({"name": "mine", "rows": rows, "sizes": {"layer": "layers", "hidden": "size"}})
    )
    found = check_table(families.load_file(tmp_path / "mine.toml"))
    assert found.skipped is not None and found.skipped.startswith("the runtime cannot run synthetic 1")
    assert found.ok and not found.proven and found.count[OPEN] > 0


@pytest.mark.parametrize("name", formats.shipped())
def test_the_table_of_a_format_is_refused(name: str, tmp_path: Path) -> None:
    (path := tmp_path / "format.toml").write_text(Shipped("formats", "format").text(name))
    done = command("check-table", str(path), "--sample", "1")
    assert (done.code, done.out) == (2, "") and f'"{name}" is the table of a format, not of a family' in done.err


ODD = {
    "no size but zero": ('like = "llama"\n[sizes]\nkv = "a * 0"', r'\[sizes\] kv = "a \* 0"\) has size 0, expected 1'),
    "a size of zero": ('like = "llama"\n[sizes]\ninter = "0"', r'\[sizes\] inter = "0"\) has size 0, expected 1'),
    "a part of zero": (
        'like = "llama"\n[sizes]\nkv = "0"\nheads = "h"',
        r'\[sizes\] kv = "0"\) has size 0, expected 1',
    ),
    "a compound of nothing": ('like = "llama"\n[axes]\nheads = ""', r'\[axes\] heads = "" has no parts'),
    "extra layers only": (
        'like = "deepseek_v3"\none_of = [["mtp"]]',
        r"one_of = .*\['mtp'\]\] leaves no kind for the layers",
    ),
    "no rows": ("", "it has no row"),
    "a size that is text": (
        'like = "llama"\n[sizes]\nheads = "model_type"',
        "model_type is 'odd', expected a non-negative integer",
    ),
    "a value and a section": (
        'like = "llama"\n[sizes]\nlayer = "a"\nhidden = "a.b"',
        "a is a section of config.json in a.b",
    ),
    "a very long axis": (
        'like = "llama"\n[sizes]\nvocab = "99999999999"',
        r'vocab = "99999999999"\) has size 99999999999, expected 1 to 1048576',
    ),
    "a very large model": (
        'like = "llama"\n[sizes]\nvocab = "131072"\nhidden = "16384"',
        "more than 67108864 elements",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_a_table_of_which_no_checkpoint_can_be_made_up_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    """Never a traceback, and never a verdict such as "0 of 1 caught"."""
    text, why = ODD[what]
    (tmp_path / "odd.toml").write_text(f'name = "odd"\n{text}\n')
    with pytest.raises(
        ReshardError, match=f'family "odd": cannot generate a synthetic checkpoint from its table: .*{why}'
    ):
        check_table(families.load_file(tmp_path / "odd.toml"), sample=1)


def test_whatever_else_a_table_says_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.authoring.synthetic._sized", lambda *_: {}["nothing"])
    with pytest.raises(ReshardError, match=r"cannot generate a synthetic checkpoint .* KeyError\('nothing'\)"):
        next(made_up(family("llama"), tmp_path))


def test_a_table_may_have_any_number_of_axes_that_nobody_knows(tmp_path: Path) -> None:
    """All of them get sizes that no other has."""
    rows = [["wte", "vocab hidden", "embed"], *([f"w{n}", f"a{n} hidden", f"x{n}"] for n in range(40))]
    (tmp_path / "mine.toml").write_text(toml({"name": "mine", "rows": rows}))
    root = next(made_up(families.load_file(tmp_path / "mine.toml"), tmp_path))
    shapes = [entry.shape for _, entry in open_published(root).tensors.values()]
    assert len({shape[0] for shape in shapes} | {shapes[0][1]}) == 42


# --- saying it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> TableCheck:
    return check_table(family("phi3"), sample=120)


def test_a_report_says_the_verdict_first_in_80_columns(found: TableCheck) -> None:
    lines = found.lines()
    wrong = 120 - found.count[EQUIVALENT]
    assert lines[0] == f"phi3: all caught: {wrong} mutations of 9 rows and 7 axes"
    assert all(len(line) <= 80 for line in [*lines, *found.lines(each=True)])
    for check in CHECKS:
        assert any(line.startswith(f"  {check:<11} {found.count[check]:>5}  ") for line in lines)
    assert len(found.lines(each=True)) >= len(lines) + 120


def test_a_report_is_json_that_adds_up(found: TableCheck) -> None:
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert said["ok"] and said["proven"]
    assert sum(said["count"].values()) == len(said["mutations"]) == 120
    assert {mutation["by"] for mutation in said["mutations"]} <= {*CHECKS, EQUIVALENT}


def test_the_same_table_gives_the_same_report(found: TableCheck) -> None:
    assert check_table(family("phi3"), sample=120).to_json() == found.to_json()


def test_progress_is_reported_mutation_by_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines, "first", 0.0)
    done = command("check-table", "phi3", "--sample", "5")
    assert re.search(r"^testing mutations: 5 of 5 \(100 %\), [0-9,]+/s$", done.err, re.M), done.err
    done = command("check-table", "phi3", "--sample", "5", "--progress", "json")
    last = json.loads(done.err.splitlines()[-1])
    assert [last[key] for key in ("what", "done", "total", "end")] == ["testing mutations", 5, 5, True]
    done = command("check-table", "phi3", "--sample", "5", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_without_torch_numerics_is_skipped_and_nothing_is_called_caught_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table_check, "unusable", lambda *_: "PyTorch is not installed")
    monkeypatch.setattr(Bench, "_prepare", lambda *_: pytest.fail("nothing may be run"))
    found = check_table(family("phi3"), sample=120)
    assert found.ok and not found.proven
    assert found.count["numerics"] == found.count["beyond"] == 0 < found.count[OPEN]
    assert found.rounding is None
    caught = 120 - found.count[EQUIVALENT] - found.count[OPEN]
    assert found.lines()[0].startswith(f"phi3: {caught} of {120 - found.count[EQUIVALENT]} caught")
    assert any("PyTorch is not installed" in line for line in found.lines())


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Checking leaves torch with as many threads as it had."""
    was = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == was


def test_a_made_up_checkpoint_is_the_same_on_every_machine(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = (next(made_up(family("falcon"), tmp_path / name)) for name in ("a", "b"))
    assert sorted(path.name for path in one.iterdir()) == ["config.json", "model.safetensors"]
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    assert open_published(one).config.model_type == "falcon"
