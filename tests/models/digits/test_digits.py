"""The demo's data and the files that ship with it."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sid_train.core.noise_schedule import VPSchedule
from sid_train.core.recipe import SiDRecipe
from sid_train.core.rng import BatchRNG
from sid_train.demo.baselines import CACHE_FILE, cache_key
from sid_train.demo.metrics import CLASSIFIER_FILE
from sid_train.files.header import read_safetensors_metadata
from sid_train.files.tensors import LazyTensor
from sid_train.models.digits.data import (
    HELD_OUT_SUBJECTS,
    SPLIT_SIZES,
    SUBJECTS,
    TRAINING_SUBJECTS,
    DigitPairs,
    RealDigits,
    load_split,
)
from sid_train.models.digits.layout import TEACHER_FILE, DigitCodec, DigitConditioner
from sid_train.models.families import export_generator, load_generator, load_model, open_generator, open_model
from sid_train.models.family import ExportOptions, Generator


def test_splits_are_disjoint_and_cover_all_digits():
    splits = [load_split(name)[0].flatten(1) for name in SPLIT_SIZES]
    assert [len(s) for s in splits] == list(SPLIT_SIZES.values())
    assert sum(map(len, splits)) == 1797
    for a, b in itertools.combinations(splits, 2):
        assert torch.cdist(a, b).min() > 0


def test_held_out_pairs_cover_every_word_and_reach_no_training():
    assert len(SUBJECTS) == 180
    assert len(HELD_OUT_SUBJECTS) == 30
    held = {(s.digit, s.colour) for s in HELD_OUT_SUBJECTS}
    assert not held & {(s.digit, s.colour) for s in TRAINING_SUBJECTS}
    for attribute in ("digit", "colour", "ground"):
        words = {getattr(s, attribute) for s in SUBJECTS}
        assert {getattr(s, attribute) for s in HELD_OUT_SUBJECTS} == words
        assert {getattr(s, attribute) for s in TRAINING_SUBJECTS} == words


def test_codec_round_trip_and_unit_variance():
    images = RealDigits("reference").draw(SUBJECTS, torch.Generator().manual_seed(0))
    codec = DigitCodec()
    latents = codec.encode(images)
    assert latents.shape == (180, 12, 8, 8)
    torch.testing.assert_close(codec.decode(latents), images, atol=1e-5, rtol=0)
    assert 0.7 < latents.std() < 1.1


def test_conditioner_tells_prompts_apart_and_names_unknown_words():
    cond = DigitConditioner().encode([s.prompt for s in SUBJECTS] + [""])
    assert len(torch.unique(cond.text.flatten(1), dim=0)) == 181
    assert len(torch.unique(cond.pooled, dim=0)) == 181
    with pytest.raises(ValueError, match="does not know 'cat'"):
        DigitConditioner().encode(["a red cat"])


def test_shipped_weights_are_small_and_the_cached_rows_are_theirs():
    assert TEACHER_FILE.stat().st_size + CLASSIFIER_FILE.stat().st_size < 10_000_000
    assert json.loads(CACHE_FILE.read_text())["made_with"] == cache_key()


def test_identical_weights_are_identical_bytes_and_damaged_ones_are_named(tmp_path):
    generator = Generator(open_model("demo"), SiDRecipe(architecture="sid-demo-digits"), open_model("demo").tensors)
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        export_generator(generator, file, ExportOptions())
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors, metadata = load_file(files[0]), read_safetensors_metadata(files[0])
    name = "unet.conv_in.bias"
    for changed, message in (
        (tensors | {name: tensors[name] * float("nan")}, f"tensor {name}: expected finite numbers"),
        (tensors | {name: torch.zeros(3)}, f"1 tensors have other shapes .*{name}: expected 64, got 3"),
        ({k: t for k, t in tensors.items() if k != name}, f"1 are missing, such as {name}"),
        (tensors | {"unet.x": torch.zeros(1)}, "1 that do not belong to such a network, such as unet.x"),
        (tensors | {name: tensors[name].to(torch.uint16)}, "got U16"),
    ):
        save_file(changed, files[1], metadata)
        with pytest.raises(ValueError, match=rf"1.safetensors: .*{message}"):
            load_generator(str(files[1]))


def test_the_teacher_denoises_real_digits_it_never_saw():
    bundle = load_model("demo")
    subjects = SUBJECTS[::3]
    x0 = bundle.codec.encode(RealDigits("reference").draw(subjects, torch.Generator().manual_seed(0)))
    cond = bundle.conditioner.encode([s.prompt for s in subjects])
    sigma = VPSchedule.sdxl().sigma(torch.full((len(subjects),), 400))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        estimate = bundle.denoiser(x0 + sigma[:, None, None, None] * noise, sigma, cond)
        wrong = bundle.denoiser(
            x0 + sigma[:, None, None, None] * noise, sigma, cond[torch.arange(len(subjects) - 1, -1, -1)]
        )
    error = (estimate - x0).square().mean()
    assert error < 0.15 * x0.var()
    assert error < (wrong - x0).square().mean()  # the text helps


def test_pairs_belong_together_and_follow_the_generator():
    bundle = load_model("demo")
    pairs = DigitPairs(bundle.codec, bundle.conditioner)
    a, b = (pairs.draw(6, BatchRNG(torch.Generator().manual_seed(s))) for s in (1, 1))
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.cond.pooled, b.cond.pooled)
    assert not torch.equal(a.latents, pairs.draw(6, BatchRNG(torch.Generator().manual_seed(2))).latents)


def test_a_lora_belongs_on_the_embedded_teacher(tmp_path):
    """Of a whole generator, and of one that is one: no base is asked for."""
    teacher = open_model("demo")
    rng, moved = torch.Generator().manual_seed(0), {}
    for name, tensor in teacher.tensors.items():
        weight = tensor.load().float()
        change = torch.randn(len(weight), 2, generator=rng) @ torch.randn(2, weight[0].numel(), generator=rng)
        moved[name] = weight + 0.01 * change.reshape(weight.shape) * (weight.ndim > 1)
    whole = replace(teacher, tensors={name: LazyTensor.of(weight, name) for name, weight in moved.items()})
    recipe = SiDRecipe(architecture="sid-demo-digits", prediction_type=teacher.prediction_type)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    notes = export_generator(Generator(whole, recipe, whole.tensors), first, ExportOptions("lora", "fp32", rank=2))
    assert "rank 2 to 2" in notes[0]
    bundle, read = load_generator(str(first))
    assert read.architecture == "sid-demo-digits"
    found = bundle.denoiser.unet.state_dict()
    for name, weight in moved.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)

    export_generator(open_generator(str(first)), second, ExportOptions(dtype="fp32"))  # a LoRA again
    assert load_file(first).keys() == load_file(second).keys()
    again, _ = load_generator(str(second), str(TEACHER_FILE))
    torch.testing.assert_close(again.denoiser.unet.state_dict(), found)
    assert read_safetensors_metadata(second)["modelspec.architecture"] == "sid-demo-digits/lora"
    for options, message in (
        (ExportOptions("lora", rank=2), "only for a LoRA that is extracted from a whole UNet"),
        (ExportOptions("lora", vae=first), "--vae: the format lora holds none"),
        (ExportOptions("lora", "fp8"), "a LoRA is stored in fp16, bf16 or fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            export_generator(open_generator(str(first)), tmp_path / "third.safetensors", options)
