"""What test_distributed.py starts with torchrun: the runs of two processes. FOLDER has settings.json and the runs that
one process began; what goes wrong here ends the process with an error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from sid_train.config import load_config
from sid_train.errors import NonFiniteError
from sid_train.method.base import Update
from sid_train.models.families import load_model
from sid_train.training.callbacks import Callback, Grids
from sid_train.training.distributed import reducing_gradients
from sid_train.training.parts import local_part
from sid_train.training.trainer import Trainer

FOLDER = Path(sys.argv[1])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())
SHARDED = "training.sharding=full"
SPLIT = "training.accumulate=2"  # one sample a process and micro-batch


def start(name: str, *overrides: str, callbacks: tuple[Callback, ...] = ()) -> Trainer:
    return Trainer(load_config(None, [*SETTINGS, *overrides]), FOLDER / name, list(callbacks))


def whole_parameters(network) -> list[torch.Tensor]:
    return [p.full_tensor() for p in network.parameters()]


class CopyFirstCheckpoint(Callback):
    """Keeps the run as it was after its first iteration, for one process to continue."""

    def on_iteration(self, trainer, losses):
        if trainer.iteration == 2:
            shutil.copytree(trainer.folder.path, FOLDER / f"{trainer.folder.path.name}-by-one")


class OwnAverage(Callback):
    """The average of whole weights, by the formula of the SiD paper."""

    every_rank = True

    def on_start(self, trainer):
        self.average = whole_parameters(trainer.networks["generator"])

    def on_iteration(self, trainer, losses):
        optimizer = trainer.config.optimizer
        halflife = min(optimizer.ema_halflife_images, optimizer.ema_rampup * trainer.images_seen)
        decay = 0.5 ** (trainer.config.training.batch_size / halflife)
        pairs = zip(self.average, whole_parameters(trainer.networks["generator"]), strict=True)
        self.average = [decay * ours + (1 - decay) * new for ours, new in pairs]


def check_is_sharded(trainer: Trainer) -> None:
    for network in (*trainer.networks.values(), trainer.ema.average, trainer.teacher):
        parameters = list(network.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
        assert 0.49 < share < 0.51, share


def check_sharded_run() -> None:
    average = OwnAverage()
    grids = Grids(2)
    grids.PICTURES = grids.COLUMNS = 2
    callbacks = (CopyFirstCheckpoint(), average, grids)
    trainer = start("sharded", SHARDED, SPLIT, "training.snapshot_every=1", callbacks=callbacks)
    check_is_sharded(trainer)
    trainer.run()
    check_is_sharded(trainer)
    for optimizer in trainer.optimizers.values():
        for parameter, state in optimizer.state.items():
            assert state["exp_avg_sq"].to_local().shape == parameter.to_local().shape
    parameters = [whole_parameters(network) for network in (trainer.ema.average, trainer.networks["generator"])]
    for ours, theirs, new in zip(average.average, *parameters, strict=True):
        torch.testing.assert_close(theirs, ours)
        assert not torch.equal(theirs, new)


def check_replicated_run() -> None:
    trainer = start("replicated", SPLIT, callbacks=(CopyFirstCheckpoint(),))
    trainer.run()
    for network in (*trainer.networks.values(), trainer.ema.average):
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        assert torch.equal(*trainer.accelerator.gather(weights[None]))
    assert torch.equal(*trainer.accelerator.gather(trainer.rng.get_state()[None]))


def check_unshared_folder() -> None:
    """Each process has a folder of its own, and only the first one's has a checkpoint."""
    name = "after-one" if os.environ["RANK"] == "0" else "elsewhere"
    with pytest.raises(ValueError, match=r"found those of iterations \[1, -1\].*that all nodes share"):
        start(name, SPLIT)


def check_bf16() -> Trainer:
    trainer = start("bf16", SHARDED, "training.mixed_precision=bf16", "model.frozen_dtype=bf16")
    trainer.train_iteration()
    for network in (*trainer.networks.values(), trainer.ema.average):
        assert all(p.dtype == torch.float32 for p in network.parameters())
    bundle = load_model(trainer.config.model.teacher, torch.bfloat16, trainer.config.model.resolution)
    x = torch.randn(2, *bundle.latent_shape, generator=torch.Generator().manual_seed(0))
    ask = (x, torch.tensor([0.03, 9.0]), trainer.prompts.read([0, 1]))
    with torch.no_grad():
        sharded, whole = trainer.teacher(*ask), bundle.denoiser(*ask)
    # Rounding x, sigma or x0 to bf16 outside of the UNet would show.
    assert sharded.dtype == torch.float32
    torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-6)
    return trainer


def check_accumulation(trainer: Trainer) -> None:
    """Gradients leave a process in the last micro-batch alone, and are the sum then."""
    network, gradients = trainer.networks["generator"], []
    x, ask = torch.ones(1, *trainer.bundle.latent_shape), (torch.ones(1), trainer.prompts.read([0]))
    for parts in ((True,), (False, True)):
        for last in parts:
            with reducing_gradients(trainer.accelerator, network, last):
                network(x, *ask).square().sum().backward()
            assert all((p.grad is not None) == last for p in network.parameters())
        gradients.append([p.grad.to_local() for p in network.parameters()])
        trainer.optimizers["generator"].zero_grad()
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def check_text_lengths(trainer: Trainer) -> None:
    """A process may draw longer texts than another: nothing that they tell each other has their lengths."""
    rows, rank = trainer.prompts.encoded, trainer.accelerator.process_index
    short, rows.encoded = rows.encoded, [c.replace(text=c.text.repeat(1, 1 + rank, 1)) for c in rows.encoded]
    trainer.train_iteration()
    rows.encoded = short


def check_agreement(trainer: Trainer) -> None:
    """What is not finite on one rank stops both, before any weight changes."""
    rank = trainer.accelerator.process_index
    before = [local_part(p).clone() for p in trainer.networks["fake_score"].parameters()]
    if rank == 1:
        for cond in trainer.prompts.encoded.encoded:
            cond.pooled.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the fake score loss is not finite"):
        trainer.train_iteration()
    for parameter in trainer.networks["fake_score"].parameters():
        parameter.grad = torch.full_like(parameter, rank)
    if rank == 1:
        local_part(parameter.grad).fill_(float("inf"))
    norm = torch.nn.utils.clip_grad_norm_(trainer.networks["fake_score"].parameters(), 1.0)
    trainer.passes.note({"fake_score": torch.zeros(())})
    with pytest.raises(NonFiniteError, match=r"the fake score gradient is not finite \(norm = (inf|nan)\)"):
        trainer.passes.finish(Update("fake_score", lambda batch, rng: {}), norm)
    after = [local_part(p) for p in trainer.networks["fake_score"].parameters()]
    assert all(map(torch.equal, before, after))


def main() -> None:
    torch.set_num_threads(1)
    check_sharded_run()
    start("begun-sharded", SHARDED, SPLIT).run()
    check_replicated_run()
    start("replicated-adapters", SPLIT, "adapter.rank=4").run()
    check_unshared_folder()
    trainer = start("begun-whole", SPLIT)
    trainer.run()
    check_text_lengths(trainer)
    check_agreement(trainer)
    trainer = check_bf16()
    check_text_lengths(trainer)
    check_accumulation(trainer)
    check_agreement(trainer)


if __name__ == "__main__":
    main()
