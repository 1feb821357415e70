"""Containers: the file formats that hold tensors, one row each: how to tell them, read them and write them.

A container is a module here with `read`, and a row of CONTAINERS; nothing else asks what kind of file weights lie in.
Reading gives entries with offsets, by which bytes are moved as they are, so a tensor must lie uncompressed, with its
elements in little-endian order.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import ReshardError
from . import safetensors
from .entry import Header
from .reading import Pread
from .safetensors import build, library_order

Stored = tuple[str, str, tuple[int, ...]]  # name, dtype as safetensors spells it, shape


class Read(Protocol):
    """What a file of `size` bytes holds; messages call it `where`. Never reads tensor data.

    Raises ReshardError, naming file and tensor, for what is damaged, truncated or larger than its limits, or runs code;
    every entry lies within the file. What `pread` raises passes through.
    """

    def __call__(self, pread: Pread, size: int, where: str) -> Header: ...


class Build(Protocol):
    """The bytes before the data, which starts at a multiple of `align`; and what they say.

    Tensors lie in the order given. Raises ReshardError, naming the tensor, for what no such file can hold.
    """

    def __call__(
        self, tensors: Iterable[Stored], metadata: Mapping[str, str] | None, align: int = 8
    ) -> tuple[bytes, Header]: ...


def _unwritten(tensors: Iterable[Stored], metadata: Mapping[str, str] | None, align: int = 8) -> tuple[bytes, Header]:
    raise ReshardError(
        "files of this kind are read, not written", "give the files of the format names that end in .safetensors"
    )


@dataclass(frozen=True)
class Container:
    """A file format. `name`: in manifests. `single`: the file that transformers looks for, with a whole checkpoint.

    `scattered`: not all is said in one place, each tensor has a short header of its own. `order`: in which its own
    library lays tensors.
    """

    name: str
    suffixes: tuple[str, ...]
    single: str
    read: Read
    build: Build = _unwritten
    order: Callable[[Iterable[Stored]], list[Stored]] = list
    scattered: bool = False

    @property
    def index(self) -> str:
        """The file that says which of several files holds which tensor."""
        return f"{self.single}.index.json"


def _torch(pread: Pread, size: int, where: str) -> Header:
    from . import torch_zip  # few checkpoints need it, and it takes as long to import as all the rest

    return torch_zip.read(pread, size, where)


# In the order in which transformers looks for them.
CONTAINERS = (
    Container("safetensors", (".safetensors",), "model.safetensors", safetensors.read, build, library_order),
    Container("torch", (".bin", ".pt", ".pth"), "pytorch_model.bin", _torch, scattered=True),
)
NAMED = {container.name: container for container in CONTAINERS}


def of_file(name: str) -> Container:
    """The container that a file of weights is, by its name; the first if its suffix says nothing."""
    return next((container for container in CONTAINERS if name.endswith(container.suffixes)), CONTAINERS[0])
