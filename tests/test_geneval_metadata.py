"""What goes with a prompt reaches the reward: in steer(), in a replay, in a GenEval run."""

from __future__ import annotations

import json

import pytest
import torch

import steering
from steering.apps.geneval_run import Settings, Worker
from steering.apps.geneval_store import job_of
from steering.errors import OptionError, RecipeError
from steering.recipe import read
from steering.rewards.compose import ByCategory
from steering.stickers import parse, prompts

FAST = {"num_inference_steps": 2, "guidance_scale": 1.0}
RECORDS = [parse(p) for p in prompts("heldout", n=553)][::100]
TEXTS = [r["prompt"] for r in RECORDS]
TABLE = {"bright": {"brightness": 1.0, "jpeg": 0.0}, "small": {"brightness": 0.0, "jpeg": 1.0}}


@pytest.fixture(scope="module")
def pipe():
    return steering.load("stickers", dtype="float32")


def test_every_prompt_is_judged_with_its_own_metadata(pipe):
    """Two prompts in one batch, each with the reward that its metadata asks for."""
    guide = ByCategory("brightness", "jpeg", weights=TABLE)
    extra, method = [{"category": "bright"}, {"category": "small"}], steering.samplers.BestOfN(n=3)
    found = steering.steer(
        pipe, TEXTS[:2], reward=guide, heldout=["brightness", "jpeg"], method=method,
        metadata=extra, **FAST,
    )  # fmt: skip
    for result, name in zip(found, ("brightness", "jpeg"), strict=True):
        alone = result.heldout[f"{name} (searched: {name})"]
        assert torch.allclose(result.rewards, alone, atol=1e-5)


def test_a_replay_judges_with_the_same_metadata(pipe, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    spec = f"category(brightness, jpeg, weights={tmp_path / 'table.json'})"
    method = steering.samplers.BestOfN(n=3)
    steering.steer(
        pipe, TEXTS[0], reward=spec, method=method, metadata=[{"category": "small"}],
        out=tmp_path / "out", **FAST,
    )  # fmt: skip
    png = tmp_path / "out/000.png"
    assert read(png).metadata == [{"category": "small"}]
    again = steering.replay(png, pipe=pipe)
    assert again.identical
    other = steering.replay(png, pipe=pipe, metadata=[{"category": "bright"}])
    assert not torch.allclose(again.result.rewards, other.result.rewards)


def test_metadata_that_no_file_can_hold_is_asked_for_again(pipe, tmp_path):
    method = steering.samplers.BestOfN(n=1)
    steering.steer(
        pipe, TEXTS[0], reward="brightness", method=method, metadata=[torch.zeros(2)],
        out=tmp_path, **FAST,
    )  # fmt: skip
    with pytest.raises(RecipeError, match="metadata="):
        steering.replay(tmp_path / "000.png", pipe=pipe)
    assert steering.replay(tmp_path / "000.png", pipe=pipe, metadata=[None]).identical


@pytest.mark.parametrize("given", [[], [{}, {}], "text", {"category": "bright"}])
def test_metadata_is_one_entry_per_prompt(pipe, given):
    with pytest.raises(OptionError, match="one entry per prompt"):
        steering.steer(pipe, TEXTS[0], reward="brightness", metadata=given, **FAST)


def test_a_geneval_run_hands_its_records_to_the_reward(pipe, tmp_path, monkeypatch):
    (tmp_path / "guides_record.py").write_text(
        "def asked(images, prompts, metadata):\n"
        "    assert [m['prompt'] for m in metadata] == list(prompts)\n"
        "    return [float(len(m['include'])) for m in metadata]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = Settings(
        method="best_of_n", options={"n": 2}, call=FAST, reward="python:guides_record:asked"
    )
    jobs = [job_of(record, i, 0) for i, record in enumerate(RECORDS)]
    for made in Worker(settings, pipe).samples(jobs):
        assert made.line["reward"] == len(RECORDS[made.job.prompt]["include"])
        (tmp_path / "x.png").write_bytes(made.png)
        assert read(tmp_path / "x.png").metadata == [RECORDS[made.job.prompt]]
