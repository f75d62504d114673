"""What no guide may be set to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from steering.errors import OptionError
from steering.samplers.idle import refuse_idle
from steering.samplers.twists import check_positive

if TYPE_CHECKING:
    from steering.samplers.guides import Guide


def check_guide(guide: Guide) -> None:
    """Raises where an option of a guide is out of its range or does nothing.

    Raises:
        OptionError: names it.
    """
    for option in ("n_iter", "n_draws", "recurrence", "micro_batch"):
        value = getattr(guide, option)
        if value is not None and value < 1:
            raise OptionError(f"guidance: {option} must be at least 1, got {value}.")
    for option in ("rho", "mu", "smoothing"):
        if not 0.0 <= getattr(guide, option) < math.inf:
            raise OptionError(f"guidance: {option} must be finite and not negative.")
    if not 0.0 <= guide.start <= guide.stop <= 1.0:
        raise OptionError("guidance: start and stop are shares with 0 <= start <= stop <= 1.")
    check_positive("guidance", clip_norm=guide.clip_norm, data_std=guide.data_std)
    if guide.n_draws > 1 and not guide.smoothing:
        raise OptionError("guidance: n_draws > 1 needs smoothing > 0, or all draws are equal.")
    _check_idle(guide)


def _check_idle(guide: Guide) -> None:
    if not guide.mu:
        refuse_idle(guide, "mu=0", "n_iter", "keep_eps")
    if not guide.rho:
        refuse_idle(guide, "rho=0", "space")
    if not guide.smoothing:
        refuse_idle(guide, "smoothing=0", "spread", "data_std")
    if guide.spread != "posterior":
        refuse_idle(guide, f"spread={guide.spread!r}", "data_std")
