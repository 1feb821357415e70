"""The reference of the numerics check: transformers, run from the original files, if it is known to have read them all.

It does not count if it is not installed, does not open the model, has tensors left over, initialises some itself, or
reads a quantised checkpoint by a method that it is not known to read correctly. Then this runtime at TP 1 replaces it,
from the same files: `independent` is False, since agreement then proves that shards are cut consistently, not what they
mean. The name of a reference says which it is, and why.

Names are up to transformers. If it does not match the stored ones, and they differ from those that it wants in module
paths only (`renaming`), it gets the tensors under the names that it wants. No family table is involved.

Nor does it count if its own error cannot be rounding. The error of float32, relative to the scale of logits, is
κ · 2⁻²⁴, with κ the condition number of the model; from κ = 2¹² on, half of the digits are lost, and 4 × such an error
is no bound: `FINE`. In 16 bits, where the bound is 2 × the error, an error of half the scale is the most (`COARSE`):
logits that are all zero are off by 1 × the scale, those of an unrelated model by √2 ×.
"""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from reshard.checkpoints.source import Source
from reshard.errors import unusable
from reshard.tables import families
from reshard.tables.notation import fold

from ..comm.threads import alone
from ..load import load_model
from ..memory import exhausted
from .renaming import renaming

# The largest error that can be rounding, relative to the scale of logits: of float32, of 16 bits.
FINE, COARSE = 2.0**-12, 0.5
# Quantisation methods that transformers is known to read correctly, on a CPU and in every dtype.
TRUSTED: frozenset[str] = frozenset()
SHOWN = 3  # names that a message lists
BIAS = re.compile(r"\.self_attn\.(q|k|v|o)_proj\.bias$")
EXTRA = "pip install 'reshard[reference]'"
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    `run`: ids [batch, seq] and perhaps a cache → logits [batch, seq, vocab]; `cache`: makes one for (batch, seq);
    `module`: that of transformers, for inspection.
    """

    run: Callable[[torch.Tensor, Any], torch.Tensor]
    cache: Callable[[int, int], Any]
    module: Any = None

    def __call__(self, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return self.run(ids, cache)


class Reference:
    """The unsharded model, in any dtype, loaded anew for each except float32.

    `independent`: not this runtime; `hint`: how to get one that is independent.
    """

    def __init__(
        self, name: str, load: Callable[[torch.dtype], Loaded], independent: bool = False, hint: str = ""
    ) -> None:
        self.name, self.load, self.independent, self.hint = name, load, independent, hint
        self._kept: Loaded | None = None

    def prepare(self) -> Loaded:
        """Load it in float32, and keep that."""
        if self._kept is None:
            self._kept = self.load(torch.float32)
        return self._kept

    def logits(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kept = self.prepare()
        run = kept if dtype is torch.float32 else self.load(dtype)
        return torch.cat([run(part) for part in ids.split(8)])

    def stepwise(self, ids: torch.Tensor, pieces: Iterable[tuple[int, int]]) -> torch.Tensor:
        """Logits in float32 of tokens that come in pieces, with a cache."""
        run = self.prepare()
        cache = run.cache(*ids.shape)
        return torch.cat([run(ids[:, low:high], cache) for low, high in pieces], 1)

    def greedy(self, starts: torch.Tensor, most: int, cached: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy continuations in float32, and the margin of each token over the second best, both [texts, most].

        `cached`: with a KV cache, rather than recomputing everything for each token.
        """
        run, ids, margins = self.prepare(), starts, []
        cache = run.cache(len(starts), starts.shape[1] + most) if cached else None
        new = ids
        for _ in range(most):
            best, tokens = run(new if cached else ids, cache)[:, -1].topk(2, -1)
            new = tokens[:, :1]
            ids = torch.cat([ids, new], 1)
            margins.append(best[:, 0] - best[:, 1])
        return ids[:, starts.shape[1] :], torch.stack(margins, 1)


