"""Reports: shares by hand, intervals against their law, cards, pages, folders made elsewhere."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steering.apps.geneval_folder import look
from steering.apps.geneval_judges import adapted
from steering.apps.geneval_page import bars, scatter, write_page
from steering.apps.geneval_report import (
    Bootstrap,
    card,
    interval,
    open_scored,
    paired,
    warnings,
    write_card,
)
from steering.apps.geneval_score import score_folder
from steering.apps.geneval_store import Journal
from steering.errors import OptionError, RecipeError, SteeringError
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.scoring import Scores, resolve_reward
from steering.stickers import TAGS, StickerWorld, parse, prompts
from tests.command import run

SOME = [parse(p) for p in prompts("heldout", n=553)][::46]  # 13 prompts, all tags
WRONG = [parse(p) for p in prompts("heldout", n=553, seed=9)][::46]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(Stickers(), StickerColors())


def draw_folder(folder: Path, right: list[list[bool]], records=SOME) -> Path:
    """Images in the official layout, drawn to be right or wrong for their prompts."""
    world = StickerWorld()
    for i, (record, flags) in enumerate(zip(records, right, strict=True)):
        place = folder / f"{i:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(json.dumps(record))
        for k, flag in enumerate(flags):
            shown = (
                record
                if flag
                else next(
                    w for w in WRONG if w["include"][0]["class"] != record["include"][0]["class"]
                )
            )
            Image.fromarray(world.render(shown, 10 * i + k)).save(place / f"{k:04d}.png")
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory, scorer):
    """Three images a prompt, of which prompt i has i % 4 right, and another folder with more."""
    base, out = tmp_path_factory.mktemp("scored"), []
    for name, count in (("few", lambda i: i % 4), ("many", lambda i: min(3, i % 4 + 1))):
        right = [[k < count(i) for k in range(3)] for i in range(len(SOME))]
        folder = draw_folder(base / name, right)
        score_folder(
            folder, scorer, heldout=[resolve_reward("brightness")],
            embed=lambda x: x.flatten(1)[:, :64], embed_name="pixels", show=False,
        )  # fmt: skip
        out.append(folder)
    return out


def test_shares_are_those_of_the_drawn_scenes(scored):
    found = card(open_scored(scored[0]))
    right = {tag: [] for tag in TAGS}
    for i, record in enumerate(SOME):
        right[record["tag"]].append(i % 4)
    assert found["tags_present"] == "6 of 6"
    for tag, counts in right.items():
        mine = found["scores"]["tags"][tag]
        assert mine["value"] == pytest.approx(sum(counts) / (3 * len(counts)))
        assert mine["any_of_n"]["value"] == pytest.approx(np.mean([c > 0 for c in counts]))
        assert (mine["prompts"], mine["images"]) == (len(counts), 3 * len(counts))
        assert mine["low"] <= mine["value"] <= mine["high"]
    each = [sum(c) / (3 * len(c)) for c in right.values()]
    everything = [c for counts in right.values() for c in counts]
    assert found["scores"]["macro"]["value"] == pytest.approx(np.mean(each))
    assert found["scores"]["micro"]["value"] == pytest.approx(sum(everything) / (3 * len(SOME)))
    assert found["scores"]["any_of_n"]["value"] == pytest.approx(
        np.mean([c > 0 for c in everything])
    )
    # tags of unequal size: here the two means differ, as they do in papers
    assert abs(found["scores"]["macro"]["value"] - found["scores"]["micro"]["value"]) > 1e-3


def test_paired_differences_are_tighter_than_two_intervals(scored):
    few, many = (open_scored(f) for f in scored)
    found = paired(few, many)
    gain = np.mean([(min(3, i % 4 + 1) - i % 4) / 3 for i in range(len(SOME))])
    assert found["micro"]["value"] == pytest.approx(gain)
    assert found["prompts"] == len(SOME)
    assert found["micro"]["low"] > 0
    width = found["micro"]["high"] - found["micro"]["low"]
    alone = card(few)["scores"]["micro"]
    assert width < 0.7 * (alone["high"] - alone["low"])
    back = paired(many, few)
    assert back["macro"]["value"] == pytest.approx(-found["macro"]["value"])


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Binary prompts with known shares: 95 % intervals of micro and macro, 300 worlds."""
    rng = np.random.default_rng(0)
    tags = [t for t, n in zip(TAGS, (40, 50, 40, 47, 50, 50), strict=True) for _ in range(n)]
    truth = dict(zip(TAGS, (0.9, 0.6, 0.5, 0.7, 0.2, 0.3), strict=True))
    p = np.array([truth[t] for t in tags])
    boot, one = Bootstrap(tags, resamples=400), np.ones(len(tags))
    hits, average = np.zeros(2), np.mean(list(truth.values()))
    for _ in range(300):
        drawn = (rng.random(len(tags)) < p).astype(float)
        both = (boot.micro(drawn, one), p.mean()), (boot.macro(drawn, one), average)
        for k, (values, true) in enumerate(both):
            found = interval(values)
            hits[k] += found["low"] <= true <= found["high"]
    error = np.sqrt(0.95 * 0.05 / 300)
    assert np.all(np.abs(hits / 300 - 0.95) < 5 * error)


