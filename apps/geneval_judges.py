"""What scores a GenEval folder: detector, colours, held-out rewards, CLIP for diversity.

`open_judges` opens them, and `Judges.check` finds out before any work whether they fit the prompts
and the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from steering.apps.geneval_folder import read_scoring
from steering.errors import OptionError, SteeringError
from steering.recipe import package_versions
from steering.rewards.geneval_colors import ClipColors, Scorer, open_colors
from steering.rewards.geneval_detectors import open_detector
from steering.scoring import (
    Reward,
    heldout_labels,
    labels,
    parts_of,
    recipe_reward,
    resolve_reward,
)
from steering.stickers.grammar import Metadata

Embed = Callable[[Tensor], Tensor]
_STICKERS = "stickers"


@dataclass(frozen=True, eq=False, kw_only=True)
class Judges:
    """All that looks at the images of a folder.

    Attributes:
        scorer: detector, colours and rules.
        heldout: rewards beside the verdict; those that share a component with the ``guide`` of
            the run say so.
        embed: images [n, 3, H, W] of one size to unit vectors [n, d], for diversity.
        device: where ``heldout`` and ``embed`` get their images.
    """

    scorer: Scorer
    heldout: Sequence[Reward] = ()
    guide: Reward | None = None
    embed: Embed | None = None
    embed_name: str = ""
    device: str = "cpu"

    def verifiers(self) -> dict[str, Reward]:
        """The held-out rewards by the names that reports use."""
        guide, given = self.guide, self.heldout
        names = labels(given) if guide is None else heldout_labels(guide, given)
        return dict(zip(names, given, strict=True))

    def describe(self) -> dict[str, Any]:
        """What scoring.json says of them."""
        found = {
            "detector": self.scorer.detector.describe(),
            "colors": self.scorer.colors.describe(),
            "rules": self.scorer.rules.__dict__,
            "heldout": [r.spec for r in self.heldout],
            "diversity": self.embed_name,
            "versions": package_versions(),
        }
        return json.loads(json.dumps(found))

    def check(self, folder: Path, records: Sequence[Metadata]) -> None:
        """Raises where these prompts cannot be judged, or others have judged in this folder.

        Raises:
            OptionError: classes that the detector does not know, another detector, held-outs,
                results of another scorer.
            RecipeError: a damaged scoring.json.
        """
        self.scorer.check(records)
        lines, how = folder / "results.jsonl", self.describe()
        if not lines.is_file() or not lines.stat().st_size:
            return
        old = read_scoring(folder)
        if not old:  # the published scorer's file has this name too
            raise OptionError(
                f"{lines} is not of this scorer: no scoring.json lies beside it. Move it away, or "
                "let it be replaced: steer geneval score --again."
            )
        changed = [k for k in how if k != "versions" and old.get(k) != how[k]]
        if changed:
            raise OptionError(
                f"{folder} was scored with another {' and '.join(changed)}. To score it anew: "
                "steer geneval score --again."
            )


def open_judges(
    run: Mapping[str, Any],
    *,
    detector: str | None = None,
    colors: str | None = None,
    heldout: Sequence[str] | None = None,
    device: str = "cpu",
) -> Judges:
    """The judges of a run, or of a folder made elsewhere where ``run`` is empty.

    Args:
        run: run.json, or as much of it as is known ("model", "reward", "heldout").
        detector, colors: as for `open_detector` and `open_colors`; by default those of the model's
            world.
        heldout: rewards; None takes the run's own, for which no code is imported.

    Raises:
        OptionError, WeightsError: what cannot be opened, or a verifier that guided the search.
    """
    ours = str(run.get("model", {}).get("source")).startswith(_STICKERS)
    detector = detector or (_STICKERS if ours else "mask2former")
    colors = colors or (_STICKERS if detector == _STICKERS else "clip")
    named = map(recipe_reward, run.get("heldout", [])) if heldout is None else heldout
    verifiers, guide = adapted(list(named), run, device)
    scorer = Scorer(open_detector(detector, device=device), open_colors(colors, device=device))
    embed, name = embedder(scorer, device)
    return Judges(
        scorer=scorer, heldout=verifiers, guide=guide, embed=embed, embed_name=name, device=device
    )


def adapted(
    heldout: Sequence[object], run: Mapping[str, Any], device: str
) -> tuple[list[Reward], Reward | None]:
    """(held-out rewards, the guide), fitted to the run's model; no guide where none is known.

    The guide stands in a file that may be from elsewhere, so no code is imported for it.

    Raises:
        OptionError: a held-out reward measures what the guiding reward does.
    """
    model = SimpleNamespace(name=run.get("model", {}).get("source"), device=device, prompts=())
    rewards = [resolve_reward(one, model) for one in heldout]
    guide = _guide(str(run.get("reward", "")), model) if rewards else None
    for reward in rewards:
        same = reward.spec is not None and reward.spec == run.get("reward")
        if same or (guide is not None and set(parts_of(reward)) == set(parts_of(guide))):
            raise OptionError(
                f"--heldout {reward.spec or reward.name} is the guiding reward itself: a verifier "
                "that the search has seen proves nothing. Choose another one."
            )
    return rewards, guide


def _guide(spec: str, model: Any) -> Reward | None:  # noqa: ANN401
    """The guide as far as it can be had: comparing it needs no weights."""
    try:
        guide = recipe_reward(spec)
    except SteeringError:
        return None
    try:
        return resolve_reward(guide, model)
    except SteeringError:
        return guide


def embedder(scorer: Scorer, device: str) -> tuple[Embed, str]:
    """(images to CLIP vectors, its name): the colour model's CLIP, or the stickers' own."""
    if isinstance(scorer.colors, ClipColors):
        return scorer.colors.encoder.image, f"clip {scorer.colors.model}"
    from steering.rewards.clip import Encoder
    from steering.rewards.clip_loading import load

    return Encoder(load("stickers", "openai", "fp32", device)).image, "clip stickers"


def is_oracle(run: Mapping[str, Any], scoring: Mapping[str, Any]) -> bool:
    """Whether the search was guided by the very judge that scores it.

    That is the sticker judge, or any reward that asks the detector's own weights.
    """
    spec, judge = str(run.get("reward", "")), scoring["detector"]
    try:
        parts = _parts(recipe_reward(spec))
    except SteeringError:  # code of the user's, or options of another release
        source = str(judge.get("source") or judge["name"])
        return "geneval" in spec or source in spec
    if judge["name"] == _STICKERS:
        return any(part.name == "detector" for part in parts)
    asked = {_place(model) for part in parts if (model := getattr(part, "model", None))}
    return _place(judge.get("source")) in asked


def _parts(reward: Any) -> list[Any]:  # noqa: ANN401
    """The rewards with a weight that a reward is made of."""
    terms = getattr(reward, "terms", None)
    if terms is None:
        return [reward]
    return [part for weight, term in terms if weight for part in _parts(term)]


def _place(source: object) -> str:
    """A hub id as it is, a folder by its full path."""
    text = str(source)
    return str(Path(text).resolve()) if Path(text).exists() else text
