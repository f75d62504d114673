"""A pipeline's schedule as a path and a grid, and its network's words as a Prediction.

Every diffusers scheduler keeps its state as x = alpha x0 + sigma eps in one of four families:

    family  alpha, sigma                  model input          net (the number the network gets)
    vp      sqrt(ac), sqrt(1 - ac)        x                    timestep
    ve      1, sqrt((1 - ac) / ac)        x / sqrt(sigma^2+1)  timestep, or ln(sigma) / 4
    flow    1 - sigma, sigma              x                    1000 sigma
    edm     1, sigma                      c_in(sigma) x        c_noise(sigma)

with ac the cumulative product of alphas. Some schedulers truncate their timesteps to whole
numbers (UniPC and DPM++ with flow sigmas): a node keeps the exact sigma beside the number the
network was given. ``clip_sample`` and thresholding of pixel-space schedulers are not applied.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.errors import PipelineError
from steering.grids import Grid
from steering.paths import (
    VE,
    Linear,
    Path,
    Prediction,
    Tabulated,
    Time,
    Times,
    alpha_sigma,
    from_eps,
    from_flow,
    from_v,
    from_x0,
)

_FAMILIES = {
    "vp": (
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ),
    "ve": (
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    ),
    "flow": (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "LTXEulerAncestralRFScheduler",
    ),
    "edm": (
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CosineDPMSolverMultistepScheduler",
    ),
}

_PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}


def family_of(scheduler: Any) -> str:
    """vp, ve, flow or edm.

    Raises:
        PipelineError: the scheduler's state is not of the form alpha x0 + sigma eps.
    """
    config = scheduler.config
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    for family, members in _FAMILIES.items():
        if any(name in members for name in names):
            return family
    raise PipelineError(
        f"The scheduler {names[0]} is not supported: its state is not known to be "
        "alpha x0 + sigma eps (trigonometric, consistency and discrete schedulers are not). "
        "Give the pipeline a FlowMatchEuler, DDIM, DPM++, UniPC, Euler or EDM scheduler."
    )


class SchedulePath(Path):
    """A path that also knows which number the network is told at each time.

    Attributes:
        base: the noising path.
        tell: (path time, sigma) to the network's number.
    """

    def __init__(self, base: Path, tell: Callable[[float, float], float]) -> None:
        self.base = base
        self.tell = tell

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.base.d_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.base.d_sigma(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.t_of_log_snr(log_snr)

    def at(self, t: float) -> Time:
        node = self.base.at(t)
        return Time(node.t, node.alpha, node.sigma, self.tell(node.t, node.sigma), end=node.end)

    def __repr__(self) -> str:
        return f"SchedulePath({self.base!r})"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a pipeline's own set_timesteps made, with the family's arithmetic.

    Attributes:
        family, prediction: see the table above; epsilon, v, sample or flow.
        path: with ``at`` filling the network's number.
        loop: one Time for each turn of the pipeline's own loop (second-order solvers take two).
        grid: the nodes from noise to data, without repeats.
        walked: the timesteps the loop goes through, on the CPU.
    """

    family: str
    prediction: str
    path: SchedulePath
    loop: tuple[Time, ...]
    grid: Grid
    walked: Tensor
    scheduler: Any
    _turns: dict[float, int] = field(default_factory=dict)

    def index(self, net: float) -> int:
        """The turn of the loop whose timestep is nearest: what a pipeline's ``i`` means."""
        if net not in self._turns:
            self._turns[net] = int((self.walked.double() - net).abs().argmin())
        return self._turns[net]

    def scale_input(self, x: Tensor, times: Sequence[Time]) -> Tensor:
        """What scheduler.scale_model_input gives at these levels, without its hidden step."""
        if self.family not in ("ve", "edm"):
            return x
        if len({time.sigma for time in times}) == 1:
            sigma = torch.tensor(times[0].sigma, dtype=torch.float32)
        else:
            rows = torch.tensor([time.sigma for time in times], dtype=torch.float32)
            rows = rows.to(x.device).repeat(x.shape[0] // len(times))
            sigma = rows.reshape(-1, *[1] * (x.ndim - 1))
        if self.family == "edm":
            return self.scheduler.precondition_inputs(x, sigma)
        return x / ((sigma**2 + 1) ** 0.5)

    def predict(self, x: Tensor, out: Tensor, t: Times) -> Prediction:
        """From what reached scheduler.step; x and out float32 [n, *event]."""
        if out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]  # the second half is a learned variance
        if self.family == "edm":
            return self._from_edm(x, out, t)
        if self.prediction == "flow":
            return from_flow(x, -out if self.scheduler.config.get("invert_sigmas") else out, t)
        if self.prediction == "epsilon":
            return from_eps(x, out, t)
        return from_v(x, out, t) if self.prediction == "v" else from_x0(x, out, t)

    def _from_edm(self, x: Tensor, out: Tensor, t: Times) -> Prediction:
        # Karras et al. (2022), table 1; diffusers flips c_out for v_prediction.
        data = float(self.scheduler.config.sigma_data)
        _, s = alpha_sigma(t, x)
        total = s * s + data * data
        skip = data * data / total
        scale = s * data / total**0.5
        x0 = skip * x + (-scale if self.prediction == "v" else scale) * out
        return Prediction(x0, (x - x0) / s)


