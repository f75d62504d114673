"""The demo's uploads: scored a few at a time within limits, and gone with their session."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio")

from steering.apps.demo_order import Limits
from steering.apps.demo_score import check_uploads, score, score_chore
from steering.errors import OptionError
from steering.scoring import Scores
from tests.demo_world import eventually, held, hosting, order

EXIF_ORIENTATION = 274


@pytest.fixture(scope="module")
def host():
    with hosting(per_session=2, seconds=120.0) as found:
        yield found


def picture(path: Path, size=(8, 8), color="red") -> Path:
    Image.new("RGB", size, color).save(path)
    return path


def pictures(folder: Path, count: int, size=(8, 8)) -> list[Path]:
    return [picture(folder / f"{k}.png", size, (k, k, k)) for k in range(count)]


class Recorded:
    """A lane whose rewards note what they are shown."""

    def __init__(self, *, stationary: bool = True) -> None:
        self.stationary, self.shapes = stationary, []

    def reward(self, name: str):
        return self

    def __call__(self, images, prompts):
        self.shapes.append(tuple(images.shape))
        assert len(prompts) == len(images)
        return Scores(value=images[:, 0, 0, 0] * 255)


def all_of(chore):
    """(calls, answer) of a chore that nobody stops."""
    calls = 0
    while True:
        try:
            next(chore)
        except StopIteration as end:
            return calls, end.value
        calls += 1


# --- scoring ------------------------------------------------------------------------------------


def test_a_few_pictures_of_one_size_go_together_and_keep_their_places(tmp_path):
    files = pictures(tmp_path, 9)
    files.insert(3, picture(tmp_path / "wide.png", (16, 8), (200, 0, 0)))
    lane = Recorded()
    calls, rows = all_of(score_chore(files, "a cat", ["one", "two"])(lane))
    assert calls == 8
    assert lane.shapes == 2 * [(4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 16)]
    assert [row["one"] for row in rows] == pytest.approx([0, 1, 2, 200, 3, 4, 5, 6, 7, 8])
    assert [row["two"] for row in rows] == [row["one"] for row in rows]


def test_large_pictures_go_alone_and_those_that_are_compared_together(tmp_path):
    lane = Recorded()
    all_of(score_chore(pictures(tmp_path, 3, (2000, 1500)), "a cat", ["one"])(lane))
    assert lane.shapes == 3 * [(1, 3, 1500, 2000)]
    lane = Recorded(stationary=False)
    all_of(score_chore(pictures(tmp_path, 6), "a cat", ["one"])(lane))
    assert lane.shapes == [(6, 3, 8, 8)]


def test_pictures_are_scored_upright(tmp_path):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # lies on its side: the left half becomes the top
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    lane = Recorded()
    (row,) = all_of(score_chore([tmp_path / "phone.png"], "a cat", ["one"])(lane))[1]
    assert lane.shapes == [(1, 3, 16, 8)]
    assert row["one"] == 255


def test_scores_come_from_the_host(host, tmp_path):
    files = [str(f) for f in pictures(tmp_path, 6)]
    rows = asyncio.run(score(host, "ann", files, "a cat", ["brightness", "brightness"]))
    assert [row["file"] for row in rows] == [f"{k}.png" for k in range(6)]
    light = [row["scores"]["brightness"] for row in rows]
    assert light == pytest.approx([k / 255 for k in range(6)], abs=1e-6)
    with pytest.raises(OptionError, match="at least one reward"):
        asyncio.run(score(host, "ann", files, "a cat", []))


def scoring(host, files):
    return host.submit("ann", order(host), chore=score_chore(files, "a cat", ["gated"]))


def test_scoring_can_be_cancelled_between_calls(host, tmp_path):
    with held() as gate:
        ticket = scoring(host, pictures(tmp_path, 12))
        eventually(lambda: gate.blocked, "the first pictures are being scored")
        assert host.cancel("ann") == 1
        gate.let(1)
        eventually(lambda: ticket.over, "scoring has ended")  # the gate lets no second call pass
    assert (ticket.state, ticket.error) == ("stopped", "Cancelled before all was done.")
    assert ticket.answer is None


def test_scoring_ends_at_the_limit_of_time(tmp_path):
    with hosting(seconds=0.5) as host, held() as gate:
        ticket = scoring(host, pictures(tmp_path, 12))
        eventually(lambda: gate.blocked, "the first pictures are being scored")
        time.sleep(0.6)
        gate.let(1)
        eventually(lambda: ticket.over or gate.blocked, "scoring has ended, or went on")
        assert ticket.state == "stopped"
        assert ticket.error == "The limit of 0.5 s was reached before all was done."


# --- uploads ------------------------------------------------------------------------------------


def test_uploads_are_bounded_together(tmp_path):
    limits = Limits(all_pixels=200, uploads=4)
    files = pictures(tmp_path, 4)
    assert check_uploads(files[:3], limits) == files[:3]
    with pytest.raises(OptionError, match=r"more than 0\.0002 million pixels together"):
        check_uploads(files, limits)
    for few in ([], pictures(tmp_path, 5)):
        with pytest.raises(OptionError, match=f"Choose 1 to 4 pictures, got {len(few)}"):
            check_uploads(few, limits)
    most = Limits()
    assert most.upload_pixels < most.all_pixels < most.uploads * most.upload_pixels


def upload(host, content: bytes, name: str = "cat.png") -> Path:
    """Where gradio puts a file."""
    folder = host.root / hashlib.sha256(content).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_who_leaves_takes_uploads_along_but_not_those_of_others(host):
    own, shared = upload(host, b"own"), upload(host, b"shared")
    renamed = upload(host, b"shared", "dog.png")
    host.remember("ann", [str(own), str(shared), None])
    host.remember("ann", [])
    host.remember("bob", [str(shared)])
    host.remember("eve", [renamed])
    host.leave("ann")
    assert not own.parent.exists()
    assert shared.exists()
    host.leave("eve")
    assert (shared.exists(), renamed.exists()) == (True, False)
    host.leave("bob")
    assert not shared.parent.exists()
    assert host._uploads == {}


def test_nothing_but_uploads_goes(host, tmp_path):
    ticket = host.submit("bob", order(host))
    eventually(lambda: ticket.over, "the run is over")
    files = [ticket.results[0].files[0], picture(tmp_path / "mine.png"), upload(host, b"kept")]
    link = files[2].parent / "link.png"
    link.symlink_to(files[1])
    host.remember("ann", [*files[:2], link, host.root, "..", 3])
    host.leave("ann")
    assert link.is_symlink()
    assert all(file.is_file() for file in files)
    host.leave("bob")


def test_sessions_whose_uploads_are_gone_are_forgotten(host):
    file = upload(host, b"old")
    host.remember("ann", [file])
    host._sweep()
    assert host._uploads == {"ann": {file.resolve()}}
    file.unlink()
    host._sweep()
    assert host._uploads == {}
