"""Control inversion: a pipeline's own ``__call__`` as a function we can ask questions.

The pipeline runs, unchanged, in a greenlet on a shallow copy of itself. Its scheduler is a copy
whose ``step`` hands the model output to us, waits, and returns the state we ask about next; its
denoising loop goes on for as long as we ask. ``enumerate`` is replaced in the globals of that one
function, so that the loop's index is the schedule index of the time in question, in any order.
Guidance, ControlNet, adapters, experts and offload stay the pipeline's own.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import builtins
import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from greenlet import GreenletExit, error, getcurrent, greenlet
from torch import Tensor

from steering.errors import PipelineError
from steering.paths import Time
from steering.turns import TURN

if TYPE_CHECKING:
    from steering.pipelines.script import Script

_STATE_CHECKS = 3


class Stop(GreenletExit):
    """Ends a frame from inside."""


class StepOutput(NamedTuple):
    """What a scheduler's step returns, in the words of all of them."""

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass(frozen=True, eq=False)
class Query:
    """One question to the pipeline.

    Attributes:
        x: states [width, *event].
        times: one level for all rows, or one per row.
        net: the loop's ``t``: a number, or a :class:`RowTimes` [width].
        index: the loop's ``i``.
        leave: leave the loop with x instead.
    """

    x: Tensor
    times: tuple[Time, ...]
    net: Tensor
    index: int
    leave: bool = False


