"""What the sticker models are worth: the figures of `steer stickers eval` and docs/stickers.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.stickers.grammar import TAGS, parse
from steering.stickers.judge import StickerJudge, overlap
from steering.stickers.load import CALLS, FOLDERS, WEIGHTS, load_pipeline
from steering.stickers.prompts import sample_metadata
from steering.stickers.world import Scene, StickerWorld

Figures = dict[str, float]
Report = Callable[[str, int, int], None]
"""(what, done, total)"""
SAME_BOX = 0.7  # IoU from which a box counts as found
ORACLE_DRAWS = 8  # images of a prompt between two looks at its verdicts
_SCENE_SEED = 9_400_000


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


def by_tag(tags: Sequence[str], right: Sequence[bool]) -> Figures:
    """Share right per tag; "overall" is the plain mean of the tags, as in GenEval."""
    names, values = np.asarray(tags), np.asarray(right, float)
    out = {tag: float(values[names == tag].mean()) for tag in TAGS if (names == tag).any()}
    return out | {"overall": float(np.mean(list(out.values())))}


def scenes(per_tag: int) -> list[Scene]:
    """Scenes with held-out pairs, the same number of each tag, in the order of the tags."""
    world, rng = StickerWorld(), np.random.default_rng(_SCENE_SEED)
    records = [
        sample_metadata(rng, split="heldout", tag=tag) for tag in TAGS for _ in range(per_tag)
    ]
    return [world.place(record, rng) for record in records]


def autoencoder(n: int = 256) -> Figures:
    """PSNR in dB of held-out scenes, over the image and inside object boxes."""
    from steering.stickers.train.autoencoder import evaluate
    from steering.stickers.train.data import load_vae

    return evaluate(load_vae(FOLDERS["stickers"] / "vae"), n)


def detector(per_tag: int = 100) -> dict[str, Figures]:
    """The judge on rendered scenes and on the same scenes decoded by the autoencoder.

    Returns:
        "objects": share of rendered objects found with the right class and box; "rendered" and
        "decoded": share of scenes judged right, per tag.
    """
    from steering.stickers.train.data import decode, encode, load_vae, to_tensor

    world, judge, drawn = StickerWorld(), StickerJudge(), scenes(per_tag)
    images = np.stack([world.render(s) for s in drawn])
    vae = load_vae(FOLDERS["stickers"] / "vae")
    found = judge.detect(to_tensor(images))
    hits = [
        any(f.name == o.name and overlap(f.box, o.box) >= SAME_BOX for f in seen)
        for scene, seen in zip(drawn, found, strict=True)
        for o in scene.objects
    ]
    records, tags = [s.metadata for s in drawn], [s.metadata["tag"] for s in drawn]
    out: dict[str, Figures] = {"objects": {"right": float(np.mean(hits))}}
    for name, seen in (("rendered", images), ("decoded", decode(vae, encode(vae, images)))):
        verdicts = judge.judge(to_tensor(seen), records)
        out[name] = by_tag(tags, [v.correct for v in verdicts])
    return out


def clip(n: int = 1024) -> Figures:
    """Right caption among 64; captions told from copies with colours or places swapped."""
    from steering.stickers.train.clip import evaluate

    return evaluate(WEIGHTS / "clip", n)


@dataclass
class Generator:
    """A shipped model under measurement.

    Image `draw` of prompt number k always begins from the same noise, in any batch.

    Args:
        call: replaces arguments of `CALLS[name]`.
        pipe: the pipeline to measure; None opens the shipped one in float32.
    """

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    pipe: Any = None
    batch_size: int = 64
    report: Report = silent
    images_made: int = 0

    def __post_init__(self) -> None:
        if self.pipe is None:
            self.pipe = load_pipeline(self.name, torch.float32)
        self.call = {**CALLS[self.name], **self.call}

    @torch.no_grad()
    def images(self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]) -> Tensor:
        """Images [n, 3, 64, 64] in [0, 1] of `prompts[k]` for the keys (k, draw)."""
        out = []
        for start in range(0, len(keys), self.batch_size):
            part = keys[start : start + self.batch_size]
            seeds = [np.random.SeedSequence([k, draw]).generate_state(1)[0] for k, draw in part]
            images = self.pipe(
                [prompts[k] for k, _ in part], **self.call, output_type="pt",
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
            ).images  # fmt: skip
            # A picture has 256 levels; the judge must not see more.
            out.append((images.float() * 255.0).round().div(255.0))
            self.images_made += len(part)
            self.report(self.name, start + len(part), len(keys))
        return torch.cat(out) if out else torch.empty(0, 3, 64, 64)


def generator(
    model: Generator, prompts: Sequence[str], judge: StickerJudge, images_per_prompt: int = 4
) -> tuple[Figures, list[list[bool]], Tensor]:
    """Shares of images judged right per tag, the verdicts [prompt][draw] and the first images.

    "frechet" is the distance to rendered scenes of the same prompts.
    """
    keys = [(k, draw) for draw in range(images_per_prompt) for k in range(len(prompts))]
    images = model.images(prompts, keys)
    verdicts = judge.judge(images, [prompts[k] for k, _ in keys])
    right = [v.correct for v in verdicts]
    tags = [parse(p)["tag"] for p in prompts]
    figures = by_tag([tags[k] for k, _ in keys], right)
    rendered = _render(prompts, images_per_prompt)
    figures["frechet"] = frechet(features(judge, images), features(judge, rendered))
    table = np.array(right).reshape(images_per_prompt, len(prompts)).T.tolist()
    return figures, table, images[: len(prompts)]


def oracle(
    model: Generator,
    prompts: Sequence[str],
    judge: StickerJudge,
    n: int = 64,
    known: Sequence[Sequence[bool]] = (),
) -> Figures:
    """Best of `n` by the judge, per tag, beside one image of each prompt.

    A prompt is drawn until an image is right, which cannot change the answer. `known` holds the
    verdicts of its first draws.
    """
    seen = [list(v)[:n] for v in known] or [[] for _ in prompts]
    while True:
        rounds = [
            (k, draw)
            for k, verdicts in enumerate(seen)
            if not any(verdicts)
            for draw in range(len(verdicts), min(n, len(verdicts) + ORACLE_DRAWS))
        ]
        if not rounds:
            break
        images = model.images(prompts, rounds)
        verdicts = judge.judge(images, [prompts[k] for k, _ in rounds])
        for (k, _), verdict in zip(rounds, verdicts, strict=True):
            seen[k].append(verdict.correct)
    tags = [parse(p)["tag"] for p in prompts]
    one, best = ([f(v) for v in seen] for f in (lambda v: v[0], any))
    return by_tag(tags, best) | {"one_image": by_tag(tags, one)["overall"]}


def _render(prompts: Sequence[str], copies: int) -> Tensor:
    from steering.stickers.train.data import to_tensor

    world = StickerWorld()
    return to_tensor(
        np.stack([
            world.render(parse(p), np.random.default_rng([_SCENE_SEED, k, c]))
            for c in range(copies)
            for k, p in enumerate(prompts)
        ])
    )  # fmt: skip


@torch.no_grad()
def features(judge: StickerJudge, images: Tensor) -> np.ndarray:
    """The detector's image features, mean over places: float64 [n, 128]."""
    out = [
        judge.detector(part * 2.0 - 1.0).encoder_last_hidden_state.mean(1)
        for part in images.split(judge.batch_size)
    ]
    return torch.cat(out).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to features [n, d] (Heusel et al., 2017)."""
    spread = [np.cov(x, rowvar=False) for x in (a, b)]
    # The eigenvalues of a product of covariances are real and not negative.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(spread[0] @ spread[1]).real, 0.0))
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(spread[0]) + np.trace(spread[1]) - 2.0 * roots.sum())
