"""``distill --dry-run``: everything that a run needs, read and checked; nothing is trained or written."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import disk_usage

import torch

from ..config import Config
from ..core.rng import BatchRNG
from ..data.cache import Cache, model_facts, prompt_facts
from ..data.lengths import measure
from ..data.pairs import load_pairs
from ..data.rows import encode_prompts, prompts_of
from ..models.bundle import count_parameters
from ..plan.estimate import GIB, Hardware, make_planner
from ..plan.trace import encodes_pairs, makes_pictures
from ..training.checkpoint import read_facts
from ..training.environment import require_no_other_trainer
from ..training.identity import identity_of, require_identity
from ..training.run import RunFolder
from ..training.setup import adam_class, load_init_generator, require_diffusion_model
from ..training.teacher import open_teacher


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def describe_run(config: Config, run_dir: Path) -> str:
    """What a run with this configuration would do, a line a fact. ValueError for what would stop it."""
    folder = RunFolder(run_dir)
    changed = folder.require_config(config)
    adam_class(config.optimizer.kind)
    _check_tracker(config.training.tracker)
    require_no_other_trainer()
    if config.training.clip_model:
        from ..evaluation.clip_score import CLIPScorer  # slow to import, and few runs need it

        CLIPScorer(config.training.clip_model)
    model = open_teacher(config.model)
    require_diffusion_model(model, config)
    pictures = makes_pictures(config.training) or encodes_pairs(config.data)
    model.check(text=not config.data.cache, codec=pictures)
    bundle = model.load(None, config.model.resolution)
    bundle.conditioner.max_tokens = config.data.max_tokens
    load_init_generator(config, model)
    facts = [
        ("teacher", f"{bundle.name} ({bundle.architecture}), {bundle.denoiser.schedule.prediction_type}"),
        ("network", f"{count_parameters(bundle.denoiser.network) / 1e6:,.1f} million parameters"),
        (
            "pictures",
            f"{bundle.image_size[1]}x{bundle.image_size[0]}, latents {_shape(bundle.latent_shape)}",
        ),
    ]
    prompts = prompts_of(config.data.prompts, report=True)
    lengths = measure(bundle.conditioner, prompts)
    if config.data.cache:
        bundle.file_hash = folder.sha256(bundle.weights)  # read for the cache's facts alone
        cache = Cache(Path(config.data.cache))
        cache.expect(model_facts(bundle) | prompt_facts(prompts, lengths))
        rows = cache.prompts()
        rows.shards.verify()
        cache.unconditional(config.model.unconditional)
        cond, source = rows.read([0]), "from the cache"
    else:
        cond, source = encode_prompts(bundle.conditioner, prompts[:1]), "encoded now"
    told = ", ".join(f"{name} {_shape(tensor.shape)}" for name, tensor in cond.tensors.items())
    facts += [
        ("prompts", f"{len(prompts)}, {lengths}" if lengths.longer else str(len(prompts))),
        ("first prompt", f"{prompts[0]!r}, {source}: {told}"),
    ]
    pairs = None
    if config.data.pairs:
        pairs = load_pairs(config.data.pairs, bundle, config.data.buckets, config.data.cache, report=True)
        real = pairs.draw(1, BatchRNG(torch.Generator().manual_seed(0)))
        facts.append(("pairs", f"a first one: latents {_shape(real.latents.shape)}"))
    checkpoint, damaged = folder.good_checkpoint()
    start = 0
    if checkpoint is not None:
        bundle.file_hash = folder.sha256(bundle.weights)
        found = read_facts(checkpoint)
        require_identity(found, identity_of(config, bundle, prompts, pairs), config, checkpoint)
        start = int(found["iteration"])
    facts += [("damaged", problem) for _, problem in damaged]
    if pictures:
        bundle.codec.decode(torch.zeros(1, bundle.latent_shape[0], 8, 8))
        facts.append(("VAE", "decodes"))
    training, strategy = config.training, config.method.strategy
    facts += [
        ("trained", f"LoRA adapters of rank {config.adapter.rank}" if config.adapter.rank else "whole networks"),
        ("guidance", f"{strategy.name}: {strategy.fake_train:g}, {strategy.fake_eval:g}, {strategy.teacher:g}"),
        ("iterations", f"{training.iterations:,} of batch {training.batch_size}, in {training.accumulate} part(s)"),
        ("run", f"continues {run_dir} from iteration {start}" if start else f"starts in {run_dir}"),
        *(("run", change) for change in changed),
        ("disk", _check_disk(config, folder)),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in facts), "Nothing was trained or written."])


def _check_tracker(name: str) -> None:
    """ValueError for a tracker that would not take what the run tells."""
    if name != "wandb":
        return
    try:
        import wandb
    except ImportError:
        raise ValueError("training.tracker: wandb is not installed: pip install wandb, or none") from None
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and not wandb.api.api_key:
        raise ValueError("training.tracker: wandb has no login here: wandb login, or WANDB_MODE=offline")


def _check_disk(config: Config, folder: RunFolder) -> str:
    """What the run keeps and what is free. ValueError where it cannot write or has no room."""
    place = folder.path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out: {place}: expected a folder that can be written into")
    plan = make_planner(config).plan(config, Hardware(1, 1, 0))
    there = sum(file.stat().st_size for path in folder.kept() for file in (path, *path.rglob("*")) if file.is_file())
    needed = max(plan.checkpoint * (config.training.keep_checkpoints + 1) + plan.snapshots - there, plan.checkpoint)
    free = disk_usage(place).free
    told = f"{needed / GIB:,.1f} GiB more for checkpoints and snapshots, {free / GIB:,.1f} GiB free in {place}"
    if needed > free:
        raise ValueError(f"--out: {told}: make room, or lower training.keep_checkpoints or training.snapshot_every")
    return told
