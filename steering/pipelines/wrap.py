"""wrap(): any diffusers pipeline as a :class:`steering.model.Model`."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from steering.errors import OptionError, PipelineError
from steering.grids import Grid
from steering.kernels.short_attention import ShortAttention
from steering.noise import NoiseKey
from steering.paths import Path, Prediction, Time, Times
from steering.pipelines.decoding import Listener, learn
from steering.pipelines.frame import Frame
from steering.pipelines.frozen import frozen
from steering.pipelines.idioms import require_drivable
from steering.pipelines.meter import Meter, denoisers
from steering.pipelines.plan import Plan, make_plan, mixing_agrees, probe_costs, stand_ins
from steering.pipelines.preview import open_preview
from steering.pipelines.prompts import Arguments
from steering.pipelines.schedule import Schedule
from steering.pipelines.script import Script
from steering.turns import in_turn


def wrap(
    pipe: Any,
    *,
    mixed_times: bool | Literal["auto"] = "auto",
    max_batch: int | None = None,
    name: str | None = None,
    preview_decoder: Any = None,
    **call_kwargs: Any,
) -> WrappedPipeline:
    """Turns a diffusers pipeline into a model that can be asked.

    Args:
        pipe: the pipeline; it is not changed, and can be used between runs. Threads may steer with
            one pipeline at once, each by a model of its own: their calls take turns. Your own
            ``pipe(...)`` does not; call it ``with steering.turns.TURN`` where others run. A thread
            that asks a model itself calls ``rest()`` before it ends.
        mixed_times: whether rows at different times may share a batch; "auto" finds out.
        max_batch: most rows of one frame (guidance may double them inside).
        name: for reports, and for rewards that have weights of their own for a model; by default
            where the pipeline was loaded from, or its class.
        preview_decoder: a small autoencoder for estimates on the way, or the folder of an
            AutoencoderTiny; finished samples are always decoded by the pipeline's own.
        call_kwargs: what one would pass to ``pipe(...)``; shipped models have defaults of their
            own. A list of prompts makes one model with that many conditions, which ``cond``
            chooses from.

    Raises:
        OptionError: an argument that ``pipe(...)`` does not have, or that steering decides.
        PipelineError: the pipeline cannot be driven, with the reason.
    """
    from steering.loading import call_defaults, source_of

    source = source_of(pipe)
    name, call_kwargs = name or source, {**call_defaults(source), **call_kwargs}
    tiny = None if preview_decoder is None else open_preview(pipe, preview_decoder)
    model = WrappedPipeline(pipe, mixed_times, max_batch, name, call_kwargs)
    if tiny is not None:
        model.preview = tiny
        model.call_kwargs = {**call_kwargs, "preview_decoder": preview_decoder}
    return model


class WrappedPipeline:
    """A diffusers pipeline as a Model; see :func:`wrap`. For one thread at a time: others wrap the
    same pipeline again.

    Attributes:
        name, family ("vp", "ve", "flow", "edm"), prediction_type, guidance: for reports.
        path: the noising path; ``path.at(t)`` fills the number the network is told.
        prompts, event_shape, dtype, device: as in Model; dtype is the networks' own.
    """

    def __init__(
        self,
        pipe: Any,
        mixed_times: bool | Literal["auto"],
        max_batch: int | None,
        name: str | None,
        call_kwargs: dict[str, Any],
    ) -> None:
        if max_batch is not None and max_batch < 1:
            raise OptionError(f"max_batch must be at least 1, got {max_batch}.")
        self.pipe = pipe
        self.preview: Any = None
        self._shortcuts: dict[bool, Any] = {}
        self.max_batch = max_batch
        self.call_kwargs = call_kwargs
        suspicious = require_drivable(pipe)
        arguments = Arguments(pipe, call_kwargs)
        self.name = name or type(pipe).__name__
        networks = self._networks = denoisers(pipe)
        self._script = Script(pipe, arguments, self.name)
        self._meter = Meter(networks)
        schedule = self._script.schedule
        assert schedule is not None
        self.schedule: Schedule = schedule
        self.family, self.prediction_type = schedule.family, schedule.prediction
        self.path: Path = schedule.path
        self.prompts: tuple[str | None, ...] = arguments.prompts
        self.event_shape = self._script.event_shape
        self.device = self._script.device
        self.dtype: torch.dtype = getattr(next(iter(networks.values())), "dtype", torch.float32)
        self._attention = ShortAttention(self.device, self.dtype)
        self._mixed = self._asked = mixed_times
        self._found_plan: Plan | None = None
        self._wide_noise: bool | None = None
        if suspicious:
            try:
                self._plan()
            except BaseException:
                self.close()  # the user gets no model that could be closed
                raise

    @property
    def guidance(self) -> float | None:
        """The pipeline's guidance scale, where it has one."""
        known = self._script.arguments.known
        for name in ("true_cfg_scale", "guidance_scale"):
            if name in self.call_kwargs:
                return self.call_kwargs[name]
        return known["guidance_scale"].default if "guidance_scale" in known else None

    @property
    def mixed_times(self) -> bool:
        """Whether rows at different times share calls; "auto" runs its self-test on first use."""
        if self._mixed == "auto":
            with self._meter.on("probes"):
                self._mixed = (
                    len(self._networks) == 1  # experts part at a time we cannot see
                    and self._plan().uniform
                    and mixing_agrees(self._script)
                )
        return bool(self._mixed)

    @property
    def mixing_reason(self) -> str:
        """Why rows at different times do not share calls; empty where they do."""
        if self.mixed_times:
            return ""
        if self._asked is False:
            return "switched off"
        if len(self._networks) > 1:
            return f"several networks ({', '.join(self._networks)}) share the schedule"
        return self._plan().reason or "mixed and separate calls disagree, or mixed calls fail"

    @property
    def rows(self) -> int:
        """Network rows evaluated for predict() so far."""
        return self._meter.rows

    @property
    def probe_rows(self) -> int:
        """Network rows spent by costs() and the self-test of ``mixed_times``, once per model."""
        return self._meter.probes

    def grid(self) -> Grid:
        """The noise levels as the pipeline itself set them."""
        return self.schedule.grid

    def costs(self) -> tuple[int, ...]:
        """Network rows per sample at each step of ``grid()``.

        Found once, by a run with stand-ins for the networks: one real row per network call.
        """
        return self._plan().costs

    def _plan(self) -> Plan:
        if self._found_plan is None:
            with self._meter.on("probes"):
                try:
                    self._found_plan = make_plan(self._script)
                except PipelineError:
                    raise
                except Exception as why:  # a pipeline that looks into its network's output
                    costs = probe_costs(self._script, lambda: self.probe_rows)
                    self._found_plan = Plan(costs, False, f"no dry run: {why!r}")
        return self._found_plan

    def noise(self, n: int, key: NoiseKey, *, cond: int = 0) -> Tensor:
        """The pipeline's own starting states for slots key.slot ..., float32 [n, *event_shape].

        Each slot has its own generator, so equal keys give equal bits at any n.
        """
        self._check_conds([cond])
        if n == 1:
            return self._noise(1, key, cond)
        if self._wide_noise is None:
            try:
                together = self._noise(n, key, cond)
            except Exception:  # a pipeline that takes no list of generators, in its own words
                self._wide_noise = False
            else:
                last = self._noise(1, key.at(slot=key.slot + n - 1), cond)
                self._wide_noise = torch.equal(together[-1:], last)
                if self._wide_noise:
                    return together
        if self._wide_noise:
            return self._noise(n, key, cond)
        return torch.cat([self._noise(1, key.at(slot=key.slot + k), cond) for k in range(n)])

    def _noise(self, n: int, key: NoiseKey, cond: int) -> Tensor:
        generators = [key.at(slot=key.slot + k).generator() for k in range(n)]
        return self.start([cond] * n, generators).float()

    def start(self, conds: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """prepare_latents with a generator per row, which it advances; the pipeline's dtype."""
        given = list(generators) if len(generators) > 1 else generators[0]
        frame = Frame(self._script, conds, stop="latents", generator=given)
        frame.run()
        assert frame.latents is not None
        return frame.latents

    def predict(
        self, x: Tensor, t: Times, *, cond: int | Sequence[int] = 0, grad: bool = False
    ) -> Prediction:
        """The guided prediction at states x [n, *event_shape], float32.

        Rows at different times are asked separately unless ``mixed_times``; then ``max_batch``
        splits. With ``grad`` the result carries a graph back to x, and to no parameter.

        Raises:
            OptionError: shapes, times or conds that do not fit together.
            PipelineError: the model is closed.
        """
        out = self.output(x, t, cond=cond, grad=grad)
        x = (x if grad else x.detach()).to(out.device, torch.float32)
        return self.schedule.predict(x, out.float(), t)

    def output(
        self, x: Tensor, t: Times, *, cond: int | Sequence[int] = 0, grad: bool = False
    ) -> Tensor:
        """What reaches ``scheduler.step`` for states x, in the pipeline's own dtype."""
        if self._meter.closed:
            raise PipelineError(
                f"{self.name} is closed, so its network calls would not be counted; wrap the "
                "pipeline again."
            )
        n = x.shape[0]
        times = [t] * n if isinstance(t, Time) else list(t)
        conds = [cond] * n if isinstance(cond, int) else [int(c) for c in cond]
        self._check_rows(x, times, conds)
        x = (x if grad else x.detach()).to(self.device)
        order: list[int] = []
        outs = []
        attention = self._attention() if grad else nullcontext()
        with self._meter.on(), frozen(self.pipe, grad), attention:
            for rows in self._split(times, conds):
                query = self._script.query(_take(x, rows), [times[r] for r in rows])
                outs.append(self._script.ask(tuple(conds[r] for r in rows), query, grad))
                order += rows
        return _restore(outs, order)

    def _split(self, times: Sequence[Time], conds: Sequence[int]) -> list[list[int]]:
        """Rows by noise level (unless they may mix), ordered by prompt, then by max_batch."""
        first = times[0]
        same = all(t is first or (t.net == first.net and t.sigma == first.sigma) for t in times)
        groups: dict[object, list[int]] = {}
        if same or self.mixed_times:
            groups[None] = list(range(len(times)))
        else:
            for row, time in enumerate(times):
                groups.setdefault((time.net, time.sigma), []).append(row)
        size = self.max_batch or len(times)
        out = []
        for rows in groups.values():
            rows.sort(key=lambda r: conds[r])  # few make-ups: parked frames are used again
            out += [rows[k : k + size] for k in range(0, len(rows), size)]
        return out

    def _check_rows(self, x: Tensor, times: Sequence[Time], conds: Sequence[int]) -> None:
        n = x.shape[0]
        if tuple(x.shape[1:]) != self.event_shape or n == 0:
            raise OptionError(
                f"{self.name}: states must be [n, {', '.join(map(str, self.event_shape))}] with "
                f"n > 0, got {list(x.shape)}."
            )
        if len(times) != n or len(conds) != n:
            raise OptionError(
                f"{self.name}: {n} states came with {len(times)} times and {len(conds)} conds."
            )
        self._check_conds(conds)

    def _check_conds(self, conds: Sequence[int]) -> None:
        known = self._script.arguments.conds
        for c in conds:
            if not 0 <= c < known:
                raise OptionError(
                    f"{self.name}: cond {c} is not one of {len(self.prompts)} prompts."
                )

    def add_prompt(self, prompt: str, *, like: int = 0) -> int:
        """A further condition: prompt ``like`` with another text; ``prompts`` stays as it is.

        Raises:
            OptionError: an empty text, or a call whose prompt is not one plain text.
        """
        if not prompt.strip():
            raise OptionError(f"{self.name}: a rewritten prompt is empty.")
        return self._script.arguments.add(prompt, like)

    def decode(self, x0: Tensor, *, grad: bool = False) -> Tensor:
        """The pipeline's own decoding: float32 in [0, 1], [n, 3, H, W] or [n, F, 3, H, W]."""
        return self._decode_all(x0, grad, None)

    def decode_preview(self, x0: Tensor, *, grad: bool = False) -> Tensor:
        """The same by ``preview_decoder``, where there is one."""
        return self._decode_all(x0, grad, self.preview)

    def _decode_all(self, x0: Tensor, grad: bool, small: Any) -> Tensor:
        n = x0.shape[0]
        self._check_rows(x0, [self.grid().times[0]] * n, [0] * n)
        x0 = (x0 if grad else x0.detach()).to(self.device)
        decode = self._decode if grad else self._decode_short
        with in_turn():  # torch multiplies in another order where parameters are frozen
            if n <= (self.max_batch or n):
                return decode(x0, grad, small)
            return torch.cat([decode(part, grad, small) for part in x0.split(self.max_batch or n)])

    def _decode_short(self, x: Tensor, grad: bool, small: Any) -> Tensor:
        """Without a frame where the first decode, through one, was seen to allow it."""
        key = small is not None
        vae = getattr(self.pipe, "vae", None) if small is None else small
        short = self._shortcuts.get(key)
        if short is not None and short.vae is vae:
            return short(x).float()
        checked = getattr(self.pipe, "safety_checker", None) is not None  # by the frame only
        if vae is None or checked or key in self._shortcuts:
            return self._decode(x, grad, small)
        listener = Listener(vae)
        images = self._decode(x, grad, listener)
        self._shortcuts[key] = learn(vae, listener, x, images, self._script.state_dtype)
        return images

    def _decode(self, x: Tensor, grad: bool, vae: Any) -> Tensor:
        parts: dict[str, object] = {} if vae is None else {"vae": vae}
        with frozen(self.pipe, grad):
            try:
                out = self._leave(x, grad, parts)
            except UnboundLocalError:  # it decodes something its loop makes: go round once
                out = self._leave(x, grad, {**stand_ins(self._script), **parts}, once=True)
        images = out if isinstance(out, Tensor) else out[0]  # some return no tuple
        if not isinstance(images, Tensor) or len(images) != len(x):
            raise PipelineError(
                f"{self.name} decoded {len(x)} states to {type(images).__name__} of length "
                f"{len(images)}; a tensor with one entry per state was expected."
            )
        return images.float()

    def _leave(self, x: Tensor, grad: bool, parts: dict[str, object], once: bool = False) -> Any:
        """What the pipeline returns when its loop ends with state x."""
        script = self._script
        query = script.query(x, [self.grid().times[-2]])
        leave = replace(query, leave=True)
        frame = Frame(
            script,
            (0,) * len(x),
            query if once else leave,
            generator=script.seed(len(x)),
            output_type="pt",
            parts=parts,
        )
        try:
            if not once:
                return frame.run(grad)
            with self._meter.on("probes"):
                frame.ask(query)
            return frame.run(grad, leave=leave)
        finally:
            frame.close()

    def close(self) -> None:
        """Frees parked frames and removes the row counters from the networks."""
        try:
            self._script.close()
        finally:
            self._meter.close()

    def rest(self) -> None:
        """Frees what this thread has parked; later calls begin anew."""
        self._script.rest()

    def __enter__(self) -> WrappedPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _take(x: Tensor, rows: Sequence[int]) -> Tensor:
    if list(rows) == list(range(x.shape[0])):
        return x
    return x[torch.tensor(rows, device=x.device)]


def _restore(outs: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    out = outs[0] if len(outs) == 1 else torch.cat(list(outs))
    if list(order) == list(range(len(order))):
        return out
    back = torch.tensor(order, device=out.device).argsort()
    return out[back]
