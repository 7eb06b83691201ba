"""Whether a file fills the network that ComfyUI made for it, and whether its weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..sid_train.files.reading import shown
from ..sid_train.models.stable_diffusion.keys import BESIDE_WEIGHTS, EDM_MARKERS, MARKERS, SCALED_FP8

# Where ComfyUI looks for a UNet's tensors.
PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.", "")
# ComfyUI reads them, and no layer has them.
SAY_WHAT_IT_IS = {*MARKERS, *EDM_MARKERS, SCALED_FP8}


@contextmanager
def loading(path: str, expected: str) -> Iterator[None]:
    """Around ComfyUI's loading of a file: a ValueError that names it and says what is wrong with it.

    expected: what the file should be, with an article
    """
    try:
        yield
    except (MemoryError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # ComfyUI says what to do
            raise
        reason = f"it cannot be loaded: {shown(str(error) or type(error).__name__, 600)}"
        if isinstance(error, KeyError):
            reason = f"a tensor is missing: {shown(error, 200)}. Copy or download it again, or repeat the merge."
        elif "detect model type" in str(error):
            reason = (
                "ComfyUI finds no diffusion model in it. A LoRA goes into models/loras and SiD LoRA Loader, a VAE or a "
                "text encoder into ComfyUI's own loaders."
            )
        raise ValueError(f"{path}: expected {expected}, but {reason}") from error


def check_unet(model, names: Iterable[str], path: str) -> list[str]:
    """What the user should be told about a file with tensors ``names``, of which ComfyUI made MODEL.

    ValueError where tensors of the UNet are missing, which ComfyUI leaves uninitialised, or where weights are NaN or
    infinite. Of weights with rows the first and the last row are looked at: reading all would take seconds, and what a
    failed merge or an overflow leaves behind fills whole tensors. The samplers look at what the network predicts.
    """
    network = model.model.diffusion_model
    # ComfyUI has scales of its own for scaled and quantised weights: under other names than the file's, or for layers
    # for which the file needs none.
    expected = {name for name in network.state_dict() if not name.endswith(BESIDE_WEIGHTS)}
    # A quantised layer without its weight has none, and none in the state.
    layers = ((name, layer) for name, layer in network.named_modules() if hasattr(layer, "in_features"))
    expected |= {f"{name}.weight" for name, layer in layers if layer.weight is None}
    to_ldm = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    names = {to_ldm.get(name, name) for name in names}
    found = max(
        ({name.removeprefix(prefix) for name in names if name.startswith(prefix)} for prefix in PREFIXES),
        key=lambda candidates: len(candidates & expected),
    )
    if missing := sorted(expected - found):
        raise ValueError(
            f"{path}: expected all {len(expected):,} tensors of this UNet, but {len(missing):,} are missing; the first "
            f"is {shown(missing[0], 200)}. Copy or download it again, or repeat the merge or conversion that made it."
        )
    ends = {name: weight[[0, -1]] if weight.ndim > 1 else weight for name, weight in _plain_weights(network)}
    check_numbers(ends, path)
    unused = sorted(n for n in found - expected if n not in SAY_WHAT_IT_IS and not n.endswith(BESIDE_WEIGHTS))
    if not unused:
        return []
    return [
        f"{len(unused):,} tensors of the file belong to no part of this UNet and are not used; the first is "
        f"{shown(unused[0], 200)}."
    ]


def check_numbers(tensors: Mapping[str, Tensor], path: str) -> None:
    """ValueError where some of ``tensors`` hold NaN or infinity."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
    if bad:
        raise ValueError(
            f"{path}: {len(bad):,} of its tensors hold NaN or infinity, which makes black pictures; the first is "
            f"{shown(bad[0], 200)}. Copy or download it again, or repeat the training or merge that made it."
        )


def _plain_weights(network) -> Iterator[tuple[str, Tensor]]:
    """Those that are tensors of numbers as they are: some quantised ones cannot be asked for rows."""
    for name, parameter in network.named_parameters():
        if type(parameter.data) is Tensor and parameter.device.type != "meta" and parameter.numel():
            yield name, parameter.data
