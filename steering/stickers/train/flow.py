"""Trains the sticker flow exactly as StableDiffusion3Pipeline will run it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from steering.stickers.grammar import CLASSES, COLORS
from steering.stickers.load import T5_ZEROS, WEIGHTS, load_pipeline
from steering.stickers.train.data import encode, load_vae
from steering.stickers.train.loop import Loop, Recipe, half_is_fast, seeded_init, write_atomic
from steering.stickers.world import SIZE, SPRITE, Scene, StickerWorld

BATCH = 64
SCENES = 16_000
HELD = 128  # of them, the last, never trained on: they choose the weights that are shipped
HELD_SEED = 5_900_000
LATENT_SEED = 5_000_000
TIME_SHIFT = 0.4
DROP_TEXT = 0.1  # share of captions replaced by the empty one, for guidance
CELLS = 4  # image tokens along one axis
LABELS = len(CLASSES) + len(COLORS)
LABEL_BLOCK = 2  # its image tokens feed the label head
LABEL_WEIGHT = 0.05
STOCK_ZEROS = 256  # T5 tokens of a pipeline opened without load_pipeline
STOCK_SHARE = 0.25  # of the steps that train with so many


@dataclass(frozen=True)
class Latents:
    """The cached training set: raw latents float16 [n, 8, 16, 16], token ids, label maps."""

    latents: Tensor
    ids: Tensor
    labels: Tensor


def load_data(
    cache: Path, pipeline: Path, tokenizer: CLIPTokenizer, *, cells: int = CELLS
) -> Latents:
    """Render and encode the scenes once; captions and labels are redrawn from the seeds."""
    world = StickerWorld()
    scenes = [world.sample(np.random.default_rng([LATENT_SEED, k])) for k in range(SCENES)]
    if not cache.exists():
        vae = load_vae(pipeline / "vae")
        step = 1000
        parts = [
            encode(vae, np.stack([world.render(s) for s in scenes[k : k + step]]))
            for k in range(0, SCENES, step)
        ]
        write_atomic(cache, lambda path: save_file({"latents": torch.cat(parts)}, path))
    latents = load_file(cache)["latents"]
    labels = torch.from_numpy(np.stack([label_map(s, cells) for s in scenes]))
    return Latents(latents, tokenize(tokenizer, [s.prompt for s in scenes]), labels)


def tokenize(tokenizer: CLIPTokenizer, text: list[str]) -> Tensor:
    return tokenizer(text, padding="max_length", return_tensors="pt").input_ids


def label_map(scene: Scene, cells: int = CELLS) -> np.ndarray:
    """How much of each cell each class and tint covers, uint8 [cells^2, 62] of 255."""
    cell = SIZE // cells
    starts = np.arange(cells) * cell
    out = np.zeros((cells, cells, LABELS), np.float32)
    for o in scene.objects:
        x, y = (
            np.clip(np.minimum(starts + cell, p + SPRITE) - np.maximum(starts, p), 0, None) / cell
            for p in (o.x, o.y)
        )
        share = y[:, None] * x[None]
        out[..., CLASSES.index(o.name)] += share
        if o.color is not None:
            out[..., len(CLASSES) + COLORS.index(o.color)] += share
    return (out.reshape(-1, LABELS) * 255).astype(np.uint8)


class Condition(nn.Module):
    """The two text towers, joined as StableDiffusion3Pipeline joins them without T5."""

    def __init__(self, pipeline: Path) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            CLIPTextModelWithProjection.from_pretrained(pipeline / name, dtype=torch.float32)
            for name in ("text_encoder", "text_encoder_2")
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token features [n, 15, 256] (the last stands for the T5 zeros), pooled [n, 256]."""
        outs = [tower(ids, output_hidden_states=True) for tower in self.towers]
        hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
        pooled = torch.cat([o.text_embeds for o in outs], -1)
        return F.pad(hidden, (0, 0, 0, 1)), pooled


class MergedZeros:
    """Joint attention in which the last context token stands for `copies` equal ones.

    The T5 zeros carry no position, so they stay equal through every block; a bias of
    log(copies) on one key is exactly their sum. Saves a third of the training step.
    """

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
            q, k, v = (
                layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers[:3]
            )
            return layers[3](q), layers[4](k), v

        image = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        context = heads(
            encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
            attn.norm_added_q, attn.norm_added_k,
        )  # fmt: skip
        q, k, v = (torch.cat(pair, 2) for pair in zip(image, context, strict=True))
        bias = q.new_zeros(1, 1, q.shape[2], k.shape[2])
        bias[..., -1] = math.log(self.copies)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        split = hidden_states.shape[1]
        first, second = out[:, :split], out[:, split:]
        if not attn.context_pre_only:
            second = attn.to_add_out(second)
        return attn.to_out[0](first), second


