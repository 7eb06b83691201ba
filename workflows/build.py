"""Writes the workflows: ``python workflows/build.py http://127.0.0.1:8188`` asks a running ComfyUI for the nodes.

Each workflow is described once below; its UI file (``NAME.json``) and its API twin (``api/NAME.json``) come from that
description, so that they agree.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sid_train.core.published import HASHES

HERE = Path(__file__).parent
CHECKPOINT = "sdxl-sid-4step.safetensors"
BASE = "sd_xl_base_1.0.safetensors"
UNET = "sdxl-sid-4step-unet.safetensors"
LORA = "sdxl-sid-4step-lora.safetensors"
CONTROLNET = "controlnet-canny-sdxl-1.0.safetensors"
PROMPT = "a lighthouse on a cliff at dawn, crashing waves, volumetric light, photograph"
NEGATIVE = "people, text, blurry"
DMD2 = "dmd2_sdxl_4step_lora_fp16.safetensors"
HUB = "https://huggingface.co"
# Files that anyone may download: ComfyUI offers it where one is missing. Hashes are the hub's own.
PUBLIC = {
    BASE: {
        "name": BASE,
        "url": f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{BASE}",
        "hash": "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
        "hash_type": "SHA256",
        "directory": "checkpoints",
    },
    DMD2: {
        "name": DMD2,
        "url": f"{HUB}/tianweiy/DMD2/resolve/main/{DMD2}",
        "hash": HASHES["tianweiy/DMD2"][DMD2.removesuffix(".safetensors")],
        "hash_type": "SHA256",
        "directory": "loras",
    },
}
OURS = {"cnr_id": "sid-few-step", "ver": version("sid-few-step")}
CORE = {"cnr_id": "comfy-core", "ver": "0.3.64"}  # the oldest that the workflows run on
COLUMN, ROW_GAP = 380, 60
# Room for a text, a picture or the preview that a sampler shows while it runs.
EXTRA_HEIGHT = {
    "CLIPTextEncode": 90,
    "SaveImage": 260,
    "LoadImage": 260,
    "SiDFewStepSampler": 220,
    "SamplerCustomAdvanced": 220,
    "SiDRecipeInfo": 300,
    "SiDTrainingRecipe": 200,
}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


class Link:
    """An output of a node."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot


class Node:
    """One node: ``node[0]`` is its first output. ``column`` places it, left to right.

    after_run: what the frontend does with the seed, ``randomize`` or ``fixed``
    """

    def __init__(self, kind: str, column: int, title: str = "", after_run: str = "randomize", **inputs: Any):
        self.kind, self.column, self.title, self.after_run, self.inputs = kind, column, title, after_run, inputs

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


def text_to_image() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    sampler = Node(
        "SiDFewStepSampler", 2, model=loader[0], positive=prompt[0], latent_image=latent[0], recipe=loader[3]
    )
    return [loader, prompt, latent, sampler, *picture(sampler[0], loader[2], 3, "sid")], (
        f"# Text to image\n\nPut a SiD checkpoint into `models/checkpoints` ({CHECKPOINT} stands for it) and pick it "
        "in the loader. Its recipe says how to sample it: nothing else has to be set.\n\nA file without a recipe "
        "(DMD2, LCM, Lightning) works too: set `recipe` in the loader to what it was distilled as."
    )


