"""``evaluate`` on a small SDXL with small stand-ins for the metrics' networks; FID against torch-fidelity's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_sdxl import save_single_file, small_pipeline

from sid_train.cli import main
from sid_train.config import load_config
from sid_train.core.noise_schedule import VPSchedule
from sid_train.evaluation.inception import Inception
from sid_train.evaluation.intervals import bootstrap
from sid_train.sample import sample_teacher_latents
from sid_train.scoring.pictures import picture_files
from sid_train.training.trainer import Trainer

open_clip = pytest.importorskip("open_clip")
torch_fidelity = pytest.importorskip("torch_fidelity")

CAPTIONS = ["a lighthouse at dawn", "a cat in a hat", "an old map", "a harbour town", "a green hill", "rain"]
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Captions, a teacher, two runs of it, two folders of pictures, and weights of every network but ImageReward's."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (folder / "7.txt").write_text("".join(f"picture {place}\n" for place in range(7)))
    teacher = save_single_file(folder / "teacher.safetensors", small_pipeline())
    settings = [f"model.teacher={teacher}", f"data.prompts={folder / 'captions.txt'}", "model.resolution=64"]
    settings += ["training.iterations=1", "training.batch_size=1", "training.tracker=none", "method.steps=2"]
    Trainer(load_config(None, settings), folder / "run").run()
    assert main(["export", str(folder / "run"), "-o", str(folder / "exported.safetensors"), "--dtype", "fp32"]) == 0

    generator = torch.Generator().manual_seed(0)
    for name in ("real", "made"):
        (folder / name).mkdir()
        for place in range(7):
            pixels = (torch.rand(SIZE, SIZE, 3, generator=generator) * (255 if name == "real" else 200)).byte()
            Image.fromarray(pixels.numpy()).save(folder / name / f"{place}.png")
    weights = folder / "weights"
    weights.mkdir()
    torch.manual_seed(0)
    tiny = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (weights / "tiny-stand-in.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(weights / "tiny-stand-in.json")
    state = open_clip.create_model("tiny-stand-in").state_dict()
    torch.save(state, weights / "clip.pt")
    torch.save({"state_dict": {name: 1.1 * tensor for name, tensor in state.items()}}, weights / "hps.pt")
    head = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, weights / "head.pth")
    _inception(weights / "inception.pth")
    return folder


def _inception(file: Path) -> None:
    """torch-fidelity's network with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.kaiming_normal_(parameter)

    torch.save({}, file)
    network = Random("random", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(network.state_dict(), file)


def options(folder: Path, *names: str) -> list[str]:
    files = {
        "inception": "inception.pth",
        "clip": "clip.pt",
        "hpsv2": "hps.pt",
        "aesthetic-clip": "clip.pt",
        "aesthetic": "head.pth",
    }
    chosen = []
    for name in names:
        model = "tiny-stand-in:" if name in ("clip", "hpsv2", "aesthetic-clip") else ""
        chosen += ["--weights", f"{name}={model}{folder / 'weights' / files[name]}"]
    return ["--captions", str(folder / "captions.txt"), "--device", "cpu", *chosen]


def figures(out: Path) -> list[dict]:
    return [source["figures"] for source in json.loads((out / "evaluation.json").read_text())["sources"]]


def test_fid_is_the_librarys(folder, tmp_path, capsys):
    settings = [*options(folder, "inception"), "--resamples", "2"]
    settings += ["--reference", str(folder / "real"), "--metric", "fid", "--metric", "recall", "--metric", "precision"]
    settings[1] = str(folder / "7.txt")
    assert main(["evaluate", str(folder / "made"), *settings, "--out", str(tmp_path / "out")]) == 0
    (ours,) = figures(tmp_path / "out")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder / "made"),
        input2=str(folder / "real"),
        fid=True,
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(folder / "weights" / "inception.pth"),
        cache=False,
    )["frechet_inception_distance"]
    assert theirs > 0.01
    assert ours["fid"]["value"] == pytest.approx(theirs, rel=1e-4)
    assert ours["fid"]["low"] < ours["fid"]["value"] < ours["fid"]["high"]
    assert 0 <= ours["recall"]["value"] <= 1
    assert "| FID | recall | precision |" in capsys.readouterr().out


