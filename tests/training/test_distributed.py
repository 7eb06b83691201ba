"""Two processes, with whole networks (DDP) and sharded ones (FSDP2), compute what one process computes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_sdxl import save_single_file, small_pipeline

from sid_train.commands.export import export_any
from sid_train.config import load_config
from sid_train.errors import Interrupted
from sid_train.files.logs import read_log
from sid_train.models.families import load_generator
from sid_train.sample import sample_images
from sid_train.training.callbacks import Callback
from sid_train.training.checkpoint import load_checkpoint, read_network
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

PROMPTS = ["a lighthouse at dawn", "a cat in a hat", "an old map", "a harbour town", "a green hill"]
# Two levels, and as few blocks as they can have: what takes time here are the calls, not the arithmetic.
UNET = {
    "block_out_channels": (64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 1),
}
SETTINGS = [
    "model.resolution=64",
    "gan.generator_weight=0.01",  # the encoder alone, and the whole network with logits
    "method.guidance=lsg=1.5",
    "method.steps=2",
    "training.batch_size=4",
    "training.iterations=2",
    "training.gradient_checkpointing=true",
    "training.checkpoint_every=1",
    "training.log_every=1",
    "training.tracker=none",
    "optimizer.ema_rampup=1",
    "optimizer.ema_halflife_images=8",
    # Where the true gradient is 0, Adam makes a whole step of what rounding leaves of it, up or down. With a large
    # epsilon beside a small norm its steps are proportional to the gradient, and runs can be compared.
    "optimizer.eps=1e-2",
    "optimizer.clip_norm=1",
    "optimizer.generator_lr=1e-2",
    "optimizer.fake_score_lr=1e-2",
]
NETWORKS = ("generator", "fake_score", "generator_ema")
OPTIMIZERS = ("generator_optimizer", "fake_score_optimizer")


class StopAfterOne(Callback):
    def on_iteration(self, trainer, losses):
        os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, name: str, *overrides: str, callbacks: tuple[Callback, ...] = ()) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    Trainer(load_config(None, [*settings, *overrides]), folder / name, list(callbacks)).run()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: ``whole`` by one process, the others by two, or begun by one and continued by two, or the
    other way round.
    """
    folder = tmp_path_factory.mktemp("runs")
    teacher = save_single_file(folder / "teacher.safetensors", small_pipeline(**UNET))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "pairs").mkdir()
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (64, 64), (50 * number, 40, 200)).save(folder / "pairs" / f"{number}.png")
        (folder / "pairs" / f"{number}.txt").write_text(prompt)
    data = [f"model.teacher={teacher}", f"data.prompts={folder / 'prompts.txt'}", f"data.pairs={folder / 'pairs'}"]
    (folder / "settings.json").write_text(json.dumps(data + SETTINGS))

    train(folder, "whole")
    train(folder, "whole-adapters", "adapter.rank=4")
    for name, sharding in (("begun-whole", "none"), ("begun-sharded", "full")):
        with pytest.raises(Interrupted):
            train(folder, name, f"training.sharding={sharding}", callbacks=(StopAfterOne(),))
    shutil.copytree(folder / "begun-whole", folder / "after-one")
    script = Path(__file__).with_name("two_processes.py")
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder],
        capture_output=True, text=True, timeout=1800,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert two.returncode == 0, "\n".join(line for line in two.stderr.splitlines() if line.startswith("[rank"))
    train(folder, "replicated-by-one")
    train(folder, "sharded-by-one", "training.sharding=full")
    return folder


@pytest.mark.parametrize(
    "name", ["replicated", "sharded", "begun-whole", "begun-sharded", "replicated-by-one", "sharded-by-one"]
)
def test_losses_weights_and_states_are_those_of_one_process(runs, name):
    """Each of the two took its samples one by one, where the one process took all four at once."""
    ours, theirs = ([e["losses"] for e in read_log(runs / run / "log.jsonl")] for run in (name, "whole"))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == {"fake_score", "discriminator", "sid", "gan"}
        assert a == pytest.approx(b, rel=1e-4)
    ours, theirs, before = (RunFolder(runs / run).generator_file() for run in (name, "whole", "after-one"))
    for network in NETWORKS:
        a, b, old = (read_network(path, network) for path in (ours, theirs, before))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # measured: 2e-7
        assert max((b[key] - old[key]).abs().max() for key in b) > 1e-3
    for optimizer in OPTIMIZERS:
        a, b = read_network(ours, optimizer), read_network(theirs, optimizer)
        assert a.keys() == b.keys()
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3 * b[key].abs().max().item())


def test_adapters_are_those_of_one_process(runs):
    ours, theirs = (read_log(runs / run / "log.jsonl") for run in ("replicated-adapters", "whole-adapters"))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
    ours, theirs = (RunFolder(runs / run).generator_file() for run in ("replicated-adapters", "whole-adapters"))
    for network in NETWORKS:
        a, b = (read_network(path, network) for path in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        ups = [value for key, value in b.items() if "lora_B" in key]
        assert ups
        assert all(value.any() for value in ups)  # zero before they learn


def test_a_sharded_checkpoint_is_one_safetensors_file_a_process(runs):
    before, folder = sorted((runs / "sharded" / "checkpoints").iterdir())
    assert (before.name, folder.name) == ("0000001", "0000002")  # training.keep_checkpoints is 2
    files = sorted(folder.glob("*.safetensors"))
    assert {*files, folder / "facts.json"} == set(folder.iterdir())
    first, second = map(load_file, files)
    name = "generator.unet.conv_in.weight"
    parts = torch.cat([first[name], second[name]])
    assert len(first[name]) == len(second[name]) == len(parts) // 2
    assert torch.equal(parts, read_network(folder, "generator")["unet.conv_in.weight"])


def test_an_unfinished_checkpoint_is_none(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "sharded", run)
    shutil.copytree(run / "checkpoints" / "0000002", run / "checkpoints" / ".0000003.tmp")
    assert RunFolder(run).last_checkpoint().name == "0000002"


def test_the_exported_generator_of_a_sharded_run_samples(runs, tmp_path):
    images = []
    for name in ("sharded", "whole"):
        export_any(runs / name, tmp_path / f"{name}.safetensors", dtype="fp32")
        bundle, recipe = load_generator(str(tmp_path / f"{name}.safetensors"))
        images.append(sample_images(bundle, recipe, PROMPTS[:2], seed=0))
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)
    assert images[0].std() > 0.01
    assert (runs / "sharded" / "grids" / "000002.png").is_file()


def test_a_sharded_snapshot_is_the_average_at_that_time(runs, tmp_path):
    ours = read_network(RunFolder(runs / "sharded").generator_file(1), "generator_ema")
    torch.testing.assert_close(
        ours, read_network(RunFolder(runs / "after-one").generator_file(), "generator_ema"), rtol=0, atol=1e-6
    )
    recipe, _ = export_any(runs / "sharded", tmp_path / "early.safetensors", "unet", iteration=1)
    assert recipe.training_summary["iterations"] == "1"


def test_a_torn_part_says_which_folder(runs, tmp_path):
    folder = tmp_path / "0000002"
    shutil.copytree(runs / "sharded" / "checkpoints" / "0000002", folder)
    part = next(folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match="0000002: a file in it is not whole"):
        load_checkpoint(folder, {}, {}, {})
