"""The judge: here against a server with the same model, against plain loops, and bad answers."""

from __future__ import annotations

import base64
import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward
from steering.rewards.vlm import VLM, json_object, number
from steering.rewards.wire import RemoteError
from tests import tiny_judges, tiny_server

PROMPTS = ["a red apple", "two cats", "a blue dog and an apple", "x", "No", "a photo", "yes"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_judges.qwen_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def server(qwen):
    with tiny_server.serve(tiny_server.model_app(qwen)) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (7, 5, 6, 3)).astype(np.uint8)
    return [Image.fromarray(c).resize((64, 50), Image.Resampling.BICUBIC) for c in coarse]


def tensor(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) for p in pictures]) / 255


@torch.no_grad()
def plain_probabilities(folder, picture, text):
    """Spelling -> probability at the first place of the answer, for one PIL image."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    p = model(**inputs).logits[0, -1].softmax(-1)
    return {processor.tokenizer.decode([k]): float(v) for k, v in enumerate(p)}


def test_marks_are_expectations_over_digits(qwen, pictures):
    reward = VLM(model=str(qwen), precision="fp32", aspects="colour; the sharp edges")
    found = reward(tensor(pictures[:3]), PROMPTS[:3])
    for k in range(3):
        p = plain_probabilities(
            qwen, pictures[k],
            f'This image was made for the text "{PROMPTS[k]}". Judge its the sharp edges with a '
            "mark from 1 (worst) to 5 (best). Answer with the number only.",
        )  # fmt: skip
        marks = {d: p.get(str(d), 0) + p.get(f" {d}", 0) for d in range(1, 6)}
        expected = sum(d * v for d, v in marks.items()) / sum(marks.values())
        assert float(found.parts["the_sharp_edges"][k]) == pytest.approx(expected, abs=1e-3)
        assert float(found.parts["mass"][k]) <= sum(marks.values()) + 1e-4
    mean = (found.parts["the_sharp_edges"] + found.parts["colour"]) / 2
    torch.testing.assert_close(found.value, mean)
    assert found.value.std() > 0.01
    assert as_reward(reward.spec) == reward


@pytest.mark.parametrize("task", ["rubric", "yes_no", "checklist"])
def test_a_batch_equals_single_calls_in_any_order(qwen, pictures, task):
    reward = VLM(
        model=str(qwen), precision="fp32", task=task, batch_size=5, aspects="colour; shape",
        checklist="Is there a cat?; Is it {prompt}?",
    )  # fmt: skip
    x = tensor(pictures)
    together = reward(x, PROMPTS).value
    assert together.std() > 1e-3
    alone = torch.cat([reward(x[k : k + 1], PROMPTS[k]).value for k in range(7)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    order = [6, 2, 0, 5, 1, 3, 4]
    mixed = reward(x[order], [PROMPTS[k] for k in order]).value
    torch.testing.assert_close(mixed, together[order], rtol=1e-5, atol=1e-5)


def test_the_server_gives_what_the_model_gives_here(qwen, server, pictures):
    x, prompts = tensor(pictures)[:4], PROMPTS[:4]
    for options in ({"task": "yes_no"}, {"task": "rubric", "aspects": "colour"}):
        here = VLM(model=str(qwen), precision="fp32", **options)(x, prompts)
        there = VLM(model="tiny", url=server, concurrency=3, **options)(x, prompts)
        torch.testing.assert_close(there.value, here.value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(there.parts["mass"], here.parts["mass"], rtol=1e-2, atol=1e-4)


def test_written_answers_are_the_same_here_and_there(qwen, server, pictures):
    options = {"task": "yes_no", "read": "text", "max_new_tokens": 5, "on_invalid": "worst"}
    x = tensor(pictures[:3])
    with pytest.warns(UserWarning, match="could not be read"):
        here = VLM(model=str(qwen), precision="fp32", **options)(x, PROMPTS[:3])
    with pytest.warns(UserWarning, match="could not be read"):
        there = VLM(model="tiny", url=server, **options)(x, PROMPTS[:3])
    assert here.notes["reply"] == there.notes["reply"]
    assert len(set(here.notes["reply"])) > 1


def test_local_replies_carry_their_probabilities(qwen, pictures):
    reward = VLM(model=str(qwen), precision="fp32")
    from steering.rewards.chat import Ask

    ask = Ask(text="Is it a cat?", images=(tensor(pictures)[0],))
    (reply,) = reward._chat("cpu").write([ask], 4)
    p = plain_probabilities(qwen, pictures[0], "Is it a cat?")
    best = sorted(p, key=lambda k: -p[k])
    assert reply.tokens[0] == best[0]
    assert set(list(reply.top[0])[:3]) == set(best[:3])
    assert math.exp(reply.top[0][best[0]]) == pytest.approx(p[best[0]], abs=1e-3)
    assert len(reply.top) == len(reply.tokens)
    (bare,) = reward._chat("cpu").write([ask], 4, probabilities=False)
    assert (bare.text, bare.top) == (reply.text, ())


def scripted(reply, **options):
    return tiny_server.scripted(reply), {"model": "m", "pause": 0} | options


def shades(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def level(image):
    return float(np.asarray(image).mean()) / 255


def test_a_rubric_is_read_from_json():
    def reply(images, text, number):
        mark = round(1 + 4 * level(images[0]))
        return f'Sure:\n```json\n{{"Visual Quality": {mark}, "composition": "{mark - 1}/5"}}\n```'

    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        reward = VLM(
            model="m", url=f"{url}/v1", read="text", aspects="visual quality; composition", low=0
        )
        found = reward(shades(0.0, 1.0, 0.5), "x")
    assert found.parts["visual_quality"].tolist() == [1.0, 5.0, 3.0]
    assert found.value.tolist() == [0.5, 4.5, 2.5]


@pytest.mark.parametrize(
    "text",
    ["", "five", '{"quality": 6}', '{"quality": true}', '{"quality": "good"}', '{"quality": [3]}',
     '{"other": 3}', '{"quality": 3', '{"quality": NaN}'],
)  # fmt: skip
def test_bad_rubric_answers_are_nan_and_counted(text):
    def reply(images, question, number):
        return '{"quality": 4}' if level(images[0]) > 0.5 else text

    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        reward = VLM(model="m", url=f"{url}/v1", read="text", aspects="quality")
        with pytest.warns(UserWarning, match="1 of 3 answers"):
            found = reward(shades(0.9, 0.1, 0.8), "x")
    assert found.value.isnan().tolist() == [False, True, False]
    assert found.valid.tolist() == [True, False, True]
    assert found.parts["parsed"].sum() == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("Yes", 1), ("yes, it does.", 1), ("**No**", 0), ("The answer is no.", 0), ("Nope", math.nan),
     ("Yes and no", math.nan), ("", math.nan), ("Yesterday", math.nan)],
)  # fmt: skip
def test_yes_and_no_are_read_from_text(text, value):
    with tiny_server.serve(tiny_server.scripted(lambda i, t, n: text)) as url:
        reward = VLM(model="m", url=f"{url}/v1", task="yes_no", read="text", on_invalid="nan")
        if math.isnan(value):
            with pytest.warns(UserWarning, match="1 of 1"):
                assert math.isnan(float(reward(shades(0.5), "x").value))
        else:
            assert float(reward(shades(0.5), "x").value) == value


def test_a_checklist_of_its_own_for_each_image():
    def reply(images, text, number):
        yes = 0.8 if "cat" in text else 0.2
        top = {"Yes": math.log(yes * 0.9), " no": math.log((1 - yes) * 0.9), "x": math.log(0.1)}
        return tiny_server.answer("Yes", [("Yes", top)])

    metadata = [
        {"questions": ["Is there a cat?", "Is there a dog?"], "weights": [3, 1]},
        {"questions": ["Is {prompt} a cat?"]},
        None,
    ]
    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        reward = VLM(model="m", url=f"{url}/v1", task="checklist", checklist="a dog?; a cat?")
        found = reward(shades(0.1, 0.2, 0.3), ["x", "y", "z"], metadata=metadata)
    assert found.value.tolist() == pytest.approx([0.65, 0.8, 0.5])
    assert found.parts["q0"].tolist() == pytest.approx([0.8, 0.8, 0.2])
    assert found.parts["q1"].isnan().tolist() == [False, True, False]
    assert found.parts["mass"].tolist() == pytest.approx([0.9] * 3)


def test_no_weight_on_any_answer_is_unreadable():
    top = {"maybe": -0.001, "Yes": -9.0}
    app = tiny_server.scripted(lambda i, t, n: tiny_server.answer("maybe", [("maybe", top)]))
    with tiny_server.serve(app) as url:
        reward = VLM(model="m", url=f"{url}/v1", task="yes_no")
        with pytest.warns(UserWarning, match="no weight on its answers"):
            assert reward(shades(0.5), "x").value.isnan().all()


def test_what_a_server_leaves_out_is_told():
    def reply(images, text, number):
        top = {"4": math.log(0.3), "Well": math.log(0.5)} if level(images[0]) < 0.5 else None
        return tiny_server.answer("Well", [("Well", top)] if top else None)

    app = tiny_server.scripted(reply)
    with tiny_server.serve(app) as url:
        reward = VLM(model="m", url=f"{url}/v1", aspects="q")
        with pytest.warns(UserWarning, match=r"less than 50%.*20 likeliest"):
            found = reward(shades(0.1), "x")
        with pytest.raises(RemoteError, match=r"gives no log-probabilities.*read=text"):
            reward(shades(0.9), "x")
    assert (float(found.value), bool(found.valid.all())) == (4.0, True)
    assert float(found.parts["mass"]) == pytest.approx(0.3)
    body, _ = app.state.requests[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)


def test_requests_hold_exact_pictures_and_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    app = tiny_server.scripted(lambda i, t, n: '{"q": 3}')
    x = (torch.arange(192).view(1, 3, 8, 8) % 256) / 255
    with tiny_server.serve(app) as url:
        VLM(model="m", url=f"{url}/v1", read="text", aspects="q", key_env="MY_KEY")(x, "x")
    body, headers = app.state.requests[0]
    assert headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], "logprobs" in body) == ("m", 0, False)
    data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert base64.b64decode(data).startswith(b"\x89PNG")
    (image,), _ = tiny_server.pictures_of(body)
    assert np.array_equal(np.asarray(image), (x[0] * 255).round().byte().movedim(0, -1).numpy())


def test_a_slow_answer_stays_in_its_row_and_a_busy_server_is_asked_again():
    def reply(images, text, number):
        if number in (0, 3):
            return 503
        time.sleep(0.2 * (level(images[0]) < 0.2))
        return json.dumps({"q": round(1 + 4 * level(images[0]))})

    app = tiny_server.scripted(reply)
    with tiny_server.serve(app) as url:
        reward = VLM(model="m", url=f"{url}/v1", read="text", aspects="q", concurrency=4)
        found = reward(shades(0.0, 1.0, 0.25, 0.5, 0.75), "x")
    assert found.value.tolist() == [1, 5, 2, 3, 4]
    assert len(app.state.requests) == 7


@pytest.mark.parametrize("read", ["text", "expected"])
def test_what_was_answered_before_the_server_died_is_kept(read):
    def reply(images, text, number):
        if level(images[0]) > 0.7:
            return 500
        top = {"3": -0.1, "4": -5.0}
        return tiny_server.answer('{"q": 3}', [("3", top)])

    with tiny_server.serve(tiny_server.scripted(reply)) as url:
        reward = VLM(model="m", url=f"{url}/v1", read=read, aspects="q", concurrency=1, retries=0)
        with pytest.raises(RemoteError, match=r"1 tries.*HTTP 500") as caught:
            reward(shades(0.1, 0.2, 0.9, 0.3), "x")
    scores = caught.value.scores
    assert scores.valid.tolist() == [True, True, False, False]
    assert scores.value[:2].tolist() == pytest.approx([3.0, 3.0], abs=0.02)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"<html>", "is not JSON"), ({"choices": []}, "OpenAI's chat format"), (400, "refused"),
     ({"error": "x"}, "OpenAI's chat format")],
)  # fmt: skip
def test_servers_that_speak_something_else(answer, said):
    with tiny_server.serve(tiny_server.scripted(lambda i, t, n: answer)) as url:
        reward = VLM(model="m", url=f"{url}/v1", read="text", retries=0)
        with pytest.raises(RemoteError, match=said):
            reward(shades(0.5), "x")


def test_a_time_out_and_an_absent_server():
    app = tiny_server.scripted(lambda i, t, n: time.sleep(1.0) or "x")
    with tiny_server.serve(app) as url:
        reward = VLM(model="m", url=f"{url}/v1", read="text", retries=0, timeout=0.1)
        with pytest.raises(RemoteError, match=r"in 1 tries of at most 0\.1 s"):
            reward(shades(0.5), "x")
    with pytest.raises(RemoteError, match="Is the server running"):
        VLM(model="m", url="http://127.0.0.1:9/v1", retries=0)(shades(0.5), "x")


def test_options_are_checked_at_once(tmp_path, qwen):
    for options, said in (
        ({"task": "rubrics"}, "give rubric"),
        ({"read": "mind"}, "give expected"),
        ({"low": 0, "high": 10}, "one token"),
        ({"on_invalid": "zero"}, "nan or worst"),
        ({"batch_size": 0}, "1 or more"),
        ({"url": "ftp://x"}, "http"),
        ({"precision": "int4"}, "fp32, bf16, fp16"),
    ):
        with pytest.raises(OptionError, match=said):
            VLM(**options)
    with pytest.raises(OptionError, match="0 questions"):
        VLM(task="checklist", model=str(qwen))(shades(0.5), "x")
    with pytest.raises(WeightsError, match="no folder"):
        VLM(model="./absent").for_model(None)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = tiny_judges.qwen_vl(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="no chat template"):
        VLM(model=str(folder)).for_model(None)


def test_small_readers():
    assert json_object('x {bad} {"a": {"b": 1}} {"c": 2}') == {"a": {"b": 1}}
    assert number("4/5") == 4.0
    assert math.isnan(number("4 stars"))
    assert math.isnan(number(10**400))
    assert json_object('{"a":' * 100_000) == {}
