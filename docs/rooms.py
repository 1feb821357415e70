"""The rooms of the code: packages in the order in which they may import one another, and a picture of them drawn from
the imports.

python docs/rooms.py            writes docs/rooms.svg
python docs/rooms.py --check    lists imports that run upwards or in a circle; exit 1 if there are any

Every import counts: those inside functions, those for type checkers, and `import_module("…")` of a constant.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/rooms.svg"

# From the top down; a room imports from rooms below it, and from itself. What is not named here is a module at the top
# of its package.
ORDER = {
    "reshard": (
        "__main__",
        "cli",
        "__init__",
        "api",
        "authoring",
        "jobs",
        "checkpoints",
        "engine",
        "store",
        "layout",
        "model",
        "tables",
        "containers",
        "inputs",
        "threads",
        "errors",
        "text",
    ),
    "runtime": (
        "__main__",
        "__init__",
        "proof",
        "job",
        "statistics",
        "generate",
        "load",
        "described",
        "resharded",
        "cast",
        "model",
        "mapped",
        "comm",
        "prompts",
        "text",
        "template",
        "sampling",
        "memory",
        "dtypes",
    ),
}

# Modules that start the runtime; they import it by name, when asked to. A room does as well: authoring, which tries
# tables on models.
STARTERS = ("reshard.cli.generate", "reshard.api")


class Import(NamedTuple):
    """`module` imports `target`, both dotted; `typing`: for type checkers alone."""

    module: str
    target: str
    typing: bool


def modules() -> dict[str, Path]:
    """Every module by its dotted name, `reshard.runtime.load` for runtime/load.py."""
    found = {}
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("reshard", "runtime"):  # the link
                found[".".join(("reshard", *parts) if package == "runtime" else parts)] = path
    return found


def imports() -> Iterator[Import]:
    """Every import of one of our modules by another."""
    known = modules()
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        checked = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            for target in _targets(node, package):
                if (resolved := _resolved(target, known)) not in (None, name):
                    yield Import(name, str(resolved), id(node) in checked)


def _targets(node: ast.AST, package: list[str]) -> Iterator[str]:
    """What a node may import, dotted; of `from x import y` both x.y and x may be meant."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = (
            ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            if node.level
            else node.module
        )
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
        yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _resolved(target: str, known: dict[str, Path]) -> str | None:
    """The module that is meant: `a.b.c` is c of a.b, or the module itself."""
    for name in (target, target.rpartition(".")[0]):
        for module in (name, f"{name}.__init__"):
            if module in known:
                return module
    return None


def room(module: str) -> tuple[str, str]:
    """(top-level package, room): ("reshard", "layout") of reshard.layout.mesh, ("runtime", "load") of
    reshard.runtime.load.
    """
    parts = module.split(".")[1:]
    if parts[0] == "runtime":
        return "runtime", parts[1]
    return "reshard", parts[0]


def faults() -> list[str]:
    """Imports that run upwards, and circles of modules; sentences for the person who wrote them."""
    found, below = [], defaultdict(set)
    for one in sorted(set(imports())):
        (top, mine), (other, theirs) = room(one.module), room(one.target)
        for package, name in ((top, mine), (other, theirs)):
            if name not in ORDER[package]:
                found.append(f"{package}/{name}: is no room of docs/rooms.py")
        if one.target.endswith("__init__") and other == top:
            continue  # the version, and what a package hands on
        if (top, other) == ("reshard", "runtime"):
            if one.module not in STARTERS and mine != "authoring":
                found.append(f"{one.module} imports {one.target}: only {' and '.join(STARTERS)} start the runtime")
        elif (
            top == other
            and mine in ORDER[top]
            and theirs in ORDER[top]
            and ORDER[top].index(mine) > ORDER[top].index(theirs)
        ):
            found.append(f"{one.module} imports {one.target}: {theirs} is above {mine}")
        if not one.typing:
            below[one.module].add(one.target)
    order: set[str] = set()
    left = set(modules())
    while ready := {name for name in left if below[name] - {name} <= order}:
        order |= ready
        left -= ready
    if left:
        found.append(f"in a circle, or above one: {', '.join(sorted(left))}")
    return found


# --- the picture ------------------------------------------------------------------------------------------------------

WIDTH, ROW, GAP, LABEL = 960, 58, 14, 16


def about(package: str, name: str) -> tuple[str, list[str]]:
    """The first sentence that a room says about itself, and the modules in it."""
    home = ROOT / package / name
    path = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    inside = sorted(module.stem for module in home.glob("*.py") if module.stem != "__init__") if home.is_dir() else []
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0], inside


def picture() -> str:
    """An SVG: a box for each room, the lower ones below; a line on the right for each room that imports another."""
    edges = {(room(one.module), room(one.target)) for one in imports() if not one.target.endswith("__init__")}
    shown = [
        (package, name) for package in ("runtime", "reshard") for name in ORDER[package] if not name.startswith("__")
    ]
    top = {place: GAP + number * (ROW + GAP) for number, place in enumerate(shown)}
    lines, width = [], 560
    colour = {"runtime": "#e8eefc", "reshard": "#eef6ea"}
    for (package, name), y in top.items():
        what, inside = about(package, name)
        folder = f"{package}/{name}" + ("/" if inside else ".py")
        lines.append(
            f'<rect x="10" y="{y}" width="{width}" height="{ROW}" rx="6" fill="{colour[package]}" stroke="#8a9a8a"/>'
        )
        lines.append(f'<text x="20" y="{y + 18}" font-weight="bold">{escape(folder)}</text>')
        lines.append(f'<text x="20" y="{y + 34}">{escape(_short(what, 88))}</text>')
        lines.append(f'<text x="20" y="{y + 50}" fill="#666">{escape(_short(", ".join(inside), 96))}</text>')
    targets = sorted(
        {other for one, other in edges if one != other and one in top and other in top}, key=top.__getitem__
    )
    for lane, target in enumerate(targets):
        x = width + 24 + lane * 16
        users = sorted(
            (one for one, other in edges if other == target and one != other and one in top), key=top.__getitem__
        )
        at = [top[one] + 12 + lane * 2 % 40 for one in users]
        end = top[target] + ROW // 2
        low, high = min([*at, end]), max([*at, end])
        lines.append(f'<path d="M{x} {low}V{high}" stroke="#7a8a9a" fill="none"/>')
        lines += [f'<path d="M{width + 10} {y}H{x}" stroke="#c5ced6" fill="none"/>' for y in at]
        lines.append(f'<path d="M{x} {end}H{width + 12}" stroke="#33475b" fill="none" marker-end="url(#tip)"/>')
    height = GAP + len(shown) * (ROW + GAP)
    box = f"0 0 {width + 40 + 16 * len(targets)} {height}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="11">'
    tip = '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    tip += '<path d="M0 0L6 3L0 6z" fill="#33475b"/></marker></defs>'
    return "\n".join([head, tip, *lines, "</svg>", ""])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def main() -> None:
    if "--check" in sys.argv[1:]:
        found = faults()
        print(*found, sep="\n")
        sys.exit(bool(found))
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
