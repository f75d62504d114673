"""What all frames of one wrapped pipeline share: the call, its arguments, its schedule."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steering.errors import PipelineError
from steering.noise import NoiseKey
from steering.paths import Time
from steering.pipelines.frame import Frame, Query, RowTimes, inverted
from steering.pipelines.prompts import Arguments, PromptMemo
from steering.pipelines.schedule import Schedule, read_schedule

_MAX_FRAMES = 32
_MAX_ROWS = 256
_MAX_WIDTHS = 16
_Prepared = tuple[Tensor, tuple | None, list[Tensor]]


def _on_device(cls: type, device: torch.device) -> type:
    """The class with its execution device as a constant: looking it up walks every module of
    every network, half of what the start of a call costs."""
    known = {"_execution_device": property(lambda self: device), "__module__": cls.__module__}
    return type(cls.__name__, (cls,), known)


class Script:
    """A pipeline ready to be run in frames.

    Attributes:
        schedule: None until the first frame has looked.
        prepared: what prepare_latents returned beside its latents, by width.
        event_shape: shape of one state in the loop.
    """

    def __init__(self, pipe: Any, arguments: Arguments, name: str) -> None:
        self.pipe, self.arguments, self.name = pipe, arguments, name
        self.call = inverted(type(pipe).__call__)
        self.scheduler = copy.deepcopy(pipe.scheduler)
        #: of set_timesteps and step, which every frame needs
        self.signatures = tuple(
            inspect.signature(f) for f in (self.scheduler.set_timesteps, self.scheduler.step)
        )
        found = getattr(pipe, "_execution_device", None)  # looks through every module
        self.device = torch.device(pipe.device if found is None else found)
        self.pipe_class = _on_device(type(pipe), self.device)
        narrow = getattr(pipe, "dtype", torch.float32) in (torch.float16, torch.bfloat16)
        can_encode = hasattr(pipe, "encode_prompt")
        self.encode = PromptMemo(0.05 if narrow else 1e-3) if can_encode else None
        self.prepared: OrderedDict[int, _Prepared] = OrderedDict()
        self.schedule: Schedule | None = None
        self._key: NoiseKey | None = None
        self._frames: OrderedDict[tuple, Frame] = OrderedDict()
        self._look()

    def _look(self) -> None:
        """A run that ends at the loop: the schedule as the pipeline set it, and the state."""
        frame = Frame(self, (0,), stop="loop", generator=self.seed(1))
        try:
            frame.run()
        except (TypeError, ValueError) as error:
            raise PipelineError(
                f"{self.name} does not take these arguments: {type(error).__name__}: {error}"
            ) from error
        if frame.walked is None or frame.latents is None or frame.full_schedule is None:
            missing = (
                "call prepare_latents"
                if frame.latents is None
                else "call scheduler.set_timesteps"
                if frame.full_schedule is None
                else "run `for i, t in enumerate(timesteps)`"
            )
            raise PipelineError(f"{self.name} cannot be driven: it does not {missing}.")
        scheduler = frame.full_schedule
        scheduler.timesteps = scheduler.timesteps.as_subclass(torch.Tensor)
        self.schedule = read_schedule(scheduler, frame.walked)
        self._time_device = frame.walked.device
        self.event_shape = tuple(frame.latents.shape[1:])
        self.state_dtype = frame.latents.dtype

    def seed(self, width: int) -> Any:
        """Equal generators for each row, so that frames do not depend on global random state."""
        if self._key is not None:
            return [self._key.at(slot=k).generator() for k in range(width)]
        return [torch.Generator("cpu").manual_seed(0) for _ in range(width)]

    @contextmanager
    def seeded(self, key: NoiseKey) -> Iterator[None]:
        """Frames draw what they draw beside the latents (noise on an image condition) from key."""
        self.close()
        self.prepared.clear()
        self._key = key
        try:
            yield
        finally:
            self.close()
            self.prepared.clear()
            self._key = None

    def query(self, x: Tensor, times: Sequence[Time]) -> Query:
        """A question about rows x at one level, or at one level each."""
        schedule = self.schedule
        assert schedule is not None
        like, first = schedule.walked, times[0]
        nets = [time.net for time in times]
        if all(t is first or (t.net == first.net and t.sigma == first.sigma) for t in times):
            times, nets = times[:1], nets[:1]
            net = torch.tensor(nets[0], dtype=like.dtype, device=self._time_device)
        else:
            net = torch.tensor(nets, dtype=like.dtype, device=self._time_device)
            net = net.as_subclass(RowTimes)
        return Query(x, tuple(times), net, schedule.index(nets[0]))

    def ask(self, conds: tuple[int, ...], query: Query, grad: bool = False) -> Tensor:
        """Model output from a parked frame, or from one of its own where a graph is kept."""
        if grad:
            frame = Frame(self, conds, query, generator=self.seed(len(conds)))
            try:
                return frame.ask(query, grad=True)
            finally:
                frame.close()  # a parked frame would keep the graph alive
        # A greenlet belongs to its thread; the number of one that has ended is given again.
        key = (threading.current_thread(), conds)
        frame = self._frames.pop(key, None)
        if frame is None:
            frame = Frame(self, conds, query, generator=self.seed(len(conds)))
        try:
            out = frame.ask(query)
        except BaseException:
            frame.close()  # an error ends this frame only
            raise
        self._frames[key] = frame
        self._evict()
        return out

    def _evict(self) -> None:
        rows = sum(frame.width for frame in self._frames.values())
        while len(self._frames) > 1 and (len(self._frames) > _MAX_FRAMES or rows > _MAX_ROWS):
            _, oldest = self._frames.popitem(last=False)
            rows -= oldest.width
            oldest.close()

    def keep(self, width: int, value: _Prepared) -> _Prepared:
        """Remembers what comes beside the latents of one width, for the last few widths."""
        self.prepared[width] = value
        while len(self.prepared) > _MAX_WIDTHS:
            self.prepared.popitem(last=False)
        return value

    def rest(self) -> None:
        """Frees the frames of this thread, which no other could unwind once it has ended."""
        here = threading.current_thread()
        for key in [key for key in self._frames if key[0] is here]:
            self._frames.pop(key).close()

    def close(self) -> None:
        """Frees all parked frames."""
        while self._frames:
            self._frames.popitem()[1].close()
