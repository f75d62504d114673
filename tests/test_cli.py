"""The `steer` command on the embedded model, and recipes that rebuild their picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import steering
from steering.errors import OptionError, RecipeError, SteeringError
from steering.recipe import CHUNK, Recipe, read
from tests.command import run

PROMPT = "a photo of a red apple and a blue clock"
FAST = ["--set", "num_inference_steps=6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One FK run of two particles with everything written to disk."""
    folder = tmp_path_factory.mktemp("made")
    pipe = steering.load("stickers")
    result = steering.steer(
        pipe, PROMPT, reward="clip", heldout="detector", method="fk", nfe=24, seed=3,
        num_inference_steps=6, guidance_scale=4.0, out=folder,
    )  # fmt: skip
    return folder, result


def test_generate_prints_one_json_object_last(capsys, tmp_path):
    (tmp_path / "0.png").write_text("somebody else's")
    words = ["generate", PROMPT, "--nfe", "24", "--heldout", "detector", "--out", str(tmp_path)]
    code, out, _ = run(capsys, *words, "--json", *FAST)
    data = json.loads(out.strip().splitlines()[-1])
    assert code == 0
    assert set(data) == {"best_reward", "heldout", "ledger", "files", "recipe"}
    assert data["ledger"]["nfe"] == 24
    assert data["ledger"]["heldout_calls"] == 2
    assert data["heldout"]["detector"][0] in (0.0, 1.0)
    assert data["files"] == [str(tmp_path / "000.png"), str(tmp_path / "001.png")]
    assert read(data["files"][0]).prompts == [PROMPT]


def test_replay_is_bit_identical(capsys, made, tmp_path):
    folder, result = made
    for k in range(len(result)):
        code, out, _ = run(capsys, "replay", str(folder / f"{k:03d}.png"), "--json")
        data = json.loads(out.strip().splitlines()[-1])
        assert code == 0
        assert data["identical"] is True
        assert data["difference"] == 0


def test_replay_of_one_prompt_of_a_list(tmp_path):
    """Rounding depends on the batch, so a recipe repeats the whole list."""
    prompts = ["a photo of a dog", "a photo of two cats"]
    results = steering.steer(
        steering.load("stickers"), prompts, reward="brightness", method="best_of_n", nfe=24,
        seed=[1, 2], num_inference_steps=6, guidance_scale=4.0, out=tmp_path,
    )  # fmt: skip
    found = steering.replay(tmp_path / "0001" / "000.png")
    assert found.identical
    assert torch.equal(found.result.rewards, results[1].rewards)


def test_replay_notices_other_weights(made):
    folder, _ = made
    pipe = steering.load("stickers")
    with torch.no_grad():
        next(iter(pipe.transformer.parameters())).mul_(1.5)
    with pytest.raises(RecipeError, match="fingerprint"):
        steering.replay(folder / "000.png", pipe=pipe)


def test_replay_of_another_picture_differs(made, tmp_path):
    """The comparison can fail: a changed pixel is found."""
    folder, _ = made
    with Image.open(folder / "000.png") as image:
        pixels, recipe = np.asarray(image).copy(), image.text[CHUNK]
    pixels[0, 0, 0] ^= 16
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, recipe, zip=True)
    Image.fromarray(pixels).save(tmp_path / "edited.png", pnginfo=info)
    found = steering.replay(tmp_path / "edited.png")
    assert not found.identical
    assert found.difference == 16


def test_a_callable_reward_must_be_given_again(tmp_path):
    def redness(images, prompts):
        return images[:, 0].mean((1, 2))

    call = {"num_inference_steps": 4, "guidance_scale": 4.0}
    steering.steer(steering.load("stickers"), "a photo of a dog", reward=redness,
                   method="best_of_n", nfe=8, out=tmp_path, **call)  # fmt: skip
    with pytest.raises(RecipeError, match="reward="):
        steering.replay(tmp_path / "000.png")
    assert steering.replay(tmp_path / "000.png", reward=redness).identical


def test_a_recipe_runs_no_code_of_its_own_choice(made, tmp_path):
    """python:module:function is for the user to write, not for a picture found somewhere."""
    folder, _ = made
    data = {**read(folder / "000.png").to_json(), "reward": "python:os:getcwd"}
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(data))
    with Image.open(folder / "000.png") as image:
        image.save(tmp_path / "sly.png", pnginfo=info)
    with pytest.raises(SteeringError, match="python:"):
        steering.replay(tmp_path / "sly.png")


def damage(kind: str, good: dict) -> str:
    if kind == "json":
        return "{not json"
    if kind == "foreign":
        return json.dumps({"format": "something else"})
    if kind == "version":
        return json.dumps({**good, "version": 99})
    if kind == "missing":
        return json.dumps({k: v for k, v in good.items() if k != "method"})
    return json.dumps({**good, "prompt": 7})


@pytest.mark.parametrize("kind", ["json", "foreign", "version", "missing", "range"])
def test_damaged_recipes_are_one_clear_error(made, tmp_path, kind):
    folder, _ = made
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, damage(kind, read(folder / "000.png").to_json()))
    path = tmp_path / "bad.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(RecipeError, match=r"bad\.png"):
        read(path)


