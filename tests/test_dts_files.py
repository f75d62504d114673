"""Tree search: the file a tree is kept in, and runs that end early."""

from __future__ import annotations

import time

import pytest
import torch

from steering.errors import OptionError, RewardError
from steering.ledger import Budget
from steering.samplers import DTS, DTSStar
from steering.samplers.tree import Tree
from tests.kept_trees import kept
from tests.populations import LINE, line, plane, steer


def test_a_tree_is_gone_on_with(tmp_path) -> None:
    levels = {"branch_levels": (0.0, 0.5), "width": 2}
    method = DTS(trajectories=6, reward_scale=1.0, **levels)
    before, first = kept(tmp_path, line(), LINE, method, seed=2)
    file = str(tmp_path / "kept.safetensors")
    more = DTS(trajectories=6, reward_scale=3.0, load_tree=file, save_tree=file, **levels)
    second = steer(line(), LINE, more, seed=2)
    after = Tree.load(file)
    n = len(before.leaves)
    assert len(second) == len(after.leaves) >= n + 5
    assert after.reward_scale == 3.0
    assert [after.reward[k] for k in after.leaves[:n]] == [before.reward[k] for k in before.leaves]
    states = {float(after.states[k]) for k in range(1, len(after))}
    assert len(states) == len(after) - 1, "noise was used twice"
    assert second.ledger.reward_calls == len(after.leaves) - n
    assert second.ledger.decodes == second.ledger.reward_calls + n
    assert second.ledger.nfe <= 6 * 8
    assert torch.equal(second.rewards, LINE(second.samples).float().double())
    best = steer(line(), LINE, DTSStar(trajectories=1, load_tree=file, **levels), seed=5)
    assert best.best_reward >= first.best_reward


def test_every_prompt_has_a_tree_of_its_own(tmp_path) -> None:
    file = str(tmp_path / "t.safetensors")
    steer(line(("a", "b")), LINE, DTS(trajectories=3, save_tree=file), seed=[0, 1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "t-0000.safetensors",
        "t-0001.safetensors",
    ]
    one, two = (Tree.load(tmp_path / f"t-000{k}.safetensors") for k in (0, 1))
    assert (one.prompt, two.prompt) == ("a", "b")
    again = steer(line(("a", "b")), LINE, DTS(trajectories=3, load_tree=file), seed=[0, 1])
    assert [len(r) for r in again] > [len(one.leaves), len(two.leaves)]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: line(("other",)), {}, "prompt is 'p'"),
        (line, {"branch_levels": (0.5,)}, "branch levels is"),
        (plane, {}, "shape of a state"),
        (lambda: line(steps=16), {}, "branch levels is"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_at_once(tmp_path, model, options, message) -> None:
    file = str(tmp_path / "kept.safetensors")
    steer(line(), LINE, DTS(trajectories=2, save_tree=file))
    found = model()
    with pytest.raises(OptionError, match=message):
        steer(found, LINE, DTS(load_tree=file, **options))
    assert found.rows == 0


def test_a_stopped_run_keeps_its_tree(tmp_path) -> None:
    file, calls = tmp_path / "kept.safetensors", []

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 60

    method = DTS(trajectories=500, save_tree=str(file))
    result = steer(line(), LINE, method, cancelled=stop)
    assert result.cancelled
    assert len(Tree.load(file).leaves) >= 8

    def fails(images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full((len(images),), torch.nan) if len(calls) > 5 else LINE(images)

    calls.clear()
    with pytest.raises(RewardError):
        steer(line(), fails, method)
    assert len(Tree.load(file).leaves) == 20


def test_when_time_is_up_all_that_was_found_is_delivered() -> None:
    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return LINE(images)

    result = steer(line(), slow, DTS(trajectories=10**6), budget=Budget(seconds=0.5))
    assert not result.cancelled
    assert len(result) == result.ledger.reward_calls >= 4


def test_folders_that_do_not_exist_are_refused_at_once(tmp_path) -> None:
    for option in ("save_tree", "load_tree"):
        model = line()
        with pytest.raises(OptionError, match="no folder"):
            steer(model, LINE, DTS(**{option: str(tmp_path / "no" / "tree")}))
        assert model.rows == 0


def test_a_tree_that_could_not_be_written_is_refused_before_anything_is_spent(tmp_path) -> None:
    model = line()
    with pytest.raises(OptionError, match="is a folder, or its folder takes no files"):
        steer(model, LINE, DTS(trajectories=2, save_tree=str(tmp_path)))
    assert model.rows == 0
