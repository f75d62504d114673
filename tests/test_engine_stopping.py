"""The engine: runs that are cancelled, interrupted or out of budget keep their best so far."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest
import torch

from steering.errors import BudgetError, SteeringError
from steering.ledger import Budget
from steering.requests import Decode, Denoise, Outcome, Score
from steering.samplers import FK, BestOfN
from tests.engine_world import LINE, Echo, Pixels, Watched, steer


class Switch:
    """Turns to True at the k-th time it is asked."""

    def __init__(self, k: int) -> None:
        self.left = k

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_cancelling_returns_the_best_so_far(tmp_path) -> None:
    method = FK(n_particles=4, reward_scale=1.0, checkpoints=(0.25, 0.5))

    def red(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, 0]

    result = steer(Pixels(), red, method, cancelled=Switch(6), out=tmp_path)
    assert result.cancelled
    assert result.preview
    assert len(result) == 1
    assert result.best_reward == pytest.approx(float(result.pixels[0, 0, 0, 0]))
    assert result.ledger.nfe < 16
    assert json.loads((tmp_path / "result.json").read_text())["cancelled"] is True
    assert (tmp_path / "000.png").is_file()


def test_a_finished_picture_beats_any_preview() -> None:
    """Previews score high, finished pictures low; the run stops between two chunks of them."""

    @dataclass(frozen=True, kw_only=True)
    class Slow(Echo):
        def run(self, ctx):
            x = ctx.noise(4)
            yield Score(x + 100.0, x)
            yield Score(x, x, final=True)
            yield Score(x + 200.0, x)
            yield Score(x - 1.0, x - 1.0, final=True)
            raise KeyboardInterrupt

    result = steer(Watched(), LINE, Slow(n=4))
    assert result.cancelled
    assert not result.preview
    assert result.best_reward == pytest.approx(float(result.samples[0]))
    assert result.best_reward < 50.0


def test_cancelling_before_any_preview_decodes_one() -> None:
    result = steer(Watched(), LINE, BestOfN(n=4), cancelled=Switch(2))
    assert result.cancelled
    assert result.preview
    assert result.ledger.decodes == 1
    assert result.best_reward == pytest.approx(float(result.samples[0]))


def test_cancelling_at_once_is_an_error_not_an_empty_result() -> None:
    with pytest.raises(SteeringError, match="before there was anything"):
        steer(Watched(), LINE, BestOfN(n=4), cancelled=lambda: True)


def test_cancelling_many_keeps_the_finished_ones() -> None:
    model = Watched(("p",) * 6)
    results = steer(model, LINE, BestOfN(n=2, select="all"), max_batch=2, cancelled=Switch(12))
    done = [r for r in results if r is not None and not r.cancelled]
    assert 0 < len(done) < 6
    assert all(len(r) == 2 and not r.preview for r in done)


def test_an_interrupt_inside_a_method_marks_it_as_cancelled() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted(Echo):
        def run(self, ctx):
            t, _ = next(ctx.grid.steps())
            yield Denoise(ctx.noise(self.n), t)
            raise KeyboardInterrupt

    result = steer(Watched(), LINE, Interrupted(n=2))
    assert result.cancelled


def test_an_interrupt_inside_a_reward_keeps_the_pictures() -> None:
    def stop(images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    result = steer(Watched(), stop, BestOfN(n=2))
    assert result.cancelled
    assert len(result) == 1


def test_seconds_are_a_budget() -> None:
    """A run whose time is over ends like a cancelled one, with its best so far."""

    class Slow(Watched):
        def predict(self, *args, **kwargs):
            time.sleep(0.02)
            return super().predict(*args, **kwargs)

    short = steer(Slow(), LINE, BestOfN(n=4), budget=Budget(seconds=0.05))
    assert short.cancelled
    assert short.preview
    assert len(short) == 1
    with pytest.raises(SteeringError, match="before there was anything to show"):
        steer(Watched(), LINE, BestOfN(n=4), budget=Budget(seconds=1e-9))
    result = steer(Watched(), LINE, BestOfN(n=4), budget=Budget(seconds=3600.0))
    assert 0.0 < result.ledger.seconds < 3600.0


def test_a_method_may_catch_the_end_of_its_budget() -> None:
    """That is what an anytime method does."""

    class Anytime(Echo):
        def run(self, ctx):
            t, _ = next(ctx.grid.steps())
            x, count = ctx.noise(1), 0
            try:
                while True:
                    yield Denoise(x, t)
                    count += 1
            except BudgetError:
                pass
            images = yield Decode(x)
            scores = yield Score(images, x, final=True)
            log_w = torch.full((1,), float(count), dtype=torch.float64)
            return Outcome(x0=x, images=images, reward=scores.value.double(), log_w=log_w)

    result = steer(Watched(), LINE, Anytime(n=1), nfe=7)
    assert result.log_weights.tolist() == [7.0]
    assert result.ledger.nfe == 7


# Within a call that is cut into chunks


def stopping(error: type[BaseException], chunk: int):
    """A reward that fails at its k-th chunk, and the values it gave before."""
    given: list[float] = []

    def reward(images: torch.Tensor) -> torch.Tensor:
        if len(given) >= 2 * (chunk - 1):
            raise error("stop")
        given.extend(images[:, 0].tolist())
        return images[:, 0]

    return reward, given


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_rewards_known_before_a_call_failed_decide_the_best(error) -> None:
    reward, given = stopping(error, chunk=4)
    if error is KeyboardInterrupt:
        result = steer(Watched(), reward, BestOfN(n=12), max_batch=2)
    else:
        with pytest.raises(SteeringError) as caught:
            steer(Watched(), reward, BestOfN(n=12), max_batch=2)
        result = caught.value.result
    assert len(given) == 6
    assert given.index(max(given)) not in (0, 5)  # neither the first nor the last is the answer
    assert not result.preview
    assert result.best_reward == pytest.approx(max(given))
    assert float(result.samples[0]) == pytest.approx(max(given))
    assert result.ledger.reward_calls == 6


def test_rewards_of_every_prompt_of_a_call_are_kept() -> None:
    reward, given = stopping(KeyboardInterrupt, chunk=5)
    model = Watched(("p", "q", "r"))
    results = steer(model, reward, BestOfN(n=4), max_batch=2, seed=[0, 1, 2])
    found = [r.best_reward for r in results[:2]]
    assert found == pytest.approx([max(given[:4]), max(given[4:])])
    assert all(r.ledger.reward_calls == 4 for r in results[:2])


def test_a_finished_picture_that_could_not_be_scored_is_no_preview() -> None:
    reward, _ = stopping(ValueError, chunk=1)
    with pytest.raises(SteeringError) as caught:
        steer(Watched(), reward, BestOfN(n=2))
    assert not caught.value.result.preview


def test_a_stop_is_noticed_between_the_chunks_of_a_call() -> None:
    model = Watched()
    result = steer(
        model, LINE, BestOfN(n=64), max_batch=2, cancelled=lambda: len(model.calls) >= 5
    )
    assert result.cancelled
    assert len(model.calls) == 5


def test_seconds_are_looked_at_between_the_chunks_of_a_call() -> None:
    class Slow(Watched):
        def predict(self, x, t, **more):
            time.sleep(0.05)
            return super().predict(x, t, **more)

    model = Slow()
    result = steer(model, LINE, BestOfN(n=64), max_batch=2, budget=Budget(seconds=0.2))
    assert result.cancelled
    assert 4 <= len(model.calls) <= 5


def test_verdicts_on_what_was_found_outlive_the_stop() -> None:
    """More pictures than one call takes are judged though the run was stopped."""
    model = Watched(("p",) * 6)
    stop = lambda: len(model.decoded) > 2  # noqa: E731
    held = lambda images: -images[:, 0]  # noqa: E731
    results = steer(model, LINE, BestOfN(n=1), max_batch=2, cancelled=stop, heldout=held)
    done = [r for r in results if r is not None]
    assert len(done) > 2
    assert all(len(v) == 1 for r in done for v in r.heldout.values())
    assert all(r.heldout for r in done)
