"""The names of the authors' files, as their repositories list them."""

import hashlib

import pytest

from sid_train.core import published
from sid_train.core.architectures import SD1, SD2, SDXL
from sid_train.core.published import preset_of_file, preset_of_name, recipe_of_name
from sid_train.core.recipe import PRESETS


@pytest.mark.parametrize(
    ("architecture", "name", "timesteps", "strategy", "scales", "images"),
    [
        (SDXL, "SiD_SDXL_4.54.54.5_AMPfp16_StepWise_4step_004421", (625, 468, 312, 156), "lsg", (4.5,) * 3, "4421"),
        (SDXL, "SiDA_SDXL_001_lrg0.5_batch256_joint2step_002452", (625, 312), "zero-cfg", (0, 0, 1), "2452"),
        (
            SD1,
            "SiDA_SD15_001_1_ls1_lsd10_lsggan0.001_NoEMA_joint8step_001000",
            (625, 546, 468, 390, 312, 234, 156, 78),
            "zero-cfg",
            (0, 0, 1),
            "1000",
        ),
        (SD1, "batch512_cfg1.51.51.5_t625_8806_v2", (625,), "lsg", (1.5,) * 3, "8806"),
        (SD1, "batch512_cfg4.54.54.5_t625_8380_v2", (625,), "lsg", (4.5,) * 3, "8380"),
        (SD1, "batch512_cfg222_t625_12345", (625,), "lsg", (2,) * 3, "12345"),
        (SDXL, "SiDA_SDXL_002_100_t625_4step_123", (625, 468, 312, 156), "none", (1,) * 3, "123"),
        (SD2, "batch512_sd21_cfg1.51.51.5_t625_9999_v2", (625,), "lsg", (1.5,) * 3, "9999"),
    ],
)
def test_what_the_name_says(architecture, name, timesteps, strategy, scales, images):
    recipe, notes = recipe_of_name(name)
    guidance = recipe.guidance
    assert recipe.architecture == architecture.name
    assert recipe.timesteps == timesteps
    assert (guidance.strategy, guidance.fake_train, guidance.fake_eval, guidance.teacher) == (strategy, *scales)
    assert recipe.training_summary["thousands of images"] == images
    assert recipe.sampling_guidance == "none"
    assert any("a guess" in note for note in notes) == ("t625" not in name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "sdxl_lightning_4step_unet",
        "SiD",
        "SiD_SDXL_99step",
        "SiD_SDXL_t000_4step",
        "dmd2_sdxl_4step_unet_fp16",
        *PRESETS,
    ],
)
def test_other_names_say_nothing(name):
    assert recipe_of_name(name) is None


def test_a_name_without_guidance_says_none():
    recipe, notes = recipe_of_name("SiDA_SDXL_CFG_free_t999_joint4step")
    assert recipe.timesteps == (999, 749, 499, 249)
    assert (recipe.guidance.strategy, recipe.training_summary.keys()) == ("none", {"source file"})
    assert not any("trained with" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("dmd2_sdxl_4step_unet_fp16", "DMD2 (4 steps)"),
        ("dmd2_sdxl_4step_lora_fp16", "DMD2 (4 steps)"),
        ("dmd2_sdxl_1step_unet_fp16", "DMD2 (1 step)"),
        ("sdxl_lightning_2step_unet", "Lightning (2 steps)"),
        ("sdxl_lightning_4step_lora", "Lightning (4 steps)"),
        ("RealVisXL_V5-xl_lightning_8step", "Lightning (8 steps)"),
        ("sdxl_lightning_1step_x0", "Lightning (1 step)"),
        ("sdxl_lightning_1step_unet_x0", "Lightning (1 step)"),
        ("nitrosd-realism_unet", "NitroFusion Realism (1 step)"),
        ("nitrosd-vibrant_comfyui", "NitroFusion Vibrant (1 step)"),
        ("sdxl-turbo-1step", "Turbo (1 step)"),
        ("sdxl_lcm_8step", "LCM (8 steps)"),
        ("Hyper-SDXL-8steps-lora", "Hyper-SD (8 steps)"),
        ("Hyper-SDXL-2steps-lora", "Hyper-SD (2 steps)"),
        ("Hyper-SD15-8steps-lora", "Hyper-SD (8 steps)"),
        ("lcm-lora-sdv1-5", "LCM (4 steps)"),
        ("lcm-lora-ssd-1b", "LCM (4 steps)"),
        ("LCM_LoRA_SDv15", "LCM (4 steps)"),
        ("tcd-sd15-lora", "TCD (4 steps)"),
        ("TCD-SD21-base-LoRA", "TCD (4 steps)"),
        ("pcm_sd15_smallcfg_2step_converted", "PCM (2 steps)"),
        ("sd_turbo", "Turbo (4 steps)"),
        ("flash-sd", "Flash (4 steps)"),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16", "Hyper-SD (1 step)"),
        ("lcm-lora-sdxl", "LCM (4 steps)"),
        ("LCM_SDXL", "LCM (4 steps)"),
        ("tcd-sdxl-lora", "TCD (4 steps)"),
        ("pcm_sdxl_smallcfg_4step_converted", "PCM (4 steps)"),
        ("pcm_sdxl_normalcfg_16step_converted", "PCM (16 steps)"),
        ("sd_xl_turbo_1.0_fp16", "Turbo (4 steps)"),
        ("sdxl-turbo", "Turbo (4 steps)"),
        ("flash-sdxl", "Flash (4 steps)"),
    ],
)
def test_presets_of_published_names(name, preset):
    found, part = preset_of_name(name)
    assert found == preset
    assert part in name


