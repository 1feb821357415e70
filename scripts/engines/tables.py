"""From what an engine held to a format table: rows and their words, constants, what the engine requires; the proof.

Nothing is taken from the engine's code. A row is inferred from the one rank that holds everything, its words from two
ranks and two stages; then the table must say exactly what every rank of every load held, under every name.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.jobs import Loaded, label
from reshard.authoring.learn import Array, Learned, Seen, Unlike, held, rows, words
from reshard.errors import ReshardError
from reshard.layout.cut import lay_out, unmet
from reshard.tables import families as known_families
from reshard.tables import formats
from reshard.tables.notation import fold

# what an engine may require of sizes and mesh, tried in this order
CONDITIONS = (
    "tp <= experts",
    "heads * head_dim == hidden",
    "pp == 1",
    "ep == 1",
    "tp <= kv",
    "tp <= ssm_groups",
    "tp <= lk",
    "tp == 1",
    "tp <= 2",
    "tp <= 4",
    "tp <= 1 | pp == 1",
)


@dataclass
class FamilyTable:
    """What was learned of one family."""

    rows: dict[Learned, str] = field(default_factory=dict)  # → words
    constants: list[list[Any]] = field(default_factory=list)
    tied: str = ""
    requires: list[str] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)  # parameter → why no row describes it
    refused: str = ""

    def toml_rows(self) -> list[list[str]]:
        """Rows as a table has them: those that need most logical tensors first, patterns of one name together."""
        merged: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
        for row, word in self.rows.items():
            merged.setdefault((row.name, row.leaves, word), []).append(row.pattern)
        entries = [
            [name, " | ".join(dict.fromkeys(patterns)), " ".join(leaves), *([word] if word else [])]
            for (name, leaves, word), patterns in merged.items()
        ]
        return sorted(entries, key=lambda entry: -len(entry[2].split()))


def learn(loads: Sequence[Loaded], cut: set[str]) -> FamilyTable:
    """The table of one family, from all that was loaded of it."""
    table = FamilyTable()
    by_case: dict[str, dict[str, Loaded]] = defaultdict(dict)
    for load in loads:
        by_case[load.case.name][label(load.mesh)] = load
    for at in sorted(by_case.values(), key=_later):
        if (whole := at.get("tp1")) is None or whole.error:
            continue
        numbers = whole.case.numbers
        seen = rows(whole.ranks[0], numbers)
        if seen.odd:  # it is shown by the proof, which this case then fails
            table.odd |= {fold(name)[0]: f"{why} ({whole.case.name})" for name, why in seen.odd.items()}
            continue
        stages = at.get("tp1-pp2")
        two = at.get("tp2") or at.get("tp4")
        for row in seen.rows:
            for named in _by_tie(row, whole, stages):
                if named.leaves in (("embed",), ("head",)) and any(one.leaves == named.leaves for one in table.rows):
                    continue
                try:
                    word = [] if two is None or two.error else words(row, two.ranks, numbers, cut).split()
                except Unlike as unlike:
                    table.odd[fold(row.name)[0]] = f"{unlike} ({whole.case.name})"
                    continue
                if "{layer}" not in named.name and "layer" not in named.pattern.split():
                    word += _stage(named, stages)
                table.rows.setdefault(named, " ".join(word))
        _constants(table, seen, whole)
        if whole.case.source.layout.model.alias and not table.tied:
            kept = [row.name for row in seen.rows if row.leaves == ("embed",)]
            heads = [row.name for row in table.rows if row.leaves == ("head",)]
            embeds = [row.name for row in table.rows if row.leaves == ("embed",)]
            if kept and heads and kept[0] == heads[0] and kept[0] not in embeds:
                table.tied = "head"
            elif kept:
                table.tied = "embed"
    return table


def _later(at: Mapping[str, Loaded]) -> tuple[bool, bool]:
    """Cases from which most is learned come first: loaded in two stages, with a head of their own."""
    stages = at.get("tp1-pp2")
    model = next(iter(at.values())).case.source.layout.model
    return stages is None or bool(stages.error), bool(model.alias)


def _by_tie(row: Learned, whole: Loaded, stages: Loaded | None) -> list[Learned]:
    """A row of tied embeddings as one of the embeddings, one of the head, or both: stages tell them apart."""
    if row.leaves != ("embed",) or not whole.case.source.layout.model.alias:
        return [row]
    head = Learned(row.name, row.pattern, ("head",))
    if stages is None or stages.error:
        return [row, head]
    of = [_holding_embeddings(rank, whole) for rank in (stages.ranks[0], stages.ranks[-1])]
    found = [Learned(name, row.pattern, ("head",)) for name in of[1]]
    return found + [Learned(name, row.pattern, ("embed",)) for name in of[0] if name not in of[1] or of[0] == of[1]]


def _holding_embeddings(parameters: Mapping[str, Array], whole: Loaded) -> list[str]:
    first = whole.case.numbers.first["embed"]
    return [
        name
        for name, values in parameters.items()
        if values.ndim == 2 and values.size and float(values.flat[0]) == first
    ]


def _stage(row: Learned, stages: Loaded | None) -> list[str]:
    if stages is None or stages.error:
        return ["first"] if row.leaves[0].startswith(("embed", "pos_embed", "ple")) else ["last"]
    there = [row.name in rank for rank in stages.ranks]
    return ["every"] if all(there) else ["first"] if there[0] else ["last"]


def _constants(table: FamilyTable, seen: Seen, whole: Loaded) -> None:
    tensors = whole.case.source.layout.model.tensors
    layers: dict[str, set[int]] = defaultdict(set)
    for name, tensor in tensors.items():
        layers[name.partition("@")[0]] |= set(tensor.layers or ())
    order = sorted({leaf for row in table.rows for leaf in row.leaves}, key=lambda leaf: (leaf != "attn.o", leaf))
    for name, (value, at) in seen.scalars.items():
        if any(entry[0] == name for entry in table.constants):
            continue
        beside = next((leaf for leaf in order if sorted(layers[leaf]) == list(at)), None)
        if beside is None:
            table.odd[name] = f"a scalar {value} in layers {at}, as no logical tensor ({whole.case.name})"
        else:
            table.constants.append([name, "F32", value, beside])


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the table made of one load: "held", "refused" by both or by the table alone, or what is wrong."""

    load: Loaded
    word: str
    why: str = ""


