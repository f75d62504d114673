"""How other methods take guidance: what their option ``guidance`` may be, and who leads."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.errors import OptionError, unknown_name
from steering.method import Context, over_preset
from steering.paths import Time
from steering.requests import Denoise, Request
from steering.samplers.guide_presets import GUIDES
from steering.samplers.guides import Guide, Rows
from steering.transitions import Transition


class Lead(NamedTuple):
    """A guide and the scale of the reward that it differentiates."""

    guide: Guide
    reward_scale: float


def led(
    ctx: Context,
    x: Tensor,
    t: Time,
    u: Time,
    i: int,
    kernel: Transition,
    lead: Lead | None,
    *,
    weighed: bool = False,
    rows: Rows | None = None,
) -> Generator[Request, Any, tuple[Tensor, Tensor]]:
    """Step i of x [n, *event], guided where there is a lead: (x_u, log p - log q [n] float64)."""
    rows = rows or Rows()
    if lead is None:
        prediction = yield Denoise(x, t, cond=rows.cond)
        moved = ctx.move(x, prediction, t, u, kernel, step=i, slots=rows.slots, stream=rows.stream)
        return moved, torch.zeros(len(x), dtype=torch.float64)
    guide, scale = lead
    return (yield from guide.step(ctx, x, t, u, i, kernel, scale, weighed=weighed, rows=rows))


def as_guide(value: Guide | str | Mapping[str, Any] | None) -> Guide | None:
    """A guide from the name of a preset, from options (with "preset" among them), or itself.

    Raises:
        OptionError: an unknown name or option.
    """
    if value is None or type(value) is Guide:
        return value
    if isinstance(value, str):
        if value.lower() in ("none", ""):  # words of the command line
            return None
        value = {"preset": value}
    if not isinstance(value, Mapping):
        raise OptionError(
            f"guidance must be a preset's name, options or a samplers.Guide, got {value!r}. A "
            "Guidance is a method: its own sampler would be ignored here."
        )
    options = dict(value)
    preset = options.pop("preset", None)
    if preset is not None and preset not in GUIDES:
        raise unknown_name("guidance", preset, GUIDES)
    known = [f.name for f in fields(Guide)]
    for option in options:
        if option not in known:
            raise unknown_name("option of guidance", option, known)
    return over_preset(Guide, GUIDES.get(preset or "", {}), options)


def check_weighed(name: str, guide: Guide, kernel: Transition) -> None:
    """Raises where guided steps have no density that weights could be corrected by."""
    if not kernel.stochastic:
        raise OptionError(
            f"{name} asks for the density of guided steps, and eta=0 makes them deterministic. "
            "Set eta > 0 (for flow models too: the eta-kernel keeps their marginals)."
        )
    if guide.recurrence > 1:
        raise OptionError(
            f"{name} asks for the density of guided steps, and a repeated step has none in closed "
            "form. Set recurrence=1 in its guidance, or use best_of_n."
        )
