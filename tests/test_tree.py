"""The tree by itself: values, weights and draws by hand, the file it is kept in, and runs that
go on with it."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering.analytic import GaussianMixture
from steering.errors import OptionError, SteeringError
from steering.grids import on_path, same_log_snr, shifted, uniform
from steering.ledger import Budget
from steering.noise import NoiseKey
from steering.paths import VE, Linear, Path
from steering.samplers import DTS, DTSStar
from steering.samplers.tree import ROOT, Tree, combine
from tests.populations import LINE, line, steer

INF = math.inf


def state(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small(scale: float = 2.0, backup: str = "soft", rewards=(0.5, -1.0, 1.5, 0.25)) -> Tree:
    """Two nodes under the root, the first with three leaves, the second with one."""
    tree = Tree([2, 6], reward_scale=scale, backup=backup, prompt="a cat")
    first = tree.grow(ROOT, [state(1, 0), state(1, 1)], rewards[0])
    second = tree.grow(ROOT, [state(2, 0), state(2, 1)], rewards[3])
    node = tree.parent[first]
    more = [tree.grow(node, [state(1, k)], rewards[k - 1]) for k in (2, 3)]
    tree.back_up([first, second, *more])
    return tree


def grown(seed: int, backup: str = "soft", scale: float = 1.5) -> Tree:
    """A tree of three levels with random shape and rewards."""
    generator = torch.Generator().manual_seed(seed)
    nodes = [(1.0 - k / 6, k / 6) for k in range(6, -1, -1)]
    tree = Tree([1, 3, 5, 6], reward_scale=scale, backup=backup, nodes=nodes)
    for _ in range(30):
        inner = [n for n in range(len(tree)) if not tree.is_leaf(n)]
        parent = inner[int(torch.randint(len(inner), (), generator=generator))]
        chain = list(torch.randn(4 - tree.depth[parent], 2, generator=generator))
        leaf = tree.grow(parent, chain, float(torch.randn((), generator=generator)))
        tree.back_up([leaf])
    return tree


def test_values_by_hand() -> None:
    below = [math.exp(2.0 * r) for r in (0.5, -1.0, 1.5)]
    expected = {
        "soft": math.log((sum(below) / 3 + math.exp(0.5)) / 2),
        "mean": ((1.0 - 2.0 + 3.0) / 3 + 0.5) / 2,
        "max": 3.0,
    }
    for backup, value in expected.items():
        assert small(backup=backup).value[ROOT] == pytest.approx(value)
    tree = small()
    assert tree.place(ROOT) == -1
    assert [tree.place(n) for n in tree.path(tree.leaves[2])] == [-1, 2, 6]
    assert (tree.low, tree.high) == (-2.0, 3.0)


@pytest.mark.parametrize("backup", ["soft", "mean", "max"])
def test_a_value_lies_between_its_childrens_in_any_order(backup: str) -> None:
    tree = grown(3, backup)
    for node in range(len(tree)):
        values = [tree.value[c] for c in tree.children[node]]
        if values:
            assert min(values) - 1e-12 <= tree.value[node] <= max(values) + 1e-12
            for order in itertools.islice(itertools.permutations(values), 6):
                assert combine(order, backup) == pytest.approx(tree.value[node], abs=1e-12)


def test_values_grown_leaf_by_leaf_are_those_made_at_once() -> None:
    tree, values = grown(4), grown(4).value
    tree.revalue(reward_scale=0.3, backup="mean")
    assert tree.value != pytest.approx(values)
    tree.revalue(reward_scale=1.5, backup="soft")
    assert tree.value == pytest.approx(values, abs=1e-12)


def test_weights_are_those_of_importance_sampling() -> None:
    """exp(scale r) / (children on the way), mean exp equal to the root's value."""
    tree = grown(5)
    expected = []
    for leaf in tree.leaves:
        ways = [len(tree.children[n]) for n in tree.path(leaf)[:-1]]
        expected.append(1.5 * tree.reward[leaf] - math.log(math.prod(ways) / len(tree.leaves)))
    found = tree.log_weights()
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(found.exp().mean().log()) == pytest.approx(tree.value[ROOT])


