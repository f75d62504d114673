"""The OCR reward: RapidOCR reads rendered strings back, and the arithmetic around it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from steering.errors import OptionError
from steering.rewards import as_reward
from steering.rewards.ocr import OCR, _engine, edit_distance

STRINGS = [
    "OPEN", "Hello World", "STEER ME", "NASA 2049", "Coffee", "Sale 50", "Exit 12", "Library",
    "Happy Birthday", "No Parking", "BAKERY", "Room 7", "Tokyo", "Fresh Fish", "Stop here",
    "MUSEUM", "Taxi", "Winter", "Chapter 3", "Good night",
]  # fmt: skip


def render(text, size=(280, 48)):
    image = Image.new("RGB", size, (245, 245, 235))
    ImageDraw.Draw(image).text((16, 6), text, fill=(20, 30, 60), font=ImageFont.load_default(30))
    return image


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def signs(engine):
    """Twenty renders, scored against their own strings in one call."""
    prompts = [f'a sign that says "{text}"' for text in STRINGS]
    return OCR()([render(text) for text in STRINGS], prompts)


def test_twenty_renders_are_read_back(signs):
    assert signs.value.tolist() == [1.0] * 20
    assert signs.parts["distance"].tolist() == [0.0] * 20
    assert signs.parts["confidence"].min() > 0.8
    read = ["".join(text.split()).lower() for text in signs.notes["read"]]
    assert read == ["".join(text.split()).lower() for text in STRINGS]


def test_other_text_costs_its_distance(signs):
    """The same pictures against shifted strings, by the distance computed here."""
    wanted = STRINGS[1:3]
    found = OCR()([render(text) for text in STRINGS[:2]], [f'"{text}"' for text in wanted])
    for k, text in enumerate(wanted):
        a, b = ("".join(t.split()).lower() for t in (text, STRINGS[k]))
        assert float(found.value[k]) == pytest.approx(
            1 - min(slow_distance(a, b), len(a)) / len(a)
        )


def test_an_empty_picture_scores_zero(engine):
    found = as_reward("ocr(text=open)")(torch.ones(1, 3, 48, 64), ["any"])
    assert found.value.tolist() == [0.0]
    assert math.isnan(float(found.parts["confidence"]))
    assert found.notes["read"] == [""]


def test_text_around_costs_only_if_asked(engine):
    picture = render("now open daily")
    prompts = 'a door with "open"'
    assert OCR()(picture, prompts).value.tolist() == [1.0]
    assert OCR(within=False)(picture, prompts).value.tolist() == [0.0]


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance_against_the_recursion():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)


def test_several_quotes_are_all_wanted(monkeypatch):
    monkeypatch.setattr(
        "steering.rewards.ocr._engine", lambda *a: lambda picture: (["Open", "8 to 5"], 0.9)
    )
    x = torch.zeros(3, 3, 8, 8)
    prompts = ['signs "open" and "8 to 6"', "a sign “OPEN”", "x"]
    found = OCR()(x, prompts, metadata=[None, None, {"text": "8 to 5"}])
    assert found.value.tolist() == pytest.approx([(1 + 0.75) / 2, 1.0, 1.0])
    assert found.parts["distance"][0] >= 1


def test_a_prompt_without_text_is_refused_before_anything_runs():
    with pytest.raises(OptionError, match="has none"):
        OCR()(torch.zeros(1, 3, 8, 8), "it's a 'sign'")
    with pytest.raises(OptionError, match="has none"):
        OCR()(torch.zeros(1, 3, 8, 8), 'a sign " "')


def test_a_missing_package_is_named(monkeypatch):
    _engine.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(OptionError, match=r"pip install 'diffusion-steering\[rewards\]'"):
        OCR(text="x")(torch.zeros(1, 3, 8, 8), "x")
