"""Evolution: its populations' laws, elites, levels, selection, cost, and best-of-N as a limit."""

from __future__ import annotations

import math

import pytest
import torch

from steering.errors import BudgetError, OptionError
from steering.method import build_method
from steering.noise import NoiseKey
from steering.samplers import BestOfN, Evo
from steering.samplers.evo import tournament
from steering.transitions import kernel_std
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


def test_one_generation_is_best_of_n_bit_for_bit() -> None:
    for eta in (0.0, 1.0):
        ours = steer(plane(), BOWL, Evo(n_particles=11, schedule=(), eta=eta), seed=3)
        base = steer(plane(), BOWL, BestOfN(n=11, eta=eta), seed=3)
        assert torch.equal(ours.samples, base.samples)
        assert torch.equal(ours.slots, base.slots)
        assert counts(ours.ledger) == counts(base.ledger)
    ours = steer(chain(), TABLE, Evo(n_particles=5, schedule=()))
    assert torch.equal(ours.samples, steer(chain(), TABLE, BestOfN(n=5)).samples)


# --- populations ------------------------------------------------------------------------------


def children(model, method, node: int, **more) -> torch.Tensor:
    """The last generation's states at its first node."""
    steer(model, constant, method, **more)
    return model.at(node)[-1]


@pytest.mark.parametrize("beta", [0.2, 0.9, 1.0])
def test_mutated_noise_follows_the_law_of_noise(beta: float) -> None:
    method = Evo(n_particles=1000, schedule=(0.0,), elites=0, tournament=0.0, beta=beta)
    model = bell(steps=2, dims=16)
    found = children(model, method, 0)
    assert errors(found, 0.0) < 5.0  # random parents repeat: measured up to 2.0
    assert spread_errors(found, 0.0, 1.0) < 5.0  # measured up to 0.4
    assert not torch.equal(found, model.at(0)[0])


def test_a_mutated_noise_stays_near_its_parent() -> None:
    """Everyone's parent is the best: correlation sqrt(1 - beta^2)."""
    model, beta = bell(steps=2, dims=4000), 0.3
    method = Evo(n_particles=6, schedule=(0.0,), elites=1, tournament=1.0, beta=beta)
    steer(model, lambda x: x.sum(1), method)
    parent, *others = model.at(0)[1]
    assert (parent == model.at(0)[0]).all(1).any()
    for child in others:
        cosine = float(torch.dot(child, parent) / (child.norm() * parent.norm()))
        assert abs(cosine - math.sqrt(1 - beta**2)) < 5 / math.sqrt(4000)


MIDDLE = {"blend": 1.0, "strong blend": 2.0, "additive": 2.0}


@pytest.mark.parametrize("kind", sorted(MIDDLE))
def test_the_law_of_states_mutated_on_the_way(kind: str) -> None:
    """Data N(m, s^2): a state has variance v = alpha^2 s^2 + sigma^2, x0 and eps are affine in it.

    The exact reverse kernel brings states of exactly p_t to the node; eta sets the mutation only.
    """
    mutation, strength, eta = kind.split()[-1], MIDDLE[kind], 0.4
    method = Evo(
        n_particles=1000,
        schedule=(0.5,),
        elites=0,
        tournament=0.0,
        mutation=mutation,
        strength=strength,
        eta=eta,
    )
    model = bell(kernel="exact", dims=16)
    found = children(model, method, 3)
    t, u = model.grid().times[3:5]
    a, s, data = t.alpha, t.sigma, 0.6**2
    v, std = a * a * data + s * s, strength * kernel_std(t, u, eta)
    if mutation == "blend":
        kept = (a * a * data + math.sqrt(1 - (std / s) ** 2) * s * s) / v
        variance = kept * kept * v + std * std
        assert abs(variance / v - 1) < (std / s) ** 4
    else:
        variance = v + std * std
    assert errors(found, a * 0.5) < 5.0  # measured 0.2
    assert spread_errors(found, a * 0.5, variance) < 5.0  # measured up to 1.8
    # The bound can tell the published rule from the law that should be kept.
    assert (spread_errors(found, a * 0.5, v) > 5.0) == (mutation == "additive")


