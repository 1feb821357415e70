"""In a file of torch.save we find what torch.load finds, runs nothing that the file asks for, and refuses the rest."""

import argparse
import collections
import contextlib
import copyreg
import io
import marshal
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from running import lines_run

from reshard.containers import torch_values, torch_zip, unpickle
from reshard.containers.dtypes import BITS, BY_TORCH
from reshard.containers.entry import Entry
from reshard.errors import PlaceError, ReshardError

FORMATS = ("zip", "legacy")
MAGIC = 0x1950A86A20F9469CFC6C

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def read(file: bytes) -> dict[str, Entry]:
    """What pickled.read finds; whatever it refuses, it refuses in form, and whatever it finds lies within the file."""
    try:
        found = torch_zip.read(lambda length, offset: file[offset : offset + length], len(file), "f.bin").entries
    except ReshardError as error:
        assert (
            type(error) is ReshardError
            and error.message.startswith("f.bin: ")
            and error.hint
            and len(error.message) < 1200
        )
        raise
    for entry in found.values():
        item = 1 if entry.dtype == "F4" else BITS[entry.dtype] // 8
        last = sum((size - 1) * stride for size, stride in zip(entry.shape, entry.strides or (), strict=False)) * item
        assert entry.offset >= 0 and entry.nbytes == int(np.prod(entry.shape, dtype=object)) * BITS[entry.dtype] // 8
        assert not entry.nbytes or entry.offset + (last + item if entry.strides else entry.nbytes) <= len(file)
    return found


def refused(file: bytes, *words: str) -> str:
    with pytest.raises(ReshardError) as caught:
        read(file)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    return caught.value.message


