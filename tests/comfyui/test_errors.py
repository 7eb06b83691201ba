"""Every wrong file, connection and setting that a user can choose, and what the node then says.

One function a mistake, with the message that it has to give: what was expected, what was found, and what to do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import conditioning, empty_latent, run
from test_training import teacher_tensors

MISTAKES = []
PRESET = "SiD 625 (4 steps)"


def message(text: str):
    """Registers a mistake with the regular expression that its message matches."""

    def register(mistake):
        MISTAKES.append(pytest.param(mistake, text, id=mistake.__name__))
        return mistake

    return register


@dataclass
class Kit:
    """Right files and connections, to be used wrongly."""

    nodes: dict
    put: Any
    model: Any
    sd15_model: Any
    recipe: Any
    tensors: dict
    lora: dict
    folder: Path

    def load_unet(self, tensors: dict | None = None, says=None, changes: dict | None = None, **inputs):
        """A file whose header says the recipe ``says``, with ``changes`` of its text."""
        metadata = says.to_metadata() | (changes or {}) if says else None
        name = self.put("diffusion_models", "file.safetensors", self.tensors if tensors is None else tensors, metadata)
        return run(self.nodes["SiDDiffusionModelLoader"], **{"unet_name": name} | inputs)

    def load_lora(self, tensors: dict, model=None, **changes):
        name = self.put("loras", "lora.safetensors", tensors, replace(self.recipe, **changes).to_metadata())
        return run(self.nodes["SiDLoRALoader"], model=model or self.model, lora_name=name)

    def sample(self, **changes):
        inputs = {"model": self.model, "recipe": self.recipe, "positive": conditioning(1), "seed": 0}
        return run(self.nodes["SiDFewStepSampler"], **inputs | {"latent_image": empty_latent()} | changes)

    def sample_custom(self, model, sigmas: list[float]):
        """What SamplerCustomAdvanced does with a guider of ComfyUI's own."""
        from comfy.samplers import CFGGuider

        (sampler,) = run(self.nodes["SiDSamplerSelect"], recipe=self.recipe)
        guider = CFGGuider(model)
        guider.inner_set_conds({"positive": conditioning(1)})
        zeros = torch.zeros(1, 4, 16, 16)
        return guider.sample(zeros, zeros, sampler, torch.tensor(sigmas), seed=0)

    def write_recipe(self, teacher: dict | None = None, file: str = "base.safetensors", **changes):
        """With a ``file`` of ``teacher``'s tensors, or of right ones."""
        name = self.put("checkpoints", file, teacher_tensors() if teacher is None else teacher)
        return run(self.nodes["SiDTrainingRecipe"], **{"teacher": name, "prompts": "a cat"} | changes)


# -- files -------------------------------------------------------------------------------------------------------


@message(r"file.safetensors: expected a safetensors file, but it cannot be read")
def file_that_is_not_safetensors(kit: Kit):
    kit.put("diffusion_models", "file.safetensors", {"a": torch.zeros(1)})
    (kit.folder / "diffusion_models" / "file.safetensors").write_bytes(b"not safetensors")
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name="file.safetensors")


@message(r"file.ckpt: expected a safetensors file, .*python -m sid_train convert FILE -o")
def pickled_file(kit: Kit):
    kit.put("diffusion_models", "file.ckpt", {"a": torch.zeros(1)})
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name="file.ckpt", recipe=PRESET)


@message(r"file.safetensors: expected .* bytes, but the file ends after .*: copy or download it again")
def download_that_was_cut_off(kit: Kit):
    kit.put("diffusion_models", "file.safetensors", kit.tensors, kit.recipe.to_metadata())
    path = kit.folder / "diffusion_models" / "file.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name="file.safetensors")


@message(r"^negative: expected one of this node's inputs \(recipe\)")
def link_to_an_input_that_is_not_there(kit: Kit):
    run(kit.nodes["SiDRecipeInfo"], recipe=kit.recipe, negative=conditioning(1))


