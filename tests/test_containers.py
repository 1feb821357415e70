"""The table of dtypes is the only one, and a container is a module and a row: nothing else asks what kind of file
weights lie in.
"""

import ast
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard.checkpoints import companions
from reshard.containers.container import CONTAINERS, NAMED, of_file
from reshard.containers.dtypes import BITS, BY_TORCH, COMPUTED, CONSTANTS, DTYPES, ROWS
from reshard.containers.entry import Entry, Header
from reshard.containers.values import decode, floating
from reshard.errors import ReshardError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for room in ("reshard", "runtime")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "reshard/runtime" not in str(path)
]
SPELLED = {name for row in ROWS for name in (row.name, row.torch) if name} - {"bool"}


def strings(node: ast.AST) -> set[str]:
    return {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}


def listings() -> Iterator[tuple[str, set[str]]]:
    """Collections and calls in the sources, with the dtypes that they name."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Call)):
                parts = node.args if isinstance(node, ast.Call) else [node]
                yield (
                    f"{path.relative_to(ROOT)}:{node.lineno}",
                    set().union(*(strings(part) & SPELLED for part in parts)),
                )


def test_dtypes_are_listed_in_one_table() -> None:
    """Two dtypes side by side in a collection are the beginning of a second table."""
    found = [where for where, names in listings() if len(names) > 1]
    assert [where for where in found if not where.startswith("reshard/containers/dtypes.py:")] == []
    assert found, "nothing was looked at"


def test_the_table_of_dtypes_needs_neither_numpy_nor_torch() -> None:
    code = "import sys, reshard.containers.dtypes; print(*({'numpy', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_rows_of_dtypes_are_of_one_mind_with_numpy_and_torch() -> None:
    """Sizes, and, of floating-point numbers, the parts of which they are made, as numpy's limits tell them."""
    assert len(DTYPES) + sum(row.name is None for row in ROWS) == len(ROWS) and len(BY_TORCH) == sum(
        bool(row.torch) for row in ROWS
    )
    for row in ROWS:
        if row.code:
            assert np.dtype(f"<{row.code}").itemsize * 8 == row.bits and np.dtype(f"<{row.code}").name == row.torch
        if row.floating and row.name in BITS:
            assert row.bits - row.floating.exponent - row.floating.mantissa in (0, 1), row.name
        if row.floating and row.code:
            limits = np.finfo(f"<{row.code}")
            assert (limits.nexp, limits.nmant, limits.maxexp - 1) == row.floating[:3], row.name
        if row.torch:
            assert getattr(torch, row.torch).itemsize == row.itemsize, row.name
    assert CONSTANTS == ("F32", "F64") and COMPUTED == ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("name", [name for name in DTYPES if floating(name) and BITS[name] <= 16])
def test_every_code_of_a_floating_type_is_worth_what_torch_says(name: str) -> None:
    row = DTYPES[name]
    assert row.torch is not None
    codes = np.arange(1 << row.bits).astype(f"<u{row.bits // 8}")
    wanted = torch.from_numpy(codes.view(np.uint8)).view(getattr(torch, row.torch)).double().numpy()
    np.testing.assert_array_equal(decode(name, codes.tobytes()), wanted)


def test_containers_share_neither_names_nor_suffixes() -> None:
    suffixes = [suffix for container in CONTAINERS for suffix in container.suffixes]
    assert len(NAMED) == len(CONTAINERS) and len(set(suffixes)) == len(suffixes) and "plain" not in NAMED
    for container in CONTAINERS:
        assert of_file(container.single) is container
        assert companions.WEIGHTS.search(container.single) and companions.WEIGHTS.search(container.index)
        assert companions.CHECKPOINT.fullmatch(container.single) and companions.CHECKPOINT.fullmatch(container.index)


def test_a_container_that_is_only_read_is_not_written() -> None:
    for container in CONTAINERS:
        if container.name != "safetensors":
            with pytest.raises(ReshardError, match=r"are read, not written"):
                container.build([], None)


def test_nothing_outside_asks_what_kind_of_file_weights_lie_in() -> None:
    """No comparison with a container's name, no question about a suffix; engines' own habits, of which verify warns,
    are no containers.
    """
    asked = {*NAMED, *(suffix for container in CONTAINERS for suffix in container.suffixes)}
    found = []
    for path in SOURCES:
        if path.parent.name != "containers":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("endswith", "removesuffix")
                compared = (
                    {ast.unparse(side) for side in (node.left, *node.comparators)}
                    if isinstance(node, ast.Compare)
                    else set()
                )
                if (call and asked & strings(node)) or compared & {repr(name) for name in asked}:
                    found.append(str(path.relative_to(ROOT)))
    # What engines glob; and the libraries that read what the numerics check compares with.
    assert found == ["reshard/jobs/verify.py", "runtime/proof/reference.py"]


def test_the_container_of_the_documentation_reads_its_files_and_refuses_truncated_ones() -> None:
    page = (ROOT / "docs/extend/container.md").read_text(encoding="utf-8")
    code = page.partition("<!-- example -->\n```python\n")[2].partition("```\n<!-- /example -->")[0]
    module: dict[str, Any] = {"__name__": "reshard.containers.gguf", "__package__": "reshard.containers"}
    exec(compile(code, "docs/extend/container.md", "exec"), module)
    file = _gguf({"a": ((2, 3), 0, bytes(24)), "b.c": ((5,), 1, b"12345" * 2)}, align=64)

    def read(file: bytes) -> Header:
        return module["read"](lambda length, offset: file[offset : offset + length], len(file), "f.gguf")

    header = read(file)
    assert header.entries == {
        "a": Entry("F32", (2, 3), header.data_start, 24),
        "b.c": Entry("F16", (5,), header.data_start + 64, 10),
    }
    assert file.endswith(b"12345" * 2) and header.data_start % 64 == 0
    for size in range(len(file)):
        with pytest.raises(ReshardError, match=r"^f\.gguf: "):
            read(file[:size])
    with pytest.raises(ReshardError, match="tensor q has the GGML type 2; F32, F16 are read"):
        read(_gguf({"q": ((32,), 2, bytes(18))}))


def _gguf(tensors: dict[str, tuple[tuple[int, ...], int, bytes]], align: int = 32) -> bytes:
    """A file of tensors: shape, GGML type, bytes."""
    text = lambda word: struct.pack("<Q", len(word)) + word.encode()  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2) + text("general.alignment") + struct.pack("<II", 4, align)
    head += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("y")
    data = b""
    for name, (shape, kind, stored) in tensors.items():
        data += bytes(-len(data) % align)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += stored
    return head + bytes(-len(head) % align) + data