def test_without_preference_the_law_is_the_models() -> None:
    """Elites, random parents and blends of a constant reward leave the law as it is."""
    method = Evo(n_particles=500, schedule=(0.0, 0.5), elites=30, tournament=0.0, strength=0.5)
    model = line()
    found = children(model, method, 7)  # the last states before the data
    law = model.marginal(model.grid().times[7])
    assert law.deviation(found) < 5.0  # measured 1.9


# --- selection --------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False])
def test_elites_survive_unchanged_at_the_level_they_were_found(archive: bool) -> None:
    """Every generation begins with the best states of its node, bit for bit."""
    for seed in range(3):
        model = plane(steps=8)
        sizes, schedule = (7, 5, 6, 4), (0.0, 0.25, 0.5)
        method = Evo(n_particles=sizes, schedule=schedule, elites=2, archive=archive)
        result = steer(model, BOWL, method, seed=seed)
        rewards = [torch.tensor(r) for r in result.trace.column("rewards")]
        for g, node in enumerate((0, 2, 4), start=1):
            asked = model.at(node)  # one call for each generation that passed this node
            assert len(asked) == 1 + len([n for n in (0, 2, 4) if n <= node])
            past = slice(0, g) if archive else slice(g - 1, g)
            states, ended = torch.cat(asked[past]), torch.cat(rewards[past])
            best = ended.argsort(descending=True, stable=True)[:2]
            assert torch.equal(asked[g][:2], states[best])
            assert not (asked[g][2:, None] == states).all(-1).any(), "the others are mutated"


def test_every_generation_starts_at_its_own_node() -> None:
    model = plane(steps=10)
    result = steer(model, BOWL, Evo(n_particles=3, schedule=(0.0, 0.4, 0.8), elites=1))
    assert result.trace.column("node") == [0, 0, 4, 8]
    calls = [len(model.at(node)) for node in range(10)]
    assert calls == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4]


def test_starts_are_kept_where_noise_is_still_added() -> None:
    grid = plane(steps=6).grid()
    assert Evo(schedule=(0.0, 0.4, 0.8, 0.99)).nodes(grid) == [0, 2, 4, 4]
    assert Evo(schedule=(0.0, 0.5)).nodes(plane(steps=1).grid()) == [0, 0]


def test_the_best_of_all_generations_is_kept() -> None:
    early = 0
    for result in repeated(plane, BOWL, Evo(n_particles=4, elites=1), 16):
        found = [r for g in result.trace.column("rewards") for r in g]
        assert len(found) == 20
        assert result.best_reward == max(found)
        assert found[int(result.slots[0])] == max(found)
        assert torch.allclose(BOWL(result.samples), result.rewards, atol=1e-6)
        early += max(result.trace.column("rewards")[-1]) < max(found)
    assert early > 2


def test_tournaments() -> None:
    """Ten rewards with a tie at the top; 4000 draws."""
    reward = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, -torch.inf, 0.5, 0.6, 0.7, 0.8])
    key = NoiseKey(0, "t")
    assert set(tournament(reward, 50, 1.0, key).tolist()) == {1}
    drawn = tournament(reward, 4000, 0.0, key)
    for k in range(10):
        assert errors((drawn == k).double(), 0.1) < 5.0
    drawn = tournament(reward, 4000, 0.9, key)
    assert errors((drawn == 1).double(), 0.9) < 5.0
    assert errors((drawn == 3).double(), 0.1) < 5.0
    pairs = tournament(reward, 4000, 0.2, key)
    # Of the 45 pairs, the runner-up of all wins those with the 8 below it.
    assert errors((pairs == 3).double(), 8 / 45) < 5.0
    assert not bool((pairs == 5).any())


