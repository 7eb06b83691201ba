"""Loaders: a checkpoint, a diffusion model or a LoRA, together with the recipe that says how to sample it."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..sid_train.core.architectures import SAMPLED, STABLE_DIFFUSION, Architecture
from ..sid_train.core.published import preset_of_file, require_no_guidance_embedding
from ..sid_train.core.recipe import (
    PRESETS,
    RecipeError,
    SiDRecipe,
    has_recipe,
    split_architecture,
)
from ..sid_train.files.header import Header
from ..sid_train.files.reading import reading, shown
from ..sid_train.models.stable_diffusion.statements import Stated
from .checks import checked
from .common import RecipeType, full_path, read_header, schema, warn
from .declared import check_declared, declared
from .lora_names import in_kohyas_names
from .lora_shapes import misfit
from .models import check_model, fit_preset
from .parametrisation import sampled_as
from .start import remember_start
from .weights import check_numbers, check_unet, loading

AUTO, FROM_FILE = "auto", "from the file"
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
CONV_IN = "diffusion_model.input_blocks.0.0.weight"
# How the keys of a LoRA for text encoders begin, in the spellings that ComfyUI reads.
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder")


def _recipe_input() -> io.Combo.Input:
    return io.Combo.Input(
        "recipe",
        options=[AUTO, FROM_FILE, *PRESETS],
        default=AUTO,
        tooltip=f"How to sample the file. '{AUTO}': as its trainer wrote into it, else what its content, its header or "
        f"its name is known for, which the node then says. '{FROM_FILE}': only what is in it. For a file that says "
        "nothing (a merge, a file under another name), pick what it was distilled as.",
    )


def _recipe_output() -> io.Custom.Output:
    return RecipeType.Output(
        display_name="recipe", tooltip="How to sample it: connect it to the SiD sampler and guidance nodes."
    )


def read_recipe(
    path: str, header: Header, choice: str, sampled: Mapping[str, Architecture] = STABLE_DIFFUSION
) -> tuple[SiDRecipe, str, list[str]]:
    """How a file is sampled: its own recipe or a preset; which of them it is, in the words of the input; and what the
    user should be told.

    ValueError for a file without a recipe where that is to be in it.
    """
    metadata = header.metadata
    require_no_guidance_embedding(header.tensors, path)
    known = None if has_recipe(metadata) else preset_of_file(path, metadata, read=choice == AUTO)
    if choice == AUTO and known:
        preset, reason = known
        return (
            PRESETS[preset],
            preset,
            [
                f"The file does not say how it is to be sampled. It is sampled as '{preset}', for {reason}: if it is "
                "something else, set 'recipe'."
            ],
        )
    if choice not in (AUTO, FROM_FILE):
        return PRESETS[choice], choice, _replaced(choice, metadata, path)
    if not has_recipe(metadata):
        or_auto = f"'{AUTO}' ({known[0]}, for {known[1]}), or to " if known else ""
        raise ValueError(
            f"{path}: the file does not say how it is to be sampled{'' if known else ', nor does its name'}. Set "
            f"'recipe' to {or_auto}what it was distilled as: {', '.join(PRESETS)}."
        )
    recipe = SiDRecipe.from_metadata(metadata, path)
    if split_architecture(recipe.architecture)[0] not in sampled:
        raise ValueError(
            f"{path}: expected a recipe for SD 1.x, 2.x or SDXL, got {shown(recipe.architecture, 100)}. "
            "These nodes sample no other models; run them with 'python -m sid_train sample'."
        )
    return recipe, FROM_FILE, []


def _replaced(choice: str, metadata: dict[str, str], path: str) -> list[str]:
    """What the user should be told about the file's own recipe, where preset ``choice`` takes its place."""
    if not has_recipe(metadata):
        return []
    try:
        own = SiDRecipe.from_metadata(metadata, path)
    except RecipeError as error:
        return [f"'{choice}' replaces the file's own recipe, which cannot be read ({error})."]
    chain = ("timesteps", "noise_mode", "noise_gamma", "unit_variance_start", "timestep_scale")
    if all(getattr(own, name) == getattr(PRESETS[choice], name) for name in chain):
        return []
    return [
        f"'{choice}' replaces the file's own recipe (timesteps {' '.join(map(str, own.timesteps))}, noise "
        f"{own.noise_mode}). Set 'recipe' to '{FROM_FILE}' to sample it as it was trained."
    ]


