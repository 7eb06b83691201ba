"""Distilled SDXL generators as the files that ComfyUI, diffusers and other tools load.

Everything is read, changed and written one tensor after another: no file is ever in memory as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from .checkpoint import open_network, read_network
from .config import Config
from .core.recipe import SDXL_ARCHITECTURE, SiDRecipe, has_recipe, read_safetensors_metadata
from .models.adapters import Adapter, adapter_from_state, lora_difference
from .models.bundle import ModelBundle, load_model
from .models.sdxl import (
    MARKERS,
    REST,
    SDXLParts,
    check_resolution,
    load_vae,
    make_bundle,
    open_sdxl,
    vae_tensors,
)
from .models.sdxl_keys import UNET, VAE, invert, kohya_name, rename, unet_modules
from .tensors import LazyTensor, open_tensors, write_tensors
from .trainer import read_run_recipe

Tensors = Mapping[str, LazyTensor]
FORMATS = ("checkpoint", "unet", "lora", "diffusers")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LORA_UP, LORA_DOWN, LORA_ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


@dataclass
class Generator:
    """A distilled SDXL generator that is not in memory.

    unet: its tensors with diffusers' names, an adapter not included
    adapter: a LoRA to go on top of ``unet``, where it was distilled as one
    """

    config: dict[str, Any]
    unet: Tensors
    recipe: SiDRecipe
    parts: SDXLParts
    adapter: Adapter | None = None

    def merged(self) -> Tensors:
        """The UNet with its adapter, fp32 where the adapter changes it."""
        return merge_lora(self.unet, self.adapter) if self.adapter else self.unet


def merge_lora(unet: Tensors, adapter: Adapter) -> Tensors:
    """``unet`` with ``up @ down`` added to the weights of the adapter's modules; ValueError if one is not there."""
    merged = dict(unet)
    for module, factors in adapter.items():
        name = f"{module}.weight"
        if name not in merged:
            raise ValueError(f"LoRA module {module}: expected a module of this UNet, which has none of that name")
        merged[name] = _added(merged[name], factors)
    return merged


def _added(weight: LazyTensor, factors: tuple[Tensor, Tensor, float]) -> LazyTensor:
    return LazyTensor(weight.shape, torch.float32, lambda: weight.load().float() + lora_difference(*factors))


def kohya_modules(unet: Tensors, config: Mapping[str, Any]) -> dict[str, str]:
    """``{diffusers' name: kohya's name}`` of every module with a weight in a UNet."""
    modules = [name.removesuffix(".weight") for name in unet if name.endswith(".weight")]
    return {ours: kohya_name(ldm) for ours, ldm in rename(modules, unet_modules(config)).items()}


def read_lora(path: Path, unet: Tensors, config: Mapping[str, Any]) -> Adapter:
    """A kohya LoRA file for ``unet``, by diffusers' module names; ValueError for modules that it does not have."""
    tensors = open_tensors(path)
    ours = invert(kohya_modules(unet, config))
    adapter: Adapter = {}
    for name in tensors:
        module = name.removesuffix(LORA_DOWN)
        if module == name:
            continue
        if module not in ours:
            raise ValueError(f"{path}: module {module}: expected kohya's name of a module of this UNet")
        down, up = tensors[name].load(), tensors[module + LORA_UP].load()
        alpha = tensors.get(module + LORA_ALPHA)
        adapter[ours[module]] = (down, up, float(alpha.load()) if alpha else float(len(down)))
    if not adapter:
        raise ValueError(
            f"{path}: expected a kohya LoRA (lora_unet_...{LORA_DOWN}), got {next(iter(tensors), 'nothing')}"
        )
    return adapter


# -- where a generator comes from --------------------------------------------------------------------------------------


def open_run(path: Path, config: Config) -> Generator:
    """The averaged generator in a checkpoint of a run with this ``config`` (see ``trainer.generator_file``)."""
    bundle = load_model(config.model.teacher, None, config.model.resolution)
    recipe = read_run_recipe(path, config, bundle)
    parts = open_sdxl(config.model.teacher)
    if config.adapter.rank:
        adapter = adapter_from_state(read_network(path, "generator_ema"))
        return Generator(parts.unet_config, parts.unet, recipe, parts, adapter)
    unet = {name.removeprefix("unet."): tensor for name, tensor in open_network(path, "generator_ema").items()}
    return Generator(parts.unet_config, unet, recipe, parts)


