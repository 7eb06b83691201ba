"""The sampling nodes in this process: parity, cost, image to image, batches, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import call, conditioning, empty_latent, module, native_fallback, run, text_of


@pytest.fixture(scope="module")
def make_recipe(pack):
    recipe = module(pack, "sid_train.core.recipe").SiDRecipe()

    def make(steps: int = 4, t_init: int = 625, noise_mode: str = "fresh", prediction: str = "epsilon", **changes):
        ladder = tuple(t_init * (steps - k) // steps for k in range(steps))
        changes |= {"timesteps": ladder, "t_init": t_init, "noise_mode": noise_mode, "prediction_type": prediction}
        return replace(recipe, **changes)

    return make


@pytest.fixture
def calls(model):
    """The batch sizes of the UNet's calls."""
    sizes: list[int] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def diffusers_reference(network, recipe, seed: int, noises) -> torch.Tensor:
    """The chain by diffusers' own arithmetic: DDPM's add_noise and pred_original_sample, fp32."""
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=recipe.prediction_type,
        clip_sample=False,
    )
    x = x0 = torch.zeros_like(noises[0])
    for k, t in enumerate(recipe.timesteps):
        noise = noises[k]
        if recipe.noise_mode == "ddim" and k > 0:
            alpha = scheduler.alphas_cumprod[recipe.timesteps[k - 1]]
            noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        if k and recipe.noise_mode in ("tcd", "ancestral"):
            before, here = (scheduler.alphas_cumprod[s] for s in recipe.timesteps[k - 1 : k + 1])
            x = blended(recipe, x0, (x - before.sqrt() * x0) / (1 - before).sqrt(), noise, before, here, scheduler, t)
        else:
            x = scheduler.add_noise(x0, noise, torch.tensor([t]))
        if k == 0 and recipe.unit_variance_start:
            x = noise
        x0 = scheduler.step(network(x, t), t, x, generator=torch.Generator()).pred_original_sample
    return x0


