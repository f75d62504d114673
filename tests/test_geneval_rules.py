"""GenEval's rules: the published protocol on scenes whose verdict is known by construction."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest

from steering.errors import OptionError
from steering.rewards.geneval import (
    CLASSES,
    COLORS,
    TAGS,
    Rules,
    check_record,
    judge,
    read_prompts,
)
from steering.stickers.grammar import RELATIONS, record

DATA = Path(os.environ.get("STEERING_TEST_DATA", "no-test-data"))
OFFICIAL = DATA / "geneval" / "evaluation_metadata.jsonl"
SIDE, STRIDE = 80, 120
SCENES = 360


def random_record(rng: np.random.Generator, tag: str) -> dict:
    names = tuple(rng.choice(CLASSES, 2, replace=False).tolist())
    two = tuple(rng.choice(COLORS, 2, replace=False).tolist())
    return {
        "single_object": lambda: record(tag, names[:1]),
        "two_object": lambda: record(tag, names),
        "counting": lambda: record(tag, names[:1], count=int(rng.integers(2, 5))),
        "colors": lambda: record(tag, names[:1], colors=two[:1]),
        "position": lambda: record(tag, names, relation=str(rng.choice(RELATIONS))),
        "color_attr": lambda: record(tag, names, colors=two),
    }[tag]()


def draw(metadata: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """(objects, colours) of a scene that satisfies the record, with room on every threshold."""
    objects: dict[str, list] = {}
    colors: dict[str, list] = {}
    place = 0
    for clause in metadata["include"]:
        for _ in range(clause["count"]):
            x, y = STRIDE * (place % 4), STRIDE * (place // 4)
            if "position" in clause:
                (tx, ty, *_), _ = objects[metadata["include"][0]["class"]][0]
                step = {"left of": (-2, 0), "right of": (2, 0), "above": (0, -2), "below": (0, 2)}
                dx, dy = step[clause["position"][0]]
                x, y = tx + dx * SIDE, ty + dy * SIDE
            jitter = rng.uniform(-3, 3, 2)
            box = (x + jitter[0], y + jitter[1], x + SIDE + jitter[0], y + SIDE + jitter[1])
            objects.setdefault(clause["class"], []).append((box, float(rng.uniform(0.92, 0.99))))
            colors.setdefault(clause["class"], []).append(clause.get("color", "green"))
            place += 1
    return objects, colors


def verdict(metadata: dict, objects: dict, colors: dict, **rules):
    return judge(metadata, objects, lambda name, k: colors[name][k], rules=Rules(**rules))


def other_color(color: str) -> str:
    return COLORS[(COLORS.index(color) + 1) % len(COLORS)]


def violations(metadata: dict, objects: dict, colors: dict) -> list[tuple[str, str, dict, dict]]:
    """(rule, reason, objects, colours) of scenes that break exactly one demand."""
    out = []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        fewer, seen = copy.deepcopy(objects), copy.deepcopy(colors)
        fewer[name] = fewer[name][:-1]
        out.append(("count", f"found {count - 1} of {count} {name}", fewer, seen))
        if "color" in clause:
            wrong, seen = copy.deepcopy(objects), copy.deepcopy(colors)
            seen[name][0] = other_color(clause["color"])
            reason = f"{name} is {seen[name][0]}, not {clause['color']}"
            out.append(("color", reason, wrong, seen))
        if "position" in clause:
            relation, target = clause["position"]
            other = metadata["include"][target]["class"]
            swapped = copy.deepcopy(objects)
            swapped[name], swapped[other] = objects[other], objects[name]
            out.append(("position", f"{name} is not {relation} {other}", swapped, colors))
    for clause in metadata.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        more, seen = copy.deepcopy(objects), copy.deepcopy(colors)
        more[name].append(((0, 400, 50, 450), 0.95))
        seen[name].append("green")
        out.append(("exclude", f"found {count} {name}, {count} are too many", more, seen))
    return out


def check_scene(metadata: dict, rng: np.random.Generator) -> None:
    """A perfect scene passes, each single violation fails with its reason and no other."""
    objects, colors = draw(metadata, rng)
    right = verdict(metadata, objects, colors)
    assert right.correct, (metadata, right)
    assert right.reason == "correct"
    assert all(p.passed for p in right.parts)
    for rule, reason, bad, seen in violations(metadata, objects, colors):
        wrong = verdict(metadata, bad, seen)
        assert not wrong.correct
        failed = [p for p in wrong.parts if not p.passed]
        assert (failed[0].rule, failed[0].reason) == (rule, reason)
        # Only a missing target brings a second complaint: nothing can be beside it.
        assert all(p.reason.startswith("no ") for p in failed[1:])
        assert wrong.reason == "; ".join(p.reason for p in failed)


@pytest.mark.parametrize("tag", TAGS)
def test_perfect_scenes_pass_and_single_violations_fail(tag):
    rng = np.random.default_rng(TAGS.index(tag))
    for _ in range(SCENES // len(TAGS)):
        check_scene(random_record(rng, tag), rng)


@pytest.mark.parametrize("tag", TAGS)
def test_bystanders_and_faint_objects_change_nothing(tag):
    """Other classes, detections below the threshold and the order of the list do not count."""
    rng = np.random.default_rng(10 + TAGS.index(tag))
    for _ in range(40):
        metadata = random_record(rng, tag)
        objects, colors = draw(metadata, rng)
        least = 0.9 if tag == "counting" else 0.3
        for name in list(objects):
            objects[name] = [((0, 0, 9, 9), least), *objects[name]]
            colors[name] = ["pink", *colors[name]]
        names = {c["class"] for c in metadata["include"]}
        bystander = next(c for c in CLASSES if c not in names)
        objects[bystander] = [((0, 0, 300, 300), 0.99)]
        assert verdict(metadata, objects, colors).correct


def test_thresholds_are_exceeded_not_met():
    one, two = record("single_object", ("dog",)), record("counting", ("dog",), count=2)
    for metadata, least in ((one, 0.3), (two, 0.9)):
        for score, passes in ((least, False), (np.nextafter(least, 1), True)):
            objects = {"dog": [((0, 0, 9, 9), score)] * metadata["include"][0]["count"]}
            assert verdict(metadata, objects, {}).correct is passes


def test_counting_is_exact_and_the_rest_is_not():
    dogs = {"dog": [((40 * k, 0, 40 * k + 20, 20), 0.95) for k in range(3)]}
    assert not verdict(record("counting", ("dog",), count=2), dogs, {}).correct
    assert verdict(record("counting", ("dog",), count=3), dogs, {}).correct
    assert not verdict(record("counting", ("dog",), count=4), dogs, {}).correct
    assert verdict(record("single_object", ("dog",)), dogs, {}).correct


def test_at_most_sixteen_objects_of_a_class_count():
    dogs = {"dog": [((0, 0, 9, 9), 0.95)] * 30}
    metadata = record("single_object", ("dog",))
    metadata["exclude"] = [{"class": "dog", "count": 17}]
    assert verdict(metadata, dogs, {}).correct
    metadata["exclude"] = [{"class": "dog", "count": 16}]
    assert verdict(metadata, dogs, {}).reason == "found 16 dog, 16 are too many"


def test_overlapping_boxes_all_count_unless_asked():
    twins = {"dog": [((0, 0, 20, 20), 0.95), ((1, 0, 21, 20), 0.94), ((50, 0, 70, 20), 0.93)]}
    assert verdict(record("counting", ("dog",), count=3), twins, {}).correct
    assert verdict(record("counting", ("dog",), count=2), twins, {}, max_overlap=0.5).correct


def test_the_most_certain_object_is_asked_for_its_colour():
    asked = []

    def color_of(name: str, k: int) -> str:
        asked.append((name, k))
        return "red" if k == 1 else "blue"

    cups = {"cup": [((0, 0, 9, 9), 0.5), ((20, 0, 29, 9), 0.8)], "dog": [((0, 0, 9, 9), 0.9)]}
    assert judge(record("colors", ("cup",), colors=("red",)), cups, color_of).correct
    assert asked == [("cup", 1)]  # the index in the list as it was given
    judge(record("two_object", ("cup", "dog")), cups, color_of)
    assert len(asked) == 1
    judge(record("colors", ("fork",), colors=("red",)), cups, color_of)
    assert len(asked) == 1


def relation_by_hand(box: tuple, target: tuple) -> set[str]:
    """The published rule, spelt out one axis at a time."""
    offset = [(box[k] + box[k + 2] - target[k] - target[k + 2]) / 2 for k in (0, 1)]
    size = [abs(box[k + 2] - box[k]) + abs(target[k + 2] - target[k]) for k in (0, 1)]
    rest = [
        max(abs(o) - 0.1 * s, 0) * (1 if o > 0 else -1) for o, s in zip(offset, size, strict=True)
    ]
    if abs(rest[0]) < 1e-3 and abs(rest[1]) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    words = set()
    for value, low, high in zip(rest, ("left of", "above"), ("right of", "below"), strict=True):
        if value / length < -0.5:
            words.add(low)
        if value / length > 0.5:
            words.add(high)
    return words


def test_positions_follow_the_published_rule_on_random_boxes():
    rng = np.random.default_rng(4)
    seen = dict.fromkeys(RELATIONS, 0)
    for _ in range(500):
        corners = rng.uniform(0, 60, (2, 2))
        sizes = rng.uniform(5, 60, (2, 2))
        box, target = (
            tuple(map(float, (*c, *(c + s)))) for c, s in zip(corners, sizes, strict=True)
        )
        expected = relation_by_hand(box, target)
        for relation in RELATIONS:
            metadata = record("position", ("cat", "dog"), relation=relation)
            found = verdict(metadata, {"cat": [(box, 0.9)], "dog": [(target, 0.9)]}, {})
            assert found.correct == (relation in expected)
            seen[relation] += found.correct
    assert min(seen.values()) > 30


def test_the_margin_is_a_tenth_and_can_be_changed():
    metadata = record("position", ("cat", "dog"), relation="right of")
    dog, cat = (0, 0, 100, 100), (41, 0, 141, 100)  # (41 - 20) / 41 > 0.5
    objects = {"cat": [(cat, 0.9)], "dog": [(dog, 0.9)]}
    assert verdict(metadata, objects, {}).correct
    assert not verdict(metadata, objects, {}, margin=0.11).correct
    closer = {"cat": [((39, 0, 139, 100), 0.9)], "dog": [(dog, 0.9)]}
    assert not verdict(metadata, closer, {}).correct
    assert not verdict(metadata, {"cat": [(dog, 0.9)], "dog": [(dog, 0.9)]}, {}).correct


def test_every_pair_of_objects_and_targets_must_stand_so():
    metadata = record("position", ("cat", "dog"), relation="left of")
    metadata["include"][0]["count"] = metadata["include"][1]["count"] = 2
    cats, dogs = [(0, 0, 10, 10), (0, 20, 10, 30)], [(60, 0, 70, 10), (60, 20, 70, 30)]
    objects = {"cat": [(b, 0.9) for b in cats], "dog": [(b, 0.9) for b in dogs]}
    assert verdict(metadata, objects, {}).correct
    objects["dog"][1] = ((0, 60, 10, 70), 0.9)
    assert verdict(metadata, objects, {}).reason == "cat is not left of dog"


def test_a_failed_target_leaves_no_target_and_a_failed_colour_no_position():
    metadata = record("position", ("cat", "dog"), relation="left of")
    metadata["include"][1]["color"] = "red"
    objects = {"cat": [((0, 0, 9, 9), 0.9)]}
    found = verdict(metadata, objects, {"cat": ["red"]})
    assert found.reason == "found 0 of 1 dog; no dog for cat to be left of"
    objects["dog"] = [((50, 0, 59, 9), 0.9)]
    assert verdict(metadata, objects, {"cat": ["red"]}).correct
    wrong = verdict(metadata, objects, {"cat": ["blue"]})
    assert [p.rule for p in wrong.parts] == ["count", "count", "color"]


def test_the_classes_are_cocos_in_order():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES[k] for k in (0, 64, 65, 66, 79)] == [
        "person", "computer mouse", "tv remote", "computer keyboard", "toothbrush",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tag": "colours"}, "colors"),
        ({"tag": 3}, "not a GenEval record"),
        ({"include": []}, "include"),
        ({"include": [{"class": "dog"}]}, "count"),
        ({"include": [{"class": "dog", "count": 0}]}, "count"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "colour"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier"),
        ({"include": [{"class": "dog", "count": 1, "position": "above"}]}, "position"),
        ({"exclude": [{"class": "dog", "count": "two"}]}, "count"),
    ],
)
def test_wrong_records_are_refused(change, words):
    with pytest.raises(OptionError, match=words):
        check_record({**record("single_object", ("dog",)), **change})


def test_prompt_files_are_read_and_errors_name_the_line(tmp_path):
    records = [record("single_object", ("dog",)), record("counting", ("cat",), count=3)]
    lines = [json.dumps(r) for r in records]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n\n")
    assert read_prompts(file) == records
    file.write_text(lines[0] + "\n" + lines[1][:-9])
    with pytest.raises(OptionError, match=r"line 2.*cut off"):
        read_prompts(file)
    file.write_text(lines[0] + "\n\n[1]\n")
    with pytest.raises(OptionError, match="line 3"):
        read_prompts(file)
    file.write_text(json.dumps({k: v for k, v in records[0].items() if k != "prompt"}) + "\n")
    with pytest.raises(OptionError, match=r"line 1.*no prompt"):
        read_prompts(file)
    file.write_text("\n")
    with pytest.raises(OptionError, match="no prompts"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="UTF-8"):
        read_prompts(file)
    with pytest.raises(OptionError, match="no such"):
        read_prompts(tmp_path / "missing.jsonl")


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official prompts file is not here")
def test_the_official_prompts_parse_and_judge():
    records = read_prompts(OFFICIAL)
    counts = {tag: sum(r["tag"] == tag for r in records) for tag in TAGS}
    assert list(counts.values()) == [80, 99, 80, 94, 100, 100]
    assert {c["class"] for r in records for c in r["include"]} <= set(CLASSES)
    rng = np.random.default_rng(0)
    for metadata in records:
        check_scene(metadata, rng)


def test_the_sticker_records_judge_the_same_way():
    from steering.stickers import parse, prompts

    rng = np.random.default_rng(1)
    for text in prompts("heldout", n=553):
        check_scene(parse(text), rng)
