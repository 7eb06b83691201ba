"""One check for each type of input, before a node looks at it: a wrong value is one line that names the input.

ComfyUI checks widgets of its own accord, but takes NaN for a number in any range, and hands on what comes through a
link as it is.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..sid_train.core.architectures import SAMPLED, SDXL, Architecture
from ..sid_train.core.recipe import SiDRecipe
from ..sid_train.files.reading import half_character, shown
from ..sid_train.method.guidance import GuidanceStrategy

# ComfyUI draws the noise of all images before the one that is asked for: so many of any size, and so many figures.
MAX_PLACES, MAX_FIGURES = 1 << 16, 1 << 29
MAX_ERROR = 2000  # characters


def checked(execute: Callable) -> Callable:
    """Around ``execute`` of a node, inside its classmethod: checks all inputs by the types in the node's schema.

    What ``execute`` itself says is wrong leaves as one line that can be printed, too: it quotes files and workflows.
    """

    @functools.wraps(execute)
    def check_and_execute(node: type[io.ComfyNode], **values: Any) -> io.NodeOutput:
        try:
            inputs = node.define_schema().inputs
            if unknown := values.keys() - {declared.id for declared in inputs}:  # ComfyUI hands on any link
                known = ", ".join(declared.id for declared in inputs)
                raise ValueError(f"{shown(min(unknown), 100)}: expected one of this node's inputs ({known})")
            for declared in inputs:
                value = values.get(declared.id)
                if declared.id in values and not (value is None and declared.optional):
                    CHECKS[str(declared.get_io_type())](declared.id, value, declared)
            return execute(node, **values)
        except (ValueError, OSError) as error:
            if (text := shown(error, MAX_ERROR)) == str(error):
                raise
            raise ValueError(text) from error

    return check_and_execute


def _wrong(name: str, expected: str, value: object, what_to_do: str = "") -> ValueError:
    if isinstance(value, Tensor):
        shape, kind = "x".join(map(str, value.shape)) or "one number", str(value.dtype).removeprefix("torch.")
        got = f"a tensor of {shape} ({kind})"
    elif isinstance(value, str):
        got = repr(shown(value, 100))
    elif isinstance(value, int) and value.bit_length() > 128:  # Python refuses to write the longest
        got = f"one of {value.bit_length():,} bits"
    elif isinstance(value, bool | int | float):
        got = str(value)
    else:
        got = "nothing" if value is None else f"a value of type {type(value).__name__}"
    return ValueError(f"{name}: expected {expected}, got {got}{'. ' if what_to_do else ''}{what_to_do}")


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


# -- widgets -----------------------------------------------------------------------------------------------------


def check_number(name: str, value: Any, declared: Any) -> None:
    is_integer = declared.get_io_type() == "INT"
    fits = isinstance(value, numbers.Integral if is_integer else numbers.Real) and not isinstance(value, bool)
    if not fits or not declared.min <= value <= declared.max:  # NaN is in no range
        kind = "an integer" if is_integer else "a number"
        raise _wrong(name, f"{kind} from {declared.min} to {declared.max}", value)


def check_boolean(name: str, value: Any, declared: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)


def check_text(name: str, value: Any, declared: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    if (place := half_character(value)) >= 0:
        raise ValueError(f"{name}: character {place + 1:,} is half of one (a lone surrogate): type it again")


def check_combo(name: str, value: Any, declared: Any) -> None:
    """Lists of files have no default, and change: ComfyUI says where there is no such file."""
    check_text(name, value, declared)
    if declared.default is not None and value not in declared.options:  # ComfyUI 0.3.64 lets any text through
        raise _wrong(name, f"one of {', '.join(declared.options)}", value)


# -- sockets -----------------------------------------------------------------------------------------------------


def check_recipe(name: str, value: Any, declared: Any) -> None:
    if not isinstance(value, SiDRecipe):
        raise _wrong(name, "a recipe", value, "Connect 'recipe' of a SiD loader or of SiD Recipe Override.")


def check_strategy(name: str, value: Any, declared: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(name, "a strategy", value, "Connect SiD Distillation Guidance.")
    try:
        GuidanceStrategy.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Connect SiD Distillation Guidance.") from None


def check_model_patcher(name: str, value: Any, declared: Any) -> None:
    wanted = ("model", "model_options", "clone", "get_model_object", "add_wrapper_with_key")
    if not all(hasattr(value, attribute) for attribute in wanted):
        raise _wrong(name, "a MODEL", value, "Connect 'MODEL' of a SiD loader.")


def check_clip(name: str, value: Any, declared: Any) -> None:
    if not all(hasattr(value, attribute) for attribute in ("cond_stage_model", "clone", "add_patches")):
        raise _wrong(name, "a CLIP", value, "Connect 'CLIP' of a checkpoint loader.")


def check_vae(name: str, value: Any, declared: Any) -> None:
    if not all(hasattr(value, attribute) for attribute in ("decode", "encode")):
        raise _wrong(name, "a VAE", value, "Connect 'VAE' of a checkpoint loader.")


def check_conditioning(name: str, value: Any, declared: Any) -> None:
    """ValueError unless CONDITIONING is as text encoders of SD 1.x, 2.x or SDXL make it. Which of these the model is,
    ``check_prompt`` asks.
    """
    cure = "Connect CLIP Text Encode to the CLIP of the model's checkpoint."
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if isinstance(value, list | tuple) else value
        raise _wrong(name, "CONDITIONING", what, cure)
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            raise _wrong(name, "CONDITIONING whose parts are a tensor and a dictionary", entry, cure)
        text, pooled = entry[0], entry[1].get("pooled_output")
        for what, tensor, axes in (("a tensor of tokens", text, 3), ("a pooled tensor", pooled, 2)):
            if axes == 2 and (tensor is None or not _reads_pooled(text)):
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim != axes:
                raise _wrong(name, f"CONDITIONING with {what} of {axes} axes", tensor, cure)
            if tensor.numel() == 0:
                raise _wrong(name, f"CONDITIONING with {what} that is not empty", tensor, cure)
        of_width = [known for known in SAMPLED.values() if known.text_width == text.shape[-1]]
        check_prompt(name, [entry], of_width[0] if of_width else SDXL)
        if not _is_finite(text) or (_reads_pooled(text) and not _is_finite(pooled)):
            raise ValueError(
                f"{name}: the encoded prompt holds NaN or infinity: the text encoders' weights are damaged, or a node "
                "between them and this one made it. Load another CLIP."
            )


def _reads_pooled(text: Tensor) -> bool:
    return any(known.pooled_width for known in SAMPLED.values() if known.text_width == text.shape[-1])


def check_prompt(name: str, conditioning: Any, architecture: Architecture) -> None:
    """ValueError unless CONDITIONING, whose form ``check_conditioning`` saw, is for models of ``architecture``."""
    for text, extra in conditioning:
        pooled = extra.get("pooled_output")
        widths = text.shape[-1], 0 if pooled is None else pooled.shape[-1]
        wanted = architecture.text_width, architecture.pooled_width
        if widths[0] != wanted[0] or (wanted[1] and widths[1] != wanted[1]):
            both = f"{wanted[0]} wide" + f", pooled {wanted[1]}" * bool(wanted[1])
            raise ValueError(
                f"{name}: expected a prompt encoded by the text encoders of {architecture.people} ({both}), got "
                f"{widths[0]} wide, pooled {widths[1] or 'missing'}. Connect CLIP Text Encode to the CLIP of a "
                f"checkpoint of {architecture.people}."
            )


def check_latent(name: str, value: Any, declared: Any) -> None:
    """Its channels are checked where the model is known."""
    cure = "Use Empty Latent Image, or VAE Encode with the model's VAE."
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if samples is None:
        raise _wrong(name, "a LATENT", value, cure)
    if getattr(samples, "is_nested", False):
        raise ValueError(f"{name}: expected a latent, got several latents. {cure}")
    expected = "a latent (batch x 4 channels x height x width)"
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.numel() == 0 or samples.ndim < 4:
        raise _wrong(name, expected, samples, cure)
    if not _is_finite(samples):
        raise ValueError(f"{name}: the latent holds NaN or infinity: the node that made it has a damaged model or VAE.")
    mask = value.get("noise_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.is_complex() or mask.numel() == 0 or not 2 <= mask.ndim <= 4:
            raise _wrong(name, "a noise_mask of height x width", mask, "Use Set Latent Noise Mask.")
        if not _is_finite(mask):
            raise ValueError(f"{name}: its noise_mask holds NaN or infinity. Use Set Latent Noise Mask.")
    places = value.get("batch_index")
    if places is not None:
        limit = max(len(samples), min(MAX_PLACES, MAX_FIGURES // samples[0].numel()))
        expected = f"batch_index with {len(samples)} places from 0 to {limit - 1}"
        if not isinstance(places, list | tuple) or len(places) != len(samples):
            raise _wrong(name, expected, places, "Use Latent From Batch.")
        for place in places:
            if not isinstance(place, numbers.Integral) or not 0 <= place < limit:
                raise _wrong(name, expected, place, "Use Latent From Batch.")


CHECKS: dict[str, Callable[[str, Any, Any], None]] = {
    "INT": check_number,
    "FLOAT": check_number,
    "BOOLEAN": check_boolean,
    "STRING": check_text,
    "COMBO": check_combo,
    "MODEL": check_model_patcher,
    "CLIP": check_clip,
    "VAE": check_vae,
    "CONDITIONING": check_conditioning,
    "LATENT": check_latent,
    "SID_RECIPE": check_recipe,
    "SID_STRATEGY": check_strategy,
}
"""By the type of input: (its name, the value, what the schema says of it) -> ValueError where it is wrong."""
