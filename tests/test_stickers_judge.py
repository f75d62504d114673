"""The sticker judge and the shipped weights: right scenes pass, wrong prompts fail."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steering.errors import OptionError, WeightsError
from steering.stickers import CLASSES, COLORS, RELATIONS, TAGS, StickerWorld, parse
from steering.stickers.grammar import record
from steering.stickers.judge import Found, StickerJudge, check, read_color
from steering.stickers.load import WEIGHTS, load_clip, load_detector, load_pipeline
from steering.stickers.prompts import sample_metadata
from steering.stickers.rules import relations

PER_TAG = 40


@pytest.fixture(scope="module")
def judge() -> StickerJudge:
    return StickerJudge()


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list]:
    """`PER_TAG` held-out scenes of each tag."""
    world, rng = StickerWorld(), np.random.default_rng(5)
    records = [sample_metadata(rng, split="heldout", tag=t) for t in TAGS for _ in range(PER_TAG)]
    images = np.stack([world.render(world.place(r, rng)) for r in records])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, records


def found(name: str, x: float = 0, y: float = 0, **rest) -> Found:
    return Found(name=name, score=rest.pop("score", 0.9), box=(x, y, x + 24, y + 24), **rest)


def test_rules_count_exactly_only_for_counting_prompts() -> None:
    two = [found("dog"), found("dog", 40)]
    assert check(parse("two dogs"), two).correct
    assert check(parse("a dog"), two).correct  # GenEval asks for at least one
    assert check(parse("three dogs"), two).reason == "found 2 of 3 dog"
    third = [*two, found("dog", 0, 40)]
    assert check(parse("two dogs"), third).reason == "found 3 dog, 3 are too many"


def test_rules_read_the_most_certain_object() -> None:
    red, blue = found("cup", color="red", score=0.9), found("cup", 40, color="blue", score=0.8)
    assert check(parse("a red cup"), [red, blue]).correct
    assert check(parse("a blue cup"), [red, blue]).reason == "cup is red, not blue"


def test_rules_check_every_clause() -> None:
    prompt = parse("a red cup and a blue dog")
    cup, dog = found("cup", color="red"), found("dog", 40, color="blue")
    assert check(prompt, [cup, dog]).correct
    assert not check(prompt, [cup]).correct
    assert not check(prompt, [found("cup", color="blue"), found("dog", 40, color="red")]).correct


@pytest.mark.parametrize("relation", RELATIONS)
def test_rules_read_positions_as_the_prompt_says_them(relation: str) -> None:
    corner = {"left of": (0, 20), "right of": (40, 20), "above": (20, 0), "below": (20, 40)}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    objects = [found("dog", 20, 20), found("cat", *corner[relation])]
    for other in RELATIONS:
        verdict = check(parse(f"a cat {other} a dog"), objects)
        assert verdict.correct == (other == relation)
        assert check(parse(f"a dog {other} a cat"), objects).correct == (
            other == opposite[relation]
        )


def test_the_dead_zone_is_a_tenth_of_the_sizes() -> None:
    target = (20.0, 20.0, 44.0, 44.0)
    edge = 0.1 * 48
    # On one axis the rule needs (d - edge) / d > 0.5, so d must pass twice the dead zone.
    assert relations((20 + edge * 2 - 0.1, 20.0, 44 + edge * 2 - 0.1, 44.0), target) == set()
    assert relations((20 + edge * 2 + 0.1, 20.0, 44 + edge * 2 + 0.1, 44.0), target) == {
        "right of"
    }
    assert relations((-20.0, -20.0, 4.0, 4.0), target) == {"left of", "above"}


def test_colours_are_read_exactly() -> None:
    world, rng = StickerWorld(), np.random.default_rng(2)
    for name in CLASSES:
        for color in COLORS:
            scene = world.place(record("colors", (name,), colors=(color,)), rng)
            pixels = world.render(scene).astype(np.float32) / 255
            dx, dy = rng.integers(-2, 3, 2)
            x0, y0, x1, y1 = scene.objects[0].box
            assert read_color(pixels, name, (x0 + dx, y0 + dy, x1 + dx, y1 + dy)) == color


def test_right_scenes_pass(judge: StickerJudge, scenes: tuple) -> None:
    images, records = scenes
    verdicts = judge.judge(images, records)
    for tag in TAGS:
        right = [v.correct for v, r in zip(verdicts, records, strict=True) if r["tag"] == tag]
        assert np.mean(right) >= 0.95, (tag, [v.reason for v in verdicts if not v.correct])


def test_wrong_prompts_fail(judge: StickerJudge, scenes: tuple) -> None:
    images, records = scenes
    rng = np.random.default_rng(3)
    wrong = [_falsify(r, rng) for r in records]
    verdicts = judge.judge(images, wrong)
    assert np.mean([v.correct for v in verdicts]) <= 0.02
    assert all(v.reason for v in verdicts)


def _falsify(metadata: dict, rng: np.random.Generator) -> dict:
    """The nearest wrong prompt: another class, number, colour, relation, or swapped colours."""
    include, tag = metadata["include"], metadata["tag"]
    names = tuple(c["class"] for c in include)
    other = str(rng.choice([c for c in CLASSES if c not in names]))
    if tag in ("single_object", "two_object"):
        return record(tag, (*names[:-1], other))
    if tag == "counting":
        return record(tag, names, count=2 + (include[0]["count"] - 1) % 3)
    if tag == "colors":
        color = rng.choice([c for c in COLORS if c != include[0]["color"]])
        return record(tag, names, colors=(str(color),))
    if tag == "position":
        return record(tag, names, relation=include[1]["position"][0])  # roles swapped
    return record(tag, names, colors=(include[1]["color"], include[0]["color"]))


def test_boxes_are_found_where_they_are(judge: StickerJudge) -> None:
    world = StickerWorld()
    scene = world.place(parse("a photo of a red apple and a blue clock"), 4)
    image = torch.from_numpy(world.render(scene)).permute(2, 0, 1)[None].float() / 255
    seen = {o.name: o.box for o in judge.detect(image)[0]}
    assert seen.keys() == {"apple", "clock"}
    for o in scene.objects:
        assert np.abs(np.subtract(seen[o.name], o.box)).max() < 3


def test_verdicts_depend_on_neither_batch_nor_size(judge: StickerJudge, scenes: tuple) -> None:
    images, records = scenes[0][::10], scenes[1][::10]
    together = judge.judge(images, records)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = judge.judge(images[order], [records[k] for k in order])
    small = StickerJudge(judge.detector, batch_size=3).judge(images, records)
    for place, k in enumerate(order.tolist()):
        assert shuffled[place].correct == together[k].correct == small[k].correct
    large = F.interpolate(images, scale_factor=4, mode="nearest")
    assert [v.correct for v in judge.judge(large, records)] == [v.correct for v in together]


def test_empty_and_broken_input(judge: StickerJudge) -> None:
    blank = torch.ones(1, 3, 64, 64) * 0.9
    assert judge.judge(blank, ["a photo of a cat"])[0].reason == "found 0 of 1 cat"
    assert judge.judge(blank[:0], []) == []
    with pytest.raises(OptionError, match="2 prompts"):
        judge.judge(blank, ["a cat", "a dog"])
    with pytest.raises(OptionError, match="shape"):
        judge.judge(blank[0], ["a cat"])
    with pytest.raises(OptionError, match="unicorn"):
        judge.judge(blank, ["a unicorn"])


def test_pipeline_loads_and_draws() -> None:
    pipe = load_pipeline()
    assert pipe.transformer.dtype == torch.bfloat16
    draw = [
        pipe(
            ["a photo of a cat", "a photo of a red car"],
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for _ in range(2)
    ]
    assert draw[0].shape == (2, 3, 64, 64)
    assert torch.equal(draw[0], draw[1])


def test_clip_prefers_the_right_caption_and_opens_with_stock_open_clip(scenes: tuple) -> None:
    import open_clip

    model, tokenizer, spec = load_clip()
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS / 'clip'}")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True)
    )
    pick = slice(0, None, 8)
    images, records = scenes[0][pick], scenes[1][pick]
    mean, std = (torch.tensor(spec[k]).view(3, 1, 1) for k in ("mean", "std"))
    text = tokenizer([r["prompt"] for r in records])
    assert text.shape[1] == model.context_length
    similarity = (
        model.encode_image((images - mean) / std, normalize=True)
        @ model.encode_text(text, normalize=True).T
    )
    right = similarity.argmax(1) == torch.arange(len(records))
    assert right.float().mean() >= 0.8


def test_missing_and_corrupt_weights_say_so(tmp_path) -> None:
    with pytest.raises(WeightsError, match="missing"):
        load_detector(tmp_path)
    with pytest.raises(WeightsError, match="missing"):
        load_pipeline(folder=tmp_path)
    shutil.copytree(WEIGHTS / "detector", tmp_path / "detector")
    (tmp_path / "detector" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_detector(tmp_path / "detector")
