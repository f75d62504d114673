"""The sticker world: grammar, exact boxes, determinism, held-out pairs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from steering.errors import OptionError
from steering.stickers import (
    CLASSES,
    COLORS,
    RELATIONS,
    TAGS,
    StickerWorld,
    describe,
    is_heldout,
    parse,
    prompts,
)
from steering.stickers.grammar import plural, record
from steering.stickers.prompts import GENEVAL_MIX, sample_metadata
from steering.stickers.world import GRID, SIZE, SPRITE, layouts, sprite

# Prompts and records as GenEval publishes them.
GENEVAL = [
    (
        "a photo of a dog right of a teddy bear",
        {
            "tag": "position",
            "include": [
                {"class": "teddy bear", "count": 1},
                {"class": "dog", "count": 1, "position": ["right of", 0]},
            ],
        },
    ),
    (
        "a photo of two clocks",
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 2}],
            "exclude": [{"class": "clock", "count": 3}],
        },
    ),
    (
        "a photo of a purple wine glass and a black apple",
        {
            "tag": "color_attr",
            "include": [
                {"class": "wine glass", "count": 1, "color": "purple"},
                {"class": "apple", "count": 1, "color": "black"},
            ],
        },
    ),
    (
        "a photo of an orange orange",
        {"tag": "colors", "include": [{"class": "orange", "count": 1, "color": "orange"}]},
    ),
    (
        "a photo of a scissors and a bird",
        {
            "tag": "two_object",
            "include": [{"class": "scissors", "count": 1}, {"class": "bird", "count": 1}],
        },
    ),
    ("a photo of a cow", {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}),
]


@pytest.mark.parametrize(("prompt", "expected"), GENEVAL)
def test_parse_gives_genevals_own_record(prompt: str, expected: dict) -> None:
    assert parse(prompt) == expected | {"prompt": prompt}


@pytest.mark.parametrize("tag", TAGS)
def test_parse_inverts_describe(tag: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        metadata = sample_metadata(rng, split="all", tag=tag)
        assert parse(metadata["prompt"]) == metadata
        assert describe(metadata) == metadata["prompt"]


def test_parse_is_total_on_single_nouns_and_counts() -> None:
    for name in CLASSES:
        for count, word in ((2, "two"), (3, "three"), (4, "four")):
            assert parse(f"a photo of {word} {plural(name)}")["include"] == [
                {"class": name, "count": count}
            ]
        for color in COLORS:
            made = record("colors", (name,), colors=(color,))
            assert parse(made["prompt"])["include"][0] == {
                "class": name,
                "count": 1,
                "color": color,
            }


def test_parse_forgives_form_but_not_content() -> None:
    assert parse("  Two SHEEP. ") == parse("a photo of two sheeps")
    assert parse("an red apple")["include"][0]["color"] == "red"


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("a photo of a unicorn", "not a sticker class"),
        ("a photo of a zebrra", "did you mean 'zebra'"),
        ("a photo of five dogs", "templates"),
        ("a photo of a red cat and a dog", "both objects or neither"),
        ("a photo of a cat and a cat", "twice"),
        ("a photo of a red cat left of a dog", "no colours"),
        ("an astronaut riding a horse on the moon", "not a sticker class"),
        ("", "templates"),
    ],
)
def test_parse_explains_what_it_cannot_read(prompt: str, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        parse(prompt)


@pytest.mark.parametrize("seed", range(20))
def test_scene_holds_what_its_metadata_asks(seed: int) -> None:
    scene = StickerWorld().sample(seed)
    asked = Counter()
    for clause in scene.metadata["include"]:
        asked[clause["class"], clause.get("color")] += clause["count"]
    assert Counter((o.name, o.color) for o in scene.objects) == asked
    boxes = scene.boxes
    assert (boxes[:, :2] % GRID == 0).all()
    assert (boxes >= 0).all()
    assert (boxes <= SIZE).all()
    for i in range(len(boxes)):
        for j in range(i):
            assert (np.abs(boxes[i, :2] - boxes[j, :2]) >= SPRITE).any()


def test_boxes_are_exact() -> None:
    world = StickerWorld()
    for seed in range(30):
        scene = world.sample(seed)
        with_objects = world.render(scene).astype(int)
        # The same scene with one object removed differs inside that object's box only.
        for k, gone in enumerate(scene.objects):
            rest = scene.objects[:k] + scene.objects[k + 1 :]
            empty = world.render(
                type(scene)(
                    metadata=scene.metadata,
                    objects=rest,
                    background=scene.background,
                    shade=scene.shade,
                )
            )
            rows, columns = np.nonzero(np.abs(with_objects - empty).sum(-1))
            x0, y0, x1, y1 = gone.box
            assert columns.min() >= x0
            assert columns.max() < x1
            assert rows.min() >= y0
            assert rows.max() < y1
            # An emoji fills its square along one axis at least.
            assert max(np.ptp(rows), np.ptp(columns)) >= SPRITE - 3


@pytest.mark.parametrize("relation", RELATIONS)
def test_layouts_keep_their_relation(relation: str) -> None:
    target, subject = layouts(2, relation)[:, 0], layouts(2, relation)[:, 1]
    dx, dy = (subject - target).T.astype(int)
    main, other = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = 1 if relation in ("right of", "below") else -1
    assert (sign * main >= SPRITE).all()
    assert (np.abs(other) <= GRID).all()


def test_layouts_are_all_there() -> None:
    assert len(layouts(1)) == 36
    # By symmetry, ordered pairs: each relation's mirror image has as many.
    assert len(layouts(2, "left of")) == len(layouts(2, "right of")) == len(layouts(2, "above"))
    pairs = {tuple(p) for p in layouts(2).reshape(-1, 4).tolist()}
    assert len(pairs) == len(layouts(2))
    assert all((x, y, a, b) in pairs for a, b, x, y in pairs)


def test_same_seed_same_bits_and_json() -> None:
    world = StickerWorld()
    for seed in range(10):
        a, b = world.sample(seed), world.sample(seed)
        assert a == b
        assert np.array_equal(world.render(a), world.render(b))
        assert json.loads(json.dumps(a.metadata)) == a.metadata
    assert world.sample(0) != world.sample(1)
    drawn = world.render("a photo of a red apple and a blue clock", 3)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (SIZE, SIZE, 3)
    assert np.array_equal(drawn, world.render(parse("a red apple and a blue clock"), 3))
    assert not np.array_equal(drawn, world.render("a red apple and a blue clock", 4))


def test_tints_are_apart() -> None:
    for name in CLASSES:
        tints = np.stack([sprite(name, color)[..., :3] for color in COLORS])
        gaps = np.abs(tints[:, None] - tints[None]).sum((2, 3, 4)) / sprite(name)[..., 3].sum()
        assert (gaps + np.eye(len(COLORS))).min() > 0.15  # summed over RGB, a pixel of ink


def test_a_tint_keeps_the_outline_and_takes_the_hue() -> None:
    for name in CLASSES:
        own, red = sprite(name), sprite(name, "red")
        assert np.array_equal(own[..., 3], red[..., 3])
        ink = red[red[..., 3] > 0.9]
        assert (ink[:, 0] > ink[:, 1]).mean() > 0.99


def test_sprites_are_distinct() -> None:
    drawn = np.stack([sprite(name).ravel() for name in CLASSES])
    gaps = np.abs(drawn[:, None] - drawn[None]).mean(-1) + np.eye(len(CLASSES))
    assert gaps.min() > 0.02


def test_training_never_sees_a_heldout_pair() -> None:
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(4000):
        classes = [c["class"] for c in sample_metadata(rng)["include"]]
        if len(classes) == 2:
            assert not is_heldout(*classes)
            seen[frozenset(classes)] += 1
    assert len(seen) > 800  # of 1,326 pairs, so the split is no accident of few draws
    assert is_heldout("cat", "dog") == is_heldout("dog", "cat")


def test_heldout_prompts_follow_genevals_mix() -> None:
    asked = prompts("heldout", 553)
    assert Counter(parse(p)["tag"] for p in asked) == GENEVAL_MIX
    for prompt in asked:
        classes = [c["class"] for c in parse(prompt)["include"]]
        assert len(classes) == 1 or is_heldout(*classes)
    assert prompts(n=120, seed=0) == prompts(n=120, seed=0)
    assert prompts(n=120, seed=0) != prompts(n=120, seed=1)
    assert len(prompts(n=120)) == 120
    assert len(set(prompts(n=120))) == 120


def test_unknown_split_is_refused() -> None:
    with pytest.raises(OptionError, match="heldout"):
        prompts("test")
