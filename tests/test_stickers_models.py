"""Training of the UNet and the few-step student, loading of every shipped model, the measures."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import steering
from steering.apps import stickers
from steering.errors import OptionError, WeightsError
from steering.loading import SHIPPED, call_defaults, source_of
from steering.stickers import TAGS, StickerWorld, measure, prompts
from steering.stickers.judge import StickerJudge
from steering.stickers.load import CALLS, FOLDERS, WEIGHTS, load_pipeline
from steering.stickers.train import autoencoder, clip, detector, flow, turbo, unet
from steering.stickers.train.clip import swap
from steering.stickers.train.data import DecodedPool
from steering.stickers.train.loop import Recipe
from tests.command import run

BASE = FOLDERS["stickers"]


@pytest.fixture(scope="module")
def judge() -> StickerJudge:
    return StickerJudge()


# Training


@pytest.mark.parametrize(
    ("module", "name", "more"),
    [
        (unet, "stickers-sd", {}),
        (turbo, "stickers-turbo", {}),
        (flow, "stickers", {"fresh": True}),
    ],
)
def test_a_training_sitting_exports_and_goes_on(module, name, more, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flow, "SCENES", 12)
    monkeypatch.setattr(flow, "HELD", 4)
    monkeypatch.setattr(module, "BATCH", 4)
    out = tmp_path / "run"
    moment = {"minutes": 1e-9, "out": out, "log_every": 1, "warmup": 1}
    threads = torch.get_num_threads()
    try:
        module.train(Recipe(**moment), **more)
        again = moment | {"minutes": 10.0 / 6e4 + _spent(out)}
        module.train(Recipe(**again, resume=True), **more)
    finally:
        torch.set_num_threads(threads)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line][:2] == [0, 1]
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)
    assert sum("heldout" in line for line in log) == 2
    pipe = load_pipeline(name, torch.float32, folder=out / "export")
    images = pipe(
        "a photo of a cat", **CALLS[name] | {"num_inference_steps": 1}, output_type="pt"
    ).images
    assert images.shape == (1, 3, 64, 64)
    assert str(tmp_path) not in (out / "export" / "model_index.json").read_text()


@pytest.mark.parametrize("module", [autoencoder, clip, detector])
def test_the_judges_and_the_autoencoder_train(module, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", 8)
    if module is not autoencoder:
        monkeypatch.setattr(module, "DECODED", 4)
        monkeypatch.setattr(module, "DecodedPool", partial(DecodedPool, n=12))
    monkeypatch.setattr(module, "evaluate", lambda *given: {"psnr_boxes": 20.0})
    threads = torch.get_num_threads()
    try:
        module.train(Recipe(minutes=1e-9, out=tmp_path / "run", log_every=1, warmup=1))
    finally:
        torch.set_num_threads(threads)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert np.isfinite(log[0]["loss"])
    assert np.isfinite(log[1]["heldout"])
    assert list((tmp_path / "run/export").glob("*.safetensors"))


def _spent(out) -> float:
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    return state["seconds"] / 60.0


def test_the_teachers_noise_is_exact_where_its_velocity_is() -> None:
    """A flow that knows image and noise gives that noise back, on unshifted latents."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 8, 16, 16, generator=generator)
    shift, time = 0.3, torch.tensor([0.1, 0.5, 0.9])
    teacher = unet.Teacher.__new__(unet.Teacher)
    teacher.shift, teacher.dtype = shift, torch.float32
    teacher.condition = lambda ids: (ids, ids)
    seen = []

    def velocity(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: object):
        seen.append((hidden_states, timestep))
        return SimpleNamespace(sample=eps - (x0 - shift))

    teacher.transformer = velocity
    x = torch.lerp(x0, eps, time.view(-1, 1, 1, 1))
    got = teacher.noise(x, time, torch.zeros(3, 14))
    torch.testing.assert_close(got, eps, rtol=0, atol=1e-5)
    asked, timestep = seen[0]
    torch.testing.assert_close(asked, torch.lerp(x0 - shift, eps, time.view(-1, 1, 1, 1)))
    torch.testing.assert_close(timestep, time * 1000)


def test_training_times_cover_the_flows_times_evenly() -> None:
    alphas = unet.make_scheduler().alphas_cumprod
    alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    straight = sigma / (alpha + sigma)
    t = unet.draw_times(4096, straight, torch.Generator().manual_seed(0))
    assert (t.diff() >= 0).all()  # stratified: one draw from each slice of the law
    middle = torch.tensor(flow.TIME_SHIFT).sigmoid()
    assert float(straight[t].median()) == pytest.approx(float(middle), abs=0.005)
    assert (t == 999).float().mean() < 0.02


def test_turbo_levels_reach_the_end_at_any_number_of_jumps() -> None:
    for n in (1, 2, 4):
        nodes = turbo.levels(n)
        assert len(nodes) == n + 1
        assert nodes[0] > 0.999
        assert nodes[-1] == 0
        even = 1 - torch.arange(n) / n
        wanted = turbo.SHIFT * even / (1 + (turbo.SHIFT - 1) * even)
        torch.testing.assert_close(nodes[:-1], wanted, rtol=0, atol=2e-3)


