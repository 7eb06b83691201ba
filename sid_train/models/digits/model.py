"""The demo's text-to-image model: SDXL's own layout, 1,000 times smaller.

The UNet is a ``UNet2DConditionModel`` with ``text_time`` conditioning, cross attention and linear projections, on
SDXL's noise schedule; the text conditioner and the latent codec have the interfaces of SDXL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ...core.noise_schedule import PREDICTION_TYPES, VPSchedule
from ...core.recipe import SiDRecipe, has_recipe
from ...files.header import read_safetensors_metadata
from ...files.tensors import LazyTensor, open_tensors
from ..adapters import Adapter
from ..bundle import ModelBundle
from ..family import OpenedModel, Tensors
from ..lora import is_kohya, kohya_names, modules_of, read_lora
from ..unet import UNetDenoiser
from ..weights import require_tensors
from .data import IMAGE_SIZE
from .layout import (
    ARCHITECTURE,
    GROUPS,
    LATENT_SHAPE,
    PREDICTION_TYPE,
    TEACHER_FILE,
    TEXT,
    TEXT_WIDTH,
    TIME_ID_WIDTH,
    WIDTHS,
    DigitCodec,
    DigitConditioner,
)

LICENCE = "Apache-2.0 (trained on CC BY 4.0 data: UCI Optical Recognition of Handwritten Digits)"


def build_unet() -> UNet2DConditionModel:
    """The demo's UNet, randomly initialised: 2.6M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[-1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=GROUPS,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    )


@dataclass(kw_only=True)
class DigitsModel(OpenedModel):
    """The teacher, or a generator that was exported from it; ``rest`` is the conditioner's."""

    architecture = ARCHITECTURE

    name: str = "SiD demo digits"
    prediction_type: str = "epsilon"

    def is_lora(self, path: Path) -> bool:
        return is_kohya(path)

    def read_lora(self, path: Path) -> Adapter:
        return read_lora(path, self.tensors, kohya_modules(self.tensors))

    def load(self, dtype: torch.dtype | None, resolution: int = 0) -> ModelBundle:
        """As ``OpenedModel.load``; the network is so small that it is read in any case, and its pictures have one
        size.
        """
        unet, conditioner = build_unet(), DigitConditioner()
        text = {name.removeprefix(TEXT): tensor for name, tensor in self.rest.items()}
        parts: list[tuple[nn.Module, Tensors, str]] = [(unet, self.tensors, self.prefix), (conditioner, text, TEXT)]
        for module, tensors, prefix in parts:
            require_tensors(module.state_dict(), tensors, f"{self.weights}: the demo's model", prefix)
            module.load_state_dict({name: tensor.load_finite().float() for name, tensor in tensors.items()})
        denoiser = UNetDenoiser(unet, VPSchedule.sdxl(prediction_type=self.prediction_type))
        denoiser.to(dtype or torch.float32)
        return ModelBundle(
            name=self.name,
            architecture=ARCHITECTURE,
            denoiser=denoiser,
            conditioner=conditioner,
            codec=DigitCodec(),
            latent_shape=LATENT_SHAPE,
            image_size=(IMAGE_SIZE, IMAGE_SIZE),
            weights=self.weights,
            licence=LICENCE,
        )


def kohya_modules(unet: Tensors) -> dict[str, str]:
    """``{diffusers' name: kohya's name}``, as for SD 1.x."""
    return kohya_names({name: name for name in modules_of(unet)})


def open_digits(path: Path = TEACHER_FILE) -> DigitsModel:
    """The teacher, or what ``DigitsFamily.export`` wrote."""
    unet: dict[str, LazyTensor] = {}
    text: dict[str, LazyTensor] = {}
    for name, tensor in open_tensors(path).items():
        if name.startswith(TEXT):
            text[name] = tensor
        else:
            unet[name.removeprefix(DigitsModel.prefix)] = tensor
    metadata = read_safetensors_metadata(path)
    is_generator = has_recipe(metadata)
    predicts = metadata.get(PREDICTION_TYPE, "epsilon")  # of the first teacher, which did not say it
    if is_generator:
        predicts = SiDRecipe.from_metadata(metadata, path).prediction_type
    if predicts not in PREDICTION_TYPES:
        raise ValueError(f"{path}: expected a model that predicts {' or '.join(PREDICTION_TYPES)}, got {predicts!r}")
    return DigitsModel(
        tensors=unet,
        rest=text,
        weights=path,
        is_generator=is_generator,
        read_from=(path,),
        prediction_type=predicts,
    )
