"""Writes the generated parts of the documentation anew: whatever stands between `<!-- name -->` and `<!-- /name -->`.

Also the JSON Schemas and the picture of the rooms.


.venv/bin/python docs/generate.py            rewrite them
.venv/bin/python docs/generate.py --check    change nothing; exit 1 where one is out of date
"""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import msgspec
import rooms

from reshard.authoring.check_table import CheckTableResult
from reshard.checkpoints.manifest import Manifest
from reshard.checkpoints.shards import Described
from reshard.jobs.diff import DiffResult
from reshard.jobs.explain import ExplainResult
from reshard.jobs.fingerprint import Fingerprint, Share
from reshard.jobs.inspect import Description
from reshard.jobs.result import ConvertResult
from reshard.jobs.verdict import VerifyResult
from reshard.tables import families, formats
from reshard.tables.facts import FACTS, ROUTING, Fact
from reshard.tables.families import Family
from reshard.tables.notation import Sum
from reshard.tables.row import Row

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ("", ".py", ".md", ".json")
# instead of keys and values
STATEFUL = {"lin.k": "linear attention", "ssm.a_log": "state space", "conv.taps": "short convolutions"}
SHOWN_AS = "/tmp/demo"  # where the demo of the README ran


# --- the families -----------------------------------------------------------------------------------------------------