def prove(table: formats.Format, loads: Iterable[Loaded]) -> list[Outcome]:
    """Every rank of every load, name by name and element by element."""
    found = [_proven(table, load) for load in loads]
    names = [_stored(one.load) for one in found if one.word == "held"]
    return [_excused(one, names) for one in found]


def _stored(load: Loaded) -> frozenset[str]:
    layout = load.case.source.layout
    return frozenset(slot.name(point) for slot in layout.slots for point in slot.points())


def _excused(one: Outcome, names: Sequence[frozenset[str]]) -> Outcome:
    """What the engine does not read the ordinary way proves nothing of what it would read from shards: a spelling of
    tensors that are proven under other names, a head made or left out that no published checkpoint of the family has.
    """
    if one.word not in ("differs", "unloadable"):
        return one
    case = one.load.case
    made = case.name.endswith(("-tied", "-untied"))
    own = _stored(one.load)
    if made or (own not in names and any(own & other for other in names) and _same_tensors(one, names)):
        return Outcome(one.load, "unproven", one.why)
    return one


def _same_tensors(one: Outcome, names: Sequence[frozenset[str]]) -> bool:
    """Whether another spelling is stacked experts, or experts apart."""
    own = _stored(one.load)
    return all(any("experts" in name for name in own ^ other) for other in names)


def _proven(table: formats.Format, load: Loaded) -> Outcome:
    model = load.case.source.layout.model
    try:
        own = table.for_family(load.case.family)
        layout = lay_out(own, model, load.mesh)
    except ReshardError as error:
        words = " ".join(error.message.split())
        return Outcome(load, "refused", f"engine: {load.error}; table: {words}" if load.error else f"table: {words}")
    if load.error:
        return Outcome(load, "unloadable", load.error)
    wanted: dict[tuple[int, str], Array] = {
        (rank, name): values for rank, name, values in held(layout, load.case.numbers)
    }
    for slot in layout.constants:
        for point in slot.points():
            wanted[slot.rank, slot.name(point)] = np.array(slot.template.value)  # type: ignore[union-attr]
    found = {(rank, name): values for rank, parameters in enumerate(load.ranks) for name, values in parameters.items()}
    if missing := sorted(found.keys() - wanted.keys()):
        return Outcome(load, "differs", f"rank {missing[0][0]} holds {missing[0][1]} too, and {len(missing) - 1} more")
    if beyond := sorted(wanted.keys() - found.keys()):
        return Outcome(load, "differs", f"rank {beyond[0][0]} holds no {beyond[0][1]}, and {len(beyond) - 1} more")
    for (rank, name), values in found.items():
        ours = wanted[rank, name]
        if ours.shape != values.shape:
            return Outcome(load, "differs", f"{name} of rank {rank}: {values.shape}, not {ours.shape}")
        if (np.asarray(values, np.float64) != ours).any():
            return Outcome(load, "differs", f"{name} of rank {rank}: other elements")
    return Outcome(load, "held")


def requirements(outcomes: Sequence[Outcome]) -> list[str] | None:
    """Conditions that are false for whatever the engine does not load as the table says, and true for what it does;
    None where there are none.
    """
    good = [one.load for one in outcomes if one.word == "held"]
    bad = [one.load for one in outcomes if one.word in ("unloadable", "differs")]
    if not bad:
        return []

    def says(condition: str, load: Loaded) -> bool:
        return not unmet((condition,), load.case.source.layout.model, load.mesh)

    usable = [text for text in CONDITIONS if all(says(text, load) for load in good)]
    for count in (1, 2, 3):
        for some in itertools.combinations(usable, count):
            if all(any(not says(text, load) for text in some) for load in bad):
                return list(some)
    usable = list(CONDITIONS)  # then some that could be loaded are refused too
    for count in (1, 2):
        some_ = itertools.combinations(usable, count)
        fit = [some for some in some_ if all(any(not says(text, load) for text in some) for load in bad)]
        kept = {some: sum(all(says(text, load) for text in some) for load in good) for some in fit}
        if best := max(kept, key=lambda some: kept[some], default=None):
            return list(best) if kept[best] else None
    return None


