"""Makes the images of a GenEval run: a worker for one device, and the loop that keeps its results.

Prompts stream through the continuous-batching engine in windows; each image is kept as soon as its
method has ended. Every image has a run, a budget and a seed of its own, named by the run's seed,
the prompt's index and the image's, so neither company nor order nor restarts change it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import PngImagePlugin
from tqdm import tqdm

from steering.api import plan_run
from steering.apps.geneval_folder import FORMAT, VERSION, prompts_hash
from steering.apps.geneval_store import Job, Made, Store
from steering.engine import Engine
from steering.errors import OptionError, SteeringError
from steering.finish import Finisher
from steering.ledger import Budget
from steering.loading import call_defaults, describe, load, source_of
from steering.method import build_method, method_options
from steering.recipe import CHUNK, package_versions
from steering.result import Result, finite
from steering.scoring import Reward, resolve_reward
from steering.stickers.grammar import Metadata
from steering.task import Task

WINDOW = 64  # prompts that share one wrapped pipeline
HOPELESS = 8  # this many failures and no success: the run is wrong, not a prompt


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run for every image.

    Attributes:
        model, dtype, device: as for `steering.load`.
        method, options: the method and its options; ``call``: of the pipeline call.
        reward: spec of the guiding reward; ``heldout``: verifiers for the scoring.
        nfe: network rows of one image, None for what the method takes.
        max_batch: most rows of one network call.
    """

    model: str = "stickers"
    dtype: str = "auto"
    device: str | None = None
    method: str = "best_of_n"
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    reward: str = "clip"
    heldout: tuple[str, ...] = ()
    nfe: int | None = None
    images_per_prompt: int = 4
    seed: int = 0
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise OptionError(
                f"images_per_prompt must be 1 or more, got {self.images_per_prompt}."
            )


def seed_of(seed: int, job: Job) -> int:
    """The seed of one image."""
    name = f"geneval/{seed}/{job.prompt}/{job.image}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")


class Worker:
    """A model, a method and a reward on one device.

    Args:
        settings: what to run.
        pipe: an open pipeline, instead of the one that the settings name.

    Raises:
        SteeringError: model, method, reward or budget that cannot be used.
    """

    def __init__(self, settings: Settings, pipe: Any = None) -> None:  # noqa: ANN401
        self.settings = settings
        self.method = build_method(settings.method, settings.options)
        if pipe is None:
            pipe = load(settings.model, dtype=settings.dtype, device=settings.device)
            pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.call = {**call_defaults(source_of(pipe)), **settings.call}

    def describe(self, first: Job | None = None) -> dict[str, Any]:
        """The parts of run.json that only the opened model knows.

        Args:
            first: a job that is planned, so that what cannot be run is refused before any work.

        Raises:
            SteeringError: model, method, reward and budget do not fit together.
        """
        if first is not None:
            self._opened([first])[0].close()
        return {"model": describe(self.pipe), "call": self.call}

    def samples(self, jobs: Iterable[Job]) -> Iterator[Made]:
        """The jobs' images in the order in which they are finished."""
        for window in _windows(list(jobs)):
            yield from self._window(window)

    def _window(self, jobs: list[Job]) -> Iterator[Made]:
        try:
            model, engine, owners = self._opened(jobs)
        except Exception as error:  # one text that cannot be encoded must not stop the others
            yield from self._apart(jobs, error)
            return
        try:
            for task in engine.stream(list(owners)):
                finish = Finisher(model, [task], [], engine)
                yield _made(owners.pop(task), task, finish)
                task.outcome = task.run = None  # its pictures would stay for the whole window
            if owners:
                raise KeyboardInterrupt  # which the engine takes as a wish to stop
        finally:
            model.close()

    def _apart(self, jobs: list[Job], error: Exception) -> Iterator[Made]:
        """The jobs of a window that could not be opened, prompt by prompt."""
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        if len(prompts) == 1:
            words = f"{type(error).__name__}: {error}"
            yield from (Made(job=job, error=words) for job in jobs)
            return
        for prompt in prompts:
            yield from self._window([job for job in jobs if job.prompt == prompt])

    def _opened(self, jobs: list[Job]) -> tuple[Any, Engine, dict[Task, Job]]:
        """(the model wrapped for the jobs' prompts, its engine, the runs)."""
        from steering.pipelines import wrap

        lanes = {p: i for i, p in enumerate(dict.fromkeys(job.prompt for job in jobs))}
        texts = [next(j.text for j in jobs if j.prompt == p) for p in lanes]
        model = wrap(self.pipe, prompt=texts, **self.call)
        try:
            reward = resolve_reward(self.settings.reward, model)
            limit = self.settings.max_batch or getattr(model, "max_batch", None) or 64
            engine = Engine(model, max_batch=limit)
            return model, engine, self._tasks(model, reward, lanes, jobs)
        except BaseException:
            model.close()
            raise

    def _tasks(
        self,
        model: Any,  # noqa: ANN401
        reward: Reward,
        lanes: dict[int, int],
        jobs: list[Job],
    ) -> dict[Task, Job]:
        method, plan = plan_run(model, self.method, reward, Budget(nfe=self.settings.nfe))
        tasks = {}
        for job in jobs:
            # index 0: every picture's recipe names its own prompt alone, and so can be replayed
            task = Task(
                index=0, prompt=job.text, cond=lanes[job.prompt], method=method, plan=plan,
                seed=seed_of(self.settings.seed, job), reward=reward, metadata=job.record,
            )  # fmt: skip
            tasks[task] = job
        return tasks


