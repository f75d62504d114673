"""What a method is: strict options, facts about itself, a plan and a generator."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from steering.errors import IdleOption, OptionError, unknown_name
from steering.grids import Grid
from steering.kernels.step import move as fused_move
from steering.ledger import Budget
from steering.model import Model
from steering.noise import Ahead, Name, NoiseKey
from steering.paths import Prediction, Time
from steering.registry import METHODS
from steering.requests import Run
from steering.transitions import Transition, affine


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method knows before it starts.

    Attributes:
        grid: the noise levels to visit.
        costs: network rows per sample at each step.
        budget: the caps.
        spread: how much the reward varies between samples of one prompt (its standard deviation,
            measured once), None where nobody has measured it.
        stationary: whether the reward of a picture depends on that picture alone. Where it does
            not, pictures that are to be compared must be scored in one request.
    """

    grid: Grid
    costs: tuple[int, ...]
    budget: Budget
    spread: float | None = None
    stationary: bool = True

    @property
    def trajectory(self) -> int:
        """Network rows of one sample from noise to data."""
        return sum(self.costs)

    def scale(self, reward_scale: float | None) -> float:
        """The reward_scale given, or one that makes two standard deviations of the reward count.

        Rewards differ in scale by orders of magnitude; 10 is the published default for rewards
        of the size of ImageReward and stands where no spread is known.
        """
        if reward_scale is not None:
            return reward_scale
        return 2.0 / self.spread if self.spread else 10.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method will spend, exactly or at most."""

    nfe: int
    decodes: int
    reward_calls: int


@runtime_checkable
class Method(Protocol):
    """A steering method.

    Class facts: ``target`` is "tilted" (samples p(x) exp(reward_scale r(x)) as the population
    grows), "maximum" or "heuristic"; the others say what the method needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    target: ClassVar[str]
    needs_gradient: ClassVar[bool]
    needs_stochastic: ClassVar[bool]
    anytime: ClassVar[bool]

    def levels(self, model: Model) -> Grid:
        """The noise levels the method wants to visit."""
        ...

    def fit(self, plan: Plan) -> Method:
        """The same method with sizes left open filled from the budget.

        Raises:
            BudgetError: the budget does not pay for one sample; says how much would.
            OptionError: options that do not fit the grid.
        """
        ...

    def cost(self, plan: Plan) -> Cost:
        """What a run will spend."""
        ...

    def run(self, ctx: Context) -> Run:
        """The algorithm, for one prompt."""
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a running method can use without asking: names of noise, the grid, transitions."""

    model: Model
    cond: int
    seed: int
    plan: Plan
    ahead: Ahead = field(default_factory=Ahead, repr=False, compare=False)

    @property
    def grid(self) -> Grid:
        return self.plan.grid

    @property
    def prompt(self) -> str | None:
        """The text of this run."""
        return self.model.prompts[self.cond]

    def condition(self, prompt: str) -> int:
        """The ``cond`` of a further text, for ``Denoise(x, t, cond=...)``.

        Everything else of the call (negative prompt, guidance, images) is this run's own.

        Raises:
            OptionError: the model cannot be given another text.
        """
        add = getattr(self.model, "add_prompt", None)
        if add is None:
            raise OptionError(
                f"{self.model.name!r} cannot be asked about other prompts than it was made for."
            )
        return add(prompt, like=self.cond)

    def key(self, stream: str, step: int = 0) -> NoiseKey:
        """The name of a stream of random numbers of this run."""
        return NoiseKey(self.seed, stream, step)

    def noise(self, n: int, *, stream: str = "init") -> Tensor:
        """Fresh starting states for slots 0..n-1, [n, *event]."""
        return self.model.noise(n, self.key(stream), cond=self.cond)

    def foresee(self, names: Iterable[Name]) -> None:
        """Says which rows of noise (stream, step, slot) the next moves will take, in this order.

        Only for speed, where a method moves one or a few rows at a time: no number changes, and
        a name that is never used costs its drawing.
        """
        if self.model.device.type == "cpu":
            self.ahead.expect(names)

    def move(
        self,
        x: Tensor,
        prediction: Prediction,
        t: Time,
        u: Time,
        transition: Transition,
        *,
        step: int,
        slots: int | Sequence[int] | None = None,
        stream: str = "proposal",
    ) -> Tensor:
        """One transition from t to u; noise is named by step and slot, never by ancestor.

        A model whose own ``transition`` can ``propose`` makes the move itself. On CUDA the move
        and its noise are one fused pass.
        """
        slots = len(x) if slots is None else slots
        key = self.key(stream, step)
        propose = getattr(getattr(self.model, "transition", None), "propose", None)
        if propose is not None:
            z = key.normal(slots, x.shape[1:]).to(x.device)
            uniform = key.at(stream=f"{stream}/choice").uniform(slots)
            return propose(x, prediction, t, u, z, uniform.to(x.device))
        if x.is_cuda and (known := affine(transition)) and not prediction.x0.requires_grad:
            how = known.weights(t, u, self.model.path)
            return fused_move(x, prediction.x0, prediction.eps, how, key.numbers(slots)).x
        move = transition(x, prediction, t, u, self.model.path)
        if not move.random:
            return move.mean
        if x.device.type == "cpu":
            return move.sample(self.ahead.normal(key, slots, x.shape[1:]))
        return move.sample(key.normal(slots, x.shape[1:], device=str(x.device)))


def method_options(method: Method) -> dict[str, Any]:
    """The options of a method instance as plain JSON values."""
    return {f.name: plain(getattr(method, f.name)) for f in dataclasses.fields(method)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:  # noqa: ANN401
    """An option value with tuples as the lists that JSON has, and nested options as objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def build_method(method: str | Method, options: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and options, or an instance as it is.

    Raises:
        OptionError: unknown method or option (with the nearest name), or a bad value.
    """
    if not isinstance(method, str):
        if options:
            raise OptionError(
                "Options beside a method instance would be ambiguous: set them on the instance."
            )
        if isinstance(method, type) or not isinstance(method, Method):
            raise OptionError(
                f"method must be a name or an instance such as steering.samplers.FK(), got "
                f"{method!r}."
            )
        return method
    name, _, preset = method.partition("/")
    cls = METHODS.get(name)
    presets = getattr(cls, "presets", {})
    if preset and preset not in presets:
        raise unknown_name(f"preset of method {name!r}", preset, presets or ["(none)"])
    known = {f.name: f for f in dataclasses.fields(cls)}
    for option in options or {}:
        if option not in known:
            raise unknown_name(f"option of method {name!r}", option, known)
    given = {k: coerce(cls, k, v) for k, v in (options or {}).items()}
    values = {k: coerce(cls, k, v) for k, v in presets.get(preset, {}).items()}
    return over_preset(cls, values, given)


T = typing.TypeVar("T")


def over_preset(make: Callable[..., T], preset: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    """``make(**options)`` with a preset's values under those given.

    Values of the preset that the given ones make useless give way: nobody typed them.

    Raises:
        OptionError: as ``make`` does.
    """
    try:
        return make(**{**preset, **given})
    except IdleOption as error:
        idle = set(error.options)
        if not idle or not idle <= set(preset):
            raise
    return over_preset(make, {k: v for k, v in preset.items() if k not in idle}, given)


def coerce(cls: type, name: str, value: Any) -> Any:  # noqa: ANN401
    """An option value as the type its dataclass field declares ("0.5" -> 0.5, [1] -> (1,)).

    Raises:
        OptionError: names the option, the type wanted and the value seen.
    """
    from pydantic import ValidationError

    if isinstance(value, np.generic):
        value = value.item()
    adapter = _adapter(cls, name)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if isinstance(value, str) and value.lower() in ("none", "null", ""):
            with contextlib.suppress(ValidationError):
                return adapter.validate_python(None)
        reason = error.errors()[0]["msg"]
        raise OptionError(f"Option {name}={value!r}: {reason}.") from None


@functools.cache  # building one takes longer than a small step of a sampler
def _adapter(cls: type, name: str) -> Any:  # noqa: ANN401
    from pydantic import ConfigDict, TypeAdapter

    try:
        wanted = typing.get_type_hints(cls)[name]
    except NameError:  # a class of the user's whose annotations name what only it can see
        wanted = Any
    return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))


def default_costs(model: Model, grid: Grid) -> tuple[int, ...]:
    """Costs along any grid: the model's own where it is its own grid, its largest elsewhere."""
    own = model.costs()
    if len(own) == len(grid) and grid.times == model.grid().times:
        return own
    return (max(own),) * len(grid)


def as_float64(values: Tensor) -> Tensor:
    """Rewards as they enter weights: float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)
