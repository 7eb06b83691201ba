"""ImageReward (arXiv 2304.05977), through its authors' package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files.reading import shown


class ImageReward:
    """How much people would like a picture for its prompt: about -2 to 2.

    weights: a file, or the package's word for published ones
    """

    def __init__(self, weights: str, setting: str, device: torch.device):
        try:
            import ImageReward as package
        except Exception as error:  # it is old, and fails in its own ways beside newer packages
            raise ValueError(
                f"{setting}: needs its authors' package, in an environment that suits it: pip install image-reward "
                f"({type(error).__name__}: {shown(str(error).splitlines()[0])})"
            ) from None
        folder = Path(weights).parent / "med_config.json"
        try:
            self.network = package.load(
                weights, device=str(device), med_config=str(folder) if folder.is_file() else None
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{setting}: the weights {shown(weights)} cannot be had: {shown(str(error).splitlines()[0])}: give "
                f"their file as {setting}=FILE, with med_config.json beside it"
            ) from None

    @torch.no_grad()
    def values(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """[N]."""
        return torch.tensor([self.network.score(p, picture) for p, picture in zip(prompts, pictures, strict=True)])
