"""Tree search against exact laws and values, its limits, its maximum, its growth."""

from __future__ import annotations

import math

import pytest
import torch

from steering.analytic import FiniteChain, MaskedChain, QuadraticReward, TableReward
from steering.samplers import DTS, BestOfN, DTSStar
from steering.samplers.tree import ROOT, Tree
from tests.kept_trees import kept
from tests.populations import LINE, TABLE, TRUTHS, by_slot, chain, errors, line, repeated, steer

FULL = {"widening_power": 0.0, "trajectories": 10**4}


# --- the law -----------------------------------------------------------------------------------

FIXED = {
    "line": {"widening": 12, "branch_levels": (0.5,), "width": 144},
    "plane": {"widening": 5, "branch_levels": (0.25, 0.5), "width": 25},
    "cloud": {"widening": 11, "branch_levels": (0.34,), "width": 30},
    "chain": {"widening": 5, "branch_levels": (0.5,), "width": 3},
}


@pytest.mark.parametrize("world", sorted(TRUTHS))
def test_a_tree_of_fixed_width_is_unbiased(world: str) -> None:
    """Z and Z E[f], whatever the order in which it grew. Measured: at most 2.4."""
    make, reward, scale, f = TRUTHS[world]
    results = repeated(make, reward, DTS(reward_scale=scale, **FULL, **FIXED[world]))
    model = make()
    if isinstance(model, FiniteChain):
        mean = float(model.tilted_law(reward, scale)[3])
    else:
        mean = float(f(model.tilted(reward, scale).moments()[0][None]))
    log_z = model.log_normaliser(reward, scale)
    assert [r.log_z for r in results] == [r.trace.column("root_value")[-1] for r in results]
    z = [math.exp(r.log_z - log_z) for r in results]
    zf = [a * float(r.weights @ f(r.samples)) for a, r in zip(z, results, strict=True)]
    assert errors(z, 1.0, noise=0.1) < 5.0
    assert errors(zf, mean, noise=0.1) < 5.0
    depth = 1 + len(FIXED[world]["branch_levels"])
    assert {len(r) for r in results} == {FIXED[world]["widening"] ** depth}


def test_values_are_log_partition_functions(tmp_path) -> None:
    """Every node of an enumerable chain against the exact backward recursion."""
    model = chain()
    method = DTS(widening=10, branch_levels=(0.34, 0.67), width=500, reward_scale=1.0, **FULL)
    tree, _ = kept(tmp_path, model, TABLE, method)
    exact = model.values(TABLE, 1.0)
    assert len(tree.leaves) == 10**3
    for depth in (1, 2):
        nodes = [n for n in range(len(tree)) if tree.depth[n] == depth]
        ratio = [
            math.exp(tree.value[n] - float(exact[tree.place(n)][int(tree.states[n])]))
            for n in nodes
        ]
        assert errors(ratio, 1.0) < 5.0


def short(prompts=("p",)) -> FiniteChain:
    """Two steps among four states."""
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    return FiniteChain([0.4, 0.3, 0.2, 0.1], torch.softmax(logits, 2), prompts=prompts)


def misses(world: str, **options) -> tuple[float, float]:
    """Mean error of ln Z, and of E[f] as a share of the way from the model's own."""
    make, reward, scale, f = TRUTHS[world]
    method = DTS(reward_scale=scale, trajectories=300, width=60, **options)
    results, model = steer(make(("p",) * 8), reward, method, seed=list(range(8))), make()
    mean = float(f(model.tilted(reward, scale).moments()[0][None]))
    way = mean - float(f(model.moments()[0][None]))
    values = [r.trace.column("root_value")[-1] for r in results]
    found = [float(r.weights @ f(r.samples)) for r in results]
    log_z = sum(values) / 8 - model.log_normaliser(reward, scale)
    return log_z, (sum(found) / 8 - mean) / way


@pytest.mark.parametrize("world", ["line", "plane", "cloud"])
def test_an_adaptive_tree_of_one_level_comes_near_the_law(world: str) -> None:
    """Measured: ln Z at most 0.08 too low, the mean at most 12 % short."""
    log_z, share = misses(world, branch_levels=(0.5,))
    assert -0.2 < log_z < 0.1
    assert abs(share) < 0.2


