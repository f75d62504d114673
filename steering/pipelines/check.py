"""Does a wrapped pipeline do what ``pipe(...)`` does? The acceptance test for any pipeline.

Driven by a copy of the pipeline's own scheduler, a wrapped pipeline must give the very latents and
pixels of ``pipe(...)``: the difference expected is 0.0. The rest of the report says how it may be
batched, whether it has gradients, and what a step costs.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.noise import NoiseKey
from steering.pipelines.prompts import Arguments
from steering.pipelines.wrap import WrappedPipeline, wrap

_OTHER = "a red bicycle leaning against a wall"
_KEY = NoiseKey(seed=20, stream="check")


@dataclass(kw_only=True)
class CheckReport:
    """What check() found; None where a part could not be compared or was not run.

    Attributes:
        latents: largest difference to pipe(...), by batch width; 0.0 expected.
        pixels: the same after decoding, width 1.
        noise_equal: equal keys give equal bits at widths 1 and 3.
        prompts_differ: how far two prompts part at the same state (0 would make the next vacuous).
        mixed_prompts: largest relative difference of a batch over two prompts to rows alone.
        chunked: the same for a batch split by max_batch.
        mixed_times, mixing_reason: whether rows at different times share calls, and why not.
        several_times: relative difference of rows at several times in one predict to rows alone.
        decode_order: decoding commutes with reversing the batch (largest difference).
        gradient_finite, gradient_ratio: of x0 with respect to x; finite difference over gradient.
        decode_gradient_finite: of the pixels.
        costs: network rows per sample and step.
        ms_per_query, ms_per_step: a width-1 predict, and a step of pipe(...).
        failures: what is wrong, in sentences; empty when all is well.
    """

    name: str
    family: str
    path: str
    prediction: str
    dtype: str
    event_shape: tuple[int, ...]
    steps: int
    guidance: float | None = None
    latents: dict[int, float | None] = field(default_factory=dict)
    pixels: float | None = None
    noise_equal: bool | None = None
    prompts_differ: float | None = None
    mixed_prompts: float | None = None
    chunked: float | None = None
    mixed_times: bool | None = None
    mixing_reason: str = ""
    several_times: float | None = None
    decode_order: float | None = None
    gradient_finite: bool | None = None
    gradient_ratio: float | None = None
    decode_gradient_finite: bool | None = None
    costs: tuple[int, ...] = ()
    ms_per_query: float | None = None
    ms_per_step: float | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        out = asdict(self)
        out["latents"] = {str(n): d for n, d in self.latents.items()}
        return {
            **out,
            "event_shape": list(self.event_shape),
            "costs": list(self.costs),
            "ok": self.ok,
        }

    def table(self) -> str:
        """The report for a terminal."""
        rows = [
            ("pipeline", f"{self.name}, {self.dtype}, state {list(self.event_shape)}"),
            ("path", f"{self.path} ({self.family}), network says {self.prediction}"),
            ("schedule", f"{self.steps} steps, network rows per step {_runs(self.costs)}"),
            *[(f"latents, n={n}", _difference(d)) for n, d in self.latents.items()],
            ("pixels", _difference(self.pixels)),
            ("noise at any width", _say(self.noise_equal, "equal", "differs")),
            ("two prompts in a batch", f"{_number(self.mixed_prompts)} relative"),
            ("max_batch", f"{_number(self.chunked)} relative"),
            (
                "mixed times",
                _say(self.mixed_times, "in one call", f"grouped: {self.mixing_reason}"),
            ),
            ("several times", f"{_number(self.several_times)} relative"),
            ("decode order", _number(self.decode_order)),
            (
                "gradient",
                f"{_say(self.gradient_finite, 'finite', 'NOT finite')}, finite difference "
                f"/ gradient {_number(self.gradient_ratio)}",
            ),
            ("through decode", _say(self.decode_gradient_finite, "finite", "NOT finite")),
            (
                "time",
                f"{_number(self.ms_per_query)} ms a query, {_number(self.ms_per_step)} ms a "
                "step of pipe(...)",
            ),
            ("verdict", "ok" if self.ok else "FAILED: " + " ".join(self.failures)),
        ]
        return "\n".join(f"{name:24s}{value}" for name, value in rows)

    __str__ = table


def check(pipe_or_model: Any, **call_kwargs: Any) -> CheckReport:
    """Compares a wrapped pipeline with the pipeline itself.

    Args:
        pipe_or_model: a diffusers pipeline, or what wrap() returned for one.
        call_kwargs: as for wrap(); only with a pipeline. A second prompt is added where there is
            one, to test mixed batches.

    Raises:
        PipelineError: the pipeline cannot be driven at all.
    """
    if isinstance(pipe_or_model, WrappedPipeline):
        pipe, call_kwargs = pipe_or_model.pipe, dict(pipe_or_model.call_kwargs)
    else:
        pipe = pipe_or_model
    if isinstance(call_kwargs.get("prompt"), str):
        call_kwargs["prompt"] = [call_kwargs["prompt"], _OTHER]
    with wrap(pipe, **call_kwargs) as model:
        report = CheckReport(
            name=model.name,
            family=model.family,
            path=type(getattr(model.path, "base", model.path)).__name__,
            prediction=model.prediction_type,
            dtype=str(model.dtype).removeprefix("torch."),
            event_shape=model.event_shape,
            steps=len(model.grid()),
            guidance=model.guidance,
        )
        for part in (_exactness, _batching, _decoding, _gradients, _cost):
            try:
                part(model, report)
            except Exception as why:  # one failing part must not hide the others
                report.failures.append(f"{part.__name__[1:]}: {type(why).__name__}: {why}.")
        _judge(report, model)
    return report


def _judge(report: CheckReport, model: WrappedPipeline) -> None:
    narrow = model.dtype in (torch.float16, torch.bfloat16)
    exact = [*report.latents.values(), report.pixels, report.decode_order]
    if any(d is not None and not d <= (1e-2 if narrow else 1e-4) for d in exact):
        report.failures.append("it does not reproduce pipe(...).")
    loose = [report.mixed_prompts, report.chunked, report.several_times]
    if any(d is not None and not d <= (5e-2 if narrow else 1e-4) for d in loose):
        report.failures.append("rows of a batch are not what they are alone.")
    if report.noise_equal is False:
        report.failures.append("noise depends on the batch width.")
    if report.gradient_finite is False or report.decode_gradient_finite is False:
        report.failures.append("a gradient is not finite.")


# --- parts ----------------------------------------------------------------------------------


def _exactness(model: WrappedPipeline, report: CheckReport) -> None:
    for n in (1, 2):
        try:
            plain, seconds = _plain(model, n, "latent")
        except (IndexError, RuntimeError, ValueError):
            if n == 1:
                raise
            report.latents[n] = None  # pipe(...) itself takes no list of generators
            continue
        with model._script.seeded(_KEY):
            ours = drive(model, n)
        report.latents[n] = _gap(ours, plain) if ours.shape == plain.shape else None
        if n == 1:
            report.ms_per_step = 1e3 * seconds / len(model.schedule.loop)
            pixels, _ = _plain(model, 1, "pt")
            report.pixels = _gap(model.decode(ours), pixels)


def drive(model: WrappedPipeline, n: int) -> Tensor:
    """Samples n states of prompt 0 by the pipeline's own scheduler arithmetic."""
    scheduler = copy.deepcopy(model.schedule.scheduler)
    generators = [_KEY.at(slot=k).generator() for k in range(n)]
    x = model.start([0] * n, generators)
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"return_dict": False}
    if "generator" in known:
        extra["generator"] = generators if n > 1 else generators[0]
    default = inspect.signature(type(model.pipe).__call__).parameters.get("eta")
    if "eta" in known and default is not None:
        extra["eta"] = model.call_kwargs.get("eta", default.default)
    before, old = None, None
    for t, node in zip(model.schedule.walked.to(model.device), model.schedule.loop, strict=True):
        out = model.output(x, node)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)  # sets the step index of some schedulers
        if "old_pred_original_sample" in known:  # CogVideoX DPM carries the last prediction
            x, old = scheduler.step(out, old, t, before, x, **extra)
        else:
            x = scheduler.step(out, t, x, **extra)[0]
        before = t
    return x


