import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sid_train.core.architectures import SD1, SD2, SDXL
from sid_train.core.recipe import (
    FORMAT_VERSION,
    PRESETS,
    RecipeError,
    SiDRecipe,
    TrainingGuidance,
    has_recipe,
    read_recipe,
)
from sid_train.core.timesteps import timestep_ladder
from sid_train.files.header import read_safetensors_metadata

OTHERS = {
    "default": SiDRecipe(title="default"),
    "v zero SNR": SiDRecipe(
        base_model="anime \u00e9 \u6f2b\u753b",
        architecture="digits",
        prediction_type="v_prediction",
        zero_terminal_snr=True,
        timesteps=(999, 499),
        t_init=999,
        noise_mode="fixed",
        unit_variance_start=True,
        training_resolution=(1216, 832),
        base_model_hash="ab" * 32,
        licence="openrail++",
        title="v",
        unconditional="zeros",
        guidance=TrainingGuidance("anti-cfg", -1.0, -0.5, 1.0 / 3.0),
        training_summary={"images": "1,000", "note": 'quotes " and\nlines'},
    ),
    "explicit": SiDRecipe(timesteps=(900, 20), t_init=900, ladder="explicit", title="explicit"),
    "eight steps": SiDRecipe(timesteps=tuple(timestep_ladder(8, 999)), t_init=999, title="eight"),
    "guided": SiDRecipe(sampling_guidance="cfg first step only", sampling_cfg=1.7, title="guided"),
}
RECIPES = OTHERS | {name: replace(preset, title=name) for name, preset in PRESETS.items()}


