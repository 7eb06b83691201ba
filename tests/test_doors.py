"""What a new model family, a new method and a new metric cost: each is one class, here in this file, and one entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sid_train.cli import main
from sid_train.config import load_config
from sid_train.core.noise_schedule import NoiseSchedule, expand
from sid_train.core.recipe import read_recipe
from sid_train.core.rng import BatchRNG
from sid_train.core.timesteps import timestep_ladder
from sid_train.files.logs import read_log
from sid_train.files.tensors import open_tensors
from sid_train.method.base import Batch, Losses, Method, Setting, Update
from sid_train.method.config import MethodConfig
from sid_train.method.methods import METHODS
from sid_train.method.sid import Distiller
from sid_train.models.bundle import ModelBundle
from sid_train.models.denoiser import Denoiser
from sid_train.models.digits.layout import LATENT_SHAPE, DigitCodec, DigitConditioner
from sid_train.models.digits.model import build_unet
from sid_train.models.families import FAMILIES
from sid_train.models.family import ModelFamily, OpenedModel
from sid_train.models.unet import UNetDenoiser
from sid_train.training.callbacks import SnapshotScores
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

PROMPT = "a red three on a blue ground"
SETTINGS = ["training.iterations=2", "training.batch_size=2", "training.tracker=none", "training.log_every=1"]
SETTINGS += ["method.steps=2", "training.fake_score_updates=1"]


# -- a schedule --------------------------------------------------------------------------------------------------------


class FlowSchedule(NoiseSchedule):
    """Rectified flow, ``x_t = (1 - t) x0 + t eps``: sigma is ``t / (1 - t)``, and the network predicts ``eps - x0``."""

    prediction_type = "flow"

    def sigma(self, timestep):
        return timestep / (1000.0 - timestep)

    def timestep(self, sigma):
        return 1000 * sigma / (1 + sigma)

    def scale_input(self, x, sigma):
        return x / (1 + expand(sigma, x))

    def to_x0(self, prediction, x, sigma):
        return self.scale_input(x, sigma) - expand(sigma / (1 + sigma), x) * prediction.float()

    def ladder(self, steps, t_init):
        return timestep_ladder(steps, 999)  # from pure noise, whatever is asked for


def test_a_flow_schedule_is_one_class(cond, unconditional, rng):
    schedule = FlowSchedule()
    t = torch.tensor([1, 250, 625, 999])
    torch.testing.assert_close(schedule.timestep(schedule.sigma(t)), t.float())
    x0, eps = torch.randn(2, 4, 1, 2, 2, generator=rng)
    x = x0 + expand(schedule.sigma(t), x0) * eps  # what the rest of the code sees
    share = t[:, None, None, None] / 1000
    torch.testing.assert_close(schedule.scale_input(x, schedule.sigma(t)), (1 - share) * x0 + share * eps)
    torch.testing.assert_close(schedule.to_x0(eps - x0, x, schedule.sigma(t)), x0, rtol=1e-3, atol=1e-3)

    networks = [UNetDenoiser(build_unet(), schedule) for _ in range(3)]
    distiller = Distiller(*networks, schedule, unconditional, LATENT_SHAPE, MethodConfig(guidance="lsg=1.5"))
    draws = BatchRNG(rng)
    for losses in (distiller.fake_score_loss(cond, 2, draws), distiller.generator_loss(cond, 2, draws)):
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks[0].parameters())


# -- a family ----------------------------------------------------------------------------------------------------------


class ToyDenoiser(Denoiser):
    """One convolution that hears the text's mean, on rectified flow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(LATENT_SHAPE[0] + 1, LATENT_SHAPE[0], 3, padding=1)
        self.schedule = FlowSchedule()

    @property
    def network(self) -> nn.Module:
        return self.net

    def denoise(self, x, sigma, cond) -> Tensor:
        said = cond.text.mean((1, 2))[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.schedule.to_x0(self.net(torch.cat([self.schedule.scale_input(x, sigma), said], 1)), x, sigma)

    def logits(self, x, sigma, cond) -> Tensor:
        return self.denoise(x, sigma, cond).mean(1)

    def denoise_with_logits(self, x, sigma, cond) -> tuple[Tensor, Tensor]:
        return self.denoise(x, sigma, cond), self.logits(x, sigma, cond)


class ToyModel(OpenedModel):
    architecture, prefix = "toy", "net."

    def load(self, dtype, resolution=0) -> ModelBundle:
        denoiser, conditioner = ToyDenoiser(), DigitConditioner()
        denoiser.net.load_state_dict({name: tensor.load().float() for name, tensor in self.tensors.items()})
        conditioner.load_state_dict({name: tensor.load().float() for name, tensor in self.rest.items()})
        made = (conditioner, DigitCodec(), LATENT_SHAPE, (16, 16), self.weights, "none")
        return ModelBundle(self.name, self.architecture, denoiser.to(dtype or torch.float32), *made)


class ToyFamily(ModelFamily):
    architecture = "toy"

    def open(self, source: str, prediction_type: str = "auto") -> ToyModel:
        tensors = open_tensors(Path(source))
        net = {name.removeprefix("net."): tensor for name, tensor in tensors.items() if name.startswith("net.")}
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("net.")}
        return ToyModel(name="toy", tensors=net, rest=rest, weights=Path(source))


