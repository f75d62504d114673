"""A server and a browser for the demo, and a person at a page of their own."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

import steering
from steering.apps.demo import launch
from tests.demo_world import PATIENCE, PROMPT, eventually, hosting, pixels

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MUST = "BROWSER_TESTS" in os.environ  # set where a missing browser is a fault of the set-up
SOON = 10_000.0  # ms until a button has changed
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
