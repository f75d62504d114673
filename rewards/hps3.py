"""HPSv3: human preference read by a vision-language model (Ma et al., 2025)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from steering.errors import WeightsError
from steering.rewards.base import register
from steering.rewards.checkpoints import kept
from steering.rewards.images import need_text
from steering.rewards.networked import Networked, find_file, read_state
from steering.rewards.qwen_reward import QwenReward, build, fit_frames, read_rubric
from steering.scoring import Scores

MARK = "<|Reward|>"
PIXELS = 256 * 28 * 28
_RUBRIC = "data_collator_qwen.py"
_TEXTS = ("INSTRUCTION", "prompt_with_special_token")


@register("hps3")
@dataclass(frozen=True, kw_only=True)
class HPS3(Networked):
    """HPSv3: a Qwen2-VL-7B that reads picture and prompt and gives a mean and a spread.

    The value is the mean; ``parts["sigma"]`` is the second output. The model was trained on one
    long rubric, which is the authors' text and not part of this package: it is read, not run,
    from ``hpsv3/dataset/data_collator_qwen.py`` of their repository.

    Attributes:
        model: HPSv3.safetensors, a folder that holds it, or a hub id.
        base: folder or hub id of Qwen2-VL-7B-Instruct, for config and tokenizer only.
        rubric: that file of the authors, or a text file with ``{text_prompt}`` and the mark; by
            default the one of an installed ``hpsv3`` (``pip install --no-deps hpsv3``).
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "see the model card; Qwen2-VL: Apache-2.0"
    hub_id: ClassVar[str] = "MizzenAI/HPSv3"
    value_range: ClassVar[str] = "about -5 to 15"
    memory: ClassVar[str] = "16 GB (bf16)"

    model: str = "MizzenAI/HPSv3"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    rubric: str = ""
    precision: str = "bf16"
    batch_size: int = 4

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """The mean [n], with the spread as a part."""
        found = super().score(images, prompts, metadata)
        assert not isinstance(found, Scores)
        return Scores(value=found[:, 0], parts={"sigma": found[:, 1]})

    def _load(self, where: str) -> QwenReward:
        self._text()
        return _hps3(self.model, self.base, self.precision, where)

    def _values(self, net: QwenReward, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        rubric = self._text()
        texts = [rubric.replace("{text_prompt}", p) for p in need_text(prompts, self.name)]
        return net.logits(fit_frames(images[:, None], PIXELS, PIXELS), texts, video=False)[:, 0]

    def _text(self) -> str:
        return rubric_text(self.rubric)


@lru_cache(maxsize=8)
def rubric_text(rubric: str) -> str:
    """The rubric, checked for its two places."""
    path = Path(rubric) if rubric else _installed()
    text = read_rubric(path, _TEXTS, "hps3")
    if "{text_prompt}" not in text or text.count(MARK) != 1:
        raise WeightsError(f"hps3: the rubric {path} must hold {{text_prompt}} and {MARK} once.")
    return text


def _installed() -> Path:
    found = importlib.util.find_spec("hpsv3")  # locates, does not import
    if found is None or not found.submodule_search_locations:
        raise WeightsError(
            f"hps3 needs the authors' rubric. Give hps3(rubric=/path/to/{_RUBRIC}), the file "
            f"hpsv3/dataset/{_RUBRIC} of https://github.com/MizzenAI/HPSv3; it is read, not run."
        )
    return Path(next(iter(found.submodule_search_locations))) / "dataset" / _RUBRIC


@kept(1)
def _hps3(source: str, base: str, precision: str, device: str) -> QwenReward:
    path = find_file(source, "HPSv3.safetensors", "hps3")
    return build(read_state(path, "hps3"), base, [MARK], path, "hps3", precision, device)
