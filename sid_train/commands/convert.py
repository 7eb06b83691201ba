"""``convert``: gives a file that does not say how it is sampled one of the presets."""

from __future__ import annotations

from pathlib import Path

from ..core.recipe import PRESETS
from ..models.sdxl.export import convert_unet


def convert(file: Path, out: Path, recipe: str, dtype: str) -> None:
    if recipe not in PRESETS:
        raise ValueError(f"--recipe: expected one of {', '.join(PRESETS)}, got {recipe!r}")
    print(f"{out}\n{convert_unet(file, out, PRESETS[recipe], dtype).describe()}")
