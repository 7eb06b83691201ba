"""``distill --dry-run``: everything that a run needs, read and checked; nothing is trained or written."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import Config
from ..core.rng import BatchRNG
from ..data.cache import Cache, model_facts, prompt_facts
from ..data.pairs import load_pairs
from ..data.rows import prompts_of
from ..models.bundle import count_parameters
from ..training.run import RunFolder
from ..training.setup import adam_class, load_init_generator, require_diffusion_model
from ..training.teacher import open_teacher


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def describe_run(config: Config, run_dir: Path) -> str:
    """What a run with this configuration would do, a line a fact. ValueError for what would stop it."""
    folder = RunFolder(run_dir)
    folder.require_config(config)
    adam_class(config.optimizer.kind)
    if config.training.clip_model:
        from ..evaluation.clip_score import CLIPScorer  # slow to import, and few runs need it

        CLIPScorer(config.training.clip_model)
    model = open_teacher(config.model)
    require_diffusion_model(model, config)
    bundle = model.load(None, config.model.resolution)
    load_init_generator(config, model)
    facts = [
        ("teacher", f"{bundle.name} ({bundle.architecture}), {bundle.denoiser.schedule.prediction_type}"),
        ("network", f"{count_parameters(bundle.denoiser.network) / 1e6:,.1f} million parameters"),
        (
            "pictures",
            f"{bundle.image_size[1]}x{bundle.image_size[0]}, latents {_shape(bundle.latent_shape)}",
        ),
    ]
    prompts = prompts_of(config.data.prompts)
    if config.data.cache:
        bundle.file_hash = folder.sha256(bundle.weights)  # read for the cache's facts alone
        cache = Cache(Path(config.data.cache))
        cache.expect(model_facts(bundle) | prompt_facts(prompts))
        cond, source = cache.prompts().read([0]), "from the cache"
    else:
        cond, source = bundle.conditioner.encode(prompts[:1]), "encoded now"
    told = ", ".join(f"{name} {_shape(tensor.shape)}" for name, tensor in cond.tensors.items())
    facts += [
        ("prompts", str(len(prompts))),
        ("first prompt", f"{prompts[0]!r}, {source}: {told}"),
    ]
    if config.data.pairs:
        pairs = load_pairs(config.data.pairs, bundle, config.data.buckets, config.data.cache)
        real = pairs.draw(1, BatchRNG(torch.Generator().manual_seed(0)))
        facts.append(("pairs", f"a first one: latents {_shape(real.latents.shape)}"))
    training, strategy = config.training, config.method.strategy
    facts += [
        ("trained", f"LoRA adapters of rank {config.adapter.rank}" if config.adapter.rank else "whole networks"),
        ("guidance", f"{strategy.name}: {strategy.fake_train:g}, {strategy.fake_eval:g}, {strategy.teacher:g}"),
        ("iterations", f"{training.iterations:,} of batch {training.batch_size}, in {training.accumulate} part(s)"),
        ("run", f"continues {run_dir}" if folder.last_checkpoint() else f"starts in {run_dir}"),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in facts), "Nothing was trained or written."])
