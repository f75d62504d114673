"""The base of the built-in rewards, and the decorator that gives a reward its name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from steering.registry import REWARDS
from steering.rewards.arithmetic import Arithmetic
from steering.rewards.function import as_scores, first_line
from steering.rewards.images import as_tensor, check_prompts
from steering.scoring import Scores

T = TypeVar("T", bound=Callable[..., Any])


class Reward(Arithmetic):
    """Base of the built-in rewards: checks images and prompts, folds video, builds the spec.

    A subclass is a frozen dataclass whose fields are its options, with one method ``score``. Once
    registered under a name, its ``spec`` lists the options that differ from their defaults.

    Attributes:
        name: the registered name.
        differentiable: whether gradients flow from the values to the images.
        licence: of the weights, or of the code where there are none.
        describe: one line for tables; the first line of the docstring unless given.
    """

    name: ClassVar[str] = "reward"
    differentiable: ClassVar[bool] = False
    licence: ClassVar[str] = "Apache-2.0"
    describe: ClassVar[str] = ""
    _registered: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**options)
        cls._registered = False
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        if "describe" not in cls.__dict__:
            cls.describe = first_line(cls)

    @property
    def spec(self) -> str | None:
        """The string that rebuilds this reward; None for a class without a registered name."""
        if not self._registered:
            return None
        from steering.rewards.spec import call_spec

        return call_spec(self.name, _changed_options(self))

    @property
    def spread(self) -> float | None:
        """Typical standard deviation between samples of one prompt, where it has been measured.

        It sets the default strength of methods that weigh samples.
        """
        return None

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor | Scores:
        """Values [n] of images float32 [n, 3, H, W] in [0, 1]; subclasses write this."""
        raise NotImplementedError

    def __call__(
        self,
        images: Any,  # noqa: ANN401
        prompts: str | Sequence[Any],
        *,
        metadata: Sequence[Any] | None = None,
    ) -> Scores:
        """Scores of a batch, in its order; a video counts as the mean of its frames.

        Args:
            images: [n, 3, H, W] or video [n, F, 3, H, W] in [0, 1]; PIL images and channel-last
                arrays are converted.
            prompts: one per image; a single string serves all.
            metadata: anything a reward may need beside the prompt, one per image.

        Raises:
            OptionError: images or prompts of the wrong kind, range, shape or number.
            RewardError: the images hold NaN.
        """
        images = as_tensor(images)
        prompts = check_prompts(prompts, len(images))
        if images.ndim == 4:
            return as_scores(self.score(images, prompts, metadata))
        n, frames = images.shape[:2]
        each = [prompt for prompt in prompts for _ in range(frames)]
        extra = None if metadata is None else [m for m in metadata for _ in range(frames)]
        found = as_scores(self.score(images.flatten(0, 1), each, extra))
        return Scores(
            value=found.value.view(n, frames).mean(1),
            parts={k: v.view(n, frames).float().mean(1) for k, v in found.parts.items()},
            valid=None if found.valid is None else found.valid.view(n, frames).all(1),
        )


def register(name: str) -> Callable[[T], T]:
    """Decorator that adds a `Reward` class or a scoring function under a name.

    A function's keyword-only parameters become the options of its spec string. Where it has no
    gradient, say so by an attribute: ``fn.differentiable = False``.

    Raises:
        OptionError: the name is taken.
    """

    def add(thing: Any) -> Any:  # noqa: ANN401
        REWARDS.register(name)(thing)
        if isinstance(thing, type) and issubclass(thing, Reward):
            thing.name, thing._registered = name, True
        elif inspect.isfunction(thing):
            facts = {"reward_name": name, "describe": first_line(thing), "differentiable": True}
            vars(thing).update(facts | vars(thing))
        return thing

    return add


def _changed_options(reward: Any) -> dict[str, Any]:  # noqa: ANN401
    """The dataclass fields that differ from their defaults."""
    if not dataclasses.is_dataclass(reward):
        return {}
    return {
        f.name: getattr(reward, f.name)
        for f in dataclasses.fields(reward)
        if f.init and getattr(reward, f.name) != f.default
    }