def read_schedule(scheduler: Any, walked: Tensor) -> Schedule:
    """The schedule of a scheduler whose set_timesteps has run.

    Args:
        scheduler: an unhooked copy.
        walked: the timesteps the pipeline's loop really goes through (img2img takes a tail).
    """
    family = family_of(scheduler)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind not in _PREDICTIONS:
        raise PipelineError(f"prediction_type {kind!r} is not supported.")
    path = _path(scheduler, family)
    walked = walked.detach().cpu()
    ratios, last = _levels(scheduler, family, walked)
    nets = [float(t) for t in walked]
    loop = tuple(_node(path, family, r, n) for r, n in zip(ratios, nets, strict=True))
    order = getattr(scheduler, "order", 1)
    end = _node(path, family, last, path.tell(0.0, last), end=True)
    grid = _monotone([*loop[::order], end])
    return Schedule(family, _PREDICTIONS[kind], path, loop, grid, walked, scheduler)


def _path(scheduler: Any, family: str) -> SchedulePath:
    steps = float(scheduler.config.get("num_train_timesteps", 1000))
    whole = not scheduler.timesteps.is_floating_point()

    def rounded(net: float) -> float:
        return float(round(net)) if whole else net

    if family == "flow":
        if scheduler.config.get("invert_sigmas"):
            return SchedulePath(Linear(), lambda t, s: rounded((1.0 - s) * steps))
        return SchedulePath(Linear(), lambda t, s: rounded(s * steps))
    if family == "edm":
        floor = float(scheduler.config.get("sigma_min", 1e-3))
        return SchedulePath(
            VE(float(scheduler.config.sigma_max)),
            lambda t, s: float(scheduler.precondition_noise(torch.tensor(max(s, floor)))),
        )
    if scheduler.config.get("timestep_type") == "continuous":
        top = float(scheduler.sigmas.max())
        return SchedulePath(VE(top), lambda t, s: 0.25 * math.log(max(s, 1e-3)))
    table = Tabulated(scheduler.alphas_cumprod, exploding=family == "ve")
    return SchedulePath(table, lambda t, s: rounded(min(max(t * steps - 1.0, 0.0), steps - 1.0)))


def _levels(scheduler: Any, family: str, walked: Tensor) -> tuple[list[float], float]:
    """Per turn: sigma (flow, edm) or sigma / alpha (vp, ve); and the same where the loop ends."""
    full = scheduler.timesteps.detach().cpu()
    start = _start(full, walked)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > len(full):
        values = [float(s) for s in sigmas.detach().cpu().double()]
        between = getattr(scheduler, "sigmas_interpol", None)
        here = values[start : start + len(walked)]
        if between is not None:  # KDPM2: every second turn stands between two nodes
            back = 1 if "Ancestral" in type(scheduler).__name__ else 0
            here = [
                float(between[start + k - back]) if (start + k) % 2 else value
                for k, value in enumerate(here)
            ]
        if scheduler.config.get("invert_sigmas"):
            return [1.0 - s for s in here], 1.0 - values[-1]
        return here, values[-1]
    if family == "flow":
        steps = float(scheduler.config.get("num_train_timesteps", 1000))
        return [float(t) / steps for t in walked], 0.0
    table = scheduler.alphas_cumprod.detach().cpu().double()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    products = [float(table[int(t)]) for t in walked]
    return [_ratio(ac) for ac in products], _ratio(final)


def _ratio(ac: float) -> float:
    return math.sqrt((1.0 - ac) / ac) if ac > 0 else math.inf


def _start(full: Tensor, walked: Tensor) -> int:
    for start in range(len(full) - len(walked), -1, -1):
        if torch.equal(full[start : start + len(walked)], walked):
            return start
    raise PipelineError(
        "The pipeline's loop walks timesteps that are not a run of scheduler.timesteps "
        f"({len(walked)} of {len(full)}); its noise levels cannot be known."
    )


def _node(path: SchedulePath, family: str, level: float, net: float, end: bool = False) -> Time:
    if family == "flow":
        return Time(level, 1.0 - level, level, net, end)
    if isinstance(path.base, VE):
        return Time(level / path.base.sigma_max, 1.0, level, net, end)
    alpha = 0.0 if math.isinf(level) else 1.0 / math.sqrt(1.0 + level * level)
    sigma = 1.0 if math.isinf(level) else level * alpha
    if family == "ve":
        alpha, sigma = 1.0, level
    return Time(_table_time(path.base, level, net, end), alpha, sigma, net, end)


def _table_time(table: Path, level: float, net: float, end: bool) -> float:
    assert isinstance(table, Tabulated)
    if level == 0.0:
        return 0.0
    t = (net + 1.0) / table.steps
    at = float(table.ratio(torch.tensor(t, dtype=torch.float64)))
    if math.isinf(level) or (not end and abs(at - level) <= 1e-5 * level):
        return t
    return float(table.t_of_log_snr(torch.tensor(-math.log(level), dtype=torch.float64)))


def _monotone(nodes: Sequence[Time]) -> Grid:
    kept = [nodes[0]]
    for node in nodes[1:]:
        if node.log_snr > kept[-1].log_snr:
            kept.append(node)
    last = kept[-1]
    kept[-1] = Time(last.t, last.alpha, last.sigma, last.net, end=True)
    if len(kept) < 2:
        raise PipelineError("The pipeline's schedule has no step from noise towards data.")
    return Grid(tuple(kept))


__all__ = ["Schedule", "SchedulePath", "family_of", "read_schedule"]