@pytest.mark.parametrize(
    "name",
    [
        "sdxl_lightning_1step",  # that file predicts x0, and its name says so
        "sdxl_lightning_4step_x0",
        "sdxl_lightning_4step_unet_x0",
        "nitrosd",
        "sdxl_turbo_8steps",
        "notflash_sdxl",
        "my_sdxl_lcm",
        "sdxl_tcdfoo",
        "flash-xl-portrait",
        "Hyper-SDXL-8steps-CFG-lora",  # for CFG 5 to 8
        "Hyper-SDXL-12steps-CFG-lora",
        "Hyper-SDXL-1step-lora",
        "Hyper-SD15-1step-lora",
        "Hyper-SD15-12steps-CFG-lora",
        "flash-sd3",
        "dmd2_sdxl_3step",
        "sd_xl_base_1.0",
        "pytorch_lora_weights",
        "turbo",
        "my-lightning",
    ],
)
def test_names_that_do_not_say_enough(name):
    assert preset_of_name(name) is None


def test_every_published_file_has_a_preset():
    for repository, files in published.HASHES.items():
        for name, sha256 in files.items():
            found = preset_of_name(name) or preset_of_name(repository.partition("/")[2])
            assert found is not None, name
            assert found[0] in PRESETS
            assert len(bytes.fromhex(sha256)) == 32
    assert len(published.FILES) == sum(map(len, published.HASHES.values()))


@pytest.fixture
def read(monkeypatch) -> list:
    """The files that were read whole."""
    files: list = []
    whole = published.file_sha256
    monkeypatch.setattr(published, "file_sha256", lambda path: files.append(path) or whole(path))
    return files


def test_a_file_is_known_by_its_content_then_its_header_then_its_name(tmp_path, monkeypatch, read):
    file, titled = tmp_path / "sdxl_lightning_4step.safetensors", {"ss_output_name": "dmd2-sdxl-4step-lora"}
    file.write_bytes(b"content")
    assert preset_of_file(file, {}) == ("Lightning (4 steps)", "its name has 'sdxl_lightning_4step'")
    assert preset_of_file(file, titled) == ("DMD2 (4 steps)", "its header has 'dmd2-sdxl-4step' as ss_output_name")
    assert preset_of_file(file, {"modelspec.title": "SD XL Turbo 1.0"})[0] == "Turbo (4 steps)"
    assert preset_of_file(file, {"modelspec.title": "my style", "ss_sd_model_name": "sdxl_turbo"})[0].startswith(
        "Light"
    )
    assert preset_of_file(tmp_path / ".." / tmp_path.name / file.name, {"modelspec.title": "x" * 10**6})
    assert read == []  # no published file has its size
    monkeypatch.setattr(published, "SIZES", {7})
    assert preset_of_file(file, titled)[0] == "DMD2 (4 steps)"
    monkeypatch.setitem(published.FILES, hashlib.sha256(b"content").hexdigest(), ("h1t/TCD-SDXL-LoRA", "weights"))
    assert preset_of_file(file, titled) == ("TCD (4 steps)", "its content is that of weights in h1t/TCD-SDXL-LoRA")
    assert preset_of_file(file, titled, read=False)[0] == "DMD2 (4 steps)"
    assert len(read) == 1  # and remembered
    file.write_bytes(b"another")
    preset_of_file(file, titled)
    assert len(read) == 2
