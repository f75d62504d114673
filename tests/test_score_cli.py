"""`steer score`: files, prompts, several rewards, tables and JSON."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from steering.apps.geneval_score import read_image
from steering.apps.score import find, prompts_of, score_files
from steering.errors import OptionError, RewardError
from steering.rewards import register
from tests.command import run


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
