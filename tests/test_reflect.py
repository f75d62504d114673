"""Reflection: rounds, critics, rewritten prompts, and a model asked about other texts."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.errors import OptionError, RewardError, TaskErrors
from steering.noise import NoiseKey
from steering.samplers import BestOfN, Critique, Reflect
from steering.scoring import Scores
from tests.tiny_pipelines import build

UP = LinearReward([1.0])


def line(steps: int = 4) -> GaussianMixture:
    return GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=steps, prompts=("p",))


def test_one_round_is_best_of_n():
    mine = steering.steer(line(), reward=UP, method=Reflect(rounds=1, n=5), seed=2)
    bon = steering.steer(line(), reward=UP, method=BestOfN(n=5), seed=2)
    assert torch.equal(mine.samples, bon.samples)


def test_rounds_are_independent_and_the_best_of_all_is_kept():
    method = Reflect(rounds=6, n=2)
    runs = [steering.steer(line(), reward=UP, method=method, seed=k) for k in range(3)]
    for result in runs:
        rewards = [r for row in result.trace.column("rewards") for r in row]
        assert len(set(rewards)) == 12
        assert result.best_reward == max(rewards)


def test_it_stops_at_the_first_right_picture():
    goal = 0.5
    result = steering.steer(line(), reward=UP, method=Reflect(rounds=50, target_reward=goal))
    rewards = [r for row in result.trace.column("rewards") for r in row]
    assert rewards[-1] >= goal
    assert all(r < goal for r in rewards[:-1])
    assert result.best_reward == rewards[-1]
    assert result.ledger.nfe == 4 * len(rewards)


def test_a_right_picture_beats_a_better_reward():
    """The critic wants the left mode, the reward the right one."""
    critic = lambda image, prompt: bool(image[0] < 0)  # noqa: E731
    method = Reflect(rounds=20, n=4, critic=critic)
    result = steering.steer(line(), reward=UP, method=method)
    assert float(result.samples[0, 0]) < 0
    last = result.trace.column("rewards")[-1]
    assert result.best_reward < max(last) or len(last) == 1


def test_slow_critics_answer_out_of_turn_and_stay_in_order():
    def critic(image, prompt):
        time.sleep(0.02 * float(image[0] > 0))
        return bool(image[0] > 0.3), f"{float(image[0]):.6f}"

    method = Reflect(rounds=1, n=8, critic=critic, workers=8)
    result = steering.steer(line(), reward=UP, method=method)
    said = [float(f) for f in result.trace.column("feedback")[0]]
    assert said == pytest.approx(result.trace.column("rewards")[0], abs=1e-5)


def together(critic, **options):
    """Four prompts, two pictures each, with this critic."""
    model = GaussianMixture([1.0], [0.0], [1.0], steps=3, prompts=tuple("abcd"))
    method = Reflect(rounds=2, n=2, critic=critic, workers=8, **options)
    return steering.steer(model, reward=UP, method=method, seed=[0, 1, 2, 3])


def test_critics_of_all_prompts_are_asked_together():
    """Nobody passes before all eight are there."""
    door = threading.Barrier(8, timeout=20.0)

    def critic(image, prompt):
        door.wait()
        return False, f"{prompt}{float(image[0]):.6f}"

    for prompt, result in zip("abcd", together(critic), strict=True):
        for words, rewards in zip(
            result.trace.column("feedback"), result.trace.column("rewards"), strict=True
        ):
            assert words == [f"{prompt}{r:.6f}" for r in rewards]
        assert result.ledger.spent["ask"] > 0.0


def test_a_critic_that_fails_for_one_prompt_fails_no_other():
    def critic(image, prompt):
        if prompt == "c":
            raise RuntimeError("no answer")
        return False

    with pytest.raises(TaskErrors) as caught:
        together(critic)
    assert list(caught.value.errors) == [2]
    assert "no answer" in str(caught.value.errors[2])
    assert [r is None for r in caught.value.results] == [False, False, True, False]
    assert caught.value.results[0].ledger.reward_calls == 4


def test_a_rewriter_needs_a_model_that_takes_other_prompts():
    model = line()
    with pytest.raises(OptionError, match="nothing to rewrite"):
        steering.steer(model, reward=UP, method=Reflect(rewriter=lambda p, c: p))
    assert model.rows == 0


def test_the_rewriter_sees_the_latest_critiques_once_each():
    words = iter(["dark", "dark", "small", "far", "odd"])
    seen = []

    def rewriter(prompt, critiques):
        seen.append([c.feedback for c in critiques])
        return prompt + "!"

    class Open(GaussianMixture):
        def add_prompt(self, prompt, *, like=0):
            return like

    model = Open([1.0], [0.0], [1.0], steps=3, prompts=("p",))
    method = Reflect(
        rounds=5, critic=lambda i, p: Critique(False, next(words)), rewriter=rewriter, memory=2,
        workers=1,
    )  # fmt: skip
    result = steering.steer(model, reward=UP, method=method)
    assert seen == [["dark"], ["dark"], ["small", "dark"], ["far", "small"]]
    assert result.trace.column("prompt") == ["p", "p!", "p!", "p!", "p!"]


def test_words_of_the_reward_are_feedback():
    def reward(images, prompts):
        value = images[:, 0].float()
        return Scores(value, notes={"why": [f"{float(v):.3f}" for v in value]})

    result = steering.steer(line(), reward=reward, method=Reflect(rounds=2, n=3))
    assert [len(notes["why"]) for notes in result.trace.column("notes")] == [3, 3]
    for rewards, words in zip(
        result.trace.column("rewards"), result.trace.column("feedback"), strict=True
    ):
        assert [f"{r:.3f}" for r in rewards] == words


def test_critics_that_answer_nonsense():
    for answer in ("yes", 1, (True, "a", "b")):
        with pytest.raises(RewardError, match="critic"):
            steering.steer(
                line(), reward=UP, method=Reflect(rounds=1, critic=lambda i, p, a=answer: a)
            )


def test_a_model_without_other_texts_says_so():
    method = Reflect(rounds=2, rewriter=lambda p, c: "q")
    with pytest.raises(OptionError, match="other prompts"):
        steering.steer(line(), reward=UP, method=method)
    for empty in ("", "  ", None):
        with pytest.raises(OptionError, match="rewriter"):
            steering.steer(
                line(), reward=UP, method=Reflect(rounds=2, rewriter=lambda p, c, e=empty: e)
            )


# --- a further prompt on a real pipeline ------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_an_added_prompt_predicts_as_one_that_was_wrapped(name):
    pipe, call = build(name)
    model = steering.wrap(pipe, **call)
    x = model.noise(2, NoiseKey(0, "x"))
    t = model.grid().times[1]
    other = "a small blue boat"
    cond = model.add_prompt(other)
    assert model.add_prompt(other) == cond
    assert model.prompts == (call["prompt"],)
    mine = model.predict(x, t, cond=[cond, 0])
    fresh = steering.wrap(pipe, **{**call, "prompt": other})
    torch.testing.assert_close(mine.x0[:1], fresh.predict(x[:1], t).x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.x0[1:], model.predict(x[1:], t).x0, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mine.x0[0], model.predict(x[:1], t).x0[0], atol=1e-4)
    with pytest.raises(OptionError, match="cond"):
        model.predict(x, t, cond=cond + 1)
    with pytest.raises(OptionError, match="empty"):
        model.add_prompt(" ")


def test_embeddings_cannot_be_rewritten():
    pipe, call = build("sd")
    text = {k: call.pop(k) for k in ("prompt", "negative_prompt") if k in call}
    device = pipe.device
    embeds, _ = pipe.encode_prompt(text["prompt"], device, 1, False)
    model = steering.wrap(pipe, prompt_embeds=embeds, guidance_scale=1.0,
                          num_inference_steps=3)  # fmt: skip
    with pytest.raises(OptionError, match="prompt_embeds"):
        model.add_prompt("a cat")


def test_rewritten_prompts_reach_the_network():
    pipe, call = build("sd3", steps=3)
    rewriter = lambda prompt, critiques: "a small blue boat"  # noqa: E731
    bright = lambda images, prompts: images.flatten(1).mean(1)  # noqa: E731
    changed, same = (
        steering.steer(pipe, reward=bright, method=Reflect(rounds=2, rewriter=r), **call)
        for r in (rewriter, None)
    )
    a, b = (r.trace.column("rewards") for r in (changed, same))
    assert a[0] == pytest.approx(b[0], abs=1e-6)
    assert a[1] != pytest.approx(b[1], abs=1e-6)
