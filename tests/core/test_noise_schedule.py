import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from sid_train.core.noise_schedule import (
    VPSchedule,
    input_scale,
    prediction_to_x0,
    scaled_linear_alphas_cumprod,
    x0_to_epsilon,
)
from sid_train.core.rng import BatchRNG

SDXL = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
both_schedules = pytest.mark.parametrize("zero_snr", [False, True], ids=["sdxl", "zero-snr"])


def numpy_alphas_cumprod(zero_snr: bool) -> np.ndarray:
    i = np.arange(1000, dtype=np.float64)
    betas = (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
    alphas_cumprod = np.exp(np.cumsum(np.log1p(-betas)))
    if zero_snr:  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = np.append(root[:-1] ** 2, 4.8973451890853435e-08)
    return alphas_cumprod


@both_schedules
def test_integer_timesteps_survive_the_round_trip_through_sigma(zero_snr):
    schedule = VPSchedule.sdxl(zero_snr)
    t = torch.arange(1000)
    assert len(schedule) == 1000
    sigma = schedule.sigma(t)
    for rounding in (-2e-7, 0, 2e-7):  # what another program's arithmetic does to a sigma
        assert torch.equal(schedule.timestep(sigma * (1 + rounding)), t.float())
    assert schedule.sigma(t.reshape(10, 100)).shape == (10, 100)


@both_schedules
def test_table_is_what_numpy_computes(zero_snr):
    alphas_cumprod = numpy_alphas_cumprod(zero_snr)
    sigmas = VPSchedule.sdxl(zero_snr).sigmas
    assert sigmas.dtype == torch.float32
    np.testing.assert_allclose(sigmas.numpy(), np.sqrt((1 - alphas_cumprod) / alphas_cumprod), rtol=1e-6)
    np.testing.assert_allclose(scaled_linear_alphas_cumprod(zero_terminal_snr=zero_snr), alphas_cumprod, rtol=1e-9)


@both_schedules
def test_table_agrees_with_diffusers(zero_snr):
    ours = scaled_linear_alphas_cumprod(zero_terminal_snr=zero_snr)
    ddpm = DDPMScheduler(**SDXL, rescale_betas_zero_snr=zero_snr)
    euler = EulerDiscreteScheduler(**SDXL, rescale_betas_zero_snr=zero_snr)
    # diffusers computes in fp32 and puts 0, or 2^-24, at the end of a zero-SNR schedule.
    keep, tolerance = (slice(0, 999), 1e-3) if zero_snr else (slice(0, 1000), 2e-5)
    torch.testing.assert_close(ours[keep].float(), ddpm.alphas_cumprod[keep], rtol=tolerance, atol=0)
    ascending = euler.sigmas[:-1].flip(0)
    torch.testing.assert_close(VPSchedule(ours).sigmas[keep], ascending[keep], rtol=tolerance, atol=0)


def test_zero_snr_ends_in_comfyuis_finite_sigma():
    sigmas = VPSchedule.sdxl(zero_terminal_snr=True).sigmas
    assert sigmas.isfinite().all()
    assert sigmas[-1].item() == pytest.approx(4518.8, abs=0.1)
    assert (sigmas.diff() > 0).all()


@both_schedules
def test_fractional_timesteps_rise_with_sigma(zero_snr):
    schedule = VPSchedule.sdxl(zero_snr)
    sigma = torch.logspace(-3, 4, 20_001)  # far below and above the table, where the timestep stays at its ends
    t = schedule.timestep(sigma)
    assert (t.diff() >= 0).all()
    assert (t[0], t[-1]) == (0, 999)
    inside = (sigma > schedule.sigmas[0]) & (sigma < schedule.sigmas[-1])
    assert (t[inside] % 1 != 0).float().mean() > 0.9
    between = (schedule.sigmas[500] * schedule.sigmas[501]).sqrt()
    assert schedule.timestep(between).item() == pytest.approx(500.5, abs=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predictions_become_x0_by_the_textbook_formulas(prediction_type):
    alphas_cumprod = torch.from_numpy(numpy_alphas_cumprod(zero_snr=False))
    t = torch.tensor([0, 20, 156, 500, 980, 999])
    alpha, s = (f.sqrt().reshape(-1, 1, 1, 1) for f in (alphas_cumprod[t], 1 - alphas_cumprod[t]))
    generator = torch.Generator().manual_seed(0)
    x0, eps, prediction = (torch.randn(6, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    z = alpha * x0 + s * eps  # variance preserving: what the network sees
    expected = (z - s * prediction) / alpha if prediction_type == "epsilon" else alpha * z - s * prediction
    truth = eps if prediction_type == "epsilon" else alpha * eps - s * x0

    sigma = VPSchedule.sdxl().sigma(t)
    x = (z / alpha).float()  # variance exploding: what the rest sees
    torch.testing.assert_close(x * input_scale(sigma, x), z.float(), rtol=1e-5, atol=1e-6)
    result = prediction_to_x0(prediction.float(), x, sigma, prediction_type)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=2e-5)
    result = prediction_to_x0(truth.float(), x, sigma, prediction_type)
    torch.testing.assert_close(result, x0.float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(x0_to_epsilon(x0, x, sigma), eps.float(), rtol=1e-4, atol=1e-4)


def test_v_prediction_at_zero_snr_is_minus_v():
    sigma = VPSchedule.sdxl(zero_terminal_snr=True).sigmas[-1:]
    eps, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = prediction_to_x0(v.half(), sigma * eps, sigma, "v_prediction")
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, -v, rtol=1e-3, atol=2e-3)


def test_an_unknown_prediction_type_is_an_error():
    with pytest.raises(ValueError, match="expected one of epsilon, v_prediction, x0, got 'sample'"):
        prediction_to_x0(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), "sample")


def test_logit_normal_levels_are_those_of_sid_dit_cut_off_at_the_ends(schedule):
    """The flow time is sigmoid(N(ln 2, 1.6)): its quantiles between the two ends are the normal's."""
    rng = BatchRNG(torch.Generator().manual_seed(0))
    sigma = schedule.draw_sigma(40_000, 20, 980, rng, "logit_normal")
    low, high = schedule.sigma(torch.tensor([20, 979])).tolist()
    assert low <= sigma.min()
    assert sigma.max() <= high
    logit = (sigma / (1 + sigma)).logit()
    normal = torch.distributions.Normal(math.log(2), 1.6)
    ends = normal.cdf(torch.tensor([low, high]).log())
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = normal.icdf(ends[0] + shares * (ends[1] - ends[0]))
    torch.testing.assert_close(logit.quantile(shares), expected, rtol=0, atol=0.05)
