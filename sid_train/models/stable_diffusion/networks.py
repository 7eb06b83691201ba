"""Networks from tensors as files name them: what they must be is checked by names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...files.reading import shown
from ...files.tensors import LazyTensor
from ..family import Tensors
from ..weights import fill, require_tensors
from .keys import (
    BESIDE_WEIGHTS,
    HEAD_WIDTH,
    SCALED_FP8,
    Shapes,
    count_parts,
    from_open_clip,
    invert,
    is_vae_attention,
    rename,
    to_open_clip,
    unet_config,
    unet_modules,
    vae_config,
    vae_modules,
)
from .kinds import TextEncoder

LATENT_CHANNELS = 4
TEXT, PROJECTION = "text_model.", "text_projection.weight"
OPEN_CLIP_LAYERS = "transformer.resblocks."
NOT_READ = ("position_ids", "logit_scale", "attn_mask")
"""Ends of names that text encoders may have in files, and that no encoding of a prompt reads."""


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Names the file where a tensor that sizes are taken from is missing, or they make no network."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: tensor {shown(error.args[0], 120)} is missing") from None
    except (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(where) else f"{where}: {shown(reason)}") from None


def shapes_of(tensors: Tensors) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def refuse_scaled_fp8(tensors: Tensors, where: str) -> None:
    """ValueError for weights that mean nothing without the scales that are beside them."""
    found = [name for name in tensors if name.endswith(BESIDE_WEIGHTS) or name.split(".")[-1] == SCALED_FP8]
    if found:
        raise ValueError(
            f"{where}: scaled or quantised weights ({len(found):,} tensors such as {shown(found[0], 120)}) are not "
            "read: use the model's fp16, bf16 or fp32 file"
        )


# -- UNet --------------------------------------------------------------------------------------------------------------


def read_unet(tensors: Tensors, where: str, prefix: str = "") -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The arguments of diffusers' UNet, and its tensors by diffusers' names. ValueError for tensors, in either layout,
    that are not those of such a UNet.

    prefix: what the names had in front of them in the file
    """
    refuse_scaled_fp8(tensors, where)
    with _naming(where):
        config = unet_config(shapes_of(tensors))
        expected: Mapping[str, Tensor] = _meta_unet(config).state_dict()
    names = {name: name for name in expected}
    if "conv_in.weight" not in tensors:
        names = rename(expected, unet_modules(config))
        expected = {names[name]: tensor for name, tensor in expected.items()}
    require_tensors(expected, tensors, where, prefix)
    return config, {ours: tensors[theirs] for ours, theirs in names.items()}


def build_unet(
    config: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype | None, where: str = "UNet"
) -> UNet2DConditionModel:
    """A UNet of ``config`` with ``tensors`` in ``dtype``: one tensor after another, so that memory holds it once. None
    leaves it on the meta device.
    """
    unet = _meta_unet(config)
    if dtype is not None:
        fill(unet, tensors, where, dtype)
    return unet


def _meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


# -- text encoders -----------------------------------------------------------------------------------------------------


def build_text(
    encoder: TextEncoder, tensors: Tensors, dtype: torch.dtype | None, where: str, prefix: str = ""
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """``encoder`` with ``tensors`` named as transformers 4 does, or as OpenCLIP where it is one; None leaves it on the
    meta device.
    """
    kind = CLIPTextModelWithProjection if encoder.has_projection else CLIPTextModel
    unread = NOT_READ if encoder.has_projection else (*NOT_READ, PROJECTION, "text_projection")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(unread)}
    if "token_embedding.weight" in tensors:
        refuse_scaled_fp8(tensors, where)
        tensors = _first_layers(tensors, encoder.layers)
        with _naming(where):
            shapes = shapes_of(tensors)
            embedding = shapes["token_embedding.weight"]
            model = _meta_text(
                kind,
                encoder.activation,
                embedding,
                shapes["transformer.resblocks.0.mlp.c_fc.weight"],
                count_parts(shapes, OPEN_CLIP_LAYERS),
                shapes["text_projection"][1] if encoder.has_projection else embedding[1],
            )
            expected = to_open_clip(_named_as_4(model))
        require_tensors(expected, tensors, where, prefix)
        tensors = from_open_clip(tensors)
    return _build_text(kind, tensors, encoder.activation, dtype, where, prefix)