def test_turbo_scheduler_takes_straight_steps() -> None:
    scheduler, nodes = turbo.make_scheduler(), turbo.levels()
    scheduler.set_timesteps(turbo.JUMPS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 16, 16, generator=generator)
    for k, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=generator)
        wanted = x + (nodes[k + 1] - nodes[k]) * v
        x = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-4)


def test_the_teachers_walk_is_guided_euler() -> None:
    """On v = c (a constant per caption) the walk is one straight line of the guided constant."""
    empty, told = (torch.full((1, 1), v) for v in (1.0, 3.0))

    def network(x, t, features):
        return features[0].view(-1, 1, 1, 1).expand(x.shape)

    x, t, u = torch.zeros(2, 8, 16, 16), torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.0])
    captions = (told.expand(2, 1), told.expand(2, 1))
    got = turbo.walk(network, x, t, u, captions, (empty, empty))
    guided = 1.0 + CALLS["stickers"]["guidance_scale"] * (3.0 - 1.0)
    torch.testing.assert_close(got[:, 0, 0, 0], (u - t) * guided)


# Loading


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_is_loaded_by_name(name: str) -> None:
    pipe = steering.load(name, dtype="float32")
    assert source_of(pipe) == name
    assert call_defaults(name) == CALLS[name]
    image = pipe(
        "a photo of a red apple", **CALLS[name] | {"num_inference_steps": 2}, output_type="pt"
    ).images
    assert image.shape == (1, 3, 64, 64)
    assert image.std() > 0.02
    assert all(p.dtype == torch.float32 for p in pipe.vae.parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_can_be_steered(name: str) -> None:
    few = {"num_inference_steps": 2}
    result = steering.steer(
        steering.load(name), "a photo of a cat", reward="brightness",
        method=steering.samplers.BestOfN(n=2), **few,
    )  # fmt: skip
    assert result.recipe.model["source"] == name
    rows = 1 if name == "stickers-turbo" else 2  # guidance asks twice
    assert result.ledger.nfe == 2 * 2 * rows


@pytest.mark.parametrize("name", SHIPPED)
def test_a_copy_saved_to_a_folder_is_the_same_model(name: str, tmp_path) -> None:
    """Also where the pipeline does without parts of its class: SD3 without T5."""
    pipe = steering.load(name, dtype="float32")
    pipe.save_pretrained(tmp_path)
    copy = steering.load(tmp_path, dtype="float32")
    assert source_of(copy) == str(tmp_path)
    call = CALLS[name] | {"num_inference_steps": 2, "output_type": "pt"}
    one, two = (
        p("a photo of a cat", **call, generator=torch.Generator().manual_seed(0)).images
        for p in (pipe, copy)
    )
    assert torch.equal(one, two)


def test_an_unknown_or_missing_model_says_so(tmp_path) -> None:
    with pytest.raises(OptionError, match="stickers-turbo"):
        load_pipeline("stickers-turbb")
    for name in SHIPPED:
        with pytest.raises(WeightsError, match="missing"):
            load_pipeline(name, folder=tmp_path)


def test_weights_stay_small_and_half() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 80e6
    for name in SHIPPED:
        pipe = load_pipeline(name)
        network = getattr(pipe, "unet", None) or pipe.transformer
        assert network.dtype == torch.bfloat16


# Measures


def test_shares_are_means_of_tags() -> None:
    got = measure.by_tag(["colors", "colors", "position"], [True, False, False])
    assert got == {"colors": 0.5, "position": 0.0, "overall": 0.25}


def test_frechet_distance_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 3)) @ np.array([[1, 0, 0], [0.5, 2, 0], [0, 0.3, 0.5]])
    assert measure.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert measure.frechet(a, a + np.array([3, 4, 0])) == pytest.approx(25)
    # Cov(2a) = 4 Cov(a), so the distance is tr(C) (1 - 2)^2, plus the move of the mean.
    wanted = np.trace(np.cov(a, rowvar=False)) + (a.mean(0) ** 2).sum()
    assert measure.frechet(a, 2 * a) == pytest.approx(wanted)