@message(r"'diffusion_models' with filename 'gone.safetensors' not found")
def file_that_is_gone(kit: Kit):
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name="gone.safetensors")


@message(r"does not say how it is to be sampled, nor does its name. Set 'recipe' to .*: .*DMD2 \(4 steps\)")
def file_without_a_recipe(kit: Kit):
    kit.load_unet()


@message(r"file.safetensors: expected a UNet of SDXL, .*, but ComfyUI finds no diffusion model in it. A LoRA goes into")
def lora_as_a_diffusion_model(kit: Kit):
    kit.load_unet(kit.lora, kit.recipe)


@message(
    r"file.safetensors: expected a checkpoint of SDXL, .*, but ComfyUI finds no diffusion model in it. A LoRA goes"
)
def lora_as_a_checkpoint(kit: Kit):
    name = kit.put("checkpoints", "file.safetensors", kit.lora, kit.recipe.to_metadata())
    run(kit.nodes["SiDCheckpointLoader"], ckpt_name=name)


@message(r"file.safetensors: its recipe is for SDXL, but the model is one of SD 1.x. Recipe and model belong together")
def recipe_for_a_model_of_another_generation(kit: Kit):
    kit.load_unet(kit.sd15_model.model.diffusion_model.state_dict(), kit.recipe)


@message(r"expected a recipe for SD 1.x, 2.x or SDXL, got sid-demo-digits")
def recipe_of_another_architecture(kit: Kit):
    kit.load_unet(says=replace(kit.recipe, architecture="sid-demo-digits"))


@message(r"file.safetensors: sid.timesteps: .* disagree with t_init 625")
def recipe_that_contradicts_itself(kit: Kit):
    kit.load_unet(says=kit.recipe, changes={"sid.timesteps": "625,468,300,156"})


@message(r"sid.format_version: expected at most \d+, got 99: update ComfyUI-SiD")
def recipe_of_a_newer_version(kit: Kit):
    kit.load_unet(says=kit.recipe, changes={"sid.format_version": "99"})


@message(r"its recipe says prediction type v_prediction, but ComfyUI loaded the model as epsilon")
def recipe_of_another_prediction_type(kit: Kit):
    kit.load_unet(says=replace(kit.recipe, prediction_type="v_prediction"))


@message(r"its recipe says zero terminal SNR is true, but ComfyUI loaded the model with false")
def recipe_of_another_noise_schedule(kit: Kit):
    kit.load_unet(says=replace(kit.recipe, zero_terminal_snr=True))


@message(
    r"file.safetensors: expected all \d+ tensors of this UNet, but 2 are missing; the first is out.2.bias. Copy or"
)
def unet_with_missing_tensors(kit: Kit):
    kit.load_unet({k: v for k, v in kit.tensors.items() if not k.startswith("out.2")}, kit.recipe)


@message(
    r"file.safetensors: expected a UNet of .*, but a tensor is missing: 'input_blocks.3.1.transformer_blocks.0.attn2"
)
def unet_that_comfyui_cannot_make_out(kit: Kit):
    part = "input_blocks.3.1.transformer_blocks.0.attn2"
    kit.load_unet({k: v for k, v in kit.tensors.items() if not k.startswith(part)}, kit.recipe)


@message(r"file.safetensors: expected all \d+ tensors of this UNet, but 2 are missing; the first is out.2.bias")
def checkpoint_with_missing_tensors(kit: Kit):
    whole = {f"model.diffusion_model.{k}": v for k, v in kit.tensors.items() if not k.startswith("out.2")}
    name = kit.put("checkpoints", "file.safetensors", whole, kit.recipe.to_metadata())
    run(kit.nodes["SiDCheckpointLoader"], ckpt_name=name)


@message(
    r"file.safetensors: 1 of its tensors hold NaN or infinity, which makes black pictures; the first is out.2.weight"
)
def unet_of_nan(kit: Kit):
    kit.load_unet(kit.tensors | {"out.2.weight": torch.full_like(kit.tensors["out.2.weight"], torch.nan)}, kit.recipe)


