"""Trains `stickers-sd`: an epsilon-prediction UNet exactly as StableDiffusionPipeline will run it.

Three quarters of the target are the noise that the shipped flow sees at the same point and
level, the rest is the noise that was drawn. The flow's part does not change from draw to draw,
which matters most where an hour on a CPU is all there is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from steering.stickers.load import FOLDERS, T5_ZEROS, load_pipeline
from steering.stickers.train.data import load_vae
from steering.stickers.train.flow import (
    DROP_TEXT,
    LABELS,
    TIME_SHIFT,
    Condition,
    MergedZeros,
    batches,
    heldout,
    load_data,
    tokenize,
)
from steering.stickers.train.loop import Loop, Recipe, half_is_fast, seeded_init

BATCH = 16  # small: time, not data, is short
CELLS = 8  # along one axis, where the UNet attends; objects snap to just these
LABEL_WEIGHT = 0.03
TEACHER = 0.75  # of the target; the rest is the noise that was drawn
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}


def build() -> UNet2DConditionModel:
    """A fresh UNet of 4.0 M parameters: light at 16x16, where an object has no whole cell yet."""
    with seeded_init(0):
        return UNet2DConditionModel(
            sample_size=16, in_channels=8, out_channels=8, block_out_channels=(64, 128),
            layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128,
            attention_head_dim=4, norm_num_groups=16,
        )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, walked from the very last one."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        steps_offset=1, timestep_spacing="trailing", prediction_type="epsilon",
    )  # fmt: skip


class LabelHead(nn.Module):
    """Reads class and tint of each cell off the middle of the UNet; see `flow.LabelHead`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.read = nn.Conv2d(unet.config.block_out_channels[-1], LABELS, 1)
        nn.init.constant_(self.read.bias, -4.0)
        self.features: Tensor | None = None
        unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features = output

    def loss(self, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over labels, mean over cells."""
        guess = self.read(self.features).float().flatten(2).transpose(1, 2)
        target = labels.float() / 255.0
        return F.binary_cross_entropy_with_logits(guess, target, reduction="none").sum(-1).mean()


class Teacher:
    """The flow, asked for the noise at a point of the diffusion path.

    (a x0 + s eps) / (a + s) lies on the flow's straight path at time s / (a + s).
    """

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        self.transformer = SD3Transformer2DModel.from_pretrained(
            base / "transformer", torch_dtype=dtype
        )
        self.transformer.set_attn_processor(MergedZeros(T5_ZEROS))
        self.condition = Condition(base).to(dtype)
        config = load_vae(base / "vae").config
        self.shift = config.shift_factor * config.scaling_factor
        self.dtype = dtype

    @torch.no_grad()
    def noise(self, x: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """E[eps | x, caption]; `x` [n, 8, 16, 16] on the straight path, unshifted latents."""
        t = time.view(-1, 1, 1, 1)
        x = x - (1.0 - t) * self.shift
        hidden, pooled = self.condition(ids)
        velocity = self.transformer(
            hidden_states=x.to(self.dtype), timestep=time * 1000.0,
            encoder_hidden_states=hidden, pooled_projections=pooled,
        ).sample  # fmt: skip
        return x + (1.0 - t) * velocity.float()


def draw_times(n: int, straight: Tensor, generator: torch.Generator) -> Tensor:
    """Stratified timesteps [n]: the flow's logit-normal times, on the diffusion's table.

    `straight` [1000] is s / (a + s) of each timestep.
    """
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    t = (torch.special.ndtri(u) + TIME_SHIFT).sigmoid()
    return torch.searchsorted(straight, t).clamp(max=len(straight) - 1)


def train(recipe: Recipe, warm_start: Path | None = None) -> None:
    """Train, then write the parts of `stickers-sd` to `recipe.out / "export"`.

    `warm_start` is a `stickers` folder: autoencoder, tokenizer, text tower and teacher (default:
    the shipped one).
    """
    base = FOLDERS["stickers"] if warm_start is None else warm_start
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    cache = recipe.out.parent / "latents.safetensors"
    data = load_data(cache, base, tokenizer, cells=CELLS)
    dtype = torch.bfloat16 if half_is_fast() else torch.float32
    unet = build().to(dtype).to(memory_format=torch.channels_last)
    text = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32).to(dtype)
    with seeded_init(1):
        head = LabelHead(unet).to(dtype)
    teacher, null = Teacher(base, dtype), tokenize(tokenizer, [""])
    scale = load_vae(base / "vae").config.scaling_factor
    alphas = make_scheduler().alphas_cumprod
    alpha, sigma = alphas.sqrt(), (1.0 - alphas).sqrt()
    straight = sigma / (alpha + sigma)

    def errors(chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n = len(chosen)
        x0 = data.latents[chosen].float() * scale
        drop = torch.rand(n, 1, generator=generator) < DROP_TEXT
        ids = torch.where(drop, null, data.ids[chosen])
        t = draw_times(n, straight, generator)
        eps = torch.randn(x0.shape, generator=generator)
        time = straight[t].view(-1, 1, 1, 1)
        xt = torch.lerp(x0, eps, time)  # on the flow's path; the UNet sees it rescaled
        target = torch.lerp(eps, teacher.noise(xt, straight[t], ids), TEACHER)
        x = (xt * (alpha + sigma)[t].view(-1, 1, 1, 1)).contiguous(
            memory_format=torch.channels_last
        )
        guess = unet(x.to(dtype), t, text(ids).last_hidden_state).sample.float()
        # Noise is easy to see where it is strong: the weight keeps the clean image in view.
        noise = ((guess - target).square() / (1.0 - time)).mean()
        labels = head.loss(data.labels[chosen])
        return {"loss": noise + LABEL_WEIGHT * labels, "noise": noise, "labels": labels}

    modules = {"unet": unet, "text_encoder": text, "head": head}
    loop = Loop(recipe, modules, heldout(errors, "noise", len(data.latents)))
    for chosen, generator in batches(loop, len(data.latents), BATCH):
        loop.update(**errors(chosen, generator))
    loop.use_best()
    export(unet, text, recipe.out / "export", base)


def export(unet: UNet2DConditionModel, text: CLIPTextModel, folder: Path, base: Path) -> None:
    """Write the trained parts in bfloat16; tokenizer and autoencoder stay in `base`."""
    if folder.exists():
        shutil.rmtree(folder)
    parts = (("unet", unet), ("text_encoder", text))
    for name, module in parts:
        module.to(torch.bfloat16).to(memory_format=torch.contiguous_format)
        module.save_pretrained(folder / name)
    make_scheduler().save_pretrained(folder / "scheduler")
    finish(folder, INDEX, [name for name, _ in parts])
    load_pipeline("stickers-sd", folder=folder, base=base)


def finish(folder: Path, index: dict[str, object], parts: list[str]) -> None:
    """Write model_index.json; take this machine's paths out of the configs."""
    for name in parts:
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
