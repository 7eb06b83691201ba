"""SDXL and its fine-tunes as teachers: a single file with ldm names, a diffusers folder, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ...core.noise_schedule import PREDICTION_TYPES, PredictionType, VPSchedule
from ...core.recipe import SDXL_ARCHITECTURE, has_recipe
from ...files.header import read_safetensors_metadata
from ...files.tensors import LazyTensor, open_tensors
from ..adapters import Adapter
from ..bundle import ModelBundle
from ..family import OpenedModel
from ..unet import UNetDenoiser
from .keys import (
    CLIP_G,
    CLIP_L,
    HEAD_WIDTH,
    UNET,
    VAE,
    clip_g_from_open_clip,
    clip_g_to_open_clip,
    invert,
    is_vae_attention,
    rename,
    unet_config,
    unet_modules,
    vae_config,
    vae_modules,
)
from .lora import read_lora
from .text import SDXLConditioner, TextEncoders, Tokenizers, sdxl_tokenizers

REST = ("conditioner.", VAE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
UNET_FP16_FILE = "unet/diffusion_pytorch_model.fp16.safetensors"
# All that is read of a diffusers folder: SDXL's on the hub has the same weights in several files more.
HUB_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "unet/config.json",
    UNET_FILE,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
RESOLUTION = 1024
SCALING_FACTOR = 0.13025
MARKERS = ("v_pred", "ztsnr")  # empty tensors by which ComfyUI knows the prediction type and the schedule


class SDXLCodec:
    """SDXL's VAE in fp32 (it overflows in fp16), loaded when it is first needed."""

    def __init__(self, load: Callable[[], AutoencoderKL]):
        self._load = load
        self._vae: AutoencoderKL | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> SDXLCodec:
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    @property
    def vae(self) -> AutoencoderKL:
        if self._vae is None:
            self._vae = self._load().float().eval().requires_grad_(False).to(self.device)
        return self._vae

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, 4, H/8, W/8], the mean of the posterior."""
        return self.vae.encode(images.to(self.vae.device, torch.float32)).latent_dist.mean * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] -> images [B, 3, 8h, 8w], not clamped; one at a time, to save memory."""
        latents = latents.to(self.vae.device, torch.float32) / self._scale
        return torch.cat([self.vae.decode(one[None], return_dict=False)[0] for one in latents])

    @property
    def _scale(self) -> float:
        return self.vae.config.scaling_factor