@pytest.fixture
def write(tmp_path):
    """Writes metadata into a real safetensors file beside a tensor."""

    def write(metadata):
        path = tmp_path / "generator.safetensors"
        save_file({"weight": torch.ones(3)}, path, metadata)
        return path

    return write


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_a_safetensors_file(name, write):
    path = write(RECIPES[name].to_metadata())
    assert read_recipe(path) == RECIPES[name]
    with safe_open(path, "pt") as file:
        assert file.metadata() == read_safetensors_metadata(path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_a_file(name, write):
    preset = PRESETS[name]
    assert name.endswith(f"({preset.steps} step{'s' * (preset.steps > 1)})")
    assert read_recipe(write(preset.to_metadata())) == preset
    assert preset.to_metadata()["modelspec.title"]


def test_metadata_tells_other_tools_what_the_file_is():
    metadata = OTHERS["v zero SNR"].to_metadata()
    assert all(isinstance(v, str) for v in metadata.values())
    assert metadata["modelspec.resolution"] == "832x1216"  # the standard says width first
    assert metadata["sid.training_resolution"] == "1216x832"
    assert metadata["modelspec.predict_key"] == metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.base_model"] == OTHERS["v zero SNR"].base_model
    assert "2 steps (timesteps 999 499, fixed noise between them), " in metadata["modelspec.description"]
    assert metadata["modelspec.tags"] == "distilled, few-step, 2-step"
    assert SiDRecipe().to_metadata()["modelspec.tags"].startswith("text-to-image, SDXL, ")
    assert SiDRecipe().kohya_version == "sdxl_base_v1-0"
    assert replace(SiDRecipe(), architecture=SD2.name, prediction_type="v_prediction").kohya_version == "sd_v2_v"
    assert SiDRecipe().to_metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


OPTIONAL = {"sid.sampling.guidance", "sid.sampling.cfg"}
READ = {k for k in SiDRecipe().to_metadata() if k.startswith("sid.")}


@pytest.mark.parametrize("key", sorted(READ - OPTIONAL))
def test_missing_key_is_named(key, write):
    metadata = SiDRecipe().to_metadata()
    del metadata[key]
    path = write(metadata)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: {key}: expected in the file's metadata, but it is missing")


@pytest.mark.parametrize("architecture", [None, "SDXL 1.0", "Pony", "sdxl/lora"])
def test_sid_keys_are_enough(architecture, write):
    """Model managers drop or rewrite modelspec.*."""
    metadata = {k: v for k, v in SiDRecipe().to_metadata().items() if k.startswith("sid.")}
    if architecture is not None:
        metadata |= {"modelspec.architecture": architecture, "modelspec.title": "mine"}
        # Whatever a manager, or its user, writes there.
        free = ("description", "tags", "base_model", "thumbnail", "hash_sha256", "prediction_type", "predict_key")
        metadata |= dict.fromkeys((f"modelspec.{key}" for key in free), "\n, 0x")
    recipe = read_recipe(write(metadata))
    assert recipe.architecture == SDXL.name + ("/lora" if architecture == "sdxl/lora" else "")
    assert replace(recipe, architecture=SDXL.name, title="") == SiDRecipe()


HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J\u202e\n" + "A" * 2_000_000


def test_what_strangers_wrote_is_escaped_and_cut():
    facts = {f"{i} {HOSTILE}": HOSTILE for i in range(300)}
    recipe = replace(SiDRecipe(), title=HOSTILE, base_model=HOSTILE, licence=HOSTILE, training_summary=facts)
    text = recipe.describe()
    assert len(text) < 100_000
    assert all(line.isprintable() for line in text.split("\n"))
    assert "200 more facts" in text
    assert "\\x1b[2J" in text


@pytest.mark.parametrize("key", ["sid.timesteps", "sid.t_init", "sid.noise_mode", "sid.training_summary"])
def test_errors_about_what_strangers_wrote_are_one_short_line(key):
    deep = "[" * 1_000_000 if key == "sid.training_summary" else HOSTILE
    with pytest.raises(RecipeError, match=key) as error:
        SiDRecipe.from_metadata(SiDRecipe().to_metadata() | {key: deep}, "file")
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


def test_missing_sampling_fields_mean_no_guidance(write):
    metadata = {k: v for k, v in SiDRecipe().to_metadata().items() if k not in OPTIONAL}
    recipe = read_recipe(write(metadata))
    assert (recipe.sampling_guidance, recipe.sampling_cfg) == ("none", 1.0)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("sid.format_version", "one", "expected an integer, got 'one'"),
        ("sid.format_version", str(FORMAT_VERSION + 1), f"expected at most {FORMAT_VERSION}, got {FORMAT_VERSION + 1}"),
        ("sid.format_version", "0", f"expected 1 to {FORMAT_VERSION}, got 0"),
        ("sid.prediction_type", "eps", "expected one of epsilon, v_prediction, x0, flow, got 'eps'"),
        ("sid.zero_terminal_snr", "True", "expected true or false, got 'True'"),
        ("sid.steps", "four", "expected an integer, got 'four'"),
        ("sid.steps", "3", "expected 4, the number of sid.timesteps, got 3"),
        ("sid.timesteps", "625;468", "integers joined by ',', got '625;468'"),
        ("sid.timesteps", "", "integers joined by ',', got ''"),
        ("sid.timesteps", "625,468,312,157", "disagree with t_init 625"),
        ("sid.timesteps", "156,312,468,625", "expected 1 to 16 integers that fall"),
        ("sid.timesteps", "1000,750,500,250", "expected 1 to 16 integers that fall"),
        ("sid.t_init", "6.25", "expected an integer, got '6.25'"),
        ("sid.t_init", "999", "expected 625, the first of sid.timesteps, got 999"),
        ("sid.ladder", "karras", "expected one of sid, explicit, trailing, consistency, turbo, quarters, got 'karras'"),
        ("sid.noise_mode", "euler", "expected one of fresh, fixed, ddim, ancestral, tcd, got 'euler'"),
        ("sid.training_resolution", "1024", "expected HEIGHTxWIDTH, got"),
        ("sid.training_resolution", "1024x", "integers joined by 'x', got '1024x'"),
        ("sid.training_resolution", "0x1024", "expected two sizes above 0"),
        ("sid.unconditional", "none", "expected one of empty, zeros, got 'none'"),
        ("sid.guidance.teacher", "high", "expected a number, got 'high'"),
        ("sid.guidance.fake_eval", "nan", "expected a finite number, got nan"),
        ("sid.sampling.guidance", "on", "expected one of none, cfg"),
        ("sid.sampling.cfg", "a lot", "expected a number, got 'a lot'"),
        ("sid.sampling.cfg", "-1", "got -1"),
        ("sid.sampling.cfg", "nan", "got nan"),
        ("sid.sampling.cfg", "inf", "got inf"),
        ("sid.training_summary", "{", "expected a JSON object of strings, got '{'"),
        ("sid.training_summary", "[]", "expected a JSON object of strings, got '[]'"),
        ("sid.training_summary", '{"images": 1}', "expected a JSON object of strings, got"),
    ],
)
def test_malformed_value_is_named_with_its_file_and_key(key, value, problem, write):
    path = write(SiDRecipe().to_metadata() | {key: value})
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: {key}: ")
    assert problem in str(error.value)


