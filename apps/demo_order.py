"""What a person may ask of the demo: an order within limits, checked before it is queued."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steering.api import check_prompts
from steering.apps.demo_forms import option_fields
from steering.apps.demo_recipes import check_method_options, check_rewards, metadata_of
from steering.errors import OptionError, RecipeError, SteeringError, unknown_name
from steering.ledger import Budget
from steering.loading import call_defaults
from steering.method import Cost, Method, Plan, build_method
from steering.recipe import Recipe
from steering.registry import METHODS, REWARDS

COMPOSED = ("category", "clipped", "frames", "lexicographic", "min", "rank", "zsum")
"""Rewards that are made of others; the demo mixes by weights instead."""
REACHING = ("remote",)
"""Rewards that call an address of the asker's choice."""


class Busy(SteeringError):
    """The demo has as much to do as it takes on; trying later helps."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one person may ask for.

    Attributes:
        nfe, seconds: of one run.
        particles, steps, side: population, steps and picture side of one run.
        methods: compared at once.
        waiting: runs in the queue, of all people; ``per_session`` of one.
        prompt_chars: length of a prompt.
        upload_bytes, upload_pixels: of one file.
        uploads, all_pixels: files at once, and their pixels together.
    """

    nfe: int = 4000
    seconds: float = 600.0
    particles: int = 256
    steps: int = 100
    side: int = 1024
    methods: int = 6
    waiting: int = 64
    per_session: int = 8
    prompt_chars: int = 1000
    upload_bytes: int = 10 * 2**20
    upload_pixels: int = 16 * 10**6
    uploads: int = 16
    all_pixels: int = 64 * 10**6


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run as asked for; all of it is plain data.

    Attributes:
        prompts, seeds: usually one of each; recipes of lists have more.
        call: arguments of the pipeline call, the model's defaults included.
        reward, heldout: spec strings.
        metadata: what the rewards get beside each prompt; None for nothing.
        fingerprint, scheduler: of the model, where a recipe names them.
        trimmed: a population that the budget makes too large is cut to the limit, not refused.
    """

    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    model: str
    call: dict[str, Any] = field(default_factory=dict)
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    reward: str
    heldout: tuple[str, ...] = ()
    budget: Budget
    metadata: tuple[Any, ...] | None = None
    fingerprint: str | None = None
    scheduler: dict[str, Any] | None = None
    trimmed: bool = False

    @property
    def lane(self) -> str:
        """Orders of one lane can share calls: the same model called in the same way."""
        return f"{self.model} {sorted(self.call.items())!r}"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this server offers.

    Attributes:
        models: names, folders or hub ids; the first is the default.
        any_model: whether people may name others.
        rewards: names that may be mixed.
    """

    models: tuple[str, ...] = ("stickers",)
    any_model: bool = False
    rewards: tuple[str, ...] = ()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        names = self.rewards or offered_rewards()
        for name in names:
            if name not in REWARDS.names():
                raise unknown_name("reward", name, REWARDS.names())
        object.__setattr__(self, "rewards", tuple(names))

    def order(
        self,
        prompt: str,
        *,
        model: str,
        method: str,
        preset: str = "",
        options: Mapping[str, Any] | None = None,
        rewards: Mapping[str, float],
        heldout: Sequence[str] = (),
        nfe: float,
        seed: float = 0,
        call: Mapping[str, Any] | None = None,
    ) -> Order:
        """A checked order.

        Raises:
            OptionError: says what is wrong and what would be right.
        """
        limits = self.limits
        check_prompts(prompt)
        if len(prompt) > limits.prompt_chars:
            raise OptionError(
                f"The prompt has {len(prompt)} characters; at most {limits.prompt_chars} "
                "are taken."
            )
        self.check_model(model)
        name = f"{method}/{preset}" if preset else method
        given = {k: v for k, v in (options or {}).items() if v is not None and v != ""}
        self.method(name, given)
        count = _whole("nfe", nfe, 1, limits.nfe)
        verifiers = tuple(self._names(heldout, "held-out verifier"))
        return Order(
            prompts=(prompt.strip(),),
            seeds=(_whole("seed", seed, -(2**53), 2**53),),
            model=model,
            call=self.check_call(model, call or {}),
            method=name,
            options=given,
            reward=self.mix(rewards, verifiers),
            heldout=verifiers,
            budget=Budget(nfe=count, seconds=limits.seconds),
        )

    def repeat(self, recipe: Recipe) -> Order:
        """The order that a recipe writes down.

        Raises:
            RecipeError, OptionError: not one that this server can or may repeat.
        """
        if recipe.engine.get("stopped"):
            raise RecipeError("This picture comes from a stopped run; such a run has no repeat.")
        model, limits = recipe.model.get("source"), self.limits
        if not isinstance(model, str):
            raise RecipeError("The recipe's model was built in memory; this server has no such.")
        if recipe.reward is None:
            raise RecipeError("The recipe's reward was a plain function, which it cannot store.")
        self.check_model(model)
        if len(recipe.prompts) > limits.uploads:
            raise RecipeError(f"The recipe has {len(recipe.prompts)} prompts, too many to repeat.")
        check_prompts([p for p in recipe.prompts] or "")
        name, options = str(recipe.method["name"]), recipe.method["options"]
        if not isinstance(options, dict):
            raise RecipeError("Damaged recipe: the options of its method are no object.")
        self.method(name, options, of_recipe=True)
        budget = {k: recipe.budget.get(k) for k in ("nfe", "reward_calls")}
        budget["nfe"] = _whole("nfe", budget["nfe"] or limits.nfe, 1, limits.nfe)
        heldout = tuple(s for s in recipe.heldout if s)
        check_rewards((recipe.reward, *heldout), self.rewards)
        return Order(
            prompts=tuple(recipe.prompts),
            seeds=tuple(_whole("seed", s, -(2**63), 2**63) for s in recipe.seeds),
            model=model,
            call=self.check_call(model, recipe.call),
            method=name,
            options=options,
            reward=recipe.reward,
            heldout=heldout,
            metadata=metadata_of(recipe),
            budget=Budget(**budget, seconds=limits.seconds),
            fingerprint=recipe.model.get("fingerprint"),
            scheduler=recipe.model.get("scheduler"),
        )

    def check_model(self, model: object) -> None:
        """Raises unless this server may open the model."""
        if not isinstance(model, str) or not model.strip() or len(model) > 500:
            raise OptionError(f"Name a model, such as {self.models[0]!r}.")
        if model not in self.models and not self.any_model:
            raise OptionError(
                f"This server offers {', '.join(map(repr, self.models))}, not {model!r}."
            )

    def method(self, name: str, options: Mapping[str, Any], *, of_recipe: bool = False) -> Method:
        """The method with these options, if they are within the limits."""
        cls = METHODS.get(name.partition("/")[0])
        offered = {f.name for f in option_fields(cls)}
        known = {f.name: f.default for f in dataclasses.fields(cls)}
        for option, value in options.items():
            default = option in known and _same(value, known[option])
            if option in known and option not in offered and not (of_recipe and default):
                raise OptionError(
                    f"Option {option!r} of {name!r} cannot be set from the demo; use Python."
                )
            if isinstance(value, str | list | tuple) and len(value) > 200:
                raise OptionError(f"Option {option!r} is too long.")
        if of_recipe:
            check_method_options(cls, options, f"the method {name!r}")
        built = build_method(name, options)
        steps = getattr(built, "steps", None)
        if steps is not None and steps > self.limits.steps:
            raise OptionError(f"steps={steps}: this server takes at most {self.limits.steps}.")
        option, size = _population(built)
        if size > self.limits.particles:
            raise OptionError(
                f"{option}={size}: this server takes at most {self.limits.particles}."
            )
        return built

    def check_call(self, model: str, call: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the pipeline call, the model's own defaults filled in."""
        defaults, limits = call_defaults(model), self.limits
        given = {k: v for k, v in call.items() if v not in (None, "")}
        # Number fields of browsers turn empty into 0; no guidance is a choice.
        given = {k: v for k, v in given.items() if v != 0 or k == "guidance_scale"}
        found = {**defaults, **given}
        ranges: dict[str, tuple[float, float]] = {
            "num_inference_steps": (1, limits.steps),
            "guidance_scale": (0.0, 50.0),
            "height": (8, limits.side),
            "width": (8, limits.side),
        }
        for name, value in found.items():
            if name in defaults and value == defaults[name] and type(value) is not str:
                continue
            if name not in ranges:
                raise OptionError(
                    f"Pipeline argument {name!r} cannot be set here; known: {', '.join(ranges)}."
                )
            low, high = ranges[name]
            if name == "guidance_scale":
                found[name] = _number(name, value, low, high)
            else:
                found[name] = _whole(name, value, int(low), int(high))
        return found

    def mix(self, rewards: Mapping[str, float], heldout: Sequence[str] = ()) -> str:
        """A spec string of a reward mix."""
        names = self._names(list(rewards), "reward")
        weights = {n: _number(f"weight of {n}", rewards[n], -1000.0, 1000.0) for n in names}
        weights = {n: w for n, w in weights.items() if w}
        if not weights:
            raise OptionError("Choose at least one reward with a weight other than 0.")
        if both := sorted(set(weights) & set(heldout)):
            raise OptionError(
                f"{', '.join(both)} guides the search, so it cannot be "
                "held out too: a verifier that the search has seen proves nothing."
            )
        terms = [n if w == 1.0 else f"{w:g}*{n}" for n, w in weights.items()]
        return " + ".join(terms).replace("+ -", "- ")

    def _names(self, names: Sequence[str], kind: str) -> list[str]:
        for name in names:
            if name not in self.rewards:
                raise unknown_name(f"{kind} of this server", name, self.rewards)
        return list(dict.fromkeys(names))

    def fitted(self, method: Method, plan: Plan, *, trimmed: bool = False) -> Method:
        """A method with its sizes set by the budget, if they are within the limits.

        Args:
            trimmed: best-of-N with too many samples takes as many as may be.
        """
        option, size = _population(method)
        most = self.limits.particles
        if trimmed and size > most:
            method, size = dataclasses.replace(method, **{option: most}), most  # type: ignore[type-var]
        if size > most:
            raise OptionError(
                f"This budget makes {option}={size} of {method.name!r}, and this server takes at "
                f"most {most}. Lower the budget (a sample takes {plan.trajectory} network rows), "
                f"take more steps, or set {option}."
            )
        self.check_cost(method.cost(plan), plan.budget)
        return method

    def check_cost(self, cost: Cost, budget: Budget) -> None:
        """Raises where a method with its sizes set would do too much beside the network."""
        most = self.limits.nfe * 4
        for name in ("decodes", "reward_calls"):
            if getattr(cost, name) > most:
                raise OptionError(
                    f"These options need {getattr(cost, name)} {name.replace('_', ' ')}; this "
                    f"server takes at most {most}."
                )
        if budget.nfe is not None and cost.nfe > self.limits.nfe:
            raise OptionError(f"These options need nfe={cost.nfe}; at most {self.limits.nfe}.")


def offered_rewards() -> tuple[str, ...]:
    """Registered rewards that can be used by name alone."""
    return tuple(n for n in REWARDS.names() if n not in COMPOSED + REACHING)


def _population(method: Method) -> tuple[str, int]:
    """The option that says how many samples a method has, and how many; 0 while that is open."""
    for option in ("n_particles", "n"):
        size = getattr(method, option, None)
        largest = max(size, default=0) if isinstance(size, tuple) else size
        if isinstance(largest, int):
            return option, largest
    return "n_particles", 0


def _same(value: object, default: object) -> bool:
    return value == default or (isinstance(value, list) and tuple(value) == default)


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be a number, got {value!r}.") from None
    if isinstance(value, bool) or not math.isfinite(number) or not low <= number <= high:
        raise OptionError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}.")
    return number


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    number = _number(name, value, low, high)
    if not number.is_integer():
        raise OptionError(f"{name} must be a whole number, got {value!r}.")
    return int(number)
