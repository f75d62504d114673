"""Ray workers: equal to the local engine, one killed in mid-run, a prompt that kills workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from steering.apps import cluster as clusters
from steering.apps.cluster import Cluster, _chunks, shares
from steering.apps.geneval_folder import look
from steering.apps.geneval_run import Settings, Worker, make, run_json
from steering.apps.geneval_score import score_folder
from steering.apps.geneval_store import Job, Journal, Made, Store
from steering.errors import OptionError, SteeringError
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.stickers import parse, prompts

RECORDS = [parse(p) for p in prompts("heldout", n=553)][::70]
DEADLY = RECORDS[4]["include"][0]["class"]
GUIDE = f"""
import os, signal
def deadly(images, prompts):
    if os.environ.get("STEERING_TEST_WORKER") and any({DEADLY!r} in p for p in prompts):
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
"""
SETTINGS = Settings(
    method="best_of_n", options={"n": 2}, reward="python:guides_deadly:deadly", dtype="float32",
    call={"num_inference_steps": 2, "guidance_scale": 1.0}, images_per_prompt=1, seed=2,
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def test_work_is_shared_in_whole_prompts_and_failures_go_alone():
    jobs = [Job(prompt=i, image=k, text="") for i in range(10) for k in range(3)]
    parts = _chunks(jobs, 2)
    assert [j for part in parts for j in part] == jobs
    assert len(parts) >= 4
    for part in parts:
        assert all(sum(j.prompt == p for j in part) == 3 for p in {j.prompt for j in part})
    lost = [replace(jobs[4], tries=1), replace(jobs[5], tries=1)]
    assert _chunks([*jobs[:3], *lost], 2) == [jobs[:3], lost[:1], lost[1:]]
    assert len(_chunks([Job(prompt=i, image=0, text="") for i in range(5000)], 1)[0]) == 64


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install .*cluster"):
        Cluster(SETTINGS)


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "found"),
    [
        ([{"CPU": 8}], None, None, (1, {"num_cpus": 8}, 8)),
        ([{"CPU": 8}], None, 3, (3, {"num_cpus": 2}, 2)),
        ([{"CPU": 4}, {"CPU": 2}], None, 2, (2, {"num_cpus": 2}, 2)),  # 6 // 2 = 3 fits once only
        ([{"CPU": 2}, {"CPU": 2}], None, 1, (1, {"num_cpus": 2}, 2)),  # no node has four
        ([{"CPU": 1}] * 3, None, 3, (3, {"num_cpus": 1}, 1)),
        ([{"CPU": 0}, {"CPU": 8, "GPU": 2}], None, None, (2, {"num_gpus": 1}, None)),
        ([{"CPU": 8, "GPU": 2}], "cuda", 1, (1, {"num_gpus": 1}, None)),
        ([{"CPU": 8, "GPU": 2}], "cpu", 4, (4, {"num_cpus": 2}, 2)),
        ([{"CPU": 2}], None, 3, "2 CPUs"),
        ([{"CPU": 8, "GPU": 2}], None, 3, "2 GPUs"),
        ([{"CPU": 8}], None, 0, "give 1 to 8"),
        ([{"CPU": 8}], "cuda", None, "no node"),
        ([{"CPU": 8, "GPU": 2}], "cuda:1", None, "GPU of its own"),
    ],
)
def test_workers_fit_on_the_nodes_or_are_refused(nodes, device, workers, found):
    if isinstance(found, str):
        with pytest.raises(OptionError, match=found):
            shares(nodes, device, workers)
    else:
        assert shares(nodes, device, workers) == found


@pytest.fixture(scope="module")
def cluster_here(tmp_path_factory):
    """A Ray of two CPUs; a folder that its workers import from."""
    ray = pytest.importorskip("ray")
    base = tmp_path_factory.mktemp("ray")
    (base / "guides_deadly.py").write_text(GUIDE)
    sys.path.insert(0, str(base))
    try:
        os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves them
        env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{base}", "STEERING_TEST_WORKER": "1"}
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False,
            object_store_memory=100_000_000, runtime_env={"env_vars": env},
        )  # fmt: skip
        yield base
    finally:
        sys.path.remove(str(base))
        ray.shutdown()


@pytest.fixture(scope="module")
def runs(cluster_here):
    """(folder of the local engine, folder of two Ray workers of which some are killed, pids)."""
    base = cluster_here
    local = Worker(SETTINGS)
    with Store(base / "local", _recipe(local.describe()), RECORDS) as store:
        make(store, local.samples, show=False)
    with Cluster(SETTINGS, workers=2) as cluster:
        opened = cluster.describe()
        with Store(base / "ray", _recipe(opened), RECORDS) as store:
            make(store, cluster.samples, show=False)
    return base / "local", base / "ray", cluster.pids


def poisoned(base: Path, deadly: set[int], starts: list[str] | None = None) -> type:
    """An actor that prompts kill, once what it had made before has arrived (a file in ``base``).

    Args:
        starts: how the opening of the model ends in new workers, one after the other: "opens",
            "dies" or "raises".
    """

    class Poisoned:
        def __init__(self, settings, threads) -> None:
            pass

        def pid(self) -> int:
            return os.getpid()

        def ready(self) -> None:
            if starts is None:
                return
            with (base / "starts").open("ab") as file:
                file.write(b"x")
                how = starts[file.tell() - 1]
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise MemoryError("no room for the model")

        def samples(self, jobs):
            for k, job in enumerate(jobs):
                if job.prompt in deadly:
                    end = time.monotonic() + 60
                    before = base / f"{jobs[k - 1].prompt} arrived"
                    while k and not before.exists() and time.monotonic() < end:
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield Made(job=job, png=b"made")

    return Poisoned


def told(cluster: Cluster, base: Path, rounds: list[list[Made]]):
    """The cluster's results as `make` asks for them, noted down by round."""

    def source(jobs):
        rounds.append([])
        for made in cluster.samples(jobs):
            rounds[-1].append(made)
            (base / f"{made.job.prompt} arrived").touch()
            yield made

    return source


