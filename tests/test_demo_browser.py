"""The demo in a real browser, on the sticker model: the main job, and its buttons meanwhile."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from playwright.sync_api import expect

from steering.recipe import read, write_png
from tests import demo_visitor
from tests.demo_visitor import SOON, STEER, STEERING
from tests.demo_world import PROMPT, eventually, held, pixels

# One server and one Chromium for all tests of this file.
vanishing, server, browser = demo_visitor.vanishing, demo_visitor.server, demo_visitor.browser
visitor, made = demo_visitor.visitor, demo_visitor.made


# --- the main job -------------------------------------------------------------------------------


def test_a_whole_run_its_download_and_its_replay(visitor, tmp_path):
    visitor.ask(nfe=64, seed=5)
    expect(visitor.at("#download")).to_be_disabled()
    visitor.steer()
    cards = visitor.at("#result figure")
    expect(cards).to_have_count(3)
    for card, title in zip(cards.all(), ("Unsteered", "Best of 4", "Steered by fk"), strict=True):
        expect(card).to_contain_text(title)
        expect(card).to_contain_text(re.compile(r"reward\s*[\d.]+\s*held-out detector\s*[\d.]+"))
    assert [re.search(r"rows\s*(\d+)", c).group(1) for c in cards.all_inner_texts()] == [
        "16", "64", "64",
    ]  # fmt: skip
    visitor.says("Finished: 64 of 64 network rows")
    expect(visitor.at("#plots")).to_contain_text("best-of-N")
    expect(visitor.at("#plots svg")).to_have_count(2)  # rewards, and ESS
    expect(visitor.at("#tree")).to_contain_text(re.compile("particle", re.I))

    visitor.unfold("The same run elsewhere")
    assert f"'{PROMPT}'" in visitor.page.get_by_label("Python", exact=True).input_value()
    command = visitor.page.get_by_label("Command line", exact=True).input_value()
    assert "--nfe 64 --seed 5" in command

    file = visitor.download(tmp_path)
    recipe = read(file)
    assert (recipe.prompts, recipe.seeds, recipe.engine["company"]) == ([PROMPT], [5], 0)
    assert (pixels(file) == visitor.pictures("#result")[2]).all()

    visitor.tab("Replay")
    visitor.at("#png input[type=file]").set_input_files(file)
    visitor.says("carries its recipe", "#replay-status")
    expect(visitor.at("#recipe pre")).to_contain_text(PROMPT)
    visitor.at("#again").click()
    visitor.says("Identical: every pixel is the same.", "#replay-status")
    given, again = visitor.pictures("#replay-result")
    assert (given == pixels(file)).all()
    assert (again == given).all()


def test_previews_gallery_and_numbers_come_while_it_runs(visitor):
    visitor.guide("gated")
    visitor.ask(nfe=64)
    points = visitor.at("#gallery summary")
    with held() as gate:
        visitor.steer()
        visitor.says("First estimates", "#best")
        expect(visitor.at("#best img")).not_to_have_count(0)
        assert points.count() == 0
        for k in (1, 2):
            gate.let(1)
            expect(points).to_have_count(k)
            visitor.says("Running")
            visitor.says(re.compile(r"about \d+ s left"))
            visitor.says("estimate of an unfinished one", "#best")
        rows = [int(re.search(r"at (\d+)", t).group(1)) for t in points.all_inner_texts()]
        assert rows[0] > rows[1]  # the newest first
        assert visitor.at("#gallery details").first.locator("img").count() == 4
        expect(visitor.at("#plots svg")).not_to_have_count(0)
        gate.open()
    visitor.says("Finished")
    assert points.count() > 2


def test_cancel_in_mid_run_gives_the_best_so_far(visitor, tmp_path):
    visitor.guide("gated")
    visitor.ask(nfe=640)
    with held() as gate:
        visitor.steer()
        visitor.says("First estimates", "#best")
        gate.let(1)
        expect(visitor.at("#gallery summary")).to_have_count(1)
        visitor.at("#cancel").click()
        visitor.page.wait_for_timeout(300)  # the click is on its way
        gate.open()
    visitor.says("Stopped: this is the best so far")
    visitor.says("Steered by fk (stopped: best so far)", "#result")
    spent = int(re.search(r"(\d+) of 640", visitor.at("#status").inner_text()).group(1))
    assert 0 < spent < 640
    assert read(visitor.download(tmp_path)).engine["stopped"]
    visitor.ready(*STEER)
    # a press that was on its way when the run ended
    visitor.at("#cancel").evaluate("button => { button.disabled = false; button.click(); }")
    visitor.says("Nothing of yours is running")


def test_options_keep_their_values_when_the_form_is_drawn_again(visitor):
    visitor.ask(nfe=32, steps=4)
    visitor.unfold("Options of fk")
    visitor.number("n particles", 2)
    visitor.guide("brightness", "clip")
    visitor.number("Weight of clip", 0.5)
    visitor.steer()
    visitor.says("Finished: 16 of 32")  # what was left empty is still empty, and not 0
    visitor.unfold("The same run elsewhere")
    code = visitor.page.get_by_label("Python", exact=True)
    expect(code).to_have_value(re.compile(r"reward='0\.5\*clip[^+]*\+ brightness'"))
    expect(code).to_have_value(re.compile("'n_particles': 2"))


# --- buttons of what is going on ----------------------------------------------------------------


def test_steer_cannot_be_pressed_until_its_run_and_the_comparison_are_over(visitor, server):
    visitor.guide("gated")
    visitor.ask(nfe=32, steps=4)
    visitor.ready(*STEER)
    enter = visitor.at("#prompt textarea").press
    with held() as gate:
        visitor.steer()
        visitor.busy(*STEERING)
        eventually(lambda: gate.blocked, "the run has begun")
        (run,) = server[0]._running.values()
        while not run.over:
            gate.let(1)
            eventually(lambda: gate.blocked or run.over, "a score is through")
        visitor.says("Now best-of-N")
        visitor.busy(*STEERING)
        enter("Enter")
        expect(visitor.page.get_by_text("Your run is still going")).to_be_visible()
        visitor.choose("svdd")  # the form is drawn anew, and its listeners with it
        visitor.page.wait_for_timeout(1000)
        visitor.busy(*STEERING)
        enter("Enter")
        expect(visitor.page.get_by_text("Your run is still going")).to_have_count(2)
        assert len(server[0].tickets(run.session)) == 2
        gate.open()
    expect(visitor.at("#result figure")).to_have_count(3)
    visitor.ready(*STEER)
    visitor.steer()
    visitor.says("Steered by svdd", "#result")
    expect(visitor.at("#result figure")).to_have_count(3)
    visitor.ready(*STEER)


def test_compare_comes_back_after_a_cancel_and_wrong_input(visitor):
    visitor.tab("Compare")
    visitor.tick("gated")
    visitor.number("Budget of each", 640)
    visitor.number("Steps", 8)
    with held() as gate:
        visitor.at("#compare").click()
        visitor.busy("#compare", "Comparing ...", "#compare-cancel")
        eventually(lambda: gate.blocked, "the runs have begun")
        gate.let(1)
        eventually(lambda: gate.blocked, "some pictures are scored")
        visitor.at("#compare-cancel").click()
        visitor.page.wait_for_timeout(300)  # the click is on its way
        gate.open()
    expect(visitor.at("#compare-status").get_by_text("Stopped")).to_have_count(2)
    visitor.ready("#compare", "Compare", "#compare-cancel")
    visitor.says("(stopped: best so far)", "#compare-result")
    expect(visitor.at("#compare-result")).not_to_contain_text("Unsteered", timeout=SOON)
    visitor.number("Steps", 10**6)
    visitor.at("#compare").click()
    expect(visitor.at("#compare-status [role=alert]")).to_contain_text("[1, 100]")
    visitor.ready("#compare", "Compare", "#compare-cancel")


def test_replay_and_score_come_back_after_an_end_and_an_error(visitor, server, made, tmp_path):
    host, _ = server
    damaged = tmp_path / "damaged.png"
    with Image.open(made) as image:  # its recipe names a picture that the run does not make
        write_png(image.convert("RGB"), damaged, replace(read(made), image=7))
    visitor.tab("Replay")
    upload, replay = visitor.at("#png input[type=file]"), ("Run it again", "#again-cancel")
    visitor.at("#again").click()
    expect(visitor.at("#replay-status [role=alert]")).to_contain_text("Choose a file")
    visitor.ready("#again", *replay)
    upload.set_input_files(made)
    visitor.says("carries its recipe", "#replay-status")
    with held() as gate:
        visitor.at("#again").click()
        visitor.busy("#again", "Running ...", "#again-cancel")
        gate.open()
    visitor.says("Identical", "#replay-status")
    visitor.ready("#again", *replay)
    visitor.at("#png").get_by_label("Clear").click()
    upload.set_input_files(damaged)
    visitor.says("carries its recipe", "#replay-status")
    visitor.at("#again").click()
    expect(visitor.page.get_by_text("picture 7 of 4")).to_be_visible()
    visitor.ready("#again", *replay)

    visitor.tab("Score")
    visitor.at("#score").click()
    visitor.says("Choose 1 to 16 pictures", "#score-status")
    score, small = ("Score", "#score-cancel"), tmp_path / "small.png"
    visitor.ready("#score", *score)
    Image.new("RGB", (8, 8)).save(small)  # another size is another call
    visitor.at("#pictures input[type=file]").set_input_files([made, small])
    expect(visitor.at("#pictures")).to_contain_text("apple")
    visitor.page.get_by_label("gated").locator("visible=true").check()
    with held() as gate:
        visitor.at("#score").click()
        visitor.busy("#score", "Scoring ...", "#score-cancel")
        eventually(lambda: gate.blocked, "a picture is being scored")
        kept = [t for tickets in list(host._tickets.values()) for t in tickets]
        (scoring,) = (t for t in kept if t.chore is not None)
        visitor.at("#score-cancel").click()
        eventually(scoring.cancel.is_set, "the server knows that it is cancelled")
        gate.open()
    visitor.says("Cancelled before all was done", "#score-status")
    visitor.ready("#score", *score)
    visitor.at("#score").click()
    expect(visitor.at("#score-status table")).to_be_visible()
    visitor.ready("#score", *score)
