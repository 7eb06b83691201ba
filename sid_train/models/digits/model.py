"""The demo's text-to-image model: SDXL's own layout, 1,000 times smaller.

The UNet is a ``UNet2DConditionModel`` with ``text_time`` conditioning, cross attention and linear projections, on
SDXL's noise schedule; the text conditioner and the latent codec have the interfaces of SDXL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Embedding

from ...core.noise_schedule import PREDICTION_TYPES, VPSchedule
from ...core.recipe import SiDRecipe, has_recipe
from ...files.header import read_safetensors_metadata
from ...files.tensors import LazyTensor, open_tensors
from ..bundle import ModelBundle
from ..conditioning import Conditioning
from ..family import OpenedModel, Tensors
from ..unet import UNetDenoiser
from ..weights import require_tensors
from .data import COLOURS, DIGITS, GROUNDS, IMAGE_SIZE

ASSETS = Path(__file__).parent / "assets"
TEACHER_FILE = ASSETS / "teacher.safetensors"
ARCHITECTURE = "sid-demo-digits"
TEXT = "text_encoder."  # before the conditioner's tensors in a file
PREDICTION_TYPE = "prediction_type"
"""Of a teacher, in its file's header; a generator's recipe says its own."""
LICENCE = "Apache-2.0 (trained on CC BY 4.0 data: UCI Optical Recognition of Handwritten Digits)"
LATENT_SHAPE = (12, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
MAX_TOKENS = 8
TEXT_WIDTH = 64
VOCABULARY = ("<pad>", "a", "on", "ground", *DIGITS, *COLOURS, *GROUNDS)


def build_unet() -> UNet2DConditionModel:
    """The demo's UNet, randomly initialised: 2.6M parameters."""
    time_embedding = 8  # a time id; SDXL has 256
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[-1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_embedding,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * time_embedding,
    )


class DigitConditioner(nn.Module):
    """Words and positions as fixed random vectors: enough text encoder for a vocabulary of two dozen words."""

    max_tokens = MAX_TOKENS  # more are refused, not cut

    def __init__(self) -> None:
        super().__init__()
        self.words = Embedding(len(VOCABULARY), TEXT_WIDTH)
        self.positions = Embedding(MAX_TOKENS, TEXT_WIDTH)
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = torch.tensor([self._tokenize(p) for p in prompts], device=self.words.weight.device)
        text = self.words(tokens) + self.positions.weight
        pooled = text.mean(dim=1) * MAX_TOKENS**0.5
        size = float(IMAGE_SIZE)
        time_ids = torch.tensor([size, size, 0.0, 0.0, size, size], device=text.device).repeat(len(prompts), 1)
        return Conditioning(text=text, pooled=pooled, time_ids=time_ids)

    def chunks(self, prompts: Sequence[str]) -> list[int]:
        return [1] * len(prompts)

    def unload(self) -> None:
        """There is nothing to be had back."""

    @staticmethod
    def _tokenize(prompt: str) -> list[int]:
        words = prompt.lower().split()
        unknown = [w for w in words if w not in VOCABULARY[1:]]
        if unknown or len(words) > MAX_TOKENS:
            raise ValueError(
                f"prompt {prompt!r}: the demo model reads at most {MAX_TOKENS} words such as "
                f"'a red three on a blue ground'"
                + (f" and does not know {', '.join(map(repr, unknown))}" if unknown else "")
                + f". It knows: {', '.join(VOCABULARY[1:])}."
            )
        return [VOCABULARY.index(w) for w in words] + [0] * (MAX_TOKENS - len(words))


class DigitCodec:
    """16x16 RGB images <-> 12x8x8 latents: an orthonormal Haar transform, its bands brought to about unit variance.

    SDXL's VAE does the same for its latents with one factor, 0.13025. The factors are one over the standard deviations
    of 3,000 real images (1.0, 0.21, 0.17), halved for the diagonal band (0.053), which is nearly empty.
    """

    MEAN = -0.5  # of the low-pass band
    SCALE = (1.0, 5.0, 5.0, 10.0)
    HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, 16, 16] in [-1, 1] -> latents [B, 12, 8, 8]."""
        haar, scale = self._bands(images)
        pixels = rearrange(images, "b c (h p) (w q) -> b c (p q) h w", p=2, q=2)
        bands = torch.einsum("kp,bcphw->bckhw", haar, pixels)
        bands[:, :, 0] -= self.MEAN
        return rearrange(bands * scale, "b c k h w -> b (c k) h w")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 12, 8, 8] -> images [B, 3, 16, 16], not clamped."""
        haar, scale = self._bands(latents)
        bands = rearrange(latents, "b (c k) h w -> b c k h w", k=4) / scale
        bands[:, :, 0] += self.MEAN
        pixels = torch.einsum("kp,bckhw->bcphw", haar, bands)
        return rearrange(pixels, "b c (p q) h w -> b c (h p) (w q)", p=2, q=2)

    def to(self, device: torch.device) -> DigitCodec:
        """It works wherever its input is."""
        return self

    def _bands(self, like: Tensor) -> tuple[Tensor, Tensor]:
        haar = torch.tensor(self.HAAR, dtype=like.dtype, device=like.device) / 2
        return haar, torch.tensor(self.SCALE, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(kw_only=True)
class DigitsModel(OpenedModel):
    """The teacher, or a generator that was exported from it; ``rest`` is the conditioner's."""

    architecture = ARCHITECTURE

    name: str = "SiD demo digits"
    prediction_type: str = "epsilon"

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
