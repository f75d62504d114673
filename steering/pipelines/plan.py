"""What a pipeline does at each step of its loop, found by a run whose networks are stand-ins.

Networks run once for real, to learn the shape of what they return; then made-up outputs are
handed back. The pipeline's own control flow shows which networks it calls at each step, with how
many rows and which arguments, and whether the same outputs are combined in the same way at every
step. This finds truncated guidance, skipped layers, ControlNet windows, experts and guidance that
depends on time, at every index and without a network's cost.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.errors import PipelineError
from steering.pipelines.frame import Frame
from steering.pipelines.meter import count_rows, denoisers
from steering.pipelines.script import Script

_PLAIN = (int, float, str, bool, type(None))
_SMALL = 64


@dataclass(frozen=True)
class Plan:
    """Attributes:
    costs: network rows per sample at each step of the grid.
    uniform: whether all steps are alike but for state and time.
    reason: what differs, where they are not.
    """

    costs: tuple[int, ...]
    uniform: bool
    reason: str = ""


class _Recorder:
    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.networks = networks
        self.templates: dict[str, tuple[int, Any]] = {}
        self.calls: list[tuple] = []
        self.rows = 0

    def restart(self) -> None:
        self.calls, self.rows = [], 0

    def call(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        rows = count_rows(args, kwargs)
        if name in self.networks:
            self.rows += rows
        self.calls.append((name, rows, _fingerprint(args, kwargs)))
        if name not in self.templates:
            self.templates[name] = (rows, module(*args, **kwargs))
        known, value = self.templates[name]
        generator = torch.Generator("cpu").manual_seed(len(self.calls))
        return _made_up(value, known, rows, generator)


class _StandIn:
    """Looks like the module it stands in for; calling it is recorded."""

    def __init__(self, name: str, module: nn.Module, recorder: _Recorder) -> None:
        self.__dict__.update(_name=name, _module=module, _recorder=recorder)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_module"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        return own["_recorder"].call(own["_name"], own["_module"], args, kwargs)


def _fingerprint(args: tuple, kwargs: dict[str, Any]) -> tuple:
    named = {k: v for k, v in kwargs.items() if "time" not in k}
    return (len(args), tuple(sorted((k, _mark(v)) for k, v in named.items())))


def _mark(value: object) -> str:
    if isinstance(value, Tensor):
        if value.numel() <= _SMALL and value.ndim < 2:
            return repr(value.tolist())
        return repr(tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return repr([_mark(v) for v in value])
    if isinstance(value, dict):
        return repr([(k, _mark(v)) for k, v in value.items()])
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _made_up(value: Any, known: int, rows: int, generator: torch.Generator) -> Any:
    """A value of the same structure with ``rows`` rows of random numbers."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        first = rows * value.shape[0] // known
        noise = torch.randn(first, *value.shape[1:], generator=generator)
        return noise.to(value.device, value.dtype)
    if isinstance(value, list) and len(value) == known and _loose(value):
        return [_made_up(value[0], 1, 1, generator) for _ in range(rows)]
    if isinstance(value, dict):
        return type(value)(**{k: _made_up(v, known, rows, generator) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_made_up(v, known, rows, generator) for v in value)
    return value


def _loose(values: list) -> bool:
    return all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)


def stand_ins(script: Script, recorder: _Recorder | None = None) -> dict[str, object]:
    """Stand-ins for a pipeline's denoisers and ControlNets, by component name."""
    pipe = script.pipe
    recorder = recorder or _Recorder(denoisers(pipe))
    names = [
        name
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and (name in recorder.networks or "controlnet" in name)
    ]
    return {name: _StandIn(name, pipe.components[name], recorder) for name in names}


def _state(script: Script) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, *script.event_shape, generator=generator).to(script.device)


def make_plan(script: Script) -> Plan:
    """Walks the grid with stand-ins; one real call for each network that is reached.

    Raises:
        PipelineError: the pipeline alters the state between steps.
    """
    assert script.schedule is not None
    recorder = _Recorder(denoisers(script.pipe))
    nodes = script.schedule.grid.times[:-1]
    x = _state(script)
    first = script.query(x, nodes[:1])
    parts = stand_ins(script, recorder)
    frame = Frame(script, (0,), first, generator=script.seed(1), parts=parts)
    steps, costs, outs = [], [], []
    try:
        for node in nodes:
            recorder.restart()
            outs.append(frame.ask(script.query(x, [node])))
            steps.append(recorder.calls)
            costs.append(recorder.rows)
    finally:
        frame.close()
    if len(nodes) == 1:  # a second turn shows whether the loop alters the state
        _second_turn(script, parts, x)
    return Plan(tuple(costs), *_alike(steps, outs))


def _second_turn(script: Script, parts: dict[str, object], x: Tensor) -> None:
    assert script.schedule is not None
    query = script.query(x, script.schedule.grid.times[:1])
    frame = Frame(script, (0,), query, generator=script.seed(1), parts=parts)
    try:
        frame.ask(query)
        frame.ask(query)
    finally:
        frame.close()


def _alike(steps: list[list[tuple]], outs: list[Tensor]) -> tuple[bool, str]:
    for k, calls in enumerate(steps):
        if calls != steps[0]:
            return False, f"the network calls of step {k} are not those of step 0"
    for k, out in enumerate(outs):
        if not torch.allclose(out.float(), outs[0].float(), rtol=1e-4, atol=1e-5):
            return False, f"guidance at step {k} combines the networks' outputs in another way"
    return True, ""


def probe_costs(script: Script, rows: Callable[[], int]) -> tuple[int, ...]:
    """Network rows at each step by asking for real, one sample a step."""
    assert script.schedule is not None
    x, costs = _state(script), []
    for node in script.schedule.grid.times[:-1]:
        before = rows()
        script.ask((0,), script.query(x, [node]))
        costs.append(rows() - before)
    return tuple(costs)


def mixing_agrees(script: Script) -> bool:
    """Two samples at two different times in one call against calls at one time each.

    All calls have width 2, so that the kernels are the same and only the times differ.
    """
    assert script.schedule is not None
    nodes = script.schedule.grid.times[:-1]
    picks = sorted({0, len(nodes) // 2, len(nodes) - 1})
    if len(picks) < 2:
        nodes = (nodes[0], script.schedule.path.at(0.5 * nodes[0].t))
        picks = [0, 1]
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, *script.event_shape, generator=generator).to(script.device)
    alone = {k: script.ask((0, 0), script.query(x, [nodes[k]])).float() for k in picks}
    narrow = script.state_dtype in (torch.float16, torch.bfloat16)
    for a, b in zip(picks, [*picks[1:], picks[0]], strict=True):
        try:
            both = script.ask((0, 0), script.query(x, [nodes[a], nodes[b]])).float()
        except Exception:  # the pipeline takes one number for t, in its own words
            return False
        want = torch.stack([alone[a][0], alone[b][1]])
        scale = float(want.abs().max()) + 1e-12
        if float((both - want).abs().max()) > (2e-2 if narrow else 1e-4) * scale:
            return False
    return True


__all__ = ["PipelineError", "Plan", "make_plan", "mixing_agrees", "probe_costs"]