def test_more_budget_comes_nearer_to_the_optimum() -> None:
    found = [mean_best(plane, "evo", nfe=nfe) for nfe in (80, 400, 2000)]
    assert found == sorted(found)  # measured -0.41, -0.06 and -0.005
    assert found[-1] > -0.05


# --- cost and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "nfe", "rewards"), [("sd21", 5000, 150), ("flux", 1465, 45), ("wan", 1000, 30)]
)
def test_presets_have_the_published_cost(preset: str, nfe: int, rewards: int) -> None:
    method = build_method(f"evo/{preset}")
    cost = method.cost(plan_of(plane(steps=50), method))
    assert (cost.nfe, cost.decodes, cost.reward_calls) == (nfe, rewards, rewards)


@pytest.mark.parametrize(
    "options",
    [
        {"n_particles": 3},
        {"n_particles": (5, 3, 2), "schedule": (0.2, 0.6), "elites": 1},
        {"n_particles": 4, "schedule": (0.0, 0.0), "elites": 0, "eta": 0.0},
        {"n_particles": 3, "transition": "memoryless", "mutation": "additive"},
    ],
)
def test_the_ledger_agrees_with_the_formula(options: dict) -> None:
    model, method = guided(), Evo(**options)
    result = steer(model, BOWL, method)
    starts = [0, *method.nodes(model.grid())]
    n = method.sizes()
    rows = sum(k * (7 - s) * 2 for k, s in zip(n, starts, strict=True))
    assert counts(result.ledger) == forecast(model, method) == (rows, sum(n), sum(n))
    assert model.rows == rows


def test_budgets_are_filled() -> None:
    one = Evo(n_particles=1, elites=0)
    each = one.cost(plan_of(guided(), one)).nfe
    result = steer(guided(), BOWL, Evo(), nfe=333)
    assert result.ledger.nfe == (333 // each) * each
    model = guided()
    with pytest.raises(BudgetError, match=f"generations of 3 needs {3 * each} .*schedule, elites"):
        steer(model, BOWL, Evo(), nfe=2 * each)
    with pytest.raises(BudgetError):
        steer(model, BOWL, Evo(), nfe=each - 1)
    with pytest.raises(BudgetError):
        steer(model, BOWL, Evo(n_particles=9), nfe=9 * each - 1)
    assert model.rows == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "deterministic"),
        ({"eta": 0.0, "schedule": (0.0,)}, "elites=0"),
        ({"n_particles": (3, 3)}, "5 generations"),
        ({"n_particles": 2, "elites": 2}, "leave no room"),
        ({"n_particles": (1, 5, 5, 5, 5), "elites": 2}, "leave no room"),
        ({"n_particles": 0}, "n_particles"),
        ({"schedule": (0.5, 0.2)}, "go back"),
        ({"schedule": (1.0,)}, "shares"),
        ({"tournament": 1.5}, "tournament"),
        ({"beta": -0.1}, "beta"),
        ({"elites": -1}, "elites"),
        ({"strength": math.inf}, "strength"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Evo(**options)


def test_states_that_cannot_mutate_are_refused_before_anything_is_spent() -> None:
    model = chain()
    with pytest.raises(OptionError, match="mutation"):
        steer(model, TABLE, Evo(n_particles=4))
    assert model.rows == 0


def test_many_prompts_share_every_network_call() -> None:
    method = Evo(n_particles=3)
    assert calls_of(plane, method, 8) == calls_of(plane, method, 1)


def test_starts_that_are_more_than_noise_are_refused_before_anything_is_spent() -> None:
    model = ImageToImage([1.0], [[0.5] * 2000], [0.6], steps=4, prompts=("p",))
    with pytest.raises(OptionError, match="pure noise"):
        steer(model, constant, Evo(n_particles=4))
    assert model.rows == 0
    late = Evo(n_particles=4, schedule=(0.5,))
    assert steer(model, constant, late).ledger.nfe == model.rows