def open_generator(path: Path, base: str | None = None) -> Generator:
    """An exported file with a recipe: a checkpoint, a UNet, or a LoRA, which needs its ``base``.

    ``base`` also has text encoders and VAE for a file without them.
    """
    metadata = read_safetensors_metadata(path)
    if not has_recipe(metadata):
        raise ValueError(
            f"{path}: expected a SiD generator, but it carries no recipe. Give it one: python -m sid_train convert"
        )
    recipe = SiDRecipe.from_metadata(metadata, path)
    names = open_tensors(path)
    if any(name.startswith("lora_unet_") for name in names):
        if base is None:
            raise ValueError(f"{path}: a LoRA needs the model that it belongs on: give it as --base")
        parts, recipe = open_sdxl(base), replace(recipe, architecture=SDXL_ARCHITECTURE)
        return Generator(parts.unet_config, parts.unet, recipe, parts, read_lora(path, parts.unet, parts.unet_config))
    parts = open_sdxl(str(path))
    if base is not None:
        other = open_sdxl(base)
        parts = replace(parts, load_text=other.load_text, load_vae=other.load_vae, load_rest=other.load_rest)
    return Generator(parts.unet_config, parts.unet, recipe, parts)


def load_sdxl_generator(path: Path, base: str | None, resolution: int = 0) -> tuple[ModelBundle, SiDRecipe]:
    """An exported file as ``models.bundle.load_generator`` returns it."""
    check_resolution(resolution)
    generator = open_generator(path, base)
    parts = replace(generator.parts, unet=generator.merged())
    bundle = make_bundle(parts, torch.float32, resolution or generator.recipe.training_resolution[0])
    bundle.recipe = generator.recipe
    return bundle, generator.recipe


# -- files -------------------------------------------------------------------------------------------------------------


def export(
    generator: Generator,
    path: Path,
    format_: str,
    dtype: str,
    vae: Path | None = None,
    rank: int = 0,
    energy: float = 0,
    base: Tensors | None = None,
) -> list[str]:
    """Writes ``generator`` to ``path`` in one of ``FORMATS``; returns what the user should know.

    ``rank`` and ``energy`` are for ``lora`` where the generator is a whole UNet (see ``extract_lora``).
    """
    if format_ == "diffusers":
        if dtype == "fp8":
            raise ValueError("--dtype: diffusers reads fp16, bf16 and fp32, not fp8")
    elif path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if vae is not None and format_ in ("unet", "lora"):
        raise ValueError(f"--vae: the format {format_} holds none")
    if (rank or energy) and (format_ != "lora" or generator.adapter):
        raise ValueError("--rank, --energy: only for a LoRA that is extracted from a whole UNet")
    if format_ == "lora":
        notes: list[str] = []
        adapter = generator.adapter
        if adapter is None:
            if base is None:
                raise ValueError("--base: expected the model that a LoRA is to be extracted against")
            adapter, notes = extract_lora(generator.unet, base, rank, energy)
        export_lora(path, generator, adapter, DTYPES[dtype])
        return notes
    if format_ == "unet":
        export_unet(path, generator, DTYPES[dtype])
    elif format_ == "checkpoint":
        export_checkpoint(path, generator, DTYPES[dtype], vae)
    else:
        export_diffusers(path, generator, DTYPES[dtype], vae)
    return []


def export_unet(path: Path, generator: Generator, dtype: torch.dtype) -> None:
    """The UNet alone with bare ldm names: ComfyUI loses ``v_pred`` and ``ztsnr`` under a prefix."""
    write_tensors(
        path, _unet_tensors(generator, dtype, "") | _markers(generator.recipe), generator.recipe.to_metadata()
    )


