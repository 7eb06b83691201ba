"""diffusers' SDXL UNet behind the one contract of this project: ``denoise(x, sigma, cond) -> x0``."""

from __future__ import annotations

from typing import Literal

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..core.noise_schedule import NoiseSchedule, PredictionType, input_scale, prediction_to_x0
from .conditioning import Conditioning

Output = Literal["x0", "logits", "x0_and_logits"]

# Nearly all of SDXL's weights are in these. Gradient checkpointing computes them again one by one, and sharding gathers
# and frees them so; the rest is gathered with the whole network.
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


class UNetDenoiser(nn.Module):
    """A UNet with ``text_time`` conditioning, wrapped: timestep, input scale and eps or v to x0.

    Every use goes through ``forward``, since data-parallel wrappers only see that call.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, prediction_type: PredictionType):
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction_type = prediction_type

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, output: Output = "x0"):
        """x [B, C, H, W] at noise level sigma [B] -> x0 [B, C, H, W], fp32.

        ``logits``: the discriminator's map [B, h, w] instead, at the cost of the encoder alone: the mid block's output
        averaged over its channels (Diffusion GAN, arXiv 2410.14919). ``x0_and_logits``: both, from one pass.
        """
        dtype = self.unet.conv_in.weight.dtype  # unet.dtype is that of an adapter, where there is one
        sample = (x * input_scale(sigma, x)).to(dtype)
        timestep = self.schedule.timestep(sigma)
        text = cond.text.to(dtype)
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}
        if output == "logits":
            return _channel_mean(self._encode(sample, timestep, text, added))

        mid: list[Tensor] = []
        handle = None
        if output == "x0_and_logits":
            handle = self.unet.mid_block.register_forward_hook(lambda module, args, result: mid.append(result))
        try:
            prediction = self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
        finally:
            if handle is not None:
                handle.remove()
        x0 = prediction_to_x0(prediction, x, sigma, self.prediction_type)
        return (x0, _channel_mean(mid[0])) if mid else x0

    def _encode(self, sample: Tensor, timestep: Tensor, text: Tensor, added: dict) -> Tensor:
        """The UNet's first half, up to and including the mid block."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
        emb = emb + unet.get_aug_embed(emb, text, added)
        sample = unet.conv_in(sample)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                sample, _ = block(hidden_states=sample, temb=emb, encoder_hidden_states=text)
            else:
                sample, _ = block(hidden_states=sample, temb=emb)
        return unet.mid_block(sample, emb, encoder_hidden_states=text)


def _channel_mean(features: Tensor) -> Tensor:
    return features.float().mean(dim=1)
