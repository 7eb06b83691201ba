"""SiD Run, on runs of the trainer."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import module, run
from safetensors import safe_open

SHORT = ["training.tracker=none", "training.batch_size=2", "training.log_every=1", "training.grid_every=2"]
SHORT += ["method.steps=1"]


@pytest.fixture(scope="module")
def folder(pack, tmp_path_factory):
    """A run that has two of four iterations, and one that is a LoRA, and done."""
    config, trainer, callbacks = (
        module(pack, f"sid_train.{name}") for name in ("config", "training.trainer", "training.callbacks")
    )
    base = tmp_path_factory.mktemp("runs")
    whole = trainer.Trainer(
        config.load_config("demo", [*SHORT, "training.iterations=4"]), base / "whole", [callbacks.Grids(2)]
    )

    class Stop(callbacks.Callback):
        def on_iteration(self, run, losses) -> None:
            if run.iteration == 2:
                raise KeyboardInterrupt

    whole.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    done = [*SHORT, "training.iterations=1", "adapter.rank=2"]
    trainer.Trainer(config.load_config("demo", done), base / "lora").run()
    (base / "whole" / "alarms.jsonl").write_text('{"iteration": 2, "alarm": "pictures are alike"}\n')
    return base


@pytest.fixture
def places(tmp_path, monkeypatch, folders):
    monkeypatch.setitem(folders.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def test_a_run_in_the_middle(nodes, folder):
    text, grid, losses, file = run(nodes["SiDRun"], folder=f" {folder / 'whole'}\n")
    assert text.startswith("Iteration 2 of 4, ")
    assert " images/s: 0 minutes left. fake score " in text
    assert text.endswith("Iteration 2: pictures are alike")
    assert grid.ndim == 4
    assert grid.std() > 0.01
    assert losses.shape[0] == 1
    assert file == ""
    before = nodes["SiDRun"].fingerprint_inputs(folder=str(folder / "whole"))
    assert before == nodes["SiDRun"].fingerprint_inputs(folder=str(folder / "whole"))
    assert before != nodes["SiDRun"].fingerprint_inputs(folder=str(folder / "lora"))


def test_its_generator_is_exported_for_the_loader(nodes, folder, places):
    names = [run(nodes["SiDRun"], folder=str(folder / "lora"), export=True)[3] for _ in range(2)]
    assert names == ["distilled-001.safetensors", "distilled-002.safetensors"]
    with torch.inference_mode():
        demo = run(nodes["SiDDemoModel"])
        _, recipe, *_ = run(nodes["SiDLoRALoader"], model=demo[0], lora_name=names[0])
    assert recipe.timesteps == (625,)


def test_without_the_trainers_packages_it_says_what_to_do(nodes, folder, places, monkeypatch, pack):
    monkeypatch.setitem(sys.modules, f"{pack.__name__}.sid_train.commands.export", None)
    with pytest.raises(ValueError, match=r"export: it needs the trainer's packages.*python -m sid_train export"):
        run(nodes["SiDRun"], folder=str(folder / "lora"), export=True)


def test_a_whole_generator_of_the_demo_becomes_a_lora(nodes, folder, places, pack):
    config, trainer = (module(pack, f"sid_train.{name}") for name in ("config", "training.trainer"))
    trainer.Trainer(config.load_config("demo", [*SHORT, "training.iterations=1"]), places / "run").run()
    *_, name = run(nodes["SiDRun"], folder=str(places / "run"), export=True)
    with safe_open(places / name, "pt") as file:
        assert any(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "folder: expected that of a run"), ("nowhere", "there is no nowhere"), ("//host/run", "on this computer")],
)
def test_mistakes(nodes, given, message):
    with pytest.raises(ValueError, match=message):
        run(nodes["SiDRun"], folder=given)
    assert nodes["SiDRun"].fingerprint_inputs(folder=given) == ""
