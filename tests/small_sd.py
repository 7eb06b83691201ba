"""A whole SD 1.x or 2.x, small and random: UNet, text encoder and VAE, as diffusers' pipeline and as a single file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from small_sdxl import small_vae, text_config, unet_and_vae_tensors
from transformers import CLIPTextModel

from sid_train.models.stable_diffusion.keys import rename, to_open_clip, unet_modules
from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND, Kind
from sid_train.models.stable_diffusion.text import clip_tokenizers

BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
}
UNETS = {
    SD1_KIND: BLOCKS | {"attention_head_dim": 8},
    SD2_KIND: BLOCKS | {"attention_head_dim": (1, 2, 2), "use_linear_projection": True},
}


def small_pipeline(kind: Kind, seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    of_openai, of_open_clip = clip_tokenizers()
    is_sd1 = kind is SD1_KIND
    return StableDiffusionPipeline(
        vae=small_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text_config("quick_gelu" if is_sd1 else "gelu", 49407)),
        tokenizer=of_openai if is_sd1 else of_open_clip,
        unet=UNet2DConditionModel(**UNETS[kind]),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_single_file(
    path: Path, kind: Kind, pipeline: StableDiffusionPipeline, dtype: torch.dtype = torch.float32
) -> Path:
    """The pipeline as the generation's single files are: ldm names, and of SD 2.x a last layer that is not read."""
    text = pipeline.text_encoder.state_dict()
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    if kind is SD2_KIND:
        text = to_open_clip(text)
        # Real files have 24 layers, of which 23 are read. Those that are beyond are of any kind.
        text["transformer.resblocks.23.ln_1.weight"] = torch.ones(64)
        text["text_projection"] = torch.zeros(64, 64)
        text["logit_scale"] = torch.zeros(())
    tensors = unet_and_vae_tensors(pipeline)
    tensors |= {kind.encoders[0].prefixes[0] + name: tensor for name, tensor in text.items()}
    tensors["model_ema.decay"] = torch.ones(())  # as in the first of them, and of no use
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def sd2_with_spread(path: Path, spread: float) -> Path:
    """SD 2.x's UNet in four levels, as thin as its heads let it be, whose one norm tells that it predicts v where its
    biases are spread.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64,) * 4, attention_head_dim=(1,) * 4, cross_attention_dim=64, use_linear_projection=True
    )
    norm = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1
    torch.nn.init.constant_(norm.bias[::2], spread)
    torch.nn.init.constant_(norm.bias[1::2], -spread)
    state = unet.state_dict()
    names = rename(state, unet_modules(unet.config))
    save_file({f"model.diffusion_model.{names[k]}": tensor for k, tensor in state.items()}, path)
    return path
