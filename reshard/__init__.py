"""reshard: any published checkpoint, to any parallel layout and back, provably exact.

import reshard
reshard.plan(src, tp=8)        reshard.convert(src, out, tp=8)        reshard.verify(out, against=src)
reshard.inspect(src)
"""

TYPE_CHECKING = False  # to type checkers it is true; `typing` is a module to load before a signal is caught
if TYPE_CHECKING:
    from typing import Any

    from .api import convert as convert
    from .api import plan as plan
    from .api import verify as verify
    from .errors import MismatchError as MismatchError
    from .errors import PlaceError as PlaceError
    from .errors import ReshardError as ReshardError
    from .jobs.inspect import describe as inspect

__all__ = ["MismatchError", "PlaceError", "ReshardError", "convert", "inspect", "plan", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> "Any":
    """Functions and errors are imported when they are used: `import reshard` costs nothing."""
    if name.endswith("Error") and name in __all__:
        from . import errors

        return getattr(errors, name)
    if name in ("plan", "convert", "verify"):
        from . import api

        return getattr(api, name)
    if name == "inspect":
        from .jobs.inspect import describe

        return describe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
