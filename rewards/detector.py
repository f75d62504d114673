"""The sticker judge as a reward, or better as a held-out verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steering.rewards.base import Reward, register
from steering.rewards.checkpoints import kept
from steering.rewards.images import device_name, need_text
from steering.scoring import Scores
from steering.turns import in_turn

if TYPE_CHECKING:
    from steering.stickers.judge import StickerJudge


@register("detector")
@dataclass(frozen=True, kw_only=True)
class Detector(Reward):
    """1 where a sticker picture shows its prompt by GenEval's rules, else 0.

    Parts: ``objects``, the number of objects found. Prompts must be of the sticker grammar; where
    ``metadata`` holds GenEval records, these are judged instead.

    Raises:
        OptionError: a prompt outside the grammar.
        WeightsError: the detector's weights are missing.
    """

    differentiable: ClassVar[bool] = False
    hub_id: ClassVar[str] = "embedded"
    value_range: ClassVar[str] = "0 or 1"
    memory: ClassVar[str] = "under 10 MB"

    def for_model(self, model: Any) -> Detector:  # noqa: ANN401
        """This reward, after a look at the model's prompts and with its weights loaded."""
        from steering.stickers.grammar import parse

        for prompt in getattr(model, "prompts", ()):
            parse(*need_text([prompt], self.name))
        _judge(device_name(getattr(model, "device", "cpu")))
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Correct or not [n] as 1 or 0."""
        records = need_text(prompts, self.name) if metadata is None else list(metadata)
        judge = _judge(device_name(images.device))
        with in_turn():
            verdicts = judge.judge(images, records)
        return Scores(
            value=torch.tensor([float(v.correct) for v in verdicts], device=images.device),
            parts={
                "objects": torch.tensor(
                    [float(len(v.objects)) for v in verdicts], device=images.device
                )
            },
        )


@kept(2)
def _judge(device: str) -> StickerJudge:
    from steering.stickers.judge import StickerJudge
    from steering.stickers.load import load_detector

    return StickerJudge(load_detector().to(device))  # type: ignore[arg-type]
