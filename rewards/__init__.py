"""Rewards: what a picture should be. Higher is better, for every one of them.

    reward = as_reward("clip + 0.5*brightness")
    scores = reward(images, prompts)

`as_reward` reads names, spec strings, `Reward` objects and plain callables.
"""

from __future__ import annotations

from steering.rewards.aesthetic import Aesthetic
from steering.rewards.arithmetic import WeightedSum
from steering.rewards.base import Reward, register
from steering.rewards.brightness import Brightness
from steering.rewards.calibration import Calibration, measure
from steering.rewards.clip import Clip
from steering.rewards.compose import (
    ByCategory,
    ClippedGradient,
    Lexicographic,
    Min,
    RankMean,
    ZSum,
)
from steering.rewards.detection import Count, Presence
from steering.rewards.detector import Detector
from steering.rewards.diversity import Diversity
from steering.rewards.ensemble import Ensemble
from steering.rewards.function import FunctionReward
from steering.rewards.hps import HPS
from steering.rewards.hps3 import HPS3
from steering.rewards.imagereward import ImageReward
from steering.rewards.jpeg import Jpeg
from steering.rewards.ocr import OCR
from steering.rewards.pickscore import PickScore
from steering.rewards.pixels import PixelSpec
from steering.rewards.remote import RemoteReward
from steering.rewards.spec import as_reward
from steering.rewards.unified import Unified, UnifiedPairs
from steering.rewards.video import Frames, Temporal
from steering.rewards.videoreward import VideoReward
from steering.rewards.vlm import VLM
from steering.rewards.vqascore import VQAScore
from steering.scoring import Scores

__all__ = [
    "HPS",
    "HPS3",
    "OCR",
    "VLM",
    "Aesthetic",
    "Brightness",
    "ByCategory",
    "Calibration",
    "Clip",
    "ClippedGradient",
    "Count",
    "Detector",
    "Diversity",
    "Ensemble",
    "Frames",
    "FunctionReward",
    "ImageReward",
    "Jpeg",
    "Lexicographic",
    "Min",
    "PickScore",
    "PixelSpec",
    "Presence",
    "RankMean",
    "RemoteReward",
    "Reward",
    "Scores",
    "Temporal",
    "Unified",
    "UnifiedPairs",
    "VQAScore",
    "VideoReward",
    "WeightedSum",
    "ZSum",
    "as_reward",
    "measure",
    "register",
]
