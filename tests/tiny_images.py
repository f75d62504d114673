"""Tiny text-to-image pipelines."""

from __future__ import annotations

from typing import Any

import diffusers as D
import torch
import transformers as H

from tests.tiny_parts import (
    FLOW_VAE,
    TWO_LEVELS,
    Setup,
    alive,
    clip_text,
    clip_tokenizer,
    kl,
    language_model,
    picture,
    t5,
    word_tokenizer,
)


def sd(prediction: str = "epsilon", scheduler: Any = None) -> Setup:
    unet = alive(
        lambda: D.UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=2,
        )
    )
    scheduler = scheduler or D.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction,
    )
    pipe = D.StableDiffusionPipeline(
        unet=unet,
        vae=kl(**TWO_LEVELS),
        scheduler=scheduler,
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    return pipe, {"guidance_scale": 6.0, "height": 16, "width": 16}


def sdxl() -> Setup:
    unet = alive(
        lambda: D.UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(2, 4),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=1,
        )
    )
    scheduler = D.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = D.StableDiffusionXLPipeline(
        unet=unet,
        vae=kl(**TWO_LEVELS),
        scheduler=scheduler,
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(True),
        tokenizer_2=clip_tokenizer(),
    )
    return pipe, {"guidance_scale": 5.0, "height": 16, "width": 16}


def sd_controlnet() -> Setup:
    base, kwargs = sd()
    control = alive(
        lambda: D.ControlNetModel(
            in_channels=4,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32,
            conditioning_embedding_out_channels=(2, 4),
            norm_num_groups=2,
        ),
        seed=2,
    )
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = D.StableDiffusionControlNetPipeline(
        **parts, controlnet=control, requires_safety_checker=False
    )
    return pipe, {**kwargs, "image": picture(16), "control_guidance_end": 0.6}


def sd_img2img() -> Setup:
    base, _ = sd()
    pipe = D.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    return pipe, {"guidance_scale": 6.0, "image": picture(16), "strength": 0.7}


def sd3() -> Setup:
    transformer = alive(
        lambda: D.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        )
    )
    pipe = D.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=kl(**FLOW_VAE),
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=word_tokenizer(),
    )
    kwargs = {"guidance_scale": 5.0, "height": 8, "width": 8, "max_sequence_length": 16}
    return pipe, kwargs


def sd3_skip_layers() -> Setup:
    pipe, kwargs = sd3()
    window = {"skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6}
    return pipe, {**kwargs, "skip_guidance_layers": [0], **window}


def flux(guidance_embeds: bool = False) -> Setup:
    transformer = alive(
        lambda: D.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=guidance_embeds,
        )
    )
    pipe = D.FluxPipeline(
        transformer=transformer,
        vae=kl(1, **FLOW_VAE),
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
    )
    kwargs = {"guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 16}
    return pipe, kwargs


def flux_true_cfg() -> Setup:
    pipe, kwargs = flux(guidance_embeds=True)
    return pipe, {**kwargs, "true_cfg_scale": 4.0}


def flux2_klein() -> Setup:
    transformer = alive(
        lambda: D.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=256,
            axes_dims_rope=[4] * 4,
            guidance_embeds=False,
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLFlux2(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    pipe = D.Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=language_model(H.Qwen3ForCausalLM, H.Qwen3Config, 16, head_dim=8),
        tokenizer=word_tokenizer(chat=True),
    )
    kwargs = {"guidance_scale": 4.0, "height": 16, "width": 16, "max_sequence_length": 16}
    return pipe, {**kwargs, "text_encoder_out_layers": (1,)}


def sana() -> Setup:
    transformer = alive(
        lambda: D.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        )
    )
    vae = alive(
        lambda: D.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41,
        )
    )
    scheduler = D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = D.SanaPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        text_encoder=language_model(H.Gemma2Model, H.Gemma2Config, 8, head_dim=4),
        tokenizer=word_tokenizer(),
    )
    return pipe, {
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    }


def pixart_sigma() -> Setup:
    transformer = alive(
        lambda: D.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
    )
    pipe = D.PixArtSigmaPipeline(
        transformer=transformer,
        vae=kl(**TWO_LEVELS),
        scheduler=D.DPMSolverMultistepScheduler(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    kwargs = {"guidance_scale": 4.5, "height": 16, "width": 16, "max_sequence_length": 16}
    return pipe, {**kwargs, "use_resolution_binning": False}


def lumina2() -> Setup:
    transformer = alive(
        lambda: D.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=8,
            num_layers=2,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=16,
            norm_eps=1e-5,
            scaling_factor=1.0,
            axes_dim_rope=[4, 2, 2],
            cap_feat_dim=8,
        )
    )
    pipe = D.Lumina2Pipeline(
        transformer=transformer,
        vae=kl(**FLOW_VAE),
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=6.0),
        text_encoder=language_model(H.Gemma2Model, H.Gemma2Config, 8, head_dim=4),
        tokenizer=word_tokenizer(),
    )
    kwargs = {"guidance_scale": 4.0, "height": 32, "width": 32, "max_sequence_length": 64}
    return pipe, {**kwargs, "cfg_trunc_ratio": 0.5}


def aura_flow() -> Setup:
    transformer = alive(
        lambda: D.AuraFlowTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pos_embed_max_size=256,
        )
    )
    with torch.no_grad():  # one block hears little of its text
        transformer.context_embedder.weight.mul_(30.0)
    pipe = D.AuraFlowPipeline(
        transformer=transformer,
        vae=kl(**TWO_LEVELS),
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=1.73),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    return pipe, {"guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 16}


def qwen_image() -> Setup:
    transformer = alive(
        lambda: D.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        )
    )
    vae = alive(
        lambda: D.AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )
    text = {
        "vocab_size": 200,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = H.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": 16})
    pipe = D.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=alive(lambda: H.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=word_tokenizer(chat=True),
    )
    # The template is cut off by its token count: with another tokenizer it has another length.
    template = pipe.prompt_template_encode.split("{}")[0]
    ids = pipe.tokenizer(template, add_special_tokens=False).input_ids
    pipe.prompt_template_encode_start_idx = len(ids)
    return pipe, {"true_cfg_scale": 4.0, "height": 32, "width": 32, "max_sequence_length": 16}


def z_image() -> Setup:
    transformer = alive(
        lambda: D.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=16,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
    )
    vae = kl(16, **{**TWO_LEVELS, "scaling_factor": 0.36, "shift_factor": 0.12})
    pipe = D.ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=language_model(H.Qwen3Model, H.Qwen3Config, 16, head_dim=8),
        tokenizer=word_tokenizer(chat=True),
    )
    return pipe, {"guidance_scale": 4.0, "height": 32, "width": 32, "max_sequence_length": 16}
