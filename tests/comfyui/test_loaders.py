"""The loaders in this process: recipes, presets, LoRA names, and every wrong file that a user can choose."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import conditioning, empty_latent, module, run, text_of
from safetensors.torch import load_file, save_file
from small_models import lora_tensors

FROM_FILE = "from the file"


@pytest.fixture(scope="module")
def recipes(pack):
    return module(pack, "sid_train.core.recipe")


@pytest.fixture
def folders(pack):
    import folder_paths  # ComfyUI's, on the path once the pack is imported

    return folder_paths


@pytest.fixture
def put(tmp_path, monkeypatch, folders):
    """Puts tensors into a file in one of ComfyUI's model folders."""

    def write(kind: str, name: str, tensors: dict, metadata: dict[str, str] | None = None) -> str:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata)
        monkeypatch.setitem(folders.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        return name

    return write


@pytest.fixture(scope="module")
def tensors(unet_file: Path) -> dict:
    return load_file(unet_file)


@pytest.fixture(scope="module")
def lora(tensors) -> dict:
    return lora_tensors(tensors)


class TestDiffusionModel:
    def test_recipe_comes_out_of_the_file(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), noise_mode="fixed", title="mine")
        name = put("diffusion_models", "mine.safetensors", tensors, recipe.to_metadata())
        model, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
        assert read == recipe
        assert model.get_model_object("model_sampling").sigmas.shape == (1000,)

    def test_file_without_a_recipe_takes_a_preset(self, nodes, put, tensors, recipes):
        name = put("diffusion_models", "dmd2.safetensors", tensors)
        with pytest.raises(
            ValueError, match=r"does not say how it is to be sampled. Set 'recipe' to .*DMD2 \(4 steps\)"
        ):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="DMD2 (4 steps)")
        assert read.timesteps == (999, 749, 499, 249)

    def test_preset_that_replaces_a_recipe_says_so(self, nodes, put, tensors, recipes, caplog):
        name = put("diffusion_models", "mine.safetensors", tensors, recipes.SiDRecipe().to_metadata())
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="SiD 999 (4 steps)")
        assert read.t_init == 999
        assert "replaces the file's own recipe (timesteps 625 468 312 156" in text_of(caplog)

    def test_v_prediction(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), prediction_type="v_prediction")
        metadata = recipe.to_metadata()
        wrong = put("diffusion_models", "wrong.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match=r"says prediction type v_prediction, but .* as epsilon"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=wrong)
        right = put("diffusion_models", "right.safetensors", tensors | {"v_pred": torch.zeros(0)}, metadata)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=right)
        assert read == recipe
        with pytest.raises(ValueError, match=r"says prediction type epsilon, but .* as v_prediction"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=right, recipe="LCM (4 steps)")

    def test_zero_terminal_snr(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), prediction_type="v_prediction", zero_terminal_snr=True)
        v_pred, ztsnr = {"v_pred": torch.zeros(0)}, {"ztsnr": torch.zeros(0)}
        wrong = put("diffusion_models", "wrong.safetensors", tensors | v_pred, recipe.to_metadata())
        with pytest.raises(ValueError, match="zero terminal SNR is true, but ComfyUI loaded the model with false"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=wrong)
        right = put("diffusion_models", "right.safetensors", tensors | v_pred | ztsnr, recipe.to_metadata())
        assert run(nodes["SiDDiffusionModelLoader"], unet_name=right)[1] == recipe

    def test_models_loaded_one_after_the_other_are_freed(self, nodes, put, tensors, recipes):
        import comfy.model_management
        import psutil

        name = put("diffusion_models", "mine.safetensors", tensors, recipes.SiDRecipe().to_metadata())
        resident = []
        for seed in range(8):
            model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
            inputs = {"positive": conditioning(1), "latent_image": empty_latent(), "recipe": recipe, "seed": seed}
            run(nodes["SiDFewStepSampler"], model=model, **inputs)
            del model
            gc.collect()
            comfy.model_management.cleanup_models()
            resident.append(psutil.Process().memory_info().rss)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert resident[-1] - resident[3] < size

    def test_recipe_of_another_architecture(self, nodes, put, tensors, recipes):
        metadata = replace(recipes.SiDRecipe(), architecture="sid-demo-digits").to_metadata()
        name = put("diffusion_models", "demo.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match="expected a recipe for stable-diffusion-xl-v1-base, got sid-demo-digits"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name)

    def test_broken_recipe_names_file_and_key(self, nodes, put, tensors, recipes):
        metadata = recipes.SiDRecipe().to_metadata() | {"sid.timesteps": "625,468,300,156"}
        name = put("diffusion_models", "broken.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match=r"broken.safetensors: sid.timesteps"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name)

    def test_file_that_is_not_safetensors(self, nodes, put, tensors, tmp_path):
        name = put("diffusion_models", "x.safetensors", {"a": torch.zeros(1)})
        path = tmp_path / "diffusion_models"
        (path / name).write_bytes(b"not safetensors")
        with pytest.raises(ValueError, match=r"x.safetensors: expected a safetensors file"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name)
        (path / name).rename(path / "x.ckpt")
        with pytest.raises(ValueError, match=r"x.ckpt: expected a safetensors file. Convert it first"):
            run(nodes["SiDDiffusionModelLoader"], unet_name="x.ckpt")

    def test_wrong_choices(self, nodes, put, tensors):
        name = put("diffusion_models", "x.safetensors", tensors)
        with pytest.raises(ValueError, match="recipe: expected one of from the file, SiD 625"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="nonsense")
        with pytest.raises(ValueError, match="weight_dtype: expected one of default"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name, weight_dtype="int3")


class TestLoRA:
    def test_every_module_is_applied(self, nodes, model, put, lora, recipes):
        name = put("loras", "sid.safetensors", lora, recipes.SiDRecipe().to_metadata())
        patched, recipe = run(nodes["SiDLoRALoader"], model=model, lora_name=name)
        assert recipe == recipes.SiDRecipe()
        assert len(patched.patches) == len(lora) // 3
        assert not model.patches
        inputs = {"positive": conditioning(1), "latent_image": empty_latent(), "recipe": recipe, "seed": 0}
        plain = run(nodes["SiDFewStepSampler"], model=model, **inputs)[0]["samples"]
        other = run(nodes["SiDFewStepSampler"], model=patched, **inputs)[0]["samples"]
        again = run(nodes["SiDFewStepSampler"], model=model, **inputs)[0]["samples"]
        assert (plain - other).abs().max() > 1e-2
        assert torch.equal(plain, again)

    def test_names_that_comfyui_does_not_read(self, nodes, model, put, lora, recipes):
        peft = {k.replace("lora_unet_", "base_model.model."): v for k, v in lora.items()}
        name = put("loras", "peft.safetensors", peft, recipes.SiDRecipe().to_metadata())
        with pytest.raises(ValueError, match=r"none of its \d+ modules match; the first is 'base_model.model"):
            run(nodes["SiDLoRALoader"], model=model, lora_name=name)

    def test_partial_match(self, nodes, model, put, lora, recipes, caplog):
        extra = {
            "lora_unet_elsewhere.lora_up.weight": torch.ones(4, 4),
            "lora_unet_elsewhere.lora_down.weight": torch.ones(4, 4),
        }
        name = put("loras", "partial.safetensors", lora | extra, recipes.SiDRecipe().to_metadata())
        with pytest.raises(ValueError, match=r"1 of its \d+ modules match nothing in this model: lora_unet_elsewhere"):
            run(nodes["SiDLoRALoader"], model=model, lora_name=name)
        patched, _ = run(nodes["SiDLoRALoader"], model=model, lora_name=name, allow_partial=True)
        assert len(patched.patches) == len(lora) // 3
        assert "1 modules of the LoRA match nothing in this model: lora_unet_elsewhere" in text_of(caplog)

    def test_lora_for_another_prediction_type(self, nodes, model, put, lora, recipes):
        metadata = replace(recipes.SiDRecipe(), prediction_type="v_prediction").to_metadata()
        name = put("loras", "v.safetensors", lora, metadata)
        with pytest.raises(ValueError, match=r"says prediction type v_prediction"):
            run(nodes["SiDLoRALoader"], model=model, lora_name=name)


class TestWrongConnections:
    def inputs(self, model, **changes) -> dict:
        return {"model": model, "positive": conditioning(1), "latent_image": empty_latent(), "seed": 0} | changes

    def test_model_that_is_sampled_otherwise(self, nodes, model):
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

        flow = ModelSamplingSD3().patch(model, 3.0)[0]
        lcm = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
        for wrong in (flow, lcm):
            with pytest.raises(ValueError, match="expected SDXL's 1,000 discrete timesteps with eps- or v-prediction"):
                run(nodes["SiDFewStepSampler"], **self.inputs(wrong))

    @pytest.mark.parametrize("guidance", ["nag", "cfg", "cfg first step only"])
    def test_guidance_without_a_negative_prompt(self, nodes, model, guidance):
        with pytest.raises(ValueError, match=f"guidance '{guidance}': expected a negative prompt, but 'negative'"):
            run(nodes["SiDFewStepSampler"], **self.inputs(model, guidance=guidance))

    def test_several_negative_prompts_for_nag(self, nodes, model):
        negative = conditioning(2) + conditioning(3)
        with pytest.raises(ValueError, match="expected one negative prompt, got 2 parts"):
            run(nodes["SiDFewStepSampler"], **self.inputs(model, guidance="nag", negative=negative))

    def test_nag_on_a_model_with_replaced_attention(self, nodes, model):
        replaced = model.clone()
        replaced.set_model_attn2_replace(lambda q, k, v, extra: q, "middle", 0)
        with pytest.raises(ValueError, match="already replaces this model's cross attention"):
            run(nodes["SiDFewStepSampler"], **self.inputs(replaced, guidance="nag", negative=conditioning(2)))

    def test_sigmas_that_do_not_end_in_0(self, nodes, model, recipes):
        from comfy.samplers import CFGGuider

        (sampler,) = run(nodes["SiDSamplerSelect"], recipe=recipes.SiDRecipe())
        guider = CFGGuider(model)
        guider.inner_set_conds({"positive": conditioning(1)})
        noise = latent = torch.zeros(1, 4, 16, 16)
        with pytest.raises(ValueError, match="sigmas: expected to end in 0, got 1"):
            guider.sample(noise, latent, sampler, torch.tensor([2.0, 1.0]), seed=0)

    @pytest.mark.parametrize(
        ("key", "value"), [("guidance", "x"), ("noise_mode", "x"), ("steps", 9), ("steps", -1), ("denoise", 0.0)]
    )
    def test_values_outside_their_range(self, nodes, model, key, value):
        with pytest.raises(ValueError, match=rf"{key}: expected"):
            run(nodes["SiDFewStepSampler"], **self.inputs(model, **{key: value}))


class TestRecipeNodes:
    def test_override(self, nodes, recipes):
        (preset,) = run(nodes["SiDRecipeOverride"], preset="LCM (4 steps)")
        assert preset == recipes.PRESETS["LCM (4 steps)"]
        (changed,) = run(nodes["SiDRecipeOverride"], recipe=preset, timesteps="999, 499", noise_mode="ddim")
        assert (changed.timesteps, changed.t_init, changed.ladder, changed.noise_mode) == (
            (999, 499),
            999,
            "sid",
            "ddim",
        )
        (guided,) = run(nodes["SiDRecipeOverride"], recipe=preset, guidance="cfg", cfg=2.0)
        assert (guided.sampling_guidance, guided.sampling_cfg) == ("cfg", 2.0)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "expected a connected recipe or a preset"),
            ({"preset": "x"}, "preset: expected one of keep"),
            ({"preset": "LCM (4 steps)", "timesteps": "a b"}, "timesteps: expected integers such as"),
            ({"preset": "LCM (4 steps)", "timesteps": "100 200"}, "timesteps: expected 1 to 8 integers that fall"),
            ({"preset": "LCM (4 steps)", "noise_mode": "x"}, "noise_mode: expected one of keep"),
        ],
    )
    def test_wrong_override(self, nodes, inputs, message):
        with pytest.raises(ValueError, match=message):
            run(nodes["SiDRecipeOverride"], **inputs)

    def test_info(self, nodes, recipes):
        (text,) = run(nodes["SiDRecipeInfo"], recipe=recipes.SiDRecipe())
        assert "625 468 312 156" in text
        assert "sigmas  2.5" in text


