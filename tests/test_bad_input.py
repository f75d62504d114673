"""Bad input: one clear error, before anything is spent, and nothing half-written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.samplers import FK, BestOfN

LINE = LinearReward([1.0])


def mixture(*prompts: str | None) -> GaussianMixture:
    return GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=5, prompts=prompts or ("a",))


def scored(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0]


# name: (what is wrong, part of the message)
BAD = {
    "empty prompt": ({"prompt": ""}, "prompt 0 must be a non-empty text, got ''"),
    "blank prompt": ({"prompt": "  \n"}, "prompt 0 must be a non-empty text"),
    "half a surrogate pair": ({"prompt": "a \ud83e"}, "prompt 0 holds half a surrogate pair"),
    "prompt is a number": ({"prompt": 5}, "prompt must be a text or a list of texts, got 5"),
    "prompt is bytes": ({"prompt": b"a"}, "prompt must be a text or a list of texts"),
    "no prompts": ({"prompt": []}, "prompt must be a text or a list of texts"),
    "a prompt of a list": ({"prompt": ["a", None]}, "prompt 1 must be a non-empty text, got None"),
    "another prompt": ({"prompt": "b"}, r"wrapped for \['a'\], not for \['b'\]"),
    "call arguments": ({"guidance_scale": 3.0}, "guidance_scale: arguments of the pipeline call"),
    "unknown method": ({"method": "fkk"}, "Unknown method 'fkk'. Did you mean 'fk'"),
    "unknown preset": ({"method": "fk/sdx"}, "Did you mean 'sdxl'"),
    "method is a class": ({"method": FK}, "method must be a name or an instance"),
    "method is None": ({"method": None}, "method must be a name or an instance"),
    "unknown option": ({"options": {"n_particle": 4}}, "Did you mean 'n_particles'"),
    "options twice": ({"method": FK(), "options": {"eta": 1.0}}, "set them on the instance"),
    "option of the wrong kind": ({"options": {"n_particles": "many"}}, "n_particles='many'"),
    "half a particle": ({"options": {"n_particles": 2.5}}, "n_particles=2.5"),
    "no particles": ({"options": {"n_particles": 0}}, "n_particles must be at least 1, got 0"),
    "unknown potential": ({"options": {"potential": "diff"}}, "unknown potential 'diff'"),
    "unknown rule": ({"options": {"resample": "sometimes"}}, "resample='sometimes'"),
    "unknown resampler": ({"options": {"resampler": "sistematic"}}, "Did you mean 'systematic'"),
    "unknown transition": ({"options": {"transition": "rfb"}}, "Did you mean 'rbf'"),
    "unknown grid": ({"options": {"grid": "karas"}}, "Did you mean 'karras'"),
    "steps of the own grid": ({"options": {"steps": 9}}, "steps belongs to grids other than"),
    "no steps": ({"options": {"grid": "karras", "steps": 0}}, "steps must be at least 1, got 0"),
    "noise level": ({"options": {"noise_levels": [1.5]}}, r"shares in \[0, 1\], got \(1.5,\)"),
    "eta too large": ({"options": {"eta": 1.5}}, r"eta must lie in \[0, 1\], got 1.5"),
    "eta 0 with resampling": ({"options": {"eta": 0.0}}, "eta=0 makes the sampler deterministic"),
    "checkpoint at the end": ({"options": {"checkpoints": [1.0]}}, r"fractions in \[0, 1\)"),
    "reward_scale below 0": ({"options": {"reward_scale": -1.0}}, "reward_scale must be finite"),
    "reward_scale infinite": ({"options": {"reward_scale": math.inf}}, "reward_scale must be"),
    "ess_threshold": ({"options": {"ess_threshold": 50}}, "ess_threshold must lie in"),
    "unknown reward": ({"reward": "brightnes"}, "brightness"),
    "reward is None": ({"reward": None}, "not a reward"),
    "reward takes three": ({"reward": lambda a, b, c: a}, "must take"),
    "reward spec": ({"reward": "brightness +"}, "brightness"),
    "heldout is the reward": ({"heldout": LINE}, "is the guiding reward itself"),
    "heldout has the same spec": (
        {"reward": "brightness", "heldout": ["jpeg", "brightness"]},
        "is the guiding reward itself",
    ),
    "seed is text": ({"seed": "zero"}, "seed must be one integer or one per prompt"),
    "seed is a fraction": ({"seed": 0.5}, "seed must be one integer"),
    "seed is None": ({"seed": None}, "seed must be one integer"),
    "too many seeds": ({"seed": [1, 2]}, r"one per prompt \(1\), got \[1, 2\]"),
    "nfe is 0": ({"nfe": 0}, "nfe must be positive, got 0"),
    "nfe below 0": ({"nfe": -3}, "nfe must be positive, got -3"),
    "nfe twice": ({"nfe": 50, "budget": Budget(nfe=60)}, "nfe is given twice"),
    "nfe is text": ({"nfe": "50"}, "nfe must be a number, got '50'"),
    "half a row": ({"nfe": 50.5}, "nfe must be a whole number, got 50.5"),
    "budget is a number": ({"budget": 50}, "budget must be a steering.Budget, got 50"),
    "out is a number": ({"out": 5}, "out must be the path of a folder, got 5"),
    "max_batch": ({"max_batch": 0}, "max_batch must be at least 1"),
    "part of a row": ({"max_batch": 2.5}, "max_batch must be at least 1, a whole number, got 2.5"),
    "max_batch is text": ({"max_batch": "3"}, "a whole number, got '3'"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_one_clear_error_before_anything_is_spent(tmp_path, case: str) -> None:
    changes, message = BAD[case]
    model = mixture()
    arguments = {"prompt": "a", "reward": LINE, "method": "fk", "out": tmp_path / "out", **changes}
    with pytest.raises(OptionError, match=message) as caught:
        steering.steer(model, arguments.pop("prompt"), **arguments)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert model.rows == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_budget_too_small_says_how_much_is_needed(tmp_path) -> None:
    for method, what in ((FK(), "particle"), (BestOfN(), "sample")):
        model = mixture()
        with pytest.raises(BudgetError, match=f"nfe=4 is too small: one {what} needs 5 here"):
            steering.steer(model, "a", reward=LINE, method=method, nfe=4, out=tmp_path)
        assert model.rows == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused_before_anything_is_spent(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    model = mixture()
    for out in (file, file / "below"):
        with pytest.raises(OptionError, match=f"out='{out}'"):
            steering.steer(model, "a", reward=LINE, out=out)
    assert model.rows == 0
    assert file.read_text() == "in the way"


def test_eta_zero_is_fine_where_nothing_is_resampled() -> None:
    for options in ({"resample": "never"}, {"n_particles": 1}):
        steering.steer(mixture(), "a", reward=LINE, method=FK(eta=0.0, **options))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (FK, {"resample": "somtimes"}, "resample='somtimes'"),
        (FK, {"n_particles": 2.5}, "n_particles=2.5"),
        (FK, {"checkpoints": 0.5}, "checkpoints=0.5"),
        (FK, {"mode": "author"}, "mode='author'"),
        (BestOfN, {"select": "agmax"}, "select='agmax'"),
    ],
)
def test_instances_are_as_strict_as_names(cls: type, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cls(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    method = FK(n_particles=np.int64(2), checkpoints=[np.float32(0.5)])  # type: ignore[arg-type]
    found = [
        steering.steer(mixture("a", "b"), reward=LINE, method=method, nfe=nfe, seed=seed)
        for nfe, seed in ((40, [1, 2]), (np.int64(40), np.arange(1, 3)), (4e1, (1, np.uint8(2))))
    ]
    for results in found[1:]:
        assert torch.equal(results[1].samples, found[0][1].samples)
        assert results[1].recipe == found[0][1].recipe


def test_a_name_is_not_a_pipeline() -> None:
    with pytest.raises(OptionError, match=r"steering\.load\('stickers'\)"):
        steering.steer("stickers", "a", reward=LINE)


def test_none_is_a_word_where_an_option_knows_it_and_nothing_elsewhere() -> None:
    options = {"potential": "none", "n_particles": "none", "reward_scale": ""}
    result = steering.steer(mixture(), "a", reward=LINE, method="fk", options=options)
    assert result.recipe.method["options"]["potential"] == FK(potential="none").potential == "none"
    assert len(result) == 8


def test_names_presets_and_options_reach_the_method() -> None:
    result = steering.steer(
        mixture(), "a", reward=LINE, method="fk/sdxl", options={"n_particles": "3", "eta": 1}
    )
    assert len(result) == 3
    assert result.recipe.method["name"] == "fk"
    assert result.recipe.method["options"]["potential"] == "max"
    assert result.recipe.method["options"]["eta"] == 1.0
    assert result.recipe.method["options"]["checkpoints"] == [0.2, 0.4, 0.6, 0.8]


def test_one_prompt_one_result_and_a_list_a_list() -> None:
    one = steering.steer(mixture("a"), "a", reward=scored, method=BestOfN(n=2))
    some = steering.steer(mixture("a"), ["a"], reward=scored, method=BestOfN(n=2))
    many = steering.steer(mixture("a", "b"), reward=scored, method=BestOfN(n=2))
    textless = steering.steer(mixture(None), reward=LINE, method=BestOfN(n=2))
    assert one.prompt == "a"
    assert torch.equal(one.samples, some[0].samples)
    assert [r.prompt for r in many] == ["a", "b"]
    assert textless.prompt is None
