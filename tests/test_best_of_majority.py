"""Best-of-majority: frequencies by hand, its limits, and a reward that can be fooled."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from steering.analytic import FiniteChain, GaussianMixture, TableReward
from steering.errors import BudgetError, OptionError
from steering.method import build_method
from steering.samplers import BestOfMajority, BestOfN, best_of_majority, best_of_n
from steering.samplers.best_of_majority import thumbnails
from tests.populations import LINE, TABLE, chain, check_ledger, errors, guided, line, steer

FREQUENCIES = ("labels", "clusters", "density")


def far_apart(prompts=("p",)) -> GaussianMixture:
    """Two narrow heaps at -2 (70 %) and 3."""
    return GaussianMixture([0.7, 0.3], [-2.0, 3.0], [0.01, 0.01], steps=4, kernel="exact")


def everything(model, reward, n: int, seed: int = 0):
    """All n samples in the order of their slots: (samples, rewards)."""
    result = steer(model, reward, BestOfN(n=n, select="all"), seed=seed)
    order = result.slots.argsort()
    return result.samples[order], result.rewards[order]


def by_hand(states: list[int], rewards: list[float], least: float, k: int) -> list[int]:
    """Slots of the best-of-majority answer, written with a counter."""
    count, n = Counter(states), len(states)
    passed = [i for i in range(n) if count[states[i]] / n >= least]
    if not passed:
        return sorted(range(n), key=lambda i: (-count[states[i]], i))[:k]
    return sorted(passed, key=lambda i: (-rewards[i], -count[states[i]], i))[:k]


# --- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0.05, 0.2, 0.3, 0.99])
@pytest.mark.parametrize("k", [1, 3])
def test_labels_agree_with_a_counter(least: float, k: int) -> None:
    for seed in range(6):
        states, rewards = everything(chain(), TABLE, 20, seed)
        wanted = by_hand(states[:, 0].tolist(), rewards.tolist(), least, k)
        method = BestOfMajority(n=20, k=k, frequency="labels", min_frequency=least)
        result = steer(chain(), TABLE, method, seed=seed)
        assert sorted(result.slots.tolist()) == sorted(wanted)
        assert result.best_reward == max(float(rewards[i]) for i in wanted)


@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("model", ["line", "chain"])
def test_no_least_frequency_is_best_of_n_bit_for_bit(frequency: str, k: int, model: str) -> None:
    tied = TableReward([0.0, 1.0, 1.0, 0.0, 1.0])
    make, reward = (line, LINE) if model == "line" else (chain, tied)
    ours = BestOfMajority(n=40, k=k, frequency=frequency, min_frequency=0.0)
    ours = steer(make(), reward, ours, seed=1)
    best = steer(make(), reward, BestOfN(n=40, select="top_k", k=k), seed=1)
    assert torch.equal(ours.samples, best.samples)
    assert torch.equal(ours.slots, best.slots)
    assert torch.equal(ours.rewards, best.rewards)
    assert torch.equal(ours.pixels, best.pixels)
    assert torch.equal(ours.log_weights, best.log_weights)


@pytest.mark.parametrize("frequency", FREQUENCIES)
def test_a_constant_reward_leaves_the_majority(frequency: str) -> None:
    states, _ = everything(chain(), TABLE, 25, 2)
    (top, count), *_ = Counter(states[:, 0].tolist()).most_common()
    # States are whole numbers: a radius of 0.4 parts them all.
    radius = None if frequency == "labels" else 0.4
    method = BestOfMajority(n=25, k=count, frequency=frequency, min_frequency=0.1, radius=radius)
    result = steer(chain(), lambda x: torch.zeros(len(x)), method, seed=2)
    expected = (states[:, 0] == top).nonzero().flatten()
    assert torch.equal(result.slots.sort().values, expected)
    assert set(result.samples.flatten().tolist()) == {top}


def test_where_nothing_is_frequent_the_majority_answers() -> None:
    states, _ = everything(chain(), TABLE, 25, 2)
    (top, _), *_ = Counter(states[:, 0].tolist()).most_common()
    method = BestOfMajority(n=25, frequency="labels", min_frequency=1.0)
    assert int(steer(chain(), TABLE, method, seed=2).samples[0]) == top


def test_left_out_the_least_frequency_is_half_of_the_mean() -> None:
    states, rewards = everything(chain(), TABLE, 30, 4)
    count = Counter(states[:, 0].tolist())
    mean = sum((c / 30) ** 2 for c in count.values())
    wanted = by_hand(states[:, 0].tolist(), rewards.tolist(), 0.5 * mean, 2)
    result = steer(chain(), TABLE, BestOfMajority(n=30, k=2, frequency="labels"), seed=4)
    assert sorted(result.slots.tolist()) == sorted(wanted)


def test_distinct_takes_one_of_each() -> None:
    states, _ = everything(chain(), TABLE, 30)
    method = BestOfMajority(n=30, k=5, frequency="labels", min_frequency=0.1, distinct=True)
    result = steer(chain(), TABLE, method)
    count = Counter(states[:, 0].tolist())
    frequent = {state for state, c in count.items() if c >= 3}
    assert len(result) == len(frequent) > 1
    assert set(result.samples.flatten().tolist()) == frequent
    firsts = {s: states[:, 0].tolist().index(s) for s in frequent}
    assert set(result.slots.tolist()) == set(firsts.values())


# --- frequencies -------------------------------------------------------------------------------


def found(method: BestOfMajority, model=None, reward=LINE) -> torch.Tensor:
    events = steer(model or far_apart(), reward, method).trace.events
    return torch.tensor(events[-1]["frequencies"], dtype=torch.float64)


def test_three_ways_to_count_two_heaps() -> None:
    samples, _ = everything(far_apart(), LINE, 40)
    left = samples[:, 0] < 0
    share = torch.where(left, left.double().mean(), (~left).double().mean())
    assert 0.0 < float(left.double().mean()) < 1.0

    def side(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0] < 0

    def word(images: torch.Tensor) -> list[str]:
        return ["left" if x < 0 else "right" for x in images[:, 0]]

    for embed in (side, word):
        method = BestOfMajority(n=40, frequency="labels", embed=embed)
        assert torch.equal(found(method), share)
    assert torch.equal(found(BestOfMajority(n=40, frequency="clusters", radius=0.5)), share)
    density = found(BestOfMajority(n=40, radius=0.5))
    assert torch.allclose(density, share, atol=2e-3)
    once = found(BestOfMajority(n=40, frequency="labels"))
    assert torch.equal(once, torch.full((40,), 1 / 40, dtype=torch.float64))
    given = torch.linspace(0, 1, 40)
    method = BestOfMajority(n=40, frequency_fn=lambda images: given)
    assert torch.equal(found(method), given.double())


def test_the_density_by_hand() -> None:
    samples, _ = everything(line(), LINE, 12)
    x = samples[:, 0]
    distances = (x[:, None] - x).abs()
    radius = sorted(float(distances[i, j]) for i in range(12) for j in range(i))[32]  # of 66
    kernel = torch.exp(-0.5 * (distances / radius) ** 2)
    assert torch.allclose(found(BestOfMajority(n=12), line()), kernel.mean(1), atol=1e-6)


def test_clusters_are_chains_of_near_neighbours() -> None:
    places = torch.tensor([0.0, 5.0, 1.0, 2.0, 6.0, 9.0, 3.0])
    method = BestOfMajority(
        n=7, frequency="clusters", radius=1.0, embed=lambda images: places[:, None]
    )
    # {0, 1, 2, 3}, {5, 6} and {9}.
    wanted = torch.tensor([4, 2, 4, 4, 2, 1, 4], dtype=torch.float64) / 7
    assert torch.allclose(found(method), wanted)


def test_half_of_the_median_distance_parts_two_heaps() -> None:
    """16 of 28 pairs lie across, so the median distance is 5."""
    places = torch.tensor([0.0, 0.0, 5.0, 0.0, 5.0, 5.0, 5.0, 0.0])[:, None]
    method = BestOfMajority(n=8, frequency="clusters", embed=lambda images: places)
    assert torch.equal(found(method), torch.full((8,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("frequency", ["clusters", "density"])
def test_copies_count_as_equal_where_most_samples_coincide(frequency: str) -> None:
    still = FiniteChain([0.9, 0.1], torch.eye(2, dtype=torch.float64).repeat(3, 1, 1))
    frequencies = found(
        BestOfMajority(n=30, frequency=frequency), still, lambda x: x[:, 0].double()
    )
    values = sorted(set(frequencies.tolist()))
    assert len(values) == 2
    assert sum(values) == pytest.approx(1.0)


def test_thumbnails_are_averages() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 32, 16, generator=generator)
    wanted = images.reshape(3, 3, 8, 4, 8, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(thumbnails(images), wanted, atol=1e-6)
    video = torch.rand(2, 5, 3, 16, 16, generator=generator)
    assert thumbnails(video).shape == (2, 5 * 3 * 64)
    tiny = torch.rand(2, 3, 4, 4, generator=generator)
    assert torch.equal(thumbnails(tiny), tiny.flatten(1))
    assert thumbnails(torch.tensor([[1], [2]])).dtype == torch.float32


# --- a reward that can be fooled ---------------------------------------------------------------

# Outcomes good, fair, poor, and one in a thousand that the reward mistakes for a marvel.
LAW = [0.3, 0.4, 0.299, 0.001]
TRUE = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
SEEN = torch.tensor([1.0, 0.5, 0.0, 100.0], dtype=torch.float64)
RUNS = 100


def regret(method) -> list[float]:
    model = FiniteChain(LAW, torch.eye(4, dtype=torch.float64)[None], prompts=("p",) * RUNS)
    results = steer(
        model, lambda x: SEEN[x[:, 0]], method, seed=list(range(RUNS)), max_batch=10**6
    )
    return [1.0 - float(TRUE[int(r.samples[0])]) for r in results]


def test_regret_of_best_of_n_grows_and_that_of_best_of_majority_does_not(monkeypatch) -> None:
    monkeypatch.setattr(best_of_n, "_CHUNK", 1024)
    monkeypatch.setattr(best_of_majority, "_CHUNK", 1024)
    growing = {}
    for n in (32, 256, 1024):
        bon = regret(BestOfN(n=n))
        fooled = 1.0 - 0.999**n
        # No good sample at all among 32 has probability 1e-5.
        assert errors(bon, fooled, noise=0.1) < 5.0  # measured 0.1, 1.0 and 2.8
        growing[n] = sum(bon) / RUNS
        bom = regret(BestOfMajority(n=n, frequency="labels", min_frequency=0.1))
        assert sum(bom) / RUNS < 0.01, n
    assert growing[32] < growing[256] - 0.1 < growing[1024] - 0.3


# --- errors, cost, options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": lambda images: images[:, 0, None, None]}, "features"),
        ({"embed": lambda images: images[:2]}, "features"),
        ({"embed": lambda images: images * torch.nan}, "NaN"),
        ({"embed": lambda images: ["a"], "frequency": "labels"}, "1 labels for 6 samples"),
        ({"frequency_fn": lambda images: torch.ones(3)}, "one finite number per sample"),
        ({"frequency_fn": lambda images: images[:, 0] * torch.nan}, "one finite number"),
    ],
)
def test_callables_that_return_nonsense(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        steer(line(), LINE, BestOfMajority(n=6, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"k": 0},
        {"n": 3, "k": 4},
        {"min_frequency": -0.1},
        {"min_frequency": 1.1},
        {"radius": 0.0},
        {"radius": math.inf},
        {"distinct": True},
        {"distinct": True, "frequency": "labels", "frequency_fn": len},
    ],
)
def test_options_that_make_no_sense(options: dict) -> None:
    with pytest.raises(OptionError, match="best_of_majority"):
        BestOfMajority(**options)


@pytest.mark.parametrize("options", [{}, {"k": 3, "eta": 1.0}, {"frequency": "clusters"}])
def test_the_ledger_agrees_with_the_forecast(options: dict) -> None:
    cost = check_ledger(BestOfMajority(n=20, **options))
    assert (cost.nfe, cost.decodes, cost.reward_calls) == (20 * 18, 20, 20)


def test_budgets_are_filled_and_refused_before_the_first_call() -> None:
    result = steer(guided(), LINE, BestOfMajority(), nfe=100)
    assert result.ledger.nfe == 90
    assert len(result) == 1
    model = guided()
    with pytest.raises(BudgetError, match="one sample needs 18 here"):
        steer(model, LINE, BestOfMajority(), nfe=17)
    with pytest.raises(BudgetError, match="best_of_majority with n=6 needs nfe=108"):
        steer(model, LINE, BestOfMajority(n=6), nfe=107)
    with pytest.raises(OptionError, match="k=7, n=5"):
        steer(model, LINE, BestOfMajority(k=7), nfe=100)
    assert model.rows == 0
    assert steer(line(), LINE, BestOfMajority(k=20)).ledger.reward_calls == 20


def test_it_is_found_by_name() -> None:
    method = build_method("best_of_majority", {"n": 4, "frequency": "labels"})
    assert method == BestOfMajority(n=4, frequency="labels")
    assert method.target == "heuristic"


@pytest.mark.parametrize("kind", ["array", "lists"])
def test_features_as_labels_may_be_arrays_or_lists(kind: str) -> None:
    def embed(images):
        rows = images.flatten(1)
        return rows.numpy() if kind == "array" else rows.tolist()

    method = BestOfMajority(n=20, frequency="labels", embed=embed)
    same = BestOfMajority(n=20, frequency="labels", embed=lambda images: images.flatten(1))
    found = [steer(chain(), TABLE, m, seed=4).slots.tolist() for m in (method, same)]
    assert found[0] == found[1]