def export_checkpoint(path: Path, generator: Generator, dtype: torch.dtype, vae: Path | None = None) -> None:
    """UNet, text encoders and VAE in one file. What is not the UNet keeps its type, fp32 becoming fp16 unless ``dtype``
    is fp32: as SDXL's own files are stored.
    """
    rest = _rest(generator, dtype, vae)
    tensors = _unet_tensors(generator, dtype, UNET) | rest | _markers(generator.recipe)
    write_tensors(path, tensors, generator.recipe.to_metadata())


def export_lora(path: Path, generator: Generator, adapter: Adapter, dtype: torch.dtype) -> None:
    """An adapter with kohya's names, which ComfyUI, diffusers and the web UIs read."""
    if dtype == torch.float8_e4m3fn:
        raise ValueError("--dtype: a LoRA is stored in fp16, bf16 or fp32, not fp8")
    names = kohya_modules(generator.parts.unet, generator.config)
    tensors = {}
    for module, (down, up, alpha) in adapter.items():
        if up.ndim < down.ndim:  # a convolution's second factor is 1x1
            up = up.reshape(*up.shape, 1, 1)
        tensors[names[module] + LORA_DOWN] = LazyTensor.of(down.to(dtype))
        tensors[names[module] + LORA_UP] = LazyTensor.of(up.to(dtype))
        tensors[names[module] + LORA_ALPHA] = LazyTensor.of(torch.tensor(alpha, dtype=dtype))
    ranks = sorted({len(down) for down, _, _ in adapter.values()})
    rank = str(ranks[-1]) if len(ranks) == 1 else "Dynamic"
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    metadata = generator.recipe.to_metadata() | about
    metadata["modelspec.architecture"] += "/lora"
    write_tensors(path, tensors, metadata)


