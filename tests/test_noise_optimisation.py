"""Noise optimisation: gradients through the sampler, known optima, regularisers, limits."""

from __future__ import annotations

import math

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward, QuadraticReward
from steering.errors import OptionError, RewardError
from steering.noise import NoiseKey
from steering.rewards import as_reward
from steering.samplers import CARINOX, DNO, BestOfN, ReNO
from steering.samplers.noise_optimisation import clipped
from steering.samplers.regularisers import REGULARISERS, probability, radius, slope

KEY = NoiseKey(1, "test")
BOWL = QuadraticReward([1.0, -1.0])


def bump(d: int = 2, steps: int = 5) -> GaussianMixture:
    """One Gaussian: every step is linear in the state."""
    return GaussianMixture([1.0], torch.full((1, d), 0.5), [0.7], steps=steps)


def two(steps: int = 5) -> GaussianMixture:
    return GaussianMixture([0.5, 0.5], [[-1.0, 0.5], [1.5, -1.0]], [0.5, 0.4], steps=steps)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# --- regularisers ---------------------------------------------------------------------------


def test_radius_is_smallest_at_its_typical_value_and_rises_on_both_sides():
    d = 50
    direction = normal(1, d)
    direction /= direction.norm()
    best = math.sqrt(d - 1)
    at = [float(radius(direction * r, KEY)) for r in (0.9 * best, best, 1.1 * best)]
    assert at[1] < at[0]
    assert at[1] < at[2]
    assert slope("radius", direction * best, KEY).abs().max() < 1e-9
    z = normal(3, d, seed=1)
    expected = (1 - (d - 1) / z.square().sum(1, keepdim=True)) * z
    torch.testing.assert_close(slope("radius", z, KEY), expected)


def test_probability_is_silent_on_noise_and_loud_on_what_is_none():
    z = normal(4, 4096)
    quiet = probability(z, KEY)
    assert (quiet > 4 * math.log(2) - 1e-9).all()
    assert quiet.mean() < 3.0
    calm, pull = (slope("probability", x, KEY).norm(dim=1).mean() for x in (z, 1.2 * z))
    assert calm < 0.05 * pull
    doubled = z[:, :2048].repeat_interleave(2, 1)  # radius sees nothing wrong with it
    for wrong in (z + 0.3, doubled, 1.2 * z):
        assert (probability(wrong, KEY) > quiet + 1.0).all()
    assert (slope("probability", z + 0.3, KEY).mean(1) > 0).all()


@pytest.mark.parametrize("name", REGULARISERS)
def test_slopes_of_regularisers_against_differences(name):
    z = normal(2, 24, seed=3) * 1.5 + 0.4
    found, step = slope(name, z, KEY), 1e-6
    for k in (0, 7, 23):
        nudge = torch.zeros_like(z)
        nudge[:, k] = step
        high, low = (REGULARISERS[name](z + s * nudge, KEY) for s in (1, -1))
        torch.testing.assert_close((high - low) / (2 * step), found[:, k], rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other():
    z = normal(5, 64) * 1.3
    for name in REGULARISERS:
        assert torch.allclose(slope(name, z, KEY)[2:3], slope(name, z[2:3], KEY))


def test_clipping_is_per_row_and_joint_over_tensors():
    a, b = normal(3, 4), normal(3, 2, 5, seed=1)
    out = clipped([a, b], 0.5)
    norms = torch.cat([g.flatten(1) for g in out], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 0.5).double())
    assert all(torch.equal(g, h) for g, h in zip(clipped([a, b], 1e9), [a, b], strict=True))
    assert torch.equal(clipped([a * torch.nan], 1.0)[0], torch.zeros_like(a))