class TestTrainingRecipe:
    def test_writes_what_the_trainer_reads(self, nodes, put, folders, tmp_path, monkeypatch):
        from sid_train.config import load_config

        put("checkpoints", "base.safetensors", {"a": torch.zeros(1)})
        monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path))
        (strategy,) = run(nodes["SiDDistillationGuidance"], strategy="lsg", lsg_scale=2.0)
        inputs = {"teacher": "base.safetensors", "prompts": "a cat\n\na dog", "strategy": strategy, "name": "cats"}
        (command,) = run(nodes["SiDTrainingRecipe"], **inputs, steps=2)
        path = tmp_path / "sid_train" / "cats.toml"
        assert command == f"python -m sid_train distill --config {path} --out runs/cats"
        config = load_config(str(path))
        assert (config.method.steps, config.method.guidance) == (2, "lsg=2")
        assert config.model.teacher == str(tmp_path / "checkpoints" / "base.safetensors")
        assert Path(config.data.prompts).read_text() == "a cat\na dog\n"
        (tmp_path / "pairs").mkdir()
        run(nodes["SiDTrainingRecipe"], **inputs, pairs=str(tmp_path / "pairs"))
        assert load_config(str(path)).gan.enabled

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": " \n"}, "prompts: expected prompts"),
            ({"prompts": "/nowhere/p.txt"}, "prompts: no file '/nowhere/p.txt'"),
            ({"pairs": "/nowhere"}, "pairs: expected a folder of image-text pairs"),
            ({"name": "../x"}, "name: expected letters"),
            ({"steps": 9}, "steps: expected 1 to 8"),
            ({"strategy": "nonsense"}, "guidance: expected none"),
        ],
    )
    def test_wrong_inputs(self, nodes, put, folders, tmp_path, monkeypatch, changes, message):
        put("checkpoints", "base.safetensors", {"a": torch.zeros(1)})
        monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path))
        with pytest.raises(ValueError, match=message):
            run(nodes["SiDTrainingRecipe"], **{"teacher": "base.safetensors", "prompts": "a cat"} | changes)


def test_custom_strategy(nodes):
    (text,) = run(nodes["SiDDistillationGuidance"], strategy="custom", fake_train=1.0, fake_eval=1.0, teacher=1.1)
    assert text == "custom=1,1,1.1"
    assert run(nodes["SiDDistillationGuidance"]) == ("none",)
    with pytest.raises(ValueError, match="strategy: expected one of none, lsg"):
        run(nodes["SiDDistillationGuidance"], strategy="x")