def custom_sampling() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    noise = Node("RandomNoise", 2, noise_seed=0)
    guider = Node("SiDGuidance", 2, model=loader[0], positive=prompt[0], recipe=loader[3])
    select = Node("SiDSamplerSelect", 2, recipe=loader[3])
    sigmas = Node("SiDScheduler", 2, model=loader[0], recipe=loader[3])
    sampler = Node(
        "SamplerCustomAdvanced",
        3,
        noise=noise[0],
        guider=guider[0],
        sampler=select[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    nodes = [loader, prompt, latent, noise, guider, select, sigmas, sampler]
    return [*nodes, *picture(sampler[0], loader[2], 4, "sid_custom")], (
        "# Text to image, custom sampling\n\nThe same picture as with SiD Few-Step Sampler, bit for bit, from "
        f"ComfyUI's SamplerCustomAdvanced. Put the checkpoint into `models/checkpoints` ({CHECKPOINT} stands for it)."
    )


def diffusion_model() -> tuple[list[Node], str]:
    few = Node("SiDDiffusionModelLoader", 0, unet_name=UNET)
    loader = Node("CheckpointLoaderSimple", 0, ckpt_name=BASE)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    info = Node("SiDRecipeInfo", 1, "What the file says", recipe=few[1])
    override = Node("SiDRecipeOverride", 2, recipe=few[1], noise_mode="fixed")
    sampler = Node("SiDFewStepSampler", 3, model=few[0], positive=prompt[0], latent_image=latent[0], recipe=override[0])
    nodes = [few, loader, prompt, latent, info, override, sampler]
    return [*nodes, *picture(sampler[0], loader[2], 4, "sid_unet")], (
        "# A diffusion model and its recipe\n\nA UNet without text encoders and VAE goes into "
        f"`models/diffusion_models` ({UNET} stands for it); they come from any SDXL checkpoint ({BASE}).\n\nSiD "
        "Recipe Info shows what the file says. SiD Recipe Override changes it, here the noise between steps: an "
        "experiment. Bypass it to sample the model as it was trained."
    )


def training_recipe() -> tuple[list[Node], str]:
    strategy = Node("SiDDistillationGuidance", 0, strategy="lsg")
    prompts = "a lighthouse on a cliff at dawn\na bowl of cherries, oil painting\nan astronaut feeding pigeons"
    recipe = Node("SiDTrainingRecipe", 1, teacher=BASE, prompts=prompts, strategy=strategy[0])
    return [strategy, recipe], (
        "# Distil your own checkpoint\n\nWrites the configuration of a distillation and shows the command that runs "
        "it in a terminal; it trains nothing itself. The teacher is any SDXL checkpoint in `models/checkpoints` "
        f"({BASE} stands for it). Three prompts are an example: a real run wants thousands, so give the path of a "
        "file."
    )


def lora() -> tuple[list[Node], str]:
    return on_sdxl(LORA, "sid_lora"), (
        "# A SiD LoRA on any SDXL checkpoint\n\nAny SDXL checkpoint goes into `models/checkpoints`, the SiD LoRA "
        f"({LORA} stands for it) into `models/loras`. The LoRA's recipe says how to sample the two together."
    )


def dmd2() -> tuple[list[Node], str]:
    return on_sdxl(DMD2, "dmd2"), (
        "# SDXL in four steps, with public files\n\nComfyUI offers to download what is missing: SDXL's base "
        "checkpoint (6.9 GB) and DMD2's LoRA (0.8 GB).\n\nThe LoRA does not say how it is to be sampled. The loader "
        "knows it by its content or its name, and says so: 999 749 499 249, as it was trained."
    )


def on_sdxl(name: str, prefix: str) -> list[Node]:
    """A LoRA on SDXL's base checkpoint, to a picture."""
    loader = Node("CheckpointLoaderSimple", 0, ckpt_name=BASE)
    few = Node("SiDLoRALoader", 1, model=loader[0], lora_name=name)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    sampler = Node("SiDFewStepSampler", 2, model=few[0], positive=prompt[0], latent_image=latent[0], recipe=few[1])
    return [loader, few, prompt, latent, sampler, *picture(sampler[0], loader[2], 3, prefix)]


def image_to_image() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    image = Node("LoadImage", 0, image="example.png")
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("VAEEncode", 1, pixels=image[0], vae=loader[2])
    sampler = Node(
        "SiDFewStepSampler",
        2,
        model=loader[0],
        positive=prompt[0],
        latent_image=latent[0],
        recipe=loader[3],
        denoise=0.75,
    )
    return [loader, image, prompt, latent, sampler, *picture(sampler[0], loader[2], 3, "sid_img2img")], (
        "# Image to image\n\n`denoise` below 1 runs the last of the trained timesteps, starting from your picture: "
        "with 4 steps, 0.75 runs 3, 0.5 runs 2, 0.25 runs 1. A one-step generator cannot do this.\n\nThe checkpoint "
        f"goes into `models/checkpoints` ({CHECKPOINT} stands for it)."
    )


def inpainting() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    image = Node("LoadImage", 0, image="example.png")
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("VAEEncode", 1, pixels=image[0], vae=loader[2])
    masked = Node("SetLatentNoiseMask", 2, samples=latent[0], mask=image[1])
    sampler = Node(
        "SiDFewStepSampler", 2, model=loader[0], positive=prompt[0], latent_image=masked[0], recipe=loader[3]
    )
    nodes = [loader, image, prompt, latent, masked, sampler]
    return [*nodes, *picture(sampler[0], loader[2], 3, "sid_inpaint")], (
        "# Inpainting\n\nPaint the mask in LoadImage (right click, Open in MaskEditor). What is outside it stays as "
        f"it is. The checkpoint goes into `models/checkpoints` ({CHECKPOINT} stands for it)."
    )


def controlnet() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    image = Node("LoadImage", 0, image="example.png")
    control = Node("ControlNetLoader", 0, control_net_name=CONTROLNET)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    nothing = Node("CLIPTextEncode", 1, "Negative (ignored)", text="", clip=loader[1])
    edges = Node("Canny", 1, image=image[0], low_threshold=0.4, high_threshold=0.8)
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    apply = Node(
        "ControlNetApplyAdvanced",
        2,
        positive=prompt[0],
        negative=nothing[0],
        control_net=control[0],
        image=edges[0],
        strength=0.7,
    )
    sampler = Node("SiDFewStepSampler", 2, model=loader[0], positive=apply[0], latent_image=latent[0], recipe=loader[3])
    nodes = [loader, image, control, prompt, nothing, edges, latent, apply, sampler]
    return [*nodes, *picture(sampler[0], loader[2], 3, "sid_controlnet")], (
        f"# ControlNet\n\nAny SDXL ControlNet goes into `models/controlnet` ({CONTROLNET} stands for it), the "
        f"checkpoint into `models/checkpoints` ({CHECKPOINT} stands for it). Only the positive side is sampled. "
        "Start and end percentages count timesteps from 999, and a four-step generator's first is 625: what ends "
        "before 37.4% does nothing."
    )


def hires_fix() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    common: dict[str, Any] = {"model": loader[0], "positive": prompt[0], "recipe": loader[3]}
    first = Node("SiDFewStepSampler", 2, "First pass", latent_image=latent[0], **common)
    larger = Node("LatentUpscaleBy", 3, samples=first[0], upscale_method="bislerp", scale_by=1.5)
    second = Node("SiDFewStepSampler", 3, "Second pass", latent_image=larger[0], denoise=0.5, seed=1, **common)
    return [loader, prompt, latent, first, larger, second, *picture(second[0], loader[2], 4, "sid_hires")], (
        "# Hires fix in two passes\n\nThe second pass runs the last two trained timesteps on the enlarged latent "
        f"(`denoise` 0.5). The checkpoint goes into `models/checkpoints` ({CHECKPOINT} stands for it)."
    )


def guidance_grid() -> tuple[list[Node], str]:
    loader = Node("SiDCheckpointLoader", 0, ckpt_name=CHECKPOINT)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    negative = Node("CLIPTextEncode", 1, "Negative prompt", text=NEGATIVE, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    nodes, pictures = [loader, prompt, negative, latent], []
    for number, mode in enumerate(("none", "nag", "cfg", "cfg first step only")):
        sampler = Node(
            "SiDFewStepSampler",
            2 + number % 2,
            f"guidance: {mode}",
            "fixed",
            model=loader[0],
            positive=prompt[0],
            negative=negative[0],
            latent_image=latent[0],
            recipe=loader[3],
            guidance=mode,
        )
        decoded = Node("VAEDecode", 4, samples=sampler[0], vae=loader[2])
        nodes += [sampler, decoded]
        pictures.append(decoded[0])
    rows = [Node("ImageStitch", 5, image1=pictures[i], image2=pictures[i + 1], direction="right") for i in (0, 2)]
    grid = Node("ImageStitch", 6, image1=rows[0][0], image2=rows[1][0], direction="down")
    return [*nodes, *rows, grid, Node("SaveImage", 6, images=grid[0], filename_prefix="sid_guidance")], (
        "# Guidance modes side by side\n\nThe same seed without a negative prompt (top left), with it by `nag` (top "
        "right, no extra network call), by `cfg` (bottom left, two calls a step) and by `cfg first step only` "
        f"(bottom right). The checkpoint goes into `models/checkpoints` ({CHECKPOINT} stands for it)."
    )


def native() -> tuple[list[Node], str]:
    loader = Node("CheckpointLoaderSimple", 0, ckpt_name=CHECKPOINT)
    prompt = Node("CLIPTextEncode", 1, "Prompt", text=PROMPT, clip=loader[1])
    latent = Node("EmptyLatentImage", 1, width=1024, height=1024)
    noise = Node("RandomNoise", 2, noise_seed=0)
    guider = Node("BasicGuider", 2, model=loader[0], conditioning=prompt[0])
    select = Node("KSamplerSelect", 2, sampler_name="lcm")
    sigmas = Node("BasicScheduler", 2, model=loader[0], scheduler="simple", steps=4, denoise=0.63)
    sampler = Node(
        "SamplerCustomAdvanced",
        3,
        noise=noise[0],
        guider=guider[0],
        sampler=select[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    nodes = [loader, prompt, latent, noise, guider, select, sigmas, sampler]
    return [*nodes, *picture(sampler[0], loader[2], 4, "native")], (
        "# Without this pack\n\nAs near as ComfyUI's own nodes get to a four-step generator that was trained from "
        "timestep 625: `lcm` on `simple` with denoise 0.63 runs 666 499 333 166 where it was trained on 625 468 312 "
        "156, with other noise between the steps.\n\nIt is another picture (on a test model the latents differ from "
        "the SiD nodes' by 0.7 of their size, those of another seed by 1.3). See docs/comfyui.md."
    )


def picture(latent: Link, vae: Link, column: int, prefix: str) -> list[Node]:
    decoded = Node("VAEDecode", column, samples=latent, vae=vae)
    return [decoded, Node("SaveImage", column, images=decoded[0], filename_prefix=prefix)]


WORKFLOWS = {
    "text_to_image": text_to_image,
    "text_to_image_custom_sampling": custom_sampling,
    "diffusion_model_and_recipe": diffusion_model,
    "lora_on_any_checkpoint": lora,
    "dmd2_with_public_files": dmd2,
    "image_to_image": image_to_image,
    "inpainting": inpainting,
    "controlnet": controlnet,
    "hires_fix": hires_fix,
    "guidance_modes": guidance_grid,
    "native_fallback": native,
    "training_recipe": training_recipe,
}


def is_widget(spec: list) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def default_of(spec: list) -> Any:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options", [])
    return choices[0] if choices else ""


def properties(node: Node, definition: dict) -> dict[str, Any]:
    """What ComfyUI finds a missing node, or a missing file, by."""
    is_ours = definition["python_module"].startswith("custom_nodes.")
    files = [PUBLIC[value] for value in node.inputs.values() if isinstance(value, str) and value in PUBLIC]
    return {"Node name for S&R": node.kind, **(OURS if is_ours else CORE), **({"models": files} if files else {})}


def build(nodes: list[Node], note: str, definitions: dict) -> tuple[dict, dict]:
    """The UI and the API form of a workflow."""
    numbers = {id(node): i for i, node in enumerate(nodes, 1)}
    bottoms: dict[int, int] = {}
    ui_nodes, links, api = [], [], {}
    outgoing: dict[tuple[int, int], list[int]] = {}
    for node in nodes:
        number, definition = numbers[id(node)], definitions[node.kind]
        specs = definition["input"].get("required", {}) | definition["input"].get("optional", {})
        unknown = set(node.inputs) - set(specs)
        assert not unknown, (node.kind, unknown)
        inputs, widgets, values = [], [], {}
        for name, spec in specs.items():
            given = node.inputs.get(name)
            if isinstance(given, Link):
                source = numbers[id(given.node)]
                links.append([len(links) + 1, source, given.slot, number, len(inputs), spec[0]])
                outgoing.setdefault((source, given.slot), []).append(len(links))
                inputs.append({"name": name, "type": spec[0], "link": len(links)})
                values[name] = [str(source), given.slot]
            elif is_widget(spec):
                value = given if given is not None else default_of(spec)
                widgets.append(value)
                values[name] = value
                if len(spec) > 1 and (spec[1].get("control_after_generate") or spec[1].get("image_upload")):
                    widgets.append(node.after_run if spec[1].get("control_after_generate") else "image")
            else:
                inputs.append({"name": name, "type": spec[0], "link": None})
        top = bottoms.get(node.column, 0)
        height = 60 + 26 * (max(len(inputs), len(definition["output"])) + len(widgets))
        height += EXTRA_HEIGHT.get(node.kind, 0)
        bottoms[node.column] = top + height + ROW_GAP
        title = {"title": node.title} if node.title else {}
        ui_nodes.append(
            {
                "id": number,
                "type": node.kind,
                "pos": [COLUMN * node.column, top],
                "size": [COLUMN - 70, height],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                **title,
                "inputs": inputs,
                "outputs": [
                    {"name": name, "type": kind, "links": []}
                    for name, kind in zip(definition["output_name"], definition["output"], strict=True)
                ],
                "properties": properties(node, definition),
                "widgets_values": widgets,
            }
        )
        meta = {"_meta": {"title": node.title or definition["display_name"] or node.kind}}
        api[str(number)] = {"class_type": node.kind, "inputs": values, **meta}
    for (number, slot), made in outgoing.items():
        ui_nodes[number - 1]["outputs"][slot]["links"] = made
    ui_nodes.append(
        {
            "id": len(nodes) + 1,
            "type": "MarkdownNote",
            "pos": [-COLUMN, 0],
            "size": [COLUMN - 40, 300],
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [note],
        }
    )
    ui = {
        "last_node_id": len(ui_nodes),
        "last_link_id": len(links),
        "nodes": ui_nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
    return ui, api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a running ComfyUI that has this pack")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/object_info") as answer:
        definitions = json.load(answer)
    for name, describe in WORKFLOWS.items():
        ui, api = build(*describe(), definitions)
        (HERE / f"{name}.json").write_text(json.dumps(ui, indent=1) + "\n")
        (HERE / "api" / f"{name}.json").write_text(json.dumps(api, indent=1) + "\n")


if __name__ == "__main__":
    main()