def blended(recipe, x0, implied, fresh, before, here, scheduler, t: int) -> torch.Tensor:
    """TCD's step from abar ``before`` to abar ``here``, as its scheduler writes it, or the ancestral Euler step."""
    if recipe.noise_mode == "tcd":
        lower = scheduler.alphas_cumprod[int(0.7 * t)]
        down = lower.sqrt() * x0 + (1 - lower).sqrt() * implied
        return (here / lower).sqrt() * down + (1 - here / lower).sqrt() * fresh
    start, end = (((1 - abar) / abar).sqrt() for abar in (before, here))
    up = (end**2 * (start**2 - end**2) / start**2).sqrt()
    return here.sqrt() * (x0 + (end**2 - up**2).sqrt() * implied + up * fresh)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("noise_mode", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("t_init", [625, 999])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampler_equals_diffusers(pack, nodes, model, v_model, make_recipe, steps, t_init, noise_mode, prediction):
    recipe = make_recipe(steps, t_init, noise_mode, prediction)
    check_against_diffusers(pack, nodes, model if prediction == "epsilon" else v_model, recipe)


PRESET_NAMES = ("SiD 999 (2 steps)", "DMD2 (4 steps)", "DMD2 (1 step)", "LCM (4 steps)", "Lightning (4 steps)")
PRESET_NAMES += ("TCD (4 steps)", "Turbo (4 steps)", "Hyper-SD (2 steps)", "PCM (16 steps)")


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_presets_equal_diffusers(pack, nodes, model, recipes, preset):
    """Those of unit variance too: the network's first input is the noise itself."""
    check_against_diffusers(pack, nodes, model, recipes.PRESETS[preset])


def check_against_diffusers(pack, nodes, patcher, recipe) -> None:
    core = module(pack, "sid_train.core.sampling")
    positive = conditioning(1)
    latent = empty_latent()
    (result, _) = run(
        nodes["SiDFewStepSampler"], model=patcher, positive=positive, latent_image=latent, recipe=recipe, seed=7
    )

    first = core.initial_noise((1, 4, 16, 16), 7)
    if recipe.noise_mode == "fixed":
        noises = [first] * recipe.steps
    else:
        fresh = core.seeded_noise(first, 7)
        noises = [first, *(fresh(k) for k in range(1, recipe.steps))]
    base = patcher.model
    size = patcher.model.encode_adm(pooled_output=positive[0][1]["pooled_output"], width=128, height=128, device="cpu")

    @torch.no_grad()
    def network(x, t):
        return base.diffusion_model(x, torch.tensor([float(t)]), context=positive[0][0], y=size)

    expected = diffusers_reference(network, recipe, 7, noises)
    ours = result["samples"] * base.latent_format.scale_factor
    error = (ours - expected).abs().max().item()
    assert error <= max(1e-4, 1e-5 * expected.abs().max().item())
    assert expected.std() > 0.1


def test_custom_sampling_nodes_give_the_same_latents_bit_for_bit(pack, nodes, model, make_recipe, caplog):
    from comfy_extras.nodes_custom_sampler import RandomNoise, SamplerCustomAdvanced

    image = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5)), "batch_index": [3, 1]}
    for guidance, denoise, steps in (
        ("none", 1.0, 4),
        ("nag", 1.0, 4),
        ("cfg", 0.5, 4),
        ("cfg first step only", 0.5, 4),
        ("none", 0.75, 2),  # rounds to all steps
    ):
        recipe = make_recipe(steps)
        start = "latent" if (steps, denoise) == (2, 0.75) else "auto"
        both = {"positive": conditioning(1), "negative": conditioning(2), "model": model, "recipe": recipe}
        ours, denoised = run(
            nodes["SiDFewStepSampler"], **both, latent_image=image, seed=11, guidance=guidance, denoise=denoise
        )
        (sigmas,) = run(nodes["SiDScheduler"], model=model, recipe=recipe, denoise=denoise)
        (sampler,) = run(nodes["SiDSamplerSelect"], recipe=recipe, start=start)
        (guider,) = run(nodes["SiDGuidance"], **both, guidance=guidance)
        (noise,) = call(RandomNoise, 11)
        theirs, theirs_denoised = call(SamplerCustomAdvanced, noise, guider, sampler, sigmas, image)
        assert torch.equal(ours["samples"], theirs["samples"])
        assert torch.equal(denoised["samples"], theirs_denoised["samples"])
        assert ours["batch_index"] == [3, 1]
    assert "denoise 0.75 rounds to all 2 steps: set 'start' of SiD Sampler Select to 'latent'" in text_of(caplog)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("preset", ["SiD 625 (4 steps)", "DMD2 (4 steps)"])
def test_a_latent_that_arrives_noised_is_what_the_first_step_sees(nodes, model, recipes, preset, denoise):
    """After DisableNoise, of the highest timestep too."""
    from comfy_extras.nodes_custom_sampler import DisableNoise

    recipe = recipes.PRESETS[preset]
    latent = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    (sigmas,) = run(nodes["SiDScheduler"], model=model, recipe=recipe, denoise=denoise)
    (sampler,) = run(nodes["SiDSamplerSelect"], recipe=recipe)
    (guider,) = run(nodes["SiDGuidance"], model=model, positive=conditioning(1))
    (noise,) = call(DisableNoise)
    seen = []
    guider.sample(
        noise.generate_noise({"samples": latent}),
        latent,
        sampler,
        sigmas,
        callback=lambda step, x0, x, steps: seen.append(x),
        seed=noise.seed,
    )
    assert torch.equal(seen[0].cpu(), model.model.process_latent_in(latent))


def test_native_fallback_is_another_picture(nodes, model, make_recipe):
    """What its note says: ComfyUI's own nodes run other timesteps."""
    from comfy_extras.nodes_custom_sampler import BasicScheduler

    (sigmas,) = call(BasicScheduler, model, "simple", 4, 0.63)
    timesteps = model.get_model_object("model_sampling").timestep(sigmas[:-1])
    assert timesteps.tolist() == [666, 499, 333, 166]
    inputs = {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "seed": 3}
    (ours, _) = run(nodes["SiDFewStepSampler"], **inputs, recipe=make_recipe())
    theirs = native_fallback(model, conditioning(1), empty_latent(), 3)
    assert (ours["samples"] - theirs).norm() > 0.1 * ours["samples"].norm()


