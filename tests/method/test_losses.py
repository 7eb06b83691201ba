import pytest
import torch
import torch.nn.functional as F

from sid_train.core.noise_schedule import input_scale, prediction_to_x0
from sid_train.method.losses import (
    SID_WEIGHTINGS,
    add_noise,
    denoising_loss,
    discriminator_loss,
    distribution_matching_loss,
    generator_gan_loss,
    pseudo_huber_loss,
    sid_loss,
    sid_weight,
)

SHAPE = (3, 4, 5, 6)


def randn(count, seed=0, shape=SHAPE, dtype=torch.float64):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sid_gradient_splits_by_network(alpha):
    """The three cotangents of method.md, section 4."""
    a, b, x_g = (t.requires_grad_() for t in randn(3))  # teacher, fake score, generator
    w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    loss = sid_loss(a, b, x_g, w, alpha)
    assert loss.shape == (3,)
    grad_a, grad_b, grad_x = torch.autograd.grad(loss.sum(), (a, b, x_g))
    scale = w.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(grad_a, scale * ((a - x_g) + (1 - 2 * alpha) * (a - b)))
    torch.testing.assert_close(grad_b, scale * (-(a - x_g) + 2 * alpha * (a - b)))
    torch.testing.assert_close(grad_x, -scale * (a - b))


def test_sid_loss_value_by_alpha():
    a, b, x_g = randn(3)
    w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    inner = ((a - b) * (a - x_g)).sum((1, 2, 3))
    fisher = (a - b).square().sum((1, 2, 3))
    for alpha in (0.0, 1.0, 1.2):
        torch.testing.assert_close(sid_loss(a, b, x_g, w, alpha), w * (inner - alpha * fisher))
    torch.testing.assert_close(sid_loss(a, b, x_g, w, 1.0), w * ((a - b) * (b - x_g)).sum((1, 2, 3)))
    assert (sid_loss(a, a, x_g, w, 1.2) == 0).all()


def test_sid_weights():
    x_g, teacher_x0 = (t.requires_grad_() for t in randn(2))
    sigma = torch.tensor([0.1, 1.0, 14.6])
    weight = sid_weight(x_g, teacher_x0, sigma, "l1")
    torch.testing.assert_close(weight, 1 / (x_g - teacher_x0).abs().mean((1, 2, 3)))
    assert not weight.requires_grad
    torch.testing.assert_close(sid_weight(x_g, teacher_x0, sigma, "one_minus_sigma"), 1 - sigma / (1 + sigma))
    assert sid_weight(x_g, teacher_x0, sigma, "uniform").tolist() == [1, 1, 1]
    s = sigma / (1 + sigma)  # SiD-DiT's sigma
    theirs = {
        "one_minus_sigma_squared": (1 - s) ** 2,
        "one_over_sigma": 1 / s,
        "one_over_sigma_squared": 1 / s**2,
        "snr": ((1 - s) / s) ** 2,
        "snr_sqrt": (1 - s) / s,
    }
    for weighting, expected in theirs.items():
        torch.testing.assert_close(sid_weight(x_g, teacher_x0, sigma, weighting), expected)
    assert {"l1", "one_minus_sigma", "uniform", *theirs} == set(SID_WEIGHTINGS)


def test_distribution_matching_is_the_part_of_sid_that_passes_no_network():
    a, b, x_g = (t.requires_grad_() for t in randn(3))
    w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    ours = torch.autograd.grad(sid_loss(a, b, x_g, w, 1.0).sum(), x_g)
    loss = distribution_matching_loss(a, b, x_g, w)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), (x_g, a, b), allow_unused=True), (*ours, None, None))
    torch.testing.assert_close(loss, 0.5 * (w[:, None, None, None].float() * (a - b)).square().sum((1, 2, 3)))


def test_pseudo_huber_loss_is_absolute_far_away_and_square_nearby():
    near, far = torch.full((1, 2, 1, 1), 1e-5), torch.full((1, 2, 1, 1), 10.0)
    zero = torch.zeros(1, 2, 1, 1)
    torch.testing.assert_close(pseudo_huber_loss(far, zero), torch.tensor([2 * (10 - 1e-3)]), rtol=1e-5, atol=0)
    expected = torch.tensor([2 * 1e-10 / 2e-3], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber_loss(near.double(), zero.double()), expected, rtol=1e-3, atol=0)


def test_l1_weight_is_clipped_at_1e_5():
    x_g = torch.zeros(2, 4, 2, 2)
    teacher_x0 = torch.stack([torch.full((4, 2, 2), 1e-7), torch.full((4, 2, 2), 1e-3)])
    torch.testing.assert_close(sid_weight(x_g, teacher_x0, torch.ones(2), "l1"), torch.tensor([1e5, 1e3]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_loss_is_the_error_in_eps(prediction_type, schedule):
    x_g, eps, prediction = randn(3, dtype=torch.float32)
    sigma = schedule.sigma(torch.tensor([20, 400, 979]))
    x_t = add_noise(x_g, sigma, eps)
    loss = denoising_loss(prediction_to_x0(prediction, x_t, sigma, prediction_type), x_t, sigma, eps)
    if prediction_type == "epsilon":
        expected = (prediction - eps).square().sum((1, 2, 3))
    else:  # SNR / (SNR + 1) on the v loss
        alpha = input_scale(sigma, x_g)
        v = alpha * eps - (1 - alpha**2).sqrt() * x_g
        expected = (alpha * (prediction - v)).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_denoising_loss_is_zero_for_the_truth_and_reaches_the_network(schedule):
    x_g, eps = randn(2, dtype=torch.float32)
    sigma = schedule.sigma(torch.tensor([20, 400, 979]))
    assert denoising_loss(x_g, add_noise(x_g, sigma, eps), sigma, eps).max() < 1e-6
    fake_x0 = torch.zeros_like(x_g).requires_grad_()
    denoising_loss(fake_x0, add_noise(x_g, sigma, eps), sigma, eps).sum().backward()
    torch.testing.assert_close(fake_x0.grad, -2 * x_g / sigma.reshape(-1, 1, 1, 1) ** 2, rtol=1e-3, atol=1e-4)


def test_add_noise_is_per_sample_and_fp32():
    x0, eps = torch.ones(2, 1, 1, 1).half(), torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    noisy = add_noise(x0, torch.tensor([2.0, 3.0]), eps)
    assert noisy.flatten().tolist() == [3.0, -2.0]
    assert noisy.dtype == torch.float32


def bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none").mean((1, 2))


def test_discriminator_loss_is_half_of_two_cross_entropies():
    real, fake = (10 * t for t in randn(2, shape=(3, 4, 4)))
    torch.testing.assert_close(discriminator_loss(real, fake), (bce(real, 1.0) + bce(fake, 0.0)) / 2)
    assert discriminator_loss(real + 50, fake - 50).max() < 1e-6


def test_generator_gan_loss_is_weighted_cross_entropy():
    (logits,) = randn(1, shape=(3, 4, 4))
    w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(generator_gan_loss(logits, w, 768), w * 768 * bce(logits, 1.0))


def test_generator_gan_loss_clamps_logits_at_10():
    logits = torch.tensor([-30.0, -10.5, -9.5, 9.5, 30.0]).reshape(5, 1, 1).requires_grad_()
    loss = generator_gan_loss(logits, torch.ones(5), 1)
    torch.testing.assert_close(loss, F.softplus(-torch.tensor([-10.0, -10.0, -9.5, 9.5, 10.0])))
    loss.sum().backward()
    assert (logits.grad.flatten() != 0).tolist() == [False, False, True, True, False]
