"""``convert`` on pickles as the SiD authors release them: written where their code is, read where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_sdxl import save_single_file, small_pipeline

from sid_train.cli import main
from sid_train.core.recipe import PRESETS, read_recipe
from sid_train.models.families import load_generator, open_generator

NAMES = {
    "unet": "SiD_SDXL_4.54.54.5_AMPfp16_StepWise_4step_004421.pkl",
    "encoder": "SiDA_SDXL_001_lrg0.5_batch256_joint2step_002452.pkl",
}
# The authors' own class is a UNet whose encoder can be asked alone; only its name matters here.
THEIRS = """
from diffusers import UNet2DConditionModel

class UNet2DConditionModelWithEncoder(UNet2DConditionModel):
    pass
"""
WRITE = """
import pickle, sys
import torch
from diffusers import UNet2DConditionModel
from training.unet_with_encoder import UNet2DConditionModelWithEncoder

teacher, unet, encoder = sys.argv[1:]
for kind, path in ((UNet2DConditionModel, unet), (UNet2DConditionModelWithEncoder, encoder)):
    network = kind.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float16).eval().requires_grad_(False)
    with open(path, "wb") as file:
        pickle.dump({"ema": network}, file, protocol=4)
"""


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline) -> Path:
    """The two pickles, and the teacher in a folder and in a single file."""
    folder = tmp_path_factory.mktemp("authors")
    pipeline.save_pretrained(folder / "teacher")
    save_single_file(folder / "base.safetensors", pipeline)
    (folder / "code" / "training").mkdir(parents=True)
    (folder / "code" / "training" / "unet_with_encoder.py").write_text(THEIRS)
    paths = [folder / name for name in NAMES.values()]
    subprocess.run([sys.executable, "-c", WRITE, folder / "teacher", *paths], check=True, cwd=folder / "code")
    return folder


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(("kind", "steps"), [("unet", 4), ("encoder", 2)])
def test_a_pickle_of_the_authors_becomes_a_generator(folder, pipeline, tmp_path, kind, steps, capsys):
    source, out = folder / NAMES[kind], tmp_path / "sid.safetensors"
    assert "training.unet_with_encoder" not in sys.modules
    assert (b"unet_with_encoder" in source.read_bytes()) == (kind == "encoder")
    assert convert(source, "-o", out) == 0
    text = capsys.readouterr().out
    assert f"steps: {steps}, as the name says" in text
    assert "t_init: 625, a guess" in text
    recipe = read_recipe(out)
    assert recipe.timesteps == PRESETS[f"SiD 625 ({steps} steps)"].timesteps
    assert recipe.guidance.strategy == {"unet": "lsg", "encoder": "zero-cfg"}[kind]
    assert recipe.title == source.stem
    state, found = pipeline.unet.state_dict(), open_generator(str(out)).tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor.load(), state[name].half()) for name, tensor in found.items())


def test_all_in_one_file_makes_pictures(folder, tmp_path, capsys):
    source, out = folder / NAMES["encoder"], tmp_path / "sid.safetensors"
    options = ("--format", "checkpoint", "--base", folder / "base.safetensors", "--t-init", 999, "--dtype", "fp32")
    assert convert(source, "-o", out, *options) == 0
    assert "a guess" not in capsys.readouterr().out
    assert read_recipe(out).timesteps == (999, 499)
    picture = tmp_path / "x.png"
    ask = ["sample", str(out), "--prompt", "a cat", "--count", "1", "--resolution", "64", "--device", "cpu"]
    assert main([*ask, "--out", str(picture)]) == 0
    assert Image.open(picture).size == (64, 64)


@pytest.mark.parametrize("ending", ["pth", "bin", "ckpt"])
def test_a_state_dictionary_in_ldm_names(folder, pipeline, tmp_path, ending):
    source, out = tmp_path / f"dmd2.{ending}", tmp_path / "x.safetensors"
    torch.save({"state_dict": pipeline.unet.state_dict()}, source)
    assert convert(source, "-o", out, "--recipe", "DMD2 (4 steps)", "--dtype", "fp32") == 0
    assert read_recipe(out).timesteps == (999, 749, 499, 249)
    found = open_generator(str(out)).tensors
    assert all(torch.equal(found[name].load(), tensor) for name, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pkl", (), "its name does not say how it is sampled: give --steps (and --t-init), or --recipe"),
        ("model.pkl", ("--recipe", "DMD3"), "--recipe: expected one of SiD 625 (4 steps)"),
        ("model.pkl", ("--recipe", "DMD2 (4 steps)", "--steps", 2), "this recipe's timesteps have no rule for others"),
        ("model.pkl", ("--steps", 0), "steps: expected 1 to 8, got 0"),
        ("SiD_SDXL_4step.pkl", ("--t-init", 0), "t_init: expected 4"),
        ("model.pkl", ("--steps", 9), "steps: expected 1 to 8, got 9"),
        ("model.pkl", ("--steps", 4, "--t-init", 1000), "t_init: expected 4"),
        ("model.pkl", ("--steps", 4, "--base", "x"), "--base: the format unet has no text encoders"),
        ("model.pkl", ("--steps", 4, "--format", "checkpoint"), "--base: expected the model with text encoders"),
    ],
)
def test_mistakes(folder, tmp_path, name, options, message, capsys):
    source = tmp_path / name
    source.symlink_to(folder / NAMES["unet"])
    assert convert(source, "-o", tmp_path / "x.safetensors", *options) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.out == ""
    assert not (tmp_path / "x.safetensors").exists()


def test_steps_alone_take_the_authors_t_init_and_say_so(folder, tmp_path, capsys):
    source, out = tmp_path / "model.pkl", tmp_path / "x.safetensors"
    source.symlink_to(folder / NAMES["unet"])
    assert convert(source, "-o", out, "--steps", 2) == 0
    assert "t_init: 625, a guess" in capsys.readouterr().out
    assert read_recipe(out).timesteps == (625, 312)


@pytest.mark.parametrize(
    ("name", "options", "timesteps", "predicts", "scale"),
    [
        ("dmd2_sdxl_4step_unet_fp16.pkl", (), (999, 749, 499, 249), "epsilon", 1),
        ("x.pkl", ("--recipe", "LCM (4 steps)", "--steps", 3), (999, 679, 339), "epsilon", 1),
        ("sdxl_lightning_1step_unet_x0.pkl", (), (999,), "x0", 1),
        ("nitrosd-vibrant_unet.pkl", ("--steps", 2), (999, 499), "epsilon", 0.5),
    ],
)
def test_other_families_go_by_their_names_and_rules(folder, tmp_path, name, options, timesteps, predicts, scale):
    source, out = tmp_path / name, tmp_path / "x.safetensors"
    source.symlink_to(folder / NAMES["unet"])
    assert convert(source, "-o", out, *options) == 0
    assert read_recipe(out).timesteps == timesteps
    schedule = load_generator(str(out))[0].denoiser.schedule  # as sampling takes it
    assert (schedule.prediction_type, schedule.timestep_scale) == (predicts, scale)


def test_a_file_with_a_recipe_is_left_alone(folder, tmp_path, capsys):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert convert(folder / NAMES["unet"], "-o", first) == 0
    assert convert(first, "-o", second, "--steps", 4) == 2
    assert "carries a recipe already" in capsys.readouterr().err


def test_a_pickle_of_another_network_is_named(tmp_path, capsys):
    import pickle

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": torch.nn.Linear(2, 2)}, 4))
    assert convert(tmp_path / "x.pkl", "-o", tmp_path / "x.safetensors", "--steps", 4) == 2
    assert "x.pkl: UNet: expected tensors such as input_blocks.0.0.weight" in capsys.readouterr().err
