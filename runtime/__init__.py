"""The runtime: loads shards, runs the model, generates text. `from reshard.runtime import load_shard, load_model`."""

from typing import TYPE_CHECKING, Any

if __name__ != "reshard.runtime":  # a checkout's runtime/ on sys.path: every module would be imported twice
    raise ImportError(f"this package is reshard.runtime, not {__name__}")

if TYPE_CHECKING:
    from .load import load_model, load_shard

__all__ = ["load_model", "load_shard"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