class Bounded(Cluster):
    """Gives up where workers are replaced without end."""

    spawned = 0

    def _spawn(self):
        self.spawned += 1
        assert self.spawned <= 5, "a sixth worker"
        return super()._spawn()


def test_a_death_counts_as_a_try_of_what_had_not_been_handed_back(
    cluster_here, tmp_path, monkeypatch
):
    deadly = 3  # made in one go with 2: eight prompts are parted into pairs
    monkeypatch.setattr(clusters, "Actor", poisoned(tmp_path, {deadly}))
    recipe = _recipe({"model": {"fingerprint": "none"}, "call": {}})
    rounds: list[list[Made]] = []
    with (
        Bounded(SimpleNamespace(device=None), workers=1) as cluster,
        Store(tmp_path / "run", recipe, RECORDS) as store,
    ):
        make(store, told(cluster, tmp_path, rounds), show=False)
        lost = store.quarantined()
    first, *again = [[(m.job.prompt, bool(m.error)) for m in found] for found in rounds]
    assert sorted(first) == [(i, i == deadly) for i in range(len(RECORDS))]  # one answer each
    assert again == [[(deadly, True)]]
    assert set(lost) == {(deadly, 0)}
    assert cluster.spawned == 2  # one for each try
    assert [m.lost for found in rounds for m in found if m.error] == [True] * 2