# --- limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ReNO, CARINOX])
def test_one_iteration_is_best_of_n(cls):
    method = cls(n_iterations=1, restarts=4)
    mine = steering.steer(two(), reward=BOWL, method=method, seed=3)
    bon = steering.steer(two(), reward=BOWL, method=BestOfN(n=4), seed=3)
    assert torch.equal(mine.samples[0], bon.samples[0])
    assert mine.ledger.nfe_backward == 0
    one = steering.steer(two(), reward=BOWL, method=DNO(n_iterations=1, restarts=4), seed=3)
    sde = steering.steer(two(), reward=BOWL, method=BestOfN(n=4, eta=1.0), seed=3)
    assert torch.equal(one.samples[0], sde.samples[0])


@pytest.mark.parametrize("cls", [ReNO, DNO, CARINOX])
def test_without_a_step_every_iterate_is_the_first(cls):
    runs = [cls(n_iterations=k, restarts=2, lr=0.0, clip=1.0) for k in (1, 4)]
    one, four = (steering.steer(two(), reward=BOWL, method=m, seed=3) for m in runs)
    assert torch.equal(one.samples, four.samples)


def test_the_best_iterate_is_delivered_not_the_last():
    method = ReNO(n_iterations=12, lr=3.0, clip=None, reward_scale=5.0)  # jumps to and fro
    result = steering.steer(bump(), reward=BOWL, method=method)
    seen = [row for record in result.trace.column("rewards") for row in record]
    assert result.best_reward == pytest.approx(max(seen))
    assert seen[-1] < max(seen)


# --- what they reach ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        ReNO(
            n_iterations=120, lr=0.3, momentum=0.5, regulariser="none", reward_scale=1.0, clip=0.5
        ),
        ReNO(n_iterations=200, optimizer="adam", lr=0.05, clip=None, regulariser="none"),
        DNO(n_iterations=200, lr=0.05, regulariser="none"),
        DNO(n_iterations=60, lr=0.1, regulariser="none", estimator="hybrid", perturbation=0.05),
        CARINOX(n_iterations=150, restarts=2, lr=1.0, regulariser="none"),
    ],
    ids=["reno", "reno-adam", "dno", "dno-hybrid", "carinox"],
)
def test_the_top_of_a_bowl_is_reached(method):
    result = steering.steer(two(), reward=BOWL, method=method)
    assert result.best_reward > -2e-3


def test_the_linear_gaussian_optimum_under_the_radius_penalty():
    """d = 1, deterministic steps: x0 = a + b z; the optimum of s r(a + b z) - w reg(z) by grid."""
    model = GaussianMixture([1.0], [0.5], [0.7], steps=4)
    reward, scale, weight = LinearReward([1.0]), 0.8, 1.0
    method = ReNO(
        n_iterations=200, lr=0.1, clip=None, reward_scale=scale, reg_weight=weight, momentum=0.0
    )
    result = steering.steer(model, reward=reward, method=method, seed=2)
    x, kernel = torch.zeros(2, 1).double(), method.kernel()
    x[1] = 1.0
    for t, u in model.grid().steps():
        x = kernel(x, model.predict(x, t), t, u, model.path).mean
    slope_b = float(x[1] - x[0])
    # In one dimension the penalty is z^2 / 2, so the loss is smallest at z = s b / w; the reward
    # still rises beyond it, and the iterates come to rest there from below or above.
    last = result.trace.column("rewards")[-1][0]
    assert last == pytest.approx(float(x[0]) + slope_b * scale * slope_b / weight, abs=1e-6)


def test_the_radius_penalty_holds_the_noise_where_the_reward_pulls_it_away():
    pull = LinearReward([1.0] * 32)
    free, held = (
        steering.steer(
            bump(32), reward=pull, seed=1,
            method=ReNO(n_iterations=40, lr=0.5, clip=1.0, reward_scale=1.0, **held),
        ).trace.column("radius")[-1][0]
        for held in ({"regulariser": "none"}, {"regulariser": "radius", "reg_weight": 20.0})
    )  # fmt: skip
    assert free > 1.8
    assert held < 1.3