def test_a_run_a_file_and_the_teacher_beside_each_other(folder, tmp_path, capsys):
    """The run and its export make the same pictures; a second command makes none."""
    sources = [str(folder / "run"), str(folder / "exported.safetensors")]
    settings = options(folder, "clip", "hpsv2", "aesthetic", "aesthetic-clip")
    for name in ("clip", "hpsv2", "aesthetic"):
        settings += ["--metric", name]
    out = tmp_path / "out"
    assert main(["evaluate", *sources, *settings, "--out", str(out)]) == 0
    run, exported = figures(out)
    assert list(run) == ["clip", "hpsv2", "aesthetic"]
    assert run == exported
    for name in ("clip", "hpsv2", "aesthetic"):
        assert run[name]["low"] < run[name]["value"] < run[name]["high"]
    pictures = sorted((out / "0-run").glob("*.png"))
    assert len(pictures) == len(CAPTIONS)
    assert [p.read_bytes() for p in pictures] == [p.read_bytes() for p in sorted((out / "1-exported").glob("*.png"))]
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (6 * 256, 2 * 256)
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [row["metric"] for row in rows] == ["clip", "hpsv2", "aesthetic"] * 2

    made, lost = {p: p.stat().st_mtime_ns for p in pictures}, pictures[2]
    lost_bytes = lost.read_bytes()
    lost.unlink()
    assert main(["evaluate", *sources, *settings, "--out", str(out)]) == 0
    assert [p for p in pictures if p.stat().st_mtime_ns != made[p]] == [lost]
    assert lost.read_bytes() == lost_bytes
    assert figures(out) == [run, exported]

    capsys.readouterr()
    assert main(["evaluate", *sources, *settings, "--out", str(out), "--seed", "1"]) == 2
    assert "its pictures were made with seed 0, not 1: choose another --out" in capsys.readouterr().err


def test_a_teacher_at_many_steps_and_fid_t(folder, tmp_path):
    teacher, settings = str(folder / "teacher.safetensors"), options(folder, "inception", "clip")
    settings += ["--resolution", "64", "--count", "3"]
    taught = [*settings, "--steps", "3", "--cfg", "2"]
    assert main(["evaluate", teacher, *taught, "--out", str(tmp_path / "teacher")]) == 0
    pictures = tmp_path / "teacher" / "0-teacher"
    compared = [*settings, "--metric", "fid-t", "--teacher-pictures", str(pictures), "--resamples", "2"]
    assert main(["evaluate", str(pictures), str(folder / "run"), *compared, "--out", str(tmp_path / "out")]) == 0
    same, other = figures(tmp_path / "out")
    assert same["fid-t"]["value"] == pytest.approx(0, abs=1e-3)
    assert other["fid-t"]["value"] > 0.01


def test_pictures_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.png", "9.png", "b2.png", "a10.png", "a9.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in picture_files(tmp_path)] == ["9.png", "10.png", "a9.png", "a10.png", "b2.png"]


def test_real_pictures_may_be_of_many_sizes(folder, tmp_path):
    """COCO's are."""
    for place, size in enumerate([(64, 48), (64, 48), (40, 64), (64, 64)]):
        Image.new("RGB", size, (60 * place, 10, 90)).save(tmp_path / f"{place}.png")
    network = Inception(str(folder / "weights" / "inception.pth"), "--weights inception", torch.device("cpu"))
    pictures = [Image.open(file) for file in picture_files(tmp_path)]
    features = network.features(pictures)
    assert features.shape == (4, 2048)
    torch.testing.assert_close(features[2:3], network.features(pictures[2:3]), rtol=1e-4, atol=1e-4)


def test_other_text_encoders_or_another_vae_are_other_pictures(folder, tmp_path, capsys):
    """Of a UNet without them."""
    other = save_single_file(tmp_path / "other.safetensors", small_pipeline(seed=1))
    unet = tmp_path / "unet.safetensors"
    assert main(["export", str(folder / "run"), "-o", str(unet), "--format", "unet", "--dtype", "fp32"]) == 0
    settings = [*options(folder, "clip"), "--count", "2", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(unet), *settings, "--base", str(folder / "teacher.safetensors")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(unet), *settings, "--base", str(other)]) == 2
    assert "its pictures were made with source" in capsys.readouterr().err


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_the_teachers_sampler_ends_at_the_picture_that_the_teacher_sees(steps, zero_snr):
    """An exact denoiser of one picture."""
    picture = torch.full((2, 4, 8, 8), 0.7)

    class Bundle:
        name, zero_terminal_snr = "exact", zero_snr

        class denoiser:
            schedule = VPSchedule.sdxl(zero_snr)

            def __new__(cls, x, sigma, cond):
                return picture

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = sample_teacher_latents(Bundle(), None, None, noise, steps)
    torch.testing.assert_close(made, picture, rtol=0, atol=1e-4)


