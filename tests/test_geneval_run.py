"""GenEval runs: kill -9 and resume, one recipe a folder, quarantine, full disks, damage."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import steering
from steering.apps.geneval_folder import digest, look, prompts_hash
from steering.apps.geneval_run import Settings, Worker, make, run_json, seed_of
from steering.apps.geneval_score import score_folder
from steering.apps.geneval_store import Job, Journal, Made, Store
from steering.errors import OptionError, RecipeError, SteeringError
from steering.recipe import read
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.stickers import parse, prompts
from tests.command import run

FAST = {"num_inference_steps": 2, "guidance_scale": 1.0}
SETTINGS = Settings(method="best_of_n", options={"n": 2}, call=FAST, images_per_prompt=2, seed=5)
RECORDS = [parse(p) for p in prompts("heldout", n=553)][::100]  # one of each tag


@pytest.fixture(scope="module")
def pipe():
    return steering.load("stickers", dtype="float32")


@pytest.fixture(scope="module")
def scorer():
    return Scorer(Stickers(), StickerColors())


def start(folder, worker, *, settings=SETTINGS, records=RECORDS, **how):
    """Makes (or goes on with) a run in this process."""
    with Store(
        folder, run_json(settings, worker.describe(), records, "test"), records, **how
    ) as s:
        make(s, worker.samples, show=False)
    return s


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """(worker, folder of an undisturbed run, seconds it took)."""
    worker, folder = Worker(SETTINGS, pipe), tmp_path_factory.mktemp("whole") / "run"
    start(tmp_path_factory.mktemp("warm") / "run", worker, records=RECORDS[:1])
    began = time.perf_counter()
    start(folder, worker)
    return worker, folder, time.perf_counter() - began


def pixels(folder) -> dict[str, np.ndarray]:
    return {
        str(p.relative_to(folder)): np.asarray(Image.open(p), np.int16)
        for p in folder.glob("*/samples/*.png")
    }


def in_child(work) -> int:
    """A fork that runs ``work`` and leaves; the models are open, so it starts at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = work() or 0
        finally:
            os._exit(code)
    return pid


def recorded(folder) -> list[tuple[int, int]]:
    """Keys in the journal, every one with its whole image."""
    if not (folder / "samples.jsonl").is_file():
        return []
    keys = []
    for row in Journal(folder / "samples.jsonl").rows:
        assert digest(folder / row["file"]) == row["sha256"]
        keys.append((row["prompt"], row["image"]))
    return keys


def same_table(folder, other, scorer) -> None:
    """Equal verdicts, pixels within one level of 255."""
    tables = []
    for place in (folder, other):
        score_folder(place, scorer, again=True, show=False)
        rows = Journal(place / "results.jsonl").rows
        tables.append({(r["prompt_index"], r["image"]): (r["correct"], r["reason"]) for r in rows})
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2 * len(RECORDS)
    mine, theirs = pixels(folder), pixels(other)
    assert mine.keys() == theirs.keys()
    assert max(np.abs(mine[k] - theirs[k]).max() for k in mine) <= 1