def _windows(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs of at most WINDOW prompts at a time."""
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    for start in range(0, len(prompts), WINDOW):
        some = set(prompts[start : start + WINDOW])
        yield [job for job in jobs if job.prompt in some]


def _made(job: Job, task: Task, finish: Finisher) -> Made:
    """The best picture of an ended task."""
    if task.error is not None:
        return Made(job=job, error=f"{type(task.error).__name__}: {task.error}")
    result = finish.all()[0]
    if result is None or not result.pictures():
        return Made(job=job, error="The run ended without a picture.")
    line = {
        "seed": task.seed,
        "reward": result.best_reward,
        "candidates": len(result),
        "ledger": result.ledger.to_json(),
    }
    return Made(job=job, png=_png(result), line=finite(line))


def _png(result: Result) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(result.recipe.to_json()), zip=True)
    buffer = io.BytesIO()
    result.pictures()[0].save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def run_json(
    settings: Settings, opened: dict[str, Any], records: list[Metadata], source: str
) -> dict[str, Any]:
    """The recipe of a run.

    Args:
        opened: `Worker.describe`.
        source: where the prompts came from.
    """
    method = build_method(settings.method, settings.options)
    return {
        "format": FORMAT,
        "version": VERSION,
        **opened,
        "method": {"name": settings.method, "options": method_options(method)},
        "reward": settings.reward,
        "heldout": list(settings.heldout),
        "nfe": settings.nfe,
        "images_per_prompt": settings.images_per_prompt,
        "seed": settings.seed,
        "prompts": {"source": source, "n": len(records), "sha256": prompts_hash(records)},
        "prompt_rewriting": None,
        "picked": "the best reward of each run",
        "max_batch": settings.max_batch,
        "versions": package_versions(),
    }


def make(
    store: Store,
    source: Callable[[list[Job]], Iterator[Made]],
    *,
    show: bool = True,
) -> None:
    """Makes what the store lacks; a failed image is tried once more, then given up.

    Args:
        source: gives results for jobs: `Worker.samples`, or a cluster's.
        show: a bar with the time left, on terminals.

    Raises:
        SteeringError: the first 8 images all failed; what a worker lost beside others is no
            failure.
    """
    total = len(store.records) * store.images
    good = bool(store.done)
    failed = 0
    bar = tqdm(
        total=total, initial=len(store.done), unit="image", desc="geneval",
        disable=None if show else True,
    )  # fmt: skip
    with bar:
        while jobs := store.todo():
            for made in source(jobs):  # a result or an error for each: this ends
                store.add(made)
                good |= not made.error
                # a job that has failed is tried alone: only then is a worker's death its own
                failed += bool(made.error) and not (made.lost and made.job.tries == 0)
                bar.update(0 if made.error else 1)
                if not good and failed >= min(HOPELESS, total):
                    raise SteeringError(
                        f"The first {failed} images all failed; nothing is wrong with the "
                        f"prompts, but with the run. Last error: {made.error}"
                    )
