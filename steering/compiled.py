"""torch.compile for a pipeline's denoisers, with few fixed widths and never a wrong number.

Compiled code is made per shape, and an engine's batches have many widths. So rows are padded to
the next width of a short list; the padding is ours and is not charged. Each width asked for is
checked against the eager network once. Where compiling fails or the numbers differ, one warning
names the reason and the eager network serves.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from steering.errors import OptionError
from steering.pipelines.meter import count_rows, denoisers

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference from the eager network, relative to its largest output."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_networks(
    pipe: Any,
    mode: str = "default",
    *,
    widths: Sequence[int] = WIDTHS,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compiles the denoising networks of a pipeline; calls that keep a graph stay eager.

    Args:
        mode: of torch.compile; "reduce-overhead" uses CUDA graphs.
        widths: rows that code is made for; wider calls stay eager.
        backend: of torch.compile.

    Raises:
        OptionError: an unknown mode, or widths that are not positive.
    """
    if mode not in MODES:
        raise OptionError(f"Unknown mode {mode!r} of compile. Known: {', '.join(MODES)}.")
    if not widths or min(widths) < 1:
        raise OptionError(f"compile needs positive widths, got {list(widths)}.")
    for network in denoisers(pipe).values():
        if not isinstance(getattr(network, "forward", None), Bucketed):
            network.forward = Bucketed(network.forward, mode, widths, backend)  # type: ignore[method-assign]


class Bucketed:
    """A network's forward, compiled for fixed widths.

    Attributes:
        made: widths that code was made for so far.
        refused: why the eager network serves instead; None while the compiled one does.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        mode: str,
        widths: Sequence[int],
        backend: str | Callable[..., Any],
    ) -> None:
        options: dict[str, Any] = {} if mode == "default" else {"mode": mode}
        self.plain, self.mode = plain, mode
        self.fast = torch.compile(plain, dynamic=False, backend=backend, **options)
        self.widths = tuple(sorted(widths))
        self.made: set[int] = set()
        self.checked: set[int] = set()
        self.refused: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = count_rows(args, kwargs)
        width = next((w for w in self.widths if w >= rows), None)
        if self.refused is not None or width is None or torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        try:
            out = self._padded(rows, width, args, kwargs)
        except Exception as why:  # compilers raise all sorts
            said = " ".join([line for line in str(why).splitlines() if line.strip()][:2])
            return self._refuse(f"{type(why).__name__}: {said}", args, kwargs)
        if rows in self.checked:
            return out
        want = self.plain(*args, **kwargs)
        error = difference(out, want)
        if error is not None:
            return self._refuse(error, args, kwargs, want)
        self.checked.add(rows)
        self.made.add(width)
        return out

    def _padded(self, rows: int, width: int, args: Any, kwargs: Any) -> Any:
        def pad(value: Any) -> Any:
            if rows == width or not isinstance(value, Tensor) or value.ndim == 0:
                return value
            if len(value) != rows:
                return value
            return torch.cat([value, value[-1:].expand(width - rows, *value.shape[1:])])

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # A copy: the next replay of a CUDA graph writes over its output.
            return value[:rows].clone() if value.ndim and len(value) == width else value.clone()

        args, kwargs = tree_map(pad, (args, kwargs))
        return tree_map(cut, self.fast(*args, **kwargs))

    def _refuse(self, reason: str, args: Any, kwargs: Any, answer: Any = None) -> Any:
        self.refused = reason
        warnings.warn(
            f"The compiled network is not used: {reason}. The eager one serves instead.",
            stacklevel=3,
        )
        return self.plain(*args, **kwargs) if answer is None else answer


def difference(got: Any, want: Any) -> str | None:
    """What tells two outputs apart; None where rounding explains it."""
    ours = [v for v in tree_leaves(got) if isinstance(v, Tensor)]
    theirs = [v for v in tree_leaves(want) if isinstance(v, Tensor)]
    if [v.shape for v in ours] != [v.shape for v in theirs] or not ours:
        return "its output has another shape than the eager one's"
    for a, b in zip(ours, theirs, strict=True):
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1))
        allowed = TOLERANCE.get(b.dtype, 1e-6)
        if not error <= allowed:
            return f"it differs from the eager one by {error:.2g} (allowed: {allowed:.2g})"
    return None
