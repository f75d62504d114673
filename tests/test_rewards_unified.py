"""UnifiedReward: every published form of answer, both orders, chains of thought, bad answers."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from steering.errors import OptionError
from steering.rewards.chat import Reply
from steering.rewards.unified import Unified, UnifiedPairs
from steering.rewards.unified_formats import PAIR, POINT, thoughts
from tests import tiny_server

nan = math.nan
ACS = """Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""
WORDWISE = """---

Word-wise Scores: [["a", 0.02], ["red", 0.71], ["[No_mistakes]", 0.3]]

**Alignment Score (1-5):** 4.5
**Coherence Score (1-5):** 3
**Style Score (1-5):** 1.5"""
FINAL = """apple (entity): 1
red (attribute): 0
table (entity): 1
on (relation): 1
Final Score: 3.5"""
SHARES = """Alignment Score:
 Image 1: 0.435699999332428
 Image 2: 0.564300000667572

Coherence Score:
 Image 1: 0.4180000126361847
 Image 2: 0.5820000171661377

Style Score:
 Image 1: 0.40790000557899475
 Image 2: 0.5921000242233276
"""
THINK = """<think>
1. Semantic consistency: Image 1 (9/10) - the apple is there; Image 2 (7/10) - no table.
2. Aesthetics: Image 2 (8/10) - warm light; Image 1 (8/10) - plain.
3. Authenticity: Image 1 (8/10) - fine; Image 2 (5/10) - Image 2 is better lit but broken.
Total score:
Image 1: 9+8+8=25
Image 2: 7+8+5=20
</think>
<answer>Image 1 is better</answer>"""
FLEX = {
    "prompt": "a red apple",
    "categories": [
        {"name": "Semantic", "dims": [
            {"name": "colour", "reason_1": "{odd}", "reason_2": "x", "score_1": 8, "score_2": 2},
            {"name": "object", "reason_1": "x", "reason_2": "x", "score_1": 5, "score_2": 5}],
         "cat_reason": "x", "cat_winner": "Image 1"},
        {"name": "Quality", "dims": [
            {"name": "edges", "reason_1": "x", "reason_2": "x", "score_1": "2", "score_2": "8"}],
         "cat_reason": "x", "cat_winner": "Image 2"},
    ],
    "reason": "x", "winner": "Image 1",
}  # fmt: skip


def read(form, text):
    found = {**POINT, **PAIR}[form].read(Reply(text=text), False)
    return found.value, found.parts


@pytest.mark.parametrize(
    ("form", "text", "value", "parts"),
    [
        ("acs", ACS, 2.622900009155273, {"alignment": 2.6947, "coherence": 2.3715,
                                         "style": 2.8025}),
        ("acs", WORDWISE, 3.0, {"alignment": 4.5, "coherence": 3.0, "style": 1.5}),
        ("final", FINAL, 3.5, {"elements": 0.75}),
        ("final", "Final Score: **4**", 4.0, {}),
        ("rank", "Image 1 is better than Image 2.", 1.0, {}),
        ("rank", "At first Image 1 is better, but no: Image 2 is better than Image 1.", 0.0, {}),
        ("rank", "Both images are equally good.", 0.5, {}),
        ("shares", SHARES, 0.42053334, {"alignment": 0.4357, "style": 0.4079}),
        ("think", THINK, 1.0, {"share": 25 / 45}),
        ("think", THINK.replace("<answer>Image 1", "<answer>\nImage 2"), 0.0, {}),
        ("flex", json.dumps(FLEX), 1.0, {"share": 0.5}),
        ("flex", f"Here it is:\n```json\n{json.dumps(FLEX, indent=1)}\n```", 1.0, {}),
        ("flex", json.dumps(FLEX | {"winner": "Image 2"}), 0.0, {}),
    ],
)  # fmt: skip
def test_published_forms(form, text, value, parts):
    found, details = read(form, text)
    assert found == pytest.approx(value, abs=1e-6)
    for name, number in parts.items():
        assert details[name] == pytest.approx(number, abs=1e-4)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("acs", ""),
        ("acs", ACS.replace("2.371500015258789", "")),
        ("acs", ACS.replace("2.371500015258789", "7.5")),
        ("acs", "Alignment: 3, Coherence: 3, Style: 3"),
        ("final", "Final Score: excellent"),
        ("final", "Final Score: 9"),
        ("rank", "I like both."),
        ("rank", "Image 3 is better"),
        ("shares", SHARES.replace("0.5643", "0.9643")),
        ("shares", SHARES.replace("Style Score:\n Image 1", "Style Score:\n Image one")),
        ("think", THINK.partition("<answer>")[0]),
        ("think", THINK.replace("<answer>Image 1 is", "<answer>Image 1 and 2 are")),
        ("flex", json.dumps(FLEX)[:-20]),
        ("flex", json.dumps(FLEX | {"winner": "Image 1/2"})),
        ("flex", '["winner"]'),
    ],
)
def test_answers_that_say_nothing_are_nan(form, text):
    assert math.isnan(read(form, text)[0])


