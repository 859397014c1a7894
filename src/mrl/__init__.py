"""MRL, Mixing Regionally and Locally: swap it into a model you run, and learn whether it is worth it.

Importing registers our networks with timm and does nothing else; the verbs are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from mrl import blocks, models
from mrl.errors import ConfigError, DataError, MissingExtra, MrlError, ParityError, SwapError

__version__ = "0.1.0"

_LAZY = {
    "SwapConfig": "mrl.swap",
    "plan": "mrl.swap",
    "swap_": "mrl.swap",
    "calibrate": "mrl.swap",
    "select": "mrl.swap",
    "save": "mrl.swap",
    "load": "mrl.swap",
    "register_adapter": "mrl.swap.adapters",
    "Protocol": "mrl.protocol",
    "poc": "mrl.poc",
    "predict": "mrl.predict",
    "Predictor": "mrl.predictor",
}

__all__ = [
    "ConfigError",
    "DataError",
    "MissingExtra",
    "MrlError",
    "ParityError",
    "SwapError",
    "blocks",
    "models",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mrl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