def test_prompts_are_resampled_not_images():
    """Four equal images of a prompt say no more than one: the interval must not shrink."""
    rng = np.random.default_rng(1)
    tags, right = ["colors"] * 60, (rng.random(60) < 0.5).astype(float)
    boot = Bootstrap(tags)
    one = interval(boot.micro(right, np.ones(60)))
    four = interval(boot.micro(4 * right, 4 * np.ones(60)))
    assert one == pytest.approx(four)
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(60), rel=0.15)


def test_diversity_and_heldout_are_those_of_the_lines(scored):
    run = open_scored(scored[0])
    found = card(run)
    by_prompt = []
    for i in run.prompts:
        vectors = [
            np.frombuffer(base64.b64decode(r["embedding"]), "<f2").astype(float)
            for r in run.images[i]
        ]
        unit = [v / np.linalg.norm(v) for v in vectors]
        pairs = [1 - unit[a] @ unit[b] for a in range(3) for b in range(a)]
        by_prompt.append(np.mean(pairs))
    assert found["diversity"]["value"] == pytest.approx(np.mean(by_prompt), abs=1e-4)
    assert found["diversity"]["space"] == "pixels"
    bright = [r["heldout"]["brightness"] for r in run.rows.values()]
    assert found["heldout"]["brightness"]["value"] == pytest.approx(np.mean(bright))
    assert found["cost"] is None
    assert found["run"] is None


def test_the_card_holds_what_it_takes_to_repeat_it(scored):
    path, found = write_card(open_scored(scored[0]))
    assert json.loads(path.read_text()) == found
    scoring = found["scoring"]
    assert scoring["detector"]["fingerprint"]
    assert scoring["rules"]["threshold"] == 0.5
    assert scoring["colors"]["name"] == "stickers"
    assert "torch" in scoring["versions"]
    assert found["benchmark"] == "GenEval (stickers)"


def test_results_have_the_published_columns(scored):
    rows = Journal(scored[0] / "results.jsonl").rows
    assert len(rows) == 3 * len(SOME)
    first = rows[0]
    assert list(first)[:7] == [
        "filename", "tag", "prompt", "correct", "reason", "metadata", "details",
    ]  # fmt: skip
    assert json.loads(first["metadata"]) == SOME[0]
    assert first["filename"] == "00000/samples/0000.png"
    assert first["correct"] is False
    assert first["reason"]


