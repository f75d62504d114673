"""Replay of pipelines without a name, damaged recipes, and stopped runs in tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

import steering
from steering.apps.comparison import Entry, tabulate
from steering.errors import RecipeError
from steering.recipe import read, write_png
from tests.tiny_pipelines import build


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, PNG) of one small run."""
    pipe, call = build("sd3", steps=2)
    folder = tmp_path_factory.mktemp("made")
    method = steering.samplers.BestOfN(n=1)
    steering.steer(
        pipe, call.pop("prompt"), reward="brightness", method=method, out=folder, **call
    )
    return pipe, folder / "000.png"


def test_prompt_embeddings_are_given_again(tmp_path):
    pipe, _ = build("sd3", steps=2)
    positive, negative, pooled, pooled_negative = pipe.encode_prompt("a fox", None, None)
    call = {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled_negative,
    }
    method = steering.samplers.BestOfN(n=2)
    steering.steer(
        pipe, reward="brightness", method=method, out=tmp_path, num_inference_steps=2, **call
    )
    with pytest.raises(RecipeError, match=r"could not store .*prompt_embeds"):
        steering.replay(tmp_path / "000.png", pipe=pipe)
    assert steering.replay(tmp_path / "000.png", pipe=pipe, **call).identical


def test_a_method_with_a_function_is_given_again(tmp_path):
    pipe, call = build("sd3", steps=3)
    method = steering.samplers.FK(n_particles=2, potential=lambda rho: rho[-1])
    prompt = call.pop("prompt")
    steering.steer(pipe, prompt, reward="brightness", method=method, out=tmp_path, **call)
    with pytest.raises(RecipeError, match="method="):
        steering.replay(tmp_path / "001.png", pipe=pipe)
    assert steering.replay(tmp_path / "001.png", pipe=pipe, method=method).identical


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"rows": 1}}, "damaged recipe, budget"),
        ({"budget": {"nfe": "x"}}, "damaged recipe, budget"),
        ({"call": {"prompt": "x"}}, "cannot be named prompt"),
        ({"call": {"reward": "x", "out": "."}}, "cannot be named out, reward"),
        ({"prompts": [5]}, "prompts are no texts"),
        ({"engine": {"max_batch": "x"}}, "max_batch is no number"),
        ({"model": {}}, "weights"),
    ],
)
def test_damaged_values_are_one_clear_error(made, tmp_path, changes, message):
    pipe, file = made
    with Image.open(file) as image:
        write_png(image, tmp_path / "bad.png", replace(read(file), **changes))
    with pytest.raises(RecipeError, match=message):
        steering.replay(tmp_path / "bad.png", pipe=pipe)


def test_a_table_with_a_run_that_was_stopped_before_its_verdict(made):
    pipe, _ = made
    _, call = build("sd3", steps=2)
    prompt = call.pop("prompt")

    def run(heldout):
        method = steering.samplers.BestOfN(n=1)
        return steering.steer(
            pipe, prompt, reward="brightness", heldout=heldout, method=method, **call
        )

    entries = [Entry(label="whole", result=run("jpeg")), Entry(label="stopped", result=run(None))]
    assert list(tabulate(entries, prompt).columns[2].cells)[1] == "-"
