"""Training: what makes it fast must not change it, and a resumed run goes on as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn
from transformers import CLIPTokenizer

from steering.stickers import CLASSES, StickerWorld
from steering.stickers.load import WEIGHTS
from steering.stickers.train.clip import contrastive, hard_negatives, swap
from steering.stickers.train.detector import build, targets
from steering.stickers.train.flow import LABELS, MergedZeros, label_map
from steering.stickers.train.loop import Loop, Recipe, seeded_init
from steering.stickers.train.tokenizer import make, words
from steering.stickers.world import SIZE, SPRITE


def test_one_token_stands_for_fourteen_zeros() -> None:
    with seeded_init(0):
        net = SD3Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
            pooled_projection_dim=12, out_channels=4, pos_embed_max_size=2, qk_norm="rms_norm",
        )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 5, 12, generator=g)
    pooled, t = torch.randn(2, 12, generator=g), torch.tensor([900.0, 300.0])

    def run(zeros: int) -> torch.Tensor:
        context = nn.functional.pad(text, (0, 0, 0, zeros))
        return net(
            hidden_states=x, timestep=t, encoder_hidden_states=context, pooled_projections=pooled
        ).sample

    full, single = run(14), run(1)
    net.set_attn_processor(MergedZeros(14))
    merged = run(1)
    torch.testing.assert_close(merged, full, rtol=1e-4, atol=1e-5)
    assert (single - full).abs().max() > 1e-3  # so the agreement above says something


def _run(out: Path, minutes: float, *, resume: bool, stop: int) -> Loop:
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.fill_(0.0)
    recipe = Recipe(minutes=minutes, out=out, resume=resume, lr=0.1, warmup=1)
    loop = Loop(recipe, {"layer": layer}, lambda: 0.0)
    for step in loop.steps():
        if step >= stop:
            loop.save()
            break
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loop.update((layer(x) - x.sum(-1, keepdim=True)).square().mean())
    return loop


def test_resume_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    # So many minutes that the cosine is flat, whatever the clock of this machine says.
    straight = _run(tmp_path / "a", 1e9, resume=False, stop=40)
    _run(tmp_path / "b", 1e9, resume=False, stop=15)
    resumed = _run(tmp_path / "b", 1e9, resume=True, stop=40)
    assert resumed.step == straight.step == 40
    for a, b in zip(
        straight.master + straight.average, resumed.master + resumed.average, strict=True
    ):
        torch.testing.assert_close(a, b)
    assert not list((tmp_path / "b").glob(".part*"))


def test_half_modules_are_trained_through_float_copies(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    recipe = Recipe(minutes=1e9, out=tmp_path, lr=1e-5, warmup=1)
    loop = Loop(recipe, {"layer": layer}, lambda: 0.0)
    before = [p.clone() for p in loop.master]
    for step in loop.steps():
        if step == 5:
            break
        loop.update(layer(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().mean())
    # A step of 1e-5 is lost in bf16 but not in the float32 copy.
    assert all(p.dtype == torch.float32 for p in loop.master)
    assert any((a - b).abs().max() > 0 for a, b in zip(before, loop.master, strict=True))


def test_detector_starts_with_every_query_at_its_place() -> None:
    scenes = [StickerWorld().sample(k) for k in range(4)]
    shifts = np.zeros((4, 2), int)
    labels, boxes = targets(scenes, shifts)
    with torch.no_grad():
        guess = build().eval()(torch.zeros(4, 3, SIZE, SIZE)).pred_boxes
    found = labels < len(CLASSES)
    assert int(found.sum()) == sum(len(s.objects) for s in scenes)
    torch.testing.assert_close(guess[found], boxes[found], rtol=0, atol=1e-4)


def test_seeded_init_leaves_the_global_generator_as_it_was() -> None:
    before = torch.default_generator.get_state()
    layers = []
    for _ in range(2):
        with seeded_init(3):
            layers.append(nn.Linear(4, 4).weight)
    assert torch.equal(*layers)
    assert torch.equal(torch.default_generator.get_state(), before)


def test_label_maps_cover_each_object_once() -> None:
    for seed in range(10):
        scene = StickerWorld().sample(seed)
        cover = label_map(scene).astype(float) / 255
        assert cover.shape == (16, LABELS)
        cell = (SIZE / 4) ** 2
        area = cover[:, : len(CLASSES)].sum() * cell
        assert area == pytest.approx(len(scene.objects) * SPRITE**2, rel=0.02)


def test_a_hard_negative_is_a_wrong_answer_for_images_only() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (4, 5))
    scale, ids = torch.tensor(7.0), torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8]])
    logits = 7 * image @ text.T
    # Images 0 and 2 share their caption, which stands in both columns; column 4 has no image.
    p, q = logits.log_softmax(1), logits[:, :4].log_softmax(0)
    of_image = -(p[0, [0, 2]].mean() + p[1, 1] + p[2, [0, 2]].mean() + p[3, 3]) / 4
    of_text = -(q[[0, 2], 0].mean() + q[1, 1] + q[[0, 2], 2].mean() + q[3, 3]) / 4
    torch.testing.assert_close(contrastive(image, text, scale, ids), (of_image + of_text) / 2)


def test_hard_negatives_are_few_and_swapped() -> None:
    scenes, rng = [StickerWorld().sample(k) for k in range(600)], np.random.default_rng(0)
    told = [s.prompt for s in scenes if s.metadata["tag"] in ("color_attr", "position")]
    found = hard_negatives(scenes, rng)
    assert 0.1 < len(found) / len(told) < 0.4  # HARD = 0.25; 5 standard errors of 200 draws
    assert {swap(caption) for caption in found} <= set(told)


def test_the_best_measured_weights_are_shipped_also_after_a_resume(tmp_path: Path) -> None:
    layer = nn.Linear(1, 1, bias=False)
    recipe = Recipe(minutes=1e9, out=tmp_path, lr=0.0, warmup=1)

    def loop_of(resume: bool) -> Loop:
        seen = {"layer": layer}
        again = dataclasses.replace(recipe, resume=resume)
        # The measure reads the averaged weight, and is highest at 3.
        return Loop(again, seen, lambda: -abs(layer.weight.item() - 3.0))

    loop = loop_of(resume=False)
    for average in (1.0, 2.75, 5.0):
        loop.average[0].fill_(average)
        layer.weight.data.fill_(-average)
        loop.judge()
        assert layer.weight.item() == -average  # training goes on where it was
    assert loop.best == pytest.approx(-0.25)
    loop.save()
    later = loop_of(resume=True)
    later.average[0].fill_(9.0)
    later.judge()
    later.use_best()
    assert layer.weight.item() == 2.75


def test_tokens_are_the_shipped_ones_and_every_word_is_one() -> None:
    made = make()
    shipped = CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" / "tokenizer")
    assert made.get_vocab().keys() == shipped.get_vocab().keys()
    assert made.model_max_length == shipped.model_max_length == 14
    for tokenizer in (made, shipped):
        assert all(len(tokenizer(word).input_ids) == 3 for word in words())
