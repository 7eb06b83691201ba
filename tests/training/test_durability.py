"""What a run survives: damage, changed files, full disks, values that are not finite, reports that fail."""

import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from sid_train.config import load_config
from sid_train.errors import Interrupted, NonFiniteError
from sid_train.files.logs import read_log
from sid_train.files.tensors import DamagedFile
from sid_train.training.callbacks import Callback
from sid_train.training.distributed import make_accelerator
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

RUN = (
    "training.batch_size=2", "training.tracker=none", "training.log_every=1", "training.checkpoint_every=1",
    "training.fake_score_updates=1", "method.steps=2", "optimizer.cooldown=0",
)  # fmt: skip


def config_of(*overrides: str, iterations: int = 4):
    return load_config("demo", [*RUN, f"training.iterations={iterations}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three iterations with its last two checkpoints, and the prompts that it was trained on."""
    folder = tmp_path_factory.mktemp("durable")
    (folder / "prompts.txt").write_text("a red three on a blue ground\na blue one on a red ground\n")
    Trainer(config_of(f"data.prompts={folder / 'prompts.txt'}", iterations=3), folder / "run").run()
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, and how it is configured for a fourth iteration."""
    shutil.copytree(whole / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run"), config_of(f"data.prompts={whole / 'prompts.txt'}")


@pytest.fixture(scope="module")
def fourth(whole, tmp_path_factory):
    """The tensors of an undisturbed fourth iteration."""
    folder = tmp_path_factory.mktemp("fourth") / "run"
    shutil.copytree(whole / "run", folder)
    Trainer(config_of(f"data.prompts={whole / 'prompts.txt'}"), folder).run()
    return load_file(RunFolder(folder).last_checkpoint())


def same(folder: RunFolder, tensors) -> bool:
    found = load_file(folder.last_checkpoint())
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def flip(path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_the_checkpoint_before_the_last_is_kept_and_no_more(run):
    folder, _ = run
    names = [str(path.relative_to(folder.path)) for path in folder.checkpoints()]
    assert names == ["checkpoints/0000002.safetensors", "checkpoint.safetensors"]


DAMAGE = {
    "bit": flip,
    "bit of the header": lambda path: flip(path, 0.001),
    "0 bytes": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zero page": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_seen(run, damage):
    folder, _ = run
    last = folder.last_checkpoint()
    damage(last)
    good, [(bad, problem)] = folder.good_checkpoint()
    assert good.name == "0000002.safetensors"
    assert bad == last
    assert str(last) in problem


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(run, fourth, capsys):
    folder, config = run
    last = folder.last_checkpoint()
    flip(last)
    Trainer(config, folder.path).run()
    assert same(folder, fourth)
    told = capsys.readouterr().err
    assert str(last) in told
    assert "continuing from the checkpoint before, of iteration 2" in told
    assert (folder.path / "set-aside" / last.name).is_file()
    assert [entry["iteration"] for entry in read_log(folder.log)] == [1, 2, 3, 4]


def test_a_run_without_a_whole_checkpoint_is_refused_and_not_exported(run):
    folder, config = run
    for path in folder.checkpoints():
        flip(path)
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*checkpoint\.safetensors.*0000002\.safetensors"):
        Trainer(config, folder.path)
    with pytest.raises(DamagedFile, match=r"checkpoint\.safetensors"):
        folder.open_generator()


@pytest.mark.parametrize("content", [None, "", "[data"], ids=["none", "0 bytes", "torn"])
def test_a_lost_configuration_is_the_checkpoints(run, content, capsys):
    folder, config = run
    before = folder.config_file.read_text()
    stated = f"data.prompts={config.data.prompts}"
    folder.config_file.unlink()
    if content is not None:
        folder.config_file.write_text(content)
    with pytest.raises(ValueError, match=r"config.toml.*another configuration: optimizer.generator_lr \(was 0.0001"):
        Trainer(config_of(stated, "optimizer.generator_lr=0.01", iterations=3), folder.path)
    assert folder.read_config() == config_of(stated, iterations=3)
    Trainer(config_of(stated, iterations=3), folder.path)
    assert "written anew from the last checkpoint" in capsys.readouterr().err
    assert folder.config_file.read_text() == before


def test_a_configuration_that_is_lost_with_the_last_checkpoint_is_that_of_the_one_before(run):
    folder, config = run
    folder.config_file.unlink()
    folder.last_checkpoint().write_bytes(b"")
    trainer = Trainer(config_of(f"data.prompts={config.data.prompts}", iterations=3), folder.path)
    assert trainer.iteration == 2


def test_copies_that_a_user_keeps_are_no_checkpoints(run):
    folder, config = run
    copy = folder.path / "checkpoints" / "0000001-mine.safetensors"
    shutil.copy(folder.last_checkpoint(), copy)
    Trainer(config, folder.path).run()
    assert copy.is_file()


def test_a_claim_that_a_power_cut_tore_is_taken_again(tmp_path):
    (tmp_path / "config.toml").write_text("")
    assert Trainer(config_of(), tmp_path).iteration == 0
    assert RunFolder(tmp_path).read_config() == config_of()


def test_prompts_are_what_is_in_them(run, fourth, tmp_path):
    folder, config = run
    moved = tmp_path / "moved.txt"
    moved.write_text("a red three on a blue ground\na blue one on a red ground\na green two on a red ground\n")
    with pytest.raises(ValueError, match=r"trained on other prompts than data.prompts = .*moved.txt has now"):
        Trainer(config_of(f"data.prompts={moved}"), folder.path)
    shutil.copy(config.data.prompts, moved)
    Trainer(config_of(f"data.prompts={moved}"), folder.path).run()
    assert same(folder, fourth)
    assert folder.read_config().data.prompts == str(moved)


def test_a_checkpoint_of_another_run_is_refused(run, whole, tmp_path):
    folder, config = run
    other = config_of(f"data.prompts={whole / 'prompts.txt'}", "training.seed=5", iterations=1)
    Trainer(other, tmp_path / "other").run()
    shutil.copy(RunFolder(tmp_path / "other").last_checkpoint(), folder.last_checkpoint())
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: .* another configuration: training.seed \(was 5"):
        Trainer(config, folder.path)


def test_what_may_change_is_said(run, capsys):
    folder, config = run
    Trainer(config_of(f"data.prompts={config.data.prompts}", "optimizer.generator_lr=1e-5"), folder.path).run()
    told = capsys.readouterr().err
    for change in ("optimizer.generator_lr (was 0.0001, now 1e-05)", "training.iterations (was 3, now 4)"):
        assert f"continues with another value of {change}" in told


def test_leftovers_of_killed_processes_go(run):
    folder, config = run
    for place in (folder.path, folder.path / "checkpoints"):
        (place / ".checkpoint.safetensors.elsewhere.7.0123abcd.tmp").write_text("half")
    Trainer(config, folder.path).run()
    assert not list(folder.path.rglob("*.tmp"))


# -- values that are not finite ------------------------------------------------------------------------------------


def test_a_run_that_ruined_its_weights_can_be_continued_with_the_advised_cure(tmp_path):
    """A huge rate ruins the first step; the loss shows it in the next iteration, after the checkpoint."""
    with pytest.raises(NonFiniteError) as error:
        Trainer(config_of("optimizer.generator_lr=1e3"), tmp_path).run()
    for advice in (
        "iteration 2: the fake score loss",
        "The checkpoint of iteration 1",
        "set aside",
        "starts again",
        "lower",
    ):
        assert advice in str(error.value)
    Trainer(config_of(), tmp_path).run()
    assert RunFolder(tmp_path).last_checkpoint()


def test_a_good_checkpoint_stays_where_a_higher_learning_rate_was_at_fault(run):
    folder, config = run
    rates = ("optimizer.fake_score_lr=1e3", "optimizer.generator_lr=1e3")
    with pytest.raises(NonFiniteError, match="continues from iteration 3"):
        Trainer(config_of(f"data.prompts={config.data.prompts}", *rates, iterations=9), folder.path).run()
    assert not (folder.path / "set-aside").exists()


def test_weights_that_are_not_finite_replace_no_checkpoint(run):
    folder, config = run
    before = folder.last_checkpoint().read_bytes()
    worse = config_of(f"data.prompts={config.data.prompts}", "optimizer.generator_lr=3e38")
    with pytest.raises(NonFiniteError, match=r"iteration 4: generator\..* is not finite .*continues from iteration 3"):
        Trainer(worse, folder.path).run()
    assert folder.last_checkpoint().read_bytes() == before


def test_a_spike_is_skipped_and_changes_no_weight(tmp_path, capsys):
    trainer = Trainer(config_of("optimizer.skip_norm=2"), tmp_path)
    trainer.guard.norms["generator"].extend([1e-9] * 100)
    before = [p.detach().clone() for p in trainer.networks["generator"].parameters()]
    trainer.train_iteration()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.networks["generator"].parameters(), strict=True))
    assert not trainer.optimizers["generator"].state_dict()["state"]
    assert trainer.optimizers["fake_score"].state_dict()["state"]
    assert "iteration 1: a step of the generator is skipped: the norm of its gradient" in capsys.readouterr().err


# -- reports and disks ---------------------------------------------------------------------------------------------


class Broken(Callback):
    def on_iteration(self, trainer, losses):
        raise RuntimeError("no VAE")


def test_a_report_that_fails_is_said_once_and_costs_nothing(run, fourth, capsys):
    folder, config = run
    folder.log.unlink()
    folder.log.mkdir()  # no line can be written
    Trainer(config, folder.path, [Broken()]).run()
    told = capsys.readouterr().err
    assert told.count("Broken does not work, and training goes on without: no VAE") == 1
    assert told.count("Progress does not work") == 1
    assert same(folder, fourth)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(run, fourth):
    folder, config = run
    before = folder.last_checkpoint().read_bytes()
    trainer = Trainer(config, folder.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            ValueError, match=r"checkpoint.safetensors: the checkpoint of iteration 4 could not be written"
        ):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.last_checkpoint().read_bytes() == before
    assert not list(folder.path.rglob("*.tmp"))
    Trainer(config, folder.path).run()
    assert same(folder, fourth)


def test_a_stop_is_heard_while_reports_fail(tmp_path, connected):
    class Stop(Broken):
        def on_iteration(self, trainer, losses):
            os.kill(os.getpid(), signal.SIGHUP)
            super().on_iteration(trainer, losses)

    with pytest.raises(Interrupted, match="after iteration 1 of 4"):
        Trainer(config_of(), tmp_path, [Stop()]).run()


def test_under_nohup_a_lost_connection_is_nothing(tmp_path):
    class HangUp(Callback):
        def on_iteration(self, trainer, losses):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Trainer(config_of(iterations=2), tmp_path, [HangUp()]).run()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert RunFolder(tmp_path).open_generator().recipe.training_summary["iterations"] == "2"


# -- the environment -----------------------------------------------------------------------------------------------


def test_what_a_launcher_sets_changes_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    accelerator = make_accelerator(config_of().training, tmp_path)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    told = capsys.readouterr().err
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in told
    assert "DYNAMIC" not in told
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_DEEPSPEED=true: expected"):
        make_accelerator(config_of().training, tmp_path)
