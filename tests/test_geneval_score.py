"""Scoring a GenEval folder: rewards that compare, missing prompts, full disks, oracles."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from steering.apps.geneval_folder import look
from steering.apps.geneval_judges import is_oracle
from steering.apps.geneval_page import write_page
from steering.apps.geneval_report import card, open_scored, write_card
from steering.apps.geneval_score import read_image, score_folder
from steering.apps.geneval_store import Journal, Made, Store, job_of, locked
from steering.errors import OptionError, SteeringError
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.scoring import Scores, resolve_reward
from steering.stickers import StickerWorld, parse, prompts
from tests.command import run

RECORDS = [parse(p) for p in prompts("heldout", n=553)][::140]
IMAGES = 11  # a prompt: what is scored at once (32) would cut one


@pytest.fixture(scope="module")
def scorer():
    return Scorer(Stickers(), StickerColors())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Images of four prompts in the official layout."""
    folder, world = tmp_path_factory.mktemp("drawn") / "f", StickerWorld()
    for i, record in enumerate(RECORDS):
        place = folder / f"{i:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(json.dumps(record))
        for k in range(IMAGES):
            Image.fromarray(world.render(record, 10 * i + k)).save(place / f"{k:04d}.png")
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def heldout(folder: Path, name: str) -> dict[tuple[int, int], float]:
    rows = Journal(folder / "results.jsonl").rows
    return {(r["prompt_index"], r["image"]): r["heldout"][name] for r in rows}


class Relative:
    """Brightness above the mean of the call, whatever the prompts are."""

    name, spec, differentiable, stationary = "relative", None, False, False

    def __call__(self, images, prompts, *, metadata=None):
        value = images.mean((1, 2, 3))
        return Scores(value - value.mean())


@pytest.mark.parametrize("spec", ["rank(brightness,jpeg)", Relative()])
def test_rewards_that_compare_see_the_images_of_one_prompt(scorer, drawn, tmp_path, spec):
    """In one go, and again after images of one prompt have been made anew."""
    folder, reward = copy(drawn, tmp_path / "f"), resolve_reward(spec)

    def by_hand(prompt: int) -> list[float]:
        files = sorted((folder / f"{prompt:05d}/samples").glob("*.png"))
        images = torch.stack([read_image(p) for p in files])
        return reward(images, [RECORDS[prompt]["prompt"]] * len(files)).value.tolist()

    score_folder(folder, scorer, heldout=[reward], show=False)
    for again in (False, True):
        if again:
            last = folder / f"00002/samples/{IMAGES - 1:04d}.png"
            shutil.copy(folder / "00001/samples/0000.png", last)
            done = score_folder(folder, scorer, heldout=[reward], show=False)
            assert (done.new, done.known) == (IMAGES, 3 * IMAGES)
        found = heldout(folder, reward.name)
        for i in range(len(RECORDS)):
            mine = [found[i, k] for k in range(IMAGES)]
            assert mine == pytest.approx(by_hand(i), abs=1e-5), (again, i)


def test_prompts_that_are_missing_are_noticed(capsys, scorer, drawn, tmp_path):
    folder = copy(drawn, tmp_path / "f")
    shutil.rmtree(folder / "00001")
    (folder / "00003").rename(tmp_path / "last")
    assert look(folder).missing == [f"00001/samples/{k:04d}.png" for k in range(IMAGES)]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    words = ["geneval", "score", str(folder), "--detector", "stickers", "--prompts", str(file)]
    code, _, err = run(capsys, *words)
    assert (code, f"{2 * IMAGES} missing: 00001" in err) == (1, True)
    images = card(open_scored(folder))["images"]  # a report knows it too, and a second scoring
    assert len(images["missing"]) == 2 * IMAGES
    assert run(capsys, *words[:-2], "--json")[0] == 1
    (tmp_path / "last").rename(folder / "00003")
    shutil.copytree(drawn / "00001", folder / "00001")
    assert run(capsys, *words)[0] == 0
    assert not card(open_scored(folder))["images"]["missing"]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*RECORDS[:2], *RECORDS[:2]]))
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "2 of 4 folders are not of the prompts file (first: 00002" in " ".join(err.split())


def test_two_scorings_at_once_are_refused(scorer, drawn, tmp_path):
    folder = copy(drawn, tmp_path / "f")
    lock = locked(folder)
    with pytest.raises(OptionError, match="another process"):
        score_folder(folder, scorer, show=False)
    assert not (folder / "results.jsonl").exists()
    lock.release()
    score_folder(folder, scorer, show=False)
    score_folder(folder, scorer, show=False)  # it lets go at the end


M2F = "facebook/mask2former-swin-small-coco-instance"


@pytest.mark.parametrize(
    ("guide", "judge", "source", "oracle"),
    [
        ("detector", "stickers", "stickers", True),
        ("clip + 0.5*detector", "stickers", "stickers", True),
        ("detector", "mask2former", M2F, False),
        ("clip", "stickers", "stickers", False),
        (f"count(model={M2F})", "mask2former", M2F, True),
        (f"rank(clip,presence(model={M2F}))", "mask2former", M2F, True),
        (f"count(model={M2F}-other)", "mask2former", M2F, False),
        ("count", "mask2former", M2F, False),
        ("count(model={tmp})", "detr (detr)", "{tmp}/../{name}", True),
        ("python:guides_of_mine:count", "mask2former", "", False),
        ("", "mask2former", "", False),
    ],
)
def test_a_guide_with_the_judges_weights_is_an_oracle(tmp_path, guide, judge, source, oracle):
    guide, source = (w.format(tmp=tmp_path, name=tmp_path.name) for w in (guide, source))
    scoring = {"detector": {"name": judge, "source": source}}
    assert is_oracle({"reward": guide}, scoring) is oracle


def limited(work) -> int:
    """The exit code of a fork that cannot write: 7 where the error is the right one."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            work()
            code = 0
        except SteeringError as error:
            code = 7 if "make room" in str(error) else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_full_disk_is_one_clear_error_everywhere(scorer, drawn, tmp_path):
    folder = copy(drawn, tmp_path / "f")
    assert limited(lambda: score_folder(folder, scorer, show=False)) == 7
    score_folder(folder, scorer, show=False)
    scored = open_scored(folder)
    assert limited(lambda: write_card(scored)) == 7
    assert limited(lambda: write_page([(scored, card(scored))], tmp_path / "p.html")) == 7
    assert not (tmp_path / "p.html").exists()


def test_a_place_for_an_image_that_cannot_be_made_is_the_same_error(tmp_path):
    recipe = {"images_per_prompt": 1, "heldout": []}
    with Store(tmp_path / "r", recipe, RECORDS) as store:
        (tmp_path / "r/00000").write_text("a file in the way")
        with pytest.raises(SteeringError, match="make room"):
            store.add(Made(job=job_of(RECORDS[0], 0, 0), png=b"png"))
