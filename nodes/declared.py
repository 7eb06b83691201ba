"""What a file's header says of its prediction type; ComfyUI's loaders do not read it."""

from __future__ import annotations

from collections.abc import Mapping

from ..sid_train.core.noise_schedule import X0
from ..sid_train.files.reading import shown
from ..sid_train.models.stable_diffusion.statements import UNSUPPORTED, Stated, combine, kinds, of_settings


def check_declared(metadata: Mapping[str, str], predicts: str, path: str, is_lora: bool) -> list[str]:
    """What the user should be told where the header of ``path`` and the loaded model, which ``predicts`` epsilon,
    v_prediction or x0, disagree. ValueError for a kind that few-step presets are not for, and for a LoRA of the other
    kind.
    """
    found = {kind: f"{name} is {shown(value, 40)!r}" for name, value, kind in kinds(metadata)}
    # Tools fill in epsilon for what they do not know.
    kind = next((kind for kind in (*UNSUPPORTED, "v_prediction", "epsilon") if kind in found), "")
    where = found.get(kind, "")
    if kind == "sample" and predicts == X0:
        return []
    if kind in UNSUPPORTED:
        others = " but 'Lightning (1 step)'" * (kind == "sample")
        raise ValueError(
            f"{path}: its header says that it {UNSUPPORTED[kind]} ({where}). Few-step presets{others} are not for it: "
            "sample it with ComfyUI's own nodes."
        )
    if kind in ("", predicts):
        return []
    if is_lora:
        raise ValueError(
            f"{path}: its header says that the LoRA was made for {kind} ({where}), but the model predicts {predicts}. "
            f"Load it on a model with {kind}."
        )
    told = f"{path}: its header says {kind} ({where}), but ComfyUI loaded the model as {predicts}"
    if kind == "epsilon":
        return [f"{told}, as a tensor named 'v_pred' in the file says. If pictures are noise, remove that tensor."]
    return [
        f"{told}, so that pictures will be noise. Put ModelSamplingDiscrete with 'v_prediction' (and 'zsnr' if it was "
        "trained so) after this loader, and take the recipe from SiD Recipe Override, with the same preset and that "
        "model. ComfyUI itself takes an SDXL file for v-prediction if it holds an empty tensor named 'v_pred'."
    ]


def declared(metadata: Mapping[str, str], path: str) -> Stated | None:
    """What the header of ``path`` says of prediction type and noise schedule; None where it contradicts itself, or says
    something that is not known: ``check_declared`` speaks of that. Epsilon is said by recipes alone (see there).
    """
    try:
        stated = combine(of_settings(metadata, "its header", path), path)
    except ValueError:
        return None
    is_said = stated.prediction_type == "v_prediction" or "sid.prediction_type" in metadata
    return stated if is_said else Stated(None, stated.zero_terminal_snr)
