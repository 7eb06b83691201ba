"""What only a CUDA card can show, in minutes: ``python -m pytest tests/gpu -m gpu -s``.

SDXL's true architecture with random weights (a file of 7 GB is written first). Each run prints its seconds an iteration
and its peak memory: figures that could not be measured where this was written. ``SID_SMOKE_ON_CPU=1`` runs the same on
a small SDXL without a card, to keep these tests working.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sid_train.cli import main
from sid_train.core.recipe import SiDRecipe
from sid_train.files.logs import read_log
from sid_train.models.families import load_model
from sid_train.sample import sample_latents
from sid_train.training.run import RunFolder

ON_CPU = os.environ.get("SID_SMOKE_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = ("a lighthouse on a cliff at dawn", "a cat in a hat", "an old map of a harbour town")
NARROW = 128  # of SDXL's 320: four whole networks and their optimizers in fp32 then take 17 GB
LORA = ("adapter.rank=64",)
WHOLE = ("adapter.rank=0", "model.frozen_dtype=fp32", "optimizer.generator_lr=1e-5", "optimizer.fake_score_lr=1e-5")


def make_teacher(folder: Path, width: int) -> str:
    if ON_CPU:
        from small_sdxl import save_single_file, small_pipeline

        return str(save_single_file(folder / "small.safetensors", small_pipeline()))
    from full_size import write_model

    write_model(folder / f"sdxl-{width}.safetensors", width)
    return str(folder / f"sdxl-{width}.safetensors")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> str:
    return make_teacher(tmp_path_factory.mktemp("sdxl"), 320)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> str:
    return make_teacher(tmp_path_factory.mktemp("narrow"), NARROW)


def distill(teacher: str, out: Path, size: int, *settings: str, iterations: int = 3) -> list[dict[str, float]]:
    """The losses of a short run with the recipe for one card; prints what it took."""
    size = 64 if ON_CPU else size
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    values = (
        f"model.teacher={teacher}",
        f"model.resolution={size}",
        f"data.prompts={prompts}",
        f"training.iterations={iterations}",
        "training.batch_size=1",
        "training.accumulate=1",
        "training.log_every=1",
        "training.grid_every=0",
        "training.tracker=none",
        *settings,
    )
    if not ON_CPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    overrides = [part for value in values for part in ("--set", value)]
    assert main(["distill", "--config", "sdxl-4step-lora-24gb", *overrides, "--out", str(out)]) == 0
    log = read_log(out / "log.jsonl")
    peak = "not measured" if ON_CPU else f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    print(f"\n{size}x{size} {' '.join(settings)}: peak {peak}, {1 / log[-1]['images_per_second']:.2f} s an iteration")
    return [entry["losses"] for entry in log]


@pytest.mark.parametrize(
    ("size", "checkpointing", "guidance"),
    [(512, "true", "lsg=1.5"), (512, "false", "zero-cfg"), (1024, "true", "zero-cfg"), (1024, "true", "lsg=1.5")],
)
def test_lora(sdxl, tmp_path, size, checkpointing, guidance):
    settings = (f"training.gradient_checkpointing={checkpointing}", f"method.guidance={guidance}")
    losses = distill(sdxl, tmp_path / "run", size, *LORA, *settings)
    assert len(losses) == 3
    state = load_file(RunFolder(tmp_path / "run").last_checkpoint())
    for network in ("generator.", "fake_score.", "generator_ema."):  # the second factors start at 0
        assert all(t.any() for name, t in state.items() if name.startswith(network) and name.endswith("lora_B"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_whole_networks(narrow, tmp_path, precision):
    losses = distill(narrow, tmp_path / "run", 512, *WHOLE, f"training.mixed_precision={precision}")
    assert len(losses) == 3


def test_precision_and_checkpointing_change_no_loss(narrow, tmp_path):
    exact = distill(narrow, tmp_path / "exact", 512, *WHOLE, "training.mixed_precision=no", iterations=1)[0]
    again = "training.gradient_checkpointing=false"
    kept = distill(narrow, tmp_path / "kept", 512, *WHOLE, "training.mixed_precision=no", again, iterations=1)[0]
    rounded = distill(narrow, tmp_path / "rounded", 512, *WHOLE, "training.mixed_precision=bf16", iterations=1)[0]
    assert kept["fake_score"] == pytest.approx(exact["fake_score"], rel=1e-4)
    assert rounded["fake_score"] == pytest.approx(exact["fake_score"], rel=0.05)


def test_resumed_run_ends_as_the_uninterrupted_one(sdxl, tmp_path):
    stopped = tmp_path / "stopped"
    distill(sdxl, tmp_path / "whole", 512, *LORA)
    distill(sdxl, stopped, 512, *LORA, "training.checkpoint_every=2", iterations=2)
    config = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(config.replace("iterations = 2", "iterations = 3"))
    distill(sdxl, stopped, 512, *LORA, "training.checkpoint_every=2")
    one, other = (load_file(RunFolder(path).last_checkpoint()) for path in (tmp_path / "whole", stopped))
    for name in one:
        if name.startswith("generator_ema."):
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-5, msg=name)


def test_adam8bit(sdxl, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    distill(sdxl, tmp_path / "run", 512, *LORA, "optimizer.kind=adam8bit", "training.checkpoint_every=2")


def test_a_seed_means_the_same_on_every_device(narrow):
    bundle = load_model(narrow, resolution=64 if ON_CPU else 256)
    cond = bundle.conditioner.encode(PROMPTS)
    on_cpu = sample_latents(bundle.denoiser, cond, bundle.latent_shape, SiDRecipe(), seed=5)
    bundle.to(DEVICE)
    there = sample_latents(bundle.denoiser, cond.to(DEVICE), bundle.latent_shape, SiDRecipe(), seed=5).cpu()
    assert (there - on_cpu).abs().mean() < 0.01 * on_cpu.abs().mean()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_files_sample_to_a_picture(sdxl, tmp_path, dtype):
    run = tmp_path / "run"
    distill(sdxl, run, 512, *LORA, iterations=1)
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert main(["export", str(run), "--format", "checkpoint", "-o", str(checkpoint)]) == 0
    for source, base in ((run / "generator.safetensors", ["--base", sdxl]), (checkpoint, [])):
        out = tmp_path / "picture.png"
        options = ["--prompt", PROMPTS[0], "--count", "1", "--device", DEVICE.type, "--dtype", dtype]
        assert main(["sample", str(source), *base, *options, "--out", str(out)]) == 0
        low, high = Image.open(out).convert("L").getextrema()
        assert low < high  # not one colour, as NaN would be
