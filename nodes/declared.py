"""What a file's header says of its prediction type; ComfyUI's SDXL loader does not read it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..sid_train.files.reading import shown

# Spelled without punctuation, in lower case, after the prefixes of the model metadata standard and of kohya's trainers.
TYPE_KEYS = {"predictkey", "predictiontype", "predtype", "parameterization"}
V_KEYS = {"vparameterization", "vpred", "vprediction"}
FLOW_KEYS = {"flowmatching", "rectifiedflow"}
KINDS = {
    **dict.fromkeys(("epsilon", "eps", "epsilonprediction", "epsprediction"), "epsilon"),
    **dict.fromkeys(("v", "vpred", "vprediction", "vparameterization"), "v_prediction"),
    **dict.fromkeys(("flow", "flowmatching", "flowprediction", "rectifiedflow"), "flow"),
    **dict.fromkeys(("edm", "edmvpred", "edmvprediction"), "edm"),
}
UNSUPPORTED = {"flow": "a flow-matching model", "edm": "an EDM model"}


def declared_type(metadata: Mapping[str, str]) -> tuple[str, str]:
    """(epsilon, v_prediction, flow or edm; where it says so), or two empty strings where nothing is said."""
    found = {}
    for name, value in metadata.items():
        key, said = _plain(re.sub(r"^(modelspec\.|ss_|sid\.)", "", name[:100])), _plain(value)
        is_so = {"true": True, "1": True, "false": False, "0": False}.get(said)
        kind = None
        if key in TYPE_KEYS:
            kind = KINDS.get(said)
        elif key in V_KEYS and is_so is not None:
            kind = "v_prediction" if is_so else "epsilon"
        elif key in FLOW_KEYS and is_so:
            kind = "flow"
        if kind is not None:
            found[kind] = f"{name} is {shown(value, 40)!r}"
    # Tools fill in epsilon for what they do not know.
    for kind in ("flow", "edm", "v_prediction", "epsilon"):
        if kind in found:
            return kind, found[kind]
    return "", ""


def check_declared(metadata: Mapping[str, str], predicts: str, path: str, is_lora: bool) -> list[str]:
    """What the user should be told where the header of ``path`` and the loaded model, which ``predicts`` epsilon or
    v_prediction, disagree. ValueError for a kind that few-step presets are not for, and for a LoRA of the other kind.
    """
    kind, where = declared_type(metadata)
    if kind in UNSUPPORTED:
        raise ValueError(
            f"{path}: its header says that it is {UNSUPPORTED[kind]} ({where}). Few-step presets are not for it: "
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
        "model. ComfyUI itself takes a file for v-prediction if it holds an empty tensor named 'v_pred'."
    ]


def _plain(value: str) -> str:
    return re.sub(r"[^a-z0-9]", "", value[:100].lower())