def test_one_network_call_a_step_and_two_with_cfg(nodes, model, make_recipe, calls):
    both = {"positive": conditioning(1), "negative": conditioning(2), "model": model, "latent_image": empty_latent()}
    for guidance, rows in (("none", 4), ("nag", 4), ("cfg", 8), ("cfg first step only", 5)):
        calls.clear()
        run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe(), seed=1, guidance=guidance)
        assert sum(calls) == rows, guidance


def test_image_of_a_batch_is_the_image_alone(nodes, model, make_recipe):
    inputs = {"model": model, "positive": conditioning(1), "recipe": make_recipe(), "seed": 3}
    (batch, _) = run(nodes["SiDFewStepSampler"], **inputs, latent_image=empty_latent(3))
    for i in range(3):
        alone = empty_latent() | {"batch_index": [i]}
        (one, _) = run(nodes["SiDFewStepSampler"], **inputs, latent_image=alone)
        torch.testing.assert_close(one["samples"][0], batch["samples"][i], rtol=1e-4, atol=1e-3)
    assert (batch["samples"][0] - batch["samples"][1]).abs().max() > 0.1


def test_unmasked_latents_stay_as_they_are(nodes, model, make_recipe):
    image = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    for denoise in (1.0, 0.5):
        (result, _) = run(
            nodes["SiDFewStepSampler"],
            model=model,
            positive=conditioning(1),
            recipe=make_recipe(),
            latent_image={"samples": image, "noise_mask": mask},
            seed=3,
            denoise=denoise,
        )
        kept, wanted = result["samples"][..., 8:], image[..., 8:]
        ulp = torch.finfo(torch.float32).eps * wanted.abs()
        assert ((kept - wanted).abs() <= 2 * ulp).all()
        assert (result["samples"][..., :8] - image[..., :8]).abs().max() > 0.1


def test_image_to_image_runs_the_last_trained_timesteps(nodes, model, make_recipe):
    table = model.get_model_object("model_sampling").sigmas
    for denoise, timesteps in ((1.0, [625, 468, 312, 156]), (0.75, [468, 312, 156]), (0.5, [312, 156]), (0.1, [156])):
        (sigmas,) = run(nodes["SiDScheduler"], model=model, recipe=make_recipe(), denoise=denoise)
        assert torch.equal(sigmas, torch.cat([table[timesteps], torch.zeros(1)]))
    with pytest.raises(ValueError, match="one-step generator makes the whole picture"):
        run(nodes["SiDScheduler"], model=model, recipe=make_recipe(1), denoise=0.5)


def test_a_new_picture_keeps_nothing_of_the_latent(nodes, model, make_recipe):
    inputs = {"model": model, "positive": conditioning(1), "recipe": make_recipe(), "seed": 3}
    image = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))}
    (empty, _) = run(nodes["SiDFewStepSampler"], **inputs, latent_image=empty_latent())
    (full, _) = run(nodes["SiDFewStepSampler"], **inputs, latent_image=image)
    assert torch.equal(empty["samples"], full["samples"])
    (kept, _) = run(nodes["SiDFewStepSampler"], **inputs, latent_image=image, denoise=0.5)
    assert not torch.equal(kept["samples"], full["samples"])


def test_messages(nodes, model, make_recipe, caplog):
    both = {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "seed": 0}
    run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe())
    assert text_of(caplog) == ""
    run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe(), steps=2, negative=conditioning(2))
    assert "in 2 steps (625 312) what was trained for 4" in text_of(caplog)
    assert "The negative prompt is ignored" in text_of(caplog)
    caplog.clear()
    run(nodes["SiDFewStepSampler"], **both)
    assert "No recipe is connected: sampling as 'SiD 625 (4 steps)'" in text_of(caplog)


def test_training_scales_never_change_sampling(pack, nodes, model, make_recipe, calls):
    strong = module(pack, "sid_train.core.recipe").TrainingGuidance("lsg", 4.5, 4.5, 4.5)
    both = {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "seed": 0}
    (plain, _) = run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe())
    calls.clear()
    (result, _) = run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe(guidance=strong))
    assert torch.equal(plain["samples"], result["samples"])
    assert calls == [1, 1, 1, 1]


