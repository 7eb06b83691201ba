"""A whole SDXL, small and random: UNet, both text encoders and VAE, as diffusers' pipeline and as a single file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sid_train.models.stable_diffusion.keys import (
    is_vae_attention,
    rename,
    to_open_clip,
    unet_modules,
    vae_modules,
)
from sid_train.models.stable_diffusion.text import clip_tokenizers

UNET_CONFIG = {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 64 + 6 * 256,
}


def text_config(activation: str, eos: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=1,
        projection_dim=64,
        hidden_act=activation,
        eos_token_id=eos,
    )


def small_vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scaling_factor,
    )


def small_pipeline(seed: int = 0, prediction_type: str = "epsilon", **unet: object) -> StableDiffusionXLPipeline:
    """``unet``: what is other than in ``UNET_CONFIG``."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizers()
    return StableDiffusionXLPipeline(
        vae=small_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(text_config("quick_gelu", 49407)),
        text_encoder_2=CLIPTextModelWithProjection(text_config("gelu", 49407)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(**UNET_CONFIG | unet),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
        ),
    )


def unet_and_vae_tensors(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """With the names of single files, whatever the generation."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    tensors = {
        f"model.diffusion_model.{n}": unet[k] for k, n in rename(unet, unet_modules(pipeline.unet.config)).items()
    }
    for k, name in rename(vae, vae_modules(vae)).items():
        tensors[f"first_stage_model.{name}"] = vae[k][..., None, None] if is_vae_attention(name) else vae[k]
    return tensors


def save_single_file(path: Path, pipeline: StableDiffusionXLPipeline, dtype: torch.dtype = torch.float32) -> Path:
    """The pipeline as SDXL's single files are: ldm names."""
    tensors = unet_and_vae_tensors(pipeline)
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    second = to_open_clip(pipeline.text_encoder_2.state_dict())
    tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path
