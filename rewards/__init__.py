"""Rewards: what a picture should be. Higher is better, for every one of them.

    reward = as_reward("clip + 0.5*brightness")
    scores = reward(images, prompts)

`as_reward` reads names, spec strings, `Reward` objects and plain callables.
"""

from __future__ import annotations

from steering.rewards.arithmetic import WeightedSum
from steering.rewards.base import Reward, register
from steering.rewards.function import FunctionReward
from steering.rewards.spec import as_reward
from steering.scoring import Scores

__all__ = ["FunctionReward", "Reward", "Scores", "WeightedSum", "as_reward", "register"]