@pytest.mark.parametrize("backup", ["soft", "mean", "max"])
def test_draws_and_descents_follow_the_weights(backup: str) -> None:
    tree, n = grown(6, backup), 20_000
    expected = torch.softmax(tree.log_weights(), 0)
    uniforms = iter(NoiseKey(0, "descend").uniform(4 * n).tolist())
    ends = []
    for _ in range(n):
        node = ROOT
        while not tree.is_leaf(node):
            node = tree.choose(node, next(uniforms))
        ends.append(node)
    for found in (ends, tree.draw(n, NoiseKey(1, "draw"))):
        counts = torch.tensor([found.count(leaf) for leaf in tree.leaves]) / n
        error = torch.sqrt(expected * (1 - expected) / n) + 1e-9
        assert float(((counts - expected).abs() / error).max()) < 5.0


def test_descents_follow_values_as_they_change() -> None:
    tree = Tree([6], reward_scale=1.0)
    tree.back_up([tree.grow(ROOT, [state(k)], r) for k, r in enumerate((9.0, 0.0))])
    assert tree.choose(ROOT, 0.5) == tree.leaves[0]
    tree.back_up([tree.grow(ROOT, [state(2)], 20.0)])
    assert tree.choose(ROOT, 0.5) == tree.leaves[2]


def test_samples_without_reward_are_never_drawn() -> None:
    tree = small(rewards=(-INF, -INF, 0.0, -INF))
    assert {tuple(x) for x in tree.sample(50).tolist()} == {(1.0, 3.0)}
    assert tree.best() == [tree.leaves[3]]
    with pytest.raises(SteeringError, match="weight zero"):
        small(rewards=(-INF,) * 4).sample(1)
    with pytest.raises(OptionError, match="0 leaves"):
        Tree([6], reward_scale=1.0).sample(1)


def test_at_scale_zero_every_child_counts_the_same() -> None:
    tree = small(0.0, rewards=(-INF, 5.0, 1.0, 2.0))
    weights = dict(zip(tree.leaves, torch.softmax(tree.log_weights(), 0).tolist(), strict=True))
    assert tree.value[ROOT] == 0.0
    assert [weights[leaf] for leaf in tree.leaves] == pytest.approx([1 / 6, 1 / 2, 1 / 6, 1 / 6])


def test_the_best_come_first_and_ties_go_to_the_first_found() -> None:
    tree = small(rewards=(1.0, 2.0, 2.0, 0.0))
    assert tree.best(3) == [tree.leaves[2], tree.leaves[3], tree.leaves[0]]


def test_a_chain_needs_a_state_for_each_level() -> None:
    with pytest.raises(OptionError, match="each level"):
        small().grow(ROOT, [state(0, 0)], 1.0)


# --- the file ---------------------------------------------------------------------------------

