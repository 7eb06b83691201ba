"""From an SDXL file and prompts to pictures, by the commands a user types, on a small random SDXL."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_sdxl import save_single_file, small_pipeline

from sid_train.cli import main
from sid_train.core.recipe import read_recipe
from sid_train.core.rng import BatchRNG
from sid_train.data.config import DataConfig
from sid_train.data.pairs import load_pairs
from sid_train.data.rows import load_prompt_table
from sid_train.files.header import read_safetensors_metadata
from sid_train.files.logs import read_log
from sid_train.models.families import load_model
from sid_train.training.run import RunFolder

PROMPTS = ["a lighthouse at dawn", "a cat in a hat", "an old map" + ", with a compass rose" * 20]  # the last: 2 chunks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_single_file(tmp_path_factory.mktemp("sdxl") / "small-xl.safetensors", small_pipeline()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, and pictures with captions."""
    path = tmp_path_factory.mktemp("data")
    (path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (path / "pairs").mkdir()
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (96, 80), (80 * number, 40, 200)).save(path / "pairs" / f"{number}.png")
        (path / "pairs" / f"{number}.txt").write_text(prompt)
    return path


@pytest.fixture(scope="module")
def settings(teacher, folder) -> list[str]:
    values = [
        f"model.teacher={teacher}",
        "model.resolution=64",
        f"data.prompts={folder / 'prompts.txt'}",
        "method.steps=2",
        "adapter.rank=4",
        "training.iterations=2",
        "training.batch_size=2",
        "training.accumulate=1",
        "training.log_every=1",
        "training.grid_every=2",
        "training.tracker=none",
    ]
    return [part for value in values for part in ("--set", value)]


RECIPE = ["--config", "sdxl-4step-lora-24gb"]


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def lora_run(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "lora"
    run("distill", *RECIPE, *settings, "--out", path)
    return path


def test_lora_from_prompts_alone_and_its_pictures(lora_run, teacher, tmp_path, capsys):
    recipe = read_recipe(lora_run / "generator.safetensors")
    assert recipe.timesteps == (625, 312)
    assert recipe.training_resolution == (64, 64)
    assert (lora_run / "grids" / "000002.png").is_file()
    out = tmp_path / "pictures.png"
    run(
        "sample",
        lora_run / "generator.safetensors",
        "--base",
        teacher,
        "--prompt",
        PROMPTS[0],
        "--count",
        2,
        "--out",
        out,
    )
    assert "timesteps 625 312" in capsys.readouterr().out
    first = Image.open(out)
    # The same pictures from the same generator in one file.
    run("export", lora_run, "--format", "checkpoint", "--dtype", "fp32", "-o", tmp_path / "all.safetensors")
    run("sample", tmp_path / "all.safetensors", "--prompt", PROMPTS[0], "--count", 2, "--out", out)
    difference = torch.tensor(list(first.tobytes())).float() - torch.tensor(list(Image.open(out).tobytes())).float()
    assert difference.abs().mean() < 1  # the LoRA was stored in fp16


def test_what_the_configuration_says_of_a_teacher_that_says_nothing(settings, teacher, tmp_path, capsys):
    """It reaches the run, its recipe, what is exported of the run, and pictures on the very same base."""
    change = ["--set", "model.prediction_type=v_prediction", "--set", "training.grid_every=0"]
    run("distill", *RECIPE, *settings, *change, "--set", "training.iterations=1", "--out", tmp_path / "run")
    lora = tmp_path / "run" / "generator.safetensors"
    assert read_recipe(lora).prediction_type == "v_prediction"
    run("export", tmp_path / "run", "--format", "unet", "-o", tmp_path / "unet.safetensors")
    assert "v_pred" in load_file(tmp_path / "unet.safetensors")
    run("sample", lora, "--base", teacher, "--prompt", "a", "--count", 1, "--out", tmp_path / "x.png")
    assert "warning" not in capsys.readouterr().err
    start = ["--set", f"model.init_generator={lora}", "--set", "training.grid_every=0"]
    assert main(["distill", *RECIPE, *settings, *start, "--out", str(tmp_path / "second")]) == 2
    assert "a generator that predicts epsilon, as the teacher does, got v_prediction" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "-o", str(RunFolder(tmp_path / "run").last_checkpoint())]) == 2
    assert "which is read for it" in capsys.readouterr().err


