"""GenEval workers as Ray actors, one per device.

The driver alone writes; workers stream their images back as they are finished. When a worker dies,
what it had not handed back counts as one failed try, is tried again elsewhere one image at a time
(so that a prompt that kills workers takes no other with it), and a new worker takes its place.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from steering.apps.geneval_run import WINDOW, Settings, Worker
from steering.apps.geneval_store import Job, Made
from steering.errors import OptionError, SteeringError

CHUNKS = 4  # per worker: enough to share the work evenly, few enough to fill batches


class Actor:
    """A worker that opens its model on first use, so that its errors reach the caller."""

    def __init__(self, settings: Settings, threads: int | None) -> None:
        self.settings, self.threads = settings, threads
        self.worker: Worker | None = None

    def open(self) -> Worker:
        """The worker, opened."""
        if self.worker is None:
            if self.threads is not None:
                import torch

                torch.set_num_threads(self.threads)
            self.worker = Worker(self.settings)
        return self.worker

    def describe(self, first: Job | None) -> dict[str, Any]:
        """`Worker.describe`, with the process it runs in."""
        return {**self.open().describe(first), "pid": os.getpid()}

    def samples(self, jobs: list[Job]) -> Iterator[Made]:
        """`Worker.samples`."""
        yield from self.open().samples(jobs)


class Cluster:
    """Ray workers that make images.

    Args:
        settings: what to run.
        address: of a running cluster; None starts one on this machine (or joins the one that this
            process has started).
        workers: how many; by default one per GPU of the cluster, or one.

    Raises:
        OptionError: Ray is not installed.
        SteeringError: the cluster cannot be reached, or the settings cannot be used.
    """

    def __init__(
        self, settings: Settings, *, address: str | None = None, workers: int | None = None
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        try:
            import ray
        except ImportError:
            raise OptionError(
                "--engine ray needs Ray: pip install 'diffusion-steering[cluster]'."
            ) from None
        self.ray, self.settings = ray, settings
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise SteeringError(f"No Ray cluster at {address!r}: {error}") from error
        resources = ray.cluster_resources()
        self.gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = workers or self.gpus or 1
        self.threads = None if self.gpus else max(1, cpus // count)
        self.actors = [self._spawn() for _ in range(count)]

    def _spawn(self) -> Any:  # noqa: ANN401
        share = {"num_gpus": 1} if self.gpus else {"num_cpus": self.threads}
        return self.ray.remote(Actor).options(**share).remote(self.settings, self.threads)

    def describe(self, first: Job | None = None) -> dict[str, Any]:
        """What the workers' model says of itself; all of them must agree.

        Args:
            first: as for `Worker.describe`.

        Raises:
            SteeringError: a worker cannot open the model, or opened another one; or as there.
        """
        try:
            found = self.ray.get([actor.describe.remote(first) for actor in self.actors])
        except self.ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self.ray.exceptions.RayActorError as error:
            raise SteeringError(f"A Ray worker died while opening the model: {error}") from error
        self.pids = [answer.pop("pid") for answer in found]
        prints = {answer["model"]["fingerprint"] for answer in found}
        if len(prints) > 1:
            raise SteeringError(f"The workers opened different weights: {sorted(prints)}.")
        return found[0]

    def samples(self, jobs: list[Job]) -> Iterator[Made]:
        """The jobs' images as they are finished, and an error for each that its worker lost."""
        ray, queue = self.ray, deque(_chunks(jobs, len(self.actors)))
        idle, running = list(self.actors), {}
        while queue or running:
            while idle and queue:
                actor, chunk = idle.pop(), queue.popleft()
                stream = actor.samples.options(num_returns="streaming").remote(chunk)
                running[stream] = (actor, {job.key: job for job in chunk})
            ready, _ = ray.wait(list(running), num_returns=1)
            stream = ready[0]
            actor, left = running[stream]
            try:
                made = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except ray.exceptions.RayError as error:  # the actor or its node is gone
                del running[stream]
                self.actors[self.actors.index(actor)] = fresh = self._spawn()
                idle.append(fresh)
                words = str(error).strip().splitlines()[0]
                yield from (Made(job=j, error=f"worker died: {words}") for j in left.values())
            else:
                del left[made.job.key]
                yield made

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        for actor in self.actors:
            self.ray.kill(actor)
        if self._mine:
            self.ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chunks(jobs: list[Job], workers: int) -> list[list[Job]]:
    """Jobs in parts of whole prompts; what has failed before goes alone."""
    again = [[job] for job in jobs if job.tries]
    first = [job for job in jobs if not job.tries]
    prompts = list(dict.fromkeys(job.prompt for job in first))
    size = min(WINDOW, max(1, math.ceil(len(prompts) / (workers * CHUNKS))))
    parts = []
    for start in range(0, len(prompts), size):
        some = set(prompts[start : start + size])
        parts.append([job for job in first if job.prompt in some])
    return parts + again


def _cause(error: Any) -> BaseException:  # noqa: ANN401
    """The error that a worker raised on purpose, or one that shows what happened there."""
    cause = error.cause
    return (
        cause if isinstance(cause, SteeringError) else SteeringError(f"In a Ray worker: {error}")
    )
