"""The reference of the numeric proof: transformers, run from the original files; where it cannot, this runtime at TP 1, from them too.

Where transformers is not installed or does not know the model (block-scaled FP8); the name of a reference says which it is, and why.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reshard.source import Source

from .load import load_model
from .memory import exhausted
from .parallel import alone

Run = Callable[[torch.Tensor], torch.Tensor]  # ids [batch, seq] → logits [batch, seq, vocab]


class Theirs:
    """A model of transformers, run without a cache; `module` for those who want to look inside."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(ids, use_cache=False).logits
        return logits


class Reference:
    """The unsharded model, in any dtype, loaded anew for each but float32. `independent`: it is not this runtime."""

    def __init__(self, name: str, load: Callable[[torch.dtype], Run], independent: bool = False) -> None:
        self.name, self.load, self.independent = name, load, independent
        self._kept: Run | None = None

    def prepare(self) -> Run:
        """Load it in float32, which stays loaded."""
        if self._kept is None:
            self._kept = self.load(torch.float32)
        return self._kept

    def logits(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kept = self.prepare()
        run = kept if dtype is torch.float32 else self.load(dtype)
        return torch.cat([run(part) for part in ids.split(8)])

    def greedy(self, starts: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model goes on with, in float32, and by how much it preferred each token to the second, both [texts, most]."""
        run, ids, margins = self.prepare(), starts, []
        for _ in range(most):
            best, tokens = run(ids)[:, -1].topk(2, -1)
            ids = torch.cat([ids, tokens[:, :1]], 1)
            margins.append(best[:, 0] - best[:, 1])
        return ids[:, starts.shape[1] :], torch.stack(margins, 1)


def reference_for(source: Source) -> Reference:
    """For a published checkpoint: transformers where it is installed and can run the model, else this runtime at TP 1."""
    root = str(source.root)
    try:
        import transformers
    except ImportError:
        return Reference("this runtime at TP 1 (transformers is not installed)", _ours(source))
    if source.layout.model.family.quantization and (method := source.config.get("quantization_config")) is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        return Reference(f"this runtime at TP 1 (transformers does not run {name} weights here)", _ours(source))

    def load(dtype: torch.dtype) -> Run:
        with _quiet():
            loaded: Any = _class(source).from_pretrained(
                root,
                dtype=dtype,
                attn_implementation=None if source.config.get("alibi") else "eager",  # Falcon's eager attention adds ALiBi twice
                experts_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
            )
        return Theirs(loaded.eval())

    found = Reference(f"transformers {transformers.__version__}", load, independent=True)
    try:
        with torch.inference_mode():
            found.prepare()(torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # whatever it stumbles over in a checkpoint that it does not know
        if exhausted(error):
            raise
        words = str(error).strip().partition("\n")[0][:80]
        return Reference(f"this runtime at TP 1 (transformers: {type(error).__name__}: {words})", _ours(source))
    return found


def _class(source: Source) -> Any:
    """What transformers loads a checkpoint as; one with other towers as what it says that it is, to be given text alone."""
    import transformers

    if not source.layout.model.family.towers:
        return transformers.AutoModelForCausalLM
    named = (getattr(transformers, name, None) for name in source.config.architectures)
    return next((found for found in named if found is not None), transformers.AutoModelForImageTextToText)


def _ours(source: Source) -> Callable[[torch.dtype], Run]:
    return lambda dtype: load_model(source, dtype, world=alone())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers."""
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
