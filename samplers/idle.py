"""Options that another option makes useless are refused, not ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from steering.errors import IdleOption

if TYPE_CHECKING:
    from steering.samplers.base import Sampler
    from steering.samplers.guides import Guide


def refuse_idle(method: Sampler | Guide, setting: str, *options: str) -> None:
    """Raises where options that ``setting`` makes no use of are not at their defaults.

    Raises:
        IdleOption: names them.
    """
    usual = {f.name: f.default for f in fields(method)}
    idle = tuple(o for o in options if getattr(method, o) != usual[o])
    if idle:
        said = ", ".join(f"{o}={getattr(method, o)!r}" for o in idle)
        raise IdleOption(
            f"{method.name}: {said} has no meaning with {setting}. Leave one out.", idle
        )


def check_resampling(method: Sampler, *, threshold_counts: bool = False) -> None:
    """Raises where the method's ``resample`` makes no use of ess_threshold or resampler.

    Args:
        threshold_counts: ess_threshold has a further use.
    """
    options: Any = method
    setting = f"resample={options.resample!r}"
    if options.resample != "ess" and not threshold_counts:
        refuse_idle(method, setting, "ess_threshold")
    if options.resample == "never":
        refuse_idle(method, setting, "resampler")