def test_another_base_is_told(lora_run, tmp_path, capsys):
    other = save_single_file(tmp_path / "other.safetensors", small_pipeline(seed=5))
    lora = lora_run / "generator.safetensors"
    run("sample", lora, "--base", other, "--prompt", "a", "--count", 1, "--out", tmp_path / "x.png")
    assert "warning: " in (told := capsys.readouterr().err)
    assert "other.safetensors is another file than the model that the LoRA was distilled from (small-xl" in told
    run("export", lora, "--base", other, "--format", "unet", "-o", tmp_path / "unet.safetensors")
    assert "other.safetensors is another file" in capsys.readouterr().out


def test_every_format_of_a_run(lora_run, tmp_path):
    for format_ in ("checkpoint", "unet", "lora"):
        run("export", lora_run, "--format", format_, "-o", tmp_path / f"{format_}.safetensors")
        assert read_recipe(tmp_path / f"{format_}.safetensors").timesteps == (625, 312)
    run("export", lora_run, "--format", "diffusers", "-o", tmp_path / "folder")
    assert (tmp_path / "folder" / "model_index.json").is_file()


def test_a_second_stage_starts_from_the_lora(lora_run, settings, tmp_path):
    """Of which a model manager left sid.* alone in the header."""
    lora, own = tmp_path / "lora.safetensors", lora_run / "generator.safetensors"
    metadata = {key: text for key, text in read_safetensors_metadata(own).items() if key.startswith("sid.")}
    save_file(load_file(own), lora, metadata)
    start = ["--set", f"model.init_generator={lora}", "--set", "training.iterations=1"]
    out = tmp_path / "second"
    run("distill", *RECIPE, *settings, *start, "--set", "optimizer.generator_lr=1e-12", "--out", out)
    first, second = (load_file(RunFolder(path).last_checkpoint()) for path in (lora_run, out))
    for name, tensor in second.items():
        if name.startswith("generator."):
            torch.testing.assert_close(
                tensor, first[name.replace("generator.", "generator_ema.")], rtol=1e-2, atol=1e-4
            )


def test_whole_networks_in_bf16_with_pairs_from_a_cache(settings, folder, tmp_path):
    """No text encoder, no VAE encoder: a UNet alone is enough of a teacher then."""
    pairs = [
        part
        for value in (f"data.pairs={folder / 'pairs'}", "gan.generator_weight=0.01", "method.guidance=zero-cfg")
        for part in ("--set", value)
    ]
    cache = tmp_path / "cache"
    run("encode", *RECIPE, *settings, *pairs, "--out", cache)
    whole = ["--set", "adapter.rank=0", "--set", "training.grid_every=0"]
    logs = []
    for name, source in (("live", []), ("cached", ["--set", f"data.cache={cache}"])):
        run("distill", *RECIPE, *settings, *pairs, *whole, *source, "--out", tmp_path / name)
        logs.append([entry["losses"] for entry in read_log(tmp_path / name / "log.jsonl")])
    assert logs[0] == logs[1]
    assert set(logs[0][0]) == {"fake_score", "discriminator", "sid", "gan"}


def test_long_prompts_have_shards_of_their_own(teacher, settings, folder, tmp_path, capsys):
    bundle = load_model(teacher, None, 64)
    cache, index = tmp_path / "cache", tmp_path / "cache" / "index.json"
    pairs = ["--set", f"data.pairs={folder / 'pairs'}", "--set", "gan.generator_weight=0.01"]
    run("encode", *RECIPE, *settings, *pairs, "--out", cache)
    told = "1 have more than 75 tokens (read in up to 2 chunks), 0 are cut after 225\n"
    out = capsys.readouterr().out
    assert f"prompts.txt: {told}" in out
    assert f"pairs, captions: {told}" in out
    for table in ("prompts", "pairs"):
        files = [load_file(cache / f"{table}-{number:05d}.safetensors") for number in range(2)]
        assert [(f["row"].tolist(), f["text"].shape[1]) for f in files] == [([0, 1], 77), ([2], 154)]
    facts = json.loads(index.read_text())["facts"]
    assert (facts["prompt_chunks"], facts["caption_chunks"]) == (2, 2)

    # As an earlier version cut them, and as this one does where it is told to.
    short, once = tmp_path / "short", ["--set", "data.max_tokens=75"]
    run("encode", *RECIPE, *settings, *once, "--out", short)
    assert "prompts.txt: 1 have more than 75 tokens, 1 are cut after 75\n" in capsys.readouterr().out
    assert [shard["rows"] for shard in json.loads((short / "index.json").read_text())["prompts"]] == [3]
    for limit, made in ((225, short), (75, cache)):
        bundle.conditioner.max_tokens = limit
        with pytest.raises(ValueError, match="was encoded from something else: prompt_chunks"):
            load_prompt_table(DataConfig(str(folder / "prompts.txt"), cache=str(made)), bundle, "empty")
    assert main([str(a) for a in ["encode", *RECIPE, *settings, "--out", short]]) == 2
    assert "was encoded from something else: prompt_chunks (None there, 2 here)" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_one_line(teacher):
    """The command line refuses it before a model is opened (test_cli.py); this is for everybody else who asks."""
    with pytest.raises(ValueError, match="prompt") as error:
        load_model(teacher, None, 64).conditioner.encode(["a cat \udcff"])
    assert str(error.value).endswith("half a character ('\\udcff') after 6 characters: write it anew in UTF-8")