def reference_for(source: Source) -> Reference:
    """The reference of a published checkpoint: transformers if possible, else this runtime at TP 1."""
    if (why := unusable("transformers", "transformers")) is not None:
        return own_reference(source, why, EXTRA)
    import transformers

    if (method := _quantised(source)) is not None and method not in TRUSTED:
        return own_reference(source, f"transformers is not known to read {method} weights correctly")
    with torch.inference_mode():
        found = _attempt(lambda: _Theirs(source).reference(f"transformers {transformers.__version__}"))
        if isinstance(found, str):
            return own_reference(source, found)
        runs = _attempt(partial(found.logits, torch.zeros(1, 2, dtype=torch.long), torch.float32))
    return own_reference(source, runs) if isinstance(runs, str) else found


def own_reference(source: Source, why: str, hint: str = "") -> Reference:
    """This runtime at TP 1, from the original files."""

    def load(dtype: torch.dtype) -> Loaded:
        decoder = load_model(source, dtype, world=alone())
        return Loaded(lambda ids, cache: decoder(ids, cache=cache), decoder.new_cache)

    return Reference(f"this runtime at TP 1 ({why})", load, hint=hint)


def relative(own: torch.Tensor, wide: torch.Tensor) -> float:
    """The RMS error of logits, relative to the scale of more precise ones without their mean."""
    exact = wide.double()
    scale = _rms(exact - exact.mean(-1, keepdim=True))
    off = _rms(own.double() - exact)
    return off / scale if scale else math.inf if off else 0.0


def _rms(x: torch.Tensor) -> float:
    return math.sqrt(float(x.pow(2).mean()))


def _quantised(source: Source) -> str | None:
    """The method that config.json names; None for plain weights."""
    found = source.config.quantization
    return None if not found else str(found.get("quant_method") or "unnamed")


