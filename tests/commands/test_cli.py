"""The command line as a user meets it."""

import base64
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file

from sid_train.cli import main
from sid_train.core.recipe import read_recipe
from sid_train.files.header import read_safetensors_metadata
from sid_train.files.images import thumbnail
from sid_train.models.families import load_model

TINY = ["--set", "training.iterations=2", "--set", "training.batch_size=4", "--set", "method.steps=2"]
PROMPT = "a red three on a blue ground"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished two-iteration run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["distill", "--config", "demo", *TINY, "--set", "training.grid_every=2", "--out", str(folder)]) == 0
    return folder


def test_help_lists_every_command_with_a_line():
    text = subprocess.run([sys.executable, "-m", "sid_train", "--help"], capture_output=True, text=True, check=True)
    for command in ("doctor", "demo", "distill", "sample", "inspect", "evaluate", "export", "encode"):
        assert f"\n    {command} " in text.stdout


def test_distill_prints_its_configuration_and_leaves_a_generator(run, capsys):
    assert (run / "generator.safetensors").is_file()
    assert (run / "config.toml").is_file()
    assert list((run / "grids").glob("*.png"))
    assert list((run / "tensorboard").rglob("events*"))
    recipe = read_recipe(run / "generator.safetensors")
    assert recipe.timesteps == (625, 312)
    assert recipe.base_model_hash == load_model("demo").file_hash
    assert recipe.training_summary["iterations"] == "2"
    # The same command again has nothing left to do.
    assert main(["distill", "--config", "demo", *TINY, "--out", str(run)]) == 0
    assert "[method]" in capsys.readouterr().out


def test_sample_makes_the_same_picture_from_the_same_seed(run, tmp_path):
    pictures = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        out = tmp_path / f"{name}.png"
        model = str(run / "generator.safetensors")
        assert main(["sample", model, "--prompt", PROMPT, "--count", "3", "--seed", seed, "--out", str(out)]) == 0
        pictures.append(Image.open(out).tobytes())
    assert Image.open(out).size == (48, 16)
    assert pictures[0] == pictures[1] != pictures[2]


def test_sample_warns_of_untrained_steps(run, tmp_path, capsys):
    model, out = str(run / "generator.safetensors"), str(tmp_path / "a.png")
    assert main(["sample", model, "--prompt", PROMPT, "--steps", "4", "--out", out]) == 0
    captured = capsys.readouterr()
    assert "was trained for 2 step(s), not 4" in captured.err
    assert "timesteps 625 468 312 156" in captured.out


