"""The presets of other families' files, beside the scheduler of diffusers that their publishers name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from sid_train.core.recipe import PRESETS, SiDRecipe
from sid_train.core.sampling import few_step_sample, implied_shares, initial_noise, ladder_sigmas, noise_sampler
from sid_train.core.timesteps import LADDERS, consistency_timesteps, ladder_timesteps, trailing_timesteps

LATENT = (2, 12, 8, 8)
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MOST_STEPS = {"turbo": 10, "quarters": 4}
OTHERS = [name for name in PRESETS if not name.startswith("SiD")]


def scheduler_of(name: str) -> Any:
    """As the publisher's page sets it up."""
    family = name.partition(" ")[0]
    if family in ("LCM", "Flash", "DMD2") or name == "Hyper-SD (1 step)":
        return LCMScheduler(**SDXL)
    if family == "TCD":
        return TCDScheduler(**SDXL)
    if family == "Lightning":
        kind = "sample" if name == "Lightning (1 step)" else "epsilon"
        return EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing", prediction_type=kind)
    if family.startswith("NitroFusion"):
        return LCMScheduler(**SDXL, original_inference_steps=4)
    if family in ("Hyper-SD", "PCM"):
        return DDIMScheduler(**SDXL, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    assert family == "Turbo"
    return EulerAncestralDiscreteScheduler(**SDXL)


# NitroFusion's ``shifted_timestep``: what its scheduler makes of 1,000.
SHIFTED = {"NitroFusion Realism": 250, "NitroFusion Vibrant": 500}


def theirs(name: str, timesteps: list[int], given: bool, unet, cond, draws: SeededDraws) -> tuple[list, Tensor]:
    """diffusers' pipeline loop: what the network was given at each step, and what the last step predicts of x0."""
    scheduler, count = scheduler_of(name), len(timesteps)
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        scheduler.set_timesteps(count)  # it takes no list
        table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        scheduler.sigmas = torch.cat([table[timesteps], torch.zeros(1)])
    elif given:
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        scheduler.set_timesteps(count)
    assert scheduler.timesteps.long().tolist() == timesteps
    first = next(draws)
    start = scheduler.sigmas[0] if hasattr(scheduler, "sigmas") else scheduler.init_noise_sigma
    sample, added = first * start, {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    inputs, predicted = [], first
    shifted = SHIFTED.get(name.partition(" (")[0], 1000)
    for t in scheduler.timesteps:
        told = scheduler.scale_model_input(sample, t)
        inputs.append(told)
        if shifted != 1000:  # it goes on to its own next timestep, and takes the output for that of the shifted one
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            t = t * shifted // 1000
        prediction = unet(told, t, cond.text, added_cond_kwargs=added).sample
        options: dict[str, Any] = {} if isinstance(scheduler, DDIMScheduler) else {"generator": draws.generator}
        if isinstance(scheduler, TCDScheduler):
            options["eta"] = 0.3
        step = scheduler.step(prediction, t, sample, **options)
        if isinstance(scheduler, LCMScheduler):
            predicted = step.denoised
        elif isinstance(scheduler, TCDScheduler):  # its own 'denoised' is still noised
            abar = scheduler.alphas_cumprod[int(t)]
            predicted = (sample - (1 - abar).sqrt() * prediction) / abar.sqrt()
        else:
            predicted = step.pred_original_sample
        sample = step.prev_sample
    return inputs, predicted


class SeededDraws:
    """Noises from one generator, in the order in which a scheduler asks for them."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        return torch.randn(LATENT, generator=self.generator)


def ours(recipe: SiDRecipe, timesteps: list[int], denoiser, cond, draws: SeededDraws) -> tuple[list, Tensor]:
    denoiser.schedule = denoiser.schedule.sampled_as(recipe.prediction_type, recipe.timestep_scale)
    sigmas, inputs = ladder_sigmas(denoiser.schedule, timesteps), []
    shares = implied_shares(recipe.noise_mode, sigmas, denoiser.schedule, recipe.noise_gamma)
    first = next(draws)
    x0 = few_step_sample(
        lambda x, sigma: denoiser(x, sigma, cond),
        sigmas,
        first,
        noise_sampler(recipe.noise_mode, first, lambda k: next(draws), shares),
        callback=lambda k, x, sigma, x0: inputs.append(denoiser.schedule.scale_input(x, sigma)),
        unit_variance_start=recipe.unit_variance_start,
    )
    return inputs, x0


def numbers_of_steps() -> Iterator[tuple[str, int | None]]:
    """Each preset at its own number of steps, and one of each kind of chain at every number that its rule has."""
    seen = set()
    for name in OTHERS:
        yield name, None
        recipe = PRESETS[name]
        kind = (recipe.ladder, recipe.noise_mode, recipe.unit_variance_start, recipe.timestep_scale)
        if recipe.ladder in LADDERS and kind not in seen:
            seen.add(kind)
            yield from ((name, steps) for steps in range(1, MOST_STEPS.get(recipe.ladder, 16) + 1))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers' schedulers with numpy 2
@pytest.mark.parametrize(("name", "steps"), list(numbers_of_steps()))
@torch.no_grad()
def test_preset_is_its_publishers_scheduler(name, steps, make_denoiser, cond):
    recipe, denoiser = PRESETS[name], make_denoiser(3)
    timesteps = recipe.timesteps_for(steps)
    given = recipe.ladder == "explicit"
    expected, x0 = theirs(name, timesteps, given, denoiser.unet, cond, SeededDraws(steps or 0))
    found, result = ours(recipe, timesteps, denoiser, cond, SeededDraws(steps or 0))
    assert len(found) == len(expected) == len(timesteps)
    # Where the number of steps does not divide 1,000, DDIMScheduler steps to t - 1000 // n, which is none of its own
    # timesteps: up to one off.
    off = isinstance(scheduler_of(name), DDIMScheduler) and 1000 % len(timesteps)
    tolerance = 0.05 if off else 2e-5
    scale = max(float(x.abs().max()) for x in expected)
    for a, b in zip([*found, result], [*expected, x0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, float(b.abs().max())))


def test_lcm_at_eight_steps_stays_on_its_grid():
    assert PRESETS["LCM (4 steps)"].timesteps_for(8) == [999, 879, 759, 639, 499, 379, 259, 139]
    assert set(consistency_timesteps(16)) <= set(range(19, 1000, 20))


@pytest.mark.parametrize("ladder", LADDERS)
def test_ladders_are_timesteps(ladder):
    for steps in range(1, MOST_STEPS.get(ladder, 16) + 1):
        timesteps = ladder_timesteps(ladder, steps, 999)
        SiDRecipe(timesteps=tuple(timesteps), t_init=999, ladder=ladder)
    for steps in (0, 17):
        with pytest.raises(ValueError, match="steps: expected 1 to 16"):
            ladder_timesteps(ladder, steps, 999)


def test_trailing_timesteps_are_lightnings():
    assert trailing_timesteps(8) == [999, 874, 749, 624, 499, 374, 249, 124]


def test_shares_of_the_implied_noise(schedule):
    sigmas = ladder_sigmas(schedule, [999, 759, 499, 259])
    assert implied_shares("fresh", sigmas, schedule) == []
    assert implied_shares("tcd", sigmas, schedule, gamma=0) == pytest.approx([1, 1, 1, 1])
    at_one = implied_shares("tcd", sigmas, schedule, gamma=1)
    assert at_one[1:] == pytest.approx([float(schedule.sigmas[0] / s) for s in sigmas[1:-1]])
    ancestral = implied_shares("ancestral", sigmas, schedule)
    assert ancestral[1:] == pytest.approx((sigmas[1:-1] / sigmas[:-2]).tolist())
    assert all(0 < share < 1 for share in ancestral[1:])
    first = initial_noise((1, 4, 2, 2), 0)
    blended = noise_sampler("tcd", first, lambda k: 2 * first, [1, 0.6])(
        1, first, torch.ones(1), torch.zeros_like(first)
    )
    torch.testing.assert_close(blended, (0.6 + 0.8 * 2) * first)
