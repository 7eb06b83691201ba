"""The generations of Stable Diffusion that are known here: the words that recipes, other tools and people have for
each, and what a prompt becomes for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Of one generation, the models that predict epsilon, or those that predict v.

    resolution: of the square pictures that they make, in pixels
    spec: ``modelspec.architecture``, https://github.com/Stability-AI/ModelSpec
    kohya: ``ss_base_model_version`` of kohya's trainers
    """

    resolution: int
    spec: str
    kohya: str


@dataclass(frozen=True)
class Architecture:
    """One generation.

    name: in recipes (``sid.architecture``)
    people: what people call it
    base_model: what a recipe calls its base model, where nothing else is known of it
    text_width: of a prompt's hidden states
    pooled_width: of the vector that a prompt becomes besides; 0 where the network reads none
    implementation: ``modelspec.implementation``, the code whose names its single files have
    """

    name: str
    people: str
    base_model: str
    text_width: int
    pooled_width: int
    implementation: str
    epsilon: Variant
    v: Variant

    def variant(self, prediction_type: str) -> Variant:
        """Of models that predict ``prediction_type``."""
        return self.v if prediction_type == "v_prediction" else self.epsilon


_XL = Variant(1024, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
SDXL = Architecture("stable-diffusion-xl-v1-base", "SDXL", "SDXL 1.0", 2048, 1280, "sgm", _XL, _XL)
_V1 = Variant(512, "stable-diffusion-v1", "sd_v1")
SD1 = Architecture("stable-diffusion-v1", "SD 1.x", "SD 1.5", 768, 0, "ldm", _V1, _V1)
SD2 = Architecture(
    "stable-diffusion-v2",
    "SD 2.x",
    "SD 2.1",
    1024,
    0,
    "ldm",
    Variant(512, "stable-diffusion-v2-512", "sd_v2"),
    Variant(768, "stable-diffusion-v2-768-v", "sd_v2_v"),
)
STABLE_DIFFUSION = {architecture.name: architecture for architecture in (SD1, SD2, SDXL)}
"""By name."""
_DEMO = Variant(16, "sid-demo-digits", "")
DIGITS = Architecture("sid-demo-digits", "the demo's digits", "SiD demo digits", 64, 64, "", _DEMO, _DEMO)
SAMPLED = STABLE_DIFFUSION | {DIGITS.name: DIGITS}
"""What the nodes sample. The demo's model is in no file that other tools know."""