def test_the_default_tree_keeps_a_bias() -> None:
    """A node whose first leaves were unlucky is hardly met again, and three levels leave few
    visits to the lowest. In 16 dimensions ln Z stays 0.14 too low and E[f] falls 0.14 short, at
    256 trajectories as at 4096, so its target is called a heuristic one. Measured: 0.16 each."""
    log_z, share = misses("cloud")
    assert -0.25 < log_z < -0.05
    assert -0.3 < share < -0.05
    assert DTS().target == DTS.target == "heuristic"
    for exact in ({"widening_power": 0.0}, {"branch_levels": ()}):
        assert DTS(**exact).target == "tilted"
        assert DTS(**exact, backup="max").target == "heuristic"


def test_an_adaptive_tree_closes_in_on_the_exact_values() -> None:
    """Biased low, and the less so the larger the tree: 0.21 of ln Z at 30 trajectories, 0.05 at
    1200; 0.11 and 0.03 of the share of a state."""
    table, model, gaps = TableReward([0.0, 1.0, -1.0, 1.5]), short(), []
    truth = model.log_normaliser(table), float(model.tilted_law(table)[3])
    for trajectories in (30, 1200):
        method = DTS(
            reward_scale=1.0,
            trajectories=trajectories,
            branch_levels=(0.0,),
            width=trajectories // 10,
        )
        results = steer(short(("p",) * 6), table, method, seed=list(range(6)))
        values = [r.trace.column("root_value")[-1] - truth[0] for r in results]
        shares = [float(r.weights @ (r.samples[:, 0] == 3).double()) for r in results]
        gaps.append((abs(sum(values) / 6), abs(sum(shares) / 6 - truth[1])))
    assert gaps[1][0] < min(0.1, 0.5 * gaps[0][0])
    assert gaps[1][1] < min(0.05, 0.6 * gaps[0][1])


@pytest.mark.parametrize("world", ["line", "chain"])
def test_at_reward_scale_zero_the_law_is_the_models_own(world: str) -> None:
    """Measured: 0.6 and 1.3."""
    make, reward, _, f = TRUTHS[world]
    results = repeated(make, reward, DTS(reward_scale=0.0, trajectories=12, width=8))
    model = make()
    mean = float(model.law()[3]) if world == "chain" else float(f(model.moments()[0][None]))
    means = [float(r.weights @ f(r.samples)) for r in results]
    assert errors(means, mean, noise=0.3) < 5.0
    assert all(v == 0.0 for r in results for v in r.trace.column("root_value"))


def test_k_draws_follow_the_weights() -> None:
    method = DTS(reward_scale=1.0, trajectories=12)
    every = steer(line(), LINE, method, seed=4)
    drawn = steer(line(), LINE, DTS(reward_scale=1.0, trajectories=12, k=4000), seed=4)
    assert len(drawn) == 4000
    assert torch.equal(drawn.log_weights, torch.zeros(4000).double())
    for slot, weight in zip(every.slots, every.weights, strict=True):
        share = float((drawn.slots == slot).double().mean())
        assert abs(share - weight) < 5.0 * math.sqrt(weight * (1 - weight) / 4000) + 1e-9


# --- limits ------------------------------------------------------------------------------------

MODELS = {"exact": lambda: line(), "path": lambda: line(kernel="path"), "chain": chain}


@pytest.mark.parametrize("model", sorted(MODELS))
def test_without_branching_it_is_best_of_n_bit_for_bit(model: str) -> None:
    reward = TABLE if model == "chain" else LINE
    base = BestOfN(n=9, select="all", reward_scale=2.0, eta=1.0)
    base = steer(MODELS[model](), reward, base, seed=3)
    options = {"trajectories": 9, "branch_levels": (), "width": 9}
    ours = steer(MODELS[model](), reward, DTS(reward_scale=2.0, **options), seed=3)
    assert torch.equal(by_slot(ours), by_slot(base))
    assert torch.equal(ours.rewards, base.rewards)
    assert torch.allclose(ours.log_weights, base.log_weights, rtol=0, atol=1e-12)
    assert ours.log_z == pytest.approx(base.log_z, abs=1e-12)
    best = steer(MODELS[model](), reward, DTSStar(**options), seed=3)
    assert torch.equal(best.samples, base.samples[:1])
    assert torch.equal(best.rewards, base.rewards[:1])