def test_components_are_clipped_apart():
    """A loud component and a quiet one pull along different axes with equal force."""

    def loud(images, prompts):
        return 1000.0 * images[:, 0]

    def quiet(images, prompts):
        return 0.01 * images[:, 1]

    loud.differentiable = quiet.differentiable = True
    both = as_reward(loud) + as_reward(quiet)
    model = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], steps=3)
    moves = {}
    for clip in (1e-4, 1e9):
        runs = [
            steering.steer(
                model, reward=both, seed=4,
                method=CARINOX(
                    n_iterations=k, restarts=1, lr=1.0, momentum=0.0, clip=None, reward_scale=1.0,
                    component_clip=clip, regulariser="none",
                ),
            ).samples[0]
            for k in (1, 2)
        ]  # fmt: skip
        moves[clip] = (runs[1] - runs[0]).tolist()
    assert moves[1e-4][0] == pytest.approx(moves[1e-4][1], rel=1e-3)
    assert moves[1e9][0] > 1e4 * moves[1e9][1]


# --- gradients through real chains -----------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_step_is_the_slope_of_the_whole_sampler(checkpoint):
    """One plain step of lr moves the noise by lr * slope, here by differences in noise space."""
    model, lr, nudge = two(), 1e-3, 1e-4
    method = ReNO(
        n_iterations=2, lr=lr, momentum=0.0, clip=None, regulariser="none", reward_scale=1.0,
        checkpoint=checkpoint,
    )  # fmt: skip
    start = model.noise(1, NoiseKey(9, "init")).double()

    def final(z):
        x, kernel = z, method.kernel()
        for t, u in model.grid().steps():
            x = kernel(x, model.predict(x, t), t, u, model.path).mean
        return x

    def value(z):
        return as_reward(BOWL)(final(z), ["p"]).value

    ups = []
    for k in range(2):
        e = torch.zeros_like(start)
        e[0, k] = nudge
        ups.append(float((value(start + e) - value(start - e)) / (2 * nudge)))
    moved = start + lr * torch.tensor([ups]).double()
    result = steering.steer(model, reward=BOWL, method=method, seed=9)
    assert result.ledger.nfe_backward == 5
    torch.testing.assert_close(result.samples, final(moved), rtol=0, atol=1e-6)


def test_noise_before_the_differentiated_steps_stays():
    """With the last step alone, only the noise that enters before it moves."""
    options = {"n_iterations": 4, "differentiate_last": 1, "variables": "all", "eta": 0.5}
    for cls in (DNO, CARINOX):
        result = steering.steer(two(), reward=BOWL, method=cls(lr=0.1, restarts=1, **options))
        assert result.ledger.nfe_backward == 3
        assert len(set(map(tuple, result.trace.column("radius")))) == 1
    everything = steering.steer(two(), reward=BOWL, method=DNO(n_iterations=4, lr=0.1, eta=0.5))
    assert len(set(map(tuple, everything.trace.column("radius")))) == 4


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (ReNO, {"restarts": 0}, "restarts"),
        (ReNO, {"lr": -1.0}, "lr"),
        (ReNO, {"momentum": 1.0}, "momentum"),
        (ReNO, {"variables": "all"}, "eta"),
        (ReNO, {"differentiate_last": 2}, "variables='all'"),
        (DNO, {"eta": 0.0}, "eta"),
        (DNO, {"perturbation": 0.0}, "perturbation"),
        (CARINOX, {"component_clip": 0.0}, "component_clip"),
    ],
)
def test_options_that_make_no_sense(cls, options, word):
    with pytest.raises(OptionError, match=word):
        cls(**options)


def test_a_black_box_is_refused_unless_its_slope_is_estimated():
    def step(images, prompts):
        return (images[:, 0] > 0).double()

    step.differentiable = False

    model = two()
    for method in (ReNO(n_iterations=2), DNO(n_iterations=2)):
        with pytest.raises(RewardError, match="gradient"):
            steering.steer(model, reward=step, method=method)
    assert model.rows == 0
    hybrid = DNO(n_iterations=2, estimator="hybrid")
    assert steering.steer(model, reward=step, method=hybrid).ledger.nfe_backward > 0