def _first_layers(tensors: Tensors, layers: int) -> Tensors:
    """Without those of OpenCLIP's layers that are not read; 0 reads all."""

    def is_read(name: str) -> bool:
        number = name.removeprefix(OPEN_CLIP_LAYERS).partition(".")[0]
        return not (name.startswith(OPEN_CLIP_LAYERS) and number.isdecimal() and int(number) >= layers)

    return {name: tensor for name, tensor in tensors.items() if is_read(name)} if layers else tensors


def _build_text(
    kind: type, tensors: Tensors, activation: str, dtype: torch.dtype | None, where: str, prefix: str
) -> Any:
    """A CLIP text encoder whose sizes follow from its tensors."""
    refuse_scaled_fp8(tensors, where)
    with _naming(where):
        shapes = shapes_of(tensors)
        embedding = shapes[f"{TEXT}embeddings.token_embedding.weight"]
        model = _meta_text(
            kind,
            activation,
            embedding,
            shapes[f"{TEXT}encoder.layers.0.mlp.fc1.weight"],
            count_parts(shapes, f"{TEXT}encoder.layers."),
            shapes.get(PROJECTION, embedding[1:])[0],
        )
        expected = _named_as_4(model)
    require_tensors(expected, tensors, where, prefix)
    if dtype is not None:
        own = dict(zip(expected, model.state_dict(), strict=True))
        fill(model, {own[name]: tensors[name] for name in expected}, where, dtype)
        _make_buffers(model)
    return model


def _meta_text(
    kind: type,
    activation: str,
    embedding: tuple[int, ...],
    first_layer: tuple[int, ...],
    layers: int,
    projection: int,
) -> Any:
    vocabulary, width = embedding
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=first_layer[0],
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        projection_dim=projection,
        hidden_act=activation,
    )
    with torch.device("meta"):
        return kind(config)


def _named_as_4(model: nn.Module) -> dict[str, Tensor]:
    """Its state with transformers 4's names, which files have; version 5 dropped the prefix of one of the two."""
    state = model.state_dict()
    return {n if n.startswith((TEXT, PROJECTION)) else TEXT + n: tensor for n, tensor in state.items()}


def _make_buffers(model: nn.Module) -> None:
    """Buffers that no file holds (position ids) are made on the meta device with everything else."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_buffer(leaf, torch.arange(buffer.numel())[None], persistent=False)


# -- VAE ---------------------------------------------------------------------------------------------------------------


def read_vae(tensors: Tensors, where: str, prefix: str = "") -> dict[str, LazyTensor]:
    """A VAE's tensors by ldm's names, from either layout; ValueError for those of no VAE with such latents."""
    refuse_scaled_fp8(tensors, where)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        with _naming(where):
            names = rename(tensors, vae_modules(tensors))
        tensors = {names[k]: t.map(_to_1x1) if is_vae_attention(names[k]) else t for k, t in tensors.items()}
    with _naming(where):
        vae = _meta_vae(tensors)
        state = vae.state_dict()
        theirs = rename(state, vae_modules(state))
        expected = {theirs[k]: _to_1x1(t) if is_vae_attention(theirs[k]) else t for k, t in state.items()}
    require_tensors(expected, tensors, where, prefix)
    if vae.config.latent_channels != LATENT_CHANNELS:
        raise ValueError(
            f"{where}: expected a VAE with latents of {LATENT_CHANNELS} channels, got {vae.config.latent_channels}"
        )
    return dict(tensors)


def build_vae(tensors: Tensors, dtype: torch.dtype | None, where: str, scaling_factor: float) -> AutoencoderKL:
    """A VAE with ``tensors`` as ``read_vae`` gives them; None leaves it on the meta device.

    scaling_factor: of its latents, see ``Kind``
    """
    vae = _meta_vae(tensors, scaling_factor)
    if dtype is not None:
        ours = rename(tensors, invert(vae_modules(tensors)))
        named = {ours[k]: t.map(_to_matrix) if is_vae_attention(k) else t for k, t in tensors.items()}
        fill(vae, named, where, dtype)
    return vae


def _meta_vae(tensors: Tensors, scaling_factor: float = 1.0) -> AutoencoderKL:
    config = vae_config(shapes_of(tensors))
    with torch.device("meta"):
        return AutoencoderKL(**config, scaling_factor=scaling_factor)


def _to_1x1(matrix: Tensor) -> Tensor:
    """Some files have the attention's matrices as they are, others as the kernels of 1x1 convolutions."""
    return matrix.reshape(*matrix.shape[:2], 1, 1)


def _to_matrix(kernel: Tensor) -> Tensor:
    return kernel.squeeze((2, 3))
