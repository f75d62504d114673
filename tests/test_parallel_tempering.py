"""Parallel tempering: detailed balance, the laws of all chains, its limits, its cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steering.analytic import FiniteChain, GaussianMixture, LinearReward, TableReward
from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.method import Context
from steering.samplers import BestOfN, ParallelTempering
from steering.samplers.parallel_tempering import accepted, exchanged
from steering.transitions import ODE
from tests import twisted_worlds
from tests.populations import (
    LINE,
    TABLE,
    TRUTHS,
    check_ledger,
    errors,
    guided,
    line,
    plan_of,
    steer,
)

INF = math.inf
TAIL = {"move": "tail", "eta": 1.0}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- detailed balance -------------------------------------------------------------------------


def share(odds: list[bool]) -> float:
    return sum(odds) / len(odds)


GRID = ((torch.arange(20_000) + 0.5) / 20_000).tolist()


def test_exchanges_are_in_detailed_balance() -> None:
    """Two chains on two points: pi(a, b) P(swap) = pi(b, a) P(swap back)."""
    scales, rewards, prior = tensor(0.4, 1.9), {"a": 0.3, "b": 1.1}, {"a": 0.7, "b": 0.3}
    for x, y in itertools.product("ab", repeat=2):
        law, back = (
            prior[p] * prior[q] * math.exp(0.4 * rewards[p] + 1.9 * rewards[q])
            for p, q in ((x, y), (y, x))
        )
        there, home = (
            share(
                [
                    exchanged(scales, tensor(*pair), tensor(u, 0.5), 0).tolist() == [1, 0]
                    for u in GRID[::20]
                ]
            )
            for pair in ((rewards[x], rewards[y]), (rewards[y], rewards[x]))
        )
        assert law * there == pytest.approx(back * home, rel=5e-3)
        assert max(there, home) == 1.0


def test_moves_are_in_detailed_balance() -> None:
    u = torch.tensor(GRID, dtype=torch.float64)
    for scale, old, new in ((1.5, 0.2, 1.0), (1.5, 1.0, 0.2), (0.0, 1.0, -3.0)):
        ones = torch.ones_like(u)
        there = float(accepted(scale * ones, old * ones, new * ones, u).double().mean())
        assert there == pytest.approx(min(1.0, math.exp(scale * (new - old))), abs=1e-3)


def test_rewards_of_minus_infinity_make_no_nan() -> None:
    u = tensor(0.999, 0.999, 0.001, 0.999)
    old, new = tensor(-INF, -INF, 0.0, 0.0), tensor(-INF, 0.0, -INF, -INF)
    scales = tensor(1.0, 1.0, 1.0, 0.0)
    assert accepted(scales, old, new, u).tolist() == [True, True, False, True]
    for low, high, swapped in ((0.0, -INF, True), (-INF, 0.0, False), (-INF, -INF, True)):
        order = exchanged(tensor(0.0, 1.0), tensor(low, high), tensor(0.5, 0.5), 0)
        assert (order.tolist() == [1, 0]) == swapped


def test_only_the_pairs_of_a_turn_meet() -> None:
    scales, reward, u = torch.linspace(0, 1, 5).double(), tensor(4, 3, 2, 1, 0), tensor(*[0.5] * 5)
    assert exchanged(scales, reward, u, 0).tolist() == [1, 0, 3, 2, 4]
    assert exchanged(scales, reward, u, 1).tolist() == [0, 2, 1, 4, 3]


# --- the law ----------------------------------------------------------------------------------

PRIZES = TableReward([0.0, 1.0, -1.0, 2.0])
RUNS = 20


def walk(prompts=("p",)) -> FiniteChain:
    """Three steps among four states."""
    generator = torch.Generator().manual_seed(5)
    logits = 1.2 * torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    return FiniteChain([0.4, 0.3, 0.2, 0.1], torch.softmax(logits, 2), prompts=prompts)


def runs(make, reward, method, times: int = RUNS) -> list:
    return steer(make(("p",) * times), reward, method, seed=list(range(times)))


def test_every_chain_keeps_its_own_law() -> None:
    """An enumerable space: shares of all states in chains at 0, 0.5 and 1. Measured: 2.4."""
    ladder, burn_in = (0.0, 0.5, 1.0), 10
    method = ParallelTempering(
        ladder=ladder, iterations=70, burn_in=burn_in, reward_scale=1.0, cuts=(0.4,), **TAIL
    )
    results, model = runs(walk, PRIZES, method), walk()
    for k, scale in enumerate(ladder):
        law = model.tilted_law(PRIZES, scale)
        for state, prize in enumerate(PRIZES.table.tolist()):
            shares = [
                share([row[k] == prize for row in r.trace.column("rewards")[burn_in:]])
                for r in results
            ]
            assert errors(shares, float(law[state])) < 5.0, (scale, state)
    delivered = [float(r.weights @ (r.samples[:, 0] == 3).double()) for r in results]
    top = [share([row[2] == 2.0 for row in r.trace.column("rewards")[burn_in:]]) for r in results]
    assert delivered == pytest.approx(top)
    orders = [o for r in results for o in r.trace.column("order")]
    assert 0.2 < share([o != [0, 1, 2] for o in orders]) < 0.95


def ode_law(model: GaussianMixture) -> tuple[torch.Tensor, float]:
    """Mean and standard deviation of what the ODE makes of one Gaussian: it is affine."""
    d = model.event_shape[0]
    x = torch.stack([torch.zeros(d), torch.ones(d)]).double()
    for t, u in model.grid().steps():
        x = ODE(x, model.posterior(x, t), t, u, model.path).mean
    return x[0], float(x[1, 0] - x[0, 0])


@pytest.mark.parametrize("d", [1, 2, 16])
def test_blended_noise_has_the_tilted_law_of_the_ode(d: int) -> None:
    """Tilting by b . x moves a Gaussian by lambda variance b. Measured: at most 1.5."""
    b = torch.full((d,), 1.2 / math.sqrt(d)).double()

    def make(prompts=("p",)) -> GaussianMixture:
        return GaussianMixture([1.0], [[0.5] * d], [0.8], steps=2, prompts=prompts)

    method = ParallelTempering(
        ladder=(0.0, 0.5, 1.0, 1.0), iterations=60, reward_scale=1.0, blend=0.7
    )
    results = runs(make, LinearReward(b), method)
    mean, std = ode_law(make())
    along = [float(r.weights @ (r.samples @ b)) / 1.2 for r in results]
    assert errors(along, float(mean @ b + std**2 * b @ b) / 1.2, noise=0.15) < 5.0


MANY, LADDER = 12, (0.0, 0.5, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("world", ["line", "plane", "cloud"])
def test_new_tails_have_the_tilted_law(world: str) -> None:
    """The samples of the last chains, and the mean reward of every chain, which at scale s is the
    slope of ln Z there. Measured: at most 2.1 standard errors; what the model makes by itself is
    13 and more away."""
    make, reward, scale, f = TRUTHS[world]
    method = ParallelTempering(
        ladder=LADDER, iterations=28, burn_in=10, reward_scale=scale, **TAIL
    )
    results, model = runs(make, reward, method, MANY), make()
    mean = float(f(model.tilted(reward, scale).moments()[0][None]))
    found = [float(r.weights @ f(r.samples)) for r in results]
    assert errors(found, mean, noise=0.1) < 5.0
    for k, share_of in enumerate(LADDER):
        above, below = (model.log_normaliser(reward, scale * share_of + h) for h in (1e-4, -1e-4))
        rows = [tensor(*[e[k] for e in r.trace.column("rewards")[10:]]) for r in results]
        rewards = [float(row.mean()) for row in rows]
        assert errors(rewards, (above - below) / 2e-4, noise=0.2) < 5.0, share_of


@pytest.mark.parametrize("world", sorted(twisted_worlds.WORLDS))
def test_blended_noise_has_the_tilted_law_of_many_weighted_samples(world: str) -> None:
    """Mixtures, whose ODE is no affine map: against 1e5 unsteered samples, weighted. Measured: at
    most 1.5 standard errors; without weights 6 and more."""
    make, reward, scale, axis = twisted_worlds.WORLDS[world]
    x = twisted_worlds.unsteered(make(steps=4), eta=0.0)
    w = torch.exp(scale * reward(x))
    mean = float(w @ x[:, axis] / w.sum())
    error = float((w * (x[:, axis] - mean)).std() / w.mean()) / math.sqrt(len(x))
    method = ParallelTempering(
        ladder=LADDER, iterations=40, burn_in=10, reward_scale=scale, blend=0.7
    )
    results = runs(lambda prompts: make(prompts, steps=4), reward, method, MANY)
    found = [float(r.weights @ r.samples[:, axis]) for r in results]
    own = float(tensor(*found).std()) / math.sqrt(MANY)
    assert abs(sum(found) / MANY - mean) < 5.0 * math.hypot(own, error)
    assert abs(float(x[:, axis].mean()) - mean) > 5.0 * own, "the tilt should be visible"


def test_at_reward_scale_zero_nothing_is_refused() -> None:
    method = ParallelTempering(n_particles=3, iterations=20, reward_scale=0.0)
    model = line(("p",) * RUNS, kernel="path", steps=3)
    results = steer(model, LINE, method, seed=list(range(RUNS)))
    assert all(all(row) for r in results for row in r.trace.column("accepted"))
    base = steer(line(kernel="path", steps=3), LINE, BestOfN(n=4000, select="all"))
    means = [float(r.weights @ r.samples[:, 0]) for r in results]
    truth = float(base.samples.mean())
    spread = float(base.samples.std()) / math.sqrt(4000)
    v = tensor(*means)
    error = math.hypot(float(v.std()) / math.sqrt(RUNS), spread)
    assert abs(float(v.mean()) - truth) < 5.0 * error


def test_one_chain_without_reward_draws_independent_samples_bit_for_bit() -> None:
    """Every move is a fresh noise and accepted, so each is best-of-one of its own noise."""

    class Given(GaussianMixture):
        """Starts where it is told."""

        def noise(self, n, key, *, cond=0):
            return self.given

    options = {"n_particles": 1, "reward_scale": 0.0, "blend": 1.0}
    method = ParallelTempering(iterations=9, burn_in=0, **options)
    ours = steer(line(kernel="path"), LINE, method, seed=3)
    model = line(kernel="path")
    ctx = Context(model=model, cond=0, seed=3, plan=plan_of(model, method))
    base = []
    for m in range(10):
        model = line(kernel="path")
        model.__class__, model.given = Given, ctx.noise(1, stream=f"fresh/{m}" if m else "init")
        base.append(steer(model, LINE, BestOfN(n=1)))
    kept = {int(slot): k for k, slot in enumerate(ours.slots)}
    assert set(range(1, 10)) <= set(kept)
    for slot, k in kept.items():
        assert torch.equal(ours.samples[k], base[slot].samples[0])
        assert ours.rewards[k] == base[slot].rewards[0]
        assert float(ours.log_weights[k]) == (0.0 if slot else -INF)
    assert all(row == [True] for row in ours.trace.column("accepted"))


def test_a_constant_added_to_the_reward_changes_nothing() -> None:
    for options in ({}, {**TAIL, "cuts": (0.5,)}):
        method = ParallelTempering(n_particles=3, iterations=8, reward_scale=2.0, **options)
        model = line(kernel="path")
        a, b = (steer(model, LinearReward([1.0], c), method) for c in (0.0, 7.0))
        assert a.trace.column("order") == b.trace.column("order")
        assert torch.equal(a.samples, b.samples)


# --- its moves --------------------------------------------------------------------------------


class Watched(GaussianMixture):
    """Remembers what it was asked."""

    def predict(self, x, t, *, cond=0, grad=False):
        self.asked.append((t.t, x.clone()))
        return super().predict(x, t, cond=cond, grad=grad)


def watched(**more) -> Watched:
    model = Watched([1.0], [0.0], [1.0], steps=4, prompts=("p",), **more)
    model.asked = []
    return model


def test_a_tail_starts_from_the_chains_own_state() -> None:
    model = watched()
    method = ParallelTempering(
        ladder=(0.0, 1.0), iterations=3, reward_scale=1e6, cuts=(0.25, 0.5), **TAIL
    )
    result = steer(model, LINE, method)
    times = [t for t, _ in model.asked]
    assert times == [1.0, 0.75, 0.5, 0.25] * 2 + [0.75, 0.5, 0.25] + [0.5, 0.25]
    states = {k: x for k, (_, x) in enumerate(model.asked)}
    accept, order = result.trace.column("accepted"), result.trace.column("order")
    for k in range(2):
        before = order[0][k]
        row = states[5] if accept[0][before] else states[1]
        assert torch.equal(states[8][k], row[before])


def test_blends_have_the_right_share_of_fresh_noise() -> None:
    model = watched()
    method = ParallelTempering(n_particles=3, iterations=1, reward_scale=1.0, blend=0.5)
    steer(model, LINE, method, seed=7)
    start, moved = model.asked[0][1], model.asked[4][1]
    ctx = Context(model=model, cond=0, seed=7, plan=plan_of(model, method))
    fresh = ctx.noise(3, stream="fresh/1")
    for k, b in enumerate((1.0, math.sqrt(0.5), 0.5)):
        expected = math.sqrt(1 - b * b) * start[k] + b * fresh[k]
        assert torch.allclose(moved[k], expected, rtol=0, atol=1e-12)


# --- what is delivered ------------------------------------------------------------------------


def test_weights_count_iterations_and_the_best_of_all_chains_is_there() -> None:
    found = 0
    for seed in range(6):
        method = ParallelTempering(
            ladder=(0.0, 0.5, 1.0, 1.0), iterations=9, burn_in=3, reward_scale=0.5
        )
        result = steer(line(kernel="path", steps=4), LINE, method, seed=seed)
        weights = result.log_weights.exp()
        assert float(weights.sum()) == pytest.approx(2 * 6)
        assert torch.allclose(weights, weights.round(), atol=1e-9)
        assert len(result.slots.unique()) == len(result)
        assert torch.equal(result.rewards, LINE(result.samples).float().double())
        assert result.best_reward >= max(max(row) for row in result.trace.column("rewards"))
        found += int(torch.isneginf(result.log_weights).sum())
    assert 0 < found <= 6


# --- cost -------------------------------------------------------------------------------------

COSTS = {
    "plain": {"n_particles": 3, "iterations": 4},
    "one chain": {"n_particles": 1, "iterations": 3},
    "a ladder": {"ladder": (0.0, 1.0, 1.0), "iterations": 5, "swap_every": 2},
    "tails": {"n_particles": 2, "iterations": 7, **TAIL},
    "tails of the whole": {"n_particles": 2, "iterations": 4, "cuts": (0.0,), **TAIL},
}


@pytest.mark.parametrize("case", sorted(COSTS))
def test_the_ledger_agrees_with_the_forecast(case: str) -> None:
    check_ledger(ParallelTempering(reward_scale=1.0, **COSTS[case]))


def test_cost_by_hand() -> None:
    """7 steps at 2 2 2 3 3 3 3 rows: a new path costs 18, tails from 3 and 5 cost 12 and 6."""
    method = ParallelTempering(n_particles=2, iterations=5, cuts=(0.4, 0.7), **TAIL)
    cost = method.cost(plan_of(guided(), method))
    assert cost.nfe == 2 * (18 + 18 + 12 + 6 + 18 + 12)
    assert (cost.decodes, cost.reward_calls) == (12, 12)


@pytest.mark.parametrize(
    ("options", "nfe", "rows"),
    [
        ({}, 36, 36), ({}, 71, 54), ({}, 144, 144), ({}, 400, 360),
        ({"n_particles": 2}, 110, 108), ({"iterations": 2}, 170, 162),
        ({"ladder": (0.5, 1.0)}, 75, 72),
        ({"n_particles": 2, "cuts": (0.7,), **TAIL}, 100, 84),
        ({"n_particles": 2, "cuts": (0.7,), **TAIL}, 140, 132),
    ],
)  # fmt: skip
def test_budgets_are_filled_and_never_exceeded(options: dict, nfe: int, rows: int) -> None:
    method = ParallelTempering(reward_scale=1.0, **options)
    assert steer(guided(), LINE, method, nfe=nfe).ledger.nfe == rows


def test_reward_calls_are_a_budget_too() -> None:
    result = steer(guided(), LINE, ParallelTempering(), budget=Budget(reward_calls=19))
    assert result.ledger.reward_calls == 16


def test_budgets_that_cannot_pay_are_refused_at_once() -> None:
    for options, nfe, message in (
        ({}, 35, "one chain needs 36"),
        ({"n_particles": 3}, 107, "3 chains needs nfe=108"),
        ({"ladder": (0.0, 1.0), "iterations": 4}, 179, "2 chains needs nfe=180"),
    ):
        model = guided()
        with pytest.raises(BudgetError, match=message):
            steer(model, LINE, ParallelTempering(**options), nfe=nfe)
        assert model.rows == 0
    with pytest.raises(OptionError, match="pays for 1 iterations"):
        steer(model, LINE, ParallelTempering(burn_in=1), nfe=36)
    assert model.rows == 0


# --- refusals ---------------------------------------------------------------------------------

BAD = {
    "got move='blend' with eta=1.0": {"eta": 1.0},
    "got move='tail' with eta=0.0": {"move": "tail"},
    "ladder holds shares": {"ladder": (0.5, 0.0, 1.0)},
    "exactly 1": {"ladder": (0.0, 0.5)},
    "as many chains": {"ladder": (0.0, 1.0), "n_particles": 3},
    "blend must lie": {"blend": 0.0},
    "cuts are fractions": {"cuts": (1.0,)},
    "burn_in must lie in": {"iterations": 3, "burn_in": 3},
    "swap_every must be": {"swap_every": 0},
    "reward_scale must be": {"reward_scale": -1.0},
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_bad_options_are_refused(message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ParallelTempering(**BAD[message])


def test_a_model_that_moves_at_random_by_itself_has_no_noise_to_blend() -> None:
    model = walk()
    with pytest.raises(OptionError, match="moves at random by itself"):
        steer(model, TABLE, ParallelTempering())
    assert model.rows == 0


def test_starts_that_are_more_than_noise_are_not_blended() -> None:
    class Pictures(GaussianMixture):
        """Starts from a picture with noise on it, as image-to-image pipelines do."""

        def noise(self, n, key, *, cond=0):
            return 3.0 + super().noise(n, key, cond=cond)

    model = Pictures([1.0], [[0.0] * 256], [1.0], steps=4)
    with pytest.raises(OptionError, match="does not start from pure noise"):
        steer(model, LinearReward([1.0] * 256), ParallelTempering())
    assert model.rows == 0
    assert len(steer(model, LinearReward([1.0] * 256), ParallelTempering(iterations=4, **TAIL)))