def test_killed_at_random_moments_and_resumed_nothing_is_lost_or_made_twice(
    whole, scorer, tmp_path
):
    worker, undisturbed, seconds = whole
    rng, folder, seen = np.random.default_rng(0), tmp_path / "run", []
    for _ in range(5):
        child = in_child(lambda: start(folder, worker, resume=True) and 0)
        time.sleep(float(rng.uniform(0.02, 0.7 * seconds)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        keys = recorded(folder)
        assert len(keys) == len(set(keys))
        assert keys[: len(seen)] == seen  # what was there stays there
        seen = keys
    start(folder, worker, resume=True)
    keys = recorded(folder)
    assert keys[: len(seen)] == seen
    assert sorted(keys) == [(i, k) for i in range(len(RECORDS)) for k in range(2)]
    assert not list(folder.glob("**/.*.png"))
    same_table(folder, undisturbed, scorer)


def test_what_a_kill_can_leave_behind_is_cleared_up(whole, scorer, tmp_path):
    """A line cut off in the middle, pictures without a line, half a picture, a spoilt one."""
    worker, undisturbed, _ = whole
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:9]) + lines[9][:40])
    (folder / "00000/samples/.half.png").write_bytes(b"\x89PNG")
    spoilt = json.loads(lines[0])["file"]
    (folder / spoilt).write_bytes((folder / spoilt).read_bytes()[:-20])
    made = []
    with Store(
        folder, run_json(SETTINGS, worker.describe(), RECORDS, ""), RECORDS, resume=True
    ) as s:
        assert len(s.done) == 8
        make(s, lambda jobs: (made.append(m) or m for m in worker.samples(jobs)), show=False)
    assert len(made) == len(lines) - 9 + 1  # what was behind the cut, and the spoilt one
    assert not (folder / "00000/samples/.half.png").exists()
    same_table(folder, undisturbed, scorer)