def test_workers_that_cannot_open_the_model_cost_no_prompt_a_try(
    cluster_here, tmp_path, monkeypatch
):
    """One that cannot is replaced; two in a row with no image between are the end of the run."""
    monkeypatch.setattr(clusters, "STARTS", 2)
    starts = ["dies", "opens", "dies", "raises"]
    monkeypatch.setattr(clusters, "Actor", poisoned(tmp_path, {1, 5}, starts))
    recipe = _recipe({"model": {"fingerprint": "none"}, "call": {}})
    rounds: list[list[Made]] = []
    with (
        Bounded(SimpleNamespace(device=None), workers=1) as cluster,
        Store(tmp_path / "run", recipe, RECORDS) as store,
    ):
        with pytest.raises(SteeringError, match=r"^2 new Ray workers in a row .*--resume") as end:
            make(store, told(cluster, tmp_path, rounds), show=False)
        assert {j.prompt: j.tries for j in store.todo()} == {1: 1, 5: 1, 6: 0, 7: 0}
    assert "last error: MemoryError: no room for the model" in str(end.value)
    assert cluster.spawned == 1 + len(starts)
    assert [len(found) for found in rounds] == [6]


def _recipe(opened: dict) -> dict:
    return run_json(SETTINGS, opened, RECORDS, "test")


def test_a_worker_killed_in_mid_run_loses_nothing_and_repeats_nothing(runs):
    _, folder, pids = runs
    assert len(set(pids)) == 2
    rows = Journal(folder / "samples.jsonl").rows
    made = [(r["prompt"], r["image"]) for r in rows if "error" not in r]
    deadly = {i for i, r in enumerate(RECORDS) if DEADLY in r["prompt"]}
    expected = {(i, 0) for i in range(len(RECORDS)) if i not in deadly}
    assert len(made) == len(set(made))
    assert set(made) == expected
    lost = [r for r in rows if "error" in r]
    assert all(r["error"].startswith("worker died") for r in lost)
    assert len(lost) >= 2 * len(deadly)  # and what was in flight beside the deadly prompt


def test_a_prompt_that_kills_workers_is_quarantined_after_two_tries(runs):
    _, folder, _ = runs
    found = look(folder)
    deadly = {i for i, r in enumerate(RECORDS) if DEADLY in r["prompt"]}
    assert set(found.quarantined) == {(i, 0) for i in deadly}
    rows = Journal(folder / "samples.jsonl").rows
    for key in found.quarantined:
        assert sum((r["prompt"], r["image"]) == key for r in rows) == 2
    assert len(found.missing) == len(deadly)


def test_verdicts_equal_the_local_engines(runs):
    local, folder, _ = runs
    scorer, tables = Scorer(Stickers(), StickerColors()), []
    for place in (local, folder):
        score_folder(place, scorer, show=False)
        rows = Journal(place / "results.jsonl").rows
        tables.append({(r["prompt_index"], r["image"]): (r["correct"], r["reason"]) for r in rows})
    deadly = sum(DEADLY in r["prompt"] for r in RECORDS)
    assert len(tables[1]) == len(RECORDS) - deadly > 4
    assert {k: v for k, v in tables[0].items() if k in tables[1]} == tables[1]
    seeds = [
        {(r["prompt"], r["image"]): r.get("seed") for r in Journal(p / "samples.jsonl").rows}
        for p in (local, folder)
    ]
    for sample in look(folder).samples:
        key = (sample.prompt, sample.image)
        assert seeds[0][key] == sample.line["seed"]
        mine = np.asarray(Image.open(sample.path), np.int16)
        theirs = np.asarray(Image.open(local / sample.line["file"]), np.int16)
        assert np.abs(mine - theirs).max() <= 1


def test_a_cluster_without_room_says_so(runs, monkeypatch):
    with pytest.raises(OptionError, match="2 CPUs"):
        Cluster(SETTINGS, workers=3)
    monkeypatch.setattr(clusters, "START", 2.0)
    with (
        Cluster(SETTINGS, workers=1),  # takes both
        Cluster(SETTINGS, workers=2) as late,
        pytest.raises(SteeringError, match="2 of 2 Ray workers have not started within 2 s"),
    ):
        late.describe()