# --- writing ----------------------------------------------------------------------------------------------------------


def text_of(
    head: str, common: Sequence[list[str]], families: Mapping[str, FamilyTable], base: Mapping[str, Any]
) -> str:
    """The TOML of a format: the head with the common rows and the families in it, and for each what differs."""
    before, _, rest = head.partition("rows = [\n")
    after = rest[rest.index("\n]\n") + 3 :]
    there = {word for row in common for word in re.findall(r"[a-z_]\w*", row[1])}
    there |= {
        word for table in families.values() for row in table.rows for word in re.findall(r"[a-z_]\w*", row.pattern)
    }
    for mesh, axes in base["cut"].items():  # only axes that some row has
        kept = json.dumps([axis for axis in axes if axis in there or axis == "layer"])
        after = re.sub(rf"(?m)^{mesh} = .*$", f"{mesh} = {kept}", after)
    named = f"families = {json.dumps(sorted(families))}\n"
    lines = [before + named + "rows = [", *_listed(common), "]" + "\n" + after.rstrip()]
    for name, table in sorted(families.items()):
        own = [row for row in table.toml_rows() if row not in common or _shadowed(row, common, table)]
        section = []
        if left := _left_out(name, table, common):
            section.append(f"without = {json.dumps(left)}")
        if table.requires:
            section.append(f"requires = {json.dumps(table.requires)}")
        if table.tied and table.tied != base.get("tied"):
            section.append(f'tied = "{table.tied}"')
        wanted = sorted(map(tuple, table.constants))
        if wanted != sorted(map(tuple, base["constants"])) and (wanted or _has(table, "attn.o")):
            section += ["constants = [", *(f" {json.dumps(list(one))}," for one in wanted), "]"]
        if own:
            section += ["rows = [", *_listed(own), "]"]
        if section:
            lines += [f"[family.{name}]", *section]
    return "\n".join(lines) + "\n"


def parsed(
    head: str, common: Sequence[list[str]], families: Mapping[str, FamilyTable], base: Mapping[str, Any]
) -> formats.Format:
    """The format as a reader has it."""
    return formats.parse(text_of(head, common, families, base), "learned.toml")


def why_not(table: FamilyTable, loads: Sequence[Loaded]) -> str:
    """Why a family has no table, or nothing."""
    if not loads:
        return "no checkpoint of the tests that can be numbered"
    if not table.rows and table.odd:
        return "; ".join(f"{name}: {why}" for name, why in list(table.odd.items())[:2])
    if not table.rows:
        return next((f"{load.case.name}: {load.error}" for load in loads if load.error), "nothing was loaded")
    return ""


def _left_out(name: str, table: FamilyTable, common: Sequence[list[str]]) -> list[str]:
    """Common rows of tensors that the family may have, and that the engine was not seen to hold."""
    may = {leaf.partition("@")[0] for row in known_families.load(name).rows for leaf in row.leaves}
    own = table.toml_rows()
    stored = {leaf for row in own for leaf in row[2].split()}
    return [row[0] for row in common if set(row[2].split()) <= may - stored and row not in own]


def _shadowed(row: list[str], common: Sequence[list[str]], table: FamilyTable) -> bool:
    """Whether a common row before this one would take its tensors, though the family stores them otherwise."""
    own, leaves = table.toml_rows(), set(row[2].split())
    return any(
        other not in own and leaves & set(other[2].split()) and all(_has(table, leaf) for leaf in other[2].split())
        for other in common[: common.index(row)]
    )


def _has(table: FamilyTable, leaf: str) -> bool:
    return any(leaf in row.leaves for row in table.rows)


def _listed(entries: Sequence[list[str]]) -> list[str]:
    quoted = [[json.dumps(word) for word in entry] for entry in entries]
    first = min(max((len(entry[0]) for entry in quoted), default=0), 72)
    return [f" [{entry[0] + ',':<{first + 1}} {', '.join(entry[1:])}]," for entry in quoted]


def common_rows(families: Mapping[str, FamilyTable], kept: Sequence[list[str]]) -> list[list[str]]:
    """Rows that several families have, after those that are common already; of one logical tensor the most frequent."""
    count: dict[str, int] = defaultdict(int)
    for table in families.values():
        for row in table.toml_rows():
            count[json.dumps(row)] += 1
    taken = {row[2] for row in kept}
    found = list(kept)
    for text, times in sorted(count.items(), key=lambda one: (-one[1], one[0])):
        row = json.loads(text)
        if times >= 3 and row[2] not in taken:
            taken.add(row[2])
            found.append(row)
    return found
