"""SiD Sampler Select inside other samplers, as packs that add detail or shift sigmas use it."""

from __future__ import annotations

import pytest
import torch
from helpers import conditioning, module, run
from test_sampling import make_recipe  # noqa: F401 - a fixture

# Detail Daemon, Lying Sigma and most others: a function with two attributes of what it calls.


def around_by_function(sampler):
    from comfy.samplers import KSAMPLER

    def sample(model, x, sigmas, wrapped=None, **kwargs):
        def denoise(x, sigma, **extra_args):
            return model(x, sigma, **extra_args)

        for name in ("inner_model", "sigmas"):
            setattr(denoise, name, getattr(model, name))
        return wrapped.sampler_function(denoise, x, sigmas, **kwargs, **wrapped.extra_options)

    return KSAMPLER(sample, extra_options={"wrapped": sampler})


class Denoiser:
    """As k-diffusion's wrappers: ``inner_model`` is what it calls."""

    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, **extra_args):
        return self.inner_model(x, sigma, **extra_args)


def around_by_object(sampler):
    from comfy.samplers import KSAMPLER

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sampler.sampler_function(
            Denoiser(model, sigmas), x, sigmas, extra_args=extra_args, callback=callback, disable=disable
        )

    return KSAMPLER(sample)


def around_by_method(sampler):
    from comfy.samplers import Sampler

    class Around(Sampler):
        def sample(self, *args, **kwargs):
            return sampler.sample(*args, **kwargs)

    return Around()


def around_twice(sampler):
    return around_by_function(around_by_function(sampler))


AROUND = [around_by_function, around_by_object, around_by_method, around_twice]


@pytest.fixture
def sample(nodes, model, recipes, make_recipe):  # noqa: F811
    """Latents of SamplerCustomAdvanced, with ``around`` the sampler."""

    def run_sampler(around, recipe=None, denoise=1.0, image=None, noise=None, mask=None, ours=True):
        from comfy.samplers import CFGGuider

        recipe = recipe or make_recipe(2)
        image = torch.zeros(1, 4, 8, 8) if image is None else image
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(3)) if noise is None else noise
        (sampler,) = run(nodes["SiDSamplerSelect"], recipe=recipe)
        (sigmas,) = run(nodes["SiDScheduler"], model=model, recipe=recipe, denoise=denoise)
        if ours:
            (guider,) = run(nodes["SiDGuidance"], model=model, positive=conditioning(1))
        else:
            guider = CFGGuider(model)
            guider.inner_set_conds({"positive": conditioning(1)})
        return guider.sample(noise, image, around(sampler), sigmas, denoise_mask=mask, seed=3)

    return run_sampler


def unwrapped(sampler):
    return sampler


IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
OTHER_NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
LEFT_HALF = torch.zeros(1, 1, 8, 8).index_fill(3, torch.arange(4), 1.0)
CASES = {
    "new picture": {},
    "noise of no seed": {"noise": OTHER_NOISE},
    "image to image": {"image": IMAGE, "denoise": 0.5, "noise": OTHER_NOISE},
    "image that is not used": {"image": IMAGE, "noise": OTHER_NOISE},
    "mask": {"image": IMAGE, "mask": LEFT_HALF},
    "no noise, all steps": {"image": 3 * IMAGE, "noise": torch.zeros(1, 4, 8, 8)},
    "no noise": {"image": 3 * IMAGE, "noise": torch.zeros(1, 4, 8, 8), "denoise": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_a_sampler_around_ours_changes_nothing(sample, case):
    assert torch.equal(sample(around_by_function, **CASES[case]), sample(unwrapped, **CASES[case]))


@pytest.mark.parametrize("around", AROUND)
def test_every_way_to_go_around(sample, around, make_recipe):  # noqa: F811
    recipe = make_recipe(2, noise_mode="fixed")
    assert torch.equal(sample(around, recipe, noise=OTHER_NOISE), sample(unwrapped, recipe, noise=OTHER_NOISE))


@pytest.mark.parametrize("preset", ["DMD2 (4 steps)", "SiD 999 (2 steps)"])
def test_at_the_highest_timestep(sample, recipes, preset):
    """Where KSAMPLER scales the first noise in a way of its own."""
    recipe = recipes.PRESETS[preset]
    assert torch.equal(sample(around_by_function, recipe), sample(unwrapped, recipe))


def test_a_guider_and_a_model_that_are_not_ours(sample):
    """Nobody noted the noise: it is the seed's."""
    for case in ({}, {"image": IMAGE}):
        assert torch.equal(sample(around_by_function, **case, ours=False), sample(unwrapped, **case, ours=False))
    case = {"image": IMAGE, "denoise": 0.5, "ours": False}
    torch.testing.assert_close(sample(around_by_function, **case), sample(unwrapped, **case), rtol=1e-3, atol=1e-3)
    assert sample(around_by_function, noise=OTHER_NOISE, ours=False).std() > 0.1


def test_what_the_sampler_around_ours_changes_counts(sample):
    """It shifts the sigma that the network is told, as it adds detail; or it hands on another first x."""
    from comfy.samplers import KSAMPLER

    def shifting(sampler):
        def run_shifted(model, x, sigmas, **kwargs):
            def denoise(x, sigma, **extra_args):
                return model(x, sigma * 0.95, **extra_args)

            denoise.inner_model, denoise.sigmas = model.inner_model, model.sigmas
            return sampler.sampler_function(denoise, x, sigmas, **kwargs)

        return KSAMPLER(run_shifted)

    def flipping(sampler):
        return KSAMPLER(lambda model, x, sigmas, **kwargs: sampler.sampler_function(model, x.flip(3), sigmas, **kwargs))

    plain = sample(unwrapped)
    assert (sample(shifting) - plain).abs().max() > 1e-2
    assert (sample(flipping) - plain).abs().max() > 1e-2


def test_a_sampler_that_hides_the_model_is_named(sample):
    from comfy.samplers import KSAMPLER

    def hiding(sampler):
        def run_hidden(model, x, sigmas, **kwargs):
            return sampler.sampler_function(lambda x, sigma, **extra: model(x, sigma, **extra), x, sigmas, **kwargs)

        return KSAMPLER(run_hidden)

    with pytest.raises(ValueError, match="got function without ComfyUI's model in its 'inner_model'"):
        sample(hiding)


def test_models_are_noted_once(pack, model):
    start = module(pack, "nodes.start")
    once = start.remember_start(model)
    twice = start.remember_start(once)
    assert [len(m.wrappers["sampler_sample"][start.KEY]) for m in (once, twice)] == [1, 1]
    assert not model.wrappers.get("sampler_sample", {}).get(start.KEY)