def test_a_finished_run_is_not_made_again(whole):
    worker, folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/samples/*")}

    def never(jobs):
        raise AssertionError("work was asked for")

    with Store(
        folder, run_json(SETTINGS, worker.describe(), RECORDS, ""), RECORDS, resume=True
    ) as s:
        make(s, never, show=False)
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*/samples/*")}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 6}, "seed"),
        ({"nfe": 8}, "nfe"),
        ({"options": {"n": 3}}, "method"),
        ({"call": {**FAST, "num_inference_steps": 3}}, "call"),
        ({"reward": "brightness"}, "reward"),
        ({"images_per_prompt": 3}, "images_per_prompt"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(whole, pipe, change, word):
    _, folder, _ = whole
    other = replace(SETTINGS, **change)
    recipe = run_json(other, Worker(other, pipe).describe(), RECORDS, "")
    with pytest.raises(OptionError, match=f"holds another run.*{word}"):
        Store(folder, recipe, RECORDS, resume=True)
    with pytest.raises(OptionError, match="--resume"):
        Store(folder, recipe, RECORDS)


def test_other_prompts_weights_and_folders_are_refused(whole, tmp_path):
    worker, folder, _ = whole
    recipe = run_json(SETTINGS, worker.describe(), RECORDS, "")
    with pytest.raises(OptionError, match="prompts"):
        Store(folder, run_json(SETTINGS, worker.describe(), RECORDS[1:], ""), RECORDS, resume=True)
    swapped = {**recipe, "model": {**recipe["model"], "fingerprint": "0"}}
    with pytest.raises(OptionError, match="model"):
        Store(folder, swapped, RECORDS, resume=True)
    moved = {**recipe, "model": {**recipe["model"], "device": "cuda:3"}}
    Store(folder, moved, RECORDS, resume=True).close()  # the device does not make another run
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"notes\.txt"):
        Store(tmp_path, recipe, RECORDS)
    with (
        Store(folder, recipe, RECORDS, resume=True),
        pytest.raises(OptionError, match="another process"),
    ):
        Store(folder, recipe, RECORDS, resume=True)


def test_damaged_journals_and_recipes_are_named(whole, tmp_path):
    worker, folder, _ = whole
    recipe = run_json(SETTINGS, worker.describe(), RECORDS, "")
    shutil.copytree(folder, tmp_path / "a")
    lines = (tmp_path / "a/samples.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (tmp_path / "a/samples.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RecipeError, match="line 3"):
        Store(tmp_path / "a", recipe, RECORDS, resume=True)
    (tmp_path / "a/run.json").write_text("{}")
    with pytest.raises(RecipeError, match="not a run of this release"):
        Store(tmp_path / "a", recipe, RECORDS, resume=True)


def test_images_have_seeds_of_their_own_and_recipes_that_repeat_them(whole, tmp_path):
    worker, folder, _ = whole
    jobs = [Job(prompt=i, image=k, text="") for i in range(40) for k in range(4)]
    assert len({seed_of(0, j) for j in jobs} | {seed_of(1, j) for j in jobs}) == 320
    rows = Journal(folder / "samples.jsonl").rows
    row = next(r for r in rows if (r["prompt"], r["image"]) == (3, 1))
    recipe = read(folder / row["file"])
    assert recipe.prompts == [RECORDS[3]["prompt"]]
    assert recipe.seeds == [row["seed"]] == [seed_of(5, Job(prompt=3, image=1, text=""))]
    again = steering.replay(folder / row["file"], pipe=worker.pipe)
    assert again.difference <= 1
    assert float(again.result.rewards[0]) == pytest.approx(row["reward"], abs=1e-3)
    assert row["ledger"]["nfe"] == 4  # two samples of two steps


def test_company_does_not_change_an_image(whole):
    worker, folder, _ = whole
    alone = list(worker.samples([Job(prompt=5, image=1, text=RECORDS[5]["prompt"])]))
    (tmp := folder.parent / "alone.png").write_bytes(alone[0].png)
    both = [np.asarray(Image.open(p), np.int16) for p in (tmp, folder / "00005/samples/0001.png")]
    assert np.abs(both[0] - both[1]).max() <= 1


GUIDES = """
import torch
def picky(images, prompts):
    if any("{word}" in p for p in prompts):
        raise ValueError("cannot look at this")
    return images.mean((1, 2, 3))
def broken(images, prompts):
    raise ValueError("always")
"""


def test_a_poisoned_prompt_is_tried_twice_and_takes_nobody_with_it(pipe, tmp_path, monkeypatch):
    word = RECORDS[2]["include"][0]["class"]
    (tmp_path / "guides_local.py").write_text(GUIDES.replace("{word}", word))
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(SETTINGS, reward="python:guides_local:picky")
    worker, folder = Worker(settings, pipe), tmp_path / "run"
    bad = {i for i, r in enumerate(RECORDS) if word in r["prompt"]}
    store = start(folder, worker, settings=settings)
    assert set(store.quarantined()) == {(i, k) for i in bad for k in range(2)}
    assert {i for i, _ in store.done} == set(range(len(RECORDS))) - bad
    rows = Journal(folder / "samples.jsonl").rows
    assert sum("error" in r for r in rows) == 4 * len(bad)
    assert all("cannot look at this" in r["error"] for r in rows if "error" in r)
    assert set(look(folder).quarantined) == set(store.quarantined())
    start(folder, worker, settings=settings, resume=True)
    assert len(Journal(folder / "samples.jsonl").rows) == len(rows)  # given up for good ...
    sys.modules["guides_local"].picky = lambda images, prompts: images.mean((1, 2, 3))
    healed = Worker(settings, pipe)
    store = start(folder, healed, settings=settings, resume=True, retry=True)  # ... unless asked
    assert not store.quarantined()
    assert len(store.done) == 2 * len(RECORDS)


def test_a_run_in_which_everything_fails_stops(pipe, tmp_path, monkeypatch):
    (tmp_path / "guides_dead.py").write_text(GUIDES)
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(SETTINGS, reward="python:guides_dead:broken")
    with pytest.raises(SteeringError, match=r"first 8 images all failed.*always"):
        start(tmp_path / "run", Worker(settings, pipe), settings=settings)


def test_a_full_disk_loses_nothing(whole, scorer, tmp_path):
    """A file size limit stands in for the full disk: the kernel stops a write in the middle."""
    worker, undisturbed, _ = whole
    folder = tmp_path / "run"
    size = max(p.stat().st_size for p in undisturbed.glob("*/samples/*.png"))

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        try:
            start(folder, worker)
        except SteeringError as error:
            return 7 if "make room" in str(error) else 1
        return 0

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 7
    before = recorded(folder)
    start(folder, worker, resume=True)
    assert recorded(folder)[: len(before)] == before
    same_table(folder, undisturbed, scorer)


def test_a_journal_on_a_full_disk_keeps_whole_lines(tmp_path):
    path = tmp_path / "j.jsonl"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        journal = Journal(path)
        for k in range(100):
            try:
                journal.append([{"k": k, "text": "x" * 60}])
            except SteeringError:
                (tmp_path / "reached").write_text(str(k))
                return 7
        return 0

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 7
    reached = int((tmp_path / "reached").read_text())
    assert 5 < reached < 100
    assert [r["k"] for r in Journal(path).rows] == list(range(reached))
    assert path.read_bytes().endswith(b"}\n")


def test_a_second_result_for_one_image_is_not_counted(whole, tmp_path):
    worker, folder, _ = whole
    recipe = run_json(SETTINGS, worker.describe(), RECORDS, "")
    png = (folder / "00000/samples/0000.png").read_bytes()
    job = Job(prompt=0, image=0, text=RECORDS[0]["prompt"])
    with Store(tmp_path / "run", recipe, RECORDS) as store:
        store.add(Made(job=job, error="lost"))
        assert next(j for j in store.todo() if j.key == (0, 0)).tries == 1
        store.add(Made(job=job, png=png, line={"reward": 1.0}))
        store.add(Made(job=job, png=png, line={"reward": 2.0}))
        store.add(Made(job=job, error="too late"))
        assert len(store.journal.rows) == 2
        assert not store.quarantined()
        assert len(store.todo()) == 2 * len(RECORDS) - 1


def test_the_prompts_hash_sees_records_not_their_spelling():
    turned = [dict(reversed(list(r.items()))) for r in RECORDS]
    assert prompts_hash(turned) == prompts_hash(RECORDS)
    assert prompts_hash(RECORDS[::-1]) != prompts_hash(RECORDS)


def steer(capsys, *words: str) -> tuple[int, str, str]:
    code, out, err = run(capsys, *words)
    return code, out, " ".join(err.split())


def test_the_command_runs_scores_reports_and_resumes(capsys, tmp_path):
    words = ["geneval", "run", "--out", str(tmp_path / "r"), "--method", "unsteered", "--n", "6"]
    words += ["--images-per-prompt", "1", "--heldout", "brightness", "--json"]
    words += ["--set", "num_inference_steps=2", "--set", "guidance_scale=1.0"]
    code, out, _ = steer(capsys, *words)
    found = json.loads(out.strip().splitlines()[-1])["r"]
    assert code == 0
    assert found["run"]["prompts"]["n"] == 6
    assert found["tags_present"] == "6 of 6"
    assert found["cost"]["nfe"] == 2
    assert found["cost"]["reward_calls"] == 1
    assert 0 < found["heldout"]["brightness"]["value"] < 1
    assert found == json.loads((tmp_path / "r/card.json").read_text())
    code, _, err = steer(capsys, *words)
    assert (code, "--resume" in err) == (2, True)
    code, _, err = steer(capsys, *words, "--resume", "--seed", "1")
    assert (code, "another run" in err) == (2, True)
    code, out, _ = steer(capsys, *words, "--resume")
    assert code == 0
    assert json.loads(out.strip().splitlines()[-1])["r"]["scores"] == found["scores"]
    code, _, err = steer(capsys, "geneval", "score", str(tmp_path / "r"), "--heldout", "clip")
    assert (code, "guiding reward itself" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--prompts", "/nowhere.jsonl"], "no such prompts file"),
        (["--model", "some/model"], "--prompts FILE"),
        (["--n", "554"], "1 to 553"),
        (["--engine", "slurm"], "local or ray"),
        (["--images-per-prompt", "0"], "1 or more"),
        (["--method", "best_of_m"], "best_of_n"),
        (["--set", "num_inference_step=4"], "num_inference_steps"),
        (["--nfe", "3"], "nfe=3 is too small: one particle needs 40 here"),
    ],
)
def test_wrong_options_are_one_clear_error(capsys, tmp_path, words, hint):
    code, _, err = steer(capsys, "geneval", "run", "--out", str(tmp_path / "r"), *words)
    assert code == 2
    assert hint in err
    assert "Traceback" not in err
