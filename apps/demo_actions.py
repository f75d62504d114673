"""What can be done in the demo, for the page and the API alike: steer, compare, replay, score."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shlex
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from steering.apps.demo_order import Limits, Offer, Order
from steering.apps.demo_queue import Outcome, Ticket
from steering.apps.demo_recipes import differences
from steering.apps.demo_session import Host
from steering.apps.demo_views import data_uri, file_bytes
from steering.errors import OptionError, RecipeError, SteeringError
from steering.ledger import Budget
from steering.loading import call_defaults
from steering.method import plain
from steering.recipe import Recipe, read
from steering.registry import METHODS
from steering.result import finite

_POLL = 0.15
_FORMATS = ("PNG", "JPEG", "WEBP")


async def follow(host: Host, *tickets: Ticket) -> AsyncIterator[list[dict[str, Any]]]:
    """Snapshots of runs whenever one has changed, the last when all are over."""
    seen: list[tuple[str, int, int]] = []
    while True:
        over = all(t.over for t in tickets)
        for ticket in tickets:
            ticket.watched = time.monotonic()
        now = [(t.state, t.live.version, host.ahead(t)) for t in tickets]
        if now != seen or over:
            seen = now
            yield [t.live.snapshot() for t in tickets]
        if over:
            return
        await asyncio.sleep(_POLL)


def baseline(order: Order, nfe: int) -> Order:
    """Best-of-N for as many network rows, of as many samples as the server takes at most.

    Its sample 0 is the unsteered one of the same seed.
    """
    budget, options = Budget(nfe=max(1, nfe), seconds=order.budget.seconds), {"select": "all"}
    return replace(order, method="best_of_n", options=options, budget=budget, trimmed=True)


def first_sample(outcome: Outcome) -> int:
    """Where a baseline keeps its sample of slot 0, the unsteered one."""
    return outcome.summary["slots"].index(0)


def estimate(host: Host, order: Order, runs: int = 1) -> dict[str, Any]:
    """Seconds that runs of an order are expected to take, and how much is before them."""
    pace, (running, waiting) = host.pace(order), host.load
    seconds = None if pace is None else round(pace * (order.budget.nfe or 0) * runs, 1)
    return {"nfe": order.budget.nfe, "seconds": seconds, "running": running, "waiting": waiting}


def summary(ticket: Ticket) -> dict[str, Any]:
    """A run as JSON: numbers, the trace, and its pictures as data URIs."""
    data: dict[str, Any] = {
        "run": ticket.number,
        "state": ticket.state,
        "error": ticket.error,
        "company": ticket.company,
        "seconds": round(ticket.seconds, 3),
        "results": [],
    }
    for outcome in ticket.results:
        pictures = [b for b in map(file_bytes, outcome.files) if b is not None]
        data["results"].append(
            {
                **outcome.summary,
                "trace": outcome.events,
                "recipe": outcome.recipe,
                "pictures": [data_uri(b) for b in pictures],
            }
        )
    return unlike_files(data)


def unlike_files(value: Any) -> Any:  # noqa: ANN401
    """JSON values that no client takes for a file: gradio's does so with any {"path": text}.

    Such an object (rbf has an option of that name) becomes a list of [name, value].
    """
    return _pairs(finite(value))


def _pairs(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        inside = {k: _pairs(v) for k, v in value.items()}
        return list(map(list, inside.items())) if isinstance(value.get("path"), str) else inside
    return [_pairs(v) for v in value] if isinstance(value, list) else value


def progress(ticket: Ticket, shown: Mapping[str, Any], ahead: int) -> dict[str, Any]:
    """Where a run stands, as JSON."""
    best = shown["best"]
    return {
        "run": ticket.number,
        "state": ticket.state,
        "ahead": ahead,
        "nfe": shown["nfe"],
        "budget": shown["budget"],
        "best_reward": None if best is None else finite(best.reward),
        "checkpoints": len(shown["checkpoints"]),
    }


def as_python(recipe: Mapping[str, Any]) -> str:
    """The run as Python code."""
    options, call = _own_options(recipe), _own_call(recipe)
    lines = ["import steering", "", f"pipe = steering.load({recipe['model']['source']!r})"]
    prompts, seeds = recipe["prompts"], recipe["seeds"]
    one = len(prompts) == 1
    arguments = {
        "reward": recipe["reward"],
        "method": recipe["method"]["name"],
        "options": options or None,
        "nfe": recipe["budget"]["nfe"],
        "seed": seeds[0] if one else seeds,
        "heldout": recipe["heldout"] or None,
        **call,
    }
    lines += ["result = steering.steer(", "    pipe,", f"    {prompts[0] if one else prompts!r},"]
    if one:
        lines[-1] = f"    {prompts[0]!r},"
    lines += [f"    {k}={v!r}," for k, v in arguments.items() if v is not None]
    return "\n".join([*lines, ")", 'result.save("out")' if one else ""]).rstrip()


def as_command(recipe: Mapping[str, Any]) -> str:
    """The run as a `steer generate` command."""
    words = ["steer", "generate", str(recipe["prompts"][0])]
    words += ["--model", str(recipe["model"]["source"]), "--method", recipe["method"]["name"]]
    words += ["--reward", str(recipe["reward"])]
    for spec in recipe["heldout"]:
        words += ["--heldout", str(spec)]
    words += ["--nfe", str(recipe["budget"]["nfe"]), "--seed", str(recipe["seeds"][0])]
    for name, value in {**_own_options(recipe), **_own_call(recipe)}.items():
        words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join([*words, "--out", "out"])


def _own_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not the method's defaults."""
    cls, method = METHODS.get(recipe["method"]["name"]), recipe["method"]
    defaults = {f.name: plain(f.default) for f in dataclasses.fields(cls)}
    return {k: v for k, v in method["options"].items() if v != defaults.get(k)}


