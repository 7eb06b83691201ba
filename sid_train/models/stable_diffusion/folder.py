"""A diffusers folder, local or from the hub: the same checks as for a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from ...files.reading import SMALL_LIMIT, read_json, reading, require_file, shown
from ...files.tensors import LazyTensor, open_tensors
from ..family import Tensors
from .keys import HEAD_WIDTH, VAE, to_open_clip
from .kinds import Kind, TextEncoder
from .networks import (
    LATENT_CHANNELS,
    NOT_READ,
    PROJECTION,
    TEXT,
    build_text,
    read_vae,
)
from .text import TextEncoders, Tokenizers

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}
"""The file of each network, without its suffix. SD 1.x and 2.x have no second text encoder."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
SUFFIX, FP16_SUFFIX = ".safetensors", ".fp16.safetensors"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
# All that is read of a diffusers folder: those on the hub have the same weights in several files more.
INDEX_FILE = "model_index.json"
HUB_FILES = (
    INDEX_FILE,
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    *(f"{name}/config.json" for name in WEIGHTS),
    *(f"{name}/{file}{SUFFIX}" for name, file in WEIGHTS.items()),
)


def find_folder(source: str) -> Path:
    """A folder, or the local one of a hub id: its safetensors are downloaded if they are not there yet."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source) or source.endswith(SUFFIX):
        raise ValueError(
            f"model {source!r}: expected 'demo', a .safetensors file, a diffusers folder with model_index.json, or a "
            "hub id (owner/name); there is no such file or folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
        stated = read_settings(folder / INDEX_FILE, folder)
        networks = {name: file for name, file in WEIGHTS.items() if name in stated}
        if lacking := [f"{n}/{file}" for n, file in networks.items() if not (folder / n / f"{file}{SUFFIX}").is_file()]:
            snapshot_download(source, allow_patterns=[file + FP16_SUFFIX for file in lacking])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {source!r}: no such file here, and not to be had from the hub: {str(error).splitlines()[0]}"
        ) from None


def weights_of(folder: Path, network: str) -> Path:
    """A network's only safetensors file, the full-precision one where there are several; ValueError for other forms."""
    stem = folder / network / WEIGHTS[network]
    for suffix in (SUFFIX, FP16_SUFFIX):
        path = stem.with_name(stem.name + suffix)
        if path.exists():
            return path
    if sharded := sorted(stem.parent.glob(f"{stem.name}*.index*.json")):
        raise ValueError(
            f"{sharded[0]}: weights in several files are not read: load the model with diffusers and save it with "
            "save_pretrained(..., max_shard_size='20GB'), or use its single file"
        )
    raise ValueError(
        f"{folder}: expected {network}/{WEIGHTS[network]}{SUFFIX} (or {FP16_SUFFIX}), as a diffusers folder "
        "has; pickled weights (.bin) are not read"
    )


def read_settings(path: Path, folder: Path) -> dict[str, Any]:
    """The object in one of a folder's JSON files."""
    if not path.exists():
        raise ValueError(f"{path}: expected a diffusers folder, which has this file, in {folder}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {shown(settings, 60)}")
    return settings


