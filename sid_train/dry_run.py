"""``distill --dry-run``: everything that a run needs, read and checked; nothing is trained or written."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import Config
from .data import load_pairs, load_prompts
from .data.cache import Cache, model_facts, prompt_facts
from .distiller import RealBatch
from .guidance import GuidanceStrategy
from .models.bundle import load_model
from .rng import BatchRNG
from .trainer import adam_class, check_run_dir, check_teacher, last_checkpoint, load_init_generator


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def dry_run(config: Config, run_dir: Path) -> str:
    """What a run with this configuration would do, a line a fact. ValueError for what would stop it."""
    check_run_dir(config, run_dir)
    adam_class(config.optimizer.kind)
    if config.training.clip_model:
        from .clip_score import CLIPScorer  # slow to import, as in callbacks

        CLIPScorer(config.training.clip_model)
    bundle = load_model(config.model.teacher, None, config.model.resolution)
    check_teacher(bundle, config)
    load_init_generator(config, bundle)
    unet = bundle.denoiser.unet
    facts = [
        ("teacher", f"{bundle.name} ({bundle.architecture}), {bundle.denoiser.prediction_type}"),
        ("UNet", f"{sum(p.numel() for p in unet.parameters()) / 1e6:,.1f} million parameters"),
        (
            "pictures",
            f"{bundle.image_size[1]}x{bundle.image_size[0]}, latents {_shape(bundle.latent_shape)}",
        ),
    ]
    prompts = load_prompts(config.data.prompts)
    if config.data.cache:
        cache = Cache(Path(config.data.cache))
        cache.expect(model_facts(bundle) | prompt_facts(prompts))
        cond, source = cache.prompts().read([0]), "from the cache"
    else:
        cond, source = bundle.conditioner.encode(prompts[:1]), "encoded now"
    facts += [
        ("prompts", str(len(prompts))),
        ("first prompt", f"{prompts[0]!r}, {source}: text {_shape(cond.text.shape)}"),
    ]
    if config.data.pairs:
        pairs = load_pairs(config.data.pairs, bundle, config.data.buckets, config.data.cache)
        real: RealBatch = pairs.draw(1, BatchRNG(torch.Generator().manual_seed(0)))
        facts.append(("pairs", f"a first one: latents {_shape(real.latents.shape)}"))
    training, strategy = config.training, GuidanceStrategy.parse(config.method.guidance)
    facts += [
        ("trained", f"LoRA adapters of rank {config.adapter.rank}" if config.adapter.rank else "whole networks"),
        ("guidance", f"{strategy.name}: {strategy.fake_train:g}, {strategy.fake_eval:g}, {strategy.teacher:g}"),
        ("iterations", f"{training.iterations:,} of batch {training.batch_size}, in {training.accumulate} part(s)"),
        ("run", f"continues {run_dir}" if last_checkpoint(run_dir) else f"starts in {run_dir}"),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in facts), "Nothing was trained or written."])
