"""Inference-time steering of diffusion and flow models.

result = steering.steer(pipe, "a photo of a red apple", reward="clip", method="fk", nfe=800)
"""

from __future__ import annotations

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source checkout samplers/, rewards/, kernels/ and apps/ lie beside this folder; a wheel has
# them inside it. kernels/ has no __init__.py, so an editable install cannot map it either.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "samplers").is_dir():
    __path__.append(str(_root))

_NAMES = {
    "steer": "steering.api",
    "wrap": "steering.pipelines",
    "load": "steering.loading",
    "replay": "steering.repeat",
    "Model": "steering.model",
    "NoiseKey": "steering.noise",
    "Result": "steering.result",
    "Budget": "steering.ledger",
    "SteeringError": "steering.errors",
}
_MODULES = ("analytic", "errors", "grids", "noise", "paths", "rewards", "samplers", "transitions")

if TYPE_CHECKING:
    from steering.api import steer
    from steering.errors import SteeringError
    from steering.ledger import Budget
    from steering.loading import load
    from steering.model import Model
    from steering.noise import NoiseKey
    from steering.pipelines import wrap
    from steering.repeat import replay
    from steering.result import Result

__all__ = [
    "Budget",
    "Model",
    "NoiseKey",
    "Result",
    "SteeringError",
    "load",
    "replay",
    "steer",
    "wrap",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Loaded on first use: `import steering` costs no torch, diffusers or transformers import.
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"steering.{name}")
    raise AttributeError(f"module 'steering' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