def require_unet_config(path: Path, settings: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """ValueError where ``unet/config.json`` asks for another network than the one that files mean by such tensors: what
    it cannot say by names and shapes, no single file could say either.
    """
    usual = {name: p.default for name, p in signature(UNet2DConditionModel.__init__).parameters.items()}
    for key, value in settings.items():
        if key.startswith("_") or key not in usual or key in ("self", "sample_size", "upcast_attention"):
            continue
        expected = ours.get(key, usual[key])
        if "transformer_layers" in key:  # blocks without attention have numbers, too, which mean nothing
            continue
        if not _is_same(value, expected):
            raise ValueError(f"{path}: {key}: expected {shown(expected, 80)} with such tensors, got {shown(value, 80)}")


def _is_same(value: Any, expected: Any) -> bool:
    if not value and not expected:
        return True
    if isinstance(expected, tuple):
        return value == list(expected) or all(value == each for each in expected)
    if isinstance(value, list):
        return all(each == expected for each in value)
    return bool(value == expected)


def _require_settings(path: Path, settings: Mapping[str, Any], expected: Mapping[str, Any], kind: Kind) -> None:
    for key, ours in expected.items():
        value = settings.get(key)
        if value is not None and value != ours:
            people = kind.architecture.people
            raise ValueError(f"{path}: {key}: expected {shown(ours, 60)}, as {people} has, got {shown(value, 60)}")


# -- text encoders and VAE ---------------------------------------------------------------------------------------------

FILE_SETTINGS = ("vocab_file", "merges_file", "tokenizer_file")


def load_text(folder: Path, kind: Kind, dtype: torch.dtype | None) -> TextEncoders:
    """All text encoders; None leaves them on the meta device."""
    found = []
    for encoder in kind.encoders:
        tensors, where = _text_tensors(folder, encoder), str(weights_of(folder, encoder.folder))
        _require_text_config(folder, encoder, tensors, kind)
        found.append(build_text(encoder, tensors, dtype, where))
    return tuple(found)


def load_tokenizers(folder: Path, kind: Kind) -> Tokenizers:
    """That of each text encoder."""
    return tuple(_tokenizer(folder / encoder.tokenizer) for encoder in kind.encoders)


def _text_tensors(folder: Path, encoder: TextEncoder) -> dict[str, LazyTensor]:
    """By transformers 4's names: version 5 leaves the prefix out in one of the two."""
    tensors = open_tensors(weights_of(folder, encoder.folder))
    ends = (TEXT, PROJECTION, *NOT_READ)
    return {name if name.startswith(ends) else TEXT + name: tensor for name, tensor in tensors.items()}


def _require_text_config(folder: Path, encoder: TextEncoder, tensors: Tensors, kind: Kind) -> None:
    path = folder / encoder.folder / "config.json"
    embedding = tensors.get(f"{TEXT}embeddings.token_embedding.weight")
    heads = embedding.shape[1] // HEAD_WIDTH if embedding and len(embedding.shape) == 2 else None
    usual = {"hidden_act": encoder.activation, "layer_norm_eps": 1e-5, "num_attention_heads": heads}
    expected = {key: value for key, value in usual.items() if value}
    _require_settings(path, read_settings(path, folder), expected, kind)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a diffusers folder, which has this folder")
    for path in folder.iterdir():
        if not path.is_dir():
            require_file(path, SMALL_LIMIT)
    config = folder / "tokenizer_config.json"
    for key, name in (read_settings(config, folder) if config.exists() else {}).items():
        if key in FILE_SETTINGS and name is not None and Path(str(name)).name != name:
            raise ValueError(f"{config}: {key}: expected a file's name in the same folder, got {shown(name, 80)}")
    with reading(folder, "a CLIP tokenizer"):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def open_vae(folder: Path, kind: Kind) -> dict[str, LazyTensor]:
    """The VAE's tensors by ldm's names."""
    config, weights = folder / "vae" / "config.json", weights_of(folder, "vae")
    usual: dict[str, Any] = {"scaling_factor": kind.scaling_factor, "latent_channels": LATENT_CHANNELS}
    settings = read_settings(config, folder)
    _require_settings(config, settings, usual | {"act_fn": "silu", "norm_num_groups": 32}, kind)
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if settings.get(key):
            people = kind.architecture.people
            raise ValueError(f"{config}: {key}: expected none, as {people} has, got {shown(settings[key], 60)}")
    return read_vae(open_tensors(weights), str(weights))


def rest_of_folder(folder: Path, kind: Kind) -> dict[str, LazyTensor]:
    """Text encoders and VAE with the names of single files. They are checked first."""
    load_text(folder, kind, None)
    found: dict[str, LazyTensor] = {}
    for encoder in kind.encoders:
        tensors, prefix = _text_tensors(folder, encoder), encoder.prefixes[0]
        if not encoder.is_open_clip:
            found |= {prefix + name: tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
            continue
        read = {name: tensor.load_finite() for name, tensor in tensors.items()}
        where = str(weights_of(folder, encoder.folder))
        for name, tensor in to_open_clip(read).items():
            found[prefix + name] = LazyTensor.of(tensor, f"{where}: tensor {name}")
    return found | {VAE + name: tensor for name, tensor in open_vae(folder, kind).items()}
