"""Mean and spread of rewards, measured once on unsteered images and kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.recipe import atomic
from steering.rewards.spec import as_reward
from steering.scoring import Reward, check_scores, labels

FORMAT = "steering-calibration/1"


@dataclass(frozen=True)
class Constants:
    """Of one reward: mean over all images, and standard deviation among images of one prompt."""

    mean: float
    std: float
    images: int
    prompts: int


@dataclass(frozen=True)
class Calibration:
    """Constants per reward, by spec (by name for rewards of your own).

    Attributes:
        rewards: spec -> its constants.
        model: of the images they were measured on.
    """

    rewards: Mapping[str, Constants] = field(default_factory=dict)
    model: str = ""

    def of(self, reward: Reward) -> Constants:
        """The constants of a reward.

        Raises:
            OptionError: it was not measured.
        """
        key = key_of(reward)
        if key not in self.rewards:
            raise OptionError(
                f"The calibration has no constants for {key!r}; it has "
                f"{', '.join(self.rewards) or 'none'}. Measure it: "
                "calibration.measure([...], images, prompts).save('calibration.json')."
            )
        return self.rewards[key]

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all."""
        data = {
            "format": FORMAT,
            "model": self.model,
            "rewards": {key: vars(value) for key, value in self.rewards.items()},
        }
        with atomic(Path(path)) as temporary:
            temporary.write_text(json.dumps(data, indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that `save` wrote.

        Raises:
            OptionError: missing, damaged, or with a spread that is not above zero.
        """
        data = read_json(path, "calibration")
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} is not {FORMAT!r}")
            found = {key: Constants(**value) for key, value in data["rewards"].items()}
            for key, value in found.items():
                if not (math.isfinite(value.mean) and math.isfinite(value.std) and value.std > 0):
                    raise ValueError(f"{key!r} needs a finite mean and a std above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"{path} is no calibration file: {error}.") from error
        return cls(found, str(data.get("model", "")))


def read_json(path: str | Path, what: str) -> Any:  # noqa: ANN401
    """The contents of a JSON file.

    Raises:
        OptionError: missing or not JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise OptionError(f"The {what} file {str(path)!r} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"The {what} file {str(path)!r} is not JSON: {error}.") from error


def key_of(reward: Reward) -> str:
    """What a reward is called in a calibration."""
    return reward.spec or reward.name


@torch.no_grad()
def measure(
    rewards: Sequence[object],
    images: Any,  # noqa: ANN401
    prompts: Sequence[Any],
    *,
    model: str = "",
) -> Calibration:
    """Constants of rewards on unsteered images, several per prompt.

    The spread is the root of the mean variance among images of one prompt, because that is what a
    search chooses from. With one image per prompt it is the spread over all of them.

    Args:
        rewards: names, specs or rewards.
        images: tensor [n, 3, H, W] in [0, 1] or PIL images, from the model that will be steered.
        prompts: one per image.

    Raises:
        OptionError: fewer than two images, or a reward that does not vary.
        RewardError: a reward returned NaN or the wrong number of values.
    """
    n = len(images)
    if n < 2 or isinstance(prompts, str) or len(prompts) != n:
        raise OptionError(f"Calibrate on 2 or more images with a prompt each; got {n} images.")
    found: dict[str, Constants] = {}
    members = [as_reward(r) for r in rewards]
    for label, reward in zip(labels(members), members, strict=True):
        scores = check_scores(reward(images, list(prompts)), label, n, " while calibrating")
        value = scores.value.detach().double().cpu()
        finite = torch.isfinite(value)
        std = _spread(value[finite], [p for p, ok in zip(prompts, finite, strict=True) if ok])
        if not std > 0:
            raise OptionError(f"{label!r} does not vary on these images; it cannot be calibrated.")
        found[key_of(reward)] = Constants(
            mean=float(value[finite].mean()), std=std, images=n, prompts=len(set(prompts))
        )
    return Calibration(found, model)


def _spread(value: Tensor, prompts: Sequence[Any]) -> float:
    rows = groups(prompts, len(value))
    squares = [value[r].sub(value[r].mean()).square().sum() for r in rows]
    freedom = len(value) - len(rows)
    if freedom == 0:
        return float(value.std()) if len(value) > 1 else 0.0
    return float((torch.stack(squares).sum() / freedom).sqrt())


def groups(prompts: Sequence[Any] | str | None, n: int) -> list[Tensor]:
    """Row indices of the images of each prompt; a single prompt makes one group."""
    if prompts is None or isinstance(prompts, str):
        return [torch.arange(n)]
    rows: dict[Any, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return [torch.tensor(found) for found in rows.values()]
