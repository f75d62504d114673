"""The guides say what is true: their code runs, their links lead somewhere, their tables agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.registry import METHODS, REWARDS, Registry

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRELUDE = """
from dataclasses import dataclass
import torch
import steering
from steering.method import Cost
from steering.requests import Decode, Denoise, Outcome, Score
from steering.samplers.base import Sampler, within_budget
"""


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_method_of_the_guide_runs():
    code = next(b for b in blocks(ROOT / "docs" / "extending.md") if "class FirstGood" in b)
    names: dict = {"__name__": __name__}
    exec(compile(PRELUDE + code, "extending.md", "exec", dont_inherit=True), names)
    model = GaussianMixture(torch.tensor([1.0]), torch.tensor([[0.0]]), torch.tensor([1.0]))
    method = names["FirstGood"](threshold=0.5)
    result = steering.steer(model, reward=lambda x: x[:, 0], method=method, seed=1)
    assert result.best_reward >= 0.5
    tries = result.ledger.reward_calls
    assert result.ledger.nfe == tries * len(model.grid())
    assert 1 <= tries <= 16


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for link in links:
        assert link.startswith("http") or (path.parent / link).exists(), link


def built_in(registry: Registry) -> list[str]:
    """Names that are ours: other tests register things of their own."""
    return [n for n in registry.names() if registry.get(n).__module__.startswith("steering.")]


def test_every_method_and_reward_is_in_the_guides():
    methods = (ROOT / "docs" / "methods.md").read_text()
    rewards = (ROOT / "docs" / "rewards.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for name in built_in(METHODS):
        assert f"`{name}`" in methods
        assert f"`{name}`" in readme
    for name in built_in(REWARDS):
        assert f"`{name}`" in rewards
        assert f"`{name}`" in readme


def test_the_readme_names_commands_that_exist():
    from steering.apps.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    used = set(re.findall(r"^steer ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