def fit_recipe(model, recipe: SiDRecipe, choice: str, path: str, header: Header, is_lora: bool = False):
    """MODEL sampled as the recipe says, ``recipe``, checked against MODEL and the header of the file at ``path``, and
    what the user should be told.

    A preset takes architecture and prediction type from the model, which is the file's own unless ``is_lora``.
    """
    messages, said = [], None
    if not is_lora:
        is_own = choice == FROM_FILE
        said = Stated(recipe.prediction_type, recipe.zero_terminal_snr) if is_own else declared(header.metadata, path)
    model = sampled_as(model, recipe, path, not is_lora, said)
    if choice != FROM_FILE:
        recipe = fit_preset(model, recipe, path, not is_lora)
        messages = check_declared(header.metadata, recipe.prediction_type, path, is_lora)
    check_model(model, recipe, path, not is_lora)
    return model, recipe, messages


class SiDCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDCheckpointLoader",
            display_name="SiD Checkpoint Loader",
            description="Loads a few-step checkpoint of SDXL, SD 1.x or 2.x (UNet, text encoders and VAE in one "
            "file) and how to sample it.",
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
    @checked
    def execute(cls, ckpt_name: str, recipe: str) -> io.NodeOutput:
        path = full_path("checkpoints", ckpt_name)
        header = read_header(path, path)
        how, chosen, messages = read_recipe(path, header, recipe)
        with loading(path, "a checkpoint of SDXL, SD 1.x or 2.x"):
            model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
                path,
                output_vae=True,
                output_clip=True,
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
            )
        model, how, more = fit_recipe(model, how, chosen, path, header)
        messages += more + check_unet(model, header.tensors, path)
        if clip is None:
            messages.append(
                "The file has no text encoders: take CLIP from another checkpoint, or put the file into "
                "models/diffusion_models and use SiD Diffusion Model Loader."
            )
        warn(cls, messages)
        return io.NodeOutput(remember_start(model), clip, vae, how)


class SiDDiffusionModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDDiffusionModelLoader",
            display_name="SiD Diffusion Model Loader",
            description="Loads a few-step UNet of SDXL, SD 1.x or 2.x without text encoders and VAE, and how to "
            "sample it.",
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
    @checked
    def execute(cls, unet_name: str, recipe: str, weight_dtype: str) -> io.NodeOutput:
        path = full_path("diffusion_models", unet_name)
        options = dict(WEIGHT_DTYPES[weight_dtype])
        header = read_header(path, path)
        how, chosen, messages = read_recipe(path, header, recipe)
        with loading(path, "a UNet of SDXL, SD 1.x or 2.x"):
            model = comfy.sd.load_diffusion_model(path, model_options=options)
        model, how, more = fit_recipe(model, how, chosen, path, header)
        messages += more + check_unet(model, header.tensors, path)
        warn(cls, messages)
        return io.NodeOutput(remember_start(model), how)


