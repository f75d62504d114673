"""What `steer rewards` says of each reward is there, and says what the class does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steering.apps.cli import app
from steering.apps.listing import reward_rows
from steering.registry import REWARDS
from steering.rewards import as_reward

NETWORKS = (
    "aesthetic",
    "clip",
    "diversity",
    "hps",
    "hps3",
    "imagereward",
    "pickscore",
    "temporal",
    "videoreward",
)


@pytest.fixture(scope="module")
def rows():
    ours = [n for n in REWARDS.names() if REWARDS.get(n).__module__.startswith("steering.")]
    return {row["name"]: row for row in reward_rows() if row["name"] in ours}


def test_every_reward_has_its_facts(rows):
    for name, row in rows.items():
        for fact in ("hub_id", "licence", "range", "memory", "summary"):
            assert row[fact] not in ("", "-"), (name, fact)
        assert isinstance(row["differentiable"], bool)
    assert "AGPL-3.0" in rows["aesthetic"]["licence"]


SHARED = {"precision", "device", "batch_size", "offload"}
JUDGES = SHARED | {
    "on_invalid", "max_new_tokens", "url", "key_env", "timeout", "retries", "concurrency"
}  # fmt: skip


def documented():
    """name -> (range, gradient, options) of the table in the guide."""
    text = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, _, span, gradient, _, options = (c.strip() for c in line.strip("|").split(" | "))
            told = set(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", options))
            told |= SHARED if options.endswith("*") else set()
            told |= JUDGES if options.endswith("†") else set()
            found[name.strip("` ")] = (span, gradient, told)
    return found


def test_the_guide_has_every_reward_with_every_option(rows):
    table = documented()
    assert set(table) == set(rows)
    for name, (span, gradient, told) in table.items():
        assert span not in ("", "-")
        missing = set(rows[name]["options"]) - told
        assert not missing, f"{name}: {missing}"
        if gradient in ("yes", "no"):
            assert rows[name]["differentiable"] is (gradient == "yes"), name
    assert rows["count"]["options"]["objects"] == ""
    assert rows["remote"]["options"]["retries"] == 3
    assert rows["zsum"]["options"] == {"calibration": None}


@pytest.mark.parametrize("name", ["count", "presence"])
def test_a_count_has_no_gradient_by_default(rows, name):
    assert rows[name]["differentiable"] is as_reward(f"{name}(objects=apple)").differentiable


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reward_with_weights_says_where_from_and_how_large(rows, name):
    row = rows[name]
    assert "/" in row["hub_id"]
    assert "GB" in row["memory"]
    assert row["range"] != "-"
    assert row["differentiable"]


def test_the_command_prints_them():
    found = CliRunner().invoke(app, ["rewards", "--json"])
    assert found.exit_code == 0
    listed = {row["name"]: row for row in json.loads(found.stdout)}
    assert listed["hps"]["hub_id"] == "xswu/HPSv2"


def test_what_a_reward_measures_leaves_its_unit_out():
    plain = as_reward("hps(version=v2)")
    unit = as_reward("hps(version=v2, scale=100, precision=bf16, batch_size=4, offload=true)")
    assert plain.measures == unit.measures == "hps(version=v2)"
    assert as_reward("hps").measures != plain.measures
    assert as_reward("hps").stationary
    assert not as_reward("diversity").stationary
    assert as_reward("rank(brightness)").differentiable is False


def test_a_fact_of_a_function_of_yours_may_be_missing():
    from steering.rewards import register

    @register("test_facts_bare")
    def bare(images):
        return torch.zeros(len(images))

    try:
        (row,) = [r for r in reward_rows() if r["name"] == "test_facts_bare"]
        assert (row["hub_id"], row["memory"], row["differentiable"]) == ("-", "-", True)
    finally:
        REWARDS._entries.pop("test_facts_bare")