def test_scoring_again_does_nothing_and_new_images_are_added(scored, scorer, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(scored[0], folder)
    how = {
        "heldout": [resolve_reward("brightness")], "embed_name": "pixels",
        "embed": lambda x: x.flatten(1)[:, :64], "show": False,
    }  # fmt: skip
    before = (folder / "results.jsonl").read_bytes()
    done = score_folder(folder, scorer, **how)
    assert (done.new, done.known) == (0, 3 * len(SOME))
    assert (folder / "results.jsonl").read_bytes() == before
    world = StickerWorld()
    Image.fromarray(world.render(SOME[0], 77)).save(folder / "00000/samples/0000.png")
    done = score_folder(folder, scorer, **how)
    assert done.new == 1
    assert open_scored(folder).rows[0, 0]["correct"]
    with pytest.raises(OptionError, match=r"another heldout.*--again"):
        score_folder(folder, scorer, embed_name="pixels", show=False)
    assert score_folder(folder, scorer, again=True, show=False).new == 3 * len(SOME)


class Witness:
    """A verifier that writes down where its images were."""

    name, spec, differentiable = "witness", "witness", False

    def __init__(self):
        self.seen = set()

    def __call__(self, images, prompts, *, metadata=None):
        self.seen.add(images.device.type)
        return Scores(value=torch.zeros(len(images)))


def test_verifiers_and_embedding_get_their_images_on_their_device(scorer, tmp_path):
    folder, witness, seen = draw_folder(tmp_path / "f", [[True]], SOME[:1]), Witness(), []
    score_folder(
        folder, scorer, heldout=[witness], device="meta", show=False,
        embed=lambda x: seen.append(x.device.type) or torch.ones(len(x), 2),
    )  # fmt: skip
    assert (witness.seen, seen) == ({"meta"}, ["meta"])


def test_a_verifier_that_the_search_has_seen_says_so(scorer, tmp_path):
    run = {"reward": "jpeg + brightness", "model": {"source": "stickers"}}
    verifiers, guide = adapted(["brightness", "jpeg(quality=50)"], run, "cpu")
    folder = draw_folder(tmp_path / "f", [[True]], SOME[:1])
    score_folder(folder, scorer, heldout=verifiers, guide=guide, show=False)
    found = card(open_scored(folder))["heldout"]
    assert set(found) == {"brightness (searched: brightness)", "jpeg"}
    with pytest.raises(OptionError, match="guiding reward itself"):
        adapted(["clip(model=stickers, scale=100)"], {**run, "reward": "clip"}, "cpu")


def test_no_code_is_imported_for_a_run_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "foreign_guide_for_test.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "python:foreign_guide_for_test:f"
    assert adapted(["jpeg"], {"reward": spec}, "cpu")[1] is None


def test_missing_corrupt_and_extra_images_are_named_and_the_rest_is_kept(scored, scorer, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(scored[0], folder)
    for name in ("results.jsonl", "scoring.json"):
        (folder / name).unlink()
    (folder / "00001/samples/0002.png").unlink()
    spoilt = folder / "00002/samples/0001.png"
    spoilt.write_bytes(spoilt.read_bytes()[:200])
    (folder / "00003/samples/0000.png").write_text("no image")
    (folder / "00004/samples/notes.txt").write_text("hello")
    (folder / "00099").mkdir()
    done = score_folder(folder, scorer, show=False)
    assert done.contents.missing == ["00001/samples/0002.png"]
    assert done.contents.extra == ["00004/samples/notes.txt", "00099 (no metadata.jsonl)"]
    assert len(done.unreadable) == 2
    assert all(any(n in u for u in done.unreadable) for n in ("00002", "00003"))
    assert done.new == 3 * len(SOME) - 3
    found = card(open_scored(folder))
    assert found["images"]["scored"] == done.new
    assert any("1 images are missing and 2 have no verdict" in w for w in warnings(found))


def test_folders_that_are_none_say_so(scorer, scored, tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        look(tmp_path / "nothing")
    with pytest.raises(OptionError, match="neither a run"):
        look(tmp_path)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/metadata.jsonl").write_text('{"tag": ')
    with pytest.raises(RecipeError, match="damaged"):
        look(tmp_path)
    (tmp_path / "00000/metadata.jsonl").write_text(json.dumps(SOME[0]))
    with pytest.raises(OptionError, match="has images"):
        look(tmp_path)
    with pytest.raises(OptionError, match="steer geneval score"):
        open_scored(draw_folder(tmp_path / "unscored", [[True]], SOME[:1]))


def test_what_a_reader_must_know_is_said(scored):
    found = card(open_scored(scored[0]))
    assert warnings(found) == []
    found["images"]["without_any_object"] = 0.9
    found["oracle"] = True
    found["tags_present"] = "2 of 6"
    words = " ".join(warnings(found))
    for word in ("nothing at all in 90%", "oracle", "2 of 6"):
        assert word in words


class Page(HTMLParser):
    """Tags and links of a page; a tag that is never closed is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.links, self.text = [], Counter(), [], []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] += 1
        if tag == "img":
            self.links.append(dict(attrs)["src"])
        elif tag not in ("meta", "br", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] += 1

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_pairs_images_by_prompt_and_links_them(scored, tmp_path):
    runs = [(run, card(run)) for run in map(open_scored, scored)]
    path = write_page(runs, tmp_path / "site/index.html")
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.seen["figure"] == 2 * 3 * len(SOME)
    assert all((path.parent / link).is_file() for link in page.links)
    text = " ".join(page.text)
    assert all(record["prompt"] in text for record in SOME)
    rows = re.findall(r"data-differ='(\d)' data-wrong='(\d)'", path.read_text())
    assert [d == "1" for d, _ in rows] == [i % 4 < 3 for i in range(len(SOME))]
    assert [w == "1" for _, w in rows] == [i % 4 < 3 for i in range(len(SOME))]
    assert "many - few" in text


def test_prompts_and_names_cannot_break_out_of_the_page(scorer, tmp_path):
    record = json.loads(json.dumps(SOME[0]))
    record["prompt"] = "<script>alert('x')</script> & 'quotes'"
    folder = draw_folder(tmp_path / "a<b&'c", [[True]], [record])
    score_folder(folder, scorer, show=False)
    run = open_scored(folder)
    html = write_page([(run, card(run))], tmp_path / "p.html").read_text()
    assert "<script>alert" not in html
    assert "a<b" not in html
    page = Page()
    page.feed(html)
    assert "alert('x')" in " ".join(page.text)
    assert page.seen["script"] == 1


def test_plots_have_a_bar_per_tag_and_a_point_per_run(scored):
    runs = [(run, card(run)) for run in map(open_scored, scored)]
    svg = bars(runs)
    assert svg.count("<rect") == 2 * 7
    heights = [float(h) for h in re.findall(r"<rect [^>]*height='([\d.]+)'", svg)]
    macro = [found["scores"]["macro"]["value"] for _, found in runs]
    assert heights[:2] == pytest.approx([240 * m for m in macro], abs=0.2)
    assert scatter(runs) == ""  # folders made elsewhere do not say what they cost
    runs[0][1]["cost"] = {"nfe": 40.0}
    assert scatter(runs).count("<circle") == 1


def steer(capsys, *words: str) -> tuple[int, str, str]:
    code, out, err = run(capsys, "geneval", *words)
    return code, out, " ".join(err.split())


def test_commands_on_a_folder_made_elsewhere(capsys, tmp_path):
    folder = draw_folder(tmp_path / "sd", [[True, True]] * len(SOME))
    code, _, err = steer(capsys, "score", str(folder))
    # There are no weights here, and no network.
    assert (code, "hf download facebook/mask2former-swin" in err) == (2, True)
    code, out, _ = steer(capsys, "score", str(folder), "--detector", "stickers", "--json")
    assert code == 0
    assert json.loads(out)["new"] == 2 * len(SOME)
    page = tmp_path / "page.html"
    code, out, err = steer(capsys, "report", str(folder), "--html", str(page), "--json")
    found = json.loads(out.strip().splitlines()[-1])["sd"]
    assert code == 0
    assert found["scores"]["macro"]["value"] >= 0.95
    assert page.is_file()
    (folder / "00000/samples/0001.png").unlink()
    code, _, err = steer(capsys, "score", str(folder), "--detector", "stickers")
    assert code == 1
    assert "1 missing: 00000/samples/0001.png" in err


def test_unreadable_images_are_one_kind_of_error(tmp_path):
    from steering.apps.geneval_score import read_image

    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SteeringError, match="cannot be read as a picture"):
        read_image(tmp_path / "x.png")
    turned = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.png", exif=exif)
    assert tuple(read_image(tmp_path / "t.png").shape) == (3, 8, 4)
