"""``sample``: pictures with a distilled generator."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ..data.lengths import measure, report_long
from ..files.atomic import replacing
from ..files.images import image_grid, to_pil
from ..files.tensors import DTYPES
from ..models.families import load_opened, open_generator
from ..sample import sample_images
from .export import another_base


def sample(
    model: str,
    prompts: list[str],
    count: int,
    steps: int | None,
    base: str | None,
    resolution: int,
    device: str | None,
    dtype: str,
    seed: int,
    out: Path,
) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a name that ends in .png, got {str(out)!r}")
    if not 1 <= count <= 256:
        raise ValueError(f"--count: expected 1 to 256, got {count}")
    where = device_named(device)
    generator = open_generator(model, base)
    recipe = generator.recipe
    # Only a base of another name is hashed: the usual case does not wait for it.
    if generator.model.name != recipe.base_model and generator.is_on_another_base():
        print(f"warning: {another_base(generator)}", file=sys.stderr)
    bundle = load_opened(generator, resolution)
    timesteps = recipe.timesteps_for(steps)
    if not recipe.is_trained_for(len(timesteps)):
        print(
            f"warning: {model} was trained for {recipe.trained_numbers} step(s), not {len(timesteps)}", file=sys.stderr
        )
    report_long(measure(bundle.conditioner, prompts), "--prompt")
    bundle.to(where, DTYPES[dtype])
    images = sample_images(bundle, recipe, [prompt for prompt in prompts for _ in range(count)], seed, steps)
    with replacing(out) as temporary:
        to_pil(image_grid(images, columns=count)).save(temporary, format="PNG")
    print(f"{out}: {len(images)} picture(s), timesteps {' '.join(map(str, timesteps))}")


def device_named(name: str | None) -> torch.device:
    """A device by its name; CUDA's first where there is one, if None. ValueError for one that cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
