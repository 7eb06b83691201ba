import pytest
import torch

from sid_train.evaluation.distances import diagonal_energy, frechet_distance, precision_recall


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly standard
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0])
    expected = shift.square().sum() + (scale - 1).square().sum()  # of diagonal Gaussians
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_no_common_eigenvectors():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(500, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double()
    b = torch.randn(500, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double() + 1
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_distance_of_few_pictures_in_many_features():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(7, 40, generator=generator).double(), torch.randn(11, 40, generator=generator).double() + 1
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_falls_with_outliers_and_recall_with_lost_modes():
    generator = torch.Generator().manual_seed(2)
    real = torch.randn(600, 2, generator=generator)
    real[300:] += 50
    same = torch.randn(600, 2, generator=generator)
    same[300:] += 50
    precision, recall = precision_recall(real, same)
    assert precision > 0.9
    assert recall > 0.9
    dropped = torch.randn(600, 2, generator=generator)
    precision, recall = precision_recall(real, dropped)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    wild = same.clone()
    wild[::2] = 1000 + 10 * torch.randn(300, 2, generator=generator)
    assert precision_recall(real, wild)[0] == pytest.approx(0.5, abs=0.05)


def test_diagonal_energy_sees_noise_and_not_gradients():
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)
    assert diagonal_energy(ramp) == pytest.approx(0, abs=1e-12)
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert diagonal_energy(noise) == pytest.approx(4, rel=0.05)  # four independent terms