def family_rows() -> str:
    """A Markdown table with one row per family table, and what scripts/gauntlet saw of it."""
    vllm = formats.load("vllm").families
    seen = json.loads((ROOT / "docs" / "gauntlet.json").read_text(encoding="utf-8"))
    lines = [
        "| family | converts | runs | check-table | attention | feed-forward | also |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in families.shipped():
        table = families.load(name)
        also = "; ".join(word for word in (_also(table), "`--to vllm`" if name in vllm else "") if word)
        results = _results(table, seen.get(name, {}))
        lines.append(f"| `{name}` | {results} | {_attention(table)} | {_feed_forward(table)} | {also} |")
    return "\n".join(lines)


def engine_rows() -> str:
    """What can load which format; of engines, what docs/engines.json has of them."""
    known = json.loads((ROOT / "docs" / "engines.json").read_text(encoding="utf-8"))
    every = len(families.shipped())
    runs = sum(families.load(name).runs for name in families.shipped())
    rows = [
        ("the bundled runtime", "this one", "`native`", f"{runs} of {every}", BUNDLED),
    ]
    for engine, seen in sorted(known.items()):
        name, version = engine.split(" ")
        table = formats.load(name)
        loads = sum(one["loads"]["held"] for one in seen["families"].values())
        how = f"its own loader held, element by element, what the table says in {loads} loads ({seen['date']})"
        rows.append((f"{table.engine['name']} `sharded_state`", version, f"`{name}`", str(len(seen["families"])), how))
    rows += [
        ("anything that reads safetensors", "any", "`native`", str(every), READER),
        ("transformers, and everything that loads Hub checkpoints", "any", "`hf`", str(every), RESTORED),
    ]
    head = ["| engine | version | format | families | tested how |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


BUNDLED = "logits and greedy tokens equal to transformers' at 7 to 9 meshes each"
READER = "[a reader of 40 lines](docs/reader.py) that uses only the standard library"
RESTORED = "the original files, byte for byte"


def _results(table: Family, seen: dict[str, Any]) -> str:
    """Meshes converted to and run at, and mutations detected; a dash for what was not tried since the table changed,
    or did not hold.
    """
    if seen.get("table") != families.digest(table.name):
        return "– | – | –"
    failed = " ".join(seen["failed"])
    converts = "fails" if " converts: " in failed else f"{seen['meshes']} meshes"
    runs = (
        "no"
        if not table.runs
        else "fails"
        if " runs at " in failed
        else f"{seen['runs']} meshes"
        if seen["runs"]
        else "–"
    )
    share = 100 * seen["caught"] / seen["mutations"] if seen["mutations"] else 0
    return f"{converts} | {runs} | {'100 %' if seen['caught'] == seen['mutations'] else f'{min(share, 99.9):.1f} %'}"


def _leaves(table: Family) -> dict[str, Row]:
    return {leaf.partition("@")[0]: row for row in reversed(table.rows) for leaf in row.leaves}


def _attention(table: Family) -> str:
    leaves, words = _leaves(table), []
    if "attn.kv_a" in leaves:
        words.append("latent")
    elif "attn.q" in leaves and "attn.k" in leaves["attn.q"].leaves:
        per_head = any(dim[0] == "kv" and isinstance(dim[-1], Sum) for dim in leaves["attn.q"].pattern.dims)
        words.append("q, k, v fused" + (", per KV head" if per_head else ""))
    elif "attn.q" in leaves:
        words.append("q, k, v")
    elif "attn.q_b" in leaves:
        words.append("latent q, k")
    elif "moa.q" in leaves:
        words.append("k, v; queries of experts")
    if "attn.q_gate" in leaves:
        words.append("gated")
    if "attn.q_bias" in leaves:
        words.append("biases")
    if "attn.q_norm" in leaves:
        words.append("q/k norm per head")
    if "attn.q_norm_full" in leaves:
        words.append("q/k norm of the whole projection")
    if "attn.sinks" in leaves:
        words.append("sinks")
    if "attn.pool_kv" in leaves:
        words.append("keys made of several tokens")
    if "attn.index_q" in leaves:
        words.append("an indexer")
    words += [name for leaf, name in STATEFUL.items() if leaf in leaves]
    return ", ".join(words)


def _feed_forward(table: Family) -> str:
    leaves, words = _leaves(table), []
    if "mlp.up" in leaves:
        fused = ", fused" if len(leaves["mlp.up"].leaves) > 1 else ""
        words.append(("gate and up" if "mlp.gate" in leaves else "up and down") + fused)
    if "moe.up" in leaves:
        each = {"experts" in row.name.axes for row in table.rows if "moe.up" in row.leaves}
        words.append(
            "experts, "
            + " or ".join(how for alone, how in ((True, "a tensor each"), (False, "stacked")) if alone in each)
        )
    if "shared.up" in leaves:
        words.append("shared experts")
    return "; ".join(words)


def _also(table: Family) -> str:
    words = []
    if table.extra:
        words.append("multi-token prediction layers")
    for known in table.quantization:
        block = known.get("weight_block_size")
        packed = known.get("format") == "pack-quantized"
        words.append(
            f"FP8, {'×'.join(map(str, block))} blocks"
            if block
            else "4 bits, packed"
            if packed
            else "FP8, a scale for each row"
        )
    if any(
        axis.endswith("/2") for row in table.rows for pattern in row.layouts for path in pattern.axes for axis in path
    ):
        words.append("FP4")
    if len(table.prefixes) > 1:
        words.append(f"names with and without `{table.prefixes[0]}`")
    if table.aside:
        words.append("old buffers kept")
    return "; ".join(words)


# --- the rooms --------------------------------------------------------------------------------------------------------


def tree() -> str:
    """Every room from the top down, and every module in it with the first sentence of its docstring."""
    lines = []
    for package, names in rooms.ORDER.items():
        lines.append(f"{package}/")
        for name in (name for name in names if not name.startswith("__")):
            home = ROOT / package / name
            lines.append(
                f"  {name}/  {sentence(home / '__init__.py')}" if home.is_dir() else _line(home.with_suffix(".py"), 2)
            )
            lines += [_line(path, 4) for path in sorted(home.glob("*.py")) if path.stem != "__init__"]
    for folder in ("scripts", "docs"):
        lines.append(f"{folder}/")
        paths = sorted(path for path in (ROOT / folder).glob("*") if path.is_file() and path.suffix in SUFFIXES)
        lines += [_line(path, 2) for path in paths]
    return "\n".join(["```text", *lines, "```"])


def _line(path: Path, indent: int) -> str:
    return f"{' ' * indent}{path.name:<{28 - indent}}{sentence(path)}"


def sentence(path: Path) -> str:
    """The first sentence that a file says about itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        match = re.search(r'"title": "(.*)"', text)
        return f"JSON Schema: {match[1]}." if match else f"Data: what `scripts/{path.stem}` wrote."
    if path.suffix == ".md":
        return text.partition("\n")[0].lstrip("# ").strip() + "."
    if text.startswith("#!/usr/bin/env bash"):
        words = " ".join(
            line.lstrip("# ") for line in itertools.takewhile("#".__ne__, text.splitlines()[1:]) if line[:1] == "#"
        )
    else:
        words = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", words, maxsplit=1)[0]


# --- the demo ---------------------------------------------------------------------------------------------------------


def session() -> str:
    """What scripts/demo prints, run now."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "demo")
        environment = {
            **os.environ,
            "NO_SETUP": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            [ROOT / "scripts/demo", work],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"scripts/demo failed:\n{done.stdout}")
        # the heartbeat of what takes long
        said = re.sub(r"^[a-z ]+: .* of .* \([0-9]+ %\).*\n", "", done.stdout, flags=re.M)
        text = re.sub(r"\n{3,}", "\n\n", said.replace(str(work), SHOWN_AS).strip())
    return f"```console\n{text}\n```"


NUMBER = r"(?<![\w.])-?(?:[0-9](?:[\w.+-]*\w)?|inf|nan)(?!\w)"


def comparable(text: str) -> str:
    """A session without what depends on the machine or the moment: times, rates, workers, whatever was rounded, text
    made of that.

    What remains must be the same on every CPU: the layout of what is printed, sizes, counts of tensors and files,
    digests.
    """
    text = re.sub(r"(\$ reshard generate [^\n]*\n).*?(\n\$|\n```)", r"\1TEXT\2", text, flags=re.S)
    text = re.sub(r"^numerics .*(?:\n {11,}.*)*", _without_numbers, text, flags=re.M)
    text = re.sub(r", [0-9.]+ s\b", ", T s", text)
    text = re.sub(r"in [0-9.]+ s \([0-9.]+ [kMG]?B/s\)", "in T s (R B/s)", text)
    return re.sub(r"memory while converting at most \S+ MiB \([0-9]+ workers?\)", "memory while converting M", text)


def _without_numbers(check: re.Match[str]) -> str:
    """What the numeric check says, on one line, since long numbers wrap it elsewhere. Every number is of float
    rounding, or a version, but for the rows of the vocabulary: those are the prompts'."""
    lines = re.sub(r"\n {12,}", " ", check[0]).split("\n")
    return "\n".join(line if line.strip().startswith("covered: ") else re.sub(NUMBER, "N", line) for line in lines)


# --- writing ----------------------------------------------------------------------------------------------------------


def facts(known: Mapping[str, Fact]) -> str:
    """A Markdown table of facts of `[model]`, or of a part of it."""
    lines = [f"| `{name}` | {fact.meaning.replace('|', chr(92) + '|')} |" for name, fact in known.items()]
    return "\n".join(("| key | meaning |", "|---|---|", *lines))


def reader() -> str:
    return f"```python\n{(ROOT / 'docs/reader.py').read_text(encoding='utf-8').strip()}\n```"


def schema(kind: type) -> str:
    """The JSON Schema of a type, whose docstring is the title."""
    whole = msgspec.json.schema(kind, ref_template="#/$defs/{name}")
    definitions = whole["$defs"]
    top = definitions.pop(kind.__name__)
    top["title"] = top.pop("description").rstrip(".")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | top | {"$defs": definitions}, indent=1, ensure_ascii=False) + "\n"


RESULTS = {
    "check-table": CheckTableResult,
    "convert": ConvertResult,
    "diff": DiffResult,
    "explain": ExplainResult,
    "fingerprint": Fingerprint,
    "fingerprint-share": Share,
    "inspect": Description,
    "verify": VerifyResult,
}
WHOLE: dict[str, Callable[[], str]] = {
    "docs/rooms.svg": rooms.picture,
    "docs/manifest.schema.json": lambda: schema(Manifest),
    "docs/tensors.schema.json": lambda: schema(Described),
    **{f"docs/json/{name}.schema.json": partial(schema, kind) for name, kind in RESULTS.items()},
}
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/start/tutorial.md": {"session": session},
    "docs/families.md": {"families": family_rows},
    "README.md": {"engines": engine_rows},
    "docs/architecture.md": {"tree": tree},
    "docs/format.md": {"reader": reader},
    "docs/notation.md": {"facts": lambda: facts(FACTS), "routing": lambda: facts(ROUTING)},
}


def part(text: str, name: str) -> tuple[int, int]:
    """Where the generated part of that name stands in a document. Raises ValueError if it has none."""
    opening, closing = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    return text.index(opening) + len(opening), text.index(closing)


def outdated() -> dict[str, str]:
    """Documents that have to be rewritten, with their new text."""
    found = {}
    for document, generate in WHOLE.items():
        path, text = ROOT / document, generate()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            found[document] = text
    for document, parts in PARTS.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        changed = text
        for name, generate in parts.items():
            low, high = part(changed, name)
            new = generate()
            if comparable(changed[low:high]) != comparable(new):
                changed = changed[:low] + new + changed[high:]
        if changed != text:
            found[document] = changed
    return found


def main() -> None:
    found = outdated()
    for document, text in found.items():
        print(document)
        if "--check" not in sys.argv[1:]:
            (ROOT / document).write_text(text, encoding="utf-8")
    sys.exit("--check" in sys.argv[1:] and bool(found))


if __name__ == "__main__":
    main()