NOT_FOR_IT = r". Few-step presets are not for it: sample it with ComfyUI's own nodes"
EDM = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}


@message(r"file.safetensors: expected .* got an EDM model \(Playground 2.5, for instance\): .* EDM" + NOT_FOR_IT)
def playground(kit: Kit):
    kit.load_unet(kit.tensors | EDM, recipe=PRESET)


@message(r"file.safetensors: expected .* got an EDM model with v-prediction \(CosXL, for instance\): .*" + NOT_FOR_IT)
def cosxl(kit: Kit):
    sigmas = {f"edm_vpred.sigma_{end}": torch.tensor(value) for end, value in (("max", 120.0), ("min", 0.002))}
    kit.load_unet(kit.tensors | sigmas, recipe=PRESET)


@message(r"got time_embed.cond_proj.weight, as LCM's whole UNets have it: .* Use LCM's LoRA")
def lcm_unet_with_a_guidance_embedding(kit: Kit):
    kit.load_unet(kit.tensors | {"time_embed.cond_proj.weight": torch.zeros(4, 4)}, recipe="LCM (4 steps)")


@message(r"says that it is a flow-matching model \(modelspec.prediction_type is 'flow_matching'\)" + NOT_FOR_IT)
def flow_matching_file(kit: Kit):
    name = kit.put("diffusion_models", "file.safetensors", kit.tensors, {"modelspec.prediction_type": "flow_matching"})
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name=name, recipe=PRESET)


def load_foreign_lora(kit: Kit, metadata: dict, model=None):
    name = kit.put("loras", "lora.safetensors", kit.lora, metadata)
    run(kit.nodes["SiDLoRALoader"], model=model or kit.model, lora_name=name, recipe=PRESET)


@message(
    r"lora.safetensors: its header says that the LoRA was made for v_prediction \(ss_v_parameterization is 'True'\)"
)
def foreign_lora_for_v_prediction(kit: Kit):
    load_foreign_lora(kit, {"ss_v_parameterization": "True"})


@message(
    r"the LoRA was made for epsilon \(modelspec.predict_key is 'epsilon'\), but the model predicts v_prediction. Load"
)
def foreign_lora_for_epsilon(kit: Kit):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    load_foreign_lora(
        kit, {"modelspec.predict_key": "epsilon"}, ModelSamplingDiscrete().patch(kit.model, "v_prediction", False)[0]
    )


@message(r"lora.safetensors: expected a LoRA for a UNet, but it has nothing for it: all 2 of its tensors are for text")
def lora_for_text_encoders_alone(kit: Kit):
    kit.load_lora({f"lora_te1_text_model_encoder.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")})


@message(r"lora.safetensors: 56 of its tensors hold NaN or infinity, .* the first is lora_unet.*lora_up.weight")
def lora_of_nan(kit: Kit):
    kit.load_lora({k: v * torch.nan if k.endswith("lora_up.weight") else v for k, v in kit.lora.items()})


def conv_in_lora(channels: int) -> dict:
    down = {"lora_unet_conv_in.lora_down.weight": torch.ones(4, channels, 3, 3)}
    return down | {"lora_unet_conv_in.lora_up.weight": torch.ones(320, 4, 1, 1)}


@message(r"its weight for conv_in is for a UNet of 9 input channels, and this model has 4 .* Set 'allow_partial'")
def lora_for_the_inpainting_unet(kit: Kit):
    kit.load_lora(kit.lora | conv_in_lora(9))


@message(r"none of its \d+ tensors match; the first is 'base_model.model.*Read are the names of kohya .* and peft")
def lora_with_names_that_nobody_writes(kit: Kit):
    kit.load_lora({k.replace("lora_unet_", "base_model.model."): v for k, v in kit.lora.items()})


