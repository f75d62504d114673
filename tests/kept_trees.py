"""The tree that a run has kept."""

from __future__ import annotations

from dataclasses import replace

import steering
from steering.samplers.tree import Tree
from tests.populations import steer


def kept(tmp_path, model, reward, method, **more) -> tuple[Tree, steering.Result]:
    """The tree of a run and its result."""
    file = tmp_path / "kept.safetensors"
    result = steer(model, reward, replace(method, save_tree=str(file)), **more)
    return Tree.load(file), result
