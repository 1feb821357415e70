"""What a pickle of torch.save may hold, as inert values: storages, tensors, and the few names that it may call.

Nothing here imports, calls or reaches anything of the file's choosing. Knows nothing about opcodes or files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..text.escapes import clip
from .dtypes import BY_TORCH

# Limits that no published checkpoint comes near, so that a hostile file costs less than a minute and a few hundred MiB.
# A tensor takes about 150 bytes of pickle, 40 steps, and 100 bytes of zip directory.
MOST_PICKLE = 32 << 20  # bytes
MOST_STEPS = 5_000_000  # opcodes, and items of what functions are given
MOST_DIRECTORY = 32 << 20  # bytes
MOST_LINE = 1024  # bytes of a name, or of a number written as text
MOST_INTEGER = 255  # bytes
_MOST_DIMENSIONS = 64  # as in torch
I63 = 2**63 - 1

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
WRAPPERS = ("state_dict", "model", "module")  # keys under which training scripts put the state dict

RESAVE = "load it with torch in a place that you trust, and save its tensors with safetensors.torch.save_file"
CODE = (
    "a pickle may run any program on the machine that loads it, so reshard reads only tensors in dicts; "
    f"this file holds other objects, or is an attack: {RESAVE}, or ask for safetensors"
)


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle imports; only ever compared."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A window of a storage, in bytes: it begins at `begin` and has `nbytes`; the whole storage has `whole`."""

    dtype: str  # torch's name
    key: str
    begin: int
    nbytes: int
    whole: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; `offset` and `strides` in elements of `dtype`, torch's name."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Odd:
    """A tensor that safetensors cannot hold, and why."""

    what: str


_INERT = Global("an object without content")  # devices, layouts


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Tensor:
    """What torch._utils._rebuild_tensor makes. ValueError for what no writer makes; it may not fit its storage yet."""
    if type(storage) is not Storage:
        raise ValueError(f"a tensor on {kind(storage)}, not a storage")
    for what, sizes in (("offset", (offset,)), ("shape", shape), ("strides", strides)):
        if type(sizes) is not tuple or len(sizes) > _MOST_DIMENSIONS:
            raise ValueError(f"the {what} of a tensor is {kind(sizes)}, not a tuple of up to {_MOST_DIMENSIONS} sizes")
        for size in sizes:
            if type(size) is not int or not 0 <= size <= I63:
                raise ValueError(f"the {what} of a tensor has {kind(size)}, not a number from 0 to 2**63 - 1")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    return Tensor(storage, offset, shape, strides, dtype or storage.dtype)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, flags: Any = None
) -> Tensor | Odd:
    return _flagged(_tensor(storage, offset, shape, strides), flags)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _g: Any, _h: Any, dtype: Any, flags: Any = None
) -> Tensor | Odd:
    name = GLOBALS.get(dtype.name) if type(dtype) is Global else None
    if type(name) is not str:
        raise ValueError(f"the dtype of a tensor is {kind(dtype)}")
    return _flagged(_tensor(storage, offset, shape, strides, name), flags)


def _flagged(tensor: Tensor, flags: Any) -> Tensor | Odd:
    """The flags "conj" and "neg" say that values differ from what is stored."""
    if flags is None or (type(flags) is dict and len(flags) <= _MOST_DIMENSIONS and not any(flags.values())):
        return tensor
    return Odd("stored as the conjugate or the negative of its values")


def _parameter(data: Any, *_rest: Any) -> Any:
    """A tensor with something more: a gradient flag, hooks, attributes, a device to go to."""
    if type(data) is not Tensor and type(data) is not Odd:
        raise ValueError(f"a parameter made of {kind(data)}, not of a tensor")
    return data


def _from_cpu(data: Any, dtype: Any, _device: Any, _grad: Any) -> Any:
    """A tensor of an XLA device, stored on the CPU; torch casts it when it loads."""
    same = type(data) is Tensor and type(dtype) is Global and GLOBALS.get(dtype.name) == data.dtype
    return data if same else Odd("stored in another dtype than its own")


