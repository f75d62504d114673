"""GenEval runs: what cannot end well is refused before the first image."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import steering
from steering.apps.geneval_folder import look
from steering.apps.geneval_run import Settings, Worker, make, run_json
from steering.apps.geneval_store import Job, Journal, Made, Store
from steering.errors import OptionError, RewardError, SteeringError
from steering.stickers import parse, prompts
from tests.command import run

FAST = {"num_inference_steps": 2, "guidance_scale": 1.0}
SETTINGS = Settings(method="best_of_n", options={"n": 1}, call=FAST, images_per_prompt=1, seed=5)
RECORDS = [parse(p) for p in prompts("heldout", n=553)][::100]  # one of each tag
FIRST = Job(prompt=0, image=0, text=RECORDS[0]["prompt"])


@pytest.fixture(scope="module")
def pipe():
    return steering.load("stickers", dtype="float32")


def steer(capsys, *words: str) -> tuple[int, str, str]:
    code, out, err = run(capsys, "geneval", *words)
    return code, out, " ".join(err.split())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "fk", "reward": "rank(clip,brightness)"}, OptionError, "changes with the ot"),
        ({"method": "dno", "reward": "detector"}, RewardError, "gradient"),
    ],
)
def test_a_method_and_a_reward_that_do_not_fit_are_refused_as_by_steer(pipe, change, error, words):
    settings = replace(SETTINGS, options={}, **change)
    with pytest.raises(error, match=words):
        Worker(settings, pipe).describe(FIRST)
    with pytest.raises(error, match=words):
        steering.steer(pipe, RECORDS[0]["prompt"], method=settings.method, reward=settings.reward)


def test_a_refused_run_leaves_no_folder_behind(capsys, tmp_path):
    words = ["run", "--out", str(tmp_path / "r"), "--method", "fk", "--n", "1", "--no-score"]
    code, _, err = steer(capsys, *words, "--reward", "rank(clip,brightness)")
    assert (code, "changes with the other samples" in err) == (2, True)
    assert not (tmp_path / "r").exists()


def test_a_prompt_that_cannot_be_opened_takes_nobody_with_it(pipe, tmp_path):
    records = [*RECORDS[:3], {**RECORDS[3], "prompt": "anything else"}, *RECORDS[4:]]
    worker = Worker(replace(SETTINGS, reward="detector"), pipe)  # which knows the grammar only
    recipe = run_json(worker.settings, worker.describe(FIRST), records, "test")
    with Store(tmp_path / "run", recipe, records) as store:
        make(store, worker.samples, show=False)
    assert {i for i, _ in store.done} == set(range(len(records))) - {3}
    assert set(store.quarantined()) == {(3, 0)}
    rows = Journal(tmp_path / "run/samples.jsonl").rows
    assert sum("anything else" in r.get("error", "") for r in rows) == 2


def test_one_failure_is_not_called_two(pipe, tmp_path):
    recipe = run_json(SETTINGS, Worker(SETTINGS, pipe).describe(), RECORDS, "test")
    with Store(tmp_path / "run", recipe, RECORDS) as store:
        store.add(Made(job=FIRST, error="lost"))
        assert look(tmp_path / "run").quarantined == store.quarantined() == {}
        store.add(Made(job=FIRST, error="lost again"))
        assert look(tmp_path / "run").quarantined == store.quarantined() == {(0, 0): "lost again"}


def store_of(folder):
    """A new run of four images a prompt, for sources that make no pictures."""
    settings = replace(SETTINGS, images_per_prompt=4)
    recipe = run_json(settings, {"model": {"fingerprint": "none"}, "call": {}}, RECORDS, "test")
    return Store(folder, recipe, RECORDS)


def test_a_worker_that_dies_before_the_first_image_ends_no_run(tmp_path):
    """One prompt kills it, and more jobs are lost beside than may fail: they go on, alone."""

    def source(jobs):
        assert len(jobs) > 8 or any(job.tries for job in jobs)
        for k, job in enumerate(jobs):
            dead = job.prompt == 0 if job.tries else k < 16
            yield Made(job=job, error="worker died: it was killed" if dead else "", lost=dead)

    with store_of(tmp_path / "run") as store:
        make(store, source, show=False)
        assert set(store.quarantined()) == {(0, k) for k in range(4)}
        assert len(store.done) == 4 * (len(RECORDS) - 1)


def test_where_every_image_kills_its_worker_the_run_stops(tmp_path):
    def source(jobs):
        yield from (Made(job=job, error="worker died: it was killed", lost=True) for job in jobs)

    words = r"first 8 images all failed.*worker died"
    with store_of(tmp_path / "run") as store, pytest.raises(SteeringError, match=words):
        make(store, source, show=False)
    assert len(store.quarantined()) == 8  # of 24, all of which were lost once


STRANGE = {"tag": "single_object", "include": [{"class": "unicorn", "count": 1}]}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--heldout", "clap"], "Unknown reward 'clap'"),
        (["--heldout", "clip(scale=100)"], "guiding reward itself"),
        (["--detector", "yolo"], "Unknown detector"),
        (["--detector", "mask2former=/nowhere"], "hf download"),
        (["--colors", "paint"], "Unknown colour model"),
        (["--prompts", "{strange}"], "does not know unicorn"),
    ],
    ids=["unknown", "guide", "detector", "weights", "colors", "classes"],
)
def test_what_cannot_score_the_images_is_told_before_the_first(capsys, tmp_path, words, hint):
    (tmp_path / "p.jsonl").write_text(json.dumps({**STRANGE, "prompt": "a photo of a unicorn"}))
    words = [w.format(strange=tmp_path / "p.jsonl") for w in words]
    given = ["run", "--out", str(tmp_path / "r"), "--method", "unsteered", "--n", "1", *words]
    code, _, err = steer(capsys, *given)
    assert (code, hint in err) == (2, True), err
    assert not (tmp_path / "r").exists()


def test_a_run_with_a_bad_heldout_goes_on_with_a_better_one(capsys, tmp_path):
    words = ["run", "--out", str(tmp_path / "r"), "--method", "unsteered", "--n", "1", "--json"]
    words += ["--images-per-prompt", "1", "--set", "num_inference_steps=1"]
    assert steer(capsys, *words, "--heldout", "clap", "--no-score")[0] == 0
    before = (tmp_path / "r/samples.jsonl").read_text()
    code, _, err = steer(capsys, *words, "--resume")  # the folder's own is still the bad one
    assert (code, "Unknown reward 'clap'" in err) == (2, True)
    code, out, _ = steer(capsys, *words, "--resume", "--heldout", "brightness")
    assert code == 0
    assert list(json.loads(out.strip().splitlines()[-1])["r"]["heldout"]) == ["brightness"]
    assert json.loads((tmp_path / "r/run.json").read_text())["heldout"] == ["brightness"]
    assert (tmp_path / "r/samples.jsonl").read_text() == before
    code, _, err = steer(capsys, *words, "--resume", "--heldout", "jpeg")
    assert (code, "scored with another heldout" in err) == (2, True)
