"""LoRA files as peft and diffusers write them, in the names that ComfyUI reads.

ComfyUI reads kohya's names (``lora_unet_down_blocks_1_....lora_up.weight``), with ldm's or diffusers' modules in them.
Of peft's and diffusers' own names it knows few, and leaves the rest out with a line in the log.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..sid_train.files.reading import shown

PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers writes peft's configuration: the rank and the alpha, which the tensors do not say."""
PREFIX = re.compile(r"(base_model\.)?(model\.)?(unet\.|diffusion_model\.)?")
ROOTS = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|"
    r"input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
)
"""What the modules of a UNet begin with, in diffusers' names and in ldm's."""
# Between the module and the end there may be the name of the adapter, such as "default".
ENDS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$|\.lora\.down\.weight$"), ".lora_down.weight"),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$|\.lora\.up\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.\w+)?(\.weight)?$"), ".dora_scale"),
    (re.compile(r"\.alpha$"), ".alpha"),
)


def in_kohyas_names(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str) -> dict[str, Tensor]:
    """``tensors`` of a LoRA file, those of a UNet in peft's or diffusers' names renamed, the others as they are.

    ValueError for two tensors that are the same one, and for peft's configuration in a form that cannot be read.
    """
    found: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    for name, tensor in tensors.items():
        new, module = _renamed(name)
        if new in found:
            raise ValueError(f"{path}: {shown(name, 200)} is in the file twice, under two spellings")
        if module:
            modules[new.removesuffix(".lora_down.weight")] = module
        found[new] = tensor.flatten()[:, None] if module and new.endswith(".dora_scale") else tensor
    peft = _peft_configuration(metadata, path)
    for kohya, module in modules.items():
        down = found.get(f"{kohya}.lora_down.weight")
        magnitude = f"{kohya}.dora_scale"
        if down is not None and magnitude in found:  # beside a convolution's weight it needs all of its axes
            found[magnitude] = found[magnitude].reshape(-1, *[1] * (down.ndim - 1))
        if peft and down is not None and f"{kohya}.alpha" not in found:
            found[f"{kohya}.alpha"] = torch.tensor(_alpha(peft, module, len(down)))
    return found


def _renamed(name: str) -> tuple[str, str]:
    """A tensor's name as kohya's, and its module; the name itself and "" for names in no such spelling."""
    module = name[PREFIX.match(name).end() :]  # type: ignore[union-attr]  # it matches nothing, too
    for end, kohyas in ENDS:
        if ROOTS.match(module) and (at := end.search(module)) is not None:
            module = module[: at.start()]
            return f"lora_unet_{module.replace('.', '_')}{kohyas}", module
    return name, ""


def _peft_configuration(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """peft's configuration of the UNet's adapter; {} where the file says none."""
    if PEFT_METADATA not in metadata:
        return {}
    try:
        values = json.loads(metadata[PEFT_METADATA])
        found = {key.removeprefix("unet."): value for key, value in values.items() if key.startswith("unet.")}
        float(found.get("lora_alpha", 1)), dict(found.get("alpha_pattern") or {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: {PEFT_METADATA}: expected peft's configuration as JSON, got other text") from None
    return found


def _alpha(peft: Mapping[str, Any], module: str, rank: int) -> float:
    """kohya's alpha, which is divided by the rank: peft's own, and more for rsLoRA, which divides by its root."""
    patterns = peft.get("alpha_pattern") or {}
    alpha = next((v for key, v in patterns.items() if module == key or module.endswith(f".{key}")), None)
    alpha = float(peft.get("lora_alpha", rank) if alpha is None else alpha)
    return alpha * math.sqrt(rank) if peft.get("use_rslora") else alpha