def _from_type(function: Any, cls: Any, args: Any, _state: Any) -> Any:
    """A tensor with Python attributes."""
    if type(function) is not Global or function.name not in _DIRECT:
        raise ValueError(f"a tensor rebuilt by {kind(function)}")
    if type(cls) is not Global or GLOBALS.get(cls.name) is not _CLASS:
        raise ValueError(f"a tensor of the class {kind(cls)}")
    return call(function, args)


def _size(sizes: Any) -> Any:
    if type(sizes) is not tuple:
        raise ValueError(f"a torch.Size of {kind(sizes)}")
    return sizes


def _ordered(*args: Any) -> dict[Any, Any]:
    """An OrderedDict; Python 2 gave it its items as one argument."""
    found: dict[Any, Any] = {}
    if args:
        (pairs,) = args
        if type(pairs) is not list or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"an OrderedDict of {kind(pairs)}, not of pairs")
        fill(found, [item for pair in pairs for item in pair])
    return found


def _inert(*_args: Any) -> Any:
    return _INERT


def _odd(what: str) -> Callable[..., Odd]:
    return lambda *_args: Odd(what)


# Everything that a pickle may name: a storage class (its dtype, in a tuple), a dtype (its name), a tensor class, or
# what stands for a function. The functions above are all that is ever called, and they only sort values.
_CLASS = object()
_STORAGES = [(row.storage, name) for name, row in BY_TORCH.items() if row.storage] + [("Untyped", "uint8")]
GLOBALS: dict[str, object] = {
    **{f"{module}.{kind}Storage": (dtype,) for module in ("torch", "torch.cuda") for kind, dtype in _STORAGES},
    **{f"torch.storage.{kind}": ("uint8",) for kind in ("UntypedStorage", "_UntypedStorage")},
    **{f"torch.{dtype}": dtype for dtype in BY_TORCH},
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"), _CLASS),
    **{
        f"torch.{name}": _INERT
        for name in ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
    },
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.device": _inert,
    "torch.serialization._get_layout": _inert,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _odd("quantized by torch"),
    "torch._utils._rebuild_sparse_tensor": _odd("sparse"),
    "torch._utils._rebuild_nested_tensor": _odd("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("on the meta device, without values"),
}
_DIRECT = {name for name in GLOBALS if name.startswith("torch._utils._rebuild_")}


def call(function: Any, args: Any) -> Any:
    """What a pickle's call would make; ValueError unless function and arguments are of the kinds that torch writes."""
    known = GLOBALS.get(function.name) if type(function) is Global else None
    if type(args) is not tuple or not callable(known):
        raise ValueError(f"calls {kind(function)} with {kind(args)}")
    try:
        return known(*args)
    except TypeError:  # all types are checked, so it can only be the number of arguments
        raise ValueError(f"calls {function.name} with {len(args)} arguments") from None


def fill(target: Any, items: list[Any]) -> None:
    """Put keys and values in a dict. Hashes of tuples, floats and long integers are slow or can be made to collide."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f"puts {len(items)} keys and values into {kind(target)}")
    for at in range(0, len(items), 2):
        key = items[at]
        if not (type(key) in (str, bytes, bool) or key is None or (type(key) is int and -I63 <= key <= I63)):
            raise ValueError(f"a dict key is {kind(key)}, not a name")
        target[key] = items[at + 1]


def kind(value: Any) -> str:
    """A value for a message; short, and not recursive, whatever it is."""
    if type(value) is Global:
        return clip(value.name)
    if value is None or type(value) in (bool, float, int, str, bytes):
        return clip(hex(value) if type(value) is int and abs(value) > I63 else repr(value))
    return {Storage: "a storage", Tensor: "a tensor", Odd: "a tensor"}.get(type(value), f"a {type(value).__name__}")
