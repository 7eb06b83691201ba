"""The Inception network of FID, as torch-fidelity has it (a port of the one of the original FID)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pickle import UnpicklingError
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files.reading import shown


class Inception:
    """Features [N, 2048] of pictures, which the network itself resizes to 299x299.

    weights: a file, or "" for torch-fidelity's, from its cache or downloaded
    """

    NAME = "inception-v3-compat"
    LAYER = "2048"

    def __init__(self, weights: str, setting: str, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError(f"{setting}: needs torch-fidelity: pip install torch-fidelity") from None
        try:
            if weights:  # the package would unpickle whatever the file holds
                torch.load(weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(
                self.NAME, [self.LAYER], feature_extractor_weights_path=weights or None
            )
        except (OSError, URLError, RuntimeError, UnpicklingError) as error:
            raise ValueError(
                f"{setting}: the weights {shown(weights or 'of torch-fidelity')} cannot be had: "
                f"{shown(str(error).splitlines()[0])}: give their file as {setting}=FILE"
            ) from None
        self.network, self.device = network.to(device).eval(), device

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        alike = [list(group) for _, group in itertools.groupby(pictures, key=lambda picture: picture.size)]
        return torch.cat([self._of_one_size(group) for group in alike])

    @torch.no_grad()
    def _of_one_size(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures])
        found: Tensor = self.network(pixels.permute(0, 3, 1, 2).to(self.device))[0]
        return found.float().cpu()
