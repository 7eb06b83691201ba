"""The demo's data: coloured handwritten digits, their prompts and their latents.

scikit-learn's ``load_digits`` (UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, CC BY 4.0):
1,797 greyscale digits of 8x8 pixels. Each picture here is one of them, slightly turned, scaled and shifted, enlarged
to 16x16 and painted in two colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.rng import BatchRNG
from ..conditioning import Conditioner, LatentCodec, RealBatch

Split = Literal["teacher", "classifier", "reference"]
SPLIT_SIZES: dict[str, int] = {"teacher": 897, "classifier": 450, "reference": 450}
SPLIT_SEED = 2505_12674

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.20, 0.75, 0.25),
    "cyan": (0.20, 0.80, 0.90),
    "pink": (0.95, 0.50, 0.75),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS = {"black": (0.05, 0.05, 0.05), "blue": (0.10, 0.15, 0.60), "grey": (0.45, 0.45, 0.45)}
IMAGE_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """What one prompt asks for, as indices into DIGITS, COLOURS and GROUNDS."""

    digit: int
    colour: int
    ground: int

    @property
    def prompt(self) -> str:
        return f"a {list(COLOURS)[self.colour]} {DIGITS[self.digit]} on a {list(GROUNDS)[self.ground]} ground"

    @property
    def held_out(self) -> bool:
        """True for the digit-colour pairs (one colour a digit) that neither teacher nor generator is trained on."""
        return self.colour == self.digit % len(COLOURS)


SUBJECTS = tuple(Subject(d, c, g) for d in range(len(DIGITS)) for c in range(len(COLOURS)) for g in range(len(GROUNDS)))
TRAINING_SUBJECTS = tuple(s for s in SUBJECTS if not s.held_out)
HELD_OUT_SUBJECTS = tuple(s for s in SUBJECTS if s.held_out)


def load_split(split: Split) -> tuple[Tensor, Tensor]:
    """The digits of one of three disjoint splits: images [N, 8, 8] in [0, 1] and labels [N]."""
    try:
        from sklearn.datasets import load_digits  # slow to import, and only the demo needs it
    except ImportError:
        raise ValueError("the demo's digits come with scikit-learn: pip install scikit-learn") from None

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            chosen = order[start : start + size]
            return torch.from_numpy(data.images).float()[chosen] / 16, torch.from_numpy(data.target)[chosen]
        start += size
    raise ValueError(f"split: expected one of {', '.join(SPLIT_SIZES)}, got {split!r}")


def palette(colours: dict[str, tuple[float, float, float]]) -> Tensor:
    """The named colours: [n, 3] in [0, 1]."""
    return torch.tensor(list(colours.values()))


def render(digits: Tensor, colours: Tensor, grounds: Tensor, generator: torch.Generator) -> Tensor:
    """Paints ``digits`` [N, 8, 8] in the colours of digit and ground [N, 3], all in [0, 1]: images [N, 3, 16, 16] in
    [-1, 1].

    Each is turned by up to 8 degrees, scaled by up to 10% and shifted by up to one pixel; colours vary by 0.03 (1 sd).
    """
    n = len(digits)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(2 / IMAGE_SIZE), uniform(2 / IMAGE_SIZE)
    affine = torch.stack([torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], dim=1)
    grid = F.affine_grid(affine, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    mask = F.grid_sample(digits[:, None], grid, mode="bicubic", align_corners=False).clamp(0, 1)

    def paint(base: Tensor) -> Tensor:
        return (base + 0.03 * torch.randn(n, 3, generator=generator)).clamp(0, 1)[..., None, None]

    return (paint(grounds) * (1 - mask) + paint(colours) * mask) * 2 - 1


class RealDigits:
    """Draws real images from one split of the digits."""

    def __init__(self, split: Split):
        self.images, labels = load_split(split)
        self.by_class = [torch.nonzero(labels == d).flatten() for d in range(len(DIGITS))]

    def draw(self, subjects: Sequence[Subject], generator: torch.Generator, colours: Tensor | None = None) -> Tensor:
        """One image for each subject, a random digit of its class: [N, 3, 16, 16] in [-1, 1].

        colours: of the digits, [N, 3] in [0, 1], instead of the subjects'
        """
        pick = torch.rand(len(subjects), generator=generator).tolist()
        candidates = [self.by_class[s.digit] for s in subjects]
        chosen = torch.stack([c[int(p * len(c))] for c, p in zip(candidates, pick, strict=True)])
        if colours is None:
            colours = palette(COLOURS)[[s.colour for s in subjects]]
        grounds = palette(GROUNDS)[[s.ground for s in subjects]]
        return render(self.images[chosen], colours, grounds, generator)


class DigitPairs:
    """Real image-text pairs for the GAN branch: the teacher's own split and prompts."""

    identity = "demo"

    def __init__(self, codec: LatentCodec, conditioner: Conditioner):
        self.codec, self.real = codec, RealDigits("teacher")
        self.cond = conditioner.encode([s.prompt for s in TRAINING_SUBJECTS])

    def draw(self, batch: int, rng: BatchRNG) -> RealBatch:
        # The digits are drawn on the CPU, whatever the generator's device, and for the whole batch: they are tiny.
        generator = torch.Generator().manual_seed(rng.integer(2**62))
        index = torch.randint(len(TRAINING_SUBJECTS), (batch * rng.parts,), generator=generator)
        images = self.real.draw([TRAINING_SUBJECTS[i] for i in index.tolist()], generator)
        images, index = images[rng.rows(batch)], index[rng.rows(batch)]
        return RealBatch(self.codec.encode(images).to(rng.device), self.cond[index].to(rng.device))
