"""What a run says when it goes wrong, on runs that are made to."""

import pytest
import torch

from sid_train.config import load_config
from sid_train.files.logs import read_log
from sid_train.training.alarms import Band, LossAlarms, PictureAlarms, saturation, variety
from sid_train.training.callbacks import Callback
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

SETTINGS = ["training.batch_size=8", "training.tracker=none", "training.log_every=1", "method.steps=1"]
SETTINGS += ["training.fake_score_updates=1", "method.guidance=none", "optimizer.skip_norm=0"]


def train(folder, iterations: int, *callbacks: Callback, **settings) -> Trainer:
    values = [*SETTINGS, f"training.iterations={iterations}", *(f"training.{k}={v}" for k, v in settings.items())]
    trainer = Trainer(load_config("demo", values), folder, list(callbacks))
    trainer.run()
    return trainer


class Spoil(Callback):
    """Scales the generator's weights after some iteration."""

    def __init__(self, at: int, scale: float):
        self.at, self.scale = at, scale

    def on_iteration(self, run, losses) -> None:
        if run.iteration == self.at:
            with torch.no_grad():
                for parameter in run.networks["generator"].parameters():
                    parameter.mul_(self.scale)


def test_a_band_is_left_once():
    band = Band(above=3, below=0.5, enough=5)
    assert not any(band.leaves(value) for value in (1, 1, 1.2, 0.9, 1))
    assert band.leaves(3.5) == "3.5, 3.5 times the usual 1"
    assert not band.leaves(100)  # said already
    assert not band.leaves(60)  # still out
    assert not band.leaves(2)
    fresh = Band(below=0.5, enough=2)
    assert not any(fresh.leaves(value) for value in (1, 1.2))
    assert fresh.leaves(0.4) == "0.4, 0.33 of the 1.2 that it was"
    zeros = Band(above=3, enough=1)
    assert not any(zeros.leaves(value) for value in (0, 0, 1))


def test_what_a_run_grows_into_is_no_alarm_and_what_comes_after_it_is():
    band = Band(above=5)
    assert not any(band.leaves(1.1**n) for n in range(100))
    assert band.leaves(8 * 1.1**99)
    assert not any(band.leaves(8 * 1.1**99) for _ in range(30))
    assert band.leaves(80 * 1.1**99)


def test_a_loss_that_leaves_its_band_names_the_iteration_and_the_snapshot(tmp_path, capsys):
    """The generator's weights grow fiftyfold after iteration 12."""
    train(tmp_path, 14, Spoil(12, 50.0), LossAlarms(), snapshot_every=4)
    said = [line for line in capsys.readouterr().err.splitlines() if "leaves its band" in line]
    assert any(line.startswith("warning: iteration 13: the loss fake_score leaves its band: ") for line in said)
    assert all("the last snapshot before it is that of iteration 12: export --iteration 12" in line for line in said)
    alarms = read_log(RunFolder(tmp_path).alarms)
    assert {entry["iteration"] for entry in alarms} <= {13, 14}
    assert len(alarms) == len(said)


def test_a_healthy_run_is_silent_and_repeats_no_alarm_when_it_is_continued(tmp_path, capsys):
    train(tmp_path, 24, LossAlarms(), log_every=2)
    assert "warning: iteration" not in capsys.readouterr().err
    train(tmp_path, 26, LossAlarms(), log_every=2)
    assert "warning: iteration" not in capsys.readouterr().err
    assert not read_log(tmp_path / "alarms.jsonl")


def test_a_run_without_snapshots_says_that_there_are_none(tmp_path, capsys):
    train(tmp_path, 14, Spoil(12, 50.0), LossAlarms())
    assert "no snapshot from before it is kept (training.snapshot_every)" in capsys.readouterr().err


def test_pictures_that_lose_their_variety_are_said(tmp_path, capsys):
    class Still(PictureAlarms):
        """From iteration 7 on every picture of a prompt is the same."""

        def show(self, run, images):
            if run.iteration >= 7:
                images = images[:: self.NOISES].repeat_interleave(self.NOISES, dim=0)
            super().show(run, images)

    train(tmp_path, 8, Still(1), snapshot_every=2)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "more alike" in line]
    assert said.startswith("warning: iteration 7: the pictures of one prompt are more alike than they were: 0, 0.00 of")
    assert said.endswith("the last snapshot before it is that of iteration 6: export --iteration 6")
    assert [entry["iteration"] for entry in read_log(tmp_path / "looks.jsonl")] == list(range(1, 9))


def test_saturation_is_that_of_colours():
    grey = torch.linspace(-1, 1, 48).reshape(1, 1, 4, 12).expand(2, 3, 4, 12)
    assert saturation(grey) == pytest.approx(0, abs=1e-6)
    red = torch.tensor([1.0, -1, -1])[None, :, None, None].expand(2, 3, 4, 4)
    assert saturation(red) == 1
    assert saturation(red * 9) == 1


def test_variety_is_the_distance_of_one_prompts_pictures():
    pictures = torch.zeros(4, 3, 2, 2)
    pictures[1] = 0.5  # of the first prompt's two
    assert variety(pictures, 2) == pytest.approx(0.25)
    assert variety(torch.zeros(4, 3, 2, 2), 2) == 0
