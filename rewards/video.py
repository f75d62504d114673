"""Rewards of video: image rewards over frames, and how steady the picture is.

Any image reward takes a video too, as the mean over all frames; `Frames` chooses frames and how
they are summed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import register
from steering.rewards.diversity import Features
from steering.rewards.ensemble import Ensemble
from steering.rewards.images import as_tensor, check_prompts
from steering.scoring import Scores

_REDUCE = ("mean", "min", "last")


@register("frames")
class Frames(Ensemble):
    """An image reward over chosen frames of a video: ``frames(pickscore, every=8)``.

    Args:
        member: the image reward.
        every: take the first frame and each that many further on.
        reduce: "mean", "min" (no frame may be bad) or "last" (the outcome of an action).
    """

    name = "frames"
    describe = "an image reward over chosen frames of a video"
    weighted = False

    def __init__(
        self, *member: object, every: int = 1, reduce: Literal["mean", "min", "last"] = "mean"
    ) -> None:
        super().__init__(
            *member,
            every=None if every == 1 else every,
            reduce=None if reduce == "mean" else reduce,
        )
        if len(self.terms) != 1:
            raise OptionError("frames takes one reward; add rewards up inside: frames(a + b).")
        if every < 1 or reduce not in _REDUCE:
            raise OptionError(
                f"frames(every={every}, reduce={reduce!r}): give 1 or more, and one of "
                f"{', '.join(_REDUCE)}."
            )
        self.every, self.reduce = every, reduce

    def __call__(
        self,
        images: Any,  # noqa: ANN401
        prompts: str | Sequence[Any],
        *,
        metadata: Sequence[Any] | None = None,
    ) -> Scores:
        """One value per video [n, F, 3, H, W]; a picture counts as a video of one frame."""
        video = as_tensor(images)
        video = video[:, None] if video.ndim == 4 else video
        prompts = check_prompts(prompts, len(video))
        chosen = video[:, -1:] if self.reduce == "last" else video[:, :: self.every]
        n, count = chosen.shape[:2]
        each = [p for p in prompts for _ in range(count)]
        extra = None if metadata is None else [m for m in metadata for _ in range(count)]
        (_, reward), (key,) = self.terms[0], self._keys()
        found = self.ask(reward, chosen.flatten(0, 1), each, extra)
        per_frame = found.value.view(n, count)
        value = per_frame.amin(1) if self.reduce == "min" else per_frame.mean(1)
        return Scores(value=value.float(), parts={key: value, f"{key}.worst": per_frame.amin(1)})


@register("temporal")
@dataclass(frozen=True, kw_only=True)
class Temporal(Features):
    """How steady a video is: mean cosine of each frame with the one before and with the first.

    With DINO features this is VBench's subject consistency, with CLIP features its background
    consistency (Huang et al., 2024). A still picture gets 1, so never steer with it alone.
    """

    value_range: ClassVar[str] = "about 0.8 to 1"

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        """Mean cosines [n] of video [n, F, 3, H, W] with two frames or more."""
        if images.ndim != 5 or images.shape[1] < 2:
            raise OptionError(
                "temporal compares the frames of a video [n, frames, 3, H, W] with 2 frames or "
                f"more; got shape {tuple(images.shape)}."
            )
        found = self.embed(images.flatten(0, 1)).view(*images.shape[:2], -1)
        before = (found[:, 1:] * found[:, :-1]).sum(-1).clamp(min=0)
        first = (found[:, 1:] * found[:, :1]).sum(-1).clamp(min=0)
        return torch.stack([before, first]).mean((0, 2))
