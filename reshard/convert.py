"""Renamed: see conversion.py. Goes away."""

import sys

from . import conversion

sys.modules[__name__] = conversion
