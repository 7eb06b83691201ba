"""From SD 1.x and 2.x to pictures, by the commands a user types, on small random models."""

from __future__ import annotations

from PIL import Image
from small_sd import save_single_file, small_pipeline

from sid_train.cli import main
from sid_train.core.recipe import read_recipe
from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def settings(teacher: object, prompts: object, *more: str) -> list[str]:
    values = [
        *(f"model.teacher={teacher}", "model.resolution=64", f"data.prompts={prompts}", "method.steps=2"),
        *("training.iterations=1", "training.batch_size=2", "training.accumulate=1", "training.grid_every=1"),
        *("training.log_every=1", "training.tracker=none", *more),
    ]
    return [part for value in values for part in ("--set", value)]


def picture(generator: object, out, *options: object) -> Image.Image:
    run("sample", generator, "--prompt", "a cat", "--count", 1, "--device", "cpu", "--out", out, *options)
    return Image.open(out)


def test_sd15_whole_networks_from_a_file(tmp_path, capsys):
    """Planned, distilled, exported and sampled."""
    teacher, prompts = tmp_path / "v1-5.safetensors", tmp_path / "prompts.txt"
    save_single_file(teacher, SD1_KIND, small_pipeline(SD1_KIND))
    prompts.write_text("a cat\na lighthouse" + ", with a lamp" * 30 + "\n")
    config = ["--config", "sd15-4step", *settings(teacher, prompts)]
    run("plan", *config, "--gpus", 1, "--gpu-memory", 80)
    assert "fits      yes" in capsys.readouterr().out
    run("distill", *config, "--out", tmp_path / "run")
    generator = tmp_path / "run" / "generator.safetensors"
    recipe = read_recipe(generator)
    assert (recipe.architecture, recipe.timesteps) == ("stable-diffusion-v1", (625, 312))
    run("export", tmp_path / "run", "--format", "checkpoint", "-o", tmp_path / "all.safetensors")
    assert picture(tmp_path / "all.safetensors", tmp_path / "x.png").size == (64, 64)
    of_rank = ("--format", "lora", "--rank", 4, "--base", teacher)
    run("export", tmp_path / "run", *of_rank, "-o", tmp_path / "l.safetensors")
    assert picture(tmp_path / "l.safetensors", tmp_path / "y.png", "--base", teacher).size == (64, 64)


def test_sd21_that_predicts_v_as_adapters_with_pairs_from_a_folder(tmp_path):
    teacher, prompts, pairs = tmp_path / "stable-diffusion-2-1", tmp_path / "prompts.txt", tmp_path / "pairs"
    small_pipeline(SD2_KIND, prediction_type="v_prediction").save_pretrained(teacher)
    prompts.write_text("a cat\na lighthouse\n")
    pairs.mkdir()
    for number in range(2):
        Image.new("RGB", (96, 80), (80 * number, 40, 200)).save(pairs / f"{number}.png")
        (pairs / f"{number}.txt").write_text("a cat")
    more = (
        f"data.pairs={pairs}",
        "gan.generator_weight=0.01",
        "adapter.rank=4",
        "training.sharding=none",
        "data.buckets=true",
    )
    run("distill", "--config", "sd15-1step", *settings(teacher, prompts, *more), "--out", tmp_path / "run")
    recipe = read_recipe(tmp_path / "run" / "generator.safetensors")
    assert (recipe.architecture, recipe.prediction_type) == ("stable-diffusion-v2/lora", "v_prediction")
    run("export", tmp_path / "run", "--format", "diffusers", "-o", tmp_path / "folder")
    found = picture(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors", tmp_path / "x.png", "--base", teacher)
    assert found.size == (64, 64)


def test_a_file_of_sd2_that_says_nothing_is_what_the_configuration_says(tmp_path):
    teacher = save_single_file(tmp_path / "x.safetensors", SD2_KIND, small_pipeline(SD2_KIND))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    more = ("model.prediction_type=v_prediction", "adapter.rank=2", "training.sharding=none", "training.grid_every=0")
    run(
        "distill",
        "--config",
        "sd15-1step",
        *settings(teacher, tmp_path / "prompts.txt", *more),
        "--out",
        tmp_path / "r",
    )
    assert read_recipe(tmp_path / "r" / "generator.safetensors").prediction_type == "v_prediction"
    # The LoRA goes on the very file that it was distilled from, though that says nothing.
    assert picture(tmp_path / "r" / "generator.safetensors", tmp_path / "x.png", "--base", teacher).size == (64, 64)
