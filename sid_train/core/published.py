"""How published files were trained, and so are sampled, told by what they are and are called: few state it inside.

The SiD authors' names are those in the repositories UT-Austin-PML/SiDA-StableDiffusion and
UT-Austin-PML/SiD-LSG of the Hugging Face hub: ``SiDA_SDXL_001_lrg0.5_batch256_joint2step_002452.pkl``,
``batch512_cfg1.51.51.5_t625_8806_v2.pkl``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from ..files.hashing import file_sha256
from ..files.reading import shown
from .architectures import SD1, SD2, SDXL
from .recipe import PRESETS, SiDRecipe, TrainingGuidance
from .timesteps import DEFAULT_T_INIT, MAX_SID_STEPS, timestep_ladder

OF_THE_AUTHORS = re.compile(r"(SiDA?|SiD2A)_(SDXL|SD15|SD21)_|batch\d+_(sd21_)?cfg", re.IGNORECASE)
# What a name says of the generation: the first that is found in it. SiD-LSG's names say it of SD 2.1 alone.
GENERATIONS = ((r"SDXL_", SDXL), (r"sd21_", SD2), (r"SD15_|batch\d+_cfg", SD1))
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
    architecture = next(known for pattern, known in GENERATIONS if re.search(pattern, stem, re.IGNORECASE))
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
    return recipe.for_architecture(architecture), notes


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
# steps is a group, where it is said. The same rules hold for all generations that a family has files for.
FAMILIES = (
    (r"dmd2?_sdxl_(\d+)steps?", "DMD2"),
    (r"(?:\w+_)?(?:sdxl|xl)_lightning_([248])steps?(?!\w*_x0)", "Lightning"),
    (r"sdxl_lightning_(1)step(?:_unet)?_x0", "Lightning"),
    (r"hyper_sd(?:xl|15)_([248])steps?(?!_cfg)", "Hyper-SD"),
    (r"hyper_sdxl_(1)step_unet", "Hyper-SD"),
    (r"pcm_sd(?:xl|15)_(?:small|normal)cfg_(\d+)steps?", "PCM"),
    (r"(?:lcm_(?:lora_)?(?:ssd_1b|sd(?:_?xl|v?1_?5))|sd_?xl_lcm)(?:_(\d+)steps?)?", "LCM"),
    (r"(?:tcd_sd(?:_?xl|15|21_base)|sd_?xl_tcd)(?:_(\d+)steps?)?", "TCD"),
    (r"sd(?:_?xl)?_turbo(?:_(\d+)steps?)?", "Turbo"),
    (r"flash_sd(?:_?xl)?(?:_(\d+)steps?)?", "Flash"),
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


# -- any name ------------------------------------------------------------------------------------------------------

# The SHA-256 of files, by their names without ".safetensors" in repositories of the Hugging Face hub, as the hub's own
# pages of these files state them. Those of sdxl-turbo and lcm-lora-sdxl could not be read: the first is that of a
# repository that the hub calls its duplicate, the second that of six copies under that name.
HASHES = {
    "ByteDance/SDXL-Lightning": {
        "sdxl_lightning_1step_unet_x0": "14d53ad5b440a37fc0f429d595d96bf144c5dd842aa5747383e6098c9dbfa644",
        "sdxl_lightning_1step_x0": "dd8d4c2b341cdbbe88178135786bd4ea1a6f46d6dcb719f05524a5e761ae19a0",
        "sdxl_lightning_2step_unet": "15a96a3b213b8b4d6ea720b4fa5bf6723cd877170bd1a90f58e34da2968ef854",
        "sdxl_lightning_2step": "87e61f60b85d9f1c577bd9053872c7678b7d39f6f52d470081ff6ea3b49ddf98",
        "sdxl_lightning_2step_lora": "04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43",
        "sdxl_lightning_4step_unet": "39a90a8a2a25c1372633c1e8eb1a96f85eab937bcb58cfc6ec9baf66242ec23c",
        "sdxl_lightning_4step": "e0d996ee0013e79d9d3561f50fcafb9a17e3ff07b780358e3b66d67932c4d490",
        "sdxl_lightning_4step_lora": "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79",
        "sdxl_lightning_8step_unet": "471d8260fda0b17b8906feb24573ce64933d4b6b99ba7a1fa43ca051b994e869",
        "sdxl_lightning_8step": "43f0501ac4ffcef84f3fc32a47779f24c181647fa97ef7f5ec4428107d732ae9",
        "sdxl_lightning_8step_lora": "5aa30d94cdf7950a8b53a693682650ee061eddb128c5435a8f88defea73b2ac6",
    },
    "tianweiy/DMD2": {
        "dmd2_sdxl_4step_unet_fp16": "3549f1726d24afa4a26493c9049af8fb74108ff0a36f67ced0d3b4aa164cce92",
        "dmd2_sdxl_4step_lora": "a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb",
        "dmd2_sdxl_4step_lora_fp16": "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8",
    },
    "ByteDance/Hyper-SD": {
        "Hyper-SDXL-2steps-lora": "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187",
        "Hyper-SDXL-4steps-lora": "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e",
        "Hyper-SDXL-8steps-lora": "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1",
        "Hyper-SDXL-1step-Unet": "3d72d3f97c08df11e4979d212c9b72bbce34cc3d7758daf660134698cf4e2dd1",
        "Hyper-SDXL-1step-Unet-Comfyui.fp16": "f3bf72c28596ff82d1052ccc46492a9b9a6c22308d83c9c5049955efcc546592",
    },
    "stabilityai/sdxl-turbo": {
        "sd_xl_turbo_1.0_fp16": "e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26",
    },
    "latent-consistency/lcm-lora-sdxl": {
        "pytorch_lora_weights": "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141",
    },
    "h1t/TCD-SDXL-LoRA": {
        "pytorch_lora_weights": "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba",
    },
    "wangfuyun/PCM_Weights": {
        "pcm_sdxl_smallcfg_2step_converted": "e1f600491bb8e0cd94f41144321e44fdb2cb346447f31e71f6e53f1c24cccfbf",
        "pcm_sdxl_smallcfg_4step_converted": "212150d7953627fb89df99aad579d6763645a1cb2ef26b19fee8b398d5e5ff4d",
        "pcm_sdxl_smallcfg_8step_converted": "56ed9dc9f51f4bb0d6172e13b7947f215c347fc0da341c8951b2c12b9507d09e",
        "pcm_sdxl_smallcfg_16step_converted": "3442eff271aa3b60a094fd6f9169d03e49e4051044a974f6fcf690507959191f",
        "pcm_sdxl_normalcfg_4step_converted": "9f7f13bb019925eacd89aeff678e4fd831f7b60245b986855dff6634aee4eba9",
        "pcm_sdxl_normalcfg_16step_converted": "7eb353b2abcaabab6251ba4e17d6cbe2e763feb0674b0f950555552212b44621",
    },
    "ChenDY/NitroFusion": {
        "nitrosd-realism_unet": "ae2e3bf8a6c4d49710436563643eca6409837568a30e4614d7be6c9cf953477b",
        "nitrosd-realism_comfyui": "ec541bc8f13de530be415410cded8467ecdce4240c51dcf5acaaa669e6dcfa63",
        "nitrosd-vibrant_unet": "37e863456446b695a877811d05c86c4c755651148d293a552fc83422fd7b9892",
    },
}
FILES = {sha256: (repository, name) for repository, files in HASHES.items() for name, sha256 in files.items()}
# Bytes of those files, where a page states them. A file of another size is not read for its hash: SDXL takes 10 s.
SIZES = {
    *(393_854_592, 393_855_224, 787_359_616, 787_359_648, 5_135_149_736, 6_938_040_294, 6_938_040_682),
    *(6_938_041_758, 6_938_081_905, 10_270_077_704),
}
# What trainers call the file that they write. ss_sd_model_name is not among them: it is what a LoRA was trained on.
NAME_KEYS = ("modelspec.title", "ss_output_name")
GUIDANCE_EMBEDDING = ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")  # ldm's name, diffusers'
LONGEST_NAME = 200


def preset_of_file(path: str | Path, metadata: Mapping[str, str], read: bool = True) -> tuple[str, str] | None:
    """The preset for a file without a recipe, and why, to follow "for"; None where nothing says it.

    Asked in this order: its SHA-256, the names that its header has for it, its name. ``read``: whether it may be read
    whole for the first, where its size is that of a published file; it is read once a process.
    """
    path = Path(path)
    status = path.stat()
    if read and status.st_size in SIZES:
        sha256 = _sha256(str(path.resolve()), status.st_size, status.st_mtime_ns)
        if sha256 in FILES:
            repository, name = FILES[sha256]
            found = preset_of_name(name) or preset_of_name(repository.partition("/")[2])
            assert found is not None
            return found[0], f"its content is that of {name} in {repository}"
    for key in NAME_KEYS:
        if (found := preset_of_name(metadata.get(key, "")[:LONGEST_NAME])) is not None:
            return found[0], f"its header has '{found[1]}' as {key}"
    found = preset_of_name(path.stem)
    return None if found is None else (found[0], f"its name has '{found[1]}'")


@lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """Of a file that is as it was while its size and time stay."""
    return file_sha256(Path(path))


def require_no_guidance_embedding(names: Iterable[str], path: str | Path) -> None:
    """ValueError for a UNet with tensors ``names`` that reads the guidance scale as an input, as LCM's whole UNets do:
    neither ComfyUI's UNet nor ours has that input, so that its pictures would be wrong.
    """
    if (name := next((name for name in names if name.endswith(GUIDANCE_EMBEDDING)), None)) is not None:
        raise ValueError(
            f"{shown(path)}: expected a UNet without an embedding of the guidance scale, got {shown(name, 200)}, as "
            "LCM's whole UNets have it: its pictures would be wrong without that input. Use LCM's LoRA on a model of "
            "its generation instead: lcm-lora-sdxl, lcm-lora-sdv1-5 or lcm-lora-ssd-1b of latent-consistency."
        )
