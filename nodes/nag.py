"""Normalized attention guidance (arXiv 2505.21179) on cross attention: negative prompts in one network call."""

from __future__ import annotations

import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .version import FLOOR, comfyui_version, is_below_floor

NAG_SCALE = 2.0
NAG_TAU = 2.5
NAG_ALPHA = 0.5
# Every place where a UNet of these classes can have a transformer; a place without one is never asked.
BLOCKS = [(part, number) for part in ("input", "output") for number in range(12)] + [("middle", 0)]

# What restricts CONDITIONING to a part of the picture or of the steps.
LIMITS = ("area", "mask", "start_percent", "end_percent")


def nag_blend(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Equations 7 to 9 of arXiv 2505.21179 on attention outputs [B, tokens, width].

    Extrapolates away from ``negative`` by ``scale`` (the authors' code calls ``scale + 1`` nag_scale), limits each
    token's L1 norm to ``tau`` times that of ``positive``, and blends ``alpha`` of the result in.
    """
    away = positive + scale * (positive - negative)
    length = positive.abs().sum(-1, keepdim=True).clamp_min(1e-6)
    ratio = away.abs().sum(-1, keepdim=True).clamp_min(1e-6) / length
    return positive + alpha * (away * (ratio.clamp_max(tau) / ratio) - positive)


def patch_nag(model, negative, scale: float, tau: float, alpha: float):
    """A clone of MODEL whose cross attention moves away from ``negative`` (CONDITIONING with one prompt).

    Returns ``model`` itself where the strength is 0. ValueError for several negative prompts, for one that is not meant
    for the whole picture and all steps, for a model whose cross attention another node has replaced, and on a ComfyUI
    that is too old.
    """
    if scale == 0 or alpha == 0:
        return model
    if is_below_floor():
        raise ValueError(
            f"guidance 'nag': expected ComfyUI {FLOOR} or newer, got {comfyui_version()}, whose attention does not "
            "take what it needs. Update ComfyUI, or use guidance 'cfg' or 'none'."
        )
    if len(negative) != 1:
        raise ValueError(
            f"guidance 'nag': expected one negative prompt, got {len(negative)} parts. Join them with "
            "Conditioning (Concat); areas, masks and schedules of a negative prompt need guidance 'cfg'."
        )
    if limits := [key for key in LIMITS if key in negative[0][1]]:
        raise ValueError(
            f"guidance 'nag': expected a negative prompt for the whole picture and all steps, got one with "
            f"{' and '.join(limits)}. Use guidance 'cfg' for areas, masks and schedules."
        )
    if model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2"):
        raise ValueError(
            "guidance 'nag': another node (an IP-Adapter, for instance) already replaces this model's cross "
            "attention. Use guidance 'cfg' or 'none' with it."
        )
    text = negative[0][0]
    tokens = text.shape[1]
    copies: dict[tuple, Tensor] = {}  # one a device and type: SDXL has 70 cross attentions

    def append_negative(query: Tensor, context: Tensor, value: Tensor, extra_options) -> tuple[Tensor, Tensor, Tensor]:
        # Keys and values of both prompts come out of one projection; ``attend`` takes them apart again.
        place = context.device, context.dtype
        if place not in copies:
            copies[place] = text.to(context)

        def with_negative(states: Tensor) -> Tensor:
            return torch.cat([states, comfy.utils.repeat_to_batch_size(copies[place], len(states))], dim=1)

        both = with_negative(context)
        return query, both, both if value is context else with_negative(value)

    def attend(query: Tensor, key: Tensor, value: Tensor, extra_options) -> Tensor:
        def attention(part: slice) -> Tensor:
            return optimized_attention(
                query,
                key[:, part],
                value[:, part],
                extra_options["n_heads"],
                attn_precision=extra_options["attn_precision"],
                transformer_options=extra_options,
            )

        return nag_blend(attention(slice(None, -tokens)), attention(slice(-tokens, None)), scale, tau, alpha)

    patched = model.clone()
    patched.set_model_attn2_patch(append_negative)
    for part, number in BLOCKS:
        patched.set_model_attn2_replace(attend, part, number)
    return patched
