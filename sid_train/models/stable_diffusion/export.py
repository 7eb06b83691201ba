"""Distilled generators as the files that ComfyUI, diffusers and other tools load.

Everything is read, changed and written one tensor after another: no file is ever in memory as a whole.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.noise_schedule import X0
from ...core.recipe import SiDRecipe, has_recipe, split_architecture
from ...files.atomic import replacing_folder
from ...files.hashing import file_sha256
from ...files.header import read_safetensors_metadata
from ...files.pickles import is_pickle
from ...files.tensors import DTYPES, LazyTensor, write_tensors
from ..family import ExportOptions, Generator, refuse_to_overwrite
from ..lora import extract_lora, is_kohya, write_lora
from .keys import UNET, VAE, rename, unet_modules
from .kinds import SDXL_KIND, kind_named
from .lora import kohya_modules
from .parts import MARKERS, StableDiffusionParts, load_vae, open_parts, open_pickled_parts, rest_of, vae_tensors

FORMATS = ("checkpoint", "unet", "lora", "diffusers")


# -- where a generator comes from --------------------------------------------------------------------------------------


def open_exported(path: Path, recipe: SiDRecipe, base: str | None = None) -> Generator:
    """An exported file: a checkpoint, a UNet, or a LoRA, which needs its ``base``.

    ``base`` also has text encoders and VAE for a file without them.
    """
    if is_kohya(path):
        if base is None:
            raise ValueError(f"{path}: a LoRA needs the model that it belongs on: give it as --base")
        recipe = replace(recipe, architecture=split_architecture(recipe.architecture)[0])
        parts = _base_of(base, recipe, path)
        return Generator(parts, recipe, parts.tensors, parts.read_lora(path), source=path)
    parts = open_parts(str(path))
    _require_kind(parts, recipe, f"its recipe ({path})")
    if base is not None:
        rest = rest_of(base, parts.kind)
        parts = replace(parts, **vars(replace(rest, read_from=(path, *rest.read_from))))
    return Generator(parts, recipe, parts.tensors, source=path)


def _require_kind(parts: StableDiffusionParts, recipe: SiDRecipe, said_by: str) -> None:
    """ValueError for a model of another generation than the recipe is for."""
    wanted = kind_named(recipe.architecture)
    if parts.kind is not wanted:
        got, expected = parts.kind.architecture.people, wanted.architecture.people
        raise ValueError(f"{parts.weights}: it is a model of {got}, but {said_by} is for {expected}")


def _base_of(base: str, recipe: SiDRecipe, lora: Path) -> StableDiffusionParts:
    """The model under a LoRA, seen as the recipe says. ValueError where it is said to be another kind of model.

    A model that does not say what it is counts as epsilon on the usual schedule, as everywhere; but it may be the very
    one whose kind the run's configuration said.
    """
    parts = open_parts(base, recipe.prediction_type, f"the recipe of {lora}")
    _require_kind(parts, recipe, f"the recipe of {lora}")
    stated, wanted = parts.stated, recipe.zero_terminal_snr
    if stated.zero_terminal_snr is not None and stated.zero_terminal_snr != wanted:
        raise ValueError(
            f"{base}: its schedule is {_schedule(not wanted)}, but the recipe of {lora} says {_schedule(wanted)}: give "
            f"the model that the LoRA was distilled from, {recipe.base_model}"
        )
    unsaid = [
        said
        for said, is_missing in (
            (recipe.prediction_type, stated.prediction_type is None and recipe.prediction_type != "epsilon"),
            (_schedule(True), stated.zero_terminal_snr is None and wanted),
        )
        if is_missing
    ]
    if unsaid and recipe.base_model_hash and file_sha256(parts.weights) != recipe.base_model_hash:
        raise ValueError(
            f"{base}: it does not say that it is a model with {unsaid[0]}, as the recipe of {lora} needs, and it is "
            f"not the very file that the LoRA was distilled from: give that one, {recipe.base_model}"
        )
    return replace(parts, zero_terminal_snr=wanted)


def _schedule(zero_terminal_snr: bool) -> str:
    return "zero terminal SNR" if zero_terminal_snr else "a last step that keeps some signal"


def parts_of(generator: Generator) -> StableDiffusionParts:
    assert isinstance(generator.model, StableDiffusionParts)
    return generator.model


# -- files -------------------------------------------------------------------------------------------------------------


def export(generator: Generator, path: Path, options: ExportOptions) -> list[str]:
    """Writes ``generator`` to ``path`` in one of ``FORMATS``; returns what the user should know."""
    format_, dtype = options.format, DTYPES[options.dtype]
    if format_ == "diffusers":
        if options.dtype == "fp8":
            raise ValueError("--dtype: diffusers reads fp16, bf16 and fp32, not fp8")
    elif path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if options.vae is not None and format_ in ("unet", "lora"):
        raise ValueError(f"--vae: the format {format_} holds none")
    if (options.rank or options.energy) and (format_ != "lora" or generator.adapter):
        raise ValueError("--rank, --energy: only for a LoRA that is extracted from a whole UNet")
    if format_ == "lora":
        notes: list[str] = []
        adapter = generator.adapter
        if adapter is None:
            if options.base is None:
                raise ValueError("--base: expected the model that a LoRA is to be extracted against")
            adapter, notes = extract_lora(generator.tensors, options.base.tensors, options.rank, options.energy)
        parts = parts_of(generator)
        write_lora(path, generator, adapter, kohya_modules(parts.tensors, parts.unet_config), dtype)
        return notes
    if format_ == "unet":
        export_unet(path, generator, dtype)
    elif format_ == "checkpoint":
        export_checkpoint(path, generator, dtype, options.vae)
    else:
        export_diffusers(path, generator, dtype, options.vae)
        if generator.recipe.timestep_scale != 1:
            return ["diffusers has no scheduler that tells the network scaled timesteps, as this generator needs"]
    return []


def export_unet(path: Path, generator: Generator, dtype: torch.dtype) -> None:
    """The UNet alone with bare ldm names: ComfyUI loses ``v_pred`` and ``ztsnr`` under a prefix."""
    write_tensors(path, _unet_tensors(generator, dtype, "") | _markers(generator), generator.metadata())


def export_checkpoint(path: Path, generator: Generator, dtype: torch.dtype, vae: Path | None = None) -> None:
    """UNet, text encoders and VAE in one file. What is not the UNet keeps its type, fp32 becoming fp16 unless ``dtype``
    is fp32: as SDXL's own files are stored.
    """
    rest = _rest(generator, dtype, vae)
    tensors = _unet_tensors(generator, dtype, UNET) | rest | _markers(generator)
    write_tensors(path, tensors, generator.metadata())


def export_diffusers(path: Path, generator: Generator, dtype: torch.dtype, vae: Path | None = None) -> None:
    """A folder that diffusers' ``DiffusionPipeline.from_pretrained`` reads, the recipe in its UNet's file."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    if path.exists():
        raise ValueError(f"{path}: expected a folder that does not exist yet")
    parts, recipe = parts_of(generator), generator.recipe
    kept = dtype if dtype != torch.bfloat16 else torch.float16
    autoencoder = parts.load_vae() if vae is None else load_vae(vae, parts.kind)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**parts.unet_config)
    networks: dict[str, Any] = {
        name: part
        for encoder, model, tokenizer in zip(
            parts.kind.encoders, parts.load_text(), parts.load_tokenizers(), strict=True
        )
        for name, part in ((encoder.folder, _narrow(model, kept)), (encoder.tokenizer, tokenizer))
    }
    if parts.kind is not SDXL_KIND:
        networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = (StableDiffusionXLPipeline if parts.kind is SDXL_KIND else StableDiffusionPipeline)(
        **networks,
        vae=_narrow(autoencoder, kept),
        unet=None,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="sample" if recipe.prediction_type == X0 else recipe.prediction_type,
            rescale_betas_zero_snr=recipe.zero_terminal_snr,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=0 if parts.kind is SDXL_KIND else 1,  # with such a spacing nothing reads it
        ),
    )
    with replacing_folder(path) as folder:
        pipeline.save_pretrained(folder)
        unet.save_config(folder / "unet")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.narrowed(dtype) for name, tensor in generator.merged().items()}
        write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", tensors, generator.metadata())


