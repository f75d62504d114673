"""The engine: what it merges and charges, what memory holds, and what listeners hear."""

from __future__ import annotations

import json

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.engine import Engine
from steering.errors import OptionError
from steering.requests import Progress
from steering.samplers import FK, BestOfN
from steering.scoring import Scores, resolve_reward
from steering.task import Task
from tests.engine_world import LINE, Echo, Watched, steer, tasks_of

# --- merging ----------------------------------------------------------------------------------


def test_tasks_meet_in_full_batches() -> None:
    model = Watched(("a", "b", "c"))
    tasks = tasks_of(model, [Echo(n=5), Echo(n=3), Echo(n=4)])
    Engine(model, max_batch=64).run(tasks)
    assert model.calls == [12] * 4
    assert model.decoded == [12]
    assert model.conds[0] == [0] * 5 + [1] * 3 + [2] * 4
    assert [len(t.outcome.x0) for t in tasks] == [5, 3, 4]
    assert [t.ledger.nfe for t in tasks] == [20, 12, 16]


@pytest.mark.parametrize("max_batch", [1, 5, 7, 100])
def test_different_times_share_a_batch_and_each_task_gets_its_own_rows(max_batch: int) -> None:
    """One task lags by a step, so levels mix; every task must end where it ends alone."""
    prompts = ("a", "b", "c")
    methods = [Echo(n=5, delay=2), Echo(n=3), Echo(n=4, delay=1)]
    model = Watched(prompts)
    tasks = tasks_of(model, methods)
    Engine(model, max_batch=max_batch).run(tasks)
    assert max(model.calls) <= max_batch
    if max_batch == 100:
        assert any(isinstance(t, list) for t in model.times)
        assert model.calls[:2] == [12, 12]
    for i, task in enumerate(tasks):
        alone = tasks_of(Watched(prompts), methods)[i]
        Engine(Watched(prompts)).run([alone])
        assert torch.allclose(task.outcome.x0, alone.outcome.x0, rtol=0, atol=1e-12)
        assert task.ledger.nfe == alone.ledger.nfe == methods[i].n * (4 + methods[i].delay)


def test_waiting_tasks_start_when_there_is_room() -> None:
    model = Watched(("p",) * 20)
    tasks = tasks_of(model, [Echo(n=4)] * 20)
    Engine(model, max_batch=8).run(tasks)
    assert set(model.calls) == {8}  # always full: 20 tasks of 4 rows over 4 steps
    assert len(model.calls) == 20 * 4 * 4 // 8
    for i, task in enumerate(tasks):
        alone = tasks_of(Watched(("p",) * 20), [Echo(n=4)] * 20)[i]
        Engine(Watched(("p",))).run([alone])
        assert torch.allclose(task.outcome.x0, alone.outcome.x0, rtol=0, atol=1e-12)


def test_two_runs_are_bit_identical() -> None:
    method = FK(n_particles=6, reward_scale=2.0)
    a, b = (
        steer(Watched(("a", "b")), LINE, method, seed=[4, 5], max_batch=5, nfe=200)
        for _ in range(2)
    )
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.samples, y.samples)
        assert torch.equal(x.log_weights, y.log_weights)
        events = [[{**e} for e in r.trace.events] for r in (x, y)]
        assert events[0] == events[1]


def test_seeds_name_the_noise() -> None:
    method = BestOfN(n=2, select="all")
    a, b, c = steer(Watched(("a", "b", "c")), LINE, method, seed=[1, 2, 1])
    assert torch.equal(a.samples, c.samples)
    assert not torch.equal(a.samples, b.samples)


# --- memory ------------------------------------------------------------------------------------


def test_batches_are_halved_until_memory_holds_them() -> None:
    free = steer(Watched(), LINE, BestOfN(n=40, select="all"))
    model = Watched(width=9, decode_width=5)
    tight = steer(model, LINE, BestOfN(n=40, select="all"))
    assert max(model.calls) == 5  # 40 -> 20 -> 10 -> 5, and never wider again
    assert model.calls == [5] * 8 * 4
    assert max(model.decoded) <= 5
    assert tight.ledger.nfe == 160
    assert tight.ledger.decodes == 40
    assert torch.allclose(tight.samples, free.samples, rtol=0, atol=1e-12)
    assert tight.recipe.engine["limits"]["Denoise"] == 5


