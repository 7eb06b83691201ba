"""Distances between sets of images. Features and pictures in, plain numbers out."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features [N, D] and [M, D] (FID, arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    if min(len(a), len(b)) < a.shape[1] // 2:
        # tr sqrt(A B) is the sum of the singular values of sqrt(A) sqrt(B), and those are these, of a smaller matrix.
        a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
        cross = torch.linalg.svdvals(a @ b.T).sum()
        return float(difference @ difference + a.square().sum() + b.square().sum() - 2 * cross)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of ``made`` [M, D] against ``real`` [N, D].

    Precision: the share of made images within the k-th-neighbour radius of some real image; recall: the reverse.
    """

    def covered(points: Tensor, support: Tensor) -> float:
        radius = torch.cdist(support, support).kthvalue(neighbours + 1, dim=1).values  # the first is itself
        return float((torch.cdist(points, support) <= radius).any(dim=1).double().mean())

    return covered(made, real), covered(real, made)


def diagonal_energy(images: Tensor) -> float:
    """Mean square of ``a - b - c + d`` over all 2x2 windows of images [N, C, H, W]: the energy of pixel noise."""
    rows = images[..., 1:, :] - images[..., :-1, :]
    return float((rows[..., 1:] - rows[..., :-1]).double().square().mean())