def export_diffusers(path: Path, generator: Generator, dtype: torch.dtype, vae: Path | None = None) -> None:
    """A folder that diffusers' ``StableDiffusionXLPipeline.from_pretrained`` reads, the recipe in its UNet's file."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    if path.exists():
        raise ValueError(f"{path}: expected a folder that does not exist yet")
    parts, recipe = generator.parts, generator.recipe
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        text = parts.load_text()
        kept = dtype if dtype != torch.bfloat16 else torch.float16
        with torch.device("meta"):
            unet = UNet2DConditionModel(**generator.config)
        pipeline = StableDiffusionXLPipeline(
            vae=(parts.load_vae() if vae is None else load_vae(vae)).to(kept),
            text_encoder=text.clip_l.to(kept),
            text_encoder_2=text.clip_g.to(kept),
            tokenizer=text.tokenizers[0],
            tokenizer_2=text.tokenizers[1],
            unet=None,
            scheduler=DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type=recipe.prediction_type,
                rescale_betas_zero_snr=recipe.zero_terminal_snr,
                timestep_spacing="trailing",
                clip_sample=False,
            ),
        )
        pipeline.save_pretrained(folder)
        unet.save_config(folder / "unet")
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        tensors = {name: tensor.to(dtype) for name, tensor in generator.merged().items()}
        write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", tensors, recipe.to_metadata())
        folder.chmod(0o755)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unet_tensors(generator: Generator, dtype: torch.dtype, prefix: str) -> dict[str, LazyTensor]:
    unet = generator.merged()
    names = rename(unet, unet_modules(generator.config))
    return {prefix + names[name]: tensor.to(_stored(tensor, dtype)) for name, tensor in unet.items()}


def _stored(tensor: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    """fp8 is for matrices and kernels alone; norms and biases need fp16."""
    return torch.float16 if dtype == torch.float8_e4m3fn and len(tensor.shape) < 2 else dtype


def _rest(generator: Generator, dtype: torch.dtype, vae: Path | None) -> dict[str, LazyTensor]:
    rest = generator.parts.load_rest()
    if vae is not None:
        rest = {k: t for k, t in rest.items() if not k.startswith(VAE)} | vae_tensors(vae)
    missing = [prefix for prefix in REST if not any(name.startswith(prefix) for name in rest)]
    if missing:
        raise ValueError(
            f"checkpoint: expected text encoders (conditioner.*) and a VAE (first_stage_model.*), but {missing[0]}* is "
            "missing in the model's file: give a whole checkpoint as --base, or --vae, or export --format unet"
        )
    shrink = dtype != torch.float32
    return {k: t.to(torch.float16) if shrink and t.dtype == torch.float32 else t for k, t in rest.items()}


def _markers(recipe: SiDRecipe) -> dict[str, LazyTensor]:
    """The empty tensors by which ComfyUI knows a v-prediction model and a zero-terminal-SNR schedule."""
    wanted = (recipe.prediction_type == "v_prediction", recipe.zero_terminal_snr)
    return {name: LazyTensor.of(torch.zeros(0)) for name, is_so in zip(MARKERS, wanted, strict=True) if is_so}


# -- changing what is there --------------------------------------------------------------------------------------------


def extract_lora(distilled: Tensors, base: Tensors, rank: int = 0, energy: float = 0) -> tuple[Adapter, list[str]]:
    """The LoRA nearest to ``distilled - base`` in the least-squares sense, and lines that report its error.

    rank: of every module; or energy: the share of each module's squared difference that is to be kept, which then
    decides its rank. Norms and biases cannot be in a LoRA; the report says how large their part is.
    """
    if bool(rank) == bool(energy) or rank < 0 or not 0 <= energy <= 1:
        raise ValueError(
            "LoRA extraction: expected --rank (1 or more) or --energy (above 0, at most 1), one of the two"
        )
    adapter: Adapter = {}
    total = lost = left_out = 0.0
    worst: tuple[float, str] = (0.0, "")
    for name, tensor in distilled.items():
        difference = tensor.load().float() - base[name].load().float()
        size = float(difference.double().square().sum())
        total += size
        if difference.ndim < 2:
            left_out += size
            continue
        if not size:
            continue
        module = name.removesuffix(".weight")
        down, up, error = _factors(difference, rank, energy)
        adapter[module] = (down, up, float(len(down)))
        lost += error
        worst = max(worst, ((error / size) ** 0.5, module))
    if not adapter:
        raise ValueError("LoRA extraction: the distilled UNet equals its base: there is nothing to extract")
    ranks = [len(down) for down, _, _ in adapter.values()]
    return adapter, [
        f"{len(adapter)} modules, rank {min(ranks)} to {max(ranks)}",
        f"relative error {((lost + left_out) / total) ** 0.5:.4f} (root of the lost share of the squared difference)",
        f"worst module: {worst[1]}, {worst[0]:.4f}",
        f"norms and biases, which a LoRA cannot hold: {(left_out / total) ** 0.5:.4f}",
    ]


def _factors(difference: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor, float]:
    """down, up and the squared error of the best factorisation.

    The left singular vectors come from the smaller Gram matrix, in fp64: much faster than a singular value
    decomposition of SDXL's widest matrices, and down = up^T @ difference makes the product an exact projection.
    """
    matrix = difference.flatten(1)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(wide.double() @ wide.double().T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if energy:
        kept = values.cumsum(0) / values.sum()
        rank = int((kept < energy).sum()) + 1
    basis = vectors[:, :rank].float()
    inner = basis.T @ wide
    if wide is matrix:
        down, up = inner, basis
    else:
        down, up = basis.T, inner.T
    error = float((up @ down - matrix).double().square().sum())
    return down.reshape(-1, *difference.shape[1:]).contiguous(), up.contiguous(), error


def convert_unet(source: Path, path: Path, recipe: SiDRecipe, dtype: str) -> SiDRecipe:
    """A UNet without a recipe, with diffusers' names (as DMD2 publishes) or ldm's, as a UNet file with ``recipe``."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if has_recipe(read_safetensors_metadata(source)):
        raise ValueError(f"{source}: it carries a recipe already; python -m sid_train inspect shows it")
    parts = open_sdxl(str(source))
    facts = {"prediction_type": parts.prediction_type, "zero_terminal_snr": parts.zero_terminal_snr}
    recipe = replace(recipe, **facts, title=source.stem)
    export_unet(path, Generator(parts.unet_config, parts.unet, recipe, parts), DTYPES[dtype])
    return recipe