@message(r"2 of its \d+ tensors match nothing in this model: lora_unet_elsewhere.lora_down.weight.*Set 'allow_partial'")
def lora_that_matches_in_part(kit: Kit):
    extra = {f"lora_unet_elsewhere.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}
    kit.load_lora(kit.lora | extra)


@message(r"its recipe says prediction type v_prediction, but ComfyUI loaded the model as epsilon")
def lora_for_another_prediction_type(kit: Kit):
    kit.load_lora(kit.lora, prediction_type="v_prediction")


@message(r"lora.safetensors: its recipe is for SDXL, but the model is one of SD 1.x")
def lora_on_a_model_of_another_generation(kit: Kit):
    kit.load_lora(kit.lora, kit.sd15_model)


@message(
    r"expected a LoRA of (\d+) x (\d+) for diffusion_model.*, got \1 x (?!\2 )\d+ \(ranks 4 and 4\).*another model than"
)
def lora_of_other_widths(kit: Kit):
    widen = torch.nn.functional.pad
    kit.load_lora({k: widen(v, (0, 8)) if k.endswith("lora_down.weight") else v for k, v in kit.lora.items()})


@message(r"expected a LoRA for this model, but none of its \d+ tensors match")
def checkpoint_as_a_lora(kit: Kit):
    kit.load_lora(kit.tensors)


# -- connections -------------------------------------------------------------------------------------------------


def patched(kit: Kit, kind: str):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

    return (
        ModelSamplingSD3().patch(kit.model, 3.0)[0]
        if kind == "flow"
        else ModelSamplingDiscrete().patch(kit.model, "lcm", False)[0]
    )


@message(
    r"expected 1,000 discrete timesteps .* got a flow-matching model: ModelSamplingDiscreteFlow \+ CONST.*"
    r"remove ModelSampling"
)
def flow_matching_model(kit: Kit):
    kit.sample(model=patched(kit, "flow"))


@message(r"expected 1,000 discrete timesteps .* got a flow-matching model: ModelSamplingDiscreteFlow \+ CONST")
def flow_matching_model_in_a_custom_sampler(kit: Kit):
    kit.sample_custom(patched(kit, "flow"), [1.0, 0.0])


@message(r"expected 1,000 discrete timesteps .* got ModelSamplingDiscreteDistilled \+ LCM")
def lcm_patch(kit: Kit):
    kit.sample(model=patched(kit, "lcm"))


@message(r"model: its recipe is for SDXL, but the model is one of SD 1.x. .*connect 'model' of SiD Recipe Override")
def recipe_of_another_generation(kit: Kit):
    kit.sample(model=kit.sd15_model)


@message(r"positive: expected a prompt encoded by the text encoders of SD 1.x \(768 wide\), got 2048 wide, pooled 1280")
def prompt_of_another_generation(kit: Kit):
    kit.sample(model=kit.sd15_model, recipe=None)


@message(r"model: expected a model of SD 1.x, 2.x or SDXL, got SDXLRefiner")
def model_of_another_class(kit: Kit):
    import comfy.model_base

    refiner = kit.model.clone()
    refiner.model = object.__new__(comfy.model_base.SDXLRefiner)
    refiner.get_model_object = kit.model.get_model_object
    kit.sample(model=refiner, recipe=None)


@message(r"its recipe says prediction type v_prediction, but ComfyUI loaded the model as epsilon")
def recipe_of_another_model(kit: Kit):
    kit.sample(recipe=replace(kit.recipe, prediction_type="v_prediction"))


@message(r"its recipe is for a network that predicts the picture itself .* ComfyUI takes it for epsilon.*SiD's loaders")
def recipe_for_x0_of_another_model(kit: Kit):
    kit.sample(recipe=replace(kit.recipe, prediction_type="x0"))


@message(r"is told timesteps scaled by 0.25, but this one is told timesteps scaled by 1\. SiD's loaders")
def recipe_with_scaled_timesteps_of_another_model(kit: Kit):
    kit.sample(recipe=replace(kit.recipe, timestep_scale=0.25))


@message(r"its recipe is for a network that predicts the picture itself")
def preset_for_x0_on_another_model(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"], preset="Lightning (1 step)", model=kit.model)


@message(r"model: its recipe says prediction type epsilon, but ComfyUI loaded the model as x0")
def recipe_for_epsilon_of_a_model_for_x0(kit: Kit):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    kit.sample(model=ModelSamplingDiscrete().patch(kit.model, "x0", False)[0])


@message(r"predicts the picture itself \(sample\) .* presets but 'Lightning \(1 step\)' are not for it")
def preset_for_epsilon_on_a_file_for_x0(kit: Kit):
    name = kit.put("diffusion_models", "file.safetensors", kit.tensors, {"modelspec.prediction_type": "sample"})
    run(kit.nodes["SiDDiffusionModelLoader"], unet_name=name, recipe=PRESET)


@message(r"positive: expected a prompt encoded by the text encoders of SDXL \(2048 wide, pooled 1280\), got 768 wide")
def prompt_of_another_text_encoder(kit: Kit):
    kit.sample(positive=conditioning(1, width=768, pooled=768))


@message(r"negative: expected a prompt encoded by the text encoders of SDXL .* got 2048 wide, pooled missing")
def prompt_without_a_pooled_vector(kit: Kit):
    kit.sample(negative=[[conditioning(1)[0][0], {}]], guidance="cfg")


@message(r"latent_image: expected a latent .* got 1x16x16x16. Use Empty Latent Image")
def latent_of_another_model(kit: Kit):
    kit.sample(latent_image={"samples": torch.ones(1, 16, 16, 16)})


@message(r"latent_image: expected a latent .* got 1x4x1x16x16")
def latent_of_a_video(kit: Kit):
    kit.sample(latent_image={"samples": torch.zeros(1, 4, 1, 16, 16)})


NO_NEGATIVE = (
    r"': expected a negative prompt, but 'negative' is not connected. Connect one .* or set guidance to 'none'"
)


@message(r"guidance 'nag" + NO_NEGATIVE)
def nag_without_a_negative_prompt(kit: Kit):
    kit.sample(guidance="nag")


@message(r"guidance 'cfg" + NO_NEGATIVE)
def cfg_without_a_negative_prompt(kit: Kit):
    kit.sample(guidance="cfg")


@message(r"guidance 'cfg first step only" + NO_NEGATIVE)
def first_step_cfg_without_a_negative_prompt(kit: Kit):
    kit.sample(guidance="cfg first step only")


@message(r"guidance 'cfg" + NO_NEGATIVE)
def recipe_that_wants_a_negative_prompt(kit: Kit):
    kit.sample(recipe=replace(kit.recipe, sampling_guidance="cfg"))


@message(r"guidance 'nag': expected one negative prompt, got 2 parts. Join them with Conditioning \(Concat\)")
def several_negative_prompts_for_nag(kit: Kit):
    kit.sample(guidance="nag", negative=conditioning(2) + conditioning(3))


@message(r"guidance 'nag': expected a negative prompt for the whole picture .* got one with area. Use guidance 'cfg'")
def negative_prompt_with_an_area_for_nag(kit: Kit):
    ((text, extra),) = conditioning(2)
    kit.sample(guidance="nag", negative=[[text, extra | {"area": (8, 8, 0, 0)}]])


@message(r"another node .* already replaces this model's cross attention. Use guidance 'cfg' or 'none'")
def nag_on_a_model_with_replaced_attention(kit: Kit):
    replaced = kit.model.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, extra: q, "middle", 0)
    kit.sample(model=replaced, guidance="nag", negative=conditioning(2))


@message(r"sigmas: expected noise levels that fall to 0, got 3 numbers: 1, 2, 0. Connect SiD Scheduler")
def rising_sigmas(kit: Kit):
    kit.sample_custom(kit.model, [1.0, 2.0, 0.0])


@message(r"sigmas: expected noise levels that fall to 0, got 3 numbers: 2, nan, 0")
def sigmas_of_nan(kit: Kit):
    kit.sample_custom(kit.model, [2.0, torch.nan, 0.0])


@message(
    r"model: its prediction holds NaN or infinity, which is a black picture: the weights of the model or of a LoRA"
)
def model_that_predicts_nan(kit: Kit):
    broken = kit.model.clone()
    broken.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) / 0)
    kit.sample(model=broken)


