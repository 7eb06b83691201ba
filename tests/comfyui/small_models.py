"""Small, randomly initialised files of SDXL's class that ComfyUI loads like the real ones.

The UNet has SDXL's widths, context and conditioning with KOALA's transformer depths at its inputs only: 60.6M
parameters instead of 2.6 billion. Needs ComfyUI's own modules on the path.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0] * 6,
    "transformer_depth_middle": -2,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
    "use_checkpoint": False,
}


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Random weights of a trained network's size: ComfyUI creates its layers uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 0:
            continue  # TAESD's scale and shift
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module


def unet_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The UNet with ldm names, fp32."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**UNET_CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return dict(initialise(unet, seed).state_dict())


SD1_UNET_CONFIG = {
    **UNET_CONFIG,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_classes": None,
    "adm_in_channels": None,
}
SD2_UNET_CONFIG = {
    **SD1_UNET_CONFIG,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}


def sd_unet_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """A UNet of SD 1.x's or 2.x's class in one level, 24M parameters: ``SD1_UNET_CONFIG`` or ``SD2_UNET_CONFIG``."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return dict(initialise(unet, seed).state_dict())


def clip_l_tensors(seed: int = 0) -> dict[str, Tensor]:
    """CLIP-L in full size, named as in SD 1.x's files: ComfyUI has no smaller one."""
    import comfy.sd1_clip
    from comfy.supported_models import SD15

    clip = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float16)
    state = dict(initialise(clip, seed).state_dict())
    return SD15(SD1_UNET_CONFIG).process_clip_state_dict_for_saving(state)


def vae_tensors(seed: int = 0) -> dict[str, Tensor]:
    """TAESD's architecture, which ComfyUI takes as a VAE."""
    from comfy.taesd.taesd import TAESD

    return dict(initialise(TAESD(), seed).state_dict())


def clip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """SDXL's two text encoders, full size: ComfyUI has no smaller ones of this class."""
    import comfy.sdxl_clip

    clip = comfy.sdxl_clip.SDXLClipModel(device="cpu", dtype=torch.float16)
    initialise(clip, seed)
    return dict(clip.state_dict())


def small_clip(generation: str):
    """ComfyUI's class of models of a generation, by its name there (SDXL, SD15, SD20), and a CLIP of it, uninitialised
    and as small as those of ``small_sdxl`` and ``small_sd``.
    """
    import comfy.sd
    import comfy.supported_models
    from small_sdxl import text_config

    unets = {"SDXL": UNET_CONFIG, "SD15": SD1_UNET_CONFIG, "SD20": SD2_UNET_CONFIG}
    family = getattr(comfy.supported_models, generation)(unets[generation])
    sizes = {}
    for name, activation in (("l", "quick_gelu"), ("g", "gelu"), ("h", "gelu")):
        config = text_config(activation, 49407).to_dict()
        # Of OpenCLIP H all layers but the last are read, as of the file.
        sizes[f"clip_{name}_model_config"] = config | {"num_hidden_layers": 4} if name == "h" else config
    target = family.clip_target()
    target.params = {}
    return family, comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **sizes})


def controlnet_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A ControlNet for the UNet, with ldm names."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {k: v for k, v in UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    network = ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return {f"control_model.{k}": v for k, v in initialise(network, seed).state_dict().items()}


def lora_tensors(unet: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A kohya LoRA of rank 4 on every attention projection of ``unet``."""
    made = {}
    generator = torch.Generator().manual_seed(seed)
    for key, weight in unet.items():
        if ".attn" in key and key.endswith(".weight") and weight.ndim == 2:
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            made[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
            made[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
            made[f"{name}.alpha"] = torch.tensor(4.0)
    return made


def checkpoint_tensors(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """UNet, text encoders and VAE in one file, with the names that ComfyUI saves."""
    import comfy.supported_models

    config = comfy.supported_models.KOALA_700M(UNET_CONFIG)
    return (
        {f"model.diffusion_model.{k}": v for k, v in unet.items()}
        | config.process_clip_state_dict_for_saving(clip_tensors())
        | {f"first_stage_model.{k}": v for k, v in vae_tensors().items()}
    )


def make_models(base: Path, recipe: dict[str, str]) -> None:
    """Small files under the names that the workflows use, in ``base/models``; ``recipe`` is a SiD file's metadata."""
    models, unet = base / "models", unet_tensors()
    checkpoint = save(models / "checkpoints" / "sdxl-sid-4step.safetensors", checkpoint_tensors(unet), recipe)
    (models / "checkpoints" / "sd_xl_base_1.0.safetensors").hardlink_to(checkpoint)
    save(models / "diffusion_models" / "sdxl-sid-4step-unet.safetensors", unet, recipe)
    save(models / "loras" / "sdxl-sid-4step-lora.safetensors", lora_tensors(unet), recipe)
    save(models / "loras" / "dmd2_sdxl_4step_lora_fp16.safetensors", lora_tensors(unet))  # says nothing of itself
    save(models / "controlnet" / "controlnet-canny-sdxl-1.0.safetensors", controlnet_tensors())
    ramp = torch.linspace(0, 255, 128).byte().expand(128, 128)
    mask = (ramp > 127) * torch.tensor(255, dtype=torch.uint8)  # LoadImage paints where alpha is 0: the left half
    (base / "input").mkdir(exist_ok=True)
    picture = torch.stack([ramp, ramp.T, ramp, mask], dim=-1)
    Image.fromarray(picture.contiguous().numpy()).save(base / "input" / "example.png")


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Writes fp16 tensors; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path, metadata)
    return path