def test_the_chain_of_thought_is_taken_out_whole():
    assert thoughts(THINK).startswith("1. Semantic")
    assert thoughts(THINK).endswith("7+8+5=20")
    assert thoughts("no tags") == ""


def test_expected_digits_replace_the_written_ones():
    tokens = ["Final", " Score", ":", " ", "3", ".5"]
    top = [{t: -0.1} for t in tokens]
    top[4] = {"3": math.log(0.5), "4": math.log(0.25), " 4": math.log(0.05), "9": math.log(0.1)}
    reply = Reply(text="".join(tokens), tokens=tuple(tokens), top=tuple(top))
    expected = (0.5 * 3 + 0.3 * 4) / 0.8 + 0.5
    assert POINT["final"].read(reply, True).value == pytest.approx(expected)
    tokens = ["Image", " ", "2", " is better"]
    top = [{}, {}, {"1": math.log(0.3), "2": math.log(0.6)}, {}]
    reply = Reply(text="".join(tokens), tokens=tuple(tokens), top=tuple(top))
    assert PAIR["rank"].read(reply, True).value == pytest.approx(1 / 3)


# From here on a scripted judge that sees how bright the pictures are.


def shades(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def brightness(image):
    return float(np.asarray(image).mean()) / 255


def point_judge(images, text, number):
    level = 1 + 4 * brightness(images[0])
    return f"Alignment Score (1-5): {level}\nCoherence Score (1-5): 3\nStyle Score (1-5): 3"


def pair_judge(form, bias=0.0):
    def reply(images, text, number):
        first, second = (brightness(image) for image in images)
        first += bias
        winner = 1 if first > second else 2
        if form == "rank":
            return f"Image {winner} is better than Image {3 - winner}."
        if form == "think":
            return (
                f"<think>{first:.3f} and {second:.3f}\nImage 1: 1+2=3\nImage 2: 1+2=3</think>"
                f"<answer>Image {winner} is better</answer>"
            )
        if form == "flex":
            marks = {"score_1": 6, "score_2": 4} if winner == 1 else {"score_1": 3, "score_2": 7}
            return json.dumps({"categories": [{"dims": [marks]}], "winner": f"Image {winner}"})
        share = 0.5 + (first - second) / 2
        pair = f" Image 1: {share}\n Image 2: {1 - share}\n"
        return "".join(f"{a} Score:\n{pair}\n" for a in ("Alignment", "Coherence", "Style"))

    return reply


def test_marks_stay_with_their_images():
    levels = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.6, 0.4, 0.2])
    with tiny_server.serve(tiny_server.scripted(point_judge)) as url:
        reward = Unified(url=f"{url}/v1", model="unified", concurrency=4)
        found = reward(shades(*levels), "x")
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        mixed = reward(shades(*levels)[order], "x")
    expected = (1 + 4 * levels + 6) / 3
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.value, expected[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.parts["alignment"], 1 + 4 * levels, atol=1e-5, rtol=0)
    assert found.notes["reply"][1].startswith("Alignment Score (1-5): 5.0")


@pytest.mark.parametrize("form", ["rank", "think", "flex", "shares"])
def test_pairs_are_ranked_in_both_orders(form):
    levels, prompts = [0.2, 0.9, 0.4, 0.6, 0.8], ["a", "a", "b", "a", "b"]
    app = tiny_server.scripted(pair_judge(form))
    with tiny_server.serve(app) as url:
        reward = UnifiedPairs(url=f"{url}/v1", model="u", form=form)
        found = reward(shades(*levels), prompts)
        alone = reward(shades(*[levels[k] for k in (4, 2)]), ["b", "b"])
    assert len(app.state.requests) == 2 * 4 + 2
    if form == "shares":
        assert found.value.tolist() == pytest.approx([0.225, 0.75, 0.3, 0.525, 0.7], abs=2e-3)
    else:
        assert found.value.tolist() == [0.0, 1.0, 0.0, 0.5, 1.0]
    assert alone.value.tolist() == pytest.approx([float(found.value[k]) for k in (4, 2)])
    torch.testing.assert_close(found.parts["bias"], torch.zeros(5), atol=1e-6, rtol=0)
    assert ("thoughts" in found.notes) == (form == "think")
    if form == "think":
        chain = found.notes["thoughts"][1].split("\n\n")
        assert len(chain) == 4
        assert all("against" in c and " and " in c for c in chain)


