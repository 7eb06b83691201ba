"""Right prompts for a ComfyUI server, and what makes them hostile."""

from __future__ import annotations

import json
import random

from common import ROOT
from hostile import VALUES

SIZES = {"width": 64, "height": 64}


def bases() -> list[dict]:
    """Right prompts: small ones, which take milliseconds, and the shipped ones."""

    def node(kind: str, **inputs: object) -> dict:
        return {"class_type": kind, "inputs": inputs}

    keep = dict.fromkeys(("noise_mode", "guidance"), "keep")
    recipe = node("SiDRecipeOverride", preset="SiD 625 (4 steps)", timesteps="", cfg=1.0, **keep)
    file, own = "sdxl-sid-4step-unet.safetensors", "from the file"
    unet = node("SiDDiffusionModelLoader", unet_name=file, recipe=own, weight_dtype="default")
    show = node("SiDRecipeInfo", recipe=["1", 0])
    scheduler = node("SiDScheduler", model=["1", 0], recipe=["1", 1], steps=0, denoise=1.0)
    select = node("SiDSamplerSelect", recipe=["1", 0], noise_mode="from the recipe", start="auto")
    lora = node("SiDLoRALoader", model=["1", 0], lora_name="sdxl-sid-4step-lora.safetensors", strength=1.0, recipe=own)
    lora["inputs"]["allow_partial"] = False
    preview = node("PreviewAny", source=["2", 0])
    shipped = [json.loads(path.read_text()) for path in sorted((ROOT / "workflows" / "api").glob("*.json"))]
    for prompt in shipped:
        for part in prompt.values():
            part["inputs"].update({k: v for k, v in SIZES.items() if k in part["inputs"]})
    training = [p for p in shipped if any(n["class_type"] == "SiDTrainingRecipe" for n in p.values())]
    light = [
        {"1": recipe, "2": show},
        {"1": unet, "2": node("SiDRecipeInfo", recipe=["1", 1])},
        {"1": unet, "2": scheduler, "3": preview},
        {"1": recipe, "2": select, "3": preview},
        {"1": unet, "2": lora, "3": node("SiDRecipeInfo", recipe=["2", 1])},
    ]
    return [*light * 10, *training * 24, *shipped]


def hostile(rng: random.Random, prompt: dict) -> dict:
    """One or two inputs of SiD nodes changed; sometimes the name of a node, or a node itself.

    A link is to a node that is there: one to none, in an input that its node does not declare, ends ComfyUI's own
    worker (NodeNotFoundError in ``ExecutionList.add_node``), whoever's nodes they are.
    """
    made = json.loads(json.dumps(prompt))
    ours = [key for key, node in made.items() if node["class_type"].startswith("SiD")] or list(made)
    values = [value for value in VALUES if not _is_link(value) or value[0] in made]
    for _ in range(rng.choice((1, 1, 2))):
        node = made[rng.choice(ours)]
        inputs = node["inputs"]
        name = rng.choice(sorted(inputs))
        draw = rng.random()
        if draw < 0.75:
            links = [[key, slot] for key in made for slot in range(3)]
            inputs[name] = rng.choice(links) if rng.random() < 0.15 else rng.choice(values)
        elif draw < 0.85:
            del inputs[name]
            inputs.setdefault("kept", 0)
        elif draw < 0.92:
            name = rng.choice(("x", "\x1b", "a" * 9999, "model", "recipe", "negative", "strategy"))
            inputs[name] = rng.choice(values)
        elif draw < 0.95:
            node["class_type"] = rng.choice(("SiDNone", "", "<b>", "SiDLoRALoader", "SiDRecipeInfo", "a" * 9999))
        else:
            node["inputs"] = rng.choice(({}, {"recipe": None}, {name: rng.choice(values)}))
            break
    return made


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
