"""The generations of Stable Diffusion that are known here: the words that recipes, other tools and people have for
each, and what a prompt becomes for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One generation.

    name: in recipes (``sid.architecture``)
    people: what people call it
    base_model: what a recipe calls its base model, where nothing else is known of it
    resolution: of the square pictures that it makes, in pixels; ``resolution_v`` where it predicts v
    text_width: of a prompt's hidden states
    pooled_width: of the vector that a prompt becomes besides; 0 where the network reads none
    spec, spec_v: ``modelspec.architecture``, https://github.com/Stability-AI/ModelSpec; the second where it predicts v
    implementation: ``modelspec.implementation``, the code whose names its single files have
    kohya, kohya_v: ``ss_base_model_version`` of kohya's trainers
    """

    name: str
    people: str
    base_model: str
    resolution: int
    resolution_v: int
    text_width: int
    pooled_width: int
    spec: str
    spec_v: str
    implementation: str
    kohya: str
    kohya_v: str


SDXL = Architecture(
    "stable-diffusion-xl-v1-base",
    "SDXL",
    "SDXL 1.0",
    1024,
    1024,
    2048,
    1280,
    spec="stable-diffusion-xl-v1-base",
    spec_v="stable-diffusion-xl-v1-base",
    implementation="sgm",
    kohya="sdxl_base_v1-0",
    kohya_v="sdxl_base_v1-0",
)
SD1 = Architecture(
    "stable-diffusion-v1",
    "SD 1.x",
    "SD 1.5",
    512,
    512,
    768,
    0,
    spec="stable-diffusion-v1",
    spec_v="stable-diffusion-v1",
    implementation="ldm",
    kohya="sd_v1",
    kohya_v="sd_v1",
)
SD2 = Architecture(
    "stable-diffusion-v2",
    "SD 2.x",
    "SD 2.1",
    512,
    768,
    1024,
    0,
    spec="stable-diffusion-v2-512",
    spec_v="stable-diffusion-v2-768-v",
    implementation="ldm",
    kohya="sd_v2",
    kohya_v="sd_v2_v",
)
STABLE_DIFFUSION = {architecture.name: architecture for architecture in (SD1, SD2, SDXL)}
"""By name."""
