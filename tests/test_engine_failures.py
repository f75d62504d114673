"""The engine: what is left when a reward, a model, a verifier or a method fails."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from steering.errors import DecodeError, RewardError, TaskErrors
from steering.ledger import Budget
from steering.requests import Progress
from steering.samplers import FK, BestOfN
from steering.scoring import Scores
from tests.engine_world import LINE, Echo, Pixels, Watched, steer


def fails_on(word: str, how):
    """A reward that fails whenever a prompt of the batch is ``word``."""

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return how(images) if word in prompts else images[:, 0]

    return reward


def boom(images: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("the judge fell asleep")


def test_one_failing_prompt_does_not_cost_the_others_anything() -> None:
    model = Watched(("a", "bad", "c"))
    method = BestOfN(n=4, select="all")
    with pytest.raises(TaskErrors, match="1 of 3 prompts failed") as caught:
        steer(model, fails_on("bad", boom), method, seed=[0, 1, 2])
    results, errors = caught.value.results, caught.value.errors
    assert list(errors) == [1]
    assert isinstance(errors[1], RewardError)
    assert "judge fell asleep" in str(errors[1])
    assert results[1] is None
    assert errors[1].result is not None
    whole = steer(Watched(("a", "b", "c")), LINE, method, seed=[0, 1, 2])
    for i in (0, 2):
        assert torch.equal(results[i].samples, whole[i].samples)
        assert results[i].ledger.reward_calls == 4
        assert results[i].ledger.nfe == 16


@pytest.mark.parametrize("max_batch", [1, 3, 4, 64])
def test_rows_that_succeeded_are_charged_once(max_batch: int) -> None:
    """A budget of exactly what is needed must be enough beside a failing neighbour."""
    model = Watched(("a", "bad", "c", "d"))
    method = FK(n_particles=4, reward_scale=1.0)
    calls = 4 + 4  # of four steps one has checkpoints: two are at its place, two at the last
    with pytest.raises(TaskErrors) as caught:
        steer(
            model,
            fails_on("bad", boom),
            method,
            budget=Budget(reward_calls=calls, nfe=16),
            max_batch=max_batch,
        )
    assert list(caught.value.errors) == [1]
    for i in (0, 2, 3):
        assert caught.value.results[i].ledger.reward_calls == calls
        assert caught.value.results[i].ledger.nfe == 16


BAD = {
    "raises": (boom, "raised ZeroDivisionError on .* images: the judge fell asleep"),
    "nan": (lambda images: images.flatten(1)[:, 0] * torch.nan, "no usable number for"),
    "inf": (lambda images: images.flatten(1)[:, 0] + torch.inf, "no usable number for"),
    "too few": (lambda images: images.flatten(1)[1:, 0], "one number per image"),
    "a scalar": (lambda images: images.mean(), "one number per image"),
    "a picture": (lambda images: images, "one number per image"),
    "text": (lambda images: "very good", "cannot be read as one number"),
}


@pytest.mark.parametrize("bad", sorted(BAD))
@pytest.mark.parametrize("late", [False, True], ids=["at once", "at the end"])
def test_a_failed_reward_leaves_the_best_so_far(tmp_path, bad: str, late: bool) -> None:
    how, message = BAD[bad]
    seen = []

    def reward(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return how(images) if len(seen) > 2 or not late else images[:, 0, 0, 0]

    method = FK(n_particles=4, reward_scale=1.0, checkpoints=(0.25, 0.5))
    with pytest.raises(RewardError, match=message) as caught:
        steer(Pixels(), reward, method, out=tmp_path)
    result = caught.value.result
    assert result is not None
    assert result.preview
    assert len(result) == 1
    assert (result.best_reward == result.best_reward) is late
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["000.png", "result.json"]
    with Image.open(tmp_path / "000.png") as picture:
        assert picture.size == (4, 4)
        assert "steering" in picture.text
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["preview"] is True
    assert report["ledger"]["reward_calls"] == (8 if late else 0)


def test_the_best_preview_is_kept_not_the_latest() -> None:
    kept = []

    def reward(images: torch.Tensor) -> torch.Tensor:
        if len(kept) == 3:
            raise ValueError("end")
        kept.append(images[:, 0, 0, 0] - 10.0 * len(kept))  # later previews score far lower
        return kept[-1]

    method = FK(n_particles=6, reward_scale=0.1, checkpoints=(0.0, 0.25, 0.5))
    with pytest.raises(RewardError) as caught:
        steer(Pixels(), reward, method)
    assert caught.value.result.best_reward == pytest.approx(float(kept[0].max()))


def test_a_list_with_a_failure_still_writes_every_folder(tmp_path) -> None:
    reward = fails_on("bad", boom)

    def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return reward(images[:, :, 0, 0], prompts)

    with pytest.raises(TaskErrors):
        steer(Pixels(("a", "bad")), red, BestOfN(n=3), out=tmp_path)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert names == ["0000/000.png", "0000/result.json", "0001/000.png", "0001/result.json"]


def test_a_failing_model_is_an_error_of_its_task_only() -> None:
    class Broken(Watched):
        def decode(self, x0, *, grad=False):
            if bool((x0 > 0).any()):
                raise FileNotFoundError("decoder lost")
            return x0

    with pytest.raises(TaskErrors) as caught:
        steer(Broken(("p",) * 12), LINE, BestOfN(n=1), seed=list(range(12)))
    bad = set(caught.value.errors)
    assert 0 < len(bad) < 12
    assert {i for i, r in enumerate(caught.value.results) if r is None} == bad


@pytest.mark.parametrize("short", [False, True])
def test_what_a_failing_decoder_was_given_is_kept(short) -> None:
    """All network calls of best-of-N are made before its one decode."""

    class Broken(Watched):
        def decode(self, x0, *, grad=False):
            if broken:
                raise torch.OutOfMemoryError("no room") if short else TypeError("no such kernel")
            return super().decode(x0, grad=grad)

    broken = False
    plain = steer(Broken(), LINE, BestOfN(n=1), seed=3)
    broken, model = True, Broken()
    with pytest.raises(DecodeError, match="could not decode 1 states") as caught:
        steer(model, LINE, BestOfN(n=1), seed=3)
    assert ("vae='tiling'" in str(caught.value)) == short
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError if short else TypeError)
    broken = False
    assert torch.equal(model.decode(caught.value.states), plain.pixels)


def test_a_failing_heldout_verifier_keeps_the_result() -> None:
    with pytest.raises(RewardError, match="fell asleep") as caught:
        steer(Watched(), LINE, BestOfN(n=3, select="all"), heldout=boom)
    assert len(caught.value.result) == 3


def test_a_verifier_that_fails_for_one_prompt_keeps_the_scores_of_the_others() -> None:
    def picky(images, prompts):
        if "b" in prompts:
            raise ValueError("no b")
        return images[:, 0]

    model = Watched(("a", "b", "c"))
    with pytest.raises(TaskErrors, match="no b") as caught:
        steer(model, LINE, BestOfN(n=2, select="all"), heldout=picky)
    assert list(caught.value.errors) == [1]
    assert caught.value.errors[1].result.prompt == "b"
    first, none, last = caught.value.results
    assert none is None
    for result in (first, last):
        assert torch.equal(result.heldout["picky"], result.samples[:, 0].float().double())
        assert result.ledger.heldout_calls == result.ledger.reward_calls == 2


def test_a_verifier_without_memory_is_halved_too() -> None:
    widths = []

    def wide(images, prompts):
        widths.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images[:, 0]

    results = steer(Watched(("a", "b")), LINE, BestOfN(n=3, select="all"), heldout=wide)
    assert widths[0] == 6
    assert all(len(r.heldout["wide"]) == 3 for r in results)


def test_an_interrupt_inside_a_verifier_keeps_the_pictures() -> None:
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    result = steer(Watched(), LINE, BestOfN(n=2), heldout=interrupted)
    assert result.cancelled
    assert not result.preview
    assert result.heldout == {}


def test_verifiers_of_one_name_are_told_apart() -> None:
    ways = [lambda x, p: x[:, 0], lambda x, p: -x[:, 0]]
    held = steer(Watched(), LINE, BestOfN(n=1), heldout=ways).heldout
    assert list(held) == ["<lambda>#0", "<lambda>#1"]
    assert torch.equal(held["<lambda>#0"], -held["<lambda>#1"])


@pytest.mark.parametrize("part", [0.5, None, torch.zeros(()), torch.zeros(1)])
def test_parts_that_do_not_fit_are_an_error_of_the_reward(part) -> None:
    def odd(images, prompts):
        return Scores(images[:, 0], {"odd": part})

    with pytest.raises(RewardError, match="part 'odd' must be a tensor with one entry per image"):
        steer(Watched(), odd, BestOfN(n=2))


def test_a_reward_object_that_returns_no_scores() -> None:
    class Bare:
        name, spec, differentiable = "bare", None, False

        def __call__(self, images, prompts, *, metadata=None):
            return images[:, 0]

    with pytest.raises(RewardError, match="'bare' returned Tensor"):
        steer(Watched(), Bare(), BestOfN(n=2))


def test_a_method_must_return_an_outcome() -> None:
    class Silent(BestOfN):
        def run(self, ctx):
            yield Progress(step=1, of=1)

    with pytest.raises(TypeError, match="returned None, no Outcome"):
        steer(Watched(), LINE, Silent(n=1))


def test_a_request_that_is_none_is_refused() -> None:
    class Odd(Echo):
        def run(self, ctx):
            yield "a picture, please"

    with pytest.raises(TypeError, match="no Request"):
        steer(Watched(), LINE, Odd(n=1))