@dataclass(kw_only=True)
class SDXLParts(OpenedModel):
    """Where a model's parts come from. ``tensors`` have diffusers' names; ``load_rest`` gives text encoders and VAE as
    they are named in single files.
    """

    architecture = SDXL_ARCHITECTURE

    unet_config: dict[str, Any]
    prediction_type: PredictionType
    zero_terminal_snr: bool
    load_text: Callable[[], TextEncoders]
    load_tokenizers: Callable[[], Tokenizers]
    load_vae: Callable[[], AutoencoderKL]
    load_rest: Callable[[], dict[str, LazyTensor]]
    licence: str

    def load(self, dtype: torch.dtype | None, resolution: int = 0) -> ModelBundle:
        """As ``OpenedModel.load``, at 1,024 pixels by default. Text encoders and VAE are read when they are first used,
        in fp32.
        """
        unet = build_unet(self.unet_config, self.tensors, dtype)
        resolution = resolution or RESOLUTION
        size = (resolution, resolution)
        return ModelBundle(
            name=self.name,
            architecture=SDXL_ARCHITECTURE,
            denoiser=UNetDenoiser(unet, VPSchedule.sdxl(self.zero_terminal_snr, self.prediction_type)),
            conditioner=SDXLConditioner(self.load_text, self.load_tokenizers, size),
            codec=SDXLCodec(self.load_vae),
            latent_shape=(unet.config.in_channels, resolution // 8, resolution // 8),
            image_size=size,
            weights=self.weights,
            licence=self.licence,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def read_lora(self, path: Path) -> Adapter:
        return read_lora(path, self.tensors, self.unet_config)


def check_resolution(resolution: int) -> None:
    if resolution % 64 or resolution < 0:
        raise ValueError(f"model.resolution: expected a multiple of 64, or 0 for the model's own, got {resolution}")


def open_sdxl(source: str) -> SDXLParts:
    """The parts of an SDXL model, none of them read yet. ValueError for what is no SDXL model."""
    path = Path(source)
    return _from_file(path) if path.is_file() else _from_diffusers(source)


def build_unet(config: dict, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> UNet2DConditionModel:
    """A UNet of ``config`` with ``tensors`` in ``dtype``: one tensor after another, so that memory holds it once."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    if dtype is not None:
        _fill(unet, {name: tensor.load().to(dtype) for name, tensor in tensors.items()})
    return unet


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)
    # Buffers that no file holds (position ids) are made on the meta device with everything else.
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_buffer(leaf, torch.arange(buffer.numel())[None], persistent=False)


# -- a single file -----------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> SDXLParts:
    tensors = open_tensors(path)
    metadata = read_safetensors_metadata(path)
    unet = _under(tensors, UNET) or {k: v for k, v in tensors.items() if k not in MARKERS}
    try:
        config = unet_config({name: tensor.shape for name, tensor in unet.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = {name: name for name in unet}  # a UNet alone may have diffusers' names, as DMD2 publishes
    if "conv_in.weight" not in unet:
        names = rename(unet, invert(unet_modules(config)))
    return SDXLParts(
        name=metadata.get("modelspec.title") or path.stem,
        unet_config=config,
        tensors={names[name]: tensor for name, tensor in unet.items()},
        prediction_type="v_prediction" if "v_pred" in tensors else "epsilon",
        zero_terminal_snr="ztsnr" in tensors,
        load_text=lambda: _text_from_file(path),
        load_tokenizers=sdxl_tokenizers,
        load_vae=lambda: _vae_from_file(path),
        load_rest=lambda: {k: t for k, t in tensors.items() if k.startswith(REST)},
        weights=path,
        licence=metadata.get("modelspec.license", ""),
        is_generator=has_recipe(metadata),
    )


def _under(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _loaded(path: Path, prefix: str, what: str) -> dict[str, Tensor]:
    part = {
        k: v.load().float() for k, v in _under(open_tensors(path), prefix).items() if not k.endswith("position_ids")
    }
    if not part:
        raise ValueError(
            f"{path}: expected {what} under {prefix}*, but the file holds none. Use a whole checkpoint, or a cache of "
            "encoded prompts (python -m sid_train encode) where only the text encoders are missing."
        )
    return part


def _text_from_file(path: Path) -> TextEncoders:
    clip_l = _loaded(path, CLIP_L, "CLIP-L")
    clip_g = clip_g_from_open_clip(_loaded(path, CLIP_G, "OpenCLIP bigG"))
    return TextEncoders(
        _build_text(CLIPTextModel, {f"text_model.{k}": v for k, v in clip_l.items()}, "quick_gelu"),
        _build_text(CLIPTextModelWithProjection, clip_g, "gelu"),
    )


def _build_text(kind: type, state: dict[str, Tensor], activation: str) -> Any:
    """A CLIP text encoder whose sizes follow from its tensors, named as transformers 4 names them."""
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    projection = state.get("text_projection.weight")
    layers = {name.split(".")[3] for name in state if name.startswith("text_model.encoder.layers.")}
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        projection_dim=width if projection is None else projection.shape[0],
        hidden_act=activation,
    )
    with torch.device("meta"):
        model = kind(config)
    if not any(name.startswith("text_model.") for name in model.state_dict()):  # transformers 5
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    _fill(model, state)
    return model


def _vae_from_file(path: Path) -> AutoencoderKL:
    return _build_vae(_loaded(path, VAE, "a VAE"))


def load_vae(path: Path) -> AutoencoderKL:
    """A VAE in a file of its own, fp32, in any of the forms that ``vae_tensors`` reads."""
    return _build_vae({k.removeprefix(VAE): t.load().float() for k, t in vae_tensors(path).items()})


def _build_vae(tensors: dict[str, Tensor]) -> AutoencoderKL:
    config = vae_config({name: tuple(t.shape) for name, t in tensors.items()})
    names = rename(tensors, invert(vae_modules(tensors)))
    with torch.device("meta"):
        vae = AutoencoderKL(**config, scaling_factor=SCALING_FACTOR)
    _fill(vae, {names[k]: t.squeeze((2, 3)) if is_vae_attention(k) else t for k, t in tensors.items()})
    return vae


# -- a diffusers folder ------------------------------------------------------------------------------------------------


def _from_diffusers(source: str) -> SDXLParts:
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    config = {k: v for k, v in _json(folder / "unet" / "config.json").items() if not k.startswith("_")}
    file = _weights(folder)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"{source}: expected prediction type {' or '.join(PREDICTION_TYPES)}, got {prediction!r}")

    def load_text() -> TextEncoders:
        return TextEncoders(
            CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", torch_dtype=torch.float32),
        )

    def load_tokenizers() -> Tokenizers:
        first, second = (CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
        return first, second

    return SDXLParts(
        name=Path(source).name,
        unet_config=config,
        tensors=open_tensors(file),
        prediction_type=prediction,
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        load_text=load_text,
        load_tokenizers=load_tokenizers,
        load_vae=lambda: AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        load_rest=lambda: _rest_of_folder(folder),
        weights=file,
        licence="",
    )


def _rest_of_folder(folder: Path) -> dict[str, LazyTensor]:
    """Text encoders and VAE of a diffusers folder with the names of single files."""
    clip_l = open_tensors(folder / "text_encoder" / "model.safetensors")
    found = {CLIP_L + name.removeprefix("text_model."): tensor for name, tensor in clip_l.items()}
    clip_g = {k: tensor.load() for k, tensor in open_tensors(folder / "text_encoder_2" / "model.safetensors").items()}
    found |= {CLIP_G + name: LazyTensor.of(tensor) for name, tensor in clip_g_to_open_clip(clip_g).items()}
    return found | vae_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors")


def vae_tensors(path: Path) -> dict[str, LazyTensor]:
    """A VAE's tensors named as in single files, from a file with such names, with bare ldm names or diffusers'."""
    tensors = open_tensors(path)
    bare = _under(tensors, VAE) or tensors
    if any(name.startswith("encoder.down_blocks.") for name in bare):
        names = rename(bare, vae_modules(bare))
        as_files = {names[k]: t.map(to_1x1) if is_vae_attention(names[k]) else t for k, t in bare.items()}
    else:
        as_files = dict(bare)
        vae_config({name: tensor.shape for name, tensor in bare.items()})  # refuses what is no VAE
    return {VAE + name: tensor for name, tensor in as_files.items()}


def to_1x1(matrix: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape[:2], 1, 1)


def _download(source: str) -> Path:
    """The local folder of a hub id, its safetensors downloaded if they are not there yet."""
    if not HUB_ID.fullmatch(source) or source.endswith(".safetensors"):
        raise ValueError(
            f"model {source!r}: expected 'demo', a .safetensors file, a diffusers folder with model_index.json, or a "
            "hub id (owner/name); there is no such file or folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
        if not (folder / UNET_FILE).is_file():
            snapshot_download(source, allow_patterns=UNET_FP16_FILE)
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {source!r}: no such file here, and not to be had from the hub: {str(error).splitlines()[0]}"
        ) from None


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: expected a diffusers folder of SDXL, which has this file") from None


def _weights(folder: Path) -> Path:
    """The UNet's only safetensors file, the full-precision one where there are several."""
    for name in (UNET_FILE, UNET_FP16_FILE):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: expected {UNET_FILE}; sharded or pickled weights are not read")
