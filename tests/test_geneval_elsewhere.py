"""GenEval folders that others have written to, and runs over other lists of prompts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from steering.apps.geneval_page import write_page
from steering.apps.geneval_report import card, open_scored, paired, warnings
from steering.apps.geneval_score import score_folder
from steering.apps.geneval_store import Journal
from steering.errors import OptionError, RecipeError
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.stickers import StickerWorld, parse, prompts
from tests.command import run

RECORDS = [parse(p) for p in prompts("heldout", n=553)][::110]  # six, of several tags
# A line as the published scorer writes it
PUBLISHED = {
    "filename": "00000/samples/0000.png", "tag": "single_object", "prompt": "a photo of a dog",
    "correct": True, "reason": "", "metadata": "{}", "details": "{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def scorer():
    return Scorer(Stickers(), StickerColors())


def draw(folder: Path, records: list[dict], *, seed: int = 0) -> Path:
    """One rendered image for each record, in the official layout."""
    for i, record in enumerate(records):
        place = folder / f"{i:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(json.dumps(record))
        Image.fromarray(StickerWorld().render(record, seed + i)).save(place / "0000.png")
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory, scorer):
    folder = draw(tmp_path_factory.mktemp("elsewhere") / "f", RECORDS)
    score_folder(folder, scorer, show=False)
    return folder


@pytest.fixture
def folder(judged, tmp_path):
    """A scored folder of its own for a test."""
    return shutil.copytree(judged, tmp_path / "f")


def steer(capsys, *words: str) -> tuple[int, str]:
    code, _, err = run(capsys, "geneval", *words)
    return code, " ".join(err.split())


class Unused:
    """A detector that must not be asked."""

    def __getattr__(self, name):
        return getattr(Stickers(), name)

    def detect(self, *_, **__):
        raise AssertionError("an image was looked at")


@pytest.mark.parametrize("prompt", [None, "", 7])
def test_a_record_without_a_prompt_is_told_before_an_image_is_looked_at(tmp_path, prompt):
    folder = draw(tmp_path / "f", RECORDS[:2])
    record = {k: v for k, v in RECORDS[1].items() if k != "prompt"}
    record |= {} if prompt is None else {"prompt": prompt}
    (folder / "00001/metadata.jsonl").write_text(json.dumps(record))
    with pytest.raises(OptionError, match=r"00001/metadata\.jsonl, line 1: .* no prompt"):
        score_folder(folder, Scorer(Unused(), StickerColors()), show=False)


def test_results_of_another_scorer_are_not_thrown_away(capsys, tmp_path):
    folder = draw(tmp_path / "f", RECORDS[:2])
    before = json.dumps(PUBLISHED) + "\n"
    (folder / "results.jsonl").write_text(before)
    words = ["score", str(folder), "--detector", "stickers"]
    code, err = steer(capsys, *words)
    assert (code, "Move it away" in err, "--again" in err) == (2, True, True), err
    assert (folder / "results.jsonl").read_text() == before
    assert not (folder / "scoring.json").exists()
    assert steer(capsys, *words, "--again")[0] == 0  # the way out
    assert len(open_scored(folder).rows) == 2


def test_results_that_another_scorer_wrote_over_ours_are_named(folder, scorer):
    (folder / "results.jsonl").write_text(json.dumps(PUBLISHED) + "\n")
    for use in (lambda: score_folder(folder, scorer, show=False), lambda: open_scored(folder)):
        with pytest.raises(RecipeError, match=r"results\.jsonl, line 1: not a verdict .*--again"):
            use()
    assert len(Journal(folder / "results.jsonl").rows) == 1


@pytest.mark.parametrize("text", ['{"detector": {"na', "", "[]", '{"detector": 3}', "\xff"])
def test_a_damaged_scoring_json_is_named_with_the_way_out(capsys, folder, text):
    (folder / "scoring.json").write_bytes(text.encode("latin-1"))
    words = ["score", str(folder), "--detector", "stickers"]
    for command in (words, ["report", str(folder)]):
        code, err = steer(capsys, *command)
        found = ("scoring.json: damaged" in err, "score --again" in err, "Traceback" in err)
        assert (code, found) == (2, (True, True, False)), err
    assert steer(capsys, *words, "--again")[0] == 0
    assert steer(capsys, "report", str(folder))[0] == 0


def test_a_picture_replaced_after_the_scoring_does_not_count(folder, scorer):
    before = card(open_scored(folder))
    assert before["images"]["stale_verdicts"] == 0
    Image.new("RGB", (64, 64), "grey").save(folder / "00000/samples/0000.png")
    found = card(open_scored(folder))
    assert (found["images"]["scored"], found["images"]["stale_verdicts"]) == (len(RECORDS) - 1, 1)
    assert any("1 verdicts are of images that were replaced" in w for w in warnings(found))
    assert score_folder(folder, scorer, show=False).new == 1
    found = card(open_scored(folder))
    assert (found["images"]["scored"], found["images"]["stale_verdicts"]) == (len(RECORDS), 0)
    assert found["scores"]["micro"]["value"] < before["scores"]["micro"]["value"] == 1


def test_runs_over_other_lists_are_paired_by_prompt(capsys, judged, scorer, tmp_path):
    """The other run has every second prompt, one of them twice, under other numbers."""
    other = [*RECORDS[4::-2], RECORDS[0], {**RECORDS[1], "prompt": "a photo of <b>"}]
    folder = draw(tmp_path / "other", other, seed=50)
    Image.new("RGB", (64, 64), "grey").save(folder / "00002/samples/0000.png")
    score_folder(folder, scorer, show=False)
    runs = [open_scored(judged), open_scored(folder)]
    found = paired(*runs)
    assert found["prompts"] == 3
    assert found["micro"]["value"] == pytest.approx(-1 / 3)  # of prompts 0, 2 and 4 the first
    page = write_page([(r, card(r)) for r in runs], tmp_path / "p.html").read_text()
    blocks = re.findall(r"<div class='prompt'.*?(?=<div class='prompt'|<script)", page)
    pictures = {}
    for block in blocks:
        prompt, numbers = re.search(r"<b>(.*?)</b> <small>([\d /]+),", block).groups()
        links = re.findall(r"<img [^>]*src='([^']*)'", block)
        differ = re.search(r"data-differ='(\d)'", block)[1]
        pictures[prompt, numbers] = ([Path(x).parts[-4:-2] for x in links], differ)
    mine, theirs = judged.name, folder.name
    expected = {
        (RECORDS[0]["prompt"], "0 / 2"): ([(mine, "00000"), (theirs, "00002")], "1"),
        (RECORDS[2]["prompt"], "2 / 1"): ([(mine, "00002"), (theirs, "00001")], "0"),
        (RECORDS[4]["prompt"], "4 / 0"): ([(mine, "00004"), (theirs, "00000")], "0"),
        (RECORDS[0]["prompt"], "3"): ([(theirs, "00003")], "0"),
        ("a photo of &lt;b&gt;", "4"): ([(theirs, "00004")], "0"),
    }
    expected |= {(RECORDS[i]["prompt"], str(i)): ([(mine, f"{i:05d}")], "0") for i in (1, 3, 5)}
    assert pictures == expected
    caution = f"{mine} and {theirs} have 3 prompts in common, of 6 and 5"
    assert caution in page
    assert caution in steer(capsys, "report", str(judged), str(folder))[1]
    assert "in common" not in steer(capsys, "report", str(judged), str(judged))[1]
