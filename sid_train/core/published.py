"""What the names of published files say of how a generator was trained, and so is sampled: they state nothing inside.

The SiD authors' names are those in the repositories UT-Austin-PML/SiDA-StableDiffusion and
UT-Austin-PML/SiD-LSG of the Hugging Face hub: ``SiDA_SDXL_001_lrg0.5_batch256_joint2step_002452.pkl``,
``batch512_cfg1.51.51.5_t625_8806_v2.pkl``.
"""

from __future__ import annotations

import re

from .recipe import PRESETS, SiDRecipe, TrainingGuidance
from .timesteps import DEFAULT_T_INIT, MAX_SID_STEPS, timestep_ladder

OF_THE_AUTHORS = re.compile(r"(SiDA?|SiD2A)_(SDXL|SD15|SD21)_|batch\d+_(sd21_)?cfg", re.IGNORECASE)
STEPS = re.compile(r"(?<!\d)(\d{1,2})step", re.IGNORECASE)
T_INIT = re.compile(r"(?<![a-z])t(\d{3})(?!\d)", re.IGNORECASE)
# Three scales without anything between them: of the fake score while it learns, of the fake score, of the teacher.
SCALES = re.compile(r"(?:_|cfg)(\d\.\d\d\.\d\d\.\d)(?=_|$)|cfg(\d{3})(?=_|$)|_(001)(?=_|$)", re.IGNORECASE)
IMAGES = re.compile(r"(?<=_)0*(\d{3,5})(?=_v\d|$)")


def recipe_of_name(stem: str) -> tuple[SiDRecipe, list[str]] | None:
    """The recipe that a file's name without its ending says, and whence each fact is known; None for a name that is
    not as the authors' are.
    """
    if not OF_THE_AUTHORS.match(stem):
        return None
    notes = []
    found = STEPS.search(stem)
    steps = int(found[1]) if found else 1
    notes.append(f"steps: {steps}, " + (f"as the name says ({found[0]})" if found else "since the name says no other"))
    found = T_INIT.search(stem)
    t_init = int(found[1]) if found else DEFAULT_T_INIT
    if not 1 <= steps <= min(MAX_SID_STEPS, t_init):
        return None
    notes.append(f"t_init: {t_init}, " + (f"as the name says ({found[0]})" if found else GUESSED_T_INIT))
    guidance, summary = TrainingGuidance(), {"source file": stem}
    if (found := SCALES.search(stem)) is not None:
        scales = next(group for group in found.groups() if group)
        width = len(scales) // 3
        guidance = guidance_of(*(float(scales[i : i + width]) for i in range(0, 3 * width, width)))
        notes.append(f"trained with: {guidance.strategy}, as the name says ({scales})")
    if (found := IMAGES.search(stem)) is not None:
        summary["thousands of images"] = found[1]
    timesteps = tuple(timestep_ladder(steps, t_init))
    recipe = SiDRecipe(timesteps=timesteps, t_init=t_init, guidance=guidance, training_summary=summary)
    return recipe, notes


GUESSED_T_INIT = (
    f"a guess: the name does not say it, and {DEFAULT_T_INIT} is what the authors' code has. Other pictures come with "
    "--t-init 999, for instance"
)


def guidance_of(fake_train: float, fake_eval: float, teacher: float) -> TrainingGuidance:
    """The strategy with these scales, by its name (arXiv 2505.12674)."""
    scales = (fake_train, fake_eval, teacher)
    if scales == (1, 1, 1):
        name = "none"
    elif scales == (0, 0, 1):
        name = "zero-cfg"
    elif len(set(scales)) == 1:
        name = "lsg"
    else:
        name = "custom"
    return TrainingGuidance(name, *scales)


# -- other families ------------------------------------------------------------------------------------------------

# Names of published files, with underscores for all separators, and what presets of theirs are called. The number of
# steps is a group, where it is said.
FAMILIES = (
    (r"dmd2?_sdxl_(\d+)steps?", "DMD2"),
    (r"(?:\w+_)?(?:sdxl|xl)_lightning_([248])steps?(?!\w*_x0)", "Lightning"),
    (r"sdxl_lightning_(1)step(?:_unet)?_x0", "Lightning"),
    (r"hyper_sdxl_([248])steps?(?!_cfg)", "Hyper-SD"),
    (r"hyper_sdxl_(1)step_unet", "Hyper-SD"),
    (r"pcm_sdxl_(?:small|normal)cfg_(\d+)steps?", "PCM"),
    (r"(?:lcm_(?:lora_)?sd_?xl|sd_?xl_lcm)(?:_(\d+)steps?)?", "LCM"),
    (r"(?:tcd_sd_?xl|sd_?xl_tcd)(?:_(\d+)steps?)?", "TCD"),
    (r"sd_?xl_turbo(?:_(\d+)steps?)?", "Turbo"),
    (r"flash_sd_?xl(?:_(\d+)steps?)?", "Flash"),
    (r"nitrosd_realism(?:_(\d+)steps?)?", "NitroFusion Realism"),
    (r"nitrosd_vibrant(?:_(\d+)steps?)?", "NitroFusion Vibrant"),
)
USUAL_STEPS = {"NitroFusion Realism": 1, "NitroFusion Vibrant": 1}
"""Of families whose names say no number, where the publisher's page has another than 4."""


def preset_of_name(stem: str) -> tuple[str, str] | None:
    """The preset for a file of another family, by its name without its ending, and the part of it that says so; None
    where it says nothing, or names a number of steps that has no preset.
    """
    spelled = re.sub(r"[-. ]", "_", stem)
    for pattern, family in FAMILIES:
        # From the beginning, and up to an end of a word: a style's LoRA may have any of these words within.
        if (found := re.match(rf"(?:{pattern})(?![a-z0-9])", spelled, re.IGNORECASE)) is not None:
            steps = int(found[1] or USUAL_STEPS.get(family, 4))
            name = f"{family} ({steps} step{'s' * (steps > 1)})"
            return (name, stem[: found.end()]) if name in PRESETS else None
    return None