def test_wide_decodes_are_cut_where_network_calls_are_not() -> None:
    model = Watched()
    Engine(model, max_batch=64).run(tasks_of(model, [Echo(n=40)]))
    assert model.calls == [40] * 4
    assert model.decoded == [16, 16, 8]


def test_a_reward_without_memory_is_halved_too() -> None:
    widths = []

    def hungry(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        widths.append(len(images))
        return images[:, 0]

    result = steer(Watched(), hungry, BestOfN(n=10, select="all"))
    assert max(widths) == 2
    assert sum(widths) == 10 == result.ledger.reward_calls


def test_memory_that_does_not_hold_one_row_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        steer(Watched(width=0), LINE, BestOfN(n=3))


def test_max_batch_must_be_positive() -> None:
    for bad in (0, -3):
        with pytest.raises(OptionError, match="max_batch must be at least 1"):
            steer(Watched(), LINE, BestOfN(n=3), max_batch=bad)


# --- progress -----------------------------------------------------------------------------------


def test_listeners_hear_every_step_of_every_task_in_order() -> None:
    heard: list[tuple[int, int, int, int]] = []

    def listener(task: Task, progress: Progress) -> None:
        heard.append((task.index, progress.step, progress.of, task.ledger.nfe))

    results = steer(Watched(("a", "b")), LINE, BestOfN(n=3), listener=listener)
    for i in (0, 1):
        mine = [h[1:] for h in heard if h[0] == i]
        assert mine == [(1, 4, 3), (2, 4, 6), (3, 4, 9), (4, 4, 12), (4, 4, 12)]
        events = results[i].trace.events
        assert [(e["step"], e["of"], e["nfe"]) for e in events] == mine
    json.dumps(results[0].trace.to_json())


def test_previews_reach_the_listener_and_stay_out_of_the_trace() -> None:
    previews = []

    def listener(task: Task, progress: Progress) -> None:
        if progress.preview is not None:
            previews.append(tuple(progress.preview.shape))

    method = FK(n_particles=5, reward_scale=1.0, checkpoints=(0.5,))
    result = steer(Watched(), LINE, method, listener=listener)
    assert previews == [(5, 1)]
    assert not any("preview" in e for e in result.trace.events)


def test_charges_of_a_merged_call_are_split_by_rows() -> None:
    class Double(Watched):
        def costs(self):
            return (2,) * len(self.grid())

        def predict(self, x, t, *, cond=0, grad=False):
            self.rows += len(x)
            return super().predict(x, t, cond=cond, grad=grad)

    model = Double(("a", "b", "c"))
    tasks = tasks_of(model, [Echo(n=5, delay=1), Echo(n=3), Echo(n=4)])
    Engine(model, max_batch=7).run(tasks)
    assert [t.ledger.nfe for t in tasks] == [50, 24, 32]
    assert sum(t.ledger.nfe for t in tasks) == model.rows
    kinds = {"denoise", "decode", "reward", "own"}
    assert all(set(t.ledger.spent) == kinds for t in tasks)


def test_tasks_with_different_rewards_do_not_share_a_call() -> None:
    model = Watched(("a", "b"))
    one, two = tasks_of(model, [BestOfN(n=2), BestOfN(n=2)])
    two.reward = resolve_reward(lambda images: images[:, 0] + 100.0)
    Engine(model).run([one, two])
    assert float(one.outcome.reward[0]) < 50 < float(two.outcome.reward[0])


def test_a_reward_that_compares_pictures_sees_each_request_whole_and_alone() -> None:
    sizes = []

    class Rank:
        name, spec, differentiable, stationary = "rank", None, False, False

        def __call__(self, images, prompts, *, metadata=None):
            sizes.append((len(images), len(set(prompts))))
            return Scores(images[:, 0].argsort().argsort().double())

    model = GaussianMixture([1.0], [0.0], [1.0], steps=2, prompts=("a", "b", "c"))
    steering.steer(model, reward=Rank(), method=BestOfN(n=6), max_batch=4)
    assert sizes == [(6, 1)] * 3