def test_auto_follows_what_the_recipe_says_about_sampling(nodes, model, make_recipe):
    both = {"model": model, "positive": conditioning(1), "negative": conditioning(2), "latent_image": empty_latent()}
    recipe = make_recipe(sampling_guidance="cfg", sampling_cfg=2.0)
    (auto, _) = run(nodes["SiDFewStepSampler"], **both, recipe=recipe, seed=0)
    (cfg, _) = run(nodes["SiDFewStepSampler"], **both, recipe=make_recipe(), seed=0, guidance="cfg", cfg=2.0)
    assert torch.equal(auto["samples"], cfg["samples"])


class TestNAG:
    def test_the_negative_prompt_changes_the_picture(self, nodes, model, make_recipe):
        both = {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "recipe": make_recipe()}
        pictures = [
            run(nodes["SiDFewStepSampler"], **both, seed=0, guidance=g, negative=n)[0]["samples"]
            for g, n in (("none", None), ("nag", conditioning(2)), ("nag", conditioning(3)), ("nag", conditioning(1)))
        ]
        assert (pictures[0] - pictures[1]).abs().max() > 1e-2
        assert (pictures[1] - pictures[2]).abs().max() > 1e-2
        # Away from itself is nowhere.
        torch.testing.assert_close(pictures[0], pictures[3], rtol=1e-3, atol=1e-3)

    def test_strength_0_installs_no_patch(self, nodes, model, pack):
        nag = module(pack, "nodes.nag")
        assert nag.patch_nag(model, conditioning(2), 0.0, 2.5, 0.5) is model
        assert nag.patch_nag(model, conditioning(2), 2.0, 2.5, 0.0) is model
        patched = nag.patch_nag(model, conditioning(2), 2.0, 2.5, 0.5)
        assert patched is not model
        assert "patches_replace" not in model.model_options.get("transformer_options", {})

    def test_prompts_of_different_length_and_batches(self, nodes, model, make_recipe):
        """Every image has its own negative prompt, in turn: the same as alone."""
        inputs = {"model": model, "positive": conditioning(1, tokens=154), "recipe": make_recipe(), "guidance": "nag"}
        first, second = conditioning(2), conditioning(3)
        both = [[torch.cat([first[0][0], second[0][0]]), first[0][1]]]
        (batch, _) = run(nodes["SiDFewStepSampler"], **inputs, negative=both, latent_image=empty_latent(4), seed=0)
        for i, negative in ((2, first), (3, second)):
            alone = empty_latent() | {"batch_index": [i]}
            (one, _) = run(nodes["SiDFewStepSampler"], **inputs, negative=negative, latent_image=alone, seed=0)
            torch.testing.assert_close(one["samples"][0], batch["samples"][i], rtol=1e-3, atol=1e-3)
        assert (batch["samples"][2] - batch["samples"][3]).abs().max() > 1e-2

    def test_formula(self, pack):
        blend = module(pack, "nodes.nag").nag_blend
        positive, negative = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[0.0, 1.0]]])
        # 1 + 2 * (1 - 0) = 3 and 1: L1 norm 4 against 2, so tau = 2 leaves it alone and tau = 1 halves it.
        assert blend(positive, negative, 2.0, 2.0, 1.0).tolist() == [[[3.0, 1.0]]]
        assert blend(positive, negative, 2.0, 1.0, 1.0).tolist() == [[[1.5, 0.5]]]
        assert blend(positive, negative, 2.0, 1.0, 0.5).tolist() == [[[1.25, 0.75]]]
        assert torch.equal(blend(positive, negative, 2.0, 1.0, 0.0), positive)


@pytest.fixture(scope="module")
def loras(unet_file) -> list[dict]:
    from safetensors.torch import load_file
    from small_models import lora_tensors

    return [lora_tensors(load_file(unet_file), seed) for seed in (1, 2)]


