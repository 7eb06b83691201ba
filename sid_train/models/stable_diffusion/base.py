"""The networks of the base models as diffusers and transformers build them, without weights: on the meta device."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .keys import HEAD_WIDTH, SD1_HEADS
from .kinds import SD1_KIND, SD2_KIND, SDXL_KIND, Kind
from .text import TextEncoders


def base_unet(kind: Kind, width: int = 320) -> UNet2DConditionModel:
    """2.567 billion parameters for SDXL, 860 million for SD 1.x and 866 for 2.x, or fewer where the first level is
    narrower.
    """
    return _sdxl_unet(width) if kind is SDXL_KIND else _sd_unet(kind, width)


def _sdxl_unet(width: int) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(width // 64, 2 * width // 64, 4 * width // 64),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def _sd_unet(kind: Kind, width: int) -> UNet2DConditionModel:
    widths = (width, 2 * width, 4 * width, 4 * width)
    is_sd1 = kind is SD1_KIND
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=widths,
            attention_head_dim=SD1_HEADS if is_sd1 else tuple(each // HEAD_WIDTH for each in widths),
            cross_attention_dim=kind.architecture.text_width,
            use_linear_projection=not is_sd1,
        )


def base_vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )


def base_text_encoders(kind: Kind) -> TextEncoders:
    """CLIP-L for SD 1.x, OpenCLIP H for 2.x, CLIP-L and OpenCLIP bigG for SDXL."""

    def config(width: int, layers: int, **more: int) -> CLIPTextConfig:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // HEAD_WIDTH}
        return CLIPTextConfig(**sizes, num_hidden_layers=layers, **more)

    with torch.device("meta"):
        if kind is SD2_KIND:
            return (CLIPTextModel(config(1024, 23)),)
        clip_l = CLIPTextModel(config(768, 12))
        if kind is SD1_KIND:
            return (clip_l,)
        return clip_l, CLIPTextModelWithProjection(config(1280, 32, projection_dim=1280))
