"""Trains `stickers-turbo`: the flow in one to four jumps, without guidance.

Guided progressive distillation (Salimans and Ho, 2022; Meng et al., 2023) in a single stage: from
a noised scene the guided flow walks to the next of four levels, and the student learns to jump
there. From pure noise it learns the far end of the whole walk instead. That is the same way to
within a tenth, and so the same weights make an image in one jump.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTokenizer

from steering.stickers.load import CALL, FOLDERS, T5_ZEROS, load_pipeline
from steering.stickers.train.data import load_vae
from steering.stickers.train.flow import (
    STOCK_SHARE,
    STOCK_ZEROS,
    Condition,
    MergedZeros,
    batches,
    heldout,
    load_data,
    tokenize,
)
from steering.stickers.train.loop import Loop, Recipe, half_is_fast
from steering.stickers.train.unet import finish

BATCH = 24  # a multiple of the jumps
JUMPS = 4
SHIFT = 3.0  # of the levels towards noise, where the scene is decided
SUBSTEPS = 2  # of the teacher in one jump
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}


def make_scheduler() -> DPMSolverMultistepScheduler:
    """First order on a straight path is Euler's rule; its four levels are spread to the end.

    FlowMatchEulerDiscreteScheduler would spend the last of four steps between 0.001 and 0.
    """
    return DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )


def levels(n: int = JUMPS) -> Tensor:
    """The noise levels of `n` jumps, with the 0 at the end: [n + 1]."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(n)
    return scheduler.sigmas.float()


class Network:
    """A velocity network and its captions' features, rows merged into one call."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        self.transformer = SD3Transformer2DModel.from_pretrained(
            base / "transformer", torch_dtype=dtype
        )
        self.zeros = MergedZeros(T5_ZEROS)
        self.transformer.set_attn_processor(self.zeros)
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity [n, 8, 16, 16] in float32 at x and times t [n]."""
        hidden, pooled = features
        return self.transformer(
            hidden_states=x.to(self.dtype), timestep=t * 1000.0,
            encoder_hidden_states=hidden, pooled_projections=pooled,
        ).sample.float()  # fmt: skip


Features = tuple[Tensor, Tensor]


@torch.no_grad()
def walk(
    teacher: Network, x: Tensor, t: Tensor, u: Tensor, captions: Features, empty: Features
) -> Tensor:
    """The guided flow's Euler walk from times t [n] to u [n] in `SUBSTEPS` steps."""
    n, guidance = len(x), CALL["guidance_scale"]
    both = tuple(
        torch.cat([e.expand(n, *e.shape[1:]), c]) for c, e in zip(captions, empty, strict=True)
    )
    step = (u - t) / SUBSTEPS
    for k in range(SUBSTEPS):
        now = t + k * step
        plain, told = teacher(x.repeat(2, 1, 1, 1), now.repeat(2), both).chunk(2)
        x = x + step.view(-1, 1, 1, 1) * (plain + guidance * (told - plain))
    return x


@torch.no_grad()
def finish_walk(student: Network, x: Tensor, nodes: Tensor, captions: Features) -> Tensor:
    """The student's own jumps from nodes[1] to the end: no guidance, so an eighth of the cost."""
    for t, u in itertools.pairwise(nodes[1:]):
        x = x + (u - t) * student(x, t.expand(len(x)), captions)
    return x


def train(recipe: Recipe, warm_start: Path | None = None) -> None:
    """Train, then write the parts of `stickers-turbo` to `recipe.out / "export"`.

    `warm_start` is the `stickers` folder that is teacher and first weights (default: the shipped
    one). Text towers stay as they are.
    """
    base = FOLDERS["stickers"] if warm_start is None else warm_start
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    data = load_data(recipe.out.parent / "latents.safetensors", base, tokenizer)
    dtype = torch.bfloat16 if half_is_fast() else torch.float32
    teacher, student = Network(base, dtype), Network(base, dtype)
    condition = Condition(base).to(dtype).requires_grad_(False)
    empty = condition(tokenize(tokenizer, [""]))
    vae, nodes = load_vae(base / "vae").config, levels()

    def errors(chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        which = torch.arange(len(chosen)) % JUMPS
        first = which == 0
        t, u = nodes[which], nodes[which + 1]
        x0 = (data.latents[chosen].float() - vae.shift_factor) * vae.scaling_factor
        eps = torch.randn(x0.shape, generator=generator)
        x = torch.where(first.view(-1, 1, 1, 1), eps, torch.lerp(x0, eps, t.view(-1, 1, 1, 1)))
        captions = condition(data.ids[chosen])
        there = walk(teacher, x, t, u, captions, empty)
        student.zeros.copies = T5_ZEROS
        there[first] = finish_walk(student, there[first], nodes, tuple(c[first] for c in captions))
        length = torch.where(first, t, t - u).view(-1, 1, 1, 1)
        stock = torch.rand((), generator=generator) < STOCK_SHARE
        student.zeros.copies = STOCK_ZEROS if stock else T5_ZEROS
        each = (student(x, t, captions) - (x - there) / length).square().mean((1, 2, 3))
        jumps = {f"jump{k + 1}": each[which == k].mean() for k in range(JUMPS)}
        return {"loss": each.mean(), **jumps}

    measure = heldout(errors, "loss", len(data.latents))
    loop = Loop(recipe, {"transformer": student.transformer}, measure)
    for chosen, generator in batches(loop, len(data.latents), BATCH):
        loop.update(**errors(chosen, generator))
    loop.use_best()
    export(student.transformer, recipe.out / "export", base)


def export(transformer: SD3Transformer2DModel, folder: Path, base: Path) -> None:
    """Write the transformer in bfloat16 and the scheduler; all else stays in `base`."""
    if folder.exists():
        shutil.rmtree(folder)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    make_scheduler().save_pretrained(folder / "scheduler")
    finish(folder, INDEX, ["transformer"])
    load_pipeline("stickers-turbo", folder=folder, base=base)
