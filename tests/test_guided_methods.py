"""Guidance as an option of other methods: costs, noise and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.errors import BudgetError, OptionError, RewardError
from steering.ledger import Budget
from steering.method import (
    Context,
    Method,
    Plan,
    build_method,
    default_costs,
    method_options,
    plain,
)
from steering.noise import NoiseKey
from steering.registry import METHODS
from steering.rewards import FunctionReward
from steering.samplers import (
    DTS,
    EPF,
    RBF,
    SVDD,
    Auto,
    BestOfMajority,
    BestOfN,
    CoDe,
    DTSStar,
    Evo,
    Guidance,
    Guide,
    ParallelTempering,
    ParticleGibbs,
    RandomSearch,
    Reflect,
    SearchOverPaths,
    ZeroOrder,
)
from steering.samplers.guides import Rows
from steering.transitions import EtaKernel
from tests.test_contract import CASES, COUNTS, PROMPTS, bright, near, world
from tests.test_guidance import answered
from tests.tiny_pipelines import build
from tests.twisted_worlds import (
    BOWL,
    Paired,
    line,
    plane,
    repeated,
    steer,
)

# --- what every method keeps -------------------------------------------------------------------


def guided(case, **guide) -> Method:
    """A setting of the contract with guidance, on a random path where it counts densities."""
    more = {}
    if case.weighed and not case.kernel().stochastic:
        more = {
            "eta": 1.0,
            **({"move": "tail", "blend": 0.4} if case.name == "parallel_tempering" else {}),
        }
    turns = {} if case.weighed or case.name == "rbf" else {"recurrence": 2}
    settings = {"rho": 0.5, "mu": 0.05, "smoothing": 0.1, "n_draws": 2, "start": 0.2, "stop": 0.9}
    return replace(case, guidance=Guide(**{**settings, **turns, **guide}), **more)


LEADABLE = [name for name in sorted(CASES) if METHODS.get(name).unguided is None]
EVERY = [
    pytest.param(case, id=f"{name}-{k}") for name in LEADABLE for k, case in enumerate(CASES[name])
]


def test_which_methods_can_be_guided() -> None:
    refused = set(METHODS.names()) - set(LEADABLE)
    assert refused == {"carinox", "das", "dno", "guidance", "reno", "tds"}


@pytest.mark.parametrize("case", EVERY)
def test_the_ledger_agrees_with_the_forecast(case) -> None:
    for guide in ({"n_iter": 2}, {"rho": 0.0}):
        method, model = guided(case, **guide), world()
        grid = method.levels(model)
        plan = Plan(grid=grid, costs=default_costs(model, grid), budget=Budget())
        cost = method.fit(plan).cost(plan)
        ledger = steering.steer(model, reward=near, method=method).ledger
        spent = (ledger.nfe, ledger.decodes, ledger.reward_calls)
        forecast = (cost.nfe, cost.decodes, cost.reward_calls)
        assert ledger.nfe == model.rows + ledger.deduplicated
        if method.anytime:
            assert all(s <= f for s, f in zip(spent, forecast, strict=True))
        else:
            assert spent == forecast
        assert (ledger.nfe_backward > 0) == (method.guide.rho > 0.0)
        assert ledger.reward_backward > 0
        assert method.needs_gradient


@pytest.mark.parametrize("case", EVERY)
def test_guidance_of_no_strength_changes_no_bit(case) -> None:
    nothing = guided(case, rho=0.0, mu=0.0, recurrence=1)
    plain, one = (
        steering.steer(world(), reward=near, method=m, seed=2)
        for m in (replace(nothing, guidance=None), nothing)
    )
    assert torch.equal(one.samples, plain.samples)
    assert torch.equal(one.log_weights, plain.log_weights)
    assert one.log_z == plain.log_z
    assert [getattr(one.ledger, c) for c in COUNTS] == [getattr(plain.ledger, c) for c in COUNTS]


@pytest.mark.parametrize("name", LEADABLE)
def test_prompts_run_together_as_they_run_alone(name: str) -> None:
    method, seeds = guided(CASES[name][0], n_iter=2), list(range(len(PROMPTS)))
    many = steering.steer(world(PROMPTS), reward=near, method=method, seed=seeds, max_batch=24)
    for k in (0, 5):
        one = steering.steer(world((PROMPTS[k],)), reward=near, method=method, seed=k)
        torch.testing.assert_close(many[k].samples, one.samples, rtol=0, atol=1e-5)
        torch.testing.assert_close(many[k].log_weights, one.log_weights, rtol=0, atol=1e-5)
        assert [getattr(many[k].ledger, c) for c in COUNTS] == [
            getattr(one.ledger, c) for c in COUNTS
        ]


COSTS = [
    # 6 steps of two rows; five of them are guided where densities count.
    (EPF(n_particles=3, checkpoints=(0.5,), guidance=Guide()), 3 * 6, 3 * 5, 3 * (5 + 1 + 1)),
    # Steps 2 to 4 branch: 3 plain nodes and 2 of 3 candidates; nodes 3 and 4 asked again.
    (
        SVDD(n_particles=2, n_branches=3, start=0.5, guidance=Guide()),
        2 * (3 + 2 * 3 + 3 + 2),
        2 * 5,
        2 * (5 + 3 * 3),
    ),
    # The same without the network: nothing is asked again.
    (
        SVDD(n_particles=2, n_branches=3, start=0.5, guidance=Guide(rho=0.0, mu=0.1)),
        2 * (3 + 2 * 3 + 3),
        0,
        2 * (5 + 3 * 3),
    ),
    # Two blocks of three steps and two candidates, the first from noises of their own.
    (
        CoDe(n_particles=1, n_branches=2, block=3, guidance=Guide()),
        2 * 3 + 2 + 1 + 2 * 2,
        2 * 3 + 1 + 2,
        (2 * 3 + 1 + 2) + 2 + 2,
    ),
    # 3 + 2 particles.
    (
        ParticleGibbs(n_particles=3, iterations=2, checkpoints=(0.5,), guidance=Guide()),
        5 * 6,
        5 * 5,
        5 * (5 + 1 + 1),
    ),
    # A first path, a new one and a tail of three steps, of which two are guided.
    (
        ParallelTempering(
            n_particles=2, iterations=2, move="tail", eta=1.0, cuts=(0.5,), guidance=Guide()
        ),
        2 * (6 + 6 + 3),
        2 * (5 + 5 + 2),
        2 * (5 + 5 + 2 + 3),
    ),
    (RandomSearch(n=3, guidance=Guide(mu=0.1)), 3 * 6, 3 * 6, 3 * (6 * 2 + 1)),
    # Two noises and two levels of three proposals; a gradient a level and finishing step, of which
    # the states at the levels and at the start of the finish are asked again.
    (
        RBF(n_proposals=6, n_init=2, n_chains=1, steps=3, finish_steps=3, guidance=Guide()),
        2 + 6 + 2 + 3,
        2 + 3,
        (2 + 6 + 1) + 2 + 3,
    ),
    # The same without the network, guided at the second level and the first finishing step.
    (
        RBF(
            n_proposals=6,
            n_init=2,
            n_chains=2,
            steps=3,
            finish_steps=3,
            guidance=Guide(rho=0.0, mu=0.1, n_iter=3, start=0.2, stop=0.6),
        ),
        2 * (2 + 6 + 2),
        0,
        2 * ((2 + 6 + 1) + 3 * 2),
    ),
    # Nothing is searched after the only level, and its estimate is delivered.
    (
        RBF(n_proposals=3, n_init=2, n_chains=1, steps=2, finish="none", guidance=Guide()),
        2 + 3 + 1,
        1,
        2 + 3 + 1 + 1,
    ),
    (
        Evo(n_particles=2, schedule=(0.5,), elites=1, guidance=Guide(start=0.5, recurrence=2)),
        2 * (3 + 6) + 2 * 6,
        2 * 6 + 2 * 6,
        2 * (6 + 6 + 2),
    ),
]


@pytest.mark.parametrize(("method", "rows", "backward", "calls"), COSTS)
def test_costs_by_hand(method, rows: int, backward: int, calls: int) -> None:
    model = Paired()
    ledger = steer(model, BOWL, method).ledger
    assert ledger.nfe == 2 * rows == model.rows
    assert ledger.nfe_backward == 2 * backward
    assert ledger.decodes == ledger.reward_calls == calls


def test_budgets_pay_for_gradients_too() -> None:
    for method in (
        *(EPF(), SVDD(), CoDe(), ParticleGibbs(), RandomSearch(), Evo(elites=0)),
        *(DTS(), DTSStar(), RBF(n_init=2, steps=4, finish_steps=2)),
    ):
        ledger = steer(
            plane(), BOWL, replace(method, guidance=Guide(rho=0.0, mu=0.01)), nfe=400
        ).ledger
        assert 200 <= ledger.nfe <= 400
        budget = Budget(reward_calls=150)
        led = replace(method, guidance=Guide())
        assert steer(plane(), BOWL, led, budget=budget).ledger.reward_calls <= 150
    tail = ParallelTempering(move="tail", eta=1.0, guidance=Guide())
    for cap, calls in ((Budget(reward_calls=150), 150), (Budget(nfe=150), 10**6)):
        ledger = steer(plane(), BOWL, tail, budget=cap).ledger
        assert 75 <= ledger.reward_calls <= calls or ledger.nfe <= 150
    model = plane()
    with pytest.raises(BudgetError):
        steer(model, BOWL, replace(tail, n_particles=1), budget=Budget(reward_calls=7))
    assert model.rows == 0


# --- walks -------------------------------------------------------------------------------------

SEARCHES = (
    BestOfMajority(n=4, k=4, min_frequency=0.0),
    RandomSearch(n=4),
    ZeroOrder(n_neighbours=3, rounds=1),
    SearchOverPaths(n_particles=1, n_neighbours=4),
    Evo(n_particles=2, schedule=(0.5,), elites=1),
    Reflect(rounds=2, n=2),
    Auto(n=4, pilot=2),
    CoDe(n_particles=1, n_branches=3, reward_scale=1.0),
    DTSStar(trajectories=4, width=2),
    RBF(n_proposals=6, n_init=1, n_chains=1, steps=4, finish_steps=4),
)


@pytest.mark.parametrize("method", SEARCHES, ids=lambda method: method.name)
def test_guidance_raises_what_searches_find(method) -> None:
    def hill(x):
        return torch.exp(-(x - torch.tensor([1.5, -1.5])).square().sum(1) / 8.0)

    rewards = []
    for guide in (None, Guide(rho=0.5, stop=0.9)):
        results = repeated(plane, hill, replace(method, guidance=guide), repeats=24)
        rewards.append(sum(float(r.rewards.mean()) for r in results) / len(results))
    assert rewards[1] > rewards[0] + 0.02


def test_samples_of_a_guided_search_are_those_of_guidance() -> None:
    """Number for number, whatever rounds they come in."""
    guide = {"rho": 0.4, "mu": 0.1, "smoothing": 0.3, "n_draws": 2, "recurrence": 2}
    scale = {"reward_scale": 10.0}
    one = steer(plane(), BOWL, Guidance(n_particles=5, eta=0.5, **guide, **scale))
    best = one.samples[one.rewards.argmax()]
    for method in (
        RandomSearch(n=5, pool=2, growth=1, eta=0.5, guidance=guide),
        RandomSearch(n=5, pool=5, eta=0.5, guidance=guide),
        BestOfN(n=5, eta=0.5, guidance=guide, **scale),
        SearchOverPaths(n_particles=5, n_neighbours=1, seed_level=1.0, eta=0.5, guidance=guide),
        DTSStar(trajectories=5, branch_levels=(), width=2, eta=0.5, guidance=guide, **scale),
    ):
        torch.testing.assert_close(steer(plane(), BOWL, method).samples[0], best)


def test_rounds_smooth_with_noise_of_their_own() -> None:
    """Equal starts, a deterministic walk: only the smoothing can tell two streams apart."""
    model, guide = line(), Guide(smoothing=0.5, n_draws=1)
    plan = Plan(grid=model.grid(), costs=model.costs(), budget=Budget())
    ctx = Context(model=model, cond=0, seed=0, plan=plan)
    t, u = model.grid().times[2:4]
    x = model.noise(3, NoiseKey(1, "x"))

    def moved(**rows):
        step = guide.step(ctx, x, t, u, 2, EtaKernel(eta=0.0), 1.0, rows=Rows(**rows))
        return answered(model, lambda x: -(x[:, 0] - 1.0).square(), step)[0]

    assert torch.equal(moved(), moved(stream="proposal"))
    assert not torch.equal(moved(), moved(stream="round/1"))
    assert torch.equal(moved(slots=[2, 0, 0])[1:], moved(slots=[0, 0, 0])[1:])
    torch.testing.assert_close(moved(slots=[5, 1, 7])[1], moved()[1])


# --- real pipelines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("flux", "epf"),
        ("sd", "svdd"),
        ("flux", "particle_gibbs"),
        ("sd", "parallel_tempering"),
        ("flux", "zero_order"),
        ("sd", "dts"),
        ("flux", "rbf"),
    ],
)
def test_real_pipelines(pipeline: str, name: str) -> None:
    pipe, call = build(pipeline, steps=4)
    method = guided(CASES[name][0], smoothing=0.0, n_draws=1)
    result = steering.steer(pipe, reward=bright, method=method, **call)
    assert torch.isfinite(result.rewards).all()
    assert torch.isfinite(result.log_weights.exp()).all()
    assert result.ledger.nfe_backward > 0


def test_gradients_are_asked_under_the_rewritten_prompt() -> None:
    """No step but the guided ones: what changes with the words are their gradients."""
    pipe, call = build("sd3", steps=3)
    rows = []
    for rewriter in (lambda prompt, critiques: "a small blue boat", None):
        method = Reflect(rounds=2, rewriter=rewriter, guidance=Guide(rho=0.5))
        rows.append(steering.steer(pipe, reward=bright, method=method, **call))
    a, b = (r.trace.column("rewards") for r in rows)
    assert a[0] == pytest.approx(b[0], abs=1e-6)
    assert a[1] != pytest.approx(b[1], abs=1e-6)


# --- options and refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["carinox", "das", "dno", "guidance", "reno", "tds"])
def test_methods_that_lean_by_themselves_say_so(name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} takes no guidance: .* [Uu]se |Set "):
        build_method(name, {"guidance": "dps"})
    assert build_method(name, {"guidance": "none"}).guide is None


def test_a_method_of_the_users_own_does_not_swallow_guidance() -> None:
    class Own(BestOfN):
        unguided = steering.samplers.base.Sampler.unguided

    with pytest.raises(OptionError, match="its steps are written without it"):
        Own(guidance="dps")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParallelTempering(guidance="dps"), "move='tail' and eta=1"),
        (lambda: SVDD(guidance="freedom"), "recurrence=1"),
        (lambda: CoDe(guidance="freedom"), "recurrence=1"),
        (lambda: EPF(guidance={"recurrence": 2}), "recurrence=1"),
        (lambda: DTS(guidance="freedom"), "recurrence=1"),
        (lambda: DTS(guidance="dps", eta=0.0, branch_levels=()), "deterministic"),
        (lambda: RBF(guidance="freedom"), "recurrence=1"),
        (lambda: ParticleGibbs(guidance="ugd"), "recurrence=1"),
        (lambda: EPF(guidance="dps", n_particles=1, eta=0.0), "deterministic"),
        (lambda: CoDe(guidance="dps", n_branches=1, eta=0.0), "deterministic"),
        (lambda: Auto(guidance="freedom"), "recurrence=1"),
        (lambda: RandomSearch(guidance="dsp"), "Did you mean 'dps'"),
    ],
)
def test_bad_options(make, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()


@pytest.mark.parametrize("name", LEADABLE)
def test_refusals_come_before_the_first_call(name: str) -> None:
    method = guided(CASES[name][0])
    model, exact = world(), GaussianMixture([1.0], [0.0], [1.0], kernel="exact")
    blind = FunctionReward(lambda x: x[:, 0], differentiable=False)
    with pytest.raises(RewardError, match="needs the gradient of the reward"):
        steering.steer(model, reward=blind, method=method)
    with pytest.raises(OptionError, match="a law of its own"):
        steering.steer(exact, reward=near, method=method)
    assert model.rows == exact.rows == 0


@pytest.mark.parametrize("name", LEADABLE)
def test_options_survive_json(name: str) -> None:
    method = replace(guided(CASES[name][0]), guidance="mpgd")
    assert build_method(name, method_options(method)) == method
    assert build_method(name, {"guidance": None}) == METHODS.get(name)()


def test_guidance_by_name_options_or_both_is_the_same_from_a_method_name() -> None:
    """As from the command line: `--set guidance=...` and options of `steer`."""
    tfg = build_method("fk", {"guidance": "tfg"}).guidance
    for value in ("tfg", {"preset": "tfg"}, tfg, plain(tfg)):
        assert build_method("fk", {"guidance": value}).guidance == tfg
    mixed = build_method("fk", {"guidance": {"preset": "tfg", "mu": 0.5}}).guidance
    assert mixed == replace(tfg, mu=0.5)
    for options, word in (({"mue": 1.0}, "mu"), ({"preset": "tgf"}, "tfg")):
        with pytest.raises(OptionError, match=word):
            build_method("fk", {"guidance": options})