class _Theirs:
    """A checkpoint as loaded by transformers: from its files, or else from tensors under the names that it wants."""

    def __init__(self, source: Source) -> None:
        self.source, self.root = source, str(source.root)

    def reference(self, name: str) -> "Reference | str":
        """The reference, with its float32 model loaded; or why there is none."""
        found = self._read(self._from_files)
        if isinstance(found, str):
            again = _attempt(self._by_name)
            if isinstance(again, str) or isinstance(read := self._read(again[0]), str):
                return found
            found, name = read, name + again[1]
        load, model = found

        def quietly(dtype: torch.dtype) -> Loaded:
            with _quiet():
                return _loaded(load(dtype)[0])

        reference = Reference(name, quietly, independent=True)
        reference._kept = _loaded(model)
        return reference

    def _read(self, load: "Load") -> "tuple[Load, Any] | str":
        """How to load it, and the model in float32; or what was not read as stored."""
        found = _attempt(lambda: load(torch.float32))
        if isinstance(found, str):
            return found
        model, info = found
        return self._unread(info, model) or (load, model)

    def _options(self) -> dict[str, Any]:
        alibi = self.source.config.get("alibi")  # Falcon's eager attention adds ALiBi twice
        options = {"attn_implementation": None if alibi else "eager", "experts_implementation": "eager"}
        return options | {"output_loading_info": True}

    def _from_files(self, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        kind, local = _class(self.source), {"local_files_only": True, "trust_remote_code": False}
        found: tuple[Any, dict[str, Any]] = kind.from_pretrained(self.root, dtype=dtype, **local, **self._options())
        return found

    def _by_name(self) -> "tuple[Load, str]":
        """How to load it with tensors under the names that transformers wants, and what that assumes, in words."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.root, local_files_only=True, trust_remote_code=False)
        stored, shell, assumed = self._tensors(), self._empty(config), ""
        if (
            any(map(BIAS.search, stored))
            and not any(map(BIAS.search, shell.state_dict()))
            and hasattr(config, "attention_bias")
        ):
            config.attention_bias, assumed = True, " with attention_bias, since biases are stored"
            shell = self._empty(config)
        wanted = _wanted(shell)
        new = renaming({name: tuple(tensor.shape) for name, tensor in stored.items()}, wanted)
        given = {new.get(name, name): tensor for name, tensor in stored.items()}
        if assumed:  # biases of zero are not always stored
            given |= {name: torch.zeros(wanted[name]) for name in wanted.keys() - given.keys() if BIAS.search(name)}

        def load(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
            found: tuple[Any, dict[str, Any]] = type(shell).from_pretrained(
                None, config=deepcopy(shell.config), state_dict=dict(given), dtype=dtype, **self._options()
            )
            return found

        return load, assumed

    def _empty(self, config: Any) -> Any:
        """The model on `meta`: its class and the names it has."""
        found = _class(self.source)
        make = getattr(found, "from_config", None) or found._from_config
        with torch.device("meta"):
            return make(deepcopy(config))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Stored name → tensor, read by the libraries that write such files, wherever in the file the state dict is."""
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for at, original in enumerate(self.source.originals):
            names = {name for name, (file, _) in self.source.tensors.items() if file == at}
            path = self.source.published_paths[original.name]
            if original.container == "safetensors":
                with safe_open(path, "pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
            elif names:
                found |= _state(torch.load(path, map_location="cpu", weights_only=True), names)
        return found

    def _unread(self, info: Mapping[str, Any], model: Any) -> str:
        """What was not read as stored, in words; "" if all was."""
        layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0)
        odd = {
            "does not use": [name for name in info["unexpected_keys"] if not self._explained(name, layers)],
            "misses": [name for name in info["missing_keys"] if not self._aside(name)],
            "expects another shape of": [each[0] for each in info["mismatched_keys"]],
        }
        parts = [f"{words} {_some(names)}" for words, names in odd.items() if names]
        return f"transformers {', '.join(parts)}" if parts else ""

    def _explained(self, name: str, layers: int) -> bool:
        """Whether a model computes the same without this tensor: multi-token prediction, buffers in shipped tables.

        What a user's own table skips does not count: that may be the mistake.
        """
        parts, (_, numbers) = name.split("."), fold(name)
        ahead = any(part.startswith("mtp") for part in parts) or (
            "layers" in parts and numbers and 0 < layers <= numbers[0]
        )
        return bool(ahead) or self._aside(name)

    def _aside(self, name: str) -> bool:
        """Whether it is a buffer, which follows from config.json."""
        kind, _ = fold(name)
        table = families.family_of(self.source.config.model_type, self.source.config.architectures)
        ends = [template.folded.removeprefix("~") for template in table.aside] if table is not None else []
        return any(f".{kind}".endswith(f".{end}") for end in ends)


Load = Callable[[torch.dtype], tuple[Any, dict[str, Any]]]  # → a model, and transformers' loading info


def _attempt(work: Callable[[], T]) -> T | str:
    """The result, or transformers' error in words: it may be anything, for a checkpoint that it does not know."""
    try:
        with _quiet():
            return work()
    except Exception as error:
        if exhausted(error):
            raise
        words = str(error).strip().partition("\n")[0][:80]
        return f"transformers: {type(error).__name__}: {words}"


def _wanted(shell: Any) -> dict[str, tuple[int, ...]]:
    """The names, with shapes, under which transformers would save a model, or else those of its state dict."""
    state = dict(shell.state_dict())
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved = dict(revert_weight_conversion(shell, dict(state)))
    except Exception:  # an older transformers, or a conversion that needs data to be undone
        saved = {}
    return {name: tuple(tensor.shape) for name, tensor in (saved or state).items()}


def _state(value: Any, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The mapping with all of these names, however deeply nested."""
    if isinstance(value, Mapping):
        if all(name in value for name in names):
            return {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
        for inner in value.values():
            if found := _state(inner, names):
                return found
    return {}


def _some(names: Iterable[str]) -> str:
    """A few names, and how many there are."""
    found = sorted(map(str, names))
    shown = ", ".join(found[:SHOWN])
    return f"{len(found)} tensors ({shown}, …)" if len(found) > SHOWN else shown


def _loaded(model: Any) -> Loaded:
    model = model.eval()

    def run(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = model(ids, use_cache=cache is not None, past_key_values=cache).logits
        return logits

    def new_cache(batch: int, length: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    return Loaded(run, new_cache, model)


def _class(source: Source) -> Any:
    """The class that loads a checkpoint; with other components, the class in config.json, for text only."""
    import transformers

    if not source.layout.model.family.towers:
        return transformers.AutoModelForCausalLM
    named = (getattr(transformers, name, None) for name in source.config.architectures)
    return next((found for found in named if found is not None), transformers.AutoModelForImageTextToText)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    from transformers.utils import logging as theirs

    logging: Any = theirs
    was, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(was)
        if bars:
            logging.enable_progress_bar()