def test_a_normaliser_only_where_no_reward_decides_how_many_children() -> None:
    wide = {"widening": 2.0, "widening_power": 0.0, "branch_levels": (0.5,)}
    full, part = (steer(line(), LINE, DTS(**wide, trajectories=n)) for n in (3, 2))
    assert len(full) == 4
    assert full.log_z == full.trace.column("root_value")[-1]
    assert len(part) < 4
    assert part.log_z is None
    capped = {"max_children": 2, "branch_levels": (0.5,), "trajectories": 9}
    assert steer(line(), LINE, DTS(**capped)).log_z is not None
    assert steer(line(), LINE, DTS(branch_levels=(0.5,), trajectories=9)).log_z is None
    assert steer(line(), LINE, DTS(**wide, trajectories=3, backup="mean")).log_z is None


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_backups_that_are_no_soft_values_claim_neither_target_nor_normaliser(backup: str) -> None:
    method = DTS(backup=backup, branch_levels=(), trajectories=6)
    assert method.target == "heuristic"
    assert steer(line(), LINE, method).log_z is None


@pytest.mark.parametrize("width", [1, 4])
def test_a_model_without_noise_in_its_steps_can_still_choose_its_start(width: int) -> None:
    result = steer(
        line(kernel="path"), LINE, DTS(eta=0.0, branch_levels=(), trajectories=6, width=width)
    )
    base = steer(line(kernel="path"), LINE, BestOfN(n=6, select="all"))
    assert torch.allclose(by_slot(result), by_slot(base), rtol=0, atol=1e-12)


def test_a_constant_added_to_the_reward_changes_nothing_but_values() -> None:
    shifted = lambda images: LINE(images) + 7.0  # noqa: E731
    for method in (DTS(reward_scale=2.0, trajectories=9), DTSStar(trajectories=9)):
        one, other = (steer(line(), r, method, seed=1) for r in (LINE, shifted))
        assert one.trace.column("parents") == other.trace.column("parents")
        assert torch.allclose(by_slot(one), by_slot(other), rtol=0, atol=1e-12)


# --- the maximum -------------------------------------------------------------------------------


def spelling(prompts=("p",)) -> tuple[MaskedChain, TableReward]:
    """Words of four letters out of three; one in 390 is right, and the reward counts letters."""
    place = torch.tensor([0.4, 0.38, 0.22], dtype=torch.float64)
    joint = torch.einsum("a,b,c,d->abcd", place, place, place, place)
    model = MaskedChain(joint, prompts=prompts)
    return model, TableReward((model.words == 2).sum(1).double())


@pytest.mark.parametrize("options", [{}, {"select": "puct"}, {"backup": "max"}], ids=str)
def test_dts_star_finds_the_best_leaf_more_often_than_best_of_n(options: dict) -> None:
    """One run in twelve of best-of-N, 6 to 8 of a tree search at the same cost."""
    prompts, seeds = ("p",) * 12, list(range(12))
    model, reward = spelling(prompts)
    method = DTSStar(trajectories=50, branch_levels=(0.25, 0.5), width=8, **options)
    found = [r.best_reward == 4.0 for r in steer(model, reward, method, seed=seeds)]
    base = [r.best_reward == 4.0 for r in steer(model, reward, BestOfN(n=50), seed=seeds)]
    print(options, sum(found), sum(base))
    assert sum(found) >= 3 + sum(base)


def test_dts_star_climbs_towards_the_optimum_of_a_bowl() -> None:
    """The reward's maximum is 0. Measured: -0.06 on average, best-of-N -0.18."""
    prompts, seeds, bowl = ("p",) * 12, list(range(12)), QuadraticReward([1.7])
    method = DTSStar(trajectories=40)
    best = [r.best_reward for r in steer(line(prompts), bowl, method, seed=seeds)]
    base = [r.best_reward for r in steer(line(prompts), bowl, BestOfN(n=40), seed=seeds)]
    assert sum(best) > 0.6 * sum(base)
    assert min(best) > -0.3


def test_the_best_so_far_only_rises() -> None:
    result = steer(line(), LINE, DTSStar(trajectories=30, k=3))
    rewards = [r for row in result.trace.column("rewards") for r in row]
    assert result.rewards.tolist() == sorted(rewards, reverse=True)[:3]


