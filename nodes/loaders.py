"""Loaders: a checkpoint, a diffusion model or a LoRA, together with the recipe that says how to sample it."""

from __future__ import annotations

from dataclasses import replace

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..sid_train.core.recipe import (
    PRESETS,
    SDXL_ARCHITECTURE,
    RecipeError,
    SiDRecipe,
    has_recipe,
    read_safetensors_metadata,
)
from .common import RecipeType, check_choice, check_model, check_sdxl, has_zero_terminal_snr, schema, warn

FROM_FILE = "from the file"
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
# What follows the module's name in the keys of a LoRA file, in the spellings that ComfyUI reads.
LORA_SUFFIXES = (
    ".lora_up.weight",
    ".lora_down.weight",
    ".lora_mid.weight",
    ".lora.up.weight",
    ".lora.down.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    "_lora.up.weight",
    "_lora.down.weight",
    ".lora_linear_layer.up.weight",
    ".lora_linear_layer.down.weight",
    ".alpha",
    ".dora_scale",
    ".diff",
    ".diff_b",
)


def _recipe_input() -> io.Combo.Input:
    return io.Combo.Input(
        "recipe",
        options=[FROM_FILE, *PRESETS],
        default=FROM_FILE,
        tooltip=f"How to sample the file. '{FROM_FILE}' reads what its trainer wrote into it. For a file that says "
        "nothing (DMD2, LCM, Lightning, a merge), pick what it was distilled as.",
    )


def _recipe_output() -> io.Custom.Output:
    return RecipeType.Output(
        display_name="recipe", tooltip="How to sample it: connect it to the SiD sampler and guidance nodes."
    )


def read_recipe(path: str, choice: str) -> tuple[SiDRecipe, list[str]]:
    """The recipe of a file, or the preset that was chosen for it, and what the user should be told.

    ValueError for a file that is no safetensors file, and for one without a recipe while ``choice`` is the file's.
    """
    check_choice("recipe", choice, [FROM_FILE, *PRESETS])
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ValueError(f"{path}: expected a safetensors file. Convert it first: other formats can run code.")
    metadata = read_safetensors_metadata(path)
    if choice != FROM_FILE:
        return PRESETS[choice], _replaced(choice, metadata, path)
    if not has_recipe(metadata):
        raise ValueError(
            f"{path}: the file does not say how it is to be sampled. Set 'recipe' to what it was distilled as: "
            f"{', '.join(PRESETS)}."
        )
    recipe = SiDRecipe.from_metadata(metadata, path)
    if recipe.architecture.split("/")[0] != SDXL_ARCHITECTURE:
        raise ValueError(
            f"{path}: expected a recipe for {SDXL_ARCHITECTURE}, got {recipe.architecture}. "
            "These nodes sample SDXL; run other models with 'python -m sid_train sample'."
        )
    return recipe, []


def _replaced(choice: str, metadata: dict[str, str], path: str) -> list[str]:
    """What the user should be told about the file's own recipe, where preset ``choice`` takes its place."""
    if not has_recipe(metadata):
        return []
    try:
        own = SiDRecipe.from_metadata(metadata, path)
    except RecipeError as error:
        return [f"'{choice}' replaces the file's own recipe, which cannot be read ({error})."]
    chain = ("timesteps", "noise_mode", "unit_variance_start")
    if all(getattr(own, name) == getattr(PRESETS[choice], name) for name in chain):
        return []
    return [
        f"'{choice}' replaces the file's own recipe (timesteps {' '.join(map(str, own.timesteps))}, noise "
        f"{own.noise_mode}). Set 'recipe' to '{FROM_FILE}' to sample it as it was trained."
    ]


def fit_recipe(model, recipe: SiDRecipe, choice: str, path: str) -> SiDRecipe:
    """``recipe``, checked against the model of the same file. A preset takes the prediction type from the model."""
    if choice != FROM_FILE:
        sampling = model.get_model_object("model_sampling")
        predicts = check_sdxl(model.model, sampling, path)
        recipe = replace(recipe, prediction_type=predicts, zero_terminal_snr=has_zero_terminal_snr(sampling))
    check_model(model, recipe, path)
    return recipe


class SiDCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDCheckpointLoader",
            display_name="SiD Checkpoint Loader",
            description="Loads a few-step SDXL checkpoint (UNet, text encoders and VAE in one file) and how to "
            "sample it.",
            search_aliases=["load sid checkpoint", "few-step sdxl", "distilled sdxl", "dmd2", "lightning", "lcm"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A safetensors file in models/checkpoints.",
                ),
                _recipe_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The few-step generator."),
                io.Clip.Output(tooltip="The text encoders."),
                io.Vae.Output(tooltip="Turns latents into pictures and back."),
                _recipe_output(),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str, recipe: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        how, messages = read_recipe(path, recipe)
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            path,
            output_vae=True,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
        how = fit_recipe(model, how, recipe, path)
        warn(cls, messages)
        return io.NodeOutput(model, clip, vae, how)


class SiDDiffusionModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDDiffusionModelLoader",
            display_name="SiD Diffusion Model Loader",
            description="Loads a few-step SDXL UNet without text encoders and VAE, and how to sample it.",
            search_aliases=["load sid unet", "few-step sdxl unet", "dmd2", "lightning", "lcm"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A safetensors file in models/diffusion_models.",
                ),
                _recipe_input(),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Keep the weights in this type. fp8 halves the memory and costs some quality.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The few-step generator."), _recipe_output()],
        )

    @classmethod
    def execute(cls, unet_name: str, recipe: str, weight_dtype: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        options = dict(WEIGHT_DTYPES[check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)])
        how, messages = read_recipe(path, recipe)
        model = comfy.sd.load_diffusion_model(path, model_options=options)
        how = fit_recipe(model, how, recipe, path)
        warn(cls, messages)
        return io.NodeOutput(model, how)


def _lora_modules(tensors) -> dict[str, list[str]]:
    """The keys of a LoRA file by the module that they belong to."""
    modules: dict[str, list[str]] = {}
    for key in tensors:
        suffix = next((s for s in LORA_SUFFIXES if key.endswith(s)), "")
        modules.setdefault(key.removesuffix(suffix), []).append(key)
    return modules


def apply_lora(model, path: str, strength: float, allow_partial: bool):
    """``model`` with the UNet part of a LoRA file: (MODEL, names of modules in the file that were not applied).

    ValueError if no module matches, or if some do not while ``allow_partial`` is false.
    """
    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    patched = model.clone()
    applied = set(patched.add_patches(patches, strength))

    def is_applied(module: str) -> bool:
        target = names.get(module)
        return (target[0] if isinstance(target, tuple) else target) in applied

    modules = _lora_modules(tensors)
    missed = sorted(module for module in modules if not is_applied(module))
    if len(missed) == len(modules):
        raise ValueError(
            f"{path}: expected a LoRA for this SDXL model, but none of its {len(modules)} modules match; the first is "
            f"{missed[0] if missed else 'missing: the file is empty'!r}. ComfyUI reads kohya names "
            "(lora_unet_...lora_up.weight) and diffusion_model.*.lora_A; convert peft or diffusers files first."
        )
    if missed and not allow_partial:
        raise ValueError(
            f"{path}: {len(missed)} of its {len(modules)} modules match nothing in this model: "
            f"{', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}. A distillation LoRA that is applied in part "
            "gives wrong pictures. Set 'allow_partial' to use what matches."
        )
    return patched, missed


class SiDLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDLoRALoader",
            display_name="SiD LoRA Loader",
            description="Turns any SDXL model into a few-step generator with a distillation LoRA, and says how to "
            "sample it. Style LoRAs go through ComfyUI's own loader, before or after.",
            search_aliases=["load sid lora", "few-step lora", "distillation lora", "dmd2 lora", "lcm lora"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="Any SDXL model with the prediction type that the LoRA was made for."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A safetensors file in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is what it was trained for; much less and the model is not a few-step generator.",
                ),
                _recipe_input(),
                io.Boolean.Input(
                    "allow_partial",
                    default=False,
                    tooltip="Use a LoRA of which only some modules match this model; the rest is listed on the node.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The few-step generator."), _recipe_output()],
        )

    @classmethod
    def execute(cls, model, lora_name: str, strength: float, recipe: str, allow_partial: bool) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        how, messages = read_recipe(path, recipe)
        check_model(model, how, path)
        patched, missed = apply_lora(model, path, strength, allow_partial)
        if missed:
            messages.append(f"{len(missed)} modules of the LoRA match nothing in this model: {', '.join(missed)}")
        warn(cls, messages)
        return io.NodeOutput(patched, how)
