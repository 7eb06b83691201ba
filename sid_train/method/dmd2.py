"""DMD2 ("Improved Distribution Matching Distillation", arXiv 2405.14867), to compare SiD with: what differs is the
generator's loss.

Its own settings are ``t_init = 999``, five updates of the fake score, guidance in the teacher alone (``custom=1,1,S``),
and a GAN term of a small weight, the same for every sample. Its discriminator has a head of its own and learns by the
sum of two cross-entropies; here it is SiD's, which takes their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import MethodSettings, require_default
from .losses import distribution_matching_loss
from .sid import Distiller


class DMD2(Distiller):
    """Distribution matching: the generator goes along the difference of the scores, which are constants to it."""

    title = "DMD2"
    through_scores = False

    @classmethod
    def check(cls, config: MethodSettings) -> None:
        super().check(config)
        require_default(config.method, "alpha", cls.title)

    @classmethod
    def summary(cls, config: MethodSettings) -> dict[str, str]:
        return {name: value for name, value in super().summary(config).items() if name != "alpha"}

    def adversarial_weight(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def matching_loss(self, teacher_x0: Tensor, fake_x0: Tensor, x_g: Tensor, weight: Tensor) -> Tensor:
        return distribution_matching_loss(teacher_x0, fake_x0, x_g, weight)
