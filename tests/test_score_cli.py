"""`steer score`: files, prompts, several rewards, tables and JSON."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from steering.apps.geneval_score import read_image
from steering.apps.score import find, prompts_of, score_files
from steering.apps.serve_reward import Desk, Limits, build
from steering.errors import OptionError, RewardError, WeightsError
from steering.registry import REWARDS
from steering.rewards import as_reward, register
from tests import tiny_server
from tests.command import run


@pytest.fixture(autouse=True)
def _registry():
    """Names that a test registers are gone after it."""
    REWARDS.load()
    before = dict(REWARDS._entries)
    yield
    REWARDS._entries.clear()
    REWARDS._entries.update(before)


@pytest.fixture
def folder(tmp_path):
    for name, level, size in (("a.png", 10, 8), ("b.jpg", 200, 8), ("c.png", 90, 16)):
        Image.new("RGB", (size, size), (level,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_json_rows_in_the_order_of_the_files(capsys, folder):
    code, out, _ = run(
        capsys, "score", str(folder), "--prompt", "x", "--reward", "brightness", "--reward",
        "jpeg + 2*brightness", "--json",
    )  # fmt: skip
    rows = json.loads(out.strip().splitlines()[-1])
    assert code == 0
    assert [row["file"].rpartition("/")[2] for row in rows] == ["a.png", "b.jpg", "c.png"]
    levels = [row["scores"]["brightness"] for row in rows]
    assert levels == pytest.approx([10 / 255, 200 / 255, 90 / 255], abs=0.01)
    for row, level in zip(rows, levels, strict=True):
        total = row["scores"]["jpeg + 2*brightness"]
        parts = row["parts"]["jpeg + 2*brightness"]
        assert total == pytest.approx(parts["jpeg"] + 2 * level, abs=1e-4)


def test_the_table_has_the_best_on_top(capsys, folder):
    code, out, _ = run(capsys, "score", str(folder), "--reward", "brightness")
    assert code == 0
    assert out.index("b.jpg") < out.index("c.png") < out.index("a.png")


def test_prompts_for_all_for_each_or_from_the_recipe(folder):
    files = find([folder])
    assert prompts_of(files, ["x"]) == ["x", "x", "x"]
    assert prompts_of(files, ["x", "y", "z"]) == ["x", "y", "z"]
    assert prompts_of(files, []) == [None, None, None]
    with pytest.raises(OptionError, match="2 prompts for 3 pictures"):
        prompts_of(files, ["x", "y"])


def test_a_picture_made_by_steer_brings_its_prompt(tmp_path):
    import steering

    prompt = "a photo of a red apple"
    steering.steer(
        steering.load("stickers"), prompt, reward="brightness", method="best_of_n", nfe=4,
        num_inference_steps=2, guidance_scale=4.0, out=tmp_path,
    )  # fmt: skip
    files = find([tmp_path])
    assert prompts_of(files, []) == [prompt] * len(files)
    rows = score_files(files, prompts_of(files, []), ["detector"])
    assert rows[0]["scores"]["detector"] in (0.0, 1.0)


def test_what_was_finished_before_a_reward_failed_is_kept(capsys, folder):
    @register("test_shaky")
    def shaky(images, prompts):
        if images.shape[-1] == 16:
            raise RewardError("broken inside")
        return images.mean((1, 2, 3))

    code, out, err = run(
        capsys, "score", str(folder), "--reward", "test_shaky", "--reward", "brightness", "--json"
    )
    rows = json.loads(out.strip().splitlines()[-1])
    assert (code, "broken inside" in err) == (1, True)
    assert [row["scores"]["test_shaky"] is None for row in rows] == [False, False, True]
    assert [row["valid"] for row in rows] == [True, True, False]
    assert [bool(row["errors"]) for row in rows] == [False, False, True]
    assert all(row["scores"]["brightness"] > 0 for row in rows)


@pytest.mark.parametrize("kind", [OptionError, RewardError, ValueError])
def test_whatever_a_reward_raises_the_finished_scores_stay(folder, kind):
    @register("test_picky")
    def picky(images, prompts):
        if "odd" in prompts:
            raise kind("not this one")
        return images.mean((1, 2, 3))

    files = find([folder])
    rows = score_files(
        files, ["x", "odd", "x"], ["brightness", "test_picky", "jpeg"], batch_size=1
    )
    for row, lost in zip(rows, (False, True, True), strict=True):
        assert row["scores"]["brightness"] > 0 > row["scores"]["jpeg"]
        assert (row["scores"]["test_picky"] != row["scores"]["test_picky"]) is lost
        assert ("not this one" in row["errors"].get("test_picky", "")) is lost
        assert row["valid"] is not lost


def test_a_wrong_number_of_values_costs_nothing_else(folder):
    @register("test_mean")
    def mean(images, prompts):
        return images.mean()

    rows = score_files(find([folder]), ["x"] * 3, ["test_mean", "brightness"])
    assert all(row["scores"]["brightness"] > 0 for row in rows)
    assert "shape () for 2 pictures" in rows[0]["errors"]["test_mean"]


def test_where_nothing_was_finished_the_error_is_the_answer(folder):
    with pytest.raises(OptionError, match="steer score: --prompt"):
        score_files([folder / "a.png"], [None], ["clip(model=stickers)"])


def test_weights_that_are_missing_are_said_before_anything_is_scored(capsys, folder):
    asked = []

    @register("test_counted")
    def counted(images, prompts):
        asked.append(len(images))
        return images.mean((1, 2, 3))

    lacking = "clip(model=local-dir:/no/where)"
    with pytest.raises(WeightsError, match="no open_clip_config"):
        score_files(find([folder]), ["x"] * 3, ["test_counted", lacking])
    code, _, err = run(
        capsys, "score", str(folder), "--prompt", "x", "--reward", "test_counted", "--reward",
        f"test_counted + {lacking}",
    )  # fmt: skip
    assert (code, "no open_clip_config" in err) == (2, True)
    code, _, err = run(capsys, "score", str(folder), "--reward", "remote(url=http://127.0.0.1:9, "
                       "retries=0)")  # fmt: skip
    assert (code, "gave no answer" in err) == (2, True)
    assert asked == []


def test_a_served_comparison_is_asked_about_all_pictures_at_once(tmp_path):
    for k, level in enumerate((0, 50, 100, 150, 200)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{k}.png")
    files = find([tmp_path])
    reward = as_reward("rank(brightness)")
    with tiny_server.serve(build(Desk(reward, Limits()))) as url:
        rows = score_files(files, ["x"] * 5, [f"remote(url={url}, batch_size=2)"], batch_size=2)
    assert [row["scores"]["remote"] for row in rows] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    with tiny_server.serve(build(Desk(reward, Limits(max_images=3)))) as url:
        with pytest.raises(RewardError, match=r"5 images in one request.*--max-images 5"):
            score_files(files, ["x"] * 5, [f"remote(url={url})"])


def test_a_part_without_weight_gets_all_pictures_too(folder):
    files = [folder / "a.png", folder / "b.jpg"]
    (row, other) = score_files(files, ["x"] * 2, ["brightness + 0*rank(brightness)"], batch_size=1)
    (name,) = row["parts"]
    assert (row["parts"][name]["rank"], other["parts"][name]["rank"]) == (0.0, 1.0)


def test_the_help_names_the_default_reward_and_the_form_of_the_json(capsys):
    code, out, _ = run(capsys, "score", "--help")
    said = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "clip by default" in said
    assert "JSON list" in said
    assert "JSON object" not in said


def test_a_picture_of_too_many_pixels_is_one_clear_error(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(OptionError, match="cannot be read as a picture"):
        read_image(folder / "a.png")


def test_batches_and_sizes_do_not_change_scores(folder):
    files = find([folder])
    one = score_files(files, ["x"] * 3, ["brightness"], batch_size=1)
    many = score_files(files, ["x"] * 3, ["brightness"], batch_size=16)
    assert one == many


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent.png"], "There is no picture or folder"),
        (["{folder}/notes.txt"], "cannot be read as a picture"),
        (["{folder}", "--reward", "brightnes"], "Did you mean 'brightness'"),
        (["{folder}/a.png", "--reward", "detector"], "prompt 0 is None"),
        (["{empty}"], "No pictures in"),
    ],
)
def test_mistakes_are_one_line(capsys, folder, words, said):
    (folder / "empty").mkdir()
    filled = [w.format(folder=folder, empty=folder / "empty") for w in words]
    code, _, err = run(capsys, "score", *filled)
    assert code == 2
    assert said in err.replace("\n", " ")