def test_pairs_keep_their_own_conditioning(teacher, folder):
    bundle = load_model(teacher, None, 64)
    real = load_pairs(str(folder / "pairs"), bundle).draw(8, BatchRNG(torch.Generator().manual_seed(0)))
    expected = bundle.conditioner.encode(PROMPTS)
    for text, pooled, latents in zip(real.cond.text, real.cond.pooled, real.latents, strict=True):
        (match,) = [i for i in range(3) if torch.allclose(expected.pooled[i], pooled, atol=1e-5)]
        assert torch.allclose(expected.text[match], text, atol=1e-4)
        picture = torch.tensor([80 * match, 40, 200]).reshape(3, 1, 1).expand(3, 64, 64) / 127.5 - 1
        assert torch.allclose(bundle.codec.encode(picture[None])[0], latents, atol=0.05)


def test_dry_run_reads_everything_and_writes_nothing(settings, tmp_path, capsys):
    run("distill", *RECIPE, *settings, "--out", tmp_path / "run", "--dry-run")
    out = capsys.readouterr().out
    assert "prompts       3, 1 have more than 75 tokens (read in up to 2 chunks), 0 are cut after 225\n" in out
    assert "first prompt  'a lighthouse at dawn', encoded now: text 1x77x128" in out
    assert "LoRA adapters of rank 4" in out
    assert "Nothing was trained or written." in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.teacher=no.safetensors"], "there is no such file or folder"),
        (["model.resolution=100"], "expected a multiple of 64"),
        (["data.cache=nowhere"], "index.json"),
        (["model.init_generator=demo"], "carries no SiD recipe"),
        (
            ["training.clip_model=no/such/folder", "training.snapshot_every=1"],
            "expected a CLIP model's folder or hub id",
        ),
    ],
)
def test_mistakes_are_found_before_training(settings, tmp_path, capsys, overrides, message):
    changes = [part for value in overrides for part in ("--set", value)]
    for dry in ([], ["--dry-run"]):
        assert main(["distill", *RECIPE, *settings, *changes, "--out", str(tmp_path / "run"), *dry]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_convert_and_inspect(teacher, tmp_path, capsys):
    from safetensors.torch import save_file

    source = tmp_path / "dmd2.safetensors"
    save_file({k: v.half() for k, v in load_model(teacher).denoiser.unet.state_dict().items()}, source)
    run("convert", source, "--recipe", "DMD2 (4 steps)", "-o", tmp_path / "with-recipe.safetensors")
    run("inspect", tmp_path / "with-recipe.safetensors")
    assert "999 749 499 249" in capsys.readouterr().out
    assert main(["convert", str(source), "--recipe", "DMD3", "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "expected one of SiD 625" in capsys.readouterr().err


def test_the_snapshot_with_the_highest_clip_score_is_exported(settings, clip_folder, tmp_path, capsys):
    keep = ["--set", "training.snapshot_every=1", "--set", f"training.clip_model={clip_folder}"]
    run("distill", *RECIPE, *settings, *keep, "--out", tmp_path / "run")
    scores = {entry["iteration"]: entry["clip_score"] for entry in read_log(tmp_path / "run" / "clip.jsonl")}
    assert list(scores) == [1, 2]
    best = max(scores, key=scores.get)
    assert f"The snapshot of iteration {best} has" in capsys.readouterr().out
    recipe = read_recipe(tmp_path / "run" / "generator.safetensors")
    assert recipe.training_summary["iterations"] == str(best)