def _narrow(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In ``dtype``; ValueError for weights that it cannot hold."""
    for name, parameter in network.named_parameters():
        parameter.data = LazyTensor.of(parameter.data, f"{type(network).__name__}: {name}").narrowed(dtype).load()
    return network.to(dtype)


def _unet_tensors(generator: Generator, dtype: torch.dtype, prefix: str) -> dict[str, LazyTensor]:
    unet = generator.merged()
    names = rename(unet, unet_modules(parts_of(generator).unet_config))
    return {prefix + names[name]: tensor.narrowed(_stored(tensor, dtype)) for name, tensor in unet.items()}


def _stored(tensor: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    """fp8 is for matrices and kernels alone; norms and biases need fp16."""
    return torch.float16 if dtype == torch.float8_e4m3fn and len(tensor.shape) < 2 else dtype


def _rest(generator: Generator, dtype: torch.dtype, vae: Path | None) -> dict[str, LazyTensor]:
    rest = dict(parts_of(generator).load_rest())
    if vae is not None:
        rest = {k: t for k, t in rest.items() if not k.startswith(VAE)} | vae_tensors(vae)
    needed = [*(encoder.prefixes for encoder in parts_of(generator).kind.encoders), (VAE,)]
    if missing := [prefixes[0] for prefixes in needed if not any(name.startswith(prefixes) for name in rest)]:
        people = parts_of(generator).kind.architecture.people
        names = ", ".join(f"{prefixes[0]}*" for prefixes in needed)
        raise ValueError(
            f"checkpoint: expected the text encoders and the VAE of {people} ({names}), but {missing[0]}* is missing "
            f"in the model's file: give a whole checkpoint of {people} as --base, or --vae, or export --format unet"
        )
    shrink = dtype != torch.float32
    return {
        name: tensor.narrowed(torch.float16 if shrink and tensor.dtype == torch.float32 else tensor.dtype)
        for name, tensor in rest.items()
    }


def _markers(generator: Generator) -> dict[str, LazyTensor]:
    """The empty tensors by which ComfyUI knows a v-prediction model and a zero-terminal-SNR schedule, if it does."""
    recipe = generator.recipe
    if not parts_of(generator).kind.has_markers:
        return {}
    wanted = (recipe.prediction_type == "v_prediction", recipe.zero_terminal_snr)
    return {name: LazyTensor.of(torch.zeros(0)) for name, is_so in zip(MARKERS, wanted, strict=True) if is_so}


def open_network(path: Path) -> StableDiffusionParts:
    """A UNet without a recipe, in a safetensors file or a pickled one, with diffusers' names or ldm's."""
    if is_pickle(path):
        return open_pickled_parts(path)
    if has_recipe(read_safetensors_metadata(path)):
        raise ValueError(f"{path}: it carries a recipe already; python -m sid_train inspect shows it")
    return open_parts(str(path))


def convert_unet(
    parts: StableDiffusionParts, path: Path, recipe: SiDRecipe, dtype: str, base: str | None = None
) -> None:
    """Writes a UNet with ``recipe``, which says what it predicts: alone, or as a checkpoint with what ``base`` has."""
    if base is not None:
        parts = replace(parts, **vars(rest_of(base, parts.kind)))
    refuse_to_overwrite(path, [parts.weights, *parts.read_from])
    generator = Generator(parts, recipe, parts.tensors)
    if base is None:
        export_unet(path, generator, DTYPES[dtype])
    else:
        export_checkpoint(path, generator, DTYPES[dtype])
