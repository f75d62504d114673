"""Gradients of many tasks from one graph: values, merging, memory, errors and charges."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import dataclass

import pytest
import torch

import steering
from steering.analytic import FiniteChain, GaussianMixture, QuadraticReward, TableReward
from steering.engine import Engine
from steering.errors import BudgetError, OptionError, RewardError, SteeringError
from steering.ledger import Budget
from steering.method import Plan
from steering.noise import NoiseKey
from steering.requests import Decode, Denoise, Gradient, Outcome, Score
from steering.samplers import BestOfN
from steering.scoring import resolve_reward
from steering.task import Task
from tests.tiny_pipelines import build

BOWL = QuadraticReward([1.0, -0.5], 2.0)


class Watched(GaussianMixture):
    """A mixture in two dimensions that remembers the width of its calls."""

    def __init__(self, n: int = 1, *, width: int = 10**9, decode_width: int = 10**9) -> None:
        prompts = tuple(f"p{i}" for i in range(n))
        means = [[-1.0, 0.3], [1.0, 0.8]]
        super().__init__([0.4, 0.6], means, [0.4, 0.6], steps=4, prompts=prompts)
        self.width, self.decode_width = width, decode_width
        self.calls: list[int] = []
        self.decoded: list[int] = []

    def predict(self, x, t, *, cond=0, grad=False):
        if len(x) > self.width:
            raise torch.OutOfMemoryError("out of memory")
        self.calls.append(len(x))
        return super().predict(x, t, cond=cond, grad=grad)

    def decode(self, x0, *, grad=False):
        if len(x0) > self.decode_width:
            raise torch.OutOfMemoryError("out of memory")
        self.decoded.append(len(x0))
        return torch.tanh(x0) if grad else torch.tanh(x0).detach()


@dataclass(frozen=True, kw_only=True)
class Climb(BestOfN):
    """Steps up the reward of the estimate at every level; some tasks linger, some fail."""

    n: int = 2
    delay: int = 0
    fail_at: int | None = None
    chain: int = 1
    checkpoint: bool = False
    name = "climb"
    needs_gradient = True

    def run(self, ctx):
        x = ctx.noise(self.n)
        slopes = []
        for i, (t, u) in enumerate(ctx.grid.steps()):
            for _ in range(self.delay if i == 1 else 0):
                yield Denoise(x, t)
            slope = yield from self.slope(x, ctx.grid.times[i : i + self.chain])
            slopes.append(slope)
            if self.fail_at == i:
                raise SteeringError("gave up")
            prediction = yield Denoise(x, t)
            x = ctx.move(x, prediction, t, u, self.kernel(), step=i) + 0.1 * slope
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        zeros = torch.zeros(self.n, dtype=torch.float64)
        return Outcome(
            x0=torch.cat([x, *slopes], 1), images=images, reward=scores.value.double(), log_w=zeros
        )

    def slope(self, x, times):
        leaf = x.clone().requires_grad_()
        state = leaf
        for t in times:
            prediction = yield Denoise(state, t, grad=True, checkpoint=self.checkpoint)
            state = 0.3 * state + 0.7 * prediction.x0
        images = yield Decode(state, grad=True, checkpoint=self.checkpoint)
        scores = yield Score(images, state.detach(), grad=True)
        return (yield Gradient(scores.value, leaf))


def tasks_of(model, methods, reward=BOWL, budget=None) -> list[Task]:
    plan = Plan(grid=model.grid(), costs=model.costs(), budget=budget or Budget())
    guide = resolve_reward(reward)
    return [
        Task(
            index=i,
            prompt=model.prompts[i],
            cond=i,
            seed=i,
            method=method,
            plan=plan,
            reward=guide,
        )
        for i, method in enumerate(methods)
    ]


def run(model, methods, *, reward=BOWL, max_batch=64, budget=None) -> list[Task]:
    tasks = tasks_of(model, methods, reward, budget)
    Engine(model, max_batch=max_batch).run(tasks)
    return tasks


def alone(methods, reward=BOWL) -> list[Task]:
    model = Watched(len(methods))
    tasks = tasks_of(model, methods, reward)
    for task in tasks:
        Engine(model).run([task])
    return tasks


def same(a: list[Task], b: list[Task]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.error is None, one.error
        torch.testing.assert_close(one.outcome.x0, other.outcome.x0, rtol=0, atol=1e-12)
        assert one.ledger.nfe == other.ledger.nfe
        assert one.ledger.nfe_backward == other.ledger.nfe_backward


# --- one pass for all --------------------------------------------------------------------------


def test_eight_tasks_share_calls_and_get_what_each_gets_alone() -> None:
    model = Watched(8)
    tasks = run(model, [Climb(n=1 + i % 3) for i in range(8)])
    same(tasks, alone([Climb(n=1 + i % 3) for i in range(8)]))
    rows = sum(1 + i % 3 for i in range(8))
    assert model.calls == [rows] * 8  # as many calls as one task makes alone: two a level
    assert [t.ledger.nfe_backward for t in tasks] == [4 * (1 + i % 3) for i in range(8)]
    assert [t.ledger.decodes_backward for t in tasks] == [4 * (1 + i % 3) for i in range(8)]
    assert [t.ledger.reward_backward for t in tasks] == [4 * (1 + i % 3) for i in range(8)]
    assert all(t.ledger.spent["backward"] > 0 for t in tasks)


def test_the_slope_is_that_of_the_closed_form() -> None:
    model = Watched()
    (task,) = run(model, [Climb(n=3, chain=2)])
    noise = model.noise(3, NoiseKey(0, "init")).requires_grad_()
    state = noise
    for t in model.grid().times[:2]:
        state = 0.3 * state + 0.7 * model.posterior(state, t).x0
    (want,) = torch.autograd.grad(BOWL(torch.tanh(state)).sum(), noise)
    torch.testing.assert_close(task.outcome.x0[:, 2:4], want)


def test_tasks_at_different_paces_and_lengths() -> None:
    methods = [Climb(delay=2), Climb(n=3), Climb(chain=3), Climb(n=1, delay=1, chain=2)]
    same(run(Watched(4), methods), alone(methods))


def test_the_fast_wait_for_the_slow_before_anything_is_differentiated() -> None:
    methods = [Climb(chain=1), Climb(chain=3), Climb(delay=2)]
    tasks = tasks_of(Watched(3), methods)
    engine, passes = Engine(Watched(3)), []
    real = engine.graphs._backward
    engine.graphs._backward = lambda requests, keep: (
        passes.append(len(requests)) or real(requests, keep)
    )
    engine.run(tasks)
    same(tasks, alone(methods))
    assert passes == [3] * 4


def test_rows_alive_in_graphs_are_never_more_than_a_batch() -> None:
    graphs: list[tuple[weakref.ref, int]] = []
    most = []

    class Counted(Watched):
        def predict(self, x, t, *, cond=0, grad=False):
            out = super().predict(x, t, cond=cond, grad=grad)
            if grad:
                graphs.append((weakref.ref(out.x0), len(x)))
                most.append(sum(n for ref, n in graphs if ref() is not None))
            return out

    tasks = run(Counted(4), [Climb(n=3)] * 4, max_batch=4)
    same(tasks, alone([Climb(n=3)] * 4))
    assert max(most) == 3  # two tasks of three rows are in flight, and would make six


@pytest.mark.parametrize("max_batch", [1, 3, 5])
def test_rows_with_a_graph_are_bounded(max_batch: int) -> None:
    methods = [Climb(n=2, chain=1 + i % 2) for i in range(6)]
    model = Watched(6)
    same(run(model, methods, max_batch=max_batch), alone(methods))
    assert max(model.calls) <= max_batch


def test_two_rewards_and_one_backward_pass() -> None:
    model = Watched(2)
    tasks = tasks_of(model, [Climb(), Climb()])
    tasks[1].reward = resolve_reward(QuadraticReward([-2.0, 0.0], 1.0))
    passes = []
    engine = Engine(model)
    real = engine.graphs._backward
    engine.graphs._backward = lambda requests, keep: (
        passes.append(len(requests)) or real(requests, keep)
    )
    engine.run(tasks)
    assert passes == [2] * 4
    other = tasks_of(Watched(2), [Climb(), Climb()])
    other[1].reward = tasks[1].reward
    for task in other:
        Engine(Watched(2)).run([task])
    same(tasks, other)


def test_checkpointed_calls_give_the_same_and_count_what_runs_again() -> None:
    plain = run(Watched(3), [Climb(chain=3)] * 3)
    model = Watched(3)
    again = run(model, [Climb(chain=3, checkpoint=True)] * 3)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.outcome.x0, b.outcome.x0)
        assert b.ledger.nfe == a.ledger.nfe
        assert b.ledger.nfe_recomputed == a.ledger.nfe_backward == b.ledger.nfe_backward
        assert a.ledger.nfe_recomputed == 0


@pytest.mark.parametrize("name", ["sd3"])
def test_real_pipelines_replay_checkpointed_calls(name: str) -> None:
    """Network, guidance and decoder run again inside the backward pass, to the same bits."""
    pipe, call = build(name)
    for part in (pipe.vae, getattr(pipe, "unet", None) or pipe.transformer):
        part.requires_grad_(False)
    call["prompt"] = [call["prompt"], "a boat"]
    call["negative_prompt"] = [""] * 2
    ends = []
    for again in (False, True):
        with steering.wrap(pipe, **call) as model:
            method = Climb(n=1, chain=2, checkpoint=again)
            tasks = tasks_of(model, [method] * 2, lambda images: images.mean((1, 2, 3)))
            rows = model.rows
            Engine(model).run(tasks)
            spent = sum(t.ledger.nfe + t.ledger.nfe_recomputed for t in tasks)
            assert model.rows - rows == spent
        assert [t.error for t in tasks] == [None, None]
        assert all(bool((t.ledger.nfe_recomputed > 0) == again) for t in tasks)
        ends.append([t.outcome.x0 for t in tasks])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


# --- when something goes wrong -----------------------------------------------------------------


def test_a_task_that_dies_in_between_costs_the_others_nothing() -> None:
    methods = [Climb(), Climb(fail_at=1), Climb(n=3)]
    tasks = run(Watched(3), methods)
    assert "gave up" in str(tasks[1].error)
    good = alone(methods)
    same([tasks[0], tasks[2]], [good[0], good[2]])


def test_a_task_that_dies_in_between_frees_its_place() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Dies(Climb):
        def slope(self, x, times):
            yield Denoise(x.clone().requires_grad_(), times[0], grad=True)
            raise SteeringError("gave up")

    model = Watched(3)
    tasks = run(model, [Dies(n=4), Climb(n=2), Climb(n=2)], max_batch=4)
    assert "gave up" in str(tasks[0].error)
    assert model.calls == [4] * 9


def test_a_reward_that_fails_for_one_prompt() -> None:
    def picky(images, prompts):
        if "p1" in prompts and torch.is_grad_enabled():
            raise ValueError("not this one")
        return BOWL(images)

    methods = [Climb(), Climb(), Climb(n=3)]
    tasks = run(Watched(3), methods, reward=picky)
    assert isinstance(tasks[1].error, RewardError)
    good = alone(methods)
    same([tasks[0], tasks[2]], [good[0], good[2]])


@pytest.mark.parametrize("limit", [{"width": 5}, {"decode_width": 4}])
def test_memory_is_halved_and_graphs_wait_for_each_other(limit) -> None:
    methods = [Climb(n=2) for _ in range(6)]
    model = Watched(6, **limit)
    same(run(model, methods), alone(methods))
    assert max(model.calls) <= limit.get("width", 12)
    assert max(model.decoded) <= limit.get("decode_width", 12)


def test_a_backward_pass_without_memory_is_split_and_later_ones_are_narrower() -> None:
    methods = [Climb(n=2) for _ in range(6)]
    model = Watched(6)
    tasks = tasks_of(model, methods)
    engine = Engine(model, max_batch=12)
    real, widths = engine.graphs._backward, []

    def narrow(requests, keep):
        if len(requests) > 2:
            raise torch.OutOfMemoryError("out of memory")
        widths.append(len(requests))
        return real(requests, keep)

    engine.graphs._backward = narrow
    engine.run(tasks)
    same(tasks, alone(methods))
    assert max(widths) <= 2
    assert engine.limits[Denoise] == 3  # 12 -> 6 -> 3: one task of two rows at a time
    assert max(model.calls[2:]) <= 3


def test_cancelling_leaves_the_best_so_far() -> None:
    model = Watched(2)
    calls = iter(range(100))
    tasks = tasks_of(model, [Climb(), Climb()])
    Engine(model, cancelled=lambda: next(calls) > 4).run(tasks)
    assert all(t.cancelled and t.best.image is not None for t in tasks)
    assert all(not t.best.image.requires_grad for t in tasks)


def test_the_budget_is_checked_in_seconds_too() -> None:
    (task,) = run(Watched(), [Climb()], budget=Budget(seconds=1e-9))
    assert task.cancelled
    (task,) = run(Watched(), [Climb()], budget=Budget(nfe=7))
    assert isinstance(task.error, BudgetError)
    assert task.ledger.nfe == 6


@dataclass(frozen=True, kw_only=True)
class Wrong(Climb):
    """Asks for gradients in ways that cannot work."""

    how: str = "unused"

    def slope(self, x, times):
        leaf = x.clone().requires_grad_()
        if self.how == "plain":
            scores = yield Score((yield Decode(x)), x)
            return (yield Gradient(scores.value, leaf))
        prediction = yield Denoise(leaf, times[0], grad=True)
        images = yield Decode(prediction.x0, grad=True)
        scores = yield Score(images, leaf.detach(), grad=True)
        if self.how == "itself":
            return torch.autograd.grad(scores.value.sum(), leaf)[0]
        if self.how == "unused":
            stray = torch.zeros(1, requires_grad=True)
            return (yield Gradient(scores.value, (leaf, stray)))[0]
        if self.how == "integer":
            return (yield Gradient(scores.value, x))
        if self.how == "matrix":
            return (yield Gradient(images, leaf))
        first = yield Gradient(scores.value, leaf, retain=self.how == "retain")
        second = yield Gradient(2.0 * scores.value, leaf)
        assert torch.allclose(second, 2.0 * first)
        return first


@pytest.mark.parametrize("company", [1, 3])
@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("unused", OptionError, r"does not depend on inputs \[1\]"),
        ("plain", OptionError, "grad=True"),
        ("itself", SteeringError, "shared with other prompts"),
        ("integer", OptionError, "requires_grad_"),
        ("matrix", OptionError, "value must be a tensor"),
        ("twice", OptionError, "retain=True"),
        ("retain", None, ""),
    ],
)
def test_mistakes_are_named_with_and_without_company(company, how, error, words) -> None:
    methods = [Climb()] * (company - 1) + [Wrong(how=how)]
    tasks = run(Watched(company), methods)
    if error is None:
        same(tasks, alone(methods))
        return
    same(tasks[:-1], alone(methods)[:-1])
    assert isinstance(tasks[-1].error, error)
    assert re.search(words, str(tasks[-1].error))


def test_a_reward_without_gradient_is_refused_before_the_first_call() -> None:
    model = Watched()
    blind = steering.rewards.FunctionReward(lambda x: x[:, 0], differentiable=False)
    with pytest.raises(RewardError, match="'climb' needs the gradient of the reward"):
        steering.steer(model, "p0", reward=blind, method=Climb())
    assert model.calls == []
    (task,) = run(model, [Climb()], reward=blind)  # and where nobody looked before
    assert isinstance(task.error, RewardError)
    assert task.ledger.reward_calls == 0


def test_integer_states_are_refused_before_the_first_call() -> None:
    half = torch.full((2, 2), 0.5)
    chain = FiniteChain(half[0], half[None])
    with pytest.raises(OptionError, match="integers"):
        steering.steer(chain, reward=TableReward([0.0, 1.0]), method=Climb())
    assert chain.rows == 0


# --- memory ------------------------------------------------------------------------------------


def test_graphs_are_freed_after_the_gradient() -> None:
    alive: list[weakref.ref] = []
    most = []

    class Noted(Watched):
        def predict(self, x, t, *, cond=0, grad=False):
            out = super().predict(x, t, cond=cond, grad=grad)
            if grad:
                most.append(sum(ref() is not None for ref in alive))
                alive.append(weakref.ref(out.x0))
            return out

    gc.disable()
    try:
        run(Noted(3), [Climb()] * 3)
    finally:
        gc.enable()
    assert most == [0] * 4


def test_half_precision_inputs_get_wide_gradients() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(Climb):
        def slope(self, x, times):
            leaf = x.half().requires_grad_()
            prediction = yield Denoise(leaf, times[0], grad=True)
            slope = yield Gradient(prediction.x0.sum(1), leaf)
            assert slope.dtype == torch.float32
            assert not slope.requires_grad
            return slope

    (task,) = run(Watched(), [Half()])
    assert task.error is None


def test_one_batch_of_tasks_is_admitted_where_graphs_are_held() -> None:
    started = []

    @dataclass(frozen=True, kw_only=True)
    class Late(Climb):
        def run(self, ctx):
            started.append(ctx.cond)
            if len(started) > 2:
                assert model.calls  # somebody got an answer before the third came
            return (yield from super().run(ctx))

    model = Watched(4)
    tasks = run(model, [Late(n=2)] * 4, max_batch=4)
    assert [t.error for t in tasks] == [None] * 4
    assert len(started) == 4