def test_rendered_scenes_are_near_themselves_and_far_from_noise(judge: StickerJudge) -> None:
    texts = prompts("heldout", 48)
    one, two = (measure.features(judge, measure._render(texts, 4)[k::2]) for k in (0, 1))
    noise = torch.rand(96, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    far = measure.frechet(one, measure.features(judge, noise))
    assert measure.frechet(one, two) < 0.1 * far


def test_an_image_does_not_depend_on_its_batch() -> None:
    texts, keys = prompts("heldout", 6), [(k, d) for d in range(2) for k in range(6)]
    call = {"num_inference_steps": 1}
    model = measure.Generator("stickers-turbo", call)
    small = measure.Generator("stickers-turbo", call, pipe=model.pipe, batch_size=5)
    images, again = model.images(texts, keys), small.images(texts, keys[::-1]).flip(0)
    assert (images - again).abs().max() <= 1.01 / 255
    assert (images[0] - images[6]).abs().max() > 0.05
    assert model.images_made == 12


def test_the_oracle_stops_early_without_changing_its_answer(judge: StickerJudge) -> None:
    texts = prompts("heldout", 6)
    model = measure.Generator("stickers-turbo", {"num_inference_steps": 2})
    _, right, _ = measure.generator(model, texts, judge, 9)
    made = model.images_made
    best = measure.oracle(model, texts, judge, 9, [r[:1] for r in right])
    assert model.images_made - made <= 6 * 8
    made = model.images_made
    measure.oracle(model, texts, judge, 9, [[False, True]] * 6)
    assert model.images_made == made  # a prompt with one right image needs no more
    for tag, answer in zip(TAGS, map(any, right), strict=True):
        assert best[tag] == float(answer)
    assert best["one_image"] == pytest.approx(np.mean([r[0] for r in right]))


def test_autoencoder_and_clip_hold_their_bars() -> None:
    assert measure.autoencoder(64)["psnr_boxes"] >= 26  # 29.1; standard error 0.1
    found = clip.evaluate(WEIGHTS / "clip", 256)
    assert found["caption_among_64"] >= 0.92  # 0.97; standard error 0.01
    assert found["swapped_colors_told"] < 0.85  # the weakness that a search can exploit
    assert found["swapped_places_told"] < 0.85


def test_the_judge_is_right_on_what_is_drawn() -> None:
    figures = measure.detector(per_tag=8)
    assert figures["objects"]["right"] >= 0.98
    assert min(figures["rendered"].values()) >= 0.95  # of every tag
    assert min(figures["decoded"].values()) >= 0.95


def test_swapped_captions_name_the_other_scene() -> None:
    assert swap("a photo of a red cat and a blue dog") == "a photo of a blue cat and a red dog"
    assert swap("a photo of a cat left of a dog") == "a photo of a dog left of a cat"


def test_the_world_renders_metadata_scenes_and_prompts_alike() -> None:
    world = StickerWorld()
    record = world.parse("a photo of a cat above a dog")
    scene = world.place(record, 3)
    assert np.array_equal(world.render(record, 3), world.render(scene))
    assert np.array_equal(world.render(record["prompt"], 3), world.render(scene))


# The command


def test_eval_prints_a_table_and_json(capsys, tmp_path) -> None:
    words = ["stickers", "eval", "--model", "stickers-turbo", "--no-parts", "--json"]
    sizes = ["--n", "6", "--images-per-prompt", "1", "--oracle", "2", "--grids", str(tmp_path)]
    code, out, _ = run(capsys, *words, *sizes, "--set", "num_inference_steps=1")
    assert code == 0
    assert "best of 2, 6 prompts" in out
    data = json.loads(out.strip().splitlines()[-1])
    figures = data["stickers-turbo"]
    assert set(figures) == {*TAGS, "overall", "frechet", "oracle"}
    assert figures["oracle"]["overall"] >= figures["overall"]
    assert set(data["bars"]) == {"stickers-turbo/headroom"}
    assert (tmp_path / "stickers-samples-stickers-turbo.png").is_file()


def test_eval_refuses_sizes_that_measure_nothing(capsys) -> None:
    code, _, err = run(capsys, "stickers", "eval", "--n", "5")
    assert code == 2
    assert "6 prompts" in err


def test_bars_are_read_as_written() -> None:
    assert stickers.met(0.9, ">= 0.90")
    assert not stickers.met(0.85, "< 0.85")
    assert stickers.met(0.75, "0.40 - 0.75")
    assert stickers.met(0.5, "") is None
    data = {"stickers": {"overall": 0.6}, "stickers-sd": {"overall": 0.44}}
    assert stickers.bar_of("stickers-sd", "overall", data) == "0.450 - 0.750"
    assert stickers.verdicts(stickers.rows(data)) == {
        "stickers/overall": True, "stickers-sd/overall": False,
    }  # fmt: skip


def test_a_wrapped_shipped_model_is_steered_as_the_pipeline_itself():
    """Its call defaults, its name and so its own CLIP."""
    pipe = load_pipeline("stickers-turbo")
    call = {"reward": "clip", "method": "best_of_n", "options": {"n": 2}, "seed": 3}
    with steering.wrap(pipe, prompt="a red clock") as model:
        assert model.name == "stickers-turbo"
        wrapped = steering.steer(model, **call)
    plain = steering.steer(pipe, "a red clock", **call)
    assert torch.equal(wrapped.samples, plain.samples)
    assert wrapped.best_reward == plain.best_reward
    with steering.wrap(pipe, prompt="a red clock", name="mine", num_inference_steps=2) as model:
        assert (model.name, len(model.grid())) == ("mine", 2)