def test_a_liking_for_the_first_place_cancels():
    """With the images nearly alike, such a judge always says 1: that is no difference."""
    app = tiny_server.scripted(pair_judge("rank", bias=1.0))
    with tiny_server.serve(app) as url:
        found = UnifiedPairs(url=f"{url}/v1", model="u", form="rank")(shades(0.3, 0.5, 0.6), "x")
    assert found.value.tolist() == [0.5, 0.5, 0.5]
    assert found.parts["bias"].tolist() == [1.0, 1.0, 1.0]


def test_a_ring_of_opponents_costs_less():
    levels = [0.1, 0.9, 0.3, 0.7, 0.5, 0.8]
    app = tiny_server.scripted(pair_judge("rank"))
    with tiny_server.serve(app) as url:
        found = UnifiedPairs(url=f"{url}/v1", model="u", form="rank", opponents=2)(
            shades(*levels), "x"
        )
    assert len(app.state.requests) == 2 * 6
    assert found.value.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


def test_one_unreadable_order_is_no_comparison():
    def reply(images, text, number):
        first, second = (brightness(image) for image in images)
        if first < 0.25 and second < 0.45:  # image 0 first, image 1 second
            return "hm"
        return f"Image {1 if first > second else 2} is better"

    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        reward = UnifiedPairs(url=f"{url}/v1", model="u", form="rank")
        found = reward(shades(0.2, 0.4, 0.6), "x")
        assert found.value.tolist() == [0.0, 0.0, 1.0]
        assert found.parts["parsed"].tolist() == [0.5, 0.5, 1.0]
        with pytest.warns(UserWarning, match="2 of 2 answers could not be read"):
            lost = reward(shades(0.2, 0.4), "x")
        assert lost.value.isnan().all()
        assert not lost.valid.any()


def test_unreadable_marks_are_nan_counted_or_worst():
    def reply(images, text, number):
        return "no idea" if brightness(images[0]) > 0.5 else point_judge(images, text, number)

    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        with pytest.warns(UserWarning, match="1 of 3 answers.*row 1: 'no idea'"):
            found = Unified(url=f"{url}/v1", model="u")(shades(0.0, 1.0, 0.4), "x")
        with pytest.warns(UserWarning, match="1 of 2"):
            worst = Unified(url=f"{url}/v1", model="u", on_invalid="worst")(shades(0.0, 1.0), "x")
    assert found.value.isnan().tolist() == [False, True, False]
    assert found.valid.tolist() == [True, False, True]
    assert found.parts["parsed"].tolist() == [1.0, 0.0, 1.0]
    assert worst.value.tolist() == pytest.approx([7 / 3, 1.0])
    assert worst.valid is None


def test_the_question_can_be_the_authors(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("Rate. Caption: [{prompt}] {braces}")
    app = tiny_server.scripted(point_judge)
    with tiny_server.serve(app) as url:
        Unified(url=f"{url}/v1", model="u", template=str(path))(shades(0.1), "a {cat}")
    body, _ = app.state.requests[0]
    assert body["messages"][-1]["content"][-1]["text"] == "Rate. Caption: [a {cat}] {braces}"
    assert body["temperature"] == 0


def test_every_question_asks_for_the_form_it_reads():
    for form, known in {**POINT, **PAIR}.items():
        assert known.question.count("{prompt}") == 1, form
    assert re.search(r"Alignment Score \(1-5\): X", POINT["acs"].question)
    assert "Final Score:" in POINT["final"].question
    assert "<answer>Image 2 is better</answer>" in PAIR["think"].question
    example = PAIR["shares"].question.replace("X", "0.4").replace("Y", "0.6")
    assert read("shares", example)[0] == pytest.approx(0.4)


def test_what_cannot_work_is_said_before_any_request():
    with pytest.raises(OptionError, match="has a single one"):
        UnifiedPairs(url="http://127.0.0.1:9", model="u")(shades(0.1, 0.2, 0.3), ["a", "a", "b"])
    with pytest.raises(OptionError, match="needs a UnifiedReward-Think checkpoint"):
        UnifiedPairs(form="think")
    with pytest.raises(OptionError, match="no deciding digit"):
        UnifiedPairs(form="shares", read="expected")
    with pytest.raises(OptionError, match="one of final, acs"):
        Unified(form="shares")
    with pytest.raises(OptionError, match="must be a text file"):
        Unified(template="/no/where.txt")
    with pytest.raises(OptionError, match="http"):
        Unified(url="localhost:8000")