def _plain(model: WrappedPipeline, n: int, output_type: str) -> tuple[Tensor, float]:
    """pipe(...) for n samples of prompt 0 from the same noise, and its seconds."""
    pipe = copy.copy(model.pipe)
    quiet = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    for name, value in (
        ("_progress_bar_config", quiet),
        ("scheduler", copy.deepcopy(pipe.scheduler)),
    ):
        object.__setattr__(pipe, name, value)
    arguments = Arguments(model.pipe, model.call_kwargs)
    generators = [_KEY.at(slot=k).generator() for k in range(n)]
    given = generators if n > 1 else generators[0]
    begin = time.perf_counter()
    try:
        if not arguments.counter or not arguments.per_prompt or n == 1:
            raise ValueError
        kwargs = arguments.for_rows((0,), output_type=output_type, generator=given)
        out = pipe(**kwargs, **{arguments.counter: n})
    except ValueError:  # it ignores num_..._per_prompt, and finds too many generators
        begin = time.perf_counter()
        out = pipe(**arguments.for_rows((0,) * n, output_type=output_type, generator=given))
    seconds = time.perf_counter() - begin
    return (out if isinstance(out, Tensor) else out[0]), seconds


def _batching(model: WrappedPipeline, report: CheckReport) -> None:
    wide = model.noise(3, _KEY)
    rows = torch.cat([model.noise(1, _KEY.at(slot=k)) for k in range(3)])
    report.noise_equal = torch.equal(wide, rows)
    times = model.grid().times[:-1]
    t, last = times[len(times) // 2], len(model.prompts) - 1
    conds = [last, 0, last]
    alone = torch.cat([model.output(wide[k : k + 1], t, cond=c) for k, c in enumerate(conds)])
    report.mixed_prompts = _relative(model.output(wide, t, cond=conds), alone)
    swapped = torch.cat(
        [model.output(wide[k : k + 1], t, cond=last - c) for k, c in enumerate(conds)]
    )
    report.prompts_differ = _relative(swapped, alone) if last else None
    kept, model.max_batch = model.max_batch, 2
    try:
        report.chunked = _relative(model.output(wide, t, cond=conds), alone)
    finally:
        model.max_batch = kept
    report.mixed_times, report.mixing_reason = model.mixed_times, model.mixing_reason
    levels = [times[0], times[-1], t]
    alone = torch.cat([model.output(wide[k : k + 1], s) for k, s in enumerate(levels)])
    report.several_times = _relative(model.output(wide, levels), alone)


def _decoding(model: WrappedPipeline, report: CheckReport) -> None:
    x = model.noise(2, _KEY)
    report.decode_order = _gap(model.decode(x.flip(0)), model.decode(x).flip(0))


def _gradients(model: WrappedPipeline, report: CheckReport) -> None:
    times = model.grid().times
    t = times[max(len(times) // 2 - 1, 0)]
    x = model.noise(1, _KEY).requires_grad_()
    (gradient,) = torch.autograd.grad(_energy(model, x, t, True), x)
    report.gradient_finite = bool(torch.isfinite(gradient).all() and gradient.abs().max() > 0)
    if model.dtype == torch.float32:  # narrower types drown the difference in rounding
        slopes = []
        for h in (1e-2, 3e-3):
            d = h * gradient / gradient.square().mean().sqrt()
            up, down = (_energy(model, x.detach() + s * d, t, False) for s in (1.0, -1.0))
            slopes.append(float((up - down) / 2.0 / (gradient.double() * d.double()).sum()))
        report.gradient_ratio = min(slopes, key=lambda r: abs(r - 1.0))
    z = model.noise(1, _KEY).requires_grad_()
    (gradient,) = torch.autograd.grad(model.decode(z, grad=True).sum(), z)
    report.decode_gradient_finite = bool(torch.isfinite(gradient).all())


def _energy(model: WrappedPipeline, x: Tensor, t: Any, grad: bool) -> Tensor:
    return model.predict(x, t, grad=grad).x0.double().square().mean()


def _cost(model: WrappedPipeline, report: CheckReport) -> None:
    report.costs = model.costs()
    x, times = model.noise(1, _KEY), model.grid().times[:-1]
    report.ms_per_query = 1e3 * min(_seconds(lambda t=t: model.predict(x, t)) for t in times)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# --- numbers and words ----------------------------------------------------------------------


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.to(a.device).float()).abs().max())


def _relative(a: Tensor, b: Tensor) -> float:
    return _gap(a, b) / (float(b.float().abs().max()) + 1e-12)


def _difference(value: float | None) -> str:
    if value is None:
        return "not comparable (pipe(...) returns another shape, or takes no generator per row)"
    return "identical to pipe(...)" if value == 0.0 else f"differs from pipe(...) by {value:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _say(value: bool | None, yes: str, no: str) -> str:
    return "-" if value is None else yes if value else no


def _runs(costs: tuple[int, ...]) -> str:
    if len(set(costs)) == 1:
        return f"{max(costs)} throughout"
    return " ".join(map(str, costs))
