"""The demo's model in ComfyUI: what it reads, samples and draws is what the trainer does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import call, module, run

PROMPTS = ["a red three on a blue ground", "a green seven on a black ground"]


@pytest.fixture(scope="module")
def demo(nodes):
    """MODEL, CLIP, VAE, recipe, LATENT of two pictures."""
    return run(nodes["SiDDemoModel"], batch_size=2)


@pytest.fixture(scope="module")
def bundle(pack):
    return module(pack, "sid_train.models.families").load_model("demo")


@pytest.fixture(scope="module")
def lora(pack, tmp_path_factory):
    """A LoRA with a recipe for the demo's model, of random weights: its generator and file."""
    families, family = (module(pack, f"sid_train.models.{name}") for name in ("families", "family"))
    recipes = module(pack, "sid_train.core.recipe")
    model = families.open_model("demo")
    rng = torch.Generator().manual_seed(0)
    moved = {
        name: tensor if len(tensor.shape) < 2 else moved_by(tensor, rng, pack) for name, tensor in model.tensors.items()
    }
    recipe = recipes.SiDRecipe(architecture=model.architecture, prediction_type=model.prediction_type)
    generator = family.Generator(model, recipe, moved)
    folder = tmp_path_factory.mktemp("loras")
    families.export_generator(generator, folder / "digits.safetensors", family.ExportOptions("lora", "fp32", rank=4))
    return folder


def moved_by(tensor, rng: torch.Generator, pack):
    weight = tensor.load().float()
    change = 0.1 * weight.std() * torch.randn(weight.shape, generator=rng)
    return module(pack, "sid_train.files.tensors").LazyTensor.of(weight + change, "moved")


