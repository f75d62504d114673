"""Tiny pipelines of diffusers with random weights, built offline from configs.

``build(name)`` gives (pipeline, call arguments) for each of the 22 set-ups in ``NAMES``. Weights
that start at zero or at a constant are drawn anew, so that no comparison passes on zeros.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers as D
import torch
import transformers as H
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FOX = "a painting of a red fox in the snow"
BOAT = "two blue boats near an old harbour"
AVOID = "blurry dark drawing"
_WORDS = f"{FOX} {BOAT} {AVOID}".split()
_CHAT = (
    "{% for m in messages %}{{ m['content'] if m['content'] is string "
    "else m['content'][0]['text'] }} {% endfor %}"
)
Setup = tuple[Any, dict[str, Any]]


# --- tokenizers and text encoders -----------------------------------------------------------


def clip_tokenizer() -> H.CLIPTokenizer:
    """Bytes only: every letter is a token."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + k) for k in range(256 - len(shown))]
    words = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocab = {word: k for k, word in enumerate(dict.fromkeys(words))}
    return H.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def word_tokenizer(chat: bool = False) -> H.PreTrainedTokenizerFast:
    """One token a known word, </s> at the end (T5, Gemma, Llama, Qwen)."""
    vocab = {w: k for k, w in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *_WORDS]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    out = H.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )
    if chat:
        out.chat_template = _CHAT
    return out


def alive(make: Callable[[], torch.nn.Module], seed: int = 0) -> Any:
    """A module with no parameter left at zero, at a constant or unset."""
    torch.manual_seed(seed)
    module = make().eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("pad_token"):  # left uninitialised by diffusers
                p.zero_()
            if p.numel() == 1 or float(p.std()) < 1e-8:
                p.add_(0.1 * torch.randn_like(p))
    return module


def clip_text(projection: bool = False, hidden: int = 32) -> Any:
    config = H.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=hidden,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    kind = H.CLIPTextModelWithProjection if projection else H.CLIPTextModel
    return alive(lambda: kind(config))


def t5() -> Any:
    config = H.T5Config(vocab_size=200, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return alive(lambda: H.T5EncoderModel(config))


def language_model(kind: Any, config: Any, hidden: int, **more: Any) -> Any:
    made = config(
        vocab_size=200,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        **more,
    )
    return alive(lambda: kind(made))


# --- autoencoders ---------------------------------------------------------------------------

_TWO_LEVELS = {
    "block_out_channels": (4, 8),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}
_FLOW_VAE = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.06,
    "scaling_factor": 1.5,
}


def kl(latent_channels: int = 4, **more: Any) -> Any:
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4,),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 1,
        "sample_size": 32,
        **more,
    }
    return alive(lambda: D.AutoencoderKL(**config))


# --- images ---------------------------------------------------------------------------------


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
        vae=kl(**_TWO_LEVELS),
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
        vae=kl(**_TWO_LEVELS),
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
    return pipe, {**kwargs, "image": _picture(16), "control_guidance_end": 0.6}


def sd_img2img() -> Setup:
    base, _ = sd()
    pipe = D.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    return pipe, {"guidance_scale": 6.0, "image": _picture(16), "strength": 0.7}


def _picture(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))


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
        vae=kl(**_FLOW_VAE),
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
        vae=kl(1, **_FLOW_VAE),
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
        vae=kl(**_TWO_LEVELS),
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
        vae=kl(**_FLOW_VAE),
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
        vae=kl(**_TWO_LEVELS),
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
    vae = kl(16, **{**_TWO_LEVELS, "scaling_factor": 0.36, "shift_factor": 0.12})
    pipe = D.ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=language_model(H.Qwen3Model, H.Qwen3Config, 16, head_dim=8),
        tokenizer=word_tokenizer(chat=True),
    )
    return pipe, {"guidance_scale": 4.0, "height": 32, "width": 32, "max_sequence_length": 16}


# --- video ----------------------------------------------------------------------------------


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


# --- all of them ----------------------------------------------------------------------------

_BUILDERS: dict[str, Callable[[], Setup]] = {
    "sd": sd,
    "sd_v": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sd_controlnet": sd_controlnet,
    "sd_img2img": sd_img2img,
    "sd3": sd3,
    "sd3_skip_layers": sd3_skip_layers,
    "flux": flux,
    "flux_true_cfg": flux_true_cfg,
    "flux2_klein": flux2_klein,
    "sana": sana,
    "pixart_sigma": pixart_sigma,
    "lumina2": lumina2,
    "aura_flow": aura_flow,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "wan": wan,
    "wan_unipc": wan_unipc,
    "wan_experts": lambda: wan(experts=True),
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox_dpm": cogvideox_dpm,
    "hunyuan_video": hunyuan_video,
}
NAMES = tuple(_BUILDERS)
_WITHOUT_NEGATIVE = ("flux", "flux2_klein", "hunyuan_video")


def build(name: str, *, steps: int = 4, prompt: str | list[str] = FOX) -> Setup:
    """A fresh pipeline and what to pass to it.

    Args:
        name: one of ``NAMES``.
        steps: num_inference_steps.
        prompt: as for the pipeline itself.
    """
    pipe, kwargs = _BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"prompt": prompt, **kwargs, "num_inference_steps": steps}
    if name not in _WITHOUT_NEGATIVE:
        kwargs["negative_prompt"] = AVOID
    return pipe, kwargs


@functools.cache
def shared(name: str) -> Setup:
    """``build(name)``, once: for tests that do not change the pipeline."""
    return build(name)


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
    pixels = (255 * _picture(32)[0].permute(1, 2, 0)).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return pipe, {"image": image, **_clip(2, 16), "num_inference_steps": 3, "decode_chunk_size": 2}
