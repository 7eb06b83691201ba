"""Every shipped workflow, run through a real ComfyUI server."""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.request
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sid_train.config import load_config

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(p.stem for p in WORKFLOWS.glob("*.json"))
SMALL = {"width": 128, "height": 128}


def api(name: str) -> dict:
    """A workflow's API twin, its picture made small."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    for node in prompt.values():
        node["inputs"].update({k: v for k, v in SMALL.items() if k in node["inputs"]})
    return prompt


def test_all_workflows_are_there():
    assert len(NAMES) == 12
    assert sorted(p.stem for p in (WORKFLOWS / "api").glob("*.json")) == NAMES
    for name in NAMES:
        assert Image.open(WORKFLOWS / f"{name}.jpg").size[0] >= 256


@pytest.mark.parametrize("name", [name for name in NAMES if name != "training_recipe"])
def test_runs_to_a_picture(server, name):
    prompt = api(name)
    outputs = server.run(prompt)
    saved = [node for node, content in prompt.items() if content["class_type"] == "SaveImage"]
    assert saved
    for node in saved:
        picture = np.asarray(Image.open(server.picture(outputs[node])))
        assert picture.std() > 1


def test_training_recipe_is_written(server):
    prompt = api("training_recipe")
    (node,) = (node for node, content in prompt.items() if content["class_type"] == "SiDTrainingRecipe")
    (text,) = server.run(prompt)[node]["text"]
    path = server.base / "output" / "sid_train" / "my-sid.toml"
    assert f"python -m sid_train distill --config {path} --out runs/my-sid" in text
    config = load_config(str(path))
    assert config.model.teacher == str(server.base / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors")
    assert config.method.guidance == "lsg=1.5"
    assert len(Path(config.data.prompts).read_text().splitlines()) == 3


def test_both_text_to_image_workflows_give_the_same_picture(server):
    pictures = []
    for name in ("text_to_image", "text_to_image_custom_sampling"):
        prompt = api(name)
        outputs = server.run(prompt)
        (node,) = (node for node, content in prompt.items() if content["class_type"] == "SaveImage")
        pictures.append(np.asarray(Image.open(server.picture(outputs[node]))))
    assert np.array_equal(*pictures)


def test_every_node_has_a_help_page_and_tooltips(server):
    info = {k: v for k, v in server.get("/object_info").items() if k.startswith("SiD")}
    assert len(info) == 14
    for name, node in info.items():
        assert node["category"] == "SiD"
        assert node["display_name"].startswith("SiD ")
        assert node["description"]
        for kind in ("required", "optional"):
            for key, spec in node["input"].get(kind, {}).items():
                assert spec[1]["tooltip"], (name, key)
        assert all(node["output_tooltips"]), name
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-SiD/docs/{name}.md", timeout=30) as page:
            assert page.read().decode().startswith(f"# {node['display_name']}\n")


def test_workflows_are_templates(server):
    assert sorted(server.get("/workflow_templates")["ComfyUI-SiD"]) == NAMES


def test_checkpoints_loaded_one_after_the_other_do_not_leak(server):
    """Two names of one file, so that each prompt loads anew; a UNet that stayed would add twice its fp16 file.

    The median, since a single load can add or free a whole checkpoint, which ComfyUI itself keeps for a while.
    """
    prompt = api("text_to_image")
    (loader,) = (content for content in prompt.values() if content["class_type"] == "SiDCheckpointLoader")
    names = ["sd_xl_base_1.0.safetensors", "sdxl-sid-4step.safetensors"]
    taken = []
    for turn in range(7):
        loader["inputs"]["ckpt_name"] = names[turn % 2]
        server.run(prompt)
        taken.append(psutil.Process(server.process.pid).memory_full_info().uss)  # without pages of mapped files
    growth = [after - before for before, after in pairwise(taken[1:])]
    unet = (server.base / "models" / "diffusion_models" / "sdxl-sid-4step-unet.safetensors").stat().st_size
    assert statistics.median(growth) < unet, [f"{g / 2**20:.0f} MiB" for g in growth]


def test_interrupt_stops_within_a_step(server):
    prompt = api("text_to_image")
    for node in prompt.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update({"width": 768, "height": 768})
        if node["class_type"] == "SiDFewStepSampler":
            node["inputs"].update({"steps": 8, "seed": 99})
    earlier = len(server.log.read_text())

    def steps_done() -> int:
        return max((int(n) for n in re.findall(r"(\d)/8", server.log.read_text()[earlier:])), default=0)

    prompt_id = server.queue(prompt)
    while steps_done() < 1:
        time.sleep(0.05)
    before = steps_done()
    server.post("/interrupt", {})
    entry = server.wait(prompt_id, timeout=60)
    assert any(message[0] == "execution_interrupted" for message in entry["status"]["messages"])
    assert steps_done() <= before + 1


def test_error_reaches_the_user(server):
    prompt = api("text_to_image")
    for node in prompt.values():
        if node["class_type"] == "SiDFewStepSampler":
            node["inputs"]["guidance"] = "cfg"
    with pytest.raises(RuntimeError, match="SiDFewStepSampler: guidance 'cfg': expected a negative prompt"):
        server.run(prompt)


def test_workflows_say_where_nodes_and_public_files_come_from():
    """So that ComfyUI offers to install the one and to download the other."""
    ours, public = set(), {}
    for name in NAMES:
        for node in json.loads((WORKFLOWS / f"{name}.json").read_text())["nodes"]:
            if node["type"] == "MarkdownNote":
                continue
            facts = node["properties"]
            assert (facts["cnr_id"] == "sid-few-step") == node["type"].startswith("SiD")
            ours |= {facts["ver"]} if node["type"].startswith("SiD") else set()
            public |= {file["name"]: file for file in facts.get("models", [])}
            assert all(file["name"] in node["widgets_values"] for file in facts.get("models", []))
    assert ours == {version("sid-few-step")}
    assert set(public) == {"sd_xl_base_1.0.safetensors", "dmd2_sdxl_4step_lora_fp16.safetensors"}
    for name, file in public.items():
        assert file["url"].startswith("https://huggingface.co/")
        assert file["url"].endswith(f"/{name}")
        assert re.fullmatch("[0-9a-f]{64}", file["hash"])
