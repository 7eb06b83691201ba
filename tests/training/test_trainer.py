"""The loop on the demo's own networks, a few iterations each."""

import importlib.util
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from sid_train.config import load_config
from sid_train.errors import Interrupted, NonFiniteError
from sid_train.files.hashing import file_sha256
from sid_train.files.logs import read_log
from sid_train.files.tensors import LazyTensor, open_tensors, write_tensors
from sid_train.method.base import Method, Update
from sid_train.method.methods import METHODS
from sid_train.models.digits.layout import TEACHER_FILE
from sid_train.models.families import export_generator, load_model
from sid_train.models.family import ExportOptions
from sid_train.training.callbacks import Callback, Grids
from sid_train.training.checkpoint import read_facts
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer


def small(*overrides: str, iterations: int = 4):
    base = ["training.batch_size=4", "training.tracker=none", "training.log_every=1", "method.steps=2"]
    base += ["training.fake_score_updates=1", "optimizer.cooldown=0", f"training.iterations={iterations}"]
    return load_config("demo", [*base, *overrides])


class SignalAfter(Callback):
    def __init__(self, iteration: int, *numbers: int):
        self.iteration, self.numbers = iteration, numbers

    def on_iteration(self, trainer, losses):
        if trainer.iteration == self.iteration:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_continues_bit_identically(tmp_path, connected, number):
    config = small("training.grid_every=3", "method.guidance=lsg=1.2")
    Trainer(config, tmp_path / "whole").run()
    # Image grids must not touch the run's randomness, so only the interrupted run makes them.
    with pytest.raises(Interrupted, match="after iteration 2 of 4"):
        Trainer(config, tmp_path / "parts", [SignalAfter(2, number), Grids(1)]).run()
    Trainer(config, tmp_path / "parts", [Grids(3)]).run()

    whole, parts = (load_file(RunFolder(tmp_path / name).last_checkpoint()) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [[e["losses"] for e in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_who_asks_again_is_heard_or_not(tmp_path):
    """torchrun and a scheduler may both send SIGTERM; a second Ctrl-C is someone who will not wait."""
    with pytest.raises(Interrupted):
        Trainer(small(), tmp_path / "term", [SignalAfter(1, signal.SIGTERM, signal.SIGTERM)]).run()
    assert RunFolder(tmp_path / "term").last_checkpoint()
    with pytest.raises(KeyboardInterrupt):
        Trainer(small(), tmp_path / "int", [SignalAfter(1, signal.SIGTERM, signal.SIGINT)]).run()
    assert RunFolder(tmp_path / "int").last_checkpoint() is None


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    """What torchrun sets; without its other variables accelerate does not join the processes, as without CUDA."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 processes, which would each work alone"):
        Trainer(small(), tmp_path)


def test_a_killed_run_repeats_what_came_after_its_last_checkpoint(tmp_path):
    class PowerCut(BaseException):
        pass

    class Die(Callback):
        def on_iteration(self, trainer, losses):
            if trainer.iteration == 3:
                raise PowerCut

    config = small("training.checkpoint_every=2")
    Trainer(config, tmp_path / "whole").run()
    with pytest.raises(PowerCut):
        Trainer(config, tmp_path / "parts", [Die()]).run()
    again = Trainer(config, tmp_path / "parts")
    assert again.iteration == 2
    again.run()
    whole, parts = (load_file(RunFolder(tmp_path / name).last_checkpoint()) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_training_changes_generator_average_and_fake_score_but_not_the_teacher(tmp_path):
    trainer = Trainer(small(iterations=2), tmp_path)
    teacher = load_model("demo").denoiser
    trainer.run()
    for network in (trainer.networks["generator"], trainer.networks["fake_score"], trainer.ema.average):
        assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), teacher.parameters(), strict=True))
    for a, b in zip(trainer.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_non_finite_loss_stops_before_the_weights(tmp_path):
    trainer = Trainer(small(), tmp_path)
    next(trainer.teacher.parameters()).data.fill_(float("nan"))
    before = [p.detach().clone() for p in trainer.networks["generator"].parameters()]
    with pytest.raises(NonFiniteError, match=r"iteration 1: the generator loss is not finite \(sid = nan\)"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.networks["generator"].parameters(), strict=True))
    assert RunFolder(tmp_path).last_checkpoint() is None


def test_a_non_finite_gradient_stops_before_the_weights(tmp_path):
    trainer = Trainer(small(), tmp_path)
    parameter = next(trainer.networks["fake_score"].parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    with pytest.raises(NonFiniteError, match="the fake score gradient is not finite"):
        trainer.run()
    assert torch.equal(before, parameter)


def test_a_run_folder_keeps_its_configuration(tmp_path):
    Trainer(small(), tmp_path)
    with pytest.raises(ValueError, match=r"another configuration: method.alpha \(was 1.2, now 1.0\)"):
        Trainer(small("method.alpha=1"), tmp_path)
    Trainer(small("training.log_every=7"), tmp_path)  # only reporting
    Trainer(small("optimizer.ema_rampup=0.2"), tmp_path)  # only the average
    Trainer(small("optimizer.generator_lr=0.5", iterations=9), tmp_path)  # how it goes on


def test_the_gan_branch_and_its_start(tmp_path):
    config = small(
        "data.pairs=demo", "gan.generator_weight=0.01", "gan.start_images=8", "method.guidance=zero-cfg",
        "training.generator_start_images=4", iterations=3,
    )  # fmt: skip
    Trainer(config, tmp_path).run()
    names = [set(e["losses"]) for e in read_log(tmp_path / "log.jsonl")]
    both = {"fake_score", "discriminator"}  # which learns from the first image; the start delays the generator's term
    assert names == [both, both | {"sid"}, both | {"sid", "gan"}]


def test_sid_weight_is_there_before_the_gan_term(tmp_path):
    """Its loss falls to the half when that term starts, as in SiD-DiT, and does not jump."""
    for weight in (1, 100):
        config = small(
            "data.pairs=demo", "gan.generator_weight=0.01", "gan.start_images=4", f"gan.sid_weight={weight}",
            "method.guidance=custom=1,1,3", "optimizer.generator_lr=1e-12", "optimizer.fake_score_lr=1e-12",
            iterations=2,
        )  # fmt: skip
        Trainer(config, tmp_path / str(weight)).run()
    one, hundred = ([e["losses"]["sid"] for e in read_log(tmp_path / w / "log.jsonl")] for w in ("1", "100"))
    assert hundred == pytest.approx([100 * loss for loss in one], rel=1e-4)


def test_accumulation_and_bf16_run(tmp_path):
    Trainer(small("training.accumulate=2", "training.mixed_precision=bf16", iterations=2), tmp_path).run()


def test_images_are_counted_once_an_iteration(tmp_path):
    """So that the average's half-life and every start mean the same at any number of fake-score updates."""
    trainer = Trainer(small("training.fake_score_updates=3", iterations=2), tmp_path)
    trainer.run()
    assert trainer.images_seen == 2 * 4


class Counting(Method):
    """Three updates of the generator an iteration, with losses of 1, 2 and 3."""

    trained = ("generator",)

    @classmethod
    def build(cls, setting):
        method = cls()
        method.parameter = next(setting.unwrapped["generator"].parameters())
        return method

    def draw_step(self, rng):
        return 1

    def updates(self, step, images_seen):
        return [
            Update("generator", lambda batch, rng, loss=loss: {"loss": loss + 0 * self.parameter.sum()})
            for loss in (1, 2, 3)
        ]


def test_the_log_has_the_means_of_all_updates(tmp_path):
    METHODS["counting"] = Counting
    try:
        assert Trainer(small("method.kind=counting"), tmp_path).train_iteration() == {"loss": 2}
    finally:
        del METHODS["counting"]


def test_a_snapshot_is_on_disk_before_what_counts_on_it(tmp_path):
    """Its score, and the checkpoint of the same iteration."""
    seen = []

    class Look(Callback):
        def on_iteration(self, run, losses):
            last = run.folder.last_checkpoint()
            seen.append((run.folder.snapshot(run.iteration, False).is_file(), last and read_facts(last)["iteration"]))

    Trainer(small("training.snapshot_every=1", "training.checkpoint_every=1", iterations=2), tmp_path, [Look()]).run()
    assert seen == [(True, None), (True, 1)]


def test_a_run_that_counted_otherwise_continues_with_todays_count(tmp_path):
    """Before, each fake-score update counted: the counter in such a checkpoint is too high."""
    config = small(iterations=2)
    with pytest.raises(Interrupted):
        Trainer(config, tmp_path, [SignalAfter(1, signal.SIGTERM)]).run()
    path = RunFolder(tmp_path).last_checkpoint()
    facts = read_facts(path)
    tensors = open_tensors(path)
    old = {name: LazyTensor.of(tensor.load()) for name, tensor in tensors.items()}
    write_tensors(path, old, {"format_version": "2", "facts": json.dumps(facts | {"images_seen": 99})})
    trainer = Trainer(config, tmp_path)
    assert (trainer.iteration, trainer.images_seen) == (1, 4)


def test_a_folder_is_one_runs(tmp_path):
    """Not that of a second process while the first trains, nor of one that read it before the first went on."""
    config = small(iterations=2)
    late, held = Trainer(config, tmp_path), RunFolder(tmp_path).lock()
    with pytest.raises(ValueError, match="another process is training in this folder"):
        Trainer(config, tmp_path)
    with pytest.raises(ValueError, match="another process is training in this folder"):
        late.run()
    held.release()
    Trainer(config, tmp_path).run()
    with pytest.raises(ValueError, match="up to iteration 2 since this one read iteration 0"):
        late.run()
    assert Trainer(config, tmp_path).iteration == 2


def test_the_teacher_is_hashed_once(tmp_path):
    Trainer(small(iterations=1), tmp_path).run()
    folder, teacher = RunFolder(tmp_path), tmp_path / "teacher.safetensors"
    assert folder.sha256(TEACHER_FILE) == file_sha256(TEACHER_FILE)
    teacher.write_bytes(b"one")
    folder.remember_teacher(teacher, "what was computed")
    assert folder.sha256(teacher) == "what was computed"
    teacher.write_bytes(b"another")
    assert folder.sha256(teacher) == file_sha256(teacher)
    (tmp_path / "teacher.json").write_text("{torn")
    assert folder.sha256(teacher) == file_sha256(teacher)


def test_fake_score_update_ratio(tmp_path):
    trainer = Trainer(small("training.fake_score_updates=3", iterations=1), tmp_path)
    trainer.run()
    steps = [
        int(next(iter(optimizer.state_dict()["state"].values()))["step"])
        for optimizer in (trainer.optimizers["fake_score"], trainer.optimizers["generator"])
    ]
    assert steps == [3, 1]


def test_learning_rate_warmup_and_cooldown(tmp_path):
    trainer = Trainer(small("optimizer.warmup=2", "optimizer.cooldown=0.5", iterations=8), tmp_path)
    peak = trainer.config.optimizer.generator_lr
    rates = []
    for trainer.iteration in range(8):
        trainer._set_learning_rates()
        rates.append(trainer.optimizers["generator"].param_groups[0]["lr"] / peak)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_sid2a_starts_from_a_generator(tmp_path):
    Trainer(small(iterations=2), tmp_path / "first").run()
    generator = RunFolder(tmp_path / "first").open_generator()
    file, bundle = tmp_path / "first.safetensors", generator.load()
    export_generator(generator, file, ExportOptions(dtype="fp32"))
    second = Trainer(small(f"model.init_generator={file}"), tmp_path / "second")
    for a, b in zip(second.networks["generator"].parameters(), bundle.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    teacher = load_model("demo").denoiser
    for a, b in zip(second.networks["fake_score"].parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="carries no SiD recipe"):
        Trainer(small("model.init_generator=demo"), tmp_path / "third")


def test_accumulation_changes_no_figure(tmp_path):
    """Not even which numbers are drawn; with a run that goes on with another number of micro-batches."""
    smooth = ["data.pairs=demo", "gan.generator_weight=0.01", "method.guidance=lsg=1.5", "optimizer.eps=1e-2"]
    smooth += ["optimizer.clip_norm=1", "optimizer.generator_lr=1e-2", "optimizer.fake_score_lr=1e-2"]
    Trainer(small(*smooth, iterations=2), tmp_path / "once").run()
    first, second = (small(*smooth, f"training.accumulate={parts}", iterations=2) for parts in (2, 4))
    with pytest.raises(Interrupted):
        Trainer(first, tmp_path / "split", [SignalAfter(1, signal.SIGTERM)]).run()
    Trainer(second, tmp_path / "split").run()
    once, split = (load_file(RunFolder(tmp_path / name).last_checkpoint()) for name in ("once", "split"))
    for key, tensor in once.items():
        torch.testing.assert_close(split[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    assert torch.equal(once["rng"], split["rng"])


def test_snapshots_are_the_average_at_that_time(tmp_path):
    Trainer(small("training.snapshot_every=2", iterations=3), tmp_path / "long").run()
    Trainer(small(iterations=2), tmp_path / "short").run()
    generator = RunFolder(tmp_path / "long").open_generator(2)
    early = generator.load()
    last = RunFolder(tmp_path / "short").open_generator().load()
    assert generator.recipe.training_summary["iterations"] == "2"
    for a, b in zip(early.denoiser.parameters(), last.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"0000001.safetensors: the run has no such snapshot"):
        RunFolder(tmp_path / "long").open_generator(1)


ADAPTERS = ("adapter.rank=4", "training.gradient_checkpointing=true", "optimizer.generator_lr=1e-3")


def test_a_run_with_adapters_continues_bit_identically_with_the_gan_branch(tmp_path):
    config = small(*ADAPTERS, "data.pairs=demo", "gan.generator_weight=0.01")
    Trainer(config, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(config, tmp_path / "parts", [SignalAfter(2, signal.SIGTERM), Grids(1)]).run()
    Trainer(config, tmp_path / "parts").run()
    whole, parts = (load_file(RunFolder(tmp_path / name).last_checkpoint()) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    # The checkpoint holds the adapters and their optimizers' states, not the UNet.
    assert {key.split("/")[-1] for key in whole if key.startswith("generator.")} == {"lora_A", "lora_B"}


def test_adapters_train_and_export_as_what_they_compute(tmp_path):
    trainer = Trainer(small(*ADAPTERS), tmp_path)
    teacher = load_model("demo").denoiser
    trainer.run()
    for network in (trainer.networks["generator"], trainer.networks["fake_score"], trainer.ema.average):
        ups = [p for name, p in network.named_parameters() if name.endswith("lora_B")]
        assert all(p.abs().max() > 0 for p in ups)  # they start at 0
    base = dict(trainer.bundle.denoiser.named_parameters())
    for name, weight in teacher.named_parameters():
        parent, _, kind = name.rpartition(".")
        assert torch.equal(base.get(f"{parent}.base_layer.{kind}", base.get(name)), weight), name
    bundle = RunFolder(tmp_path).open_generator().load()
    cond = bundle.conditioner.encode(["a red three on a blue ground"])
    x, sigma = torch.randn(1, *bundle.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([2.5])
    with torch.no_grad():
        merged, adapted = bundle.denoiser(x, sigma, cond), trainer.ema.average(x, sigma, cond)
        assert not torch.allclose(merged, teacher(x, sigma, cond), atol=1e-3)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_figure(tmp_path):
    for name, value in (("plain", "false"), ("checkpointed", "true")):
        Trainer(small(f"training.gradient_checkpointing={value}", iterations=2), tmp_path / name).run()
    plain, checkpointed = (load_file(RunFolder(tmp_path / n).last_checkpoint()) for n in ("plain", "checkpointed"))
    for key, tensor in plain.items():
        torch.testing.assert_close(checkpointed[key], tensor, msg=key)


@pytest.mark.parametrize("adapter", [(), ADAPTERS])
def test_frozen_weights_in_bf16(tmp_path, adapter):
    trainer = Trainer(small(*adapter, "model.frozen_dtype=bf16", "training.mixed_precision=bf16"), tmp_path)
    trainer.run()
    assert trainer.bundle.denoiser.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.networks["generator"].parameters())


def test_8_bit_adam_says_what_it_needs(tmp_path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValueError, match="adam8bit needs: pip install bitsandbytes"):
        Trainer(small("optimizer.kind=adam8bit"), tmp_path)


@pytest.mark.parametrize("adapter", [(), ADAPTERS])
def test_8_bit_adam_continues_bit_identically(tmp_path, adapter):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    config = small(*adapter, "optimizer.kind=adam8bit", "training.iterations=4")
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    assert torch.uint8 in [state["state1"].dtype for state in whole.optimizers["generator"].state.values()]
    with pytest.raises(Interrupted):
        Trainer(config, tmp_path / "halves", [SignalAfter(2, signal.SIGTERM)]).run()
    second = Trainer(config, tmp_path / "halves")
    second.run()
    for one, other in zip(
        whole.networks["generator"].parameters(), second.networks["generator"].parameters(), strict=True
    ):
        assert torch.equal(one, other)
