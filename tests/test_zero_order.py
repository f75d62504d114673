"""Zero-order search: its neighbours, its pivot, what it keeps and what it costs."""

from __future__ import annotations

import pytest
import torch

from steering.errors import BudgetError, OptionError
from steering.method import build_method
from steering.noise import NoiseKey
from steering.samplers import BestOfN, ZeroOrder
from tests.search_world import (
    BOWL,
    TABLE,
    ImageToImage,
    bell,
    calls_of,
    chain,
    constant,
    counts,
    errors,
    forecast,
    guided,
    line,
    mean_best,
    plan_of,
    plane,
    repeated,
    spread_errors,
    steer,
)


def wide(prompts=("p",)):
    return bell(prompts, steps=2, dims=8)


def far(images: torch.Tensor) -> torch.Tensor:
    return images.double().sum(1)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_no_neighbours_make_one_sample(eta: float) -> None:
    ours = steer(plane(), BOWL, ZeroOrder(n_neighbours=0, eta=eta), seed=4)
    base = steer(plane(), BOWL, BestOfN(n=1, eta=eta), seed=4)
    assert torch.equal(ours.samples, base.samples)
    assert counts(ours.ledger) == counts(base.ledger) == (6, 1, 1)


def rounds_of(result, model):
    """(starting noises, rewards, moved) of each round after the first pivot's own."""
    starts = model.at(0)
    assert len(starts[0]) == 1
    moved = result.trace.column("moved")
    return list(zip(starts[1:], result.trace.column("rewards"), moved, strict=True))


@pytest.mark.parametrize("restart", ["fresh", "keep"])
def test_every_round_searches_round_the_pivot(restart: str) -> None:
    """Follows the pivot through the trace; every noise lies where it should."""
    seen = set()
    for seed in range(6):
        model = wide()
        method = ZeroOrder(n_neighbours=3, rounds=8, cosine=0.8, restart=restart)
        result = steer(model, far, method, seed=seed)
        pivot, height, made = model.at(0)[0], None, 1
        height = float(steer(wide(), far, BestOfN(n=1), seed=seed).rewards[0])
        for noises, rewards, moved in rounds_of(result, model):
            if height is None:
                fresh = model.noise(1, NoiseKey(seed, "init", slot=made))
                assert torch.equal(noises[:1], fresh)
                pivot, height, made = noises[:1], rewards[0], made + 1
                noises = noises[1:]
            norms = noises.norm(dim=1)
            assert torch.allclose(norms, pivot.norm().expand_as(norms), rtol=1e-9)
            cosines = (noises @ pivot[0]) / (norms * pivot.norm())
            assert torch.allclose(cosines, torch.full_like(cosines, 0.8), atol=1e-9)
            assert moved == (max(rewards) > height)
            if moved:
                offset = len(noises) - len(rewards)
                pivot = noises[rewards.index(max(rewards)) + offset][None]
                height = max(rewards)
            elif restart == "fresh":
                height = None
            seen.add(moved)
    assert seen == {True, False}


def test_the_pivot_is_not_made_again() -> None:
    model = wide()
    steer(model, far, ZeroOrder(n_neighbours=3, rounds=6, restart="keep"))
    starts = torch.cat(model.at(0))
    assert len(starts) == len(starts.unique(dim=0)) == 1 + 6 * 3


def test_rounds_round_one_pivot_look_elsewhere() -> None:
    model = wide()
    steer(model, constant, ZeroOrder(n_neighbours=3, rounds=6, restart="keep"))
    starts = torch.cat(model.at(0))
    assert len(starts.unique(dim=0)) == len(starts) == 19


def test_neighbours_follow_the_law_of_noise() -> None:
    """Over random pivots; one neighbour of each, so that they are independent."""
    prompts = ("p",) * 400
    model = wide(prompts)
    steer(model, constant, ZeroOrder(n_neighbours=1, rounds=1), seed=list(range(400)))
    neighbours = torch.cat(model.at(0)[1:])
    assert neighbours.shape == (400, 8)
    assert errors(neighbours, 0.0) < 5.0  # measured 1.1
    assert spread_errors(neighbours, 0.0, 1.0) < 5.0  # measured 0.4


def test_the_best_of_all_rounds_is_kept() -> None:
    late = 0
    for seed in range(8):
        result = steer(plane(), BOWL, ZeroOrder(n_neighbours=2, rounds=9), seed=seed)
        first = float(steer(plane(), BOWL, BestOfN(n=1), seed=seed).rewards[0])
        rounds = result.trace.column("rewards")
        assert result.best_reward == max(first, *[max(r) for r in rounds])
        assert torch.allclose(BOWL(result.samples), result.rewards, atol=1e-6)
        late += max(rounds[-1]) < result.best_reward
    assert late > 4, "the last round should not be the best one always"


def test_noise_on_the_way_is_the_same_for_all() -> None:
    """So a neighbour very near the pivot ends very near it, also where the sampler is random."""
    model = plane()
    method = ZeroOrder(n_neighbours=3, rounds=1, cosine=1.0 - 1e-13, eta=1.0)
    steer(model, BOWL, method)
    last = torch.cat(model.at(5))
    assert float((last - last[0]).abs().max()) < 1e-4
    other = steer(plane(), BOWL, method, seed=1)
    assert float((other.samples - last[:1]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"n_neighbours": 3, "rounds": 2},
        {"n_neighbours": 1, "rounds": 5, "restart": "keep"},
        {"n_neighbours": 1, "rounds": 4},
        {"n_neighbours": 4, "rounds": 1, "eta": 0.5},
    ],
)
def test_the_ledger_agrees_with_the_formula(options: dict) -> None:
    model, method = guided(), ZeroOrder(**options)
    n = 1 + options["rounds"] * options["n_neighbours"]
    result = steer(model, BOWL, method)
    assert counts(result.ledger) == forecast(model, method) == (14 * n, n, n)
    # In two dimensions a neighbour at a given angle lies on one of two sides: some are copies.
    assert model.rows + result.ledger.deduplicated == 14 * n


