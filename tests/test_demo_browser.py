"""The demo in a real browser, on the sticker model: one server and one Chromium for all tests."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from playwright.sync_api import expect, sync_playwright

import steering
from steering.apps.demo import launch
from steering.recipe import read, write_png
from tests.demo_world import PATIENCE, PROMPT, eventually, held, hosting

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MUST = "BROWSER_TESTS" in os.environ  # set where a missing browser is a fault of the set-up
SERIOUS = ("serious", "critical")
SOON = 10_000.0  # ms until a button has changed
TABS = ("Steer", "Compare", "Replay", "Score")
STEER, STEERING = ("#steer", "Steer", "#cancel"), ("#steer", "Steering ...", "#cancel")


@pytest.fixture(scope="module")
def vanishing(tmp_path_factory):
    """A model folder that a test may move away."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    steering.load("stickers-sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(vanishing, tmp_path_factory):
    """(host, address); what lies beside the host's folder is this server's doing."""
    root = tmp_path_factory.mktemp("server") / "root"
    root.mkdir()
    with hosting(str(vanishing), root=root) as host:
        page, address = launch(host, wait=False)
        yield host, address
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists() and not MUST:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set CHROMIUM")
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as play:
        # the sandbox needs rights that a container does not give
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """A person at a page of their own."""

    def __init__(self, browser, address: str, **options) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.context.set_default_timeout(1000 * PATIENCE)
        self.page = self.context.new_page()
        self.alarms: list[str] = []
        self.page.on(
            "dialog", lambda dialog: (self.alarms.append(dialog.message), dialog.accept())
        )
        self.page.goto(address)
        expect(self.page.get_by_text("Options of fk")).to_be_visible()  # the last part to come

    def at(self, name: str):
        return self.page.locator(name)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def unfold(self, name: str) -> None:
        """Opens an accordion unless it is open."""
        button = self.page.get_by_role("button", name=name)
        if "open" not in (button.get_attribute("class") or ""):
            button.click()

    def number(self, label: str, value: object) -> None:
        self.page.get_by_label(label).locator("visible=true").fill(str(value))

    def tick(self, *rewards: str) -> None:
        """Ticks these of the rewards that guide and no others."""
        group = self.page.get_by_role("group", name="Rewards that guide").locator("visible=true")
        for box in group.get_by_role("checkbox").all():
            box.set_checked(box.locator("xpath=..").inner_text() in rewards)

    def guide(self, *rewards: str) -> None:
        """The same on the Steer tab, where each has a weight."""
        self.tick(*rewards)
        for name in rewards:
            expect(self.page.get_by_label(f"Weight of {name}")).to_be_visible()

    def ask(self, prompt: str = PROMPT, *, nfe: int = 64, seed: int = 0, steps: int = 8) -> None:
        """Fills the form."""
        self.at("#prompt textarea").fill(prompt)
        self.number("Budget", nfe)
        self.number("Seed", seed)
        self.unfold("Model call and verifiers")
        self.number("Denoising steps", steps)

    def steer(self) -> None:
        self.at("#steer").click()

    def choose(self, method: str) -> None:
        self.at("#method input").click()
        self.page.get_by_role("option", name=method, exact=True).click()
        expect(self.page.get_by_text(f"Options of {method}", exact=True)).to_be_visible()

    def ready(self, start: str, words: str, cancel: str = "") -> None:
        """A tab's button can be pressed, and there is nothing to cancel."""
        expect(self.at(start)).to_be_enabled(timeout=SOON)
        expect(self.at(start)).to_have_text(words)
        if cancel:
            expect(self.at(cancel)).to_be_disabled(timeout=SOON)

    def busy(self, start: str, words: str, cancel: str = "") -> None:
        """A tab's button cannot be pressed and says why, and Cancel can."""
        expect(self.at(start)).to_have_text(words, timeout=SOON)
        expect(self.at(start)).to_be_disabled(timeout=SOON)
        if cancel:
            expect(self.at(cancel)).to_be_enabled(timeout=SOON)

    def says(self, words: str | re.Pattern[str], where: str = "#status") -> None:
        expect(self.at(where)).to_contain_text(words)

    def download(self, folder: Path) -> Path:
        with self.page.expect_download() as waiting:
            self.at("#download").click()
        file = folder / waiting.value.suggested_filename
        waiting.value.save_as(file)
        return file

    def pictures(self, where: str) -> list[np.ndarray]:
        """Pixels of the pictures shown somewhere."""
        sources = self.at(f"{where} img").evaluate_all("images => images.map(i => i.src)")
        return [pixels(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.fixture
def visitor(browser, server):
    found = Visitor(browser, server[1])
    yield found
    assert found.alarms == []  # no script of a text that a person sent
    found.context.close()


@pytest.fixture(scope="module")
def made(server, tmp_path_factory):
    """A PNG with its recipe."""
    host, _ = server
    file = tmp_path_factory.mktemp("made") / "apple.png"
    order = host.offer.order(
        PROMPT, model="stickers", method="fk", rewards={"gated": 1.0}, nfe=32,
        call={"num_inference_steps": 4},
    )  # fmt: skip
    ticket = host.submit("maker", order)
    eventually(lambda: ticket.over, "the picture is made")
    shutil.copy(ticket.results[0].files[0], file)
    return file


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


# --- several people -----------------------------------------------------------------------------


def test_two_browsers_at_once_get_their_own_results(browser, server, tmp_path):
    own = [("a photo of a red apple", 3), ("a photo of a blue clock", 4)]
    visitors = [Visitor(browser, server[1]) for _ in own]
    with held() as gate:
        for visitor, (prompt, seed) in zip(visitors, own, strict=True):
            visitor.guide("gated")
            visitor.ask(prompt, seed=seed, nfe=64)
            visitor.unfold("Model call and verifiers")
            visitor.page.get_by_label("Compare with unsteered").uncheck()
            visitor.steer()
            visitor.says("Running" if seed == 3 else "Starting")
        visitors[0].says("First estimates", "#best")
        gate.open()
        for visitor in visitors:
            visitor.says("Finished")
    pipe = steering.load("stickers")
    for visitor, (prompt, seed) in zip(visitors, own, strict=True):
        file = visitor.download(tmp_path)
        recipe = read(file)
        assert (recipe.prompts, recipe.seeds) == ([prompt], [seed])
        assert recipe.engine["company"] == 1  # they shared the engine
        alone = steering.steer(
            pipe, prompt, seed=seed, nfe=64, method="fk", num_inference_steps=8,
            reward=lambda images: images.mean((1, 2, 3)),
        )  # fmt: skip
        difference = pixels(file) - np.asarray(alone.pictures()[0], dtype=np.int16)
        assert np.abs(difference).mean() < 3  # rounding depends on the batch; pictures do not
        visitor.context.close()


def test_a_closed_tab_stops_its_run_and_frees_the_queue(browser, server, visitor):
    host, address = server
    leaving = Visitor(browser, address)
    leaving.guide("gated")
    leaving.ask(nfe=640)
    with held() as gate:
        leaving.steer()
        leaving.says("First estimates", "#best")
        (gone,) = host._running.values()
        visitor.ask(steps=7)  # called in another way, so it must wait for the first to end
        visitor.steer()
        visitor.says("Starting")
        leaving.context.close()
        eventually(gone.cancel.is_set, "the server knows that the tab is closed")
        gate.open()
        visitor.says("Finished")
    assert gone.state == "stopped"
    assert gone.live.nfe < 640
    assert not gone.folder.parent.exists()
    eventually(lambda: host.load == (0, 0), "nothing is left in the queue")


def test_a_closed_tab_takes_its_pictures_and_uploads_along(browser, server, tmp_path):
    host, address = server
    before = set(host.root.rglob("*.png"))
    leaving = Visitor(browser, address)
    leaving.ask(nfe=16)
    leaving.steer()
    leaving.says("Finished")
    run = leaving.download(tmp_path)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (9, 9), "teal").save(plain)
    leaving.tab("Replay")
    leaving.at("#png input[type=file]").set_input_files(run)
    leaving.says("carries its recipe", "#replay-status")
    leaving.tab("Score")
    leaving.at("#pictures input[type=file]").set_input_files([plain])
    uploads = host._uploads  # a file is on the disk before the page tells whose it is
    eventually(
        lambda: any(p.name == "plain.png" for files in list(uploads.values()) for p in files),
        "the picture is there",
    )
    own = set(host.root.rglob("*.png")) - before
    assert {run.name, "plain.png"} <= {p.name for p in own}
    leaving.context.close()
    eventually(lambda: not any(p.exists() for p in own), "its files are gone")


# --- bad input ----------------------------------------------------------------------------------


def test_what_is_wrong_in_the_form_is_a_message_and_the_server_stays_up(visitor):
    visitor.ask()

    def refused(words: str) -> None:
        visitor.steer()
        expect(visitor.at("#status [role=alert]")).to_contain_text(words)
        visitor.ready(*STEER)

    visitor.at("#prompt textarea").fill("  ")
    refused("non-empty text")
    visitor.at("#prompt textarea").fill("a" * 1001)
    refused("at most 1000 are taken")
    visitor.at("#prompt textarea").fill(PROMPT)
    visitor.number("Budget", 10**9)
    refused("nfe must lie in [1, 4000]")
    visitor.number("Budget", 64)
    visitor.number("Denoising steps", 10**6)
    refused("num_inference_steps must lie in [1, 100]")
    visitor.number("Denoising steps", 8)
    visitor.unfold("Options of fk")
    visitor.number("n particles", -3)
    refused("n_particles must be at least 1, got -3")
    visitor.number("n particles", "many")
    refused("Option 'n_particles' takes a number, got 'many'")
    visitor.number("n particles", 10**6)
    refused("at most 256")
    visitor.number("n particles", 2)
    visitor.page.get_by_label("Model", exact=True).locator("visible=true").fill("../../etc/passwd")
    visitor.page.keyboard.press("Enter")
    refused("not '../../etc/passwd'")
    visitor.page.get_by_label("Model", exact=True).locator("visible=true").fill("stickers")
    visitor.page.keyboard.press("Enter")
    visitor.steer()
    visitor.says("Finished: 32 of 64")


def test_wrong_uploads_are_messages_and_nothing_leaves_the_folder(visitor, server, made, tmp_path):
    host, _ = server
    text = {"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"}
    evil = {**text, "name": "../../<img src=x onerror=alert(1)>.png"}
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(50 * 2**20)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    visitor.tab("Replay")
    upload, alert = visitor.at("#png input[type=file]"), visitor.at("#replay-status [role=alert]")
    for file, words in (
        (text, "notes.png is no picture"),
        (plain, "a PNG without a recipe"),
        (evil, "onerror=alert(1).png is no picture"),
    ):
        upload.set_input_files(file)
        expect(alert).to_contain_text(words)
        visitor.at("#again").click()
        expect(alert).to_contain_text(words)
        visitor.at("#png").get_by_label("Clear").click()
    upload.set_input_files(large)
    expect(visitor.page.get_by_text("exceed the maximum allowed size of 10.0 Mb")).to_be_visible()
    upload.set_input_files(made)
    visitor.says("carries its recipe", "#replay-status")

    visitor.tab("Score")
    visitor.at("#pictures input[type=file]").set_input_files([evil, text])
    visitor.at("#score").click()
    visitor.says("is no picture", "#score-status")
    strays = list(host.root.parent.rglob("*onerror*"))
    assert strays  # the name reached the disk: what follows can fail
    assert all(stray.parent.parent == host.root for stray in strays)
    assert list(host.root.parent.iterdir()) == [host.root]


def test_a_vanished_model_folder_is_a_message_and_a_log_line(visitor, vanishing, caplog):
    caplog.set_level(logging.INFO, logger="steering.demo")
    hidden = vanishing.rename(vanishing.with_name("elsewhere"))
    visitor.ask(steps=4, nfe=16)
    visitor.guide("brightness")
    model = visitor.page.get_by_label("Model", exact=True).locator("visible=true")
    model.click()
    visitor.page.get_by_role("option", name=str(vanishing)).click()
    visitor.steer()
    expect(visitor.at("#status [role=alert]")).to_contain_text("could not be opened")
    visitor.ready(*STEER)
    assert f"Model {str(vanishing)!r} could not be opened" in caplog.text
    hidden.rename(vanishing)
    visitor.steer()
    visitor.says("Finished")
    expect(visitor.page.get_by_text("Best of 2")).to_be_visible()
    vanishing.rename(hidden)  # once open it lives in memory
    visitor.number("Budget", 24)
    visitor.steer()
    visitor.says("Finished: 24 of 24")


# --- everybody ----------------------------------------------------------------------------------


def serious(page) -> list[str]:
    """What axe-core finds wrong and calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    # A button that comes back fades in: its contrast on the way is nobody's.
    page.wait_for_function("document.getAnimations().every(a => a.playState !== 'running')")
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in SERIOUS]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(browser, server, made, scheme):
    visitor = Visitor(browser, server[1], color_scheme=scheme)
    page = visitor.page
    for name in TABS if scheme == "light" else ():
        visitor.tab(name)
        assert serious(page) == [], f"{name}, untouched"
    visitor.tab("Steer")
    visitor.ask("", nfe=32, steps=4)
    visitor.steer()
    expect(visitor.at("#status [role=alert]")).to_be_visible()
    assert serious(page) == [], "Steer with a message"
    visitor.ask(nfe=32, steps=4)
    visitor.unfold("Options of fk")
    visitor.unfold("The same run elsewhere")
    visitor.steer()
    expect(visitor.at("#result figure")).to_have_count(3)
    assert serious(page) == [], "Steer after a run"
    visitor.tab("Compare")
    visitor.number("Budget of each", 32)
    visitor.number("Steps", 4)
    visitor.at("#compare").click()
    expect(visitor.at("#compare-result figure.st-card")).to_have_count(3)
    assert serious(page) == [], "Compare after a run"
    visitor.tab("Replay")
    visitor.at("#png input[type=file]").set_input_files(made)
    visitor.says("carries its recipe", "#replay-status")
    visitor.at("#again").click()
    visitor.says("Identical", "#replay-status")
    assert serious(page) == [], "Replay after a run"
    visitor.tab("Score")
    visitor.at("#pictures input[type=file]").set_input_files(made)
    expect(visitor.at("#pictures")).to_contain_text("apple")
    visitor.at("#score").click()
    expect(visitor.at("#score-status table")).to_be_visible()
    assert serious(page) == [], "Score after a run"
    visitor.context.close()


def test_the_main_job_by_keyboard_alone(visitor, tmp_path):
    focused = "document.activeElement"

    def tab_to(what: str, most: int = 60) -> None:
        for _ in range(most):
            visitor.page.keyboard.press("Tab")
            if visitor.page.evaluate(
                f"{focused}.matches('{what}') || {focused}.closest('{what}')"
            ):
                return
        raise AssertionError(f"{what} is not reached by Tab")

    tab_to("#prompt")
    visitor.page.keyboard.press("ControlOrMeta+a")
    visitor.page.keyboard.type("a photo of a blue clock")
    tab_to("#nfe")
    visitor.page.keyboard.press("ControlOrMeta+a")
    visitor.page.keyboard.type("80")
    tab_to("#steer")
    ring = visitor.page.evaluate(
        f"(s => s.outlineStyle + s.boxShadow)(getComputedStyle({focused}))"
    )
    assert ring != "nonenone"  # the focus can be seen
    visitor.page.keyboard.press("Enter")
    expect(visitor.at("#result figure")).to_have_count(3)
    tab_to("#download")
    with visitor.page.expect_download() as waiting:
        visitor.page.keyboard.press("Enter")
    waiting.value.save_as(tmp_path / "clock.png")
    recipe = read(tmp_path / "clock.png")
    assert (recipe.prompts, recipe.budget["nfe"]) == (["a photo of a blue clock"], 80)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_tab_is_wider_than_the_window(visitor, width):
    visitor.page.set_viewport_size({"width": width, "height": 800})
    for name in TABS:
        visitor.tab(name)
        wide = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, name
