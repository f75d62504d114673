"""VideoReward: visual quality, motion quality and text alignment of a video (Liu et al., 2025)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError, WeightsError
from steering.rewards.base import register
from steering.rewards.checkpoints import kept
from steering.rewards.images import need_text
from steering.rewards.networked import Networked, read_state
from steering.rewards.qwen_reward import (
    QwenReward,
    build,
    fit_frames,
    merge_lora,
    read_rubric,
)
from steering.scoring import Scores

ASPECTS = ("VQ", "MQ", "TA")
MARKS = tuple(f"<|{aspect}_reward|>" for aspect in ASPECTS)
_LEAST = 128 * 28 * 28  # pixels of a frame, of Qwen's own video reader
_RUBRIC = "prompt_template.py"
_TEXTS = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)


@register("videoreward")
@dataclass(frozen=True, kw_only=True)
class VideoReward(Networked):
    """VideoReward (VideoAlign): the sum of visual quality, motion quality and text alignment.

    ``parts`` holds the three, each standardised by the constants that come with the checkpoint.
    A tensor has no frame rate: the model saw 2 frames a second, so give ``every`` = your rate / 2.
    It was trained on clean video; on noisy previews its slope leads to noise.

    Attributes:
        model: folder with model_config.json and checkpoint-*/model.pth, or a hub id.
        base: folder or hub id of Qwen2-VL-2B-Instruct, for config and tokenizer only.
        rubric: ``prompt_template.py`` of the authors' repository (read, not run), or a text file
            with ``{text_prompt}`` and the three marks.
        every: take the first frame and each that many further on.
    """

    differentiable: ClassVar[bool] = True
    video: ClassVar[str] = "whole"
    licence: ClassVar[str] = "MIT (code); Qwen2-VL: Apache-2.0"
    hub_id: ClassVar[str] = "KwaiVGI/VideoReward"
    value_range: ClassVar[str] = "about -3 to 3 per part"
    memory: ClassVar[str] = "4.4 GB (bf16)"

    model: str = "KwaiVGI/VideoReward"
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    rubric: str = ""
    every: int = 1
    precision: str = "bf16"
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise OptionError(f"videoreward(every={self.every}): give 1 or more.")
        if not self.rubric:
            raise OptionError(
                f"videoreward needs the authors' rubric: rubric=/path/to/{_RUBRIC}, from "
                "https://github.com/KwaiVGI/VideoAlign (MIT); it is read, not run."
            )

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """The sum [n], with its three parts."""
        video = images[:, None] if images.ndim == 4 else images
        found = super().score(video[:, :: self.every], prompts, metadata)
        assert not isinstance(found, Scores)
        return Scores(value=found.sum(1), parts=dict(zip(ASPECTS, found.unbind(1), strict=True)))

    def _load(self, where: str) -> Judge:
        rubric_text(self.rubric)
        return _judge(self.model, self.base, self.precision, where)

    def _values(self, net: Judge, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        rubric = rubric_text(self.rubric)
        texts = [rubric.replace("{text_prompt}", p) for p in need_text(prompts, self.name)]
        frames = fit_frames(images, min(_LEAST, net.most), net.most)
        # Each aspect has a token of its own and reads its own output of the head there.
        raw = net.qwen.logits(frames, texts, video=True).diagonal(dim1=1, dim2=2)
        return (raw - net.mean) / net.std


class Judge:
    """The network with the constants of its checkpoint."""

    def __init__(self, qwen: QwenReward, config: dict[str, Any], where: Path) -> None:
        self.qwen, self.model, self.device = qwen, qwen.model, qwen.device
        try:
            constants = config.get("inference_config") or {}
            self.mean, self.std = (
                torch.tensor([float(constants.get(f"{a}_{k}", d)) for a in ASPECTS]).to(
                    self.device
                )
                for k, d in (("mean", 0.0), ("std", 1.0))
            )
            self.most = int(config["data_config"]["max_frame_pixels"])
            template = config["data_config"].get("prompt_template_type", "detailed_special")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError(f"videoreward: {where} is not as expected: {error!r}.") from error
        if template != "detailed_special":
            raise WeightsError(f"videoreward: {where} asks for the template {template!r}.")


@lru_cache(maxsize=4)
def rubric_text(rubric: str) -> str:
    """The rubric, checked for its places."""
    text = read_rubric(Path(rubric), _TEXTS, "videoreward")
    if "{text_prompt}" not in text or any(text.count(mark) != 1 for mark in MARKS):
        raise WeightsError(
            f"videoreward: the rubric {rubric} must hold {{text_prompt}} and {', '.join(MARKS)}."
        )
    return text


@kept(1)
def _judge(source: str, base: str, precision: str, device: str) -> Judge:
    folder = _folder(source)
    config_path = folder / "model_config.json"
    config = json.loads(config_path.read_text())
    weights = sorted(folder.glob("checkpoint-*/model.pth"), key=_step)[-1]
    lora = config.get("peft_lora_config") or {}
    rank, alpha = lora.get("lora_r", 16), lora.get("lora_alpha", 32)
    scale = alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    state = merge_lora(read_state(weights, "videoreward"), scale)
    qwen = build(state, base, MARKS, weights, "videoreward", precision, device)
    return Judge(qwen, config, config_path)


def _step(path: Path) -> int:
    return int(path.parent.name.rpartition("-")[2])


def _folder(source: str) -> Path:
    """The folder with both files.

    Raises:
        WeightsError: one of them is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        files = ["model_config.json", "checkpoint-*/model.pth"]
        try:
            folder = Path(snapshot_download(source, allow_patterns=files))
        except Exception as error:
            raise WeightsError(_lacking(source, f"{type(error).__name__}")) from error
    there = (folder / "model_config.json").is_file()
    if not there or not list(folder.glob("checkpoint-*/model.pth")):
        raise WeightsError(_lacking(source, f"{folder} lacks one of them"))
    return folder


def _lacking(source: str, why: str) -> str:
    return (
        f"videoreward: model_config.json and checkpoint-*/model.pth of {source!r} are not here "
        f"({why}). Fetch them elsewhere (hf download KwaiVGI/VideoReward --local-dir FOLDER) and "
        "give videoreward(model=FOLDER)."
    )
