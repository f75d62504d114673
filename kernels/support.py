"""Whether a fused kernel may be used: what it needs is here, and it agrees with its twin.

Nothing is taken on trust. A kernel is tried once per device and dtype on a small case against its
plain-torch twin. Where it cannot run, or disagrees, the twin serves for the rest of the process
and one warning names the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)
"""The oldest CUDA architecture that Triton still supports."""

_verdicts: dict[tuple[str, str, torch.dtype], str | None] = {}


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def toolchain() -> str | None:
    """Why Triton cannot build a launcher on this machine; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C compiler (Triton looks for $CC, gcc, clang)"
    return None


def obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on a device; None where nothing stands against it."""
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, not on {device.type}"
    found = toolchain()
    if found is None and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {capability}, below {MIN_CAPABILITY}"
    return found


def ready(
    kernel: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    probe: Callable[[torch.device, torch.dtype], float],
    tolerance: float,
) -> bool:
    """Whether a kernel may serve tensors like ``x``; decided once per device and dtype.

    Args:
        kernel: its name, for the warning.
        dtypes: those it is written for.
        probe: runs kernel and twin on a small case; the largest difference.
        tolerance: the largest difference that rounding explains.
    """
    name = (kernel, str(x.device), x.dtype)
    if name not in _verdicts:
        _verdicts[name] = _judge(x, dtypes, probe, tolerance)
        if _verdicts[name] is not None:
            warnings.warn(
                f"The fused kernel {kernel!r} is not used on {x.device}: {_verdicts[name]}. "
                "Plain torch serves instead; results are the same.",
                stacklevel=3,
            )
    return _verdicts[name] is None


def forget() -> None:
    """Lets every kernel be tried again."""
    _verdicts.clear()
    toolchain.cache_clear()


def _judge(
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    probe: Callable[[torch.device, torch.dtype], float],
    tolerance: float,
) -> str | None:
    reason = obstacle(x.device)
    if reason is not None:
        return reason
    if x.dtype not in dtypes:
        return f"it is not written for {str(x.dtype).removeprefix('torch.')}"
    try:
        error = probe(x.device, x.dtype)
    except Exception as why:  # compilers and drivers raise all sorts
        lines = str(why).strip().splitlines()
        return f"{type(why).__name__}: {lines[0] if lines else 'no message'}"
    if not error <= tolerance:  # catches NaN too
        return f"it differs from its twin by {error:.2g} in a trial (allowed: {tolerance:.2g})"
    return None