def test_a_picture_depends_on_its_place_alone(folder, tmp_path):
    settings = options(folder, "clip")
    for count in (2, 5):
        out = tmp_path / str(count)
        assert main(["evaluate", str(folder / "run"), *settings, "--count", str(count), "--out", str(out)]) == 0
    few, many = tmp_path / "2" / "0-run", tmp_path / "5" / "0-run"
    for place in range(2):
        with Image.open(few / f"{place:06d}.png") as a, Image.open(many / f"{place:06d}.png") as b:
            assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


def test_a_protocol_says_what_differs_and_what_others_published(folder, tmp_path):
    settings = [*options(folder, "clip"), "--protocol", "coco-5k", "--count", "7", "--metric", "clip"]
    settings[1] = str(folder / "7.txt")
    assert main(["evaluate", str(folder / "made"), *settings, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "evaluation.md").read_text()
    assert "Protocol `coco-5k`" in page
    assert "**Published by others, not measured here**" in page
    assert "| DMD2 | 15.04 | 0.3277 | 0.2963 | 0.932 |" in page


def test_the_bootstraps_error_is_that_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    estimate = bootstrap(lambda rows: float(values[rows].mean()), len(values), 1000)
    assert estimate.value == pytest.approx(float(values.mean()))
    expected = 1.96 * float(values.std()) / 400**0.5
    assert estimate.high - estimate.value == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "--captions: expected a file of captions, one a picture: without, only generators of the demo's"),
        (["{exported}"], "--captions: expected a file of captions, one a picture"),
        (["{run}", "{run}"], "--captions: expected a file of captions, where there is more than one source"),
        (["{run}", "--captions", "{captions}", "--metric", "fid"], "--reference: fid needs a folder of pictures"),
        (["{run}", "--captions", "{captions}", "--metric", "is"], "--metric: expected one of fid, fid-t, precision"),
        (["{run}", "--captions", "{captions}", "--protocol", "coco"], "--protocol: expected one of coco-30k, coco-5k"),
        (["{run}", "--captions", "{captions}", "--count", "7"], "--count: expected 2 to 6, the captions in"),
        (["{run}", "--captions", "{captions}", "--weights", "vgg=a"], "--weights: expected NAME=FILE, NAME one of"),
        (
            ["{made}", "--captions", "{captions}"],
            "made: expected 6 pictures, one a caption, in the order of their names",
        ),
        (["{run}", "--captions", "{captions}", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        (
            ["{run}", "--captions", "{captions}", "--metric", "fid", "--reference", "{none}"],
            "none.safetensors: expected a folder of pictures, and there is none of that name",
        ),
        (["{made}", "--captions", "{many}", "--metric", "hpsv2"], "--weights hpsv2: expected the file of HPSv2"),
        (
            ["{made}", "--captions", "{many}", "--weights", "clip=tiny-stand-in:{none}"],
            "cannot be had",
        ),
        (
            ["{made}", "--captions", "{many}", "--metric", "image-reward"],
            "--weights image-reward: needs its authors' package",
        ),
        (["{teacher}", "--captions", "{captions}"], "it carries no recipe and is no run: for a model that is not"),
        (["{none}", "--captions", "{captions}"], "none.safetensors"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, arguments, message):
    names = {name: folder / name for name in ("run", "made")}
    names |= {"exported": folder / "exported.safetensors", "captions": folder / "captions.txt"}
    names |= {"many": folder / "7.txt", "teacher": folder / "teacher.safetensors", "none": folder / "none.safetensors"}
    given = [argument.format(**names) for argument in arguments]
    assert main(["evaluate", *given, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2


def test_weights_of_inception_are_not_unpickled(folder, tmp_path, capsys):
    """torch-fidelity reads its file without any care for what is in it."""
    file = tmp_path / "inception.pth"
    file.write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(7)'\ntR.")
    settings = ["--captions", str(folder / "7.txt"), "--reference", str(folder / "real"), "--metric", "fid"]
    given = [str(folder / "made"), *settings, "--weights", f"inception={file}", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *given]) == 2
    assert "--weights inception: the weights" in capsys.readouterr().err