@message(r"sigmas: expected to end in 0, got 1. .* use 'denoise' of SiD Scheduler")
def split_sigmas(kit: Kit):
    kit.sample_custom(kit.model, [2.0, 1.0])


# -- settings ----------------------------------------------------------------------------------------------------


@message(r"recipe: expected one of auto, from the file, SiD 625 .* got 'x'")
def unknown_preset(kit: Kit):
    kit.load_unet(recipe="x")


@message(r"weight_dtype: expected one of default, .* got 'int3'")
def unknown_weight_dtype(kit: Kit):
    kit.load_unet(weight_dtype="int3")


@message(r"guidance: expected one of auto, none, .* got 'x'")
def unknown_guidance(kit: Kit):
    kit.sample(guidance="x")


@message(r"noise_mode: expected one of from the recipe, fresh, .* got 'x'")
def unknown_noise_mode(kit: Kit):
    kit.sample(noise_mode="x")


@message(r"steps: expected 1 to 8, got 9")
def too_many_steps_for_sid(kit: Kit):
    kit.sample(steps=9)


@message(r"steps: expected an integer from 0 to 16, got 17")
def too_many_steps(kit: Kit):
    kit.sample(steps=17)


@message(r"denoise: expected a number from 0.01 to 1.0, got 0.0")
def no_denoising(kit: Kit):
    kit.sample(denoise=0.0)


