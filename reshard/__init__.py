"""reshard: any published checkpoint, to any parallel layout and back, provably exact.

import reshard
reshard.plan(src, tp=8)        reshard.convert(src, out, tp=8)        reshard.verify(out, against=src)
reshard.inspect(src)
"""

from typing import TYPE_CHECKING, Any

from .errors import MismatchError, PlaceError, ReshardError

if TYPE_CHECKING:
    from .api import convert as convert
    from .api import plan as plan
    from .api import verify as verify
    from .jobs.inspect import describe as inspect

__all__ = ["MismatchError", "PlaceError", "ReshardError", "convert", "inspect", "plan", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The functions are imported when they are used: `import reshard` costs nothing."""
    if name in ("plan", "convert", "verify"):
        from . import api

        return getattr(api, name)
    if name == "inspect":
        from .jobs.inspect import describe

        return describe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
