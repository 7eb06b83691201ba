"""What is evaluated: something that makes pictures of prompts, each from its own noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.recipe import SiDRecipe, has_recipe
from ..core.sampling import initial_noise
from ..files.hashing import file_sha256
from ..files.header import read_safetensors_metadata
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning
from ..models.families import load_opened, open_generator, open_model
from ..models.family import Generator, OpenedModel
from ..models.guided import guided_denoise
from ..sample import pictures_at_once, sample_latents, sample_teacher_latents
from ..training.run import RunFolder


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; what is None is the source's own.

    steps: network calls in time; of a model that is not distilled, those of DPM-Solver++ (2M)
    cfg: classifier-free guidance at sampling time
    iteration: of a run's snapshots; 0 is its last checkpoint
    """

    steps: int | None = None
    cfg: float | None = None
    base: str | None = None
    resolution: int = 0
    iteration: int = 0
    dtype: torch.dtype = torch.float32


class Source:
    """A model in memory, with the sampler that it is for.

    told: what is evaluated, in words
    identity: of all weights that make its pictures
    batch: pictures that are made at once
    """

    def __init__(
        self,
        bundle: ModelBundle,
        told: str,
        identity: str,
        sample: Callable[[Conditioning, Tensor, int], Tensor],
    ):
        self.bundle, self.told, self.identity, self._sample = bundle, told, identity, sample
        self.batch = pictures_at_once(bundle.latent_shape)

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], places: Sequence[int], seed: int) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], on the CPU. That of a place depends on its prompt and on ``seed`` plus the
        place, and but for rounding not on which others are made with it.
        """
        noise = torch.cat([initial_noise((1, *self.bundle.latent_shape), seed + place) for place in places])
        cond = self.bundle.conditioner.encode(prompts)
        latents = self._sample(cond, noise.to(cond.device), seed)
        return self.bundle.codec.decode(latents).clamp(-1, 1).float().cpu()


def open_source(source: str, sampling: Sampling) -> Generator | OpenedModel | None:
    """A generator's file or run, or a model that is not distilled, of which headers are read alone. None for a folder
    of pictures. ValueError for what is none of them.
    """
    path = Path(source)
    if path.is_dir() and RunFolder(path).config_file.exists():
        return RunFolder(path).open_generator(sampling.iteration, sampling.base)
    if path.is_dir() and not (path / "model_index.json").exists():
        return None
    if path.is_file() and has_recipe(read_safetensors_metadata(path)):
        return open_generator(source, sampling.base)
    if sampling.steps is None or sampling.cfg is None:
        raise ValueError(
            f"{source}: it carries no recipe and is no run: for a model that is not distilled say --steps and --cfg, "
            "such as 30 and 6"
        )
    if not 1 <= sampling.steps <= 1000:
        raise ValueError(f"--steps: expected 1 to 1,000 of DPM-Solver++, got {sampling.steps}")
    return open_model(source, sampling.resolution)


def load_source(opened: Generator | OpenedModel, sampling: Sampling, device: torch.device) -> Source:
    if isinstance(opened, Generator):
        return _of_generator(opened, sampling, device)
    return _of_teacher(opened, sampling, device)


def _of_generator(generator: Generator, sampling: Sampling, device: torch.device) -> Source:
    recipe = generator.recipe
    timesteps = recipe.timesteps_for(sampling.steps)
    bundle = load_opened(generator, sampling.resolution).to(device, sampling.dtype)
    cfg = recipe.sampling_cfg if sampling.cfg is None else sampling.cfg
    denoiser = _Guided(bundle, recipe, cfg)

    def sample(cond: Conditioning, noise: Tensor, seed: int) -> Tensor:
        return sample_latents(denoiser, cond, bundle.latent_shape, recipe, seed, sampling.steps, noise)

    told = f"{recipe.title or recipe.default_title}, timesteps {' '.join(map(str, timesteps))}{_guided(cfg)}"
    own = [generator.source] if generator.source is not None else []
    return Source(bundle, told, _identity([*own, *generator.model.read_from]), sample)


def _of_teacher(model: OpenedModel, sampling: Sampling, device: torch.device) -> Source:
    assert sampling.steps is not None
    assert sampling.cfg is not None
    bundle = model.load(torch.float32, sampling.resolution).to(device, sampling.dtype)
    steps, cfg, unconditional = sampling.steps, sampling.cfg, bundle.unconditional("empty")

    def sample(cond: Conditioning, noise: Tensor, seed: int) -> Tensor:
        return sample_teacher_latents(bundle, cond, unconditional, noise, steps, cfg)

    told = f"{bundle.name}, DPM-Solver++ (2M), {steps} steps{_guided(cfg)}"
    return Source(bundle, told, _identity(model.read_from), sample)


def _identity(paths: Iterable[Path]) -> str:
    """SHA-256 of all files that pictures come from: network, text encoders and VAE."""
    files = {file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])}
    hashes = sorted(file_sha256(file) for file in files if file.is_file())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _guided(cfg: float) -> str:
    return "" if cfg == 1 else f", CFG {cfg:g}"


class _Guided:
    """A generator under classifier-free guidance, for ``sample_latents``."""

    def __init__(self, bundle: ModelBundle, recipe: SiDRecipe, scale: float):
        self.denoiser, self.scale, self.schedule = bundle.denoiser, scale, bundle.denoiser.schedule
        self.unconditional = bundle.unconditional(recipe.unconditional)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return guided_denoise(self.denoiser, x, sigma, cond, self.unconditional, self.scale)
