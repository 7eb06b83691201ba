"""SDXL and its fine-tunes as teachers: a single file with ldm names, a diffusers folder, or a hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...core.architectures import SDXL
from ...core.noise_schedule import PredictionType, VPSchedule
from ...core.recipe import has_recipe
from ...files.header import read_safetensors_metadata
from ...files.pickles import open_pickled
from ...files.reading import reading, shown
from ...files.tensors import LazyTensor, open_tensors
from ..adapters import Adapter
from ..bundle import ModelBundle
from ..family import AUTO, OpenedModel, Tensors
from ..unet import UNetDenoiser
from . import statements
from .folder import (
    HUB_FILES,
    SCHEDULER_FILE,
    TOKENIZERS,
    WEIGHTS,
    find_folder,
    load_text,
    load_tokenizers,
    open_vae,
    read_settings,
    require_unet_config,
    rest_of_folder,
    weights_of,
)
from .keys import CLIP_G, CLIP_L, MARKERS, TIME_ID_WIDTH, UNET, VAE
from .lora import is_kohya, read_lora
from .networks import TEXT, build_clip_g, build_clip_l, build_unet, build_vae, read_unet, read_vae
from .statements import Stated
from .text import SDXLConditioner, TextEncoders, Tokenizers, sdxl_tokenizers

__all__ = ["HUB_FILES", "MARKERS", "RESOLUTION", "REST", "SDXLParts", "build_unet", "check_resolution", "open_sdxl"]

REST = ("conditioner.", VAE)
CONFIGURATION = "model.prediction_type"
RESOLUTION = 1024


class LoadText(Protocol):
    """Reads the text encoders in ``dtype``; None checks them and leaves them on the meta device."""

    def __call__(self, dtype: torch.dtype | None = torch.float32) -> TextEncoders: ...


class LoadVAE(Protocol):
    """As ``LoadText``, for the VAE."""

    def __call__(self, dtype: torch.dtype | None = torch.float32) -> AutoencoderKL: ...


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


@dataclass(frozen=True)
class Rest:
    """All but the UNet, none of it read. ``load_rest`` gives both as they are named in single files."""

    load_text: LoadText
    load_tokenizers: Callable[[], Tokenizers]
    load_vae: LoadVAE
    load_rest: Callable[[], dict[str, LazyTensor]]
    read_from: tuple[Path, ...]


@dataclass(kw_only=True)
class SDXLParts(OpenedModel):
    """Where a model's parts come from. ``tensors`` have diffusers' names.

    stated: what the model's own files say of its prediction type and schedule
    load_text, load_tokenizers, load_vae, load_rest: see ``Rest``
    """

    architecture = SDXL.name

    unet_config: dict[str, Any]
    prediction_type: PredictionType
    zero_terminal_snr: bool
    stated: Stated
    load_text: LoadText
    load_tokenizers: Callable[[], Tokenizers]
    load_vae: LoadVAE
    load_rest: Callable[[], dict[str, LazyTensor]]
    licence: str

    def load(self, dtype: torch.dtype | None, resolution: int = 0) -> ModelBundle:
        """As ``OpenedModel.load``, at 1,024 pixels by default. Text encoders and VAE are read when they are first used,
        in fp32.
        """
        unet = build_unet(self.unet_config, self.tensors, dtype, str(self.weights))
        resolution = resolution or RESOLUTION
        size = (resolution, resolution)
        return ModelBundle(
            name=self.name,
            architecture=SDXL.name,
            denoiser=UNetDenoiser(unet, VPSchedule.sdxl(self.zero_terminal_snr, self.prediction_type)),
            conditioner=SDXLConditioner(self.load_text, self.load_tokenizers, size),
            codec=SDXLCodec(self.load_vae),
            latent_shape=(unet.config.in_channels, resolution // 8, resolution // 8),
            image_size=size,
            weights=self.weights,
            licence=self.licence,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def check(self, text: bool = True, codec: bool = True) -> None:
        """As ``OpenedModel.check``. The UNet was checked when it was opened."""
        if text:
            self.load_tokenizers()
            encoders = self.load_text(None)
            widths = (encoders.clip_l.config.hidden_size, encoders.clip_g.config.hidden_size)
            pooled = encoders.clip_g.config.projection_dim
            expected = self.unet_config["cross_attention_dim"]
            added = self.unet_config["projection_class_embeddings_input_dim"] - 6 * TIME_ID_WIDTH
            if sum(widths) != expected or pooled != added:
                raise ValueError(
                    f"{self.weights}: its UNet needs embeddings of {expected} and a pooled one of {added} numbers, but "
                    f"the text encoders give {widths[0]} + {widths[1]} and {pooled}"
                )
        if codec:
            self.load_vae(None)

    def is_lora(self, path: Path) -> bool:
        with reading(path, "a safetensors file"):
            return is_kohya(open_tensors(path))

    def read_lora(self, path: Path) -> Adapter:
        return read_lora(path, self.tensors, self.unet_config)


def check_resolution(resolution: int) -> None:
    if resolution % 64 or resolution < 0:
        raise ValueError(f"model.resolution: expected a multiple of 64, or 0 for the model's own, got {resolution}")


def open_sdxl(source: str, prediction_type: str = AUTO, asked_by: str = CONFIGURATION) -> SDXLParts:
    """The parts of an SDXL model, none of them read yet. ValueError for what is no SDXL model.

    prediction_type: what it predicts, where its files do not say it; ValueError that names ``asked_by`` where they say
        otherwise
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        return _from_file(path, prediction_type, asked_by)
    return _from_diffusers(source, prediction_type, asked_by)