LISTS = ("levels", "nodes", "parent", "depth", "visits", "children", "leaves", "prompt", "backup")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_saved_comes_back(tmp_path, dtype) -> None:
    tree = grown(7, "max") if dtype == torch.float32 else small(rewards=(0.0, -INF, 0.5, 0.2))
    tree.states = [s if s is None else (10 * s).to(dtype) for s in tree.states]
    tree.visit([0, 1])
    tree.save(tmp_path / "kept.safetensors")
    again = Tree.load(tmp_path / "kept.safetensors")
    for name in LISTS:
        assert getattr(again, name) == getattr(tree, name), name
    for name in ("reward", "value"):
        assert getattr(again, name) == pytest.approx(getattr(tree, name), nan_ok=True), name
    assert (again.reward_scale, again.low, again.high) == (tree.reward_scale, tree.low, tree.high)
    assert again.sample(9, seed=4).dtype == dtype
    assert torch.equal(again.sample(9, seed=4), tree.sample(9, seed=4))
    assert not torch.equal(again.sample(9, seed=4), tree.sample(9, seed=5))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path) -> None:
    tree = small()
    tree.save(tmp_path / "kept")
    tree.states[1] = torch.zeros(3)
    with pytest.raises(RuntimeError):
        tree.save(tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert len(Tree.load(tmp_path / "kept")) == len(tree)


def spoil(change) -> tuple[dict, dict]:
    about = {"format": "steering-tree", "version": 1, "levels": [2, 6], "reward_scale": 2.0}
    about |= {"backup": "soft", "prompt": None}
    tensors = {
        "parent": torch.tensor([-1, 0, 1]),
        "visits": torch.tensor([1, 1, 1]),
        "reward": torch.tensor([math.nan, math.nan, 0.5], dtype=torch.float64),
        "x": torch.zeros(2, 2),
    }
    change(about, tensors)
    return about, tensors


DAMAGE = {
    "not a tree written": lambda a, t: a.update(format="other"),
    "version 2": lambda a, t: a.update(version=2),
    "damaged": lambda a, t: a.pop("levels"),
    "backup": lambda a, t: a.update(backup="median"),
    "hangs on 2": lambda a, t: t.update(parent=torch.tensor([-1, 2, 1])),
    "different lengths": lambda a, t: t.update(visits=torch.tensor([1, 1])),
    "has no reward": lambda a, t: t.update(reward=torch.full((3,), math.nan).double()),
    "neither children": lambda a, t: t.update(parent=torch.tensor([-1, 0, 0])),
    "3 grid nodes for levels": lambda a, t: t.update(nodes=torch.zeros(3, 2)),
    "StopIteration": lambda a, t: t.update(x=torch.zeros(1, 2)),
}


@pytest.mark.parametrize("message", sorted(DAMAGE))
def test_damaged_files_are_refused(tmp_path, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    about, tensors = spoil(lambda a, t: None)
    save_file(tensors, path, metadata={"tree": json.dumps(about)})
    assert len(Tree.load(path).leaves) == 1
    about, tensors = spoil(DAMAGE[message])
    save_file(tensors, path, metadata={"tree": json.dumps(about)})
    with pytest.raises(OptionError, match=message):
        Tree.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        Tree.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tree")
    with pytest.raises(OptionError, match="cannot be read"):
        Tree.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    assert "a" in load_file(tmp_path / "weights")
    with pytest.raises(OptionError, match="not a tree"):
        Tree.load(tmp_path / "weights")


# --- runs that go on with a tree --------------------------------------------------------------

LEVELS = {"branch_levels": (0.25, 0.5), "reward_scale": 1.0}


def two(times: list[float], path: Path = Linear()) -> GaussianMixture:  # noqa: B008
    """A model at these linear times, or at the same noise levels of another path."""
    grid = on_path(path, same_log_snr(times, Linear(), path))
    return GaussianMixture(
        [0.6, 0.4], [-2.0, 1.0], [0.5, 0.4], path=path, grid=grid, prompts=("p",)
    )


def grow(folder, model: GaussianMixture, n: int = 6) -> tuple[str, Tree]:
    """The file of a tree of n trajectories, and the tree."""
    file = str(folder / "kept.safetensors")
    steer(model, LINE, DTS(trajectories=n, save_tree=file, **LEVELS))
    return file, Tree.load(file)


OTHER = {
    "a branch level": ([1.0, 0.875, 0.7, *uniform(8)[3:]], r"node 2 \(0\.75, here 0\.7\)"),
    "every level": (shifted(8), r"node 1 \(0\.875, here 0\.9545\), .* and 4 more"),
    "between branches": (
        [*uniform(8)[:6], 0.2, *uniform(8)[7:]],
        r"node 6 \(0\.25, here 0\.2\)\.",
    ),
}


@pytest.mark.parametrize("case", sorted(OTHER))
def test_a_tree_of_other_noise_levels_is_refused_at_once(tmp_path, case: str) -> None:
    """As many steps, so that the numbers of the grid nodes agree."""
    file, _ = grow(tmp_path, two(uniform(8)))
    times, message = OTHER[case]
    model = two(times)
    with pytest.raises(OptionError, match=f"noise shares .*{message}.*start a new tree"):
        steer(model, LINE, DTS(load_tree=file, **LEVELS))
    assert model.rows == 0


def test_levels_that_are_the_same_up_to_rounding_are_gone_on_with(tmp_path) -> None:
    file, tree = grow(tmp_path, two(uniform(8)))
    rounded = torch.tensor(uniform(8)).mul(1.0 + 3e-7).clamp(max=1.0).tolist()
    assert len(steer(two(rounded), LINE, DTS(load_tree=file, trajectories=2, **LEVELS))) > len(
        tree.leaves
    )


def test_a_tree_is_gone_on_with_in_other_coordinates(tmp_path) -> None:
    """At one noise level exploding states are longer by a factor: those of the file are scaled."""
    times = [0.999, *uniform(8)[1:]]
    file, tree = grow(tmp_path, two(times))
    model = two(times, VE(2000.0))
    steer(model, LINE, DTS(trajectories=3, load_tree=file, save_tree=file, **LEVELS))
    after = Tree.load(file)
    assert len(after) > len(tree)
    for node in range(1, len(tree)):
        share = times[tree.place(node)]
        expected = tree.states[node] / (1.0 - share)
        assert torch.allclose(after.states[node], expected, rtol=1e-9, atol=0)
    found = steer(two(times), LINE, DTS(trajectories=1, load_tree=file, **LEVELS))
    assert len(found) > len(after.leaves)


def test_a_file_that_does_not_say_its_noise_levels_is_read_and_not_gone_on_with(tmp_path) -> None:
    file, tree = grow(tmp_path, line())
    tree.nodes = ()
    tree.save(file)
    assert len(Tree.load(file).sample(3)) == 3
    model = line()
    with pytest.raises(OptionError, match=r"older release .*Tree\.load.* start a new tree"):
        steer(model, LINE, DTS(load_tree=file, **LEVELS))
    assert model.rows == 0


def slowly(images: torch.Tensor) -> torch.Tensor:
    time.sleep(0.3)
    return LINE(images)


class SlowDecoder(GaussianMixture):
    """Takes a second for the wide calls by which a loaded tree is decoded."""

    def decode(self, x0: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        time.sleep(1.0 * (len(x0) > 4))
        return super().decode(x0)


def slow_line() -> GaussianMixture:
    model = line()
    model.__class__ = SlowDecoder
    return model


@pytest.mark.parametrize(
    ("make", "reward", "size", "seconds"),
    [(line, slowly, 10**6, 0.5), (slow_line, LINE, 3, 0.9)],
    ids=["in the search", "in the delivery"],
)
def test_when_time_is_up_the_loaded_samples_are_delivered_too(
    tmp_path, monkeypatch, make: Callable[[], GaussianMixture], reward, size: int, seconds: float
) -> None:
    file, before = grow(tmp_path, line(), 40)
    method = DTS(trajectories=size, load_tree=file, save_tree=file, **LEVELS)
    model, seen = make(), []
    decode = model.decode

    def counted(x0: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        seen.append(len(x0))
        return decode(x0, grad=grad)

    monkeypatch.setattr(model, "decode", counted)
    result = steer(model, reward, method, budget=Budget(seconds=seconds))
    after = Tree.load(file)
    assert not result.cancelled
    assert result.ledger.decodes == sum(seen)  # those past the cap are counted, too
    assert len(result) == len(after.leaves) > len(before.leaves) > 32
    assert torch.equal(result.pixels, result.samples)
    assert torch.equal(result.rewards, LINE(result.samples).float().double())
    found = result.log_weights[result.slots.argsort()]
    assert torch.allclose(found, after.log_weights(), rtol=0, atol=1e-12)


def test_when_time_is_up_the_best_of_a_loaded_tree_is_delivered(tmp_path) -> None:
    file, before = grow(tmp_path, line(), 40)
    star = DTSStar(trajectories=10**6, k=9, load_tree=file, **LEVELS)
    result = steer(line(), slowly, star, budget=Budget(seconds=0.5))
    assert len(result) == 9
    assert result.best_reward >= max(before.reward[leaf] for leaf in before.leaves)