class LabelHead(nn.Module):
    """Reads off a middle block what stands where; dropped after training.

    The exact label map replaces the pretrained features of REPA (Yu et al., 2024): it teaches
    the early blocks to bind words to places long before the velocity error does.
    """

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.read = nn.Linear(transformer.inner_dim, LABELS)
        nn.init.constant_(self.read.bias, -4.0)
        self.tokens: Tensor | None = None
        transformer.transformer_blocks[LABEL_BLOCK].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self.tokens = output[1]

    def loss(self, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over labels, mean over image tokens."""
        guess = self.read(self.tokens).float()
        target = labels.float() / 255.0
        return F.binary_cross_entropy_with_logits(guess, target, reduction="none").sum(-1).mean()


Errors = Callable[[Tensor, torch.Generator], dict[str, Tensor]]


def batches(loop: Loop, n: int, size: int) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Rows of the cache for each step, without the held-out ones, and the step's generator."""
    for step in loop.steps():
        generator = torch.Generator().manual_seed(loop.recipe.seed * 1_000_003 + step)
        yield torch.randint(n - HELD, (size,), generator=generator), generator


def heldout(errors: Errors, name: str, n: int) -> Callable[[], float]:
    """Minus an error on the held-out rows, with the same noise and times every time."""
    rows = torch.arange(n - HELD, n)
    return lambda: -float(errors(rows, torch.Generator().manual_seed(HELD_SEED))[name])


def start_again(module: nn.Module) -> None:
    """Fresh weights of the same shape, from a fixed seed."""
    with seeded_init(2):
        fresh = type(module).from_config(module.config)
    module.load_state_dict(fresh.state_dict())


def train(recipe: Recipe, warm_start: Path | None = None, *, fresh: bool = False) -> None:
    """Train, then write a diffusers folder to `recipe.out / "export"`.

    `warm_start` is a pipeline folder; the autoencoder, tokenizer, text towers and transformer
    come from it (default: the shipped one). `fresh` begins with a random transformer.
    """
    base = WEIGHTS / "pipeline" if warm_start is None else warm_start
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    data = load_data(recipe.out.parent / "latents.safetensors", base, tokenizer)
    dtype = torch.bfloat16 if half_is_fast() else torch.float32
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer", torch_dtype=dtype)
    if fresh:
        start_again(transformer)
    zeros = MergedZeros(T5_ZEROS)
    transformer.set_attn_processor(zeros)
    condition = Condition(base).to(dtype)
    with seeded_init(0):
        head = LabelHead(transformer).to(dtype)
    null = tokenize(tokenizer, [""])
    vae = load_vae(base / "vae").config

    def errors(chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n = len(chosen)
        x0 = (data.latents[chosen].float() - vae.shift_factor) * vae.scaling_factor
        drop = torch.rand(n, 1, generator=generator) < DROP_TEXT
        ids = torch.where(drop, null, data.ids[chosen])
        # Logit-normal times (Esser et al., 2024), a little towards noise, where layout is decided.
        t = (torch.randn(n, generator=generator) + TIME_SHIFT).sigmoid()
        eps = torch.randn(x0.shape, generator=generator)
        xt = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))
        stock = torch.rand((), generator=generator) < STOCK_SHARE
        zeros.copies = STOCK_ZEROS if stock else T5_ZEROS
        hidden, pooled = condition(ids)
        velocity = transformer(
            hidden_states=xt.to(dtype), timestep=t * 1000.0,
            encoder_hidden_states=hidden, pooled_projections=pooled,
        ).sample  # fmt: skip
        flow = F.mse_loss(velocity.float(), eps - x0)
        labels = head.loss(data.labels[chosen])
        return {"loss": flow + LABEL_WEIGHT * labels, "flow": flow, "labels": labels}

    modules = {"transformer": transformer, "condition": condition, "head": head}
    loop = Loop(recipe, modules, heldout(errors, "flow", len(data.latents)))
    for chosen, generator in batches(loop, len(data.latents), BATCH):
        loop.update(**errors(chosen, generator))
    loop.use_best()
    export(base, transformer, condition, recipe.out / "export")


def export(
    base: Path, transformer: SD3Transformer2DModel, condition: Condition, folder: Path
) -> None:
    """A copy of the folder `base` with the trained parts in it, in bfloat16."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(base, folder, copy_function=shutil.copyfile)
    towers = zip(("text_encoder", "text_encoder_2"), condition.towers, strict=True)
    for name, module in (("transformer", transformer), *towers):
        module.to(torch.bfloat16).save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # the path of this machine
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_pipeline(folder=folder)