class TestWithOtherNodes:
    """LoRAs, hooks and ControlNet as ComfyUI's own nodes apply them."""

    @pytest.fixture
    def sample(self, nodes, model, make_recipe):
        def run_sampler(**changes) -> torch.Tensor:
            inputs = {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "seed": 0}
            return run(nodes["SiDFewStepSampler"], **(inputs | {"recipe": make_recipe()} | changes))[0]["samples"]

        return run_sampler

    def test_lora_stack(self, sample, model, loras):
        import comfy.sd

        def stacked(order) -> torch.Tensor:
            patched = model
            for tensors in order:
                patched, _ = comfy.sd.load_lora_for_models(patched, None, tensors, 0.7, 0.0)
            return sample(model=patched)

        plain, one, both, swapped = (stacked(o) for o in ([], loras[:1], loras, loras[::-1]))
        torch.testing.assert_close(both, swapped, rtol=1e-3, atol=1e-3)
        assert (plain - one).abs().max() > 1e-2
        assert (one - both).abs().max() > 1e-2
        assert torch.equal(plain, stacked([]))  # the patches are taken off again

    def test_lora_hook_equals_the_lora(self, sample, model, loras):
        import comfy.hooks
        import comfy.sd

        hook = comfy.hooks.create_hook_lora(loras[0], 0.7, 0.0)
        hooked = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hook)
        patched, _ = comfy.sd.load_lora_for_models(model, None, loras[0], 0.7, 0.0)
        torch.testing.assert_close(sample(positive=hooked), sample(model=patched), rtol=1e-3, atol=1e-3)
        assert (sample(positive=hooked) - sample()).abs().max() > 1e-2

    def test_controlnet_with_every_guidance(self, sample, caplog):
        import comfy.controlnet
        from small_models import controlnet_tensors

        import nodes as comfyui_nodes

        network = comfy.controlnet.load_controlnet_state_dict(controlnet_tensors())
        hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
        apply = comfyui_nodes.ControlNetApplyAdvanced().apply_controlnet
        positive, negative = apply(conditioning(1), conditioning(2), network, hint, 0.5, 0.0, 1.0)
        for guidance in ("none", "cfg", "cfg first step only", "nag"):
            controlled = sample(positive=positive, negative=negative, guidance=guidance)
            assert (controlled - sample(negative=conditioning(2), guidance=guidance)).abs().max() > 1e-2, guidance
        early, _ = apply(conditioning(1), conditioning(2), network, hint, 0.5, 0.0, 0.3)
        caplog.clear()
        assert torch.equal(sample(positive=early), sample())
        assert "A ControlNet that is on from 0.0% to 30.0% is never used" in text_of(caplog)
        assert (controlled - sample(positive=positive)).abs().max() > 1e-2  # nag acts beside the ControlNet


def test_ranges_that_no_step_is_in_are_named(nodes, model, make_recipe, caplog):
    import nodes as comfyui_nodes

    inputs = {"model": model, "latent_image": empty_latent(), "recipe": make_recipe(), "seed": 0}

    def sample(end: float) -> torch.Tensor:
        caplog.clear()
        (timed,) = call(comfyui_nodes.ConditioningSetTimestepRange, conditioning(2), 0.0, end)
        return run(nodes["SiDFewStepSampler"], **inputs, positive=conditioning(1) + timed)[0]["samples"]

    plain = run(nodes["SiDFewStepSampler"], **inputs, positive=conditioning(1))[0]["samples"]
    assert torch.equal(sample(0.37), plain)
    assert (
        "A prompt that is on from 0.0% to 37.0% is never used: the steps are at 37.4%, 53.2%, 68.8%, 84.4%."
        in text_of(caplog)
    )
    assert not torch.equal(sample(0.38), plain)
    assert text_of(caplog) == ""


def test_model_is_left_as_it_was(nodes, model, make_recipe):
    before = str(model.model_options)
    run(
        nodes["SiDFewStepSampler"],
        model=model,
        positive=conditioning(1),
        negative=conditioning(2),
        latent_image=empty_latent(),
        recipe=make_recipe(),
        seed=0,
        guidance="nag",
    )
    assert str(model.model_options) == before