def test_explicit_timesteps_need_not_be_a_ladder(write):
    metadata = SiDRecipe().to_metadata() | {"sid.timesteps": "625,468,312,157", "sid.ladder": "explicit"}
    assert read_recipe(write(metadata)).timesteps == (625, 468, 312, 157)


def test_file_without_a_recipe_says_so(write):
    path = write({"format": "pt"})
    assert not has_recipe(read_safetensors_metadata(path))
    with pytest.raises(RecipeError, match=r"generator\.safetensors: sid\.format_version: .*carries no SiD recipe"):
        read_recipe(path)
    assert has_recipe(SiDRecipe().to_metadata())


def test_file_that_was_cut_off(write):
    path = write({"format": "pt"})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected .* bytes, but the file ends after .*: copy or download it again"):
        read_safetensors_metadata(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"PK\x03\x04" + b"\x00" * 60,
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"[1]\n",
        struct.pack("<Q", 8) + b"{broken}",
        struct.pack("<Q", 20) + json.dumps({"__metadata__": 12345}).encode(),
    ],
    ids=["empty", "short", "zip", "huge header", "a list", "not JSON", "metadata of no mapping"],
)
def test_other_files_are_named_in_the_error(content, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: expected a safetensors file")


@pytest.mark.parametrize(("key", "value"), [("sid.timesteps", 625), ("sid.steps", [4]), ("sid.training_summary", {})])
def test_header_values_that_are_no_strings_are_errors_of_the_recipe(key, value, tmp_path):
    header = json.dumps({"__metadata__": SiDRecipe().to_metadata() | {key: value}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{key}"):
        read_recipe(path)


def test_training_guidance_is_a_fact_and_changes_no_instruction_for_sampling():
    plain = SiDRecipe()
    for guidance in (TrainingGuidance("lsg", 4.5, 4.5, 4.5), TrainingGuidance("zero-cfg", 0.0, 0.0, 1.0)):
        other = replace(plain, guidance=guidance)
        changed = {k for k, v in other.to_metadata().items() if v != plain.to_metadata()[k]}
        assert changed
        assert all(k.startswith("sid.guidance.") for k in changed)
        again = SiDRecipe.from_metadata(other.to_metadata(), "file")
        assert again.guidance == guidance
        assert (again.sampling_guidance, again.sampling_cfg) == ("none", 1.0)
        assert again.timesteps_for() == plain.timesteps_for()


def test_unknown_keys_are_left_alone(write):
    metadata = SiDRecipe(title="t").to_metadata()
    extra = {"sid.future": "fact", "modelspec.thumbnail": "…", "ss_network_dim": "64", "format": "pt"}
    assert read_recipe(write(metadata | extra)) == SiDRecipe(title="t")


def test_other_step_counts_take_the_familys_rule():
    recipe = PRESETS["LCM (4 steps)"]
    assert recipe.timesteps_for() == recipe.timesteps_for(4) == [999, 759, 499, 259]
    assert recipe.timesteps_for(3) == [999, 679, 339]
    with pytest.raises(ValueError, match="steps: expected 1 to 16, got 17"):
        recipe.timesteps_for(17)
    assert PRESETS["DMD2 (4 steps)"].timesteps_for(3) == [999, 666, 333]
    with pytest.raises(ValueError, match="steps: expected 1 to 8, got 9"):
        PRESETS["SiD 625 (4 steps)"].timesteps_for(9)
    with pytest.raises(ValueError, match="expected 1 to 10 of Turbo's"):
        PRESETS["Turbo (4 steps)"].timesteps_for(11)


def test_a_recipe_is_written_as_the_oldest_version_that_can_say_it(tmp_path):
    for name, recipe in PRESETS.items():
        metadata = recipe.to_metadata()
        old, new = name.startswith(("SiD", "DMD2", "Hyper-SD (1")), name.startswith(("NitroFusion", "Lightning (1"))
        assert metadata["sid.format_version"] == ("1" if old else "3" if new else "2"), name
        assert ("sid.noise_gamma" in metadata) == name.startswith("TCD")
        assert ("sid.timestep_scale" in metadata) == name.startswith("NitroFusion")
        assert ("modelspec.prediction_type" in metadata) == (recipe.prediction_type != "x0")
        assert SiDRecipe.from_metadata(metadata, "x") == recipe
    assert (
        SiDRecipe.from_metadata(replace(PRESETS["TCD (4 steps)"], noise_gamma=0.5).to_metadata(), "x").noise_gamma
        == 0.5
    )
    with pytest.raises(RecipeError, match=r"sid\.noise_gamma: expected 0 to 1, got 1\.5"):
        replace(PRESETS["TCD (4 steps)"], noise_gamma=1.5)
    nitro = PRESETS["NitroFusion Realism (4 steps)"]
    assert "timesteps 249 187 124 62  (scaled by 0.25)" in nitro.describe()
    for scale in (0, 1.5, float("nan")):
        with pytest.raises(RecipeError, match=r"sid\.timestep_scale: expected more than 0 and at most 1"):
            replace(nitro, timestep_scale=scale)
    with pytest.raises(RecipeError, match=r"sid\.noise_mode: expected another one than tcd"):
        replace(nitro, noise_mode="tcd")


def test_description_and_plain_values_hold_every_fact():
    recipe = OTHERS["v zero SNR"]
    text = recipe.describe()
    for fact in ("v_prediction, zero terminal SNR", "999 499", "fixed", "1216x832", "openrail++", "anti-cfg", "1,000"):
        assert fact in text
    values = json.loads(json.dumps(recipe.to_dict()))
    assert values["timesteps"] == [999, 499]
    assert values["guidance"]["fake_eval"] == -0.5
    assert values["steps"] == 2


@pytest.mark.parametrize(
    ("architecture", "predicts", "word"),
    [
        (SD1, "epsilon", "stable-diffusion-v1"),
        (SD2, "epsilon", "stable-diffusion-v2-512"),
        (SD2, "v_prediction", "stable-diffusion-v2-768-v"),
    ],
)
def test_a_recipe_of_another_generation_says_so_in_its_own_words(tmp_path, architecture, predicts, word):
    """And is not taken for SDXL's by a reader that knows no other, or where a manager dropped ``modelspec.*``."""
    recipe = SiDRecipe(base_model=architecture.base_model, architecture=architecture.name, prediction_type=predicts)
    metadata = recipe.to_metadata()
    assert metadata["modelspec.architecture"] == word
    assert metadata["sid.format_version"] == "3"
    assert SiDRecipe.from_metadata(metadata, "file") == recipe
    alone = {key: text for key, text in metadata.items() if key.startswith("sid.")}
    assert SiDRecipe.from_metadata(alone, "file") == recipe
    with pytest.raises(RecipeError, match=r"sid\.architecture: expected one of .*, got 'sd9'"):
        SiDRecipe.from_metadata(metadata | {"sid.architecture": "sd9"}, "file")


def test_an_any_step_generator_says_for_which_numbers_of_steps_it_was_trained():
    recipe = SiDRecipe(trained_steps=(1, 2, 4))
    metadata = recipe.to_metadata()
    assert metadata["sid.trained_steps"] == "1,2,4"
    assert SiDRecipe.from_metadata(metadata, "file") == recipe
    assert [steps for steps in range(1, 9) if recipe.is_trained_for(steps)] == [1, 2, 4]
    assert "1 2 4 steps" in recipe.describe()
    assert "sid.trained_steps" not in SiDRecipe().to_metadata()
    assert SiDRecipe().is_trained_for(4)
    assert not SiDRecipe().is_trained_for(2)
    assert recipe.description.endswith("It was trained for 1 2 4 steps.")
    for said, problem in (
        ("4,9", "steps: expected 1 to 8, got 9"),
        ("1,2", "expected up to 16 different numbers, 4 among them"),
        ("4,4", "expected up to 16 different numbers"),
        (",".join(["4"] * 100_000), "expected up to 16 different numbers"),
    ):
        with pytest.raises(RecipeError, match=rf"file: sid\.trained_steps: {problem}") as error:
            SiDRecipe.from_metadata(metadata | {"sid.trained_steps": said}, "file")
        assert len(str(error.value)) < 300
    with pytest.raises(RecipeError, match=r"file: sid\.trained_steps: expected integers joined by ',', got 'all'"):
        SiDRecipe.from_metadata(metadata | {"sid.trained_steps": "all"}, "file")