class DrivenTimesteps(torch.Tensor):
    """The real schedule; enumerating it asks the frame for the next query."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types_: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        out: Any = super().__torch_function__(func, types_, args, kwargs or {})
        if func in (torch.Tensor.__getitem__, torch.Tensor.to) and out.ndim == 1:
            return out  # img2img slices the schedule; everything else must not inherit the class
        return out.as_subclass(torch.Tensor) if isinstance(out, DrivenTimesteps) else out


class RowTimes(torch.Tensor):
    """One time per row where the loop expects a number: ``expand`` repeats the rows."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types_: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        if func is torch.Tensor.expand:
            rows = args[0].as_subclass(torch.Tensor)
            size = args[1] if isinstance(args[1], int) else args[1][0]
            return rows.repeat(size // rows.shape[0])
        return super().__torch_function__(func, types_, args, kwargs or {})


class _FrameGreenlet(greenlet):
    frame: Frame


def _current() -> Frame | None:
    return getattr(getcurrent(), "frame", None)


def _drive(steps: Tensor) -> Iterator[tuple[int, Tensor]]:
    frame = _current()
    assert frame is not None
    frame.walked = steps.as_subclass(torch.Tensor)
    if frame.stop == "loop":
        raise Stop
    while frame.query is not None:
        yield frame.query.index, frame.query.net


def _driven_enumerate(items: Any, start: int = 0) -> Any:
    steps = getattr(items, "iterable", items)  # a progress bar around the timesteps
    if isinstance(steps, DrivenTimesteps) and _current() is not None:
        return _drive(steps)
    return builtins.enumerate(items, start)


def inverted(call: Callable) -> Callable:
    """The function without its ``no_grad`` wrapper, with ``enumerate`` replaced for it alone."""
    inner = inspect.unwrap(call)
    names = {**inner.__globals__, "enumerate": _driven_enumerate}
    made = types.FunctionType(
        inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__
    )
    made.__kwdefaults__ = inner.__kwdefaults__
    return made


class Frame:
    """One suspended pipeline call, for one make-up of prompts.

    Args:
        script: the pipeline and its arguments.
        conds: the prompt of each row.
        query: the first question; None for a frame that is never asked.
        stop: "latents" or "loop" ends the run there, to look at what the pipeline prepared.
        generator: for prepare_latents and the decoder.
        parts: components to put in place of the pipeline's own, by name.
    """

    def __init__(
        self,
        script: Script,
        conds: Sequence[int],
        query: Query | None = None,
        *,
        stop: str | None = None,
        generator: torch.Generator | list[torch.Generator],
        output_type: str = "latent",
        parts: Mapping[str, object] | None = None,
    ) -> None:
        self.script, self.conds, self.width = script, tuple(conds), len(conds)
        self.first = query
        self.query = None if query is None or query.leave else query
        self.stop = stop
        self.latents: Tensor | None = None
        self.walked: Tensor | None = None
        self.full_schedule: Any = None
        self._given: Tensor | None = None
        self.checks = _STATE_CHECKS
        self._calls_of_prepare = 0
        self._generators = generator if isinstance(generator, list) else [generator]
        self.pipe = self._copy(parts or {})
        arguments = script.arguments.for_rows(
            self.conds, output_type=output_type, generator=generator
        )
        self.greenlet = _FrameGreenlet(lambda: script.call(self.pipe, **arguments))
        self.greenlet.frame = self

    def _copy(self, parts: Mapping[str, object]) -> Any:
        pipe = copy.copy(self.script.pipe)
        self._real_prepare = pipe.prepare_latents  # bound to the copy, whose scheduler is set
        quiet = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        changes: dict[str, object] = {
            "scheduler": self._scheduler(),
            "prepare_latents": self._prepare_latents,
            "maybe_free_model_hooks": lambda: None,
            "_progress_bar_config": quiet,
            **parts,
        }
        if self.script.encode is not None:
            changes["encode_prompt"] = partial(self.script.encode, pipe.encode_prompt)
        for name, value in changes.items():
            object.__setattr__(pipe, name, value)  # past diffusers' registration of components
        object.__setattr__(pipe, "__class__", self.script.pipe_class)
        return pipe

    def _scheduler(self) -> Any:
        scheduler = copy.copy(self.script.scheduler)
        real_set, (set_signature, signature) = scheduler.set_timesteps, self.script.signatures
        place = {name: k for k, name in enumerate(signature.parameters)}

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            real_set(*args, **kwargs)
            if self.stop == "loop":
                self.full_schedule = copy.copy(scheduler)
                for name in ("set_timesteps", "step", "scale_model_input"):
                    self.full_schedule.__dict__.pop(name, None)
            scheduler.timesteps = scheduler.timesteps.as_subclass(DrivenTimesteps)

        def step(*args: Any, **kwargs: Any) -> StepOutput:
            output, sample = (
                kwargs[name] if name in kwargs else args[place[name]]
                for name in ("model_output", "sample")
            )
            return self._answer(output, sample)

        def scale_model_input(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.query is None or self.script.schedule is None:
                return sample
            return self.script.schedule.scale_input(sample, self.query.times)

        set_timesteps.__signature__ = set_signature  # type: ignore[attr-defined]
        step.__signature__ = signature  # type: ignore[attr-defined]
        scheduler.set_timesteps, scheduler.step = set_timesteps, step
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input = scale_model_input
        return scheduler

    def _prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        self._calls_of_prepare += 1
        if self._calls_of_prepare > 1:
            return self._real_prepare(*args, **kwargs)
        known = self.script.prepared.get(self.width) if self.first is not None else None
        if known is None:
            out = self._prepare(args, kwargs)
            latents = self.latents = out[0] if isinstance(out, tuple) else out
            self._check_width(len(latents))
            if self.stop == "latents":
                raise Stop
            if self.first is None:
                return out
            rest = out[1:] if isinstance(out, tuple) else None
            states = [g.get_state() for g in self._generators]
            known = self.script.keep(self.width, (latents.new_empty(0), rest, states))
        # What comes beside the latents (position ids, image conditions) depends on the width
        # only; what is drawn afterwards must not depend on whether this was skipped.
        like, rest, states = known
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        assert self.first is not None
        self._given = self.first.x.to(like)
        return self._given if rest is None else (self._given, *rest)

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            try:
                return self._real_prepare(*args, **kwargs)
            except (IndexError, RuntimeError, TypeError, ValueError):
                # One image for many rows: some pipelines take one generator then, not a list.
                bound = inspect.signature(self._real_prepare).bind(*args, **kwargs)
                if self.stop == "latents" or not isinstance(
                    bound.arguments.get("generator"), list
                ):
                    raise
                bound.arguments["generator"] = self._generators[0]
                return self._real_prepare(*bound.args, **bound.kwargs)

    def _check_width(self, got: int) -> None:
        if got == 0:
            raise PipelineError(
                f"{self.script.name} prepared no latents: strength times num_inference_steps "
                "leaves no step. Raise either."
            )
        if got != self.width:
            raise PipelineError(
                f"{self.script.name} prepared {got} latents for {self.width} prompts: it does not "
                "take a list of prompts, so rows cannot be batched."
            )

    def _answer(self, output: Tensor, sample: Tensor) -> StepOutput:
        if self._given is None:
            raise PipelineError(
                f"{self.script.name} cannot be driven: its loop is not "
                "`for i, t in enumerate(timesteps)` over the scheduler's timesteps."
            )
        if self.checks > 0:
            self.checks -= 1
            self._check_state(sample)
        asker = self.greenlet.parent
        assert asker is not None
        query = asker.switch(output)
        x = self._given = query.x.to(sample)
        self.query = None if query.leave else query
        return StepOutput(x, x)

    def _check_state(self, sample: Tensor) -> None:
        if sample is self._given or self._given is None:
            return
        if sample.shape != self._given.shape or not torch.equal(
            sample, self._given.to(sample.dtype)
        ):
            raise PipelineError(
                f"{self.script.name} alters the state between two steps of its loop (as "
                "blending and keeping a first frame do), so its network does not see the state "
                "asked for. Use a pipeline whose network takes mask or image as input instead."
            )

    # --- from outside ------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return not self.greenlet.dead

    def ask(self, query: Query, grad: bool = False) -> Tensor:
        """The model output at a query, as it reaches scheduler.step."""
        value = (query,)
        if not self.greenlet:  # not started: x enters through prepare_latents
            self.first = self.query = query
            value = ()
        out = self._switch(value, grad)
        if not self.alive:
            raise PipelineError(f"{self.script.name} left its loop without a scheduler step.")
        return out

    def run(self, grad: bool = False, *, leave: Query | None = None) -> Any:
        """Runs to the end (or to ``stop``, or from a query out of the loop); what was returned."""
        out = self._switch(() if leave is None else (leave,), grad)
        if self.alive:
            self.close()
            raise PipelineError(f"{self.script.name} did not stop where it was expected to.")
        self._release()
        return out

    def _switch(self, value: tuple, grad: bool) -> Any:
        self.greenlet.parent = getcurrent()
        # The grad mode is the thread's, greenlets share it.
        with TURN, torch.set_grad_enabled(grad):
            return self.greenlet.switch(*value)

    def close(self) -> None:
        """Unwinds the pipeline's call and frees what it held."""
        if self.greenlet and not self.greenlet.dead:
            try:
                self.greenlet.parent = getcurrent()
                self.greenlet.throw(Stop)
            except (error, ValueError):
                pass  # started in a thread that is gone; its stack went with it
        self._release()

    def _release(self) -> None:
        # A frame and its pipeline hold each other: states and graphs must not wait for the
        # garbage collector.
        self.first = self.query = self._given = self.pipe = None
