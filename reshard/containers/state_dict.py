"""The state dict in an object of torch.save, and where its tensors lie, given where its storages do.

Knows nothing about pickles and ZIP files.
"""

import math
from collections.abc import Callable
from typing import Any

from ..errors import ReshardError
from ..text.escapes import clip
from .dtypes import BY_TORCH
from .entry import Entry
from .reading import AGAIN
from .torch_values import I63, RESAVE, WRAPPERS, Odd, Storage, Tensor, kind


def state_of(top: Any, where: str) -> dict[str, Tensor | Odd]:
    """The state dict in a file's object."""
    if type(top) is not dict:
        raise ReshardError(
            f"{where}: holds {kind(top)}, not a dict of names and tensors", f"save `model.state_dict()`: {RESAVE}"
        )
    chosen, inside = top, ""
    if not any(_is_tensor(value) for value in top.values()):
        inner = {key: top[key] for key in WRAPPERS if type(top.get(key)) is dict}
        found = [key for key, values in inner.items() if any(_is_tensor(value) for value in values.values())]
        if len(found) > 1:
            raise ReshardError(
                f"{where}: holds {len(found)} state dicts: {', '.join(found)}", f"keep one of them: {RESAVE}"
            )
        if found:
            chosen, inside = top[found[0]], f" in {found[0]}"
    state: dict[str, Tensor | Odd] = {}
    seen: set[int] = set()
    for name, value in chosen.items():
        if type(name) is str and isinstance(value, (Tensor, Odd)):
            state[name] = value
        elif _holds_tensor(value, seen):
            what = kind(value) if _is_tensor(value) else f"{kind(value)} with tensors in it"
            message = f"{where}: {kind(name)}{inside} is {what}; a state dict maps names to tensors"
            raise ReshardError(message, f"give the state dict alone: {RESAVE}")
    return state


def _is_tensor(value: Any) -> bool:
    return type(value) in (Tensor, Odd, Storage)


def _holds_tensor(value: Any, seen: set[int]) -> bool:
    """Whether there is a tensor at any depth. Each list or dict is looked into once: they nest a billionfold."""
    todo = [value]
    while todo:
        item = todo.pop()
        if _is_tensor(item):
            return True
        if type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if type(item) is dict else item)
    return False


def entries_of(
    state: dict[str, Tensor | Odd], place: Callable[[str], tuple[int, int] | None], where: str
) -> dict[str, Entry]:
    """Where each tensor lies, given offset and size of a storage. ReshardError unless each lies within its storage."""
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of tensors, a dozen shapes
    entries: dict[str, Entry] = {}
    for name, tensor in state.items():
        try:
            if isinstance(tensor, Odd):
                raise _Unfit(f"is {tensor.what}; safetensors, and so reshard, has no place for that")
            entries[name] = _entry(tensor, place, shared)
        except ValueError as error:
            hint = RESAVE if isinstance(error, _Unfit) else AGAIN
            raise ReshardError(f"{where}: tensor {kind(name)} {error}", hint) from None
    return entries


class _Unfit(ValueError):
    """A tensor in order, but of a kind that safetensors does not have."""


def _entry(
    tensor: Tensor, place: Callable[[str], tuple[int, int] | None], shared: dict[tuple[int, ...], tuple[int, ...]]
) -> Entry:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    dtype = BY_TORCH[tensor.dtype]
    kind, item = dtype.name, dtype.itemsize
    if kind is None:
        raise _Unfit(f"has the dtype {tensor.dtype}, which safetensors does not have")
    found = place(storage.key)
    if found is None:
        raise ValueError(f"lies in storage {clip(storage.key)}, which the file does not hold")
    begin, held = found
    if storage.whole > held:
        raise ValueError(
            f"lies in storage {clip(storage.key)}, which holds {held} bytes; the pickle says {storage.whole}"
        )
    nbytes = math.prod(shape) * item
    if nbytes > I63:
        raise ValueError(f"of shape {clip(str(shape))} has {nbytes:#x} bytes, more than 2**63 - 1")
    begin += storage.begin
    if nbytes:
        last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * item > storage.nbytes:
            raise ValueError(
                f"needs {(last + 1) * item} bytes of storage {clip(storage.key)}, which has {storage.nbytes}"
            )
        begin += tensor.offset * item
    rows = _row_major(shape, strides)
    if dtype.together > 1:
        if not shape or not rows:
            raise _Unfit(f"has {dtype.together} numbers to a byte ({tensor.dtype}), and does not lie row by row")
        shape = (*shape[:-1], shape[-1] * dtype.together)
    return Entry(
        kind, shared.setdefault(shape, shape), begin, nbytes, None if rows else shared.setdefault(strides, strides)
    )


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another, last index fastest. The stride of an axis of size 1 says nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