def test_inspect_shows_the_recipe(run, capsys):
    assert main(["inspect", str(run / "generator.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["timesteps"] == [625, 312]
    assert main(["inspect", str(run / "generator.safetensors")]) == 0
    assert "625 312" in capsys.readouterr().out


def test_export_writes_the_averaged_generator_in_any_dtype(run, tmp_path):
    for dtype in ("fp16", "bf16", "fp32"):
        file = tmp_path / f"{dtype}.safetensors"
        assert main(["export", str(run), "-o", str(file), "--dtype", dtype]) == 0
        assert read_recipe(file) == read_recipe(run / "generator.safetensors")
    ours, theirs = load_file(tmp_path / "fp16.safetensors"), load_file(run / "generator.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_exported_file_shows_the_runs_pictures(run, tmp_path, capsys):
    """The first two by two of the grid, and nothing of a grid that cannot be read but a warning."""
    file = tmp_path / "generator.safetensors"
    assert main(["export", str(run), "-o", str(file)]) == 0
    (grid,) = (run / "grids").glob("*.png")
    with Image.open(grid) as image:
        side = image.width // 4
        expected = image.convert("RGB").crop((0, 0, side, side))
    url = read_safetensors_metadata(file)["modelspec.thumbnail"]
    kind, _, text = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert len(url) < 30_000
    with Image.open(io.BytesIO(base64.b64decode(text))) as small:
        assert small.size == (side, side)
        assert ImageStat.Stat(ImageChops.difference(small, expected)).mean < [20, 20, 20]
    again = tmp_path / "again.safetensors"
    assert main(["export", str(file), "-o", str(again)]) == 0
    assert read_safetensors_metadata(again)["modelspec.thumbnail"] == url
    content = grid.read_bytes()
    grid.write_bytes(b"torn")
    assert main(["export", str(run), "-o", str(file)]) == 0
    assert "the file has no thumbnail, for" in capsys.readouterr().out
    assert "modelspec.thumbnail" not in read_safetensors_metadata(file)
    grid.write_bytes(content)


def test_a_thumbnail_is_small_whatever_it_shows(tmp_path):
    noise = Image.effect_noise((8 * 512, 4 * 512), 200)
    noise.save(tmp_path / "noise.png")
    url = thumbnail(tmp_path / "noise.png", 8)
    assert len(url) < 30_000
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as small:
        assert small.size == (256, 256)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "cat.txt").write_text("a red cat\n")
    (tmp_path / "bad.toml").write_text("[method]\nstesp = 4\n")
    (tmp_path / "text.safetensors").write_text("not a safetensors file")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{tmp}/none.safetensors", "--prompt", PROMPT], "there is no such file"),
        (["sample", "{tmp}/text.safetensors", "--prompt", PROMPT], "expected a safetensors file"),
        (["sample", "{tmp}/plain.safetensors", "--prompt", PROMPT], "expected tensors such as input_blocks"),
        (["sample", "demo", "--prompt", PROMPT], "carries no SiD recipe"),
        (["sample", "{run}/generator.safetensors", "--prompt", "a red cat"], "does not know 'cat'"),
        (["sample", "{run}/generator.safetensors", "--prompt", PROMPT, "--steps", "9"], "steps: expected 1 to 8"),
        (["sample", "{run}/generator.safetensors", "--prompt", PROMPT, "--steps", "0"], "steps: expected 1 to 8"),
        (["sample", "{run}/generator.safetensors", "--prompt", PROMPT, "--out", "{tmp}/x.gif"], "ends in .png"),
        (["sample", "{run}/generator.safetensors", "--prompt", PROMPT, "--device", "gpu"], "--device: 'gpu' cannot be"),
        (["sample", "{run}/generator.safetensors"], "required: --prompt"),
        (["inspect", "{tmp}/none.safetensors"], "none.safetensors"),
        (["inspect", "{tmp}/plain.safetensors"], "carries no SiD recipe"),
        (["evaluate", "demo"], "carries no SiD recipe"),
        (["export", "{tmp}/nothing", "-o", "{tmp}/x.safetensors"], "expected a run folder"),
        (["export", "{run}", "-o", "{tmp}/x.ckpt"], "ends in .safetensors"),
        (["distill", "--config", "{tmp}/bad.toml", "--out", "{tmp}/new"], "did you mean method.steps"),
        (["distill", "--config", "nope", "--out", "{tmp}/new"], "one of demo, demo-1step"),
        (["distill", "--config", "demo", "--set", "data.prompts={tmp}/empty.txt", "--out", "{tmp}/new"], "no prompt"),
        (["distill", "--config", "demo", "--set", "data.prompts={tmp}/no.txt", "--out", "{tmp}/new"], "no file"),
        (["distill", "--config", "demo", "--set", "data.prompts={tmp}/cat.txt", "--out", "{tmp}/new"], "'cat'"),
        (["distill", "--config", "demo", "--set", "model.teacher={tmp}/no", "--out", "{tmp}/new"], "no such file"),
        (["distill", "--config", "demo", "--set", "data.pairs=x", "--out", "{tmp}/new"], "unused while"),
        (["distill", "--config", "demo", *TINY, "--set", "training.seed=5", "--out", "{run}"], "training.seed (was 0"),
        (["demo", "--steps", "9", "--out", "{tmp}/new"], "steps: expected 1 to 8, got 9"),
        (["demo", "--guidance", "cfg", "--out", "{tmp}/new"], "guidance: expected none"),
        (["demo", "--minutes", "-1", "--out", "{tmp}/new"], "--minutes: expected more than 0"),
        (["demo", "--minutes", "soon"], "expected a number, got 'soon'"),
        (["demo", "--minutes", "inf"], "expected a finite number, got 'inf'"),
        (["plan", "--config", "demo", "--gpu-memory", "nan"], "expected a finite number, got 'nan'"),
        (["sample", "demo", "--prompt", PROMPT, "--seed", "9" * 20], "expected an integer of 64 bits"),
        (["sample", "demo", "--prompt", PROMPT, "--seed", "9" * 5000], "expected an integer, got '999"),
        (["sample", "demo", "--prompt", "half an emoji \ud83d"], "expected text in UTF-8, got 'half an emoji \\ud83d'"),
        (["inspect", "{tmp}/a\x1b[31m\n\x7f.safetensors"], "a\\x1b[31m\\n\\x7f.safetensors"),
        (["inspect", "{tmp}"], "expected a regular file, got a folder"),
        (["inspect", "{tmp}/cat.txt/x.safetensors"], "cat.txt/x.safetensors"),
        (["inspect", "{tmp}/" + "a" * 5000], "characters)"),
        (["export", "{run}", "-o", "{tmp}/cat.txt/x.safetensors"], "cat.txt"),
        (["unknown"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(arguments, message, run, files, capsys):
    arguments = [a.format(tmp=files, run=run) for a in arguments]
    before = sorted(files.rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert captured.err.removesuffix("\n").isprintable()
    assert len(captured.err) < 2200
    assert sorted(files.rglob("*")) == before  # nothing half-written


BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
LIGHT = [sys.executable, "-m", "sid_train", "doctor", "--seconds", "0"]  # does not wait for PyTorch


@pytest.mark.parametrize(
    ("console", "shown"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, rb"\u732b"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"\udce7\udc8c\udcab"),  # as it was decoded
        ({"PYTHONIOENCODING": "utf-8"}, "猫".encode()),
    ],
    ids=["cp1252", "C", "utf-8"],
)
def test_what_a_console_cannot_show_is_escaped(console, shown):
    environment = os.environ | console
    found = subprocess.run([*LIGHT, "--out", "猫"], env=environment, capture_output=True, check=True)
    assert found.stderr == b""
    assert shown in found.stdout
    wrong = subprocess.run([*LIGHT, "--seconds", "猫"], env=environment, capture_output=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count(b"\n") == 1
    assert shown in wrong.stderr


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_is_no_error(buffered):
    read, write = os.pipe()
    os.close(read)
    environment = BUFFERED | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    ended = subprocess.run(LIGHT, stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_on_a_full_disk_is_said():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(LIGHT, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: standard output cannot be written: [Errno 28] No space left on device\n"


def test_an_error_of_the_disk_says_what_it_was_about(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    assert main(["export", str(run), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert f"No space left on device: '{tmp_path / 'x.safetensors'}'" in capsys.readouterr().err


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sid_train.commands.plan", None)
    with pytest.raises(ImportError, match="plan"):  # our own: a bug keeps its traceback
        main(["plan"])
    broken = SimpleNamespace(plan=lambda **_: __import__("no_such"))
    monkeypatch.setitem(sys.modules, "sid_train.commands.plan", broken)
    assert main(["plan"]) == 2
    assert (
        capsys.readouterr().err == "error: No module named 'no_such'. python -m sid_train doctor says what is missing\n"
    )
