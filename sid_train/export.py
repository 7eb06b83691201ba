"""What a user loads: a generator's safetensors file with its recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from .config import Config
from .core.recipe import SiDRecipe, TrainingGuidance
from .core.sampling import timestep_ladder
from .files import replacing
from .guidance import GuidanceStrategy
from .models.bundle import ModelBundle
from .models.unet import UNetDenoiser

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def make_recipe(config: Config, bundle: ModelBundle, iterations: int, images_seen: int) -> SiDRecipe:
    """The recipe of a generator that ``config`` distilled from ``bundle``."""
    method = config.method
    strategy = GuidanceStrategy.parse(method.guidance)
    return SiDRecipe(
        base_model=bundle.name,
        architecture=bundle.architecture,
        prediction_type=bundle.denoiser.prediction_type,
        zero_terminal_snr=bundle.zero_terminal_snr,
        unconditional=config.model.unconditional,
        timesteps=tuple(timestep_ladder(method.steps, method.t_init)),
        t_init=method.t_init,
        noise_mode=method.noise_mode,
        training_resolution=bundle.image_size,
        base_model_hash=bundle.file_hash,
        licence=bundle.licence,
        title=f"{bundle.name}, SiD {method.steps}-step",
        guidance=TrainingGuidance(strategy.name, strategy.fake_train, strategy.fake_eval, strategy.teacher),
        training_summary={
            "iterations": str(iterations),
            "images seen": str(images_seen),
            "batch size": str(config.training.batch_size),
            "matching": method.matching,
            "alpha": f"{method.alpha:g}",
            "generator learning rate": f"{config.optimizer.generator_lr:g}",
            "fake score learning rate": f"{config.optimizer.fake_score_lr:g}",
            "data": "real pairs with the Diffusion-GAN loss" if config.gan.enabled else "prompts only (data-free)",
            "started from": "a SiD generator" if config.model.init_generator else "the teacher",
        },
    )


def export_any(
    source: Path,
    path: Path,
    format_: str = "",
    dtype: str = "fp16",
    base: str | None = None,
    vae: Path | None = None,
    rank: int = 0,
    energy: float = 0,
    iteration: int = 0,
) -> tuple[SiDRecipe, list[str]]:
    """Writes the generator of a run's folder, or of an exported SDXL file, to ``path``: its recipe, and notes.

    ``iteration`` is that of a snapshot of the run; 0 is its last checkpoint.
    ``format_`` is one of ``sdxl_export.FORMATS``; by default a LoRA where the generator is one, else all in one file.
    """
    from .models.sdxl import open_sdxl
    from .sdxl_export import export, open_generator, open_run
    from .trainer import generator_file, load_run_config, load_run_generator

    if source.is_file():
        if iteration:
            raise ValueError("--iteration: only for a run's folder")
        generator = open_generator(source, base)
    else:
        config = load_run_config(source)
        if config.model.teacher == "demo":
            if dtype not in DTYPES or format_ not in ("", "checkpoint") or base or vae or rank or energy:
                raise ValueError("export: the demo's generators are written as a checkpoint in fp16, bf16 or fp32 only")
            bundle, recipe = load_run_generator(source, iteration)
            export_generator(path, bundle.denoiser, bundle, recipe, dtype)
            return recipe, []
        generator = open_run(generator_file(source, iteration), config)
        base = base or config.model.teacher
    format_ = format_ or ("lora" if generator.adapter else "checkpoint")
    compare = open_sdxl(base).unet if base and format_ == "lora" and not generator.adapter else None
    return generator.recipe, export(generator, path, format_, dtype, vae, rank, energy, compare)


def export_generator(
    path: Path, generator: UNetDenoiser, bundle: ModelBundle, recipe: SiDRecipe, dtype: str = "fp16"
) -> None:
    """Writes the generator, its text encoder and its recipe to one safetensors file."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    tensors = {f"unet.{k}": v for k, v in generator.unet.state_dict().items()}
    tensors |= {f"text_encoder.{k}": v for k, v in bundle.conditioner.state_dict().items()}
    tensors = {k: v.detach().to("cpu", DTYPES[dtype]).contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, recipe.to_metadata())
