"""diffusers' UNets of the classes of SD 1.x, 2.x and SDXL behind the contract of ``Denoiser``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..core.noise_schedule import NoiseSchedule
from .conditioning import Conditioning
from .denoiser import Denoiser

# Nearly all weights are in these. Gradient checkpointing computes them again one by one, and sharding gathers and frees
# them so; the rest is gathered with the whole network.
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The modules that LCM's and DMD2's SDXL LoRAs adapt.
ALL = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


class UNetDenoiser(Denoiser):
    """A UNet, wrapped: timestep, input scale, and what its output means.

    Of the conditioning it reads ``text``, and ``pooled`` and ``time_ids`` where they are (``text_time`` UNets).
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule):
        super().__init__()
        self.unet = unet
        self.schedule = schedule

    @property
    def network(self) -> UNet2DConditionModel:
        return self.unet

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        sample, timestep, text, added = self._inputs(x, sigma, cond)
        prediction = self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
        return self.schedule.to_x0(prediction, x, sigma)

    def logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The mid block's output, averaged over its channels: the UNet's first half, up to and including that block. A
        UNet may have none (KOALA-700M): then it is the output of the last block on the way down.
        """
        sample, timestep, text, added = self._inputs(x, sigma, cond)
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
        if added:
            emb = emb + unet.get_aug_embed(emb, text, added)
        sample = unet.conv_in(sample)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                sample, _ = block(hidden_states=sample, temb=emb, encoder_hidden_states=text)
            else:
                sample, _ = block(hidden_states=sample, temb=emb)
        if getattr(unet.mid_block, "has_cross_attention", False):
            sample = unet.mid_block(sample, emb, encoder_hidden_states=text)
        elif unet.mid_block is not None:
            sample = unet.mid_block(sample, emb)
        return _channel_mean(sample)

    def denoise_with_logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        results: list[Any] = []
        deepest = self.unet.down_blocks[-1] if self.unet.mid_block is None else self.unet.mid_block
        handle = deepest.register_forward_hook(lambda module, args, result: results.append(result))
        try:
            x0 = self.denoise(x, sigma, cond)
        finally:
            handle.remove()
        (features,) = results
        return x0, _channel_mean(features if isinstance(features, Tensor) else features[0])  # with what skips it

    def _inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        dtype = self.unet.conv_in.weight.dtype  # unet.dtype is that of an adapter, where there is one
        sample = self.schedule.scale_input(x, sigma).to(dtype)
        added = {}
        if "pooled" in cond.tensors:
            added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}
        return sample, self.schedule.timestep(sigma), cond.text.to(dtype), added

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.unet.modules() if isinstance(module, BLOCKS)]

    def lora_targets(self, attention_only: bool) -> list[str]:
        return list(ATTENTION if attention_only else ALL)

    def use_checkpointing(self, run: Callable[..., Any] | None = None) -> None:
        self.unet.enable_gradient_checkpointing(*([] if run is None else [run]))


def _channel_mean(features: Tensor) -> Tensor:
    return features.float().mean(dim=1)
