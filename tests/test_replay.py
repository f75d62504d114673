"""Replay of pipelines without a name, damaged recipes, and stopped runs in tables."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

import steering
from steering.apps.comparison import Entry, tabulate
from steering.errors import OptionError, RecipeError
from steering.loading import describe, load_again, setup_of
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
        ({"model": {"setup": 3}}, r"model\.setup"),
        ({"model": {"setup": {"frozen": "vae"}}}, r"model\.setup"),
        ({"model": {"setup": {"tiling": "no"}}}, r"model\.setup"),
        ({"model": {"setup": {"compile": 5}}}, r"model\.setup"),
    ],
)
def test_damaged_values_are_one_clear_error(made, tmp_path, changes, message):
    pipe, file = made
    with Image.open(file) as image:
        write_png(image, tmp_path / "bad.png", replace(read(file), **changes))
    with pytest.raises(RecipeError, match=message):
        steering.replay(tmp_path / "bad.png", pipe=pipe)


def test_the_recipe_of_thousands_of_prompts_can_be_read(made, tmp_path):
    _, file = made
    prompts = [
        f"a photo of a fox, take {i} of very many " + "in the snow " * 10 for i in range(9000)
    ]
    large = replace(read(file), prompts=prompts, seeds=list(range(9000)))
    with Image.open(file) as image:
        write_png(image, tmp_path / "large.png", large)
    assert read(tmp_path / "large.png") == large
    assert (tmp_path / "large.png").stat().st_size < 300_000


def test_a_recipe_that_unpacks_without_end_is_refused(made, tmp_path, monkeypatch):
    _, file = made
    monkeypatch.setattr("steering.recipe._MOST", 2**20)
    prompts = ["a fox " * 200_000]
    with Image.open(file) as image:
        write_png(image, tmp_path / "bomb.png", replace(read(file), prompts=prompts))
    with pytest.raises(RecipeError, match="more than 1 MiB"):
        read(tmp_path / "bomb.png")


def test_a_folder_where_a_picture_should_be_written(made, tmp_path):
    pipe, _ = made
    (tmp_path / "000.png").mkdir()
    with pytest.raises(OptionError, match=r"000\.png is a folder"):
        steering.steer(pipe, "a fox", reward="brightness", nfe=8, num_inference_steps=2).save(
            tmp_path
        )
    assert [p.name for p in tmp_path.iterdir()] == ["000.png"]


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


# --- pipelines that were made ready in another way than by steering.load -------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipe, _ = build("sd", steps=3)
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def plain(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frozen(folder):
    pipe = plain(folder)
    pipe.vae.requires_grad_(False)
    return pipe


def tiled(folder):
    pipe = plain(folder)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    return pipe


def unet_last(folder):
    pipe = plain(folder)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


READY = {
    "unet last": (unet_last, {"channels_last": ["unet"]}),
    "plain": (plain, {}),
    "frozen": (frozen, {"frozen": ["vae"]}),
    "tiled": (tiled, {"tiling": True, "slicing": True}),
    "channels last": (
        lambda f: steering.load(f, dtype="float32", channels_last=True),
        {"channels_last": ["vae"]},
    ),
    "attention": (
        lambda f: steering.load(f, dtype="float32", attention="math"),
        {"attention": "math"},
    ),
}


@pytest.mark.parametrize("name", READY)
def test_a_pipeline_is_made_ready_again_as_it_was(saved, tmp_path, name):
    make, said = READY[name]
    pipe = make(saved)
    call = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 3.0}
    method = steering.samplers.BestOfN(n=6, select="all")
    first = steering.steer(pipe, "a fox", reward="brightness", method=method, out=tmp_path, **call)
    setup = read(tmp_path / "000.png").model["setup"]
    standard = {"attention": "native", "compile": False, "channels_last": [], "frozen": []}
    assert setup == {**standard, "slicing": False, "tiling": False, **said}
    again = steering.replay(tmp_path / "000.png")
    assert torch.equal(again.result.pixels, first.pixels)
    assert setup_of(load_again(first.recipe.model)) == setup


def test_a_compiled_pipeline_is_compiled_again(saved):
    pipe = steering.load(saved, compile="max-autotune")
    assert setup_of(pipe)["compile"] == "max-autotune"
    assert setup_of(load_again(describe(pipe))) == setup_of(pipe)


def test_how_a_pipeline_is_made_ready_shows_in_its_last_bits(saved):
    """Or the test before this one could not fail."""
    pictures = {}
    for name in ("plain", "frozen", "tiled", "channels last"):
        pipe = READY[name][0](saved)
        x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pictures[name] = pipe.vae.decode(x).sample
    for name in ("frozen", "tiled", "channels last"):
        assert not torch.equal(pictures[name], pictures["plain"]), name