def test_budgets_are_filled() -> None:
    result = steer(guided(), BOWL, ZeroOrder(n_neighbours=3), nfe=333)
    assert result.ledger.nfe == 14 * (1 + 7 * 3)
    model = guided()
    with pytest.raises(BudgetError, match="one neighbour and its pivot needs 28"):
        steer(model, BOWL, ZeroOrder(), nfe=27)
    with pytest.raises(BudgetError, match="round of 4 neighbours"):
        steer(model, BOWL, ZeroOrder(n_neighbours=4), nfe=69)
    with pytest.raises(BudgetError):
        steer(model, BOWL, ZeroOrder(rounds=3), nfe=55)
    with pytest.raises(BudgetError):
        steer(model, BOWL, ZeroOrder(n_neighbours=0), nfe=13)
    assert model.rows == 0


@pytest.mark.parametrize(
    ("samples", "options", "neighbours", "rounds"),
    [(8, {}, 7, 1), (9, {}, 4, 2), (3, {}, 2, 1), (12, {}, 5, 2), (12, {"rounds": 3}, 3, 3)],
)
def test_what_rounds_of_four_would_leave_goes_to_more_neighbours(
    samples: int, options: dict, neighbours: int, rounds: int
) -> None:
    result = steer(guided(), BOWL, ZeroOrder(**options), nfe=14 * samples + 13)
    assert result.ledger.nfe == 14 * (1 + rounds * neighbours)


@pytest.mark.parametrize("restart", ["fresh", "keep"])
def test_more_budget_comes_nearer_to_the_optimum(restart: str) -> None:
    """In eight dimensions, where a sphere is no prison."""

    def reward(images: torch.Tensor) -> torch.Tensor:
        return -(images - 0.9).square().sum(1)

    found = []
    for rounds in (1, 6, 36):
        method = ZeroOrder(rounds=rounds, restart=restart)
        results = repeated(wide, reward, method, 16)
        found.append(sum(r.best_reward for r in results) / 16)
    assert found == sorted(found)  # measured -1.9, -1.0 and -0.2 for keep
    assert found[-1] > 0.3 * found[0]


def test_new_pivots_leave_the_sphere() -> None:
    """In two dimensions the norm is half of the search: new pivots go on gaining."""
    fresh = [mean_best(plane, "zero_order", nfe=nfe) for nfe in (100, 600)]
    assert fresh[0] < fresh[1]  # measured -1.42 and -0.18
    stuck = mean_best(plane, "zero_order", nfe=600, options={"restart": "keep"})
    assert stuck < fresh[1] - 0.1  # measured -0.80


def test_a_good_sample_stops_the_search() -> None:
    for result in repeated(plane, BOWL, ZeroOrder(rounds=12, reward_max=-0.5), 8):
        best = result.trace.column("best")
        assert all(b < -0.5 for b in best[:-1])
        assert result.best_reward >= -0.5 or len(best) == 12
        assert result.ledger.reward_calls == 1 + 4 * len(best)


def test_states_without_neighbours_are_refused_before_anything_is_spent() -> None:
    for model, reward in ((chain(), TABLE), (line(), constant)):
        with pytest.raises(OptionError, match="zero_order"):
            steer(model, reward, ZeroOrder(rounds=1))
        assert model.rows == 0


@pytest.mark.parametrize(
    "options", [{"n_neighbours": -1}, {"rounds": 0}, {"cosine": 1.0}, {"restart": "never"}]
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError):
        ZeroOrder(**options)


def test_the_preset() -> None:
    method = build_method("zero_order/flux")
    assert method.cost(plan_of(plane(steps=50), method)).nfe == 50 * 17


def test_many_prompts_share_every_network_call() -> None:
    method = ZeroOrder(n_neighbours=2, rounds=4)
    assert calls_of(plane, method, 8) == calls_of(plane, method, 1)


def test_starts_that_are_more_than_noise_are_refused_before_anything_is_spent() -> None:
    model = ImageToImage([1.0], [[0.5] * 2000], [0.6], steps=4, prompts=("p",))
    with pytest.raises(OptionError, match="pure noise"):
        steer(model, constant, ZeroOrder(rounds=1))
    assert model.rows == 0


def test_a_new_pivot_that_comes_alone_gets_neighbours_of_its_own() -> None:
    """With one neighbour a round, a new pivot takes its place; the climb goes on from there."""
    model = wide()
    result = steer(model, far, ZeroOrder(n_neighbours=1, rounds=16), seed=3)
    starts = torch.cat(model.at(0)).flatten(1)
    sizes = starts.norm(dim=1)  # neighbours have the size of their pivot
    moved = [e["moved"] for e in result.trace.events if "round" in e]
    fails = [r for r, step in enumerate(moved[:-2]) if not step]
    assert len(fails) > 2
    pivots = [k for k in range(1, 17) if abs(float(sizes[k] - sizes[k - 1])) > 1e-4]
    assert pivots
    assert all(k + 1 not in pivots for k in pivots)  # each has a neighbour before the next