@message(r"denoise: expected 1 with one step, got 0.5. .*use denoise 1, or more steps")
def image_to_image_in_one_step(kit: Kit):
    kit.sample(denoise=0.5, steps=1)


@message(r"start: expected one of auto, noise, latent, got 'x'")
def unknown_start(kit: Kit):
    run(kit.nodes["SiDSamplerSelect"], recipe=kit.recipe, start="x")


@message(r"recipe: expected a connected recipe or a preset, got neither")
def override_of_nothing(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"])


@message(r"preset: expected one of keep, .* got 'x'")
def override_with_an_unknown_preset(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"], preset="x")


@message(r"timesteps: expected integers such as '625 468 312 156', got 'a b'")
def timesteps_that_are_no_numbers(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"], recipe=kit.recipe, timesteps="a b")


@message(r"timesteps: expected 1 to 16 integers that fall, between 999 and 0, got \[100, 200\]")
def timesteps_that_rise(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"], recipe=kit.recipe, timesteps="100 200")


@message(r"noise_mode: expected one of keep, .* got 'x'")
def override_with_an_unknown_noise_mode(kit: Kit):
    run(kit.nodes["SiDRecipeOverride"], recipe=kit.recipe, noise_mode="x")


@message(r"strategy: expected one of none, lsg, .* got 'x'")
def unknown_strategy(kit: Kit):
    run(kit.nodes["SiDDistillationGuidance"], strategy="x")


@message(r"teacher: .*base.ckpt: expected a safetensors file, .*Convert it first")
def pickled_teacher(kit: Kit):
    kit.write_recipe(file="base.ckpt")


@message(r"teacher: .*base.safetensors: UNet: expected tensors such as .* got a \.\.\.. Choose a whole checkpoint")
def teacher_that_is_no_model(kit: Kit):
    kit.write_recipe({"a": torch.zeros(1)})


@message(r"teacher: .* expected the text encoders of SD 1.x beside the UNet, got no tensor named cond_stage_model.")
def teacher_with_the_text_encoders_of_another_generation(kit: Kit):
    kit.write_recipe(teacher_tensors(kit.sd15_model.model.diffusion_model.state_dict()))


@message(r"teacher: .*base.safetensors: expected the text encoders of SDXL .* Choose a whole checkpoint")
def teacher_without_text_encoders(kit: Kit):
    kit.write_recipe(kit.tensors)


@message(r"teacher: .*base.safetensors: it is an EDM model \(tensor edm_vpred.sigma_max, .* Choose another one")
def teacher_with_edm_tensors(kit: Kit):
    kit.write_recipe(teacher_tensors() | {"model.diffusion_model.edm_vpred.sigma_max": torch.ones(1)})


@message(r"teacher: .*base.safetensors: it is a flow-matching model \(modelspec.prediction_type in its .* another one")
def teacher_for_flow_matching(kit: Kit):
    kit.put("checkpoints", "base.safetensors", teacher_tensors(), {"modelspec.prediction_type": "flow"})
    run(kit.nodes["SiDTrainingRecipe"], teacher="base.safetensors", prompts="a cat")


@message(r"base.safetensors: expected .* bytes, but the file ends after .*: copy or download it again")
def teacher_that_was_cut_off(kit: Kit):
    kit.write_recipe()
    path = kit.folder / "checkpoints" / "base.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    run(kit.nodes["SiDTrainingRecipe"], teacher="base.safetensors", prompts="a cat")


@message(r"prompts: expected prompts, one a line, or the path of a file of them; got nothing")
def training_without_prompts(kit: Kit):
    kit.write_recipe(prompts=" \n")


MISTYPED = ("/nowhere/p.txt", "/nowhere/my captions", r"C:\nowhere\my captions", "nowhere/captions", "p.jsonl")
MISTAKES += [
    pytest.param(
        partial(Kit.write_recipe, prompts=path),
        r"prompts: expected prompts, a .txt, .* folder of captions; "
        + re.escape(f"there is nothing at {path!r}. Correct"),
        id=f"training_on_a_mistyped_path: {path}",
    )
    for path in MISTYPED
]


@message(r"prompts: expected prompts, a .txt, .* this is another file at '.*p.tsv'. Correct the path")
def training_on_a_file_of_another_kind(kit: Kit):
    (kit.folder / "p.tsv").write_text("a cat")
    kit.write_recipe(prompts=str(kit.folder / "p.tsv"))


@message(r"prompts: expected hf:owner/name, a data set on the Hugging Face hub, got 'hf:prompts of cats'")
def training_on_a_data_set_without_an_owner(kit: Kit):
    kit.write_recipe(prompts="hf:prompts of cats")


@message(r"pairs: expected a folder of image-text pairs, .* or nothing; there is nothing at '/nowhere'. Correct")
def training_on_missing_pairs(kit: Kit):
    kit.write_recipe(pairs="/nowhere")


@message(r"pairs: expected a folder .*, .tar shards .*; there is nothing at '.*/10.tar'. Correct the path")
def training_on_a_missing_shard(kit: Kit):
    (kit.folder / "09.tar").touch()
    kit.write_recipe(pairs=str(kit.folder / "{09..10}.tar"))


@message(r"name: expected letters, digits, .* got '../x'")
def training_under_a_name_that_is_a_path(kit: Kit):
    kit.write_recipe(name="../x")


@message(r"steps: expected an integer from 1 to 8, got 9")
def training_for_too_many_steps(kit: Kit):
    kit.write_recipe(steps=9)


@message(r"guidance: expected none, lsg=SCALE, .* got 'nonsense'")
def training_under_an_unknown_strategy(kit: Kit):
    kit.write_recipe(strategy="nonsense")


@message(r"base: expected one of sd15-.*, sdxl-.* got 'x'")
def training_on_an_unknown_base(kit: Kit):
    kit.write_recipe(base="x")


@pytest.fixture(scope="module")
def sd15_model(pack):
    import comfy.sd
    from small_models import SD1_UNET_CONFIG, sd_unet_tensors

    return comfy.sd.load_diffusion_model_state_dict(sd_unet_tensors(SD1_UNET_CONFIG))


@pytest.mark.parametrize(("mistake", "text"), MISTAKES)
def test_message(nodes, put, model, sd15_model, recipes, tensors, lora, folders, tmp_path, monkeypatch, mistake, text):
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path))
    kit = Kit(nodes, put, model, sd15_model, recipes.SiDRecipe(), tensors, lora, tmp_path)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=text):  # ComfyUI raises all three
        mistake(kit)
