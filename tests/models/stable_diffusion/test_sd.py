"""SD 1.x and 2.x: small random teachers in each form they come in, held against diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_sdxl
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from small_sd import save_single_file, sd2_with_spread, small_pipeline

from sid_train.core.architectures import SD1, SD2, SDXL
from sid_train.core.recipe import SiDRecipe, read_recipe
from sid_train.files.header import read_safetensors_metadata
from sid_train.models.families import (
    export_generator,
    load_generator,
    load_model,
    model_shapes,
    open_generator,
    open_model,
)
from sid_train.models.family import ExportOptions, Generator, merge_lora
from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND, SDXL_KIND, kind_of_name
from sid_train.models.stable_diffusion.lora import kohya_modules
from sid_train.sample import sample_images

PROMPTS = ["a lighthouse at dawn, 35mm", "", "Ünïcode, a cat's 3 hats!", "word " * 100]
SIZE = 64
KINDS = {"sd1": SD1_KIND, "sd2": SD2_KIND}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pipeline(kind) -> StableDiffusionPipeline:
    return small_pipeline(kind)


@pytest.fixture(scope="module")
def file(kind, pipeline, tmp_path_factory) -> str:
    return str(save_single_file(tmp_path_factory.mktemp("sd") / "small.safetensors", kind, pipeline))


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sd") / "small"
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(params=["file", "folder"])
def source(request) -> str:
    return request.getfixturevalue(request.param)


def test_every_weight_and_every_output_is_that_of_the_pipeline(kind, source, pipeline):
    model = open_model(source)
    model.check()
    assert (model.architecture, model.prediction_type) == (kind.architecture.name, "epsilon")
    bundle = model.load(torch.float32, SIZE)
    bundle.conditioner.max_tokens = 75  # where the pipeline cuts
    (encoder,) = bundle.conditioner._load()
    for ours, theirs in (
        (bundle.denoiser.unet, pipeline.unet),
        (bundle.codec.vae, pipeline.vae),
        (encoder, pipeline.text_encoder),
    ):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    cond = bundle.conditioner.encode(PROMPTS)
    assert set(cond.tensors) == {"text"}
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[""] * len(PROMPTS))
    torch.testing.assert_close(cond.text, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bundle.unconditional("empty").text, empty[:1], rtol=1e-5, atol=1e-5)
    assert not bundle.unconditional("zeros").text.any()

    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t, rng = torch.tensor([625, 156]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=rng)
        noisy = pipeline.scheduler.add_noise(latents, noise, t)
        eps = pipeline.unet(noisy, t, cond.text[:2]).sample
        sigma = bundle.denoiser.schedule.sigma(t)
        x0 = bundle.denoiser(latents + sigma.reshape(-1, 1, 1, 1) * noise, sigma, cond[:2])
    torch.testing.assert_close(bundle.codec.encode(images), latents, rtol=1e-4, atol=1e-5)
    abar = pipeline.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, (noisy - (1 - abar).sqrt() * eps) / abar.sqrt(), rtol=1e-4, atol=1e-4)


def test_long_prompts_are_chunks_one_after_another(file):
    conditioner = load_model(file, None).conditioner
    parts = ["word " * 75, "cat " * 75]
    apart, together = conditioner.encode(parts), conditioner.encode(["".join(parts)])
    torch.testing.assert_close(together.text, apart.text.reshape(1, 2 * 77, -1))


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [(SD1_KIND, "epsilon", 512), (SD2_KIND, "epsilon", 512), (SD2_KIND, "v_prediction", 768)],
)
def test_pictures_are_as_large_as_the_generations(kind, said, expected, tmp_path):
    small_pipeline(kind, prediction_type=said).save_pretrained(tmp_path / "x")
    bundle = load_model(str(tmp_path / "x"), None)
    assert bundle.denoiser.schedule.prediction_type == said
    assert bundle.image_size == (expected, expected)
    assert model_shapes(str(tmp_path / "x"), 0).latent_shape == (4, expected // 8, expected // 8)


def test_a_file_of_sd2_that_says_nothing_is_told_by_a_norm(tmp_path):
    """As ComfyUI tells it (tests/comfyui/test_sd.py); what the configuration says counts before it."""
    for spread, expected in ((0.05, "epsilon"), (0.2, "v_prediction")):
        path = sd2_with_spread(tmp_path / f"{spread}.safetensors", spread)
        assert open_model(str(path)).prediction_type == expected
        assert load_model(str(path), None).image_size[0] == {"epsilon": 512, "v_prediction": 768}[expected]
        assert open_model(str(path), prediction_type="epsilon").prediction_type == "epsilon"
    model = open_model(str(path))
    name, weight = next((k, t) for k, t in model.tensors.items() if k.endswith("to_q.weight"))
    adapter = {name.removesuffix(".weight"): (torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1), 1.0)}
    for predicts in ("epsilon", "v_prediction"):
        recipe = SiDRecipe(prediction_type=predicts, base_model_hash="0" * 64).for_architecture(SD2)
        lora = tmp_path / f"{predicts}-lora.safetensors"
        export_generator(Generator(model, recipe, model.tensors, adapter), lora, ExportOptions("lora", "fp32"))
    assert open_generator(str(lora), str(path)).model.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"is a v_prediction model \(the spread of its tensor .* but the recipe of"):
        open_generator(str(tmp_path / "epsilon-lora.safetensors"), str(path))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", SD1),
        ("CompVis/stable-diffusion-v1-4", SD1),
        ("models/v1-5-pruned-emaonly.safetensors", SD1),
        ("C:\\models\\sd_v1.5.safetensors", SD1),
        ("stabilityai/stable-diffusion-2-1-base", SD2),
        ("stabilityai/stable-diffusion-2-1", SD2),
        ("v2-1_768-ema-pruned.safetensors", SD2),
        ("stabilityai/sd-turbo", SD2),
        ("768-v-ema.safetensors", SD2),
        ("512-base-ema.safetensors", SD2),
        ("stabilityai/stable-diffusion-xl-base-1.0", SDXL),
        ("stabilityai/sdxl-turbo", SDXL),
        ("someone/anything", SDXL),
    ],
)
def test_what_is_not_here_is_planned_by_its_name(name, expected):
    assert kind_of_name(name).architecture is expected
    shapes = model_shapes(name, 0)
    assert shapes.name.startswith(expected.base_model)
    assert shapes.conditioning["text"] == (77, expected.text_width)
    assert ("pooled" in shapes.conditioning) == (expected is SDXL)
    predicts_v = name.endswith("-2-1") or "768" in name
    assert 8 * shapes.latent_shape[1] == (expected.v if predicts_v else expected.epsilon).resolution


# -- generators ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(kind, file) -> Generator:
    """A generator that is a LoRA of rank 2 on every kind of module."""
    model = open_model(file)
    rng = torch.Generator().manual_seed(0)
    adapter = {}
    for name in kohya_modules(model.tensors, model.unet_config):
        shape = model.tensors[f"{name}.weight"].shape
        if len(shape) >= 2 and not name.startswith(("conv_", "time_embedding")):
            down, up = torch.randn(2, *shape[1:], generator=rng), torch.randn(shape[0], 2, generator=rng)
            adapter[name] = (down * down[0].numel() ** -0.5, up * 0.3, 2.0)
    recipe = replace(SiDRecipe().for_architecture(kind.architecture), training_resolution=(SIZE, SIZE))
    return Generator(model, recipe, model.tensors, adapter)


@pytest.mark.parametrize("format_", ["checkpoint", "unet", "lora", "diffusers"])
def test_every_format_gives_the_same_pictures(kind, distilled, file, tmp_path, format_):
    path = tmp_path / ("x" if format_ == "diffusers" else "x.safetensors")
    export_generator(distilled, path, ExportOptions(format_, "fp32"))
    weights = path / "unet" / "diffusion_pytorch_model.safetensors" if format_ == "diffusers" else path
    recipe = read_recipe(weights)
    assert recipe.architecture == kind.architecture.name + "/lora" * (format_ == "lora")
    assert not load_file(weights).keys() & {"v_pred", "ztsnr"}
    bundle, _ = load_generator(str(weights), None if format_ == "checkpoint" else file)
    expected = distilled.load(SIZE)
    pictures = [sample_images(each, distilled.recipe, ["a cat"], seed=0) for each in (bundle, expected)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    if format_ == "checkpoint":
        assert read_safetensors_metadata(path)["modelspec.architecture"] == kind.architecture.epsilon.spec
        of_file, of_export = load_file(file), load_file(path)
        rest = {name for name in of_file if name.startswith(kind.encoders[0].prefixes[0])}
        assert rest <= of_export.keys()
    elif format_ == "diffusers":
        theirs = DiffusionPipeline.from_pretrained(path)
        assert isinstance(theirs, StableDiffusionPipeline)
        state = distilled.merged()
        assert all(torch.equal(state[k].load(), v) for k, v in theirs.unet.state_dict().items())


def test_diffusers_reads_the_lora(kind, distilled, pipeline, tmp_path):
    path = tmp_path / "lora.safetensors"
    export_generator(distilled, path, ExportOptions("lora", "fp32"))
    assert read_safetensors_metadata(path)["ss_base_model_version"] == kind.architecture.epsilon.kohya
    theirs = small_pipeline(kind)
    theirs.load_lora_weights(path)
    theirs.fuse_lora()
    expected = merge_lora(distilled.tensors, distilled.adapter)
    for name, module in theirs.unet.named_modules():
        if name in distilled.adapter:
            torch.testing.assert_close(module.weight, expected[f"{name}.weight"].load(), rtol=1e-4, atol=1e-5)


def test_a_folder_becomes_a_file_of_its_generation(kind, folder, tmp_path):
    model = open_model(folder)
    recipe = SiDRecipe().for_architecture(kind.architecture)
    export_generator(Generator(model, recipe, model.tensors), tmp_path / "x.safetensors", ExportOptions(dtype="fp32"))
    again = open_generator(str(tmp_path / "x.safetensors")).model
    again.check()
    ours, theirs = (each.load(torch.float32, SIZE).conditioner.encode(PROMPTS) for each in (again, model))
    assert torch.equal(ours.text, theirs.text)


def test_generations_are_not_mixed(kind, distilled, file, tmp_path):
    lora, unet = tmp_path / "lora.safetensors", tmp_path / "unet.safetensors"
    export_generator(distilled, lora, ExportOptions("lora", "fp32"))
    sdxl = small_sdxl.save_single_file(tmp_path / "xl.safetensors", small_sdxl.small_pipeline())
    people = kind.architecture.people
    with pytest.raises(
        ValueError, match=rf"xl.safetensors: it is a model of SDXL, but the recipe of .* is for {people}"
    ):
        open_generator(str(lora), str(sdxl))
    export_generator(distilled, unet, ExportOptions("unet", "fp32"))
    save_file(load_file(unet), unet, SiDRecipe().to_metadata())
    with pytest.raises(ValueError, match=rf"unet.safetensors: it is a model of {people}, but its recipe .* for SDXL"):
        open_generator(str(unet))
    assert open_generator(str(lora), file).model.kind is kind is not SDXL_KIND
    # Nor are the parts of checkpoints: a base of another generation has other text encoders.
    export_generator(distilled, unet, ExportOptions("unet", "fp32"))
    other = SD2_KIND if kind is SD1_KIND else SD1_KIND
    base = save_single_file(tmp_path / "other.safetensors", other, small_pipeline(other))
    for wrong in (base, sdxl):
        generator = open_generator(str(unet), str(wrong))
        with pytest.raises(ValueError, match=rf"expected the text encoders and the VAE of {people} .* is missing"):
            export_generator(generator, tmp_path / "x.safetensors", ExportOptions("checkpoint", "fp32"))
