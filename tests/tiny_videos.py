"""Tiny video pipelines."""

from __future__ import annotations

from typing import Any

import diffusers as D
import torch
import transformers as H
from PIL import Image

from tests.tiny_parts import (
    Setup,
    alive,
    clip_text,
    clip_tokenizer,
    language_model,
    picture,
    t5,
    word_tokenizer,
)


def wan(scheduler: Any = None, experts: bool = False) -> Setup:
    def transformer(seed: int) -> Any:
        return alive(
            lambda: D.WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=256,
                ffn_dim=32,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
            seed,
        )

    vae = alive(
        lambda: D.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    )
    pipe = D.WanPipeline(
        transformer=transformer(0),
        transformer_2=transformer(1) if experts else None,
        boundary_ratio=0.8 if experts else None,
        vae=vae,
        scheduler=scheduler or D.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    return pipe, {"guidance_scale": 6.0, **_clip(5), "max_sequence_length": 16}


def _clip(frames: int, size: int = 16) -> dict[str, int]:
    return {"height": size, "width": size, "num_frames": frames}


def wan_unipc() -> Setup:
    return wan(
        D.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    )


def ltx() -> Setup:
    transformer = alive(
        lambda: D.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    pipe = D.LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    return pipe, {"guidance_scale": 3.0, **_clip(9, 32), "max_sequence_length": 16}


_ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}


def cogvideox(scheduler: Any = None) -> Setup:
    transformer = alive(
        lambda: D.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
    )
    scheduler = scheduler or D.CogVideoXDDIMScheduler(**_ZERO_SNR, clip_sample=False)
    pipe = D.CogVideoXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    return pipe, {"guidance_scale": 6.0, **_clip(8), "max_sequence_length": 16}


def cogvideox_dpm() -> Setup:
    return cogvideox(D.CogVideoXDPMScheduler(**_ZERO_SNR))


def hunyuan_video() -> Setup:
    transformer = alive(
        lambda: D.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLHunyuanVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            act_fn="silu",
            norm_num_groups=4,
            scaling_factor=0.48,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
            mid_block_add_attention=True,
        )
    )
    pipe = D.HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=language_model(H.LlamaModel, H.LlamaConfig, 16),
        tokenizer=word_tokenizer(),
        text_encoder_2=clip_text(hidden=8),
        tokenizer_2=clip_tokenizer(),
    )
    template = {"template": "{}", "crop_start": 0}
    kwargs = {"guidance_scale": 4.5, "max_sequence_length": 16, "prompt_template": template}
    return pipe, {**kwargs, **_clip(9)}


def stable_video() -> Setup:
    """Image to video, without any text: the image is noised before it becomes a condition."""
    unet = alive(
        lambda: D.UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=32,
            num_attention_heads=2,
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLTemporalDecoder(
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            down_block_types=["DownEncoderBlock2D"] * 2,
            latent_channels=4,
        )
    )
    vision = H.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=224,
        patch_size=56,
    )
    scheduler = D.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = D.StableVideoDiffusionPipeline(
        unet=unet,
        vae=vae,
        image_encoder=alive(lambda: H.CLIPVisionModelWithProjection(vision)),
        feature_extractor=H.CLIPImageProcessor(crop_size=224, size=224),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    pixels = (255 * picture(32)[0].permute(1, 2, 0)).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return pipe, {"image": image, **_clip(2, 16), "num_inference_steps": 3, "decode_chunk_size": 2}