@pytest.fixture
def toy(tmp_path) -> Iterator[Path]:
    """A teacher of the toy family, which is in the list as long as the test runs."""
    torch.manual_seed(0)
    path, denoiser, conditioner = tmp_path / "toy.safetensors", ToyDenoiser(), DigitConditioner()
    save_file(denoiser.state_dict() | conditioner.state_dict(), path, {"modelspec.architecture": "toy"})
    FAMILIES.insert(0, family := ToyFamily())
    yield path
    FAMILIES.remove(family)


def test_a_family_distils_samples_exports_and_is_planned(toy, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    values = [*SETTINGS, f"model.teacher={toy}", f"data.prompts={tmp_path / 'prompts.txt'}"]
    settings = ["--config", "demo", *(part for value in values for part in ("--set", value))]
    run, again = tmp_path / "run", tmp_path / "again.safetensors"
    assert main(["distill", *settings, "--out", str(run)]) == 0
    assert [set(entry["losses"]) for entry in read_log(RunFolder(run).log)] == [{"fake_score", "sid"}] * 2

    assert main(["export", str(run), "-o", str(again), "--dtype", "fp32"]) == 0
    recipe = read_recipe(again)
    assert (recipe.architecture, recipe.prediction_type) == ("toy", "flow")
    assert (recipe.timesteps, recipe.ladder) == ((999, 499), "explicit")  # those that it was trained on
    assert not torch.equal(load_file(again)["net.weight"], load_file(toy)["net.weight"])
    assert torch.equal(load_file(again)["words.weight"], load_file(toy)["words.weight"])
    assert main(["sample", str(again), "--prompt", PROMPT, "--count", "1", "--out", str(tmp_path / "a.png")]) == 0

    capsys.readouterr()
    assert main(["plan", *settings, "--gpus", "1", "--gpu-memory", "1", "--reserve", "0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["roles"]["generator"]["parameters"] == sum(p.numel() for p in ToyDenoiser().parameters())


def test_a_family_without_a_known_lora_refuses_adapters(toy, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    values = [*SETTINGS, f"model.teacher={toy}", f"data.prompts={tmp_path / 'prompts.txt'}", "adapter.rank=4"]
    with pytest.raises(ValueError, match=r"adapter\.rank: expected 0, since ToyDenoiser"):
        Trainer(load_config("demo", values), tmp_path / "run")


# -- a method ----------------------------------------------------------------------------------------------------------


class Regression(Method):
    """The generator repeats the teacher's estimate from pure noise: one network, one update."""

    title = "Regression"
    trained = ("generator",)

    def __init__(self, setting: Setting):
        self.setting = setting

    @classmethod
    def build(cls, setting):
        return cls(setting)

    def draw_step(self, rng) -> int:
        return 1

    def updates(self, step: int, images_seen: int) -> list[Update]:
        return [Update("generator", self.loss)]

    def loss(self, batch: Batch, rng) -> Losses:
        sigma = self.setting.schedule.draw_sigma(len(batch.cond), 500, 900, rng)
        x = expand(sigma, torch.ones(1, 1, 1, 1)) * rng.randn(len(batch.cond), *self.setting.latent_shape)
        with torch.no_grad():
            wanted = self.setting.networks["teacher"](x, sigma, batch.cond)
        made = self.setting.networks["generator"](1.1 * x, sigma, batch.cond)
        return {"regression": F.mse_loss(made, wanted)}


@pytest.fixture
def regression() -> Iterator[None]:
    METHODS["regression"] = Regression
    yield
    del METHODS["regression"]


def test_a_method_trains_its_own_networks(regression, tmp_path, capsys):
    values = [*SETTINGS, "method.kind=regression", "training.checkpoint_every=1"]
    Trainer(load_config("demo", values), tmp_path).run()
    assert [set(entry["losses"]) for entry in read_log(tmp_path / "log.jsonl")] == [{"regression"}] * 2
    state = load_file(RunFolder(tmp_path).last_checkpoint())
    assert {name.partition(".")[0] for name in state} == {
        *("generator", "generator_ema", "generator_optimizer", "norms", "rng", "step_rng")
    }
    assert Trainer(load_config("demo", values), tmp_path).iteration == 2
    assert RunFolder(tmp_path).open_generator().recipe.title.endswith(", Regression 2-step")

    settings = [part for value in values for part in ("--set", value)]
    capsys.readouterr()
    assert main(["plan", "--config", "demo", *settings, "--gpus", "1", "--gpu-memory", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [call["role"] for call in plan["calls"]] == ["teacher", "generator"]
    assert plan["roles"].keys() == {"teacher", "generator", "EMA"}


def test_a_method_that_is_not_there():
    with pytest.raises(ValueError, match=r"method.kind: expected one of sid, dmd2, lcm, got 'ddpo'"):
        load_config("demo", ["method.kind=ddpo"])


# -- a metric ----------------------------------------------------------------------------------------------------------


class Brightness:
    name = "brightness"

    def score(self, images, prompts) -> float:
        return float(images.clamp(-1, 1).mean())


def test_a_metric_scores_the_pictures_of_a_run(tmp_path):
    Trainer(load_config("demo", SETTINGS), tmp_path, [SnapshotScores(1, Brightness())]).run()
    scores = read_log(RunFolder(tmp_path).scores("brightness"))
    assert [entry["iteration"] for entry in scores] == [1, 2]
    assert all(-1 < entry["brightness"] < 1 for entry in scores)