def save(obj: Any, form: str, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(obj, out, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    return out.getvalue()


def stored(file: bytes, entry: Entry) -> bytes:
    """The tensor's elements in row-major order, taken from the file as `offset` and `strides` say."""
    if not entry.nbytes:
        return b""
    if entry.strides is None:
        return file[entry.offset : entry.offset + entry.nbytes]
    item = BITS[entry.dtype] // 8
    data = np.frombuffer(file, np.uint8, offset=entry.offset)
    strides = [stride * item for stride in entry.strides]
    return np.lib.stride_tricks.as_strided(data, (*entry.shape, item), (*strides, 1)).tobytes()


def values(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().contiguous()
    return bytes(tensor.untyped_storage())[tensor.storage_offset() * tensor.element_size() :][: tensor.nbytes]


def same(file: bytes, state: dict[str, torch.Tensor]) -> dict[str, Entry]:
    """The entries of the file, after comparing all of them with torch's own tensors."""
    found = read(file)
    assert list(found) == list(state)
    for name, tensor in state.items():
        entry = found[name]
        assert BY_TORCH[str(tensor.dtype).removeprefix("torch.")].name == entry.dtype, name
        assert entry.shape == tuple(tensor.shape) and entry.nbytes == tensor.nbytes, name
        # torch, too, calls a tensor contiguous if the strides of axes of size 1 are all that is odd.
        assert entry.strides == (None if tensor.is_contiguous() else tensor.stride()), name
        assert stored(file, entry) == values(tensor), name
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bits in each element but the booleans."""
    made = np.random.default_rng(seed).integers(0, 256, (*shape, torch.empty((), dtype=dtype).element_size()), np.uint8)
    return torch.from_numpy(made % 2 if dtype == torch.bool else made).view(dtype).reshape(shape)


# --- files as torch writes them ---------------------------------------------------------------------------------------

PLAIN = [getattr(torch, name) for name, row in BY_TORCH.items() if row.name and row.together == 1]


def test_dtypes_are_all_that_torch_saves_with_its_sizes_and_the_library_s_names():
    known = {str(dtype): dtype for dtype in (*torch.storage._dtype_to_storage_type_map(), *torch.storage._new_dtypes())}
    assert {f"torch.{name}" for name in BY_TORCH} == set(known)
    for name, row in BY_TORCH.items():
        kind, item = row.name, row.itemsize
        dtype = getattr(torch, name)
        assert dtype.itemsize == item, name
        tensor = torch.zeros(2, item, dtype=torch.uint8).view(dtype) if "q" not in name else None
        if kind is not None:
            assert safetensors.deserialize(safetensors.torch.save({"a": tensor}))[0][1]["dtype"] == kind, name
            assert BITS[kind] == (4 if kind == "F4" else 8 * item), name
        elif tensor is not None:
            with pytest.raises((KeyError, TypeError, ValueError, safetensors.SafetensorError)):
                safetensors.torch.save({"a": tensor})


def test_each_storage_class_has_torch_s_dtype():
    for dtype, name in torch.storage._dtype_to_storage_type_map().items():
        assert torch_values.GLOBALS[f"torch.{name}"] == (str(dtype).removeprefix("torch."),)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_each_dtype_is_found_bit_for_bit_in_every_pickle_protocol(form, protocol):
    state = {str(dtype): noise(3, 5, dtype=dtype, seed=at) for at, dtype in enumerate(PLAIN)}
    same(save(state, form, protocol), state)


def views() -> dict[str, torch.Tensor]:
    base = noise(6, 8, 10)
    flat = noise(64, dtype=torch.bfloat16)
    return {
        "whole": base,
        "tied": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 0, 2),
        "row": base[3],
        "column": base[:, 2, 5],
        "window": base[1:4, 2:6, 3:9],
        "every third": base[::2, 1::3, ::4],
        "one element": base[2, 3, 4],
        "expanded": base[0, :, :1].expand(8, 7),
        "all expanded": base[5, 7, 9].expand(2, 3, 4),
        "axis of one": base[:, 4:5, :],
        "overlapping": torch.as_strided(base, (5, 4), (3, 2), 17),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "empty view": base[6:],
        "empty and strided": base.transpose(0, 1)[:, 6:],
        "tail": flat[60:],
        "reinterpreted": flat.view(torch.int16)[3:7],
        "channels last": noise(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_views_share_their_storage_and_keep_offset_and_strides(form):
    state = views()
    if form == "legacy":
        del state["reinterpreted"]  # torch itself refuses to write two dtypes of one storage
    else:
        state["reinterpreted"] = noise(7, dtype=torch.int16)
    found = same(save(state, form), state)
    assert found["whole"] == found["tied"] and found["whole"].strides is None
    assert found["row"].offset == found["whole"].offset + 3 * 80 * 4
    assert found["transposed"].offset == found["whole"].offset and found["transposed"].strides == (1, 10, 80)
    assert found["expanded"].strides == (10, 0) and found["all expanded"].strides == (0, 0, 0)
    assert found["scalar"].shape == () and found["scalar"].nbytes == 4


@pytest.mark.parametrize("form", FORMATS)
def test_random_views_agree_with_torch(form):
    rng = random.Random(5)
    base = noise(400, dtype=torch.int16)
    state = {}
    for at in range(60):
        shape = [rng.randrange(0, 5) if rng.random() < 0.2 else rng.randrange(1, 5) for _ in range(rng.randrange(5))]
        strides = [rng.randrange(12) for _ in shape]
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
        state[f"t{at}"] = torch.as_strided(base, shape, strides, rng.randrange(400 - reach))
    same(save(state, form), state)


@pytest.mark.parametrize("form", FORMATS)
def test_parameters_attributes_and_metadata_of_a_module_are_read_past(form):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert state._metadata  # set with the opcode BUILD
    same(save(state, form), dict(state))
    parameters = dict(module.named_parameters(prefix="p"))
    parameters["tagged"] = torch.nn.Parameter(noise(3))
    parameters["tagged"].tag = "an attribute"
    parameters["buffer"] = torch.nn.Buffer(noise(5))
    parameters["attributes"] = noise(2)
    parameters["attributes"].more = {"a": [1]}
    same(save(parameters, form), parameters)


@pytest.mark.parametrize("form", FORMATS)
def test_other_values_are_ignored(form):
    tensors = {"a": noise(2), "b": noise(3)}
    extra = {
        "_metadata": "text",
        "none": None,
        "step": 7,
        "big": 2**80,
        "rate": 0.5,
        "on": True,
        "sizes": torch.Size([3, 4]),
    }
    extra |= {"list": [1, [2]], "dict": {"a": {3: 4}}, "device": torch.device("cuda", 1), "dtype": torch.bfloat16}
    same(save({**extra, **tensors}, form, 2), tensors)
    extra |= {"bytes": b"abc", "array": bytearray(b"abc"), "set": {1, 2}, "frozen": frozenset({1})}
    same(save({**extra, **tensors}, form, 5), tensors)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_wrapped_state_dict_is_found_and_the_optimizer_beside_it_ignored(form, key):
    state = OrderedDict(a=noise(3), b=noise(2, 2).t())
    same(save({"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": noise(3)}}}}, form), state)


def test_a_file_without_tensors_is_empty():
    for form in FORMATS:
        assert read(save({}, form)) == {} == read(save(OrderedDict(epoch=3, model={}), form))


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ([torch.ones(1)], ["holds a list"]),
        (torch.ones(1), ["holds a tensor"]),
        (3, ["holds 3"]),
        ({"model": {"a": torch.ones(1)}, "module": {"b": torch.ones(1)}}, ["2 state dicts: model, module"]),
        ({"model_state_dict": {"a": torch.ones(1)}}, ["'model_state_dict' is a dict with tensors in it"]),
        ({"model": {"language_model": {"a": torch.ones(1)}}}, ["'model' is a dict with tensors in it"]),
        ({"a": torch.ones(1), "more": [[{"b": torch.ones(1)}]]}, ["'more' is a list with tensors in it"]),
        (
            {"module": {"a": torch.ones(1), "more": (torch.ones(1),)}},
            ["'more' in module is a tuple with tensors in it"],
        ),
        ({"a": torch.ones(1), 3: torch.ones(1)}, ["3 is a tensor"]),
        ({"a": torch.ones(1).untyped_storage()}, ["'a' is a storage"]),
    ],
    ids=str,
)
def test_tensors_that_would_be_lost_are_refused(obj, words):
    for form in FORMATS:
        refused(save(obj, form), *words)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        (
            lambda: torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8),
            "quantized",
        ),
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.zeros(2, device="meta"), "meta"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "negative"),
        (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "bits8"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_with_the_tensor_s_name(make, word):
    for form in FORMATS:
        refused(save({"good": torch.ones(1), "layer.odd": make()}, form), "tensor 'layer.odd'", word)
        assert list(read(save({"model": {"good": torch.ones(1)}, "optimizer": [make()]}, form))) == ["good"]


def test_four_bit_floats_have_the_shape_that_safetensors_gives_them():
    packed = noise(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    header = safetensors.deserialize(safetensors.torch.save({"a": packed}))
    for form in FORMATS:
        file = save({"a": packed}, form)
        entry = read(file)["a"]
        assert [("a", {"dtype": entry.dtype, "shape": list(entry.shape), "data": stored(file, entry)})] == header
        refused(save({"a": packed.t()}, form), "tensor 'a'", "2 numbers to a byte")


# --- files that torch writes no longer, or never did ------------------------------------------------------------------


class Name:
    """A global that is written by name, whether or not it exists."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.rpartition(".")

    def __call__(self) -> None: ...  # the pickler asks whether it could


class Pid:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class Call:
    def __init__(self, name: str, *args: Any, state: Any = None) -> None:
        self.parts = (Name(name), args) if state is None else (Name(name), args, state)

    def __reduce__(self) -> Any:
        return self.parts


class Writer(pickle._Pickler):
    """Python's own pickler, in Python, that writes `Name` and `Pid` as they stand."""

    def persistent_id(self, obj: Any) -> Any:
        return (obj.pid if len(obj.pid) > 1 else obj.pid[0]) if isinstance(obj, Pid) else None

    def save_name(self, obj: Name) -> None:
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(b"\x93")
        else:
            self.write(f"c{obj.module}\n{obj.name}\n".encode())

    dispatch: ClassVar = {**pickle._Pickler.dispatch, Name: save_name}


def dump(obj: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Writer(out, protocol).dump(obj)
    return out.getvalue()


def storage(kind: str = "torch.FloatStorage", key: Any = "0", count: Any = 6, *window: Any) -> Pid:
    return Pid("storage", Name(kind), key, "cpu", count, *window)


def tensor(on: Any = None, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), *more: Any) -> Call:
    return Call(
        "torch._utils._rebuild_tensor_v2",
        on or storage(),
        offset,
        shape,
        strides,
        False,
        Call("collections.OrderedDict"),
        *more,
    )


DATA = {"0": struct.pack("<6f", 0, 1, 2, 3, 4, 5)}


def zipped(
    pkl: bytes,
    data: dict[str, bytes] | None = None,
    more: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("any name/data.pkl", pkl)
        for name, content in {"byteorder": b"little", "version": b"3\n", **(more or {})}.items():
            archive.writestr(f"any name/{name}", content)
        for key, content in (DATA if data is None else data).items():
            archive.writestr(f"any name/data/{key}", content)
    return out.getvalue()


def legacy(
    pkl: bytes, data: dict[str, bytes] | None = None, counts: dict[str, int] | None = None, keys: Any = None
) -> bytes:
    data = DATA if data is None else data
    front = [dump(MAGIC), dump(1001), dump({"little_endian": True}), pkl, dump(list(data) if keys is None else keys)]
    back = [struct.pack("<q", (counts or {}).get(key, len(content) // 4)) + content for key, content in data.items()]
    return b"".join(front + back)


def torch_loads(file: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(file), weights_only=True)


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_a_pickle_made_by_hand_is_read_as_torch_reads_it(protocol):
    """So that the hostile ones below are refused for what is wrong with them, not for the way they are made."""
    for make, on in ((zipped, storage()), (legacy, storage("torch.FloatStorage", "0", 6, None))):
        file = make(dump({"a": tensor(on), "b": tensor(on, 1, (2, 2), (1, 3))}, protocol))
        found = read(file)
        assert found["a"].strides is None and found["b"].strides == (1, 3)
        assert np.frombuffer(stored(file, found["b"]), np.float32).tolist() == [1, 4, 2, 5]
        if protocol == 2:
            same(file, torch_loads(file))


def test_files_of_python_2_and_of_the_first_versions_of_torch_are_read_as_torch_reads_them():
    """Text as bytes, an OrderedDict as a list of pairs, windows of storages, storages of CUDA, three kinds of
    rebuilding.
    """

    def old(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    def built(function: str, kind: str, rest: bytes, count: int = 6, window: bytes = b"N") -> bytes:
        pid = (
            b"("
            + old("storage")
            + b"c"
            + kind.encode()
            + b"\n"
            + old("0")
            + old("cpu")
            + b"K"
            + bytes([count])
            + window
            + b"tQ"
        )
        return b"ctorch._utils\n" + function.encode() + b"\n(" + pid + rest + b"tR"

    hooks = b"\x89ccollections\nOrderedDict\n]\x85R"
    first = built("_rebuild_tensor", "torch\nFloatStorage", b"K\x00K\x02K\x03\x86K\x03K\x01\x86")
    second = built(
        "_rebuild_tensor_v2", "torch.cuda\nFloatStorage", b"\x8a\x01\x01\x8a\x01\x02\x85\x8a\x01\x02\x85" + hooks
    )
    third = built(
        "_rebuild_tensor_v2",
        "torch\nFloatStorage",
        b"K\x01K\x02\x85K\x01\x85" + hooks,
        6,
        b"(" + old("9") + b"K\x02K\x03t",
    )
    fourth = b"ctorch._utils\n_rebuild_parameter\n(" + first + b"\x88ccollections\nOrderedDict\n]\x85RtR"
    pairs = b"".join(
        b"](" + old(name) + value + b"e" for name, value in [("a", first), ("b", second), ("c", third), ("d", fourth)]
    )
    pkl = b"\x80\x02ccollections\nOrderedDict\n](" + pairs + b"e\x85R}" + old("_metadata") + b"}sb."
    file = legacy(pkl)
    found = same(file, torch_loads(pkl_of_cpu(file)))
    assert [found[name].offset - found["a"].offset for name in "abcd"] == [0, 4, 12, 0]


def pkl_of_cpu(file: bytes) -> bytes:
    """torch knows `torch.cuda.FloatStorage` only where it was built with CUDA."""
    return file.replace(b"ctorch.cuda\nFloatStorage", b"ctorch\nFloatStorage")


def test_a_tensor_of_a_device_without_storages_is_read_unless_torch_would_cast_it():
    name = "torch._utils._rebuild_device_tensor_from_cpu_tensor"
    assert read(zipped(dump({"a": Call(name, tensor(), Name("torch.float32"), "xla:0", False)})))["a"].nbytes == 24
    refused(zipped(dump({"a": Call(name, tensor(), Name("torch.float16"), "xla:0", False)})), "tensor 'a'", "dtype")


# --- reading no more than needed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_storages_are_never_read(form):
    """Besides the directory and the pickle, with what a buffer reads ahead, it is some 100 bytes per storage."""
    state = {f"layer.{at}.weight": torch.zeros(512, 256) for at in range(20)}
    file = save(state, form)
    asked = []

    def pread(length: int, offset: int) -> bytes:
        asked.append(length)
        return file[offset : offset + length]

    assert len(torch_zip.read(pread, len(file), "f").entries) == 20 and len(file) > 10_000_000
    assert sum(asked) < 300_000 and len(asked) < 35


@pytest.mark.parametrize("form", FORMATS)
def test_memory_stays_below_a_kibibyte_per_tensor(form):
    count = 3000
    file = save({f"model.layers.{at}.self_attn.q_proj.weight": torch.zeros(2, 3) for at in range(count)}, form)
    read(file)
    tracemalloc.start()
    try:
        found = torch_zip.read(lambda length, offset: file[offset : offset + length], len(file), "f").entries
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == count and peak < 1024 * count + 300_000


class Sink(io.RawIOBase):
    """Keeps the short pieces of what is written, and lets the long ones be holes: a file of any size, in no space."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(data) < 1 << 20:
            self.pieces[self.at] = bytes(data)
        self.at += len(data)
        return len(data)

    def pread(self, length: int, offset: int) -> bytes:
        data = bytearray(max(0, min(length, self.at - offset)))
        for at, piece in self.pieces.items():
            low, high = max(at, offset), min(at + len(piece), offset + len(data))
            if low < high:
                data[low - offset : high - offset] = piece[low - at : high - at]
        return bytes(data)


@pytest.fixture
def without_crc():
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_a_zip_file_of_more_than_4_gib_is_read_by_its_zip64_fields(without_crc):
    """One storage of more than 4 GiB, and others behind it: both sizes and offsets need 64 bits."""
    try:
        big = torch.empty((5 << 30) + 64, dtype=torch.uint8)  # never touched, so no memory is used
    except RuntimeError:
        pytest.skip("the machine does not lend 5 GiB of address space")
    sink = Sink()
    torch.save({"a": big, "b": noise(4), "c": big[1 << 32 :]}, sink)
    found = torch_zip.read(sink.pread, sink.at, "f").entries
    assert found["a"].nbytes == (5 << 30) + 64 and found["c"].offset == found["a"].offset + (1 << 32)
    assert found["b"].offset > 5 << 30 and sink.pread(16, found["b"].offset) == values(noise(4))
    with pytest.raises(ReshardError, match=r"truncated.*holds 5368709120 bytes; its tensors need more than 5368\d{6}"):
        torch_zip.read(sink.pread, 5 << 30, "f")


# --- zip archives that torch would not write --------------------------------------------------------------------------

PKL = dump({"a": tensor()})


def test_the_local_header_says_where_data_begins():
    """Its extra field is not that of the directory: torch pads with it, so that data is aligned."""
    file = save({"a": noise(4), "b": noise(5)}, "zip")
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert all(not info.extra for info in archive.infolist())
    assert all(entry.offset % 64 == 0 for entry in read(file).values())


def test_a_zip64_field_in_the_local_header_is_stepped_over():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"x/data.pkl": PKL, "x/data/0": DATA["0"], "x/version": b"3"}.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
    same(out.getvalue(), torch_loads(out.getvalue()))


def test_a_zip_comment_and_entries_of_others_do_no_harm():
    out = io.BytesIO(zipped(PKL))
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b"PK\5\6" * 9
        archive.writestr("__MACOSX/any name/._data.pkl", b"?")
    same(out.getvalue(), torch_loads(zipped(PKL)))


def test_odd_zip_archives_are_refused():
    refused(zipped(PKL, method=zipfile.ZIP_DEFLATED), "compressed", "any name/data.pkl")
    refused(zipped(PKL, more={"byteorder": b"big"}), "byte order is b'big'")
    refused(zipped(PKL, more={"byteorder": b"little" * 9}), "byte order")
    refused(zipped(PKL, more={"constants.pkl": b""}), "TorchScript")
    refused(zipped(PKL, {}), "tensor 'a' lies in storage 0, which the file does not hold")
    refused(zipped(PKL, {"0": bytes(20)}), "tensor 'a' lies in storage 0, which holds 20 bytes; the pickle says 24")
    # torch writes storages that are no whole number of elements
    assert read(zipped(PKL, {"0": bytes(30)}))["a"].nbytes == 24
    out = io.BytesIO(zipped(PKL))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("second/data.pkl", PKL)
    refused(out.getvalue(), "2 entries NAME/data.pkl")
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("any name/version", b"")
    refused(out.getvalue(), "any name/version appears twice")
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    refused(empty.getvalue(), "0 entries NAME/data.pkl")


def test_a_changed_pickle_is_noticed_by_its_checksum_and_a_file_without_checksums_is_read(without_crc):
    file = save({"alpha": noise(4)}, "zip")
    assert list(read(file)) == ["alpha"]
    file = zipped(dump({"alpha": tensor()}))
    refused(file.replace(b"alpha", b"alphb"), "CRC")


def test_a_directory_that_points_elsewhere_is_refused():
    file = zipped(PKL)
    at = file.index(b"PK\1\2")
    for delta in (1, 7, len(file)):
        moved = bytearray(file)
        moved[at + 42 : at + 46] = struct.pack("<L", delta)
        refused(bytes(moved), "any name/data.pkl")
    renamed = file.replace(b"any name/data/0", b"any name/data/1", 1)  # in the local header only
    refused(renamed, "is not that of any name/data/0")


def test_an_end_record_that_contradicts_its_archive_is_refused():
    def patched(file: bytes, at: int, value: int, width: int) -> bytes:
        return file[:at] + value.to_bytes(width, "little") + file[at + width :]

    file = zipped(PKL)
    end = file.rindex(b"PK\5\6")
    length = int.from_bytes(file[end + 12 : end + 16], "little")
    refused(patched(file, end + 4, 1, 2), "part 1 of several")
    refused(patched(file, end + 8, 3, 2), "with 3 of 4 entries")
    refused(patched(file, end + 8, 0x00050005, 4), "has 4 entries, the end record says 5")
    refused(
        patched(file, end + 12, length - 1, 4),
        f"has {length - 1} bytes from byte {end - length} on, but ends at byte {end}",
    )
    refused(patched(patched(file, end + 12, length + 7, 4), end + 16, end - length - 7, 4), "no entry at byte")
    refused(patched(patched(file, end + 12, 9, 4), end + 16, end - 9, 4), "ends within an entry")

    file = save({"a": noise(4)}, "zip")  # torch always adds the records of zip64
    end = file.rindex(b"PK\6\6")
    refused(patched(file, end + 32, 99, 8), "of 99 entries")
    refused(
        patched(file, end + 56 + 8, 2**60, 8),
        f"zip64 end record lies at byte {2**60}, the file holds {len(file)} bytes",
    )
    refused(patched(file, end + 56 + 8, end - 1, 8), f"zip64 end record at byte {end - 1} begins with")
    refused(file[: end + 36] + file[end + 56 :], "reaches over its locator")


# --- legacy files, and others -----------------------------------------------------------------------------------------


def test_odd_legacy_files_are_refused():
    for count in (5, 7, -1, 2**62):
        refused(legacy(PKL, counts={"0": count}), f"has {count} elements, the pickle says 6")
    refused(legacy(PKL, keys=["1"]), "list of storages")
    refused(legacy(PKL, keys=["0", "0"]), "list of storages")
    refused(legacy(PKL, keys=[["0"]]), "list of storages")
    refused(legacy(PKL, keys={"0": 1}), "list of storages")
    refused(legacy(PKL, keys=[]), "tensor 'a' lies in storage 0, which the file does not hold")
    refused(
        legacy(PKL)[:-1],
        f"truncated: the file holds {len(legacy(PKL)) - 1} bytes, its tensors end at byte {len(legacy(PKL))}",
    )
    assert read(legacy(PKL) + b"more") == read(legacy(PKL))  # as torch does


def test_what_is_no_file_of_torch_is_refused_by_name():
    refused(b"", "0 bytes")
    refused(pickle.dumps({"a": 1}), "not a file of torch.save", "magic number is a dict")
    refused(pickle.dumps(MAGIC) + pickle.dumps(3), "protocol version is 3")
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer")
    refused(safetensors.torch.save({"a": torch.ones(2)}), "safetensors")
    refused(b"<!doctype html><title>404</title>", "HTML")
    refused(bytes(1000), "zeros")
    refused(b"GGUF" + bytes(100), "GGUF")
    refused(b"\x1f\x8b\x08" + bytes(100), "gzip")
    refused(random.Random(1).randbytes(1000), "makes no sense")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    refused(out.getvalue(), "tar archive")


def test_a_file_that_shrinks_is_truncated_and_trouble_with_the_storage_passes_through():
    file = zipped(PKL)
    for form in (file, legacy(PKL)):
        with pytest.raises(ReshardError, match="f: the file ends at byte"):
            torch_zip.read(lambda length, offset, form=form: form[:-20][offset : offset + length], len(form), "f")

    def broken(length: int, offset: int) -> bytes:
        if offset > 0:
            raise PlaceError("the disk is on fire")
        return file[:length]

    with pytest.raises(PlaceError, match="on fire"):
        torch_zip.read(broken, len(file), "f")


# --- tensors that do not fit ------------------------------------------------------------------------------------------

HUGE = 2**62


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor(None, 1), ["tensor 'a'", "needs 28 bytes of storage 0, which has 24"]),
        (tensor(None, 0, (3, 3)), ["needs 36 bytes"]),
        (tensor(None, 0, (2, 3), (4, 1)), ["needs 28 bytes"]),
        (tensor(None, 6, ()), ["2 strides"]),
        (tensor(None, 6, (), ()), ["needs 28 bytes"]),
        (tensor(None, HUGE), [f"needs {4 * HUGE + 24} bytes"]),
        (tensor(None, 0, (2,), (HUGE,)), ["of storage 0, which has 24"]),
        (tensor(None, 0, (HUGE,), (0,)), ["2**63 - 1"]),
        (tensor(None, 0, (HUGE,) * 60, (0,) * 60), ["2**63 - 1"]),
        (tensor(storage(count=7)), ["which holds 24 bytes; the pickle says 28"]),
        (tensor(storage(key="1")), ["storage 1, which the file does not hold"]),
        (tensor(storage(key="../data.pkl")), ["storage ../data.pkl, which the file does not hold"]),
        (tensor(storage("torch.DoubleStorage")), ["which holds 24 bytes; the pickle says 48"]),
        (tensor(None, -1), ["the offset of a tensor"]),
        (tensor(None, 0, (2, -3)), ["the shape of a tensor"]),
        (tensor(None, 0, (2, 3), (3, -1)), ["the strides of a tensor"]),
        (tensor(None, 0, (2, 3.0)), ["the shape of a tensor has 3.0"]),
        (tensor(None, 0, (2, True)), ["the shape of a tensor has True"]),
        (tensor(None, 0, [2, 3]), ["the shape of a tensor is a list"]),
        (tensor(None, 0, 6, 1), ["the shape of a tensor is 6"]),
        (tensor(None, 0, (2, 2**63)), ["the shape of a tensor has 0x8000000000000000"]),
        (tensor(None, 0, (1,) * 65, (1,) * 65), ["up to 64"]),
        (tensor("0"), ["a tensor on '0', not a storage"]),
        (tensor(None, 0, (2, 3), (3, 1), None, None), ["calls torch._utils._rebuild_tensor_v2 with 8 arguments"]),
        (tensor(None, 0, (2, 3), (3, 1), {"conj": True}), ["conjugate"]),
        (tensor(Pid("0")), ["persistent id is '0'"]),
        (tensor(Pid(0)), ["persistent id is 0"]),
        (tensor(Pid(("storage",))), ["persistent id is a tuple"]),
        (tensor(Pid("module", 1, 2, 3, 4)), ["persistent id is a tuple"]),
        (tensor(Pid(*[[]] * 5)), ["persistent id is a tuple"]),
        (tensor(Pid("storage", "torch.FloatStorage", "0", "cpu", 6)), ["class 'torch.FloatStorage'"]),
        (tensor(Pid("storage", Name("torch.float32"), "0", "cpu", 6)), ["class torch.float32"]),
        (tensor(Pid("storage", Name("torch.Size"), "0", "cpu", 6)), ["class torch.Size"]),
        (tensor(storage(key=("0",))), ["storage a tuple has 6 elements"]),
        (tensor(storage(key=0)), ["storage 0 has 6 elements"]),
        (tensor(storage(count=-1)), ["has -1 elements"]),
        (tensor(storage(count=6.0)), ["has 6.0 elements"]),
        (tensor(storage(count=2**70)), ["elements"]),
        (tensor(storage("torch.FloatStorage", "0", 6, 3)), ["window"]),
        (tensor(storage("torch.FloatStorage", "0", 6, ("1", 4, 3))), ["a window of 3 elements at 4 in a storage of 6"]),
        (tensor(storage("torch.FloatStorage", "0", 6, ("1", 4, 2))), ["needs 24 bytes of storage 0, which has 8"]),
        (tensor(storage("torch.FloatStorage", "0", 6, ("1", -1, 2))), ["window of 2 elements at -1"]),
        (
            Call("torch._utils._rebuild_tensor_v3", storage(), 0, (6,), (1,), False, None, Name("torch.Size")),
            ["dtype", "torch.Size"],
        ),
        (
            Call("torch._utils._rebuild_tensor_v3", storage(), 0, (6,), (1,), False, None, "float32"),
            ["dtype", "'float32'"],
        ),
        (Call("torch._utils._rebuild_parameter", {"data": 1}, True, None), ["a parameter made of a dict"]),
        (
            Call("torch._tensor._rebuild_from_type_v2", Name("torch.Size"), Name("torch.Tensor"), (), None),
            ["rebuilt by torch.Size"],
        ),
        (
            Call(
                "torch._tensor._rebuild_from_type_v2",
                Name("torch._tensor._rebuild_from_type_v2"),
                Name("torch.Tensor"),
                (),
                {},
            ),
            ["rebuilt"],
        ),
        (
            Call(
                "torch._tensor._rebuild_from_type_v2", Name("torch._utils._rebuild_tensor"), Name("torch.Size"), (), {}
            ),
            ["class torch.Size"],
        ),
        (Call("torch.Size", 3), ["torch.Size of 3"]),
        (Call("torch.Size", (1,), (2,)), ["calls torch.Size with 2 arguments"]),
        (Call("collections.OrderedDict", [[1, 2, 3]]), ["not of pairs"]),
        (Call("collections.OrderedDict", {"a": 1}), ["not of pairs"]),
        (Call("collections.OrderedDict", [[("a",), 2]]), ["dict key is a tuple"]),
        (Call("torch.FloatStorage", 6), ["calls torch.FloatStorage"]),
        (Call("torch.Tensor", 6), ["calls torch.Tensor"]),
        (Call("torch.float32"), ["calls torch.float32"]),
    ],
)
def test_a_tensor_that_makes_no_sense_or_does_not_fit_is_refused(made, words):
    data = {**DATA, "3": b"????"}
    refused(zipped(dump({"a": made}), data), *words)
    with pytest.raises(ReshardError):
        read(legacy(dump({"a": made})))


def test_a_storage_mentioned_twice_is_no_larger_than_the_file_says():
    """The legacy format sizes a storage by its first mention; a later one cannot reach further."""
    later = tensor(storage("torch.DoubleStorage", "0", 6))
    refused(legacy(dump({"a": tensor(), "b": later})), "tensor 'b'", "which holds 24 bytes; the pickle says 48")


# --- attacks ----------------------------------------------------------------------------------------------------------


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = (function, args)

    def __reduce__(self) -> Any:
        return self.parts


def runs(protocol: int, function: Any, *args: Any) -> bytes:
    """The opcodes that call the function, without the first and the last of the pickle."""
    return pickle.dumps(Runs(function, *args), protocol)[11 if protocol > 3 else 2 if protocol > 1 else 0 : -1]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def touch(marker: Path) -> str:
    return f"touch {shlex.quote(str(marker))}"


def system(marker: Path) -> bytes:
    return b"cos\nsystem\n" + text(touch(marker)) + b"\x85R"


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def of_a_lambda(marker: Path) -> bytes:
    """How a lambda travels: its code by marshal, made into a function."""
    raw = marshal.dumps(compile(code(marker), "lambda", "exec"))
    return b"ctypes\nFunctionType\ncmarshal\nloads\nB" + struct.pack("<I", len(raw)) + raw + b"\x85R}\x86R)R"


def of_a_torch_file(marker: Path) -> bytes:
    """torch's own way to pickle a storage within a pickle, which loads a whole file of torch.save."""
    return runs(4, torch.storage._load_from_bytes, save(Runs(exec, code(marker)), "legacy"))


def by_attributes(marker: Path) -> bytes:
    """getattr(__import__("os"), "system")(...)"""
    module = b"c__builtin__\n__import__\n" + text("os") + b"\x85R"
    return b"c__builtin__\ngetattr\n" + module + text("system") + b"\x86R" + text(touch(marker)) + b"\x85R"


def by_state(marker: Path) -> bytes:
    """BUILD turns a harmless partial into another, which is then called."""
    state = b"(cos\nsystem\n" + text(touch(marker)) + b"\x85}}t"
    return b"cfunctools\npartial\ncos\ngetcwd\n\x85R" + state + b"b)R"


# What stands in the state dict, as opcodes that leave one value, and the name in the refusal. Python's own unpickler
# runs each of them.
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "protocol 0": (lambda m: runs(0, os.system, touch(m)), f"{os.name}.system"),
    "protocol 1": (lambda m: runs(1, os.system, touch(m)), f"{os.name}.system"),
    "protocol 2": (lambda m: runs(2, os.system, touch(m)), f"{os.name}.system"),
    "protocol 4": (lambda m: runs(4, os.system, touch(m)), f"{os.name}.system"),
    "protocol 5": (lambda m: runs(5, os.system, touch(m)), f"{os.name}.system"),
    "os by its own name": (system, "os.system"),
    "eval": (lambda m: runs(2, eval, code(m)), "__builtin__.eval"),
    "exec": (lambda m: runs(4, exec, code(m)), "builtins.exec"),
    "subprocess": (lambda m: runs(4, subprocess.check_call, ["touch", str(m)]), "subprocess.check_call"),
    "getattr of an import": (by_attributes, "__builtin__.getattr"),
    "a name with dots": (
        lambda m: text("torch.serialization") + text("os.system") + b"\x93" + text(touch(m)) + b"\x85R",
        "torch.serialization.os.system",
    ),
    "INST": (lambda m: b"(" + text(touch(m)) + b"ios\nsystem\n", "os.system"),
    "OBJ": (lambda m: b"(cos\nsystem\n" + text(touch(m)) + b"o", "os.system"),
    "NEWOBJ": (lambda m: b"cpathlib\nPath\n)\x810" + system(m), "pathlib.Path"),
    "a lambda": (of_a_lambda, "types.FunctionType"),
    "a torch file within": (of_a_torch_file, "torch.storage._load_from_bytes"),
    "state of a partial": (by_state, "functools.partial"),
    "numpy": (lambda m: b"cnumpy.core.multiarray\n_reconstruct\n0" + system(m), "numpy.core.multiarray._reconstruct"),
    "dropped at once": (lambda m: system(m) + b"0N", "os.system"),
    "within the flags of a tensor": (
        lambda m: b"ctorch._utils\n_rebuild_tensor_v2\n0(" + system(m) + b"t",
        "os.system",
    ),
}


def beside(opcodes: bytes) -> bytes:
    """A pickle of {"a": a tensor, "b": what the opcodes leave}."""
    front = dump({"a": tensor()})
    assert front.endswith(b"s.")
    return front[:-1] + text("b") + opcodes + b"s."


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_the_name_of_what_it_calls_and_nothing_runs(name, tmp_path):
    make, word = ATTACKS[name]
    marker = tmp_path / "m"
    opcodes = make(marker)
    alone = (b"\x80\x02" if b"__builtin__" in opcodes else b"\x80\x04") + opcodes + b"."
    pickle.loads(alone)
    assert marker.exists()  # so the attack is a real one
    marker.unlink()
    for file in (
        zipped(beside(opcodes)),
        legacy(beside(opcodes)),
        zipped(alone),
        alone,  # in place of the magic number
        dump(MAGIC) + dump(1001) + alone,  # in place of the word sizes
        legacy(alone),
        legacy(PKL).replace(dump(["0"]), alone),  # in place of the keys
    ):
        refused(file, "refuses to run code", word)
        assert not marker.exists()


def test_the_extension_registry_is_not_asked(tmp_path):
    """Its numbers stand for names, so that Python would not even look for the name; its cache holds the objects
    themselves.
    """
    marker = tmp_path / "m"
    opcodes = b"\x82\x07" + text(touch(marker)) + b"\x85R"
    copyreg.add_extension("posix", "system", 7)
    try:
        pickle.loads(b"\x80\x02" + opcodes + b".")
        assert marker.exists()
        marker.unlink()
        for extension in (b"\x82\x07", b"\x83\x07\x00", b"\x84\x07\x00\x00\x00"):
            refused(
                zipped(beside(extension + opcodes[2:])),
                "refuses to run code",
                "number 7 of the copyreg extension registry",
            )
            refused(legacy(beside(extension + opcodes[2:])), "refuses to run code")
        assert not marker.exists()
    finally:
        copyreg.remove_extension("posix", "system", 7)
        copyreg.clear_extension_cache()


def test_only_dicts_and_tensors_take_a_state_and_it_changes_nothing():
    """BUILD sets attributes in Python: here it is dropped, whatever it holds, and refused for all else."""
    hostile = {"__class__": 1, "__setstate__": Name("torch.Size"), "keys": 1, "shape": (9, 9), "storage": 3, "b": 2}
    made = {"a": Call("torch._utils._rebuild_tensor", storage(), 0, (2, 3), (3, 1), state=hostile)}
    found = read(zipped(dump(Call("collections.OrderedDict", [["a", made["a"]]], state=hostile))))
    assert list(found) == ["a"] and found["a"].shape == (2, 3)
    assert list(read(zipped(dump(Call("collections.OrderedDict", [["a", tensor()]], state=(None, hostile)))))) == ["a"]
    assert type(OrderedDict().keys()) is not int and len({}.keys()) == 0
    for stub in ("ctorch\nSize\n", "ctorch\nFloatStorage\n", "ctorch\ndevice\n", "ccollections\nOrderedDict\n"):
        opcodes = stub.encode() + b"}" + text("__call__") + b"K\x01sb"
        refused(zipped(beside(opcodes)), "refuses to run code: it sets the state of", stub.split()[1])
    for value in (
        b"]",
        b")",
        b"K\x01",
        text("t"),
        b"ctorch\ndevice\n)R",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") * 2 + b"K\x06tQ",
    ):
        refused(zipped(beside(value + b"}b")), "it sets the state of")


@pytest.mark.parametrize("opcode", [b"\x81", b"\x92", b"o"])
def test_no_opcode_makes_instances(opcode):
    """Not even of names that are allowed."""
    before = {
        b"\x81": b"ccollections\nOrderedDict\n)",
        b"\x92": b"ccollections\nOrderedDict\n)}",
        b"o": b"(ccollections\nOrderedDict\n",
    }
    refused(zipped(beside(before[opcode] + opcode)), "refuses to run code: it makes an instance")
    refused(zipped(beside(b"(icollections\nOrderedDict\n")), "refuses to run code: it makes an instance")


@pytest.mark.parametrize(
    "value", [b"N", b"\x88", b"K\x01", b"G" + bytes(8), text("os.system"), b"]", b"}", b")", b"C\x01a", b"\x8f"]
)
def test_only_named_functions_are_called(value):
    for args in (b")", b"(K\x01t", b"N", b"]", b"}"):
        refused(zipped(beside(value + args + b"R")), "calls ")
    refused(
        zipped(beside(text("os") + value + b"\x93")),
        "imports " if value != text("os.system") else "refuses to run code: os.os.system",
    )


def test_other_objects_are_refused_by_name():
    """What training scripts put beside the weights: harmless, but to make it would be to run code."""
    for extra, word in [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(3), "numpy"),
        (collections.defaultdict(int), "collections.defaultdict"),
        (types.SimpleNamespace(a=1), "types.SimpleNamespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (1j, "complex"),
    ]:
        for form in FORMATS:
            refused(save({"a": torch.ones(1), "extra": extra}, form), "refuses to run code", word)


# --- pickles made to exhaust ------------------------------------------------------------------------------------------


def frugal(file: bytes, *words: str, mib: int = 8) -> None:
    """Refused within some memory, and before pytest's limit, however much the file seems to ask for."""
    tracemalloc.start()
    try:
        refused(file, *words)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mib << 20


LENGTHS = {
    "bytes": b"B\xff\xff\xff\xff",
    "long bytes": b"\x8e" + struct.pack("<Q", 1 << 40),
    "endless bytes": b"\x8e" + b"\xff" * 8,
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 40),
    "text": b"X\xff\xff\xff\xff",
    "long text": b"\x8d" + struct.pack("<Q", 1 << 62),
    "Python 2's text": b"T\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_beyond_the_end_reserves_no_memory(name):
    frugal(zipped(beside(LENGTHS[name] + b"abc")), "truncated: a pickle ends at byte")
    frugal(legacy(beside(LENGTHS[name] + b"abc")), "truncated: a pickle ends at byte")


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"Nr\xff\xff\xff\x3f", ["keeps value 1073741823"]),  # 8 GiB in Python's unpickler
        (b"Np99999999999\n", ["keeps value"]),
        (b"Np-1\n", ["value -1"]),
        (b"j\xff\xff\xff\x7f", ["not there"]),
        (b"g-1\n", ["value -1"]),
        (b"Nq\x30h\x20", ["not there"]),
        (b"\x8b\xff\xff\xff\xff", ["an integer of 4294967295 bytes"]),
        (b"\x8b\x00\x01\x00\x00" + bytes(256), ["an integer of 256 bytes"]),
        (b"I" + b"9" * 300 + b"\n", ["a number of 300 digits"]),
        (b"L" + b"9" * 5000 + b"L\n", ["a name or number of more than"]),
        (b"c" + b"a" * 100_000, ["a name or number of more than"]),
        (b"\x80\x06", ["protocol 6"]),
        (b"\x97", ["unknown opcode 0x97"]),
        (b"Pname\n", ["a storage named name"]),
        (b"}(NNNu", ["3 keys and values"]),
        (b"]NNs", ["into a list"]),
        (b"}Na", ["appends to a dict"]),
        (b"}(Ne", ["appends to a dict"]),
        (b"t", ["not there"]),
        (b"0" * 9, ["not there"]),
        (b"X\x01\x00\x00\x00\xff", ["can't decode"]),
        (b"Fabc\n", ["could not convert"]),
        (b"}" + b"G" + bytes(8) + b"Ns", ["a dict key is 0.0"]),
        (b"}\x8a\x09" + b"\xff" * 8 + b"\x7fNs", ["a dict key is 0x7f"]),  # such integers can be chosen to collide
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns", ["a dict key is a tuple"]),  # to hash it overflows the C stack
        (b"}" + b")" + b"2\x86" * 100 + b"Ns", ["a dict key is a tuple"]),  # to hash it takes 2**100 steps
    ],
    ids=lambda value: ascii(value[:12]) if isinstance(value, bytes) else None,
)
def test_pickles_that_python_would_choke_on_are_refused(opcodes, words):
    frugal(zipped(beside(opcodes)), *words, mib=64)
    with pytest.raises(ReshardError):
        read(legacy(beside(opcodes)))


def test_values_nested_a_billionfold_cost_no_more_than_their_opcodes():
    for opcodes in (b")" + b"\x85" * 60_000, b")" + b"2\x86" * 20_000, b"]q\x70" + b"0](h\x70h\x70eq\x70" * 1000):
        zipfile = zipped(beside(opcodes))
        assert lines_run(lambda file=zipfile: read(file)) < 40 * len(opcodes)
        assert list(read(zipfile)) == ["a"]
    loop = b"]q\x70h\x70a}q\x71" + text("me") + b"h\x71s\x86"
    assert list(read(zipped(beside(loop)))) == ["a"]


def test_a_pickle_of_too_many_steps_is_refused(monkeypatch):
    monkeypatch.setattr(unpickle, "MOST_STEPS", 20_000)
    frugal(zipped(beside(b"N0" * 20_000)), "more than 20000 steps")
    pairs = b"](" + b"]NaNa" * 1000 + b"e\x85q\x700"  # copied again and again
    frugal(
        zipped(beside(pairs + b"ccollections\nOrderedDict\nq\x710" + b"h\x71h\x70R0" * 1000 + b"N")),
        "more than 20000 steps",
    )


def test_sizes_beyond_any_checkpoint_are_refused(monkeypatch):
    for module in (torch_zip, unpickle):
        monkeypatch.setattr(module, "MOST_PICKLE", 300)
    frugal(zipped(beside(text("x" * 300))), "at most 300 are read")
    frugal(legacy(beside(text("x" * 300))), "more than 300 bytes")
    monkeypatch.setattr(torch_zip, "MOST_DIRECTORY", 100)
    frugal(zipped(PKL), "at most 100 are read")


# --- damage -----------------------------------------------------------------------------------------------------------


def small(form: str) -> bytes:
    return save(
        OrderedDict(
            a=noise(2, 3),
            b=noise(2, 3).t(),
            c=torch.nn.Parameter(noise(2, dtype=torch.bfloat16)),
            d=noise(2).to(torch.float8_e5m2),
        ),
        form,
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_is_refused(form):
    file = small(form)
    for length in range(len(file)):
        message = refused(file[:length])
        assert "truncated" in message or "0 bytes" in message, length
    assert len(read(file)) == 4


def test_a_broken_download_is_told_how_much_it_lacks():
    for form in FORMATS:
        file = save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, form)
        message = refused(file[:5000], "truncated", "holds 5000 bytes")
        needed = int(message.rsplit(None, 1)[1])
        assert needed == len(file) if form == "legacy" else 8000 < needed < len(file)


@pytest.mark.parametrize("form", [*FORMATS, "zip without checksums", "legacy, protocol 4"])
def test_a_damaged_file_is_refused_or_read_as_something_that_lies_within_it(form, without_crc):
    torch.serialization.set_crc32_options(form == "zip")
    file = save(torch.load(io.BytesIO(small("zip"))), "legacy", 4) if "4" in form else small(form.split()[0])
    rng = random.Random(11)
    outcomes = collections.Counter()
    for at in range(2500):
        changed = bytearray(file)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            where = rng.randrange(len(file))
            changed[where] = rng.choice((changed[where] ^ 1 << rng.randrange(8), rng.randrange(256), 0xFF, 0))
        if at % 5 == 0:  # a piece twice, or lost
            low, high = sorted((rng.randrange(len(file)), rng.randrange(len(file))))
            changed[low:high] = changed[low:high] * 2 if at % 2 else b""
        try:
            read(bytes(changed))
            outcomes["read"] += 1
        except ReshardError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_damage_is_the_same_to_every_reader_of_opcodes():
    """Random opcodes: refused or read, never anything else."""
    rng = random.Random(3)
    some = [bytes([op]) for op in range(256)] + [
        b"(",
        b")",
        b"}",
        b"]",
        b"N",
        b"K\x01",
        b"q\x01",
        b"h\x01",
        text("a"),
        b"\x94",
        b"\x85",
        b"R",
        b"t",
        b"s",
        b"u",
    ] * 6
    some += [
        f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode()
        for name in torch_values.GLOBALS
        if "_" in name or "Float" in name
    ]
    for _ in range(4000):
        opcodes = b"".join(rng.choices(some, k=rng.randrange(1, 30)))
        file = (
            zipped(beside(opcodes))
            if rng.random() < 0.2
            else dump(MAGIC) + dump(1001) + dump({}) + beside(opcodes) + dump([])
        )
        with contextlib.suppress(ReshardError):
            read(file)


def test_the_module_needs_neither_torch_nor_numpy_nor_pickle():
    script = (
        "import sys, reshard.containers.torch_zip; print(sorted({'torch', 'numpy', 'pickle', '_pickle'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
