"""Hugging Face files cut anew: the files, headers and index that transformers' `save_pretrained(max_shard_size=…)`
writes.

Knows nothing about checkpoints, layouts or disks: names, dtypes and shapes in, header bytes out. Read from and tested
against transformers 5.23, huggingface_hub 2.4 and safetensors 0.8; equality is byte for byte, given equal tensor
values.

What decides the bytes
    which tensors    A tied head is not written: the embedding stays, as `_tied_weights_keys` says. Buffers that are not
                     persistent (rotary `inv_freq`, causal masks) never are, and layers that the class does not load
                     (multi-token prediction) are gone. The caller passes the tensors to be written, and no others.
    order            Decides which tensor falls into which file, and nothing else: that of a model that was loaded, by
                     names in memory, numbers as numbers (`loaded_order`), since `from_pretrained` leaves a list of
                     conversions, if only an empty one, and with a list `revert_weight_conversion` sorts. (A model built
                     from its config may be saved in another order.)
    filling          In order, into the one open file while it has room; a size is that of the tensor's bytes, headers
                     are not counted, exactly full is full. What is larger than the limit gets a file of its own,
                     numbered at once: *before* the open file, which stays open for what follows.
    stacked experts  transformers 5 holds a layer's experts stacked, and saves views of the stack. Views of one storage
                     are counted once, at the first, with the bytes of them all, and never parted: all `experts.*.w1` of
                     a layer are one block. (If the layer has one expert, w1 and w3 are: to cut that stack in halves
                     nothing had to be copied.)
    names            `model-00001-of-00003.safetensors`; one file is `model.safetensors` and has no index.
    inside a file    As safetensors lays tensors (`library_order`), `__metadata__` {"format": "pt"}, header padded to 8
                     bytes.
    index            JSON: keys sorted, two spaces, ASCII, a newline at the end. `total_size`: bytes of all tensors,
                     without headers. `total_parameters`: elements of all parameters, tied ones once, without buffers
                     (`e_score_correction_bias`).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..containers.container import of_file
from ..containers.dtypes import BITS
from ..containers.entry import Entry
from ..errors import ReshardError
from ..inputs.limits import DIGITS

# last parts of names that transformers saves without counting them as parameters
BUFFERS = ("e_score_correction_bias",)

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?)\s*(?:([KMGT])(I?))?B?", re.ASCII | re.IGNORECASE)
_EXPERT = re.compile(r"(.*\.experts\.)([0-9]+)\.(.*)", re.ASCII)
# An expert's projection → the stacked parameter that holds it in memory, and which part of that.
_STACKS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}


@dataclass(frozen=True)
class HfFile:
    """One file to be written: `header` is the length word and the JSON, 8 + N bytes; `tensors` lie after it in this
    order.
    """

    name: str
    header: bytes
    tensors: tuple[tuple[str, Entry], ...]


@dataclass
class _Block:
    """Tensors that are never parted, and their bytes."""

    names: list[str]
    nbytes: int = 0


def resplit(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_file_size: int, buffers: Collection[str] = BUFFERS
) -> tuple[tuple[HfFile, ...], bytes | None]:
    """The files, and the bytes of `model.safetensors.index.json` (None where one file holds everything).

    `tensors`: (name, dtype, shape) in the order of `loaded_order`. `max_file_size`: bytes of tensors in a file.
    `buffers`: last parts of names that are no parameters. Raises ReshardError where there is nothing to write, or a
    name comes twice.
    """
    described = {name: (dtype, shape) for name, dtype, shape in tensors}
    if len(described) < len(tensors):
        name, count = Counter(name for name, _, _ in tensors).most_common(1)[0]
        raise ReshardError(f"{name}: {count} tensors of one name cannot be written to one checkpoint")
    if not described:
        raise ReshardError("no tensors to write: the checkpoint would be empty")
    if unknown := sorted(name for name, dtype, _ in tensors if dtype not in BITS):
        raise ReshardError(f"{unknown[0]}: dtype {described[unknown[0]][0]} cannot be stored as safetensors")
    filled = _fill(_blocks(tensors), max_file_size)
    files: list[HfFile] = []
    for number, names in enumerate(filled, 1):
        name = "model.safetensors" if len(filled) == 1 else f"model-{number:05d}-of-{len(filled):05d}.safetensors"
        container = of_file(name)
        header, parsed = container.build(container.order((key, *described[key]) for key in names), {"format": "pt"})
        files.append(HfFile(name, header, tuple(parsed.entries.items())))
    if len(files) == 1:
        return tuple(files), None
    index = {
        "metadata": {
            "total_parameters": sum(
                math.prod(shape) for name, (_, shape) in described.items() if name.rpartition(".")[2] not in buffers
            ),
            "total_size": sum(entry.nbytes for file in files for _, entry in file.tensors),
        },
        "weight_map": {name: file.name for file in files for name, _ in file.tensors},
    }
    return tuple(files), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _blocks(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[_Block]:
    """Tensors by the storage that they share, storages in the order of their first tensor."""
    keyed = [(_EXPERT.fullmatch(name), name, dtype, shape) for name, dtype, shape in tensors]
    experts = Counter((match[1], match[3]) for match, *_ in keyed if match)
    blocks: dict[object, _Block] = {}
    for match, name, dtype, shape in keyed:
        key: object = name
        if match:
            stack = _stack(match[3])
            key = (match[1], stack[0] if stack and experts[match[1], match[3]] == 1 else match[3])
        block = blocks.setdefault(key, _Block([]))
        block.names.append(name)
        block.nbytes += math.prod(shape) * BITS[dtype] // 8
    return list(blocks.values())


def _fill(blocks: Iterable[_Block], limit: int) -> list[list[str]]:
    """Names of each file, in the order of their numbers."""
    files: list[list[str]] = []
    opened: list[str] = []
    used = 0
    for block in blocks:
        if block.nbytes > limit:
            files.append(block.names)
            continue
        if used + block.nbytes > limit:
            files.append(opened)
            opened, used = [], 0
        opened.extend(block.names)
        used += block.nbytes
    return [*files, opened] if opened else files


def loaded_order(names: Iterable[str]) -> list[str]:
    """`names` as transformers orders them in a model that `from_pretrained` read:
    by the names that they have in memory.
    """
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, int, str, int]], int, int]:
    """`dot_natural_key` of the in-memory name; then the part of a stacked parameter, then the expert."""
    name = re.sub(r"^embed_out\.", "lm_head.", name).replace(".block_sparse_moe.", ".mlp.")
    part = expert = 0
    match = _EXPERT.fullmatch(name)
    if match and (stack := _stack(match[3])):
        name, part, expert = match[1] + stack[0], stack[1], _value(match[2]) or 0
    return [_word(word) for word in name.split(".")], part, expert


def _stack(tail: str) -> tuple[str, int] | None:
    """`gate_proj.weight_scale_inv` → `gate_up_proj_scale_inv`, part 0; None for what is not stacked."""
    projection, _, kind = tail.partition(".")
    if projection not in _STACKS or kind not in ("weight", "weight_scale_inv"):
        return None
    stack, part = _STACKS[projection]
    return stack + kind.removeprefix("weight"), part


def _word(word: str) -> tuple[int, int, str, int]:
    """Numbers first, by value; then words, by their letters, then without a trailing number before with one,
    then by that.
    """
    if (value := _value(word)) is not None:
        return 0, value, "", 0
    text = word.rstrip("0123456789")
    end = _value(word[len(text) :])
    return (1, 0, word, -1) if end is None else (1, 0, text, end)


def _value(digits: str) -> int | None:
    """What digits are worth, leading zeros or not; None for what is none, or longer than any number in a name."""
    return int(digits) if re.fullmatch(f"[0-9]{{1,{DIGITS}}}", digits) else None


def parse_size(text: str) -> int:
    """Bytes from "5GB" (decimal, as transformers reads it), "500MB", "1.5GiB" (binary) or plain digits; at least 1,
    else ReshardError.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        unit = (1024 if match[3] else 1000) ** _UNITS[match[2].upper()] if match[2] else 1
        size = int(match[1]) * unit if "." not in match[1] else int(float(match[1]) * unit)
    if size < 1:
        raise ReshardError(
            f'"{text}" is not a file size',
            'write "5GB" (5·10⁹ bytes), "500MB", "5GiB" (5·2³⁰ bytes) or a number of bytes',
        )
    return size