def test_bounds_by_hand() -> None:
    """Two children at values 0 and 1 of a range 0..2, visited once and nine times of ten."""
    tree = Tree([1, 2], reward_scale=1.0)
    rewards = (0.0, 1.0, 2.0)
    leaves = [tree.grow(ROOT, [torch.zeros(1)] * 2, r) for r in rewards]
    tree.back_up(leaves)
    low, high, top = tree.children[ROOT]
    tree.visits[ROOT], tree.visits[low], tree.visits[high], tree.visits[top] = 29, 1, 9, 19
    for select, c, expected in (
        ("uct", 0.0, top),
        ("uct", 0.30, top),  # 0 + .3 * 1.84, .5 + .3 * .61, 1 + .3 * .42
        ("uct", 0.9, low),  # 1.66, 1.05, 1.38
        ("puct", 0.9, top),  # .82, .66, 1.08
        ("puct", 2.0, low),  # 1.83, .87, 1.18
    ):
        method = DTSStar(select=select, c_uct=c)
        assert method._descend(tree, ROOT, iter(())) == expected, (select, c)


# --- the tree's growth -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("method", [DTS, DTSStar])
def test_visits_add_up(tmp_path, method, width: int) -> None:
    tree, _ = kept(tmp_path, line(), LINE, method(trajectories=20, width=width))
    for node in range(len(tree)):
        if not tree.is_leaf(node):
            assert tree.visits[node] == sum(tree.visits[c] for c in tree.children[node])
    assert tree.visits[ROOT] >= len(tree.leaves)


def test_widening_follows_the_visits(tmp_path) -> None:
    method = DTS(trajectories=60, width=1, widening=1.5, widening_power=0.6, reward_scale=0.3)
    tree, _ = kept(tmp_path, line(), LINE, method)
    inner = [n for n in range(len(tree)) if not tree.is_leaf(n)]
    slack = [math.ceil(1.5 * tree.visits[n] ** 0.6) - len(tree.children[n]) for n in inner]
    assert min(slack) >= -1  # a node above a sample met too often may be one ahead
    assert slack[0] == 0
    assert len(tree.children[ROOT]) > 8


def test_the_first_round_fills_its_width_and_limits_hold(tmp_path) -> None:
    tree, result = kept(tmp_path, line(), LINE, DTS(trajectories=20, width=7, widening=1.0))
    assert result.trace.column("parents")[0] == [-1] * 7
    assert len({float(tree.states[n]) for n in range(1, len(tree))}) == len(tree) - 1
    tree, _ = kept(tmp_path, line(), LINE, DTS(trajectories=40, width=7, max_children=3))
    assert max(map(len, tree.children)) == 3
    assert len(tree.children[ROOT]) == 3


def test_every_state_hangs_on_the_state_it_came_from(tmp_path) -> None:
    """Nothing ever moves in this chain, so a path through the tree has one state."""
    still = FiniteChain([1 / 40] * 40, torch.eye(40, dtype=torch.float64).expand(6, 40, 40))
    method = DTS(trajectories=20, width=6, branch_levels=(0.0, 0.34, 0.67), widening=1.0)
    tree, result = kept(tmp_path, still, TableReward(torch.linspace(0, 3, 40)), method)
    assert any(row != sorted(row) for row in result.trace.column("parents"))
    for leaf in tree.leaves:
        assert len({int(tree.states[n]) for n in tree.path(leaf)[1:]}) == 1


def test_dts_descends_by_chance() -> None:
    tree = Tree([6], reward_scale=1.0)
    tree.back_up([tree.grow(ROOT, [torch.zeros(1)], math.log(w)) for w in (1.0, 3.0)])
    uniforms = iter(((torch.arange(400) + 0.5) / 400).tolist())
    found = [DTS()._descend(tree, ROOT, uniforms) for _ in range(400)]
    assert [found.count(leaf) for leaf in tree.leaves] == [100, 300]


def test_states_of_the_tree_are_those_of_the_walks(tmp_path) -> None:
    """One rollout of one row follows best-of-N's only path through the levels."""
    seen = {}

    class Watched(type(line())):
        def predict(self, x, t, *, cond=0, grad=False):
            seen[round(t.t, 3)] = x.clone()
            return super().predict(x, t, cond=cond, grad=grad)

    model = line()
    model.__class__ = Watched
    tree, result = kept(tmp_path, model, LINE, DTS(trajectories=1, branch_levels=(0.0, 0.25, 0.5)))
    assert tree.levels == (0, 2, 4, 8)
    for node, t in zip(range(1, 4), (1.0, 0.75, 0.5), strict=True):
        assert torch.equal(tree.states[node], seen[t][0])
    assert torch.equal(tree.states[4], result.samples[0])