def encode(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(nodes, model, clip, recipe, latent, **settings) -> torch.Tensor:
    asked = {"positive": encode(clip, PROMPTS[0]), "negative": encode(clip, ""), "seed": 5} | settings
    return run(nodes["SiDFewStepSampler"], model=model, recipe=recipe, latent_image=latent, **asked)[0]["samples"]


def trainers(pack, bundle, recipe) -> torch.Tensor:
    cond = bundle.conditioner.encode([PROMPTS[0]] * 2)
    return module(pack, "sid_train.sample").sample_latents(bundle.denoiser, cond, bundle.latent_shape, recipe, 5)


def test_prompts_are_encoded_as_the_trainer_does(demo, bundle):
    for prompt in [*PROMPTS, "", "a three"]:
        ((text, extra),) = encode(demo[1], prompt)
        cond = bundle.conditioner.encode([prompt])
        assert torch.equal(text, cond.text)
        assert torch.equal(extra["pooled_output"], cond.pooled)


def test_a_weight_moves_a_word(demo):
    (plain, _), (one, _), (more, _) = (encode(demo[1], f"a {w} three")[0] for w in ("red", "(red:1.0)", "(red:1.5)"))
    assert torch.equal(plain, one)
    changed = (plain - more).abs().sum(-1)[0] > 1e-6
    assert changed.tolist() == [False, True, *[False] * 6]


def test_an_unknown_word_names_those_that_it_knows(demo):
    with pytest.raises(ValueError, match=r"does not know 'dog'\. It knows: a, on, ground, zero, one"):
        demo[1].tokenize("a red dog")
    with pytest.raises(ValueError, match="at most 8 words"):
        demo[1].tokenize("a " * 9)


def test_a_few_steps_give_the_trainers_latents(demo, nodes, pack, bundle):
    model, clip, _, recipe, latent = demo
    found = sample(nodes, model, clip, recipe, latent)
    torch.testing.assert_close(found, trainers(pack, bundle, recipe), rtol=0, atol=1e-5)


def test_a_lora_gives_the_trainers_latents(demo, nodes, pack, lora, monkeypatch, folders):
    monkeypatch.setitem(folders.folder_names_and_paths, "loras", ([str(lora)], {".safetensors"}))
    patched, recipe, *_ = run(nodes["SiDLoRALoader"], model=demo[0], lora_name="digits.safetensors")
    generator, wanted = module(pack, "sid_train.models.families").load_generator(str(lora / "digits.safetensors"))
    assert recipe.timesteps == wanted.timesteps
    found = sample(nodes, patched, demo[1], recipe, demo[4])
    torch.testing.assert_close(found, trainers(pack, generator, recipe), rtol=0, atol=1e-5)
    assert (found - sample(nodes, demo[0], demo[1], recipe, demo[4])).abs().max() > 0.01


@pytest.mark.parametrize("guidance", ["cfg", "nag"])
def test_a_negative_prompt_changes_the_picture(demo, nodes, guidance):
    model, clip, _, recipe, latent = demo
    plain, other = (
        sample(nodes, model, clip, recipe, latent, guidance=guidance, cfg=2.0, negative=encode(clip, text))
        for text in ("", "a red seven")
    )
    assert (plain - other).abs().max() > 0.01


def test_comfyuis_own_sampler_draws_what_is_asked(demo, pack):
    """Of 32 pictures of the teacher in 20 steps a classifier that never saw one finds digit and colours in most."""
    import nodes as comfyui

    model, clip, vae, _, _ = demo
    found = []
    for prompt in PROMPTS:
        (samples,) = call(
            comfyui.KSampler, model, 3, 20, 1.5, "dpmpp_2m", "simple", encode(clip, prompt), encode(clip, ""),
            {"samples": torch.zeros(16, 12, 8, 8)},
        )  # fmt: skip
        found.append(vae.encode(vae.decode(samples["samples"])))
    pictures = vae.codec.decode(torch.cat(found))
    data, metrics = (module(pack, f"sid_train.{name}") for name in ("models.digits.data", "demo.metrics"))
    asked = [s for prompt in PROMPTS for s in data.SUBJECTS if s.prompt == prompt for _ in range(16)]
    assert metrics.DigitEvaluator(asked)._accuracy(pictures) > 0.8


def test_pictures_are_enlarged_and_come_back(demo, pack):
    vae = demo[2]
    data = module(pack, "sid_train.models.digits.data")
    real = data.RealDigits("reference").draw(data.SUBJECTS[:8], torch.Generator().manual_seed(0))
    latents = vae.codec.encode(real)
    shown = vae.decode(latents)
    assert shown.shape == (8, 256, 256, 3)
    assert 0 <= shown.min() < shown.max() <= 1
    assert (vae.codec.decode(vae.encode(shown)) - real).abs().mean() < 0.05
    assert torch.equal(vae.decode_tiled(latents), shown)
    assert torch.equal(vae.encode_tiled(shown), vae.encode(shown))
    assert vae.encode(torch.rand(1, 512, 300, 3)).shape == (1, 12, 8, 8)


def test_its_preview_is_the_mean_colour(demo, pack):
    from latent_preview import Latent2RGBPreviewer

    format_ = demo[0].get_model_object("latent_format")
    previewer = Latent2RGBPreviewer(format_.latent_rgb_factors, format_.latent_rgb_factors_bias)
    data = module(pack, "sid_train.models.digits.data")
    real = data.RealDigits("reference").draw(data.SUBJECTS[:1], torch.Generator().manual_seed(0))
    preview = previewer.decode_latent_to_preview(demo[2].codec.encode(real))
    mean = torch.nn.functional.avg_pool2d(real, 2)[0].movedim(0, -1)
    shown = torch.from_numpy(np.array(preview)) / 127.5 - 1
    assert (shown - mean).abs().max() < 0.02


def test_another_size_says_which_there_is(demo, nodes):
    model, clip, _, recipe, _ = demo
    with pytest.raises(ValueError, match=r"draws 256 x 256 only .*got latents of 16 x 16\. Connect 'latent'"):
        sample(nodes, model, clip, recipe, {"samples": torch.zeros(1, 12, 16, 16)})


def test_models_and_prompts_are_not_mixed(demo, nodes, model):
    from helpers import conditioning, empty_latent

    _, clip, _, recipe, latent = demo
    with pytest.raises(ValueError, match="recipe is for the demo's digits, but the model is one of SDXL"):
        sample(nodes, model, clip, recipe, empty_latent())
    with pytest.raises(ValueError, match="expected a prompt encoded by the text encoders of the demo's digits"):
        sample(nodes, demo[0], clip, recipe, latent, positive=conditioning(0))