def rest_of(source: str) -> Rest:
    """Text encoders and VAE of a model in any of the forms that ``open_sdxl`` takes; its UNet does not matter."""
    path = Path(source)
    return _rest_in_file(path) if path.exists() and not path.is_dir() else _rest_in_folder(find_folder(source))


def _predicts(stated: Stated, asked: str) -> PredictionType:
    return "v_prediction" if "v_prediction" in (stated.prediction_type, asked) else "epsilon"


# -- a single file -----------------------------------------------------------------------------------------------------


def open_pickled_sdxl(path: Path) -> SDXLParts:
    """The UNet in a pickled file (see ``open_pickled``), without text encoders and VAE."""
    return _from_file(path, AUTO, CONFIGURATION, open_pickled(path))


def _from_file(path: Path, asked: str, asked_by: str, pickled: Tensors | None = None) -> SDXLParts:
    with reading(path, "an SDXL model"):
        tensors = open_tensors(path) if pickled is None else pickled
        metadata = read_safetensors_metadata(path) if pickled is None else {}
        told = statements.of_tensors(tensors, shown(path)) + statements.of_settings(metadata, "its header", shown(path))
        stated = statements.combine(told, shown(path), asked, asked_by)
        prefix = UNET if any(name.startswith(UNET) for name in tensors) else ""
        unet = {name: tensor for name, tensor in _under(tensors, prefix).items() if name not in MARKERS}
        config, named = read_unet(unet, shown(path), prefix)
    return SDXLParts(
        name=metadata.get("modelspec.title") or path.stem,
        unet_config=config,
        tensors=named,
        prediction_type=_predicts(stated, asked),
        zero_terminal_snr=bool(stated.zero_terminal_snr),
        stated=stated,
        weights=path,
        licence=metadata.get("modelspec.license", ""),
        is_generator=has_recipe(metadata),
        **vars(_rest_in_file(path)),
    )


def _rest_in_file(path: Path) -> Rest:
    return Rest(
        load_text=partial(_text_from_file, path),
        load_tokenizers=sdxl_tokenizers,
        load_vae=partial(_vae_from_file, path),
        load_rest=lambda: {k: tensor for k, tensor in open_tensors(path).items() if k.startswith(REST)},
        read_from=(path,),
    )