def test_a_model_that_moves_by_itself_has_no_noise_to_optimise():
    model = GaussianMixture([1.0], [0.0], [1.0], steps=4, kernel="exact")
    with pytest.raises(OptionError, match="initial"):
        steering.steer(model, reward=LinearReward([1.0]), method=DNO(n_iterations=2))
    assert model.rows == 0


def test_a_weight_for_no_component():
    method = CARINOX(n_iterations=2, weights={"clpi": 2.0})
    with pytest.raises(OptionError, match="clpi"):
        steering.steer(two(), reward=BOWL, method=method)


def test_starts_that_hold_a_picture_are_not_judged_as_noise():
    class FromPicture(GaussianMixture):
        def noise(self, n, key, *, cond=0):
            return 2.0 + super().noise(n, key, cond=cond)

    model = FromPicture([1.0], torch.zeros(1, 400), [1.0], steps=3)
    reward = LinearReward([1.0] * 400)
    with pytest.raises(OptionError, match="image-to-image"):
        steering.steer(model, reward=reward, method=ReNO(n_iterations=2))
    assert model.rows == 0
    free = ReNO(n_iterations=2, regulariser="none")
    assert steering.steer(model, reward=reward, method=free).ledger.nfe_backward > 0


def test_fewer_iterations_take_longer_steps_within_bounds():
    """Published: lr 5 for 50 iterations at d = 16,384, and Adam's 0.01 for 100."""
    d = 16384
    lrs = [ReNO(n_iterations=k)._lr(d) for k in (2, 8, 20, 50, 200)]
    assert lrs[0] == 5.0 * 16
    assert lrs[3:] == [5.0, 5.0]
    assert lrs == sorted(lrs, reverse=True)
    assert ReNO(n_iterations=50)._lr(d // 4) == 2.5
    slow = [ReNO(n_iterations=k, momentum=0.0)._lr(d) for k in (8, 50)]
    assert slow == pytest.approx([5.0 * 7.0, 5.0])  # 49 steps against 7
    adam = [DNO(n_iterations=k)._lr(d) for k in (2, 34, 100, 500)]
    assert adam == pytest.approx([0.05, 0.03, 0.01, 0.01])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_short_runs_can_go_as_far_as_the_published_ones(momentum):
    """Along one direction, by torch's own optimiser."""

    def distance(k):
        method = ReNO(n_iterations=k, momentum=momentum)
        z = torch.zeros(1, 2, requires_grad=True)
        optimiser = torch.optim.SGD(
            [z], lr=method._lr(16384), momentum=momentum, nesterov=momentum > 0.0
        )
        for _ in range(k - 1):
            z.grad = torch.tensor([[-1.0, 0.0]])
            optimiser.step()
        return float(z[0, 0])

    assert distance(30) == pytest.approx(distance(50), rel=1e-5)
    assert distance(12) == pytest.approx(distance(50), rel=1e-5)


# --- what each part of a step is there for ------------------------------------------------------


def test_momentum_is_nesterovs():
    """On a linear reward the k-th step is 1 + m + ... + m^k of the first, the last m^k more."""
    model, reward = bump(1, steps=2), LinearReward([1.0])
    seen = []

    def watch(task, progress):
        seen.append(float(progress.preview[0, 0]))

    method = ReNO(n_iterations=5, lr=0.5, momentum=0.5, clip=1.0, regulariser="none")
    steering.steer(model, reward=reward, method=method, listener=watch)
    steps = torch.tensor(seen).diff()
    speeds = torch.tensor([(1 - 0.5**k) / 0.5 for k in range(1, 5)])
    torch.testing.assert_close(steps / steps[0], (1 + 0.5 * speeds) / 1.5, rtol=1e-4, atol=0)


def test_step_sizes_grow_with_the_radius_of_the_noise():
    """lr 5 on 16,384 numbers, clipped to .1: 16 times as many are moved 4 times as far."""
    moved = []
    for d in (4, 64):
        seen = []
        method = ReNO(n_iterations=50, regulariser="none", momentum=0.0)

        def watch(task, progress, seen=seen):
            seen.append(progress.preview[0, 0].double().clone())

        reward = LinearReward([1.0, *[0.0] * (d - 1)])
        steering.steer(bump(d, steps=2), reward=reward, method=method, listener=watch)
        moved.append(float(seen[1] - seen[0]))
    assert moved[1] / moved[0] == pytest.approx(4.0, rel=1e-3)


def test_master_noise_is_at_least_float32():
    """Steps that are each below the resolution of half precision add up."""

    class Half(GaussianMixture):
        def noise(self, n, key, *, cond=0):
            return super().noise(n, key, cond=cond).half()

    model = Half([1.0], [[0.0, 0.0]], [1.0], steps=2)
    method = ReNO(n_iterations=100, lr=1e-4, momentum=0.0, clip=1.0, regulariser="none")
    result = steering.steer(model, reward=LinearReward([1.0, 0.0]), method=method)
    radius = [rows[0] for rows in result.trace.column("radius")]
    assert abs(radius[1] - radius[0]) > 1e-6
    assert radius[-1] - radius[0] == pytest.approx(99 * (radius[1] - radius[0]), rel=0.05)


def test_the_first_of_equal_iterates_is_delivered():
    def flat(images, prompts):
        return 0.0 * images.sum(1)

    flat.differentiable = True
    method = ReNO(n_iterations=4, reg_weight=1.0, clip=1.0, lr=0.3)
    moved = steering.steer(bump(), reward=flat, method=method)
    assert len({rows[0] for rows in moved.trace.column("radius")}) == 4
    assert torch.equal(
        moved.samples, steering.steer(bump(), reward=flat, method=BestOfN(n=1)).samples
    )


class Watched(GaussianMixture):
    """Keeps the states that the network is asked about."""

    def predict(self, x, t, **more):
        self.asked = [*getattr(self, "asked", []), x.detach().clone()]
        return super().predict(x, t, **more)


def test_nudges_differ_and_touch_only_what_is_optimised():
    model = Watched([1.0], [[0.5, 0.5]], [0.7], steps=3)
    method = DNO(n_iterations=2, estimator="hybrid", n_perturbations=2, differentiate_last=1)
    steering.steer(model, reward=BOWL, method=method)
    walks = [torch.cat(model.asked[k : k + 3]) for k in (0, 3, 6)]
    for near in walks[1:]:
        assert torch.equal(near[:2], walks[0][:2])
        assert not torch.equal(near[2], walks[0][2])
    assert not torch.equal(walks[1][2], walks[2][2])


def test_the_hybrid_estimate_leaves_what_the_reward_refuses():
    """-inf left of a wall that few nudges pass: those say which way to go."""
    for seed in range(3):
        start = steering.steer(bump(), reward=BOWL, method=BestOfN(n=1, eta=1.0), seed=seed)
        wall = float(start.samples[0, 0]) + 0.4

        def walled(images, prompts, wall=wall):
            return torch.where(images[:, 0] > wall, images[:, 0], -math.inf)

        method = DNO(
            n_iterations=40, estimator="hybrid", n_perturbations=16, perturbation=0.5, lr=0.05,
            regulariser="none",
        )  # fmt: skip
        result = steering.steer(bump(), reward=walled, method=method, seed=seed)
        assert result.best_reward > wall + 0.5


@pytest.mark.parametrize("cls", [ReNO, DNO, CARINOX])
def test_a_reward_without_a_slope_is_a_warning(cls):
    """sqrt at 0: its value is right, its derivative is not; nothing moves, and that is said."""
    reward = as_reward(lambda images: (images * 0.0).sqrt().sum(1) + images[:, 0])
    with pytest.warns(UserWarning, match=f"{cls.name}: the gradient .* NaN or inf"):
        found = steering.steer(two(), reward=reward, method=cls(n_iterations=3))
    assert torch.isfinite(found.rewards).all()