def test_files_that_are_no_pictures(capsys, tmp_path, made):
    folder, _ = made
    whole = (folder / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    for name in ("cut.png", "text.png", "plain.png", "photo.jpg", "absent.png"):
        code, _, err = run(capsys, "replay", str(tmp_path / name))
        assert code == 2
        assert err.count("Error:") == 1
        assert name in err.replace("\n", "")


def test_recipe_round_trips(made):
    folder, result = made
    recipe = read(folder / "001.png")
    assert recipe.image == 1
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.method["options"]["n_particles"] == 2
    assert not any(str(folder) in str(v) for v in recipe.to_json().values())
    assert result.recipe.model["source"] == "stickers"


def test_compare_draws_all_methods(capsys, tmp_path):
    words = ["compare", PROMPT, "--nfe", "24", "--heldout", "detector", "--out", str(tmp_path)]
    words += ["--dtype", "float32", "--json"]
    code, out, _ = run(capsys, *words, *FAST, "--set", "n_particles=2")  # of fk only
    rows = json.loads(out.strip().splitlines()[-1])["rows"]
    assert code == 0
    assert [r["method"] for r in rows] == ["unsteered", "best_of_n", "fk"]
    assert [r["ledger"]["nfe"] for r in rows] == [12, 24, 24]
    # best-of-N holds the unsteered sample among its own, up to the rounding of another batch
    assert rows[1]["best_reward"] >= rows[0]["best_reward"] - 1e-5
    with Image.open(tmp_path / "compare.png") as image:
        assert image.width > 3 * 256


@pytest.mark.parametrize("command", ["methods", "rewards"])
def test_tables(capsys, command):
    code, out, _ = run(capsys, command, "--json")
    names = {row["name"] for row in json.loads(out.strip().splitlines()[-1])}
    assert code == 0
    assert names >= ({"best_of_n", "fk"} if command == "methods" else {"clip", "detector", "jpeg"})
    code, out, _ = run(capsys, command)
    assert code == 0
    assert all(name[:4] in out for name in names)


def test_check_proves_the_embedded_model(capsys):
    code, out, _ = run(capsys, "check", "stickers", "--json", "--set", "num_inference_steps=3")
    assert code == 0
    assert json.loads(out.strip().splitlines()[-1])["ok"] is True


def test_a_plan_says_what_a_run_would_spend_and_how_wide_its_calls_may_be(capsys):
    words = ["plan", "stickers", "--nfe", "24", "--most", "4", "--set", "num_inference_steps=3"]
    code, out, said = run(capsys, *words, "--json")
    assert code == 0
    assert "24 network rows" in said
    assert "network" in said
    assert "4 rows fit: 1 call" in said
    told = json.loads(out.strip().splitlines()[-1])
    assert told["cost"]["nfe"] == 24
    assert told["memory"]["max_batch"] == 4
    assert set(told["memory"]["parts"]) == {"network", "decoder", "reward"}
    assert run(capsys, *words[:2], "--nfe", "2")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", ""], "non-empty text"),
        (["generate", PROMPT, "--method", "fkk"], "'fk'"),
        (["generate", PROMPT, "--reward", "clop"], "'clip'"),
        (["generate", PROMPT, "--set", "reward_scal=3"], "'reward_scale'"),
        (["generate", PROMPT, "--set", "reward_scale=much"], "reward_scale"),
        (["generate", PROMPT, "--set", "oops"], "key=value"),
        (["generate", PROMPT, "--nfe", "10"], "needs 40"),
        (["generate", PROMPT, "--n-particles", "50", "--nfe", "100"], "needs nfe=2000"),
        (["generate", PROMPT, "--method", "zero_order", "--n-particles", "3"], "no population"),
        (["generate", PROMPT, "--set", "eta=0", "--nfe", "80"], "eta"),
        (["generate", PROMPT, "--heldout", "clip", "--nfe", "80"], "guiding reward itself"),
        (["generate", PROMPT, "--model", "no/such-model"], "could not be opened"),
        (["generate", PROMPT, "--dtype", "int7"], "Unknown dtype"),
        (
            ["generate", "a sticker of nothing known", "--reward", "detector", "--nfe", "80"],
            "sticker class",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, words, said):
    out = tmp_path / "out"
    code, printed, err = run(
        capsys, *words, *(["--out", str(out)] if words[0] == "generate" else [])
    )
    assert code == 2
    assert err.count("Error:") == 1
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert not list(out.glob("*")) if out.exists() else True
    assert not printed


def test_an_unwritable_folder_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "generate", PROMPT, "--out", str(tmp_path / "file" / "below"))
    assert code == 2
    assert "cannot be written" in " ".join(err.split())
    with pytest.raises(OptionError, match="is a file"):
        steering.steer(steering.load("stickers"), PROMPT, reward="clip", out=tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "spin"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_let_others_work_unless_the_user_says_how_they_wait(given, spin):
    """Before torch is loaded, or its OpenMP would not read it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    ask = (
        "import sys, steering.apps, os; assert 'torch' not in sys.modules; "
        "import steering.apps.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], env=kept | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(spin)
