"""What a run is made of: networks, optimizers, average, data and method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import Config, OptimizerConfig
from ..core.noise_schedule import NoiseSchedule
from ..core.recipe import SiDRecipe, has_recipe, split_architecture
from ..data.pairs import load_pairs
from ..data.rows import PromptTable, load_prompt_table
from ..files.header import read_safetensors_metadata
from ..files.tensors import DTYPES
from ..method.base import Method, Setting
from ..method.methods import METHODS
from ..models.adapters import Adapter
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning, PairSource
from ..models.denoiser import Denoiser, Network
from ..models.families import load_model
from ..models.family import OpenedModel
from ..models.networks import TEACHER, Networks, build_networks
from .distributed import is_sharded, on_first_rank, placement
from .ema import EMA
from .run import RunFolder
from .teacher import open_teacher


@dataclass
class Parts:
    """A run's parts, each where it computes.

    networks, optimizers: those that are trained, by role; data-parallel wrappers are around the networks where there
        are several processes
    """

    bundle: ModelBundle
    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: EMA
    teacher: Denoiser
    prompts: PromptTable
    pairs: PairSource | None
    method: Method


def set_up(config: Config, accelerator: Accelerator, folder: RunFolder) -> Parts:
    """Builds all of it. ValueError for what the configuration asks and the files do not give."""
    training, data = config.training, config.data
    # Only adapters leave the network as it is; whole networks start from fp32 copies.
    dtype = DTYPES[config.model.frozen_dtype] if config.adapter.rank else torch.float32
    model = open_teacher(config.model)
    require_diffusion_model(model, config)
    bundle = model.load(dtype, config.model.resolution)
    bundle.file_hash = on_first_rank(accelerator, lambda: folder.sha256(bundle.weights))
    built = build_networks(
        bundle.denoiser,
        load_init_generator(config, model),
        config.adapter,
        config.model.frozen_dtype,
        training.gradient_checkpointing,
        placement(accelerator, training),
        METHODS[config.method.kind].trained,
    )
    ema = make_ema(config.optimizer, built.generator_ema)
    networks: dict[str, nn.Module] = dict(built.trained)
    optimizers = {role: make_adam(config.optimizer, role, network) for role, network in networks.items()}
    if not is_sharded(accelerator, training):
        prepared = accelerator.prepare(*networks.values(), *optimizers.values())
        networks = dict(zip(networks, prepared, strict=False))
        optimizers = dict(zip(optimizers, prepared[len(networks) :], strict=True))
    bundle.conditioner.max_tokens = data.max_tokens
    bundle.conditioner.to(accelerator.device)
    bundle.codec.to(accelerator.device)
    report = accelerator.is_main_process
    prompts = load_prompt_table(data, bundle, config.model.unconditional, accelerator.device, report)
    pairs = load_pairs(data.pairs, bundle, data.buckets, data.cache, report) if data.pairs else None
    method = make_method(
        config, built, bundle.denoiser.schedule, prompts.unconditional, bundle.latent_shape, wrapped=networks
    )
    return Parts(bundle, networks, optimizers, ema, built.teacher, prompts, pairs, method)


def make_method(
    config: Config,
    networks: Networks,
    schedule: NoiseSchedule,
    unconditional: Conditioning,
    latent_shape: tuple[int, ...],
    wrapped: Mapping[str, Network],
) -> Method:
    """The method that ``method.kind`` names, over ``networks``; ``wrapped``: the trained ones, as they are called."""
    setting = Setting(
        networks={**wrapped, TEACHER: networks.teacher},
        unwrapped=networks.trained,
        schedule=schedule,
        unconditional=unconditional,
        latent_shape=latent_shape,
        config=config,
    )
    return METHODS[config.method.kind].build(setting)


def make_ema(config: OptimizerConfig, average: Denoiser) -> EMA:
    return EMA(average, config.ema_halflife_images, config.ema_rampup)


def make_adam(config: OptimizerConfig, role: str, network: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of one network; ``options`` go to PyTorch's Adam."""
    betas = (float(config.beta1), float(config.beta2))
    lr = learning_rate(config, role)
    return adam_class(config.kind)(network.parameters(), lr=lr, betas=betas, eps=config.eps, **options)


def learning_rate(config: OptimizerConfig, role: str) -> float:
    """The peak learning rate of a network: the generator's, or that of whatever learns beside it."""
    return config.generator_lr if role == "generator" else config.fake_score_lr


def adam_class(kind: str) -> Callable[..., torch.optim.Optimizer]:
    if kind == "adam":
        return torch.optim.Adam
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimizer.kind: adam8bit needs: pip install bitsandbytes") from None
    return bitsandbytes.optim.Adam8bit


def require_diffusion_model(teacher: OpenedModel, config: Config) -> None:
    """ValueError for a teacher that is a few-step generator itself."""
    if teacher.is_generator:
        raise ValueError(f"model.teacher: {config.model.teacher} is a few-step generator: expected a diffusion model")


def load_init_generator(config: Config, teacher: OpenedModel) -> Denoiser | Adapter | None:
    """What the generator starts from (SiD2a): an adapter where adapters are trained, else a whole network. None where
    it starts from the teacher.
    """
    source, where = config.model.init_generator, "model.init_generator"
    if not source:
        return None
    path = Path(source)
    metadata = read_safetensors_metadata(path) if path.is_file() else {}
    if not has_recipe(metadata):
        raise ValueError(f"{where}: {source} carries no SiD recipe: expected a SiD generator")
    # Model managers drop modelspec.*, without which a recipe is SDXL's: what is in the file says whether it is a LoRA.
    recipe = SiDRecipe.from_metadata(metadata, path)
    architecture, _ = split_architecture(recipe.architecture)
    if architecture != teacher.architecture:
        raise ValueError(
            f"{where}: expected the teacher's architecture {teacher.architecture}, got {architecture} in {source}"
        )
    is_lora = teacher.is_lora(path)
    if bool(config.adapter.rank) != is_lora:
        wanted = (
            "a LoRA, since adapters are trained" if config.adapter.rank else "a whole generator (adapter.rank is 0)"
        )
        raise ValueError(f"{where}: expected {wanted}, got {source}")
    bundle = teacher.load(None, config.model.resolution)
    ours = (bundle.denoiser.schedule.prediction_type, bundle.zero_terminal_snr)
    if (recipe.prediction_type, recipe.zero_terminal_snr) != ours:
        raise ValueError(
            f"{where}: expected a generator that predicts {ours[0]}{', zero terminal SNR' * ours[1]}, as the teacher "
            f"does, got {recipe.prediction_type}{', zero terminal SNR' * recipe.zero_terminal_snr} in {source}"
        )
    if recipe.timestep_scale != 1:
        raise ValueError(f"{where}: expected a generator that is told the timesteps that it is at, not scaled ones")
    return teacher.read_lora(path) if is_lora else load_model(source).denoiser
