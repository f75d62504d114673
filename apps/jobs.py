"""What the commands share: opening models once, splitting settings, progress and reports."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from steering.api import check_prompts, steer
from steering.errors import OptionError, unknown_name
from steering.loading import load
from steering.registry import METHODS
from steering.requests import Progress
from steering.result import Result
from steering.task import Task


@dataclass(kw_only=True)
class Job:
    """A model and what is judged, kept open over several runs."""

    model: str
    reward: Any
    heldout: list[str] = field(default_factory=list)
    dtype: str = "auto"
    device: str | None = None

    @functools.cached_property
    def pipe(self) -> Any:  # noqa: ANN401
        """The pipeline, opened on first use."""
        pipe = load(self.model, dtype=self.dtype, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def split(
        self,
        method: str,
        settings: list[str],
        n_particles: int | None = None,
        *,
        beside: Sequence[str] = (),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of the method, arguments of the pipeline call) from key=value settings.

        Options of the methods compared ``beside`` are left to those.
        """
        known = _options(method)
        all_known = known.union(*[_options(other) for other in beside])
        values = parse_settings(settings)
        self._check_names(values, all_known)
        options = {k: v for k, v in values.items() if k in known}
        call = {k: v for k, v in values.items() if k not in all_known}
        if n_particles is not None:
            size = next((name for name in ("n_particles", "n") if name in known), None)
            if size is None:
                raise OptionError(
                    f"--n-particles: {method} has no population. Its options, for --set: "
                    f"{', '.join(sorted(known))}."
                )
            options[size] = n_particles
        return options, call

    def _check_names(self, values: dict[str, Any], known: set[str]) -> None:
        if set(values) <= known:
            return
        call = set(inspect.signature(type(self.pipe).__call__).parameters) - {"self", "prompt"}
        for name in values:
            if name not in known | call:
                raise unknown_name("setting (of the method or the pipeline)", name, known | call)

    def steer(
        self,
        prompt: str,
        method: str,
        *,
        nfe: int | None,
        seed: int,
        out: Path | None,
        options: dict[str, Any],
        call: dict[str, Any],
    ) -> Result:
        """One run with a progress bar in network rows."""
        check_prompts(prompt)
        with tqdm(total=nfe, unit="nfe", desc=method, leave=False, disable=None) as bar:

            def listener(task: Task, progress: Progress) -> None:
                bar.update(task.ledger.nfe - bar.n)

            return steer(
                self.pipe,
                prompt,
                reward=self.reward,
                method=method,
                nfe=nfe,
                seed=seed,
                heldout=self.heldout or None,
                out=out,
                options=options,
                listener=listener,
                **call,
            )


def _options(method: str) -> set[str]:
    return {f.name for f in dataclasses.fields(METHODS.get(method.partition("/")[0]))}


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """key=value pairs; values are read as JSON where they are JSON, as text otherwise.

    Raises:
        OptionError: no key or no '='.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip().isidentifier():
            raise OptionError(f"--set {setting!r}: write key=value.")
        try:
            values[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            values[key.strip()] = text
    return values


def report(console: Console, result: Result, method: str) -> None:
    """A few lines about a finished run."""
    spent = result.ledger
    console.print(
        f"{method}: best reward {result.best_reward:.4f} of {len(result)} "
        f"({spent.nfe} nfe, {spent.reward_calls} reward calls, {spent.seconds:.1f} s)"
    )
    if result.cancelled:
        console.print("  Stopped early: this is the best so far.")
    for name, values in result.heldout.items():
        console.print(f"  held-out {name}: {float(values[0]):.4f}")
    sizes = result.trace.column("ess")
    if len(result) > 1 and sizes and min(sizes) > 0.9 * len(result):
        console.print(
            f"  The weights stayed nearly flat (effective sample size {min(sizes):.1f} of "
            f"{len(result)}), so nothing was steered: raise reward_scale."
        )
