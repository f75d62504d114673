"""GenEval workers as Ray actors, one per device.

The driver alone writes; workers stream their images back as they are finished. When a worker dies,
what it had not handed back counts as one failed try, is tried again elsewhere one image at a time
(so that a prompt that kills workers takes no other with it), and a new worker takes its place. A
worker gets work only when its model is open: what dies before that costs no prompt a try.
"""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steering.apps.geneval_run import WINDOW, Settings, Worker
from steering.apps.geneval_store import Job, Made
from steering.errors import OptionError, SteeringError

CHUNKS = 4  # per worker: enough to share the work evenly, few enough to fill batches
START = 300.0  # seconds that a worker may take to start; opening the model comes after
STARTS = 3  # workers in a row that could not open the model: no more until an image has come


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

    def pid(self) -> int:
        """The process it runs in."""
        return os.getpid()

    def ready(self) -> None:
        """Returns once the model is open."""
        self.open()

    def describe(self, first: Job | None) -> dict[str, Any]:
        """`Worker.describe`."""
        return self.open().describe(first)

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
        OptionError: Ray is not installed, or the cluster has no room for so many workers.
        SteeringError: the cluster cannot be reached.
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
            _join(ray, address)
        self.actors: list[Any] = []
        self._coming: dict[Any, tuple[Any, bool]] = {}  # sign -> (new worker, has it started?)
        self._failed: list[str] = []  # new workers' errors since the last image
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            count, self.share, self.threads = shares(nodes, settings.device, workers)
            self.count = count
            self.actors = [self._spawn() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> Any:  # noqa: ANN401
        return self.ray.remote(Actor).options(**self.share).remote(self.settings, self.threads)

    def describe(self, first: Job | None = None) -> dict[str, Any]:
        """What the workers' model says of itself; all of them must agree.

        Args:
            first: as for `Worker.describe`.

        Raises:
            SteeringError: a worker cannot open the model, or opened another one; or as there.
        """
        try:
            self._wait_for_start()
            found = self.ray.get([actor.describe.remote(first) for actor in self.actors])
        except self.ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self.ray.exceptions.RayActorError as error:
            raise SteeringError(f"A Ray worker died while opening the model: {error}") from error
        prints = {answer["model"]["fingerprint"] for answer in found}
        if len(prints) > 1:
            raise SteeringError(f"The workers opened different weights: {sorted(prints)}.")
        return found[0]

    def _wait_for_start(self) -> None:
        signs = [actor.pid.remote() for actor in self.actors]
        _, late = self.ray.wait(signs, num_returns=len(signs), timeout=START)
        if late:
            raise SteeringError(
                f"{len(late)} of {len(signs)} Ray workers have not started within {START:.0f} s: "
                "the cluster is busy. Ask for fewer --workers, or wait until it has room."
            )
        self.pids = self.ray.get(signs)

    def samples(self, jobs: list[Job]) -> Iterator[Made]:
        """The jobs' images as they are finished, and an error for each that its worker lost.

        Raises:
            SteeringError: every worker has died, and the cluster has no room for others, or they
                cannot open the model.
        """
        ray, queue = self.ray, deque(_chunks(jobs, self.count))
        new = [actor for actor, _ in self._coming.values()]
        idle, running = [actor for actor in self.actors if actor not in new], {}
        while queue or running:
            self._fill()
            while idle and queue:
                actor, chunk = idle.pop(), queue.popleft()
                stream = actor.samples.options(num_returns="streaming").remote(chunk)
                running[stream] = (actor, {job.key: job for job in chunk})
            stream = self._next(running)
            if stream in self._coming:
                idle += self._greet(stream)
                continue
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
                self.actors.remove(actor)
                words = f"worker died: {_words(error)}"
                yield from (Made(job=j, error=words, lost=True) for j in left.values())
            else:
                del left[made.job.key]
                self._failed.clear()
                yield made

    def _fill(self) -> None:
        """New workers for those that are gone."""
        while len(self.actors) < self.count and len(self._failed) < STARTS:
            fresh = self._spawn()
            self.actors.append(fresh)
            self._coming[fresh.pid.remote()] = fresh, False  # a lost node leaves no room for it

    def _next(self, running: Mapping[Any, Any]) -> Any:  # noqa: ANN401
        """A stream with an image or an end, or a sign of a new worker.

        Raises:
            SteeringError: there are none, nor will there be.
        """
        some = [*running, *self._coming]
        if not some:
            raise SteeringError(
                f"{len(self._failed)} new Ray workers in a row could not open the model, and no "
                f"other is left (last error: {self._failed[-1]}). All images made so far are "
                "kept, and no prompt was charged with it: go on with --resume."
            )
        opening = any(started for _, started in self._coming.values())
        limit = None if running or opening else START
        ready, _ = self.ray.wait(some, num_returns=1, timeout=limit)
        if not ready:
            raise SteeringError(f"No Ray worker is left, and none started in {START:.0f} s.")
        return ready[0]

    def _greet(self, sign: Any) -> list[Any]:  # noqa: ANN401
        """[the worker] whose sign this is, where it can be given work: its model is open."""
        actor, started = self._coming.pop(sign)
        try:
            self.ray.get(sign)
        except self.ray.exceptions.RayError as error:  # it died, or could not open the model
            self.ray.kill(actor)
            self.actors.remove(actor)
            self._failed.append(_words(error))
            return []
        if started:
            return [actor]
        self._coming[actor.ready.remote()] = actor, True
        return []

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


def shares(
    nodes: Sequence[Mapping[str, float]], device: str | None, workers: int | None
) -> tuple[int, dict[str, int], int | None]:
    """(workers, what each takes of a node, its threads) for nodes with these resources.

    Raises:
        OptionError: more workers than the nodes have room for, or a device they do not have.
    """
    kind, _, index = (device or "").partition(":")
    if index:
        raise OptionError(
            f"--device {device}: Ray gives every worker a GPU of its own. Give cuda, cpu, or "
            "nothing with --engine ray."
        )
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if kind == "cuda" and not gpus:
        raise OptionError("--device cuda: no node of the Ray cluster has a GPU.")
    on_gpu = gpus > 0 and kind != "cpu"
    room, things = (gpus, "GPUs") if on_gpu else (sum(cpus), "CPUs")
    count = (gpus if on_gpu else 1) if workers is None else workers
    if not 1 <= count <= room:
        raise OptionError(
            f"--workers {count}: the Ray cluster has {room} {things}, give 1 to {room}."
        )
    if on_gpu:
        return count, {"num_gpus": 1}, None
    fitting = [t for t in range(1, max(cpus) + 1) if sum(c // t for c in cpus) >= count]
    return count, {"num_cpus": fitting[-1]}, fitting[-1]


def _join(ray: Any, address: str | None) -> None:  # noqa: ANN401
    """Connects to a cluster, or starts one here.

    Raises:
        SteeringError: nobody answers at the address.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        if address in (None, "local"):  # by default its workers yield to all else on the machine
            os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise SteeringError(f"No Ray cluster at {address!r}: {error}") from error


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


def _words(error: Exception) -> str:
    """An error of Ray's in one line: the worker's own, or how it ended."""
    own = getattr(error, "cause", None)
    text = str(error) if own is None else f"{type(own).__name__}: {own}"
    return (text.strip().splitlines() or [type(error).__name__])[0]


def _cause(error: Any) -> BaseException:  # noqa: ANN401
    """The error that a worker raised on purpose, or one that shows what happened there."""
    cause = error.cause
    return (
        cause if isinstance(cause, SteeringError) else SteeringError(f"In a Ray worker: {error}")
    )