def _own_call(recipe: Mapping[str, Any]) -> dict[str, Any]:
    defaults = call_defaults(recipe["model"]["source"])
    return {k: v for k, v in recipe["call"].items() if v != defaults.get(k)}


def check_upload(path: object, limits: Limits) -> Path:
    """An uploaded picture, judged by what it holds and not by its name.

    Raises:
        OptionError: no file, too large, or no picture of a kind that is read.
    """
    if not isinstance(path, str | Path):
        raise OptionError("Choose a file first.")
    file = Path(path)
    if not file.is_file():
        raise OptionError("The file is gone; upload it again.")
    if file.stat().st_size > limits.upload_bytes:
        raise OptionError(
            f"{file.name} has {file.stat().st_size / 2**20:.1f} MiB; at most "
            f"{limits.upload_bytes / 2**20:g} MiB are taken."
        )
    try:
        with Image.open(file, formats=_FORMATS) as image:
            wide, high = image.size
            if wide * high > limits.upload_pixels:
                raise OptionError(f"{file.name} has {wide} x {high} pixels, which is too many.")
            image.load()
    except OptionError:
        raise
    except Image.DecompressionBombError:
        raise OptionError(f"{file.name} has more pixels than are taken.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise OptionError(
            f"{file.name} is no picture: it holds no readable {', '.join(_FORMATS)} data."
        ) from error
    return file


def replay_order(path: object, offer: Offer) -> tuple[Path, Recipe, Order]:
    """An uploaded PNG, its recipe, and the order that repeats it.

    Raises:
        OptionError, RecipeError: no picture, no recipe, or one that cannot be repeated here.
    """
    file = check_upload(path, offer.limits)
    try:
        recipe = read(file)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(file), file.name)) from None
    if recipe.image >= offer.limits.particles:
        raise RecipeError(f"{file.name}: damaged recipe, picture {recipe.image}.")
    return file, recipe, offer.repeat(recipe)


def verdict(file: Path, recipe: Recipe, ticket: Ticket) -> tuple[bool, str]:
    """(whether every pixel is equal, the words for it) of a finished repeat."""
    again = ticket.results[recipe.prompt].files
    if recipe.image >= len(again):
        raise RecipeError(f"{file.name}: picture {recipe.image} of {len(again)}.")
    with Image.open(file) as one, Image.open(again[recipe.image]) as two:
        old = np.asarray(one.convert("RGB"), dtype=np.int16)
        new = np.asarray(two.convert("RGB"), dtype=np.int16)
    difference = int(np.abs(old - new).max()) if old.shape == new.shape else 255
    if difference == 0:
        return True, "Identical: every pixel is the same."
    return False, f"Different: by up to {difference} of 255. {_why(recipe, ticket)}"


def _why(recipe: Recipe, ticket: Ticket) -> str:
    """What may have made a repeat differ. An edit is named only where all else was the same."""
    reasons = differences(recipe, ticket.results[recipe.prompt].recipe)
    if ticket.company or recipe.engine.get("company"):
        reasons.insert(0, "other runs shared its batches")
    if not reasons:
        return "The pixels were edited, or other hardware made it."
    return f"That need not be an edit, as rounding depends on: {', '.join(reasons)}."


def compare(
    host: Host, session: str, prompt: str, methods: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Ticket]:
    """Runs of several methods with best-of-N first; all of them are checked before any starts.

    Raises:
        SteeringError: as ``Offer.order`` and ``Host.submit``.
    """
    names = list(dict.fromkeys(methods))
    if not names or len(names) > host.offer.limits.methods:
        raise OptionError(f"Choose 1 to {host.offer.limits.methods} methods, got {len(names)}.")
    orders = {n: host.offer.order(prompt, method=n, **given) for n in names if n != "best_of_n"}
    plain_order = host.offer.order(prompt, method="best_of_n", **given)
    orders = {"best_of_n": baseline(plain_order, plain_order.budget.nfe or 1), **orders}
    tickets: dict[str, Ticket] = {}
    try:
        for name, order in orders.items():
            tickets[name] = host.submit(session, order, pictures=256 if name == "best_of_n" else 8)
    except SteeringError:
        for ticket in tickets.values():
            ticket.cancel.set()
        raise
    return tickets
