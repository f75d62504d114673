"""The demo's repeats of recipes, its own and those from anywhere."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("gradio")

from steering.apps import demo_actions as actions
from steering.apps.demo_order import COMPOSED, Offer, offered_rewards
from steering.errors import OptionError, RecipeError, SteeringError
from steering.method import build_method, method_options
from steering.recipe import read
from steering.registry import METHODS
from tests import demo_world
from tests.demo_world import ended, order, pixels

host, _quiet_afterwards = demo_world.host, demo_world.quiet_afterwards


@pytest.fixture(scope="module")
def made(host, tmp_path_factory):
    """A PNG with its recipe, kept beyond its session."""
    ticket = ended(host.submit("maker", order(host, rewards={"clip": 1.0})))
    kept = tmp_path_factory.mktemp("made") / "apple.png"
    shutil.copy(ticket.results[0].files[0], kept)
    return kept


def test_a_picture_made_alone_repeats_pixel_by_pixel(host, made):
    file, recipe, again = actions.replay_order(made, host.offer)
    ticket = ended(host.submit("ann", again, pictures=recipe.image + 1))
    assert actions.verdict(file, recipe, ticket) == (True, "Identical: every pixel is the same.")
    assert (pixels(file) == pixels(ticket.results[0].files[0])).all()


def test_an_edited_picture_is_told_from_its_repeat(host, made, tmp_path):
    with Image.open(made) as image:
        info = PngInfo()
        for key, value in image.text.items():
            info.add_itxt(key, value)
        image.putpixel((0, 0), (0, 255, 0))
        image.save(tmp_path / "edited.png", pnginfo=info)
    file, recipe, again = actions.replay_order(tmp_path / "edited.png", host.offer)
    same, words = actions.verdict(file, recipe, ended(host.submit("ann", again)))
    assert not same
    assert "The pixels were edited" in words


def test_what_was_not_the_same_is_named_before_an_edit_is(host, made, tmp_path):
    ticket = ended(host.submit("ann", host.offer.repeat(read(made))))
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png")
    here, recipe = read(made).engine, read(made)
    for changes, words in (
        ({"threads": here["threads"] + 3}, f"threads {here['threads'] + 3} (here"),
        ({"max_batch": 7}, f"max_batch 7 (here {here['max_batch']})"),
        ({"deduplicate": not here["deduplicate"]}, "deduplicate"),
        ({"company": 2}, "other runs shared its batches"),
    ):
        other = replace(recipe, engine={**here, **changes})
        same, said = actions.verdict(tmp_path / "other.png", other, ticket)
        assert not same
        assert words in said
        assert "need not be an edit" in said
    older = replace(recipe, versions={**recipe.versions, "torch": "1.0"})
    assert "torch 1.0 (here" in actions.verdict(tmp_path / "other.png", older, ticket)[1]
    assert "were edited" in actions.verdict(tmp_path / "other.png", recipe, ticket)[1]


def test_a_repeat_tells_the_reward_what_the_recipe_told_it(host, made):
    told = replace(host.offer, rewards=(*host.offer.rewards, "told"))
    recipe = replace(read(made), reward="told", metadata=[{"times": -3.0}])
    assert host.offer.repeat(read(made)).metadata is None
    outcome = ended(host.submit("ann", told.repeat(recipe))).results[0]
    assert -3.0 < outcome.reward < -0.1
    assert outcome.recipe["metadata"] == recipe.metadata
    lost = replace(recipe, metadata=[{"$unavailable": "Tensor (3,)"}])
    with pytest.raises(RecipeError, match="could not store"):
        told.repeat(lost)
    with pytest.raises(RecipeError, match="longer than"):
        told.repeat(replace(recipe, metadata=["a" * 10**6]))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"class": "DDIMScheduler", "config": {}}, "its scheduler is DDIMScheduler, this"),
        ({"config": {"shift": 9.0}}, r"other settings than here \(shift\)"),
        ("Euler", "Damaged recipe"),
    ],
)
def test_a_recipe_with_another_scheduler_is_refused(host, made, scheduler, words):
    recipe = read(made)
    own = recipe.model["scheduler"]
    if isinstance(scheduler, dict):
        config = {**own["config"], **scheduler["config"]}
        scheduler = {**own, **scheduler, "config": config}
    other = replace(recipe, model={**recipe.model, "scheduler": scheduler})
    ticket = ended(host.submit("ann", host.offer.repeat(other)))
    assert (ticket.state, ticket.live.nfe) == ("failed", 0)
    assert re.search(words, ticket.error)


RECIPES = {
    "address": ({"reward": "remote(url=http://10.0.0.1)"}, "not offered by this server"),
    "file": ({"reward": "aesthetic(head=/etc/passwd)"}, "not offered by this server"),
    "weights": ({"reward": "clip(pretrained=/etc)"}, "lead to files or addresses"),
    "judge's weights": ({"heldout": ["clip(pretrained=/etc)"]}, "lead to files or addresses"),
    "endless": ({"reward": "clip(scale=1" + 600 * "0" + ")"}, "not one that is read"),
    "options": ({"method": {"name": "fk", "options": [1]}}, "options of its method"),
    "not offered": ({"reward": "jpeg"}, "not offered by this server"),
    "code": ({"reward": "python:os.system"}, "(?i)python"),
    "model": ({"model": {"source": "/etc"}}, "This server offers"),
    "rows": ({"budget": {"nfe": 10**9}}, "nfe must lie in"),
    "particles": ({"method": {"name": "fk", "options": {"n_particles": 999}}}, "at most 256"),
    "steps": ({"call": {"num_inference_steps": 10**6}}, "num_inference_steps must lie in"),
    "many": ({"prompts": ["a"] * 17, "seeds": [0] * 17}, "17 prompts, too many"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_from_anywhere_reach_no_further_than_the_form(host, made, name):
    changes, words = RECIPES[name]
    recipe = replace(read(made), **changes)
    with pytest.raises(SteeringError, match=words):
        repeat(host, recipe)


EVERY = Offer(rewards=(*offered_rewards(), *COMPOSED))
"""What an operator offers at most."""
PATH = "lead to files or addresses"
REACHING = {
    "clip(pretrained=/tmp/weights.pt)": PATH,
    "clip(model=local-dir:/etc)": PATH,
    "clip(model=hf-hub:a/b)": PATH,
    "clip(model='/etc')": PATH,
    "clip(device=cuda:7)": PATH,
    "imagereward(tokenizer=/etc)": PATH,
    "pickscore(tokenizer=/etc)": PATH,
    "pickscore(model=stickers)": PATH,
    "vqascore(vision=a/b, tokenizer=/etc)": PATH,
    "vqascore(question='what?')": PATH,
    "hps3(base=/etc)": PATH,
    "hps3(rubric=/etc/passwd)": PATH,
    "videoreward(base=/etc)": PATH,
    "count(model=/etc)": PATH,
    "vlm(url=http://127.0.0.1:8000)": PATH,
    "unified(template=/etc/passwd)": PATH,
    "remote(url=http://10.0.0.1)": "not offered",
    "2*brightness - (jpeg + 0.5*clip(pretrained=/etc))/2": PATH,
    "zsum(clip, aesthetic, calibration=/etc/passwd)": PATH,
    "zsum(brightness, min(jpeg, aesthetic(head=/etc)))": PATH,
    "frames(clip(pretrained=/etc), every=2)": PATH,
    "category(clip, weights=/etc/passwd)": PATH,
    "category(clip, categories=/etc/passwd)": PATH,
    "vqascore(batch_size=100000000)": "between -100 and 100",
    "clip(batch_size=-1000)": "between -100 and 100",
    "vlm(high=1000)": "between -100 and 100",
    "clip(scale=1e30)": "between -1000 and 1000",
    "lexicographic(clip, jpeg, step=nan)": "between -1000 and 1000",
    " + ".join(["brightness"] * 17): "more than 16 rewards",
}
HARMLESS = (
    "2*clip(model=stickers, scale=100) - brightness/3",
    "clip(model=ViT-L-14-quickgelu, pretrained=openai)",  # what clip is anyway
    "diversity(features=clip, batch_size=2)",
    "hps(antialias=false)",
    "presence(mode=smooth, threshold=0.5)",
    "presence(threshold=none)",
    "unified(max_new_tokens=2048)",
    "vqascore(precision=fp16)",
    "frames(min(brightness, jpeg(quality=80)), every=2, reduce=min)",
)


@pytest.mark.parametrize("spec", REACHING)
def test_rewards_of_a_recipe_lead_to_no_file_and_no_address(made, spec):
    for change in ({"reward": spec}, {"heldout": [spec]}):
        with pytest.raises(RecipeError, match=REACHING[spec]):
            EVERY.repeat(replace(read(made), **change))


@pytest.mark.parametrize("spec", HARMLESS)
def test_numbers_flags_and_choices_of_a_recipe_are_repeated(made, spec):
    assert EVERY.repeat(replace(read(made), reward=spec)).reward == spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transition": "/etc/passwd"}, "transition='/etc/passwd'"),
        ({"potential": {"$unavailable": "function"}}, "potential"),
        ({"guidance": "/etc/passwd"}, "guidance='/etc/passwd'"),
        ({"guidance": {"preset": "/etc/passwd"}}, "guidance '/etc/passwd' is unknown"),
        ({"guidance": {"space": "/etc/passwd"}}, "of its guidance"),
        ({"guidance": {"n_draws": 10**9}}, "n_draws=.* of its guidance"),
        ({"n_particles": "4"}, "n_particles"),
        ({"reward_scale": 1e300}, "reward_scale"),
        ({"checkpoints": ["/etc/passwd"]}, "checkpoints"),
        ({"checkpoints": [[0.5]]}, "checkpoints"),
        ({"steps": True}, "steps"),
    ],
)
def test_options_of_a_recipes_method_are_numbers_flags_and_choices(made, options, words):
    recipe = read(made)
    method = {"name": "fk", "options": {**recipe.method["options"], **options}}
    with pytest.raises(RecipeError, match=words):
        EVERY.repeat(replace(recipe, method=method))


@pytest.mark.parametrize("name", METHODS.names())
def test_every_methods_own_recipe_is_repeated(made, name):
    presets = getattr(METHODS.get(name), "presets", {})
    built = [build_method(name), *(build_method(f"{name}/{p}") for p in presets)]
    for method in built:
        options = json.loads(json.dumps(method_options(method)))
        order = EVERY.repeat(replace(read(made), method={"name": name, "options": options}))
        assert build_method(name, order.options) == method


def repeat(host, recipe):
    """Some are refused at once, the others by the worker."""
    raise OptionError(ended(host.submit("ann", host.offer.repeat(recipe))).error)
