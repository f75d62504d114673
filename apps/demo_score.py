"""Scoring uploads a few at a time, so that it can be cancelled and has no more time than a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from steering.apps import demo_actions as actions
from steering.apps.bench import same_calls
from steering.apps.demo_engine import Lane
from steering.apps.demo_order import Limits
from steering.apps.demo_session import Host
from steering.errors import OptionError
from steering.rewards.images import as_tensor, open_picture

Rows = list[dict[str, float]]
_AT_ONCE = 4
_PIXELS = 4 * 10**6
"""Pictures of one call, and their pixels together (48 MB of numbers); a larger one goes alone."""


def check_uploads(paths: Sequence[object], limits: Limits) -> list[Path]:
    """Uploaded pictures, few enough and not too large together.

    Raises:
        OptionError: too many files or pixels, or one of them is no picture.
    """
    if not 1 <= len(paths) <= limits.uploads:
        raise OptionError(f"Choose 1 to {limits.uploads} pictures, got {len(paths)}.")
    files: list[Path] = []
    pixels = 0
    for path in paths:
        files.append(actions.check_upload(path, limits))
        with Image.open(files[-1]) as image:
            pixels += image.width * image.height
        if pixels > limits.all_pixels:
            raise OptionError(
                f"The pictures have more than {limits.all_pixels / 1e6:g} million pixels "
                "together. Score fewer of them at once, or smaller ones."
            )
    return files


def score_chore(
    files: Sequence[Path], prompt: str, names: Sequence[str]
) -> Callable[[Lane], Generator[None, None, Rows]]:
    """What the worker does to score pictures, call by call: -> one row of numbers per file."""

    def run(lane: Lane) -> Generator[None, None, Rows]:
        rows: Rows = [{} for _ in files]
        sizes = [open_picture(file).size for file in files]
        for name in names:
            reward = lane.reward(name)
            for chosen in same_calls(sizes, reward, _few):
                yield
                images = as_tensor([open_picture(files[k]) for k in chosen])
                with torch.no_grad():
                    found = reward(images, [prompt] * len(chosen))
                for at, k in enumerate(chosen):
                    rows[k][name] = float(found.value[at])
        return rows

    return run


def _few(size: tuple[int, int]) -> int:
    """Pictures of this size in one call."""
    return max(1, min(_AT_ONCE, _PIXELS // (size[0] * size[1])))


async def score(
    host: Host, session: str, paths: Sequence[object], text: str, names: Sequence[str]
) -> list[dict[str, Any]]:
    """{"file", "scores"} of uploaded pictures.

    Raises:
        SteeringError: an upload, prompt or reward that is refused, a full queue, or why it ended
            before its end.
    """
    offer = host.offer
    files = await asyncio.to_thread(check_uploads, paths, offer.limits)  # they are decoded
    order = offer.order(
        text,
        model=offer.models[0],
        method="best_of_n",
        rewards=dict.fromkeys(names, 1.0),
        nfe=1,
    )
    chore = score_chore(files, order.prompts[0] or "", list(dict.fromkeys(names)))
    ticket = host.submit(session, order, chore=chore)
    async for _ in actions.follow(host, ticket):
        pass
    if ticket.state != "finished":
        raise OptionError(ticket.error)
    pairs = zip(files, ticket.answer, strict=True)
    return [{"file": file.name, "scores": scores} for file, scores in pairs]
