from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from sid_train.core.noise_schedule import VPSchedule
from sid_train.core.sampling import (
    NOISE_MODES,
    SID_NOISE_MODES,
    few_step_sample,
    implied_shares,
    initial_noise,
    ladder_sigmas,
    noise_sampler,
    seeded_noise,
)
from sid_train.core.timesteps import check_timesteps, last_timesteps, timestep_ladder
from sid_train.models.digits.layout import LATENT_SHAPE


@pytest.mark.parametrize("steps", range(1, 9))
def test_every_ladder_is_t_init_in_equal_integer_shares(steps):
    for t_init in range(steps, 1000):
        ladder = timestep_ladder(steps, t_init)
        assert len(ladder) == steps
        assert ladder[0] == t_init
        for k, t in enumerate(ladder):  # the floor, said without a division: an integer at most 1 below the share
            assert isinstance(t, int)
            assert 0 <= t_init * (steps - k) - t * steps < steps
        check_timesteps(ladder)


@pytest.mark.parametrize(
    ("t_init", "steps", "expected"),
    [
        (625, 1, [625]),
        (625, 2, [625, 312]),
        (625, 4, [625, 468, 312, 156]),
        (625, 5, [625, 500, 375, 250, 125]),
        (999, 4, [999, 749, 499, 249]),
        (8, 8, [8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_known_ladders(t_init, steps, expected):
    assert timestep_ladder(steps, t_init) == expected


@pytest.mark.parametrize(
    ("steps", "t_init", "message"),
    [
        (0, 625, "steps: expected 1 to 8, got 0"),
        (9, 625, "steps: expected 1 to 8, got 9"),
        (4, 1000, "t_init: expected 4 .* to 999, got 1000"),
        (4, 3, "t_init: expected 4 .* to 999, got 3"),
    ],
)
def test_impossible_ladders_are_errors(steps, t_init, message):
    with pytest.raises(ValueError, match=message):
        timestep_ladder(steps, t_init)


@pytest.mark.parametrize("timesteps", [[], [1000, 5], [5, -1], [100, 200], [100, 100], list(range(17, 0, -1))])
def test_timesteps_that_do_not_fall_or_are_out_of_range_are_errors(timesteps, schedule):
    with pytest.raises(ValueError, match="timesteps: expected 1 to 16 integers that fall"):
        check_timesteps(timesteps)
    with pytest.raises(ValueError, match="timesteps"):
        ladder_sigmas(schedule, timesteps)


def test_ladder_sigmas_are_the_tables_then_zero(schedule):
    sigmas = ladder_sigmas(schedule, [999, 749, 0])
    assert torch.equal(sigmas[:3], schedule.sigmas[[999, 749, 0]])
    assert sigmas[3] == 0
    assert sigmas.dtype == torch.float32


@pytest.mark.parametrize(
    ("denoise", "expected"),
    [(1, [625, 468, 312, 156]), (0.75, [468, 312, 156]), (0.63, [468, 312, 156]), (0.62, [312, 156]), (0.01, [156])],
)
def test_image_to_image_runs_the_last_trained_timesteps(denoise, expected):
    assert last_timesteps((625, 468, 312, 156), denoise) == expected


@pytest.mark.parametrize("denoise", [0, -0.5, 1.01, float("nan")])
def test_impossible_denoise_is_an_error(denoise):
    with pytest.raises(ValueError, match="denoise: expected more than 0 and at most 1"):
        last_timesteps([625, 312], denoise)


# -- the chain against diffusers ---------------------------------------------------------------------------------------


def diffusers_chain(unet, cond, scheduler, timesteps, mode, noises):
    """The chain in the variance-preserving convention, with diffusers' own arithmetic: (sqrt(abar) x0 a step)."""
    x0, outputs, eps, sample = torch.zeros_like(noises[0]), [], noises[0], None
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    for k, t in enumerate(timesteps):
        t = torch.tensor(t)
        abar = scheduler.alphas_cumprod[t]
        if k and mode == "fresh":
            eps = noises[k]
        elif k and mode == "ddim":
            before = scheduler.alphas_cumprod[timesteps[k - 1]]
            eps = (sample - before.sqrt() * x0) / (1 - before).sqrt()
        sample = scheduler.add_noise(x0, eps, t)
        prediction = unet(sample, t, cond.text, added_cond_kwargs=added).sample
        x0 = scheduler.step(prediction, t, sample, generator=torch.Generator()).pred_original_sample
        outputs.append(abar.sqrt() * x0)
    return outputs


@pytest.mark.parametrize("mode", SID_NOISE_MODES)
@pytest.mark.parametrize("t_init", [625, 999])
@pytest.mark.parametrize("model", ["epsilon", "v_prediction", "v_prediction, zero SNR"])
@torch.no_grad()
def test_chain_is_diffusers_chain(model, t_init, mode, make_denoiser, cond):
    prediction_type, _, zero_snr = model.partition(", ")
    denoiser = make_denoiser(3, prediction_type, bool(zero_snr))
    schedule = denoiser.schedule
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=bool(zero_snr),
    )
    if zero_snr:
        scheduler.alphas_cumprod[-1] = 4.8973451890853435e-08
    for steps in (1, 2, 4, 8):
        noises = torch.randn(steps, 2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(steps))
        timesteps = timestep_ladder(steps, t_init)
        expected = diffusers_chain(denoiser.unet, cond, scheduler, timesteps, mode, noises)
        seen = []
        result = few_step_sample(
            lambda x, sigma: denoiser(x, sigma, cond),
            ladder_sigmas(schedule, timesteps),
            noises[0],
            noise_sampler(mode, noises[0], lambda k, noises=noises: noises[k]),
            callback=lambda k, x, sigma, x0, seen=seen: seen.append((k, x0 / (1 + sigma[0] ** 2) ** 0.5)),
        )
        assert [k for k, _ in seen] == list(range(steps))  # K network calls, no more
        for (_, ours), theirs in zip(seen, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        last_abar = scheduler.alphas_cumprod[timesteps[-1]]
        torch.testing.assert_close(result * last_abar.sqrt(), expected[-1], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_unit_variance_start_gives_the_network_the_noise_itself(make_denoiser, cond, schedule):
    """DMD2's one step: pure noise at t = 399, and the x0 that diffusers' scheduler predicts from it."""
    denoiser = make_denoiser(3)
    noise = initial_noise((2, *LATENT_SHAPE), 0)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    prediction = denoiser.unet(noise, torch.tensor(399), cond.text, added_cond_kwargs=added).sample
    expected = scheduler.step(prediction, 399, noise, generator=torch.Generator()).pred_original_sample
    result = few_step_sample(
        lambda x, sigma: denoiser(x, sigma, cond),
        ladder_sigmas(schedule, [399]),
        noise,
        noise_sampler("fresh", noise, lambda k: noise),
        unit_variance_start=True,
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


# -- the chain alone ---------------------------------------------------------------------------------------------------


def halve(x, sigma):
    """A denoiser that keeps something of its input, so that every noise leaves a trace in the result."""
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def sample(first_noise, mode="fresh", steps=4, seed=5, denoise=halve, **options):
    sigmas = ladder_sigmas(VPSchedule.sdxl(), timestep_ladder(steps))
    shares = implied_shares(mode, sigmas, VPSchedule.sdxl())
    noise = noise_sampler(mode, first_noise, seeded_noise(first_noise, seed), shares)
    return few_step_sample(denoise, sigmas, first_noise, noise, **options)


@pytest.mark.parametrize("steps", range(1, 9))
def test_network_is_called_once_a_step_at_the_ladders_sigmas(steps, schedule, make_denoiser, record_calls, cond):
    denoiser = make_denoiser()
    calls = record_calls(denoiser)
    with torch.no_grad():
        sample(initial_noise((2, *LATENT_SHAPE), 0), steps=steps, denoise=lambda x, s: denoiser(x, s, cond))
    assert len(calls) == steps
    assert torch.equal(torch.stack([c.sigma for c in calls])[:, 1], schedule.sigmas[timestep_ladder(steps)])


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_image_of_a_batch_equals_the_image_alone(mode):
    batch = initial_noise((3, *LATENT_SHAPE), seed=11, batch_index=[0, 1, 2])
    together = sample(batch, mode)
    for i in range(3):
        alone = initial_noise((1, *LATENT_SHAPE), seed=11, batch_index=[i])
        assert torch.equal(alone[0], batch[i])
        assert torch.equal(sample(alone, mode)[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_initial_noise_is_comfyuis():
    shape = (3, *LATENT_SHAPE)
    torch.manual_seed(11)
    assert torch.equal(initial_noise(shape, 11), torch.randn(shape))
    assert torch.equal(initial_noise(shape, 11, [0, 1, 2]), initial_noise(shape, 11))
    repeated = initial_noise(shape, 11, [2, 0, 2])
    assert torch.equal(repeated, initial_noise(shape, 11)[[2, 0, 2]])
    with pytest.raises(ValueError, match="batch_index: expected 3 places, one an image, got 2"):
        initial_noise(shape, 11, [0, 1])


def test_fresh_noise_differs_by_seed_step_and_image_and_is_normal():
    first = initial_noise((2, *LATENT_SHAPE), 0)
    draws = [seeded_noise(first, seed)(k) for seed in (1, 2) for k in (1, 2)]
    flat = torch.stack([first, *draws]).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
    assert flat.mean().abs() < 5 / flat.numel() ** 0.5
    assert abs(flat.std() - 1) < 0.05
    assert torch.equal(seeded_noise(first, 1)(2), draws[1])


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_without_first_noise_the_later_steps_have_some(mode):
    """The latent arrives noised, as it does after ComfyUI's DisableNoise."""
    image = initial_noise((1, *LATENT_SHAPE), 3).expand(2, -1, -1, -1)
    seen = []
    sample(torch.zeros_like(image), mode, x0=image, callback=lambda k, x, sigma, x0: seen.append((x, sigma, x0)))
    assert torch.equal(seen[0][0], image)
    for (_, _, x0), (x, sigma, _) in pairwise(seen):
        noise = (x - x0) / sigma.view(-1, 1, 1, 1)
        assert noise.std() > 0.1
        if mode == "fixed":
            torch.testing.assert_close(noise, (seen[1][0] - seen[0][2]) / seen[1][1].view(-1, 1, 1, 1))
        if mode in ("fresh", "fixed"):
            assert abs(noise.std() - 1) < 0.1
        if mode != "ddim":
            assert (noise[0] - noise[1]).abs().max() > 0.1  # no two images of a batch get the same


def test_image_to_image_starts_from_the_image(schedule):
    image, noise = initial_noise((2, 2, *LATENT_SHAPE), 3)
    seen = []
    few_step_sample(
        halve,
        ladder_sigmas(schedule, last_timesteps([625, 468, 312, 156], 0.5)),
        noise,
        noise_sampler("fixed", noise, seeded_noise(noise, 0)),
        x0=image,
        callback=lambda k, x, sigma, x0: seen.append((k, x, sigma, x0)),
    )
    (_, x_first, sigma_first, x0_first), (_, x_second, sigma_second, _) = seen
    torch.testing.assert_close(x_first, image + schedule.sigmas[312] * noise)
    torch.testing.assert_close(x_second, x0_first + schedule.sigmas[156] * noise)
    assert sigma_first.tolist() == [schedule.sigmas[312].item()] * 2
    assert sigma_second.tolist() == [schedule.sigmas[156].item()] * 2


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_callback_sees_what_the_network_saw_and_said_unmodified(mode):
    said, seen = [], []

    def denoise(x, sigma):
        said.append((x, sigma, halve(x, sigma)))
        return said[-1][2]

    first = initial_noise((2, *LATENT_SHAPE), 0)
    kept = first.clone()
    result = sample(
        first, mode, denoise=denoise, callback=lambda k, *tensors: seen.append((tensors, k, _copy(tensors)))
    )
    assert [k for _, k, _ in seen] == [0, 1, 2, 3]
    for (tensors, _, copies), call in zip(seen, said, strict=True):
        for tensor, copied, original in zip(tensors, copies, call, strict=True):
            assert torch.equal(tensor, copied)  # nothing was changed in place after the callback
            assert torch.equal(tensor, original)
    assert torch.equal(result, seen[-1][2][2])
    assert torch.equal(first, kept)


def _copy(tensors):
    return [t.clone() for t in tensors]


def test_chain_is_fp32_whatever_the_network_returns():
    seen = []
    noise = initial_noise((1, *LATENT_SHAPE), 0).half()
    result = sample(
        noise,
        denoise=lambda x, sigma: (seen.append(x.dtype), halve(x, sigma).bfloat16())[1],
        x0=torch.zeros_like(noise),
    )
    assert set(seen) == {torch.float32}
    assert result.dtype == torch.float32


def test_unknown_noise_mode_is_an_error():
    with pytest.raises(ValueError, match="noise mode: expected one of fresh, fixed, ddim, ancestral, tcd, got 'none'"):
        noise_sampler("none", torch.zeros(1), lambda k: torch.zeros(1))
