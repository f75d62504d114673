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
        hub_id: where the weights come from; "none" where there are none.
        value_range: of the values, as seen or as bounded.
        memory: of the weights, in the default precision.
        stationary: whether the value of an image depends on that image and its prompt alone. Where
            it depends on the others of the call, the weights of a particle method would be
            those of another law at every step.
        video: "frames" scores each frame and takes the mean; "whole" hands ``score`` the video
            as it is.
        unit: options that change how a value is computed or written down, not what it measures.
    """

    name: ClassVar[str] = "reward"
    differentiable: ClassVar[bool] = False
    licence: ClassVar[str] = "Apache-2.0"
    describe: ClassVar[str] = ""
    hub_id: ClassVar[str] = "none"
    value_range: ClassVar[str] = "-"
    memory: ClassVar[str] = "none"
    stationary: ClassVar[bool] = True
    video: ClassVar[str] = "frames"
    unit: ClassVar[tuple[str, ...]] = ("scale", "precision", "device", "batch_size", "offload")
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
    def measures(self) -> str | None:
        """The spec without what only changes the unit: equal texts measure the same thing."""
        if not self._registered:
            return None
        from steering.rewards.spec import call_spec

        options = _changed_options(self)
        return call_spec(self.name, {k: v for k, v in options.items() if k not in self.unit})

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
        if images.ndim == 4 or self.video == "whole":
            return as_scores(self.score(images, prompts, metadata))
        n, frames = images.shape[:2]
        each = [prompt for prompt in prompts for _ in range(frames)]
        extra = None if metadata is None else [m for m in metadata for _ in range(frames)]
        found = as_scores(self.score(images.flatten(0, 1), each, extra))
        return Scores(
            value=found.value.view(n, frames).mean(1),
            parts={k: v.view(n, frames).float().mean(1) for k, v in found.parts.items()},
            valid=None if found.valid is None else found.valid.view(n, frames).all(1),
            notes={
                k: ["\n".join(v[i * frames : (i + 1) * frames]) for i in range(n)]
                for k, v in found.notes.items()
            },
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
