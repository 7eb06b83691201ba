"""The names of kohya's LoRAs for UNets of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import Tensors
from ..lora import kohya_names, modules_of
from .keys import rename, unet_modules


def kohya_modules(unet: Tensors, config: Mapping[str, Any]) -> dict[str, str]:
    """``{diffusers' name: kohya's name}`` of every module with a weight in a UNet.

    kohya's trainers take ldm's names for SDXL, and diffusers' for SD 1.x and 2.x. ComfyUI reads both for each.
    """
    modules = modules_of(unet)
    is_sdxl = config["addition_embed_type"] is not None
    return kohya_names(rename(modules, unet_modules(config)) if is_sdxl else {name: name for name in modules})
