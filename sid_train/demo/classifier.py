"""The small classifier whose features and verdicts the demo's metrics are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Conv2d, Linear

from ..models.digits.data import COLOURS, DIGITS, GROUNDS


class DigitClassifier(nn.Module):
    """Images [B, 3, 16, 16] in [-1, 1] -> logits for digit, colour and ground."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            block(3, 32, 1), block(32, 48, 2), block(48, 64, 1), block(64, 96, 2), block(96, 96, 1), nn.Flatten()
        )
        self.neck = nn.Sequential(nn.Dropout(0.2), Linear(96 * 4 * 4, self.FEATURES))
        self.heads = nn.ModuleList(Linear(self.FEATURES, len(c)) for c in (DIGITS, COLOURS, GROUNDS))

    def features(self, images: Tensor) -> Tensor:
        """The space of the Frechet distance, precision and recall: [B, 64]."""
        return self.neck(self.body(images))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = torch.relu(self.features(images))
        return tuple(head(features) for head in self.heads)