def _under(tensors: Tensors, prefix: str) -> dict[str, LazyTensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _found(path: Path, prefix: str, what: str) -> dict[str, LazyTensor]:
    part = _under(open_tensors(path), prefix)
    if not part:
        raise ValueError(
            f"{path}: expected {what} under {prefix}*, but the file holds none. Use a whole checkpoint, or a cache of "
            "encoded prompts (python -m sid_train encode) where only the text encoders are missing."
        )
    return part


def _text_from_file(path: Path, dtype: torch.dtype | None = torch.float32) -> TextEncoders:
    with reading(path, "SDXL's text encoders"):
        clip_l = {TEXT + name: tensor for name, tensor in _found(path, CLIP_L, "CLIP-L").items()}
        clip_g = _found(path, CLIP_G, "OpenCLIP bigG")
        return TextEncoders(
            build_clip_l(clip_l, dtype, shown(path), CLIP_L.removesuffix(TEXT)),
            build_clip_g(clip_g, dtype, shown(path), CLIP_G),
        )


def _vae_from_file(path: Path, dtype: torch.dtype | None = torch.float32) -> AutoencoderKL:
    with reading(path, "SDXL's VAE"):
        return build_vae(read_vae(_found(path, VAE, "a VAE"), shown(path), VAE), dtype, shown(path))


def load_vae(path: Path) -> AutoencoderKL:
    """A VAE in a file of its own, fp32, in any of the forms that ``vae_tensors`` reads."""
    return build_vae(_under(vae_tensors(path), VAE), torch.float32, shown(path))


def vae_tensors(path: Path) -> dict[str, LazyTensor]:
    """A VAE's tensors named as in single files, from a file with such names, with bare ldm names or diffusers'."""
    with reading(path, "a VAE"):
        tensors = open_tensors(path)
        return {VAE + name: t for name, t in read_vae(_under(tensors, VAE) or tensors, shown(path)).items()}


# -- a diffusers folder ------------------------------------------------------------------------------------------------


def _from_diffusers(source: str, asked: str, asked_by: str) -> SDXLParts:
    folder = find_folder(source)
    scheduler, config_file = folder / SCHEDULER_FILE, folder / "unet" / "config.json"
    with reading(scheduler, "a scheduler's configuration"):
        told = statements.of_scheduler(read_settings(scheduler, folder), SCHEDULER_FILE, shown(folder))
    settings, file = read_settings(config_file, folder), weights_of(folder, "unet")
    with reading(file, "an SDXL model"):
        metadata = read_safetensors_metadata(file)
        told += statements.of_settings(metadata, f"the header of {file.name}", shown(folder))
        stated = statements.combine(told, shown(folder), asked, asked_by)
        config, tensors = read_unet(open_tensors(file), shown(file))
    with reading(config_file, "a UNet's configuration"):
        require_unet_config(config_file, settings, config)
    return SDXLParts(
        name=Path(source).name,
        unet_config=config,
        tensors=tensors,
        prediction_type=_predicts(stated, asked),
        zero_terminal_snr=bool(stated.zero_terminal_snr),
        stated=stated,
        weights=file,
        licence="",
        is_generator=has_recipe(metadata),
        **vars(_rest_in_folder(folder)),
    )


def _rest_in_folder(folder: Path) -> Rest:
    def vae(dtype: torch.dtype | None = torch.float32) -> AutoencoderKL:
        return build_vae(open_vae(folder), dtype, str(weights_of(folder, "vae")))

    return Rest(
        load_text=lambda dtype=torch.float32: load_text(folder, dtype),
        load_tokenizers=partial(load_tokenizers, folder),
        load_vae=vae,
        load_rest=lambda: rest_of_folder(folder),
        read_from=tuple(folder / name for name in (*WEIGHTS, *TOKENIZERS, "scheduler")),
    )