class _ReadTensors(dict):
    """The tensors of a file, and the names of those that were read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default=None):
        if name in self:
            self.read.add(name)
        return super().get(name, default)


def apply_lora(model, clip, path: str, header: Header, strength: float, allow_partial: bool):
    """``model`` with the UNet part of a LoRA file and ``clip``, which may be None, with the part for text encoders:
    (MODEL, CLIP, what the user should be told).

    ValueError if nothing in the file is for this model, if a part is not while ``allow_partial`` is false, for a LoRA
    of other widths than the model's, and for one whose weights are NaN or infinite.
    """
    with reading(path, "a LoRA"):
        loaded = in_kohyas_names(comfy.utils.load_torch_file(path, safe_load=True), header.metadata, path)
        tensors = _ReadTensors(comfy.lora_convert.convert_lora(loaded))
        patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
        of_clip = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip else {}
        text_patches = comfy.lora.load_lora(tensors, of_clip, log_missing=False)

    expected = {name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT_ENCODER_PREFIXES)}
    for_text = len(tensors) - len(expected)
    if not expected:
        held = f"all {for_text:,} of its tensors are for text encoders" if for_text else "the file holds no tensors"
        raise ValueError(
            f"{path}: expected a LoRA for a UNet, but it has nothing for it: {held}. ComfyUI's own LoRA loader "
            "applies LoRAs for text encoders."
        )
    if not set(expected) & tensors.read:
        raise ValueError(
            f"{path}: expected a LoRA for this model, but none of its {len(expected)} tensors match; the first is "
            f"{shown(min(expected), 200)!r}. Read are the names of kohya (lora_unet_*.lora_up.weight), diffusers "
            "(unet.*.lora.up.weight) and peft (base_model.model.*.lora_B.weight), with the model's modules in them."
        )
    if clip:
        expected = dict(tensors)
    missed = sorted(set(expected) - tensors.read)
    check_numbers(expected, path)
    left_out = []
    if missed:
        first = ", ".join(shown(name, 100) for name in missed[:3]) + " ..." * (len(missed) > 3)
        left_out.append(f"{len(missed)} of its {len(expected)} tensors match nothing in this model: {first}")
    if other_channels := _check_shapes(model.model, patches, path):
        del patches[CONV_IN]
        left_out.append(other_channels)
    if text_patches:
        _check_shapes(clip.cond_stage_model, text_patches, path)
    if left_out and not allow_partial:
        raise ValueError(
            f"{path}: {'. '.join(left_out)}. A distillation LoRA that is applied in part gives wrong pictures. Set "
            "'allow_partial' to use what matches."
        )
    patched = model.clone()
    patched.add_patches(patches, strength)
    messages = [f"The LoRA is applied in part: {what}" for what in left_out]
    if clip and text_patches:
        clip = clip.clone()
        clip.add_patches(text_patches, strength)
    elif for_text and not clip:
        messages.append(f"{for_text} tensors of the LoRA are for text encoders: connect 'clip' to use them.")
    return patched, clip, messages


def _check_shapes(network, patches: dict, path: str) -> str:
    """ValueError for a LoRA, or another adapter, that does not fit the weight: ComfyUI logs that and leaves the weight
    as it is.

    Where only the number of the first layer's input channels is another one (SDXL's inpainting UNet has 9), says so.
    """
    other_channels = ""
    for name, patch in patches.items():
        try:
            weight = comfy.utils.get_attr(network, name).shape
        except AttributeError:  # a bias where this model has none
            raise ValueError(
                f"{path}: expected a LoRA for the weights of this model, but it has one for {shown(name, 200)}, "
                "which the model does not have. It was made for another model than this one, or the file is damaged."
            ) from None
        got, ranks = _product(patch)
        wanted = (weight[0], weight[1:].numel())
        if got is None or (got == wanted and len(set(ranks)) < 2):
            if adapter := misfit(patch, weight):
                raise ValueError(
                    f"{path}: expected a LoRA for {name}, which is {' x '.join(map(str, weight))}, got {adapter}. It "
                    "was made for another model than this one, or the file is damaged."
                )
            continue
        channels = got[1] * weight[1] / wanted[1] if len(weight) == 4 else 0
        if name == CONV_IN and got[0] == wanted[0] and len(set(ranks)) < 2 and channels in (4, 8, 9):
            other_channels = (
                f"its weight for conv_in is for a UNet of {channels:.0f} input channels, and this model has "
                f"{weight[1]} (SDXL has 4, its inpainting UNet 9)"
            )
            continue
        of_ranks = f" (ranks {ranks[0]} and {ranks[1]})" if ranks else ""
        raise ValueError(
            f"{path}: expected a LoRA of {wanted[0]} x {wanted[1]} for {name}, got {got[0]} x {got[1]}{of_ranks}. It "
            "was made for another model than this one, or the file is damaged."
        )
    return other_channels


def _product(patch) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """The rows and columns of what a patch adds to a weight, and its ranks; None where ``misfit`` looks into it."""
    if getattr(patch, "name", "") == "lora" and patch.weights[3] is None and patch.weights[5] is None:
        up, down = patch.weights[:2]  # with a middle or another target shape the product is another one
        if min(up.ndim, down.ndim) < 2:
            return None, ()
        return (up.shape[0], down.shape[1:].numel()), (up.shape[1], down.shape[0])
    if isinstance(patch, tuple) and patch[0] in ("diff", "set") and patch[1][0].ndim > 1:
        return (patch[1][0].shape[0], patch[1][0].shape[1:].numel()), ()
    return None, ()


class SiDLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDLoRALoader",
            display_name="SiD LoRA Loader",
            description="Turns any model of SDXL, SD 1.x or 2.x into a few-step generator with a distillation LoRA, "
            "and says how to sample it. Style LoRAs go through ComfyUI's own loader, before or after.",
            search_aliases=["load sid lora", "few-step lora", "distillation lora", "dmd2 lora", "lcm lora"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any model of the kind and prediction type that the LoRA was made for.",
                ),
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
                    tooltip="Use a LoRA that matches this model only in part; the node says how much is left out.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's text encoders, for a LoRA that changes them, too. Few distillation LoRAs do.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The few-step generator."),
                _recipe_output(),
                io.Clip.Output(tooltip="'clip' with the LoRA's part for text encoders."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, model, lora_name: str, strength: float, recipe: str, allow_partial: bool, clip=None
    ) -> io.NodeOutput:
        path = full_path("loras", lora_name)
        header = read_header(path, path)
        how, chosen, messages = read_recipe(path, header, recipe, SAMPLED)
        model, how, more = fit_recipe(model, how, chosen, path, header, is_lora=True)
        patched, clip, told = apply_lora(model, clip, path, header, strength, allow_partial)
        warn(cls, messages + more + told)
        # Without a CLIP there is none to give: ComfyUI takes a link to it for a missing input, and names that.
        return io.NodeOutput(remember_start(patched), how, *([clip] if clip else []))
