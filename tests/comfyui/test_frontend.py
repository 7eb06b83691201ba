"""Every shipped workflow in ComfyUI's real frontend, in headless Chromium.

``SID_SCREENSHOTS=workflows`` writes the thumbnails that the template browser shows.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from test_workflows import NAMES, SMALL, WORKFLOWS, api

playwright = pytest.importorskip("playwright.sync_api", reason="the frontend's tests need: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the frontend's tests need Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
BACKGROUND = (24, 24, 24)
MARGINS = {"x": 80, "y": 110}  # clear of the frontend's bars


@pytest.fixture(scope="module")
def page(server):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(server.url)
        page.wait_for_function(
            "!!window.app?.graph && !!window.LiteGraph?.registered_node_types?.SiDGuidance", timeout=60_000
        )
        yield page
        browser.close()


def small(workflow: dict) -> dict:
    """The workflow with pictures of 128x128 pixels."""
    for node in workflow["nodes"]:
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"][:2] = SMALL.values()
    return workflow


@pytest.mark.parametrize("name", NAMES)
def test_workflow_in_the_frontend(page, server, name, tmp_path):
    workflow = small(json.loads((WORKFLOWS / f"{name}.json").read_text()))
    made = page.evaluate(
        """async (workflow) => {
            await app.loadGraphData(workflow);
            const missing = app.graph.nodes.filter((n) => n.has_errors || !n.constructor?.nodeData && !n.isVirtualNode);
            const { output } = await app.graphToPrompt();
            return { output, missing: missing.map((n) => n.type) };
        }""",
        workflow,
    )
    assert made["missing"] == []
    twin = api(name)
    assert set(made["output"]) == set(twin)
    for number, node in twin.items():
        seen = made["output"][number]
        assert (seen["class_type"], seen["inputs"]) == (node["class_type"], node["inputs"]), number

    queue(page, server)
    page.keyboard.press("Escape")  # the template browser opens on a first visit
    shot = tmp_path / f"{name}.png"
    photograph(page, shot)
    if folder := os.environ.get("SID_SCREENSHOTS"):
        picture = ImageOps.pad(Image.open(shot).convert("RGB"), (960, 540), color=BACKGROUND)
        picture.save(Path(folder) / f"{name}.jpg", quality=85)


def queue(page, server) -> None:
    """Runs the graph that is open, to its end."""
    before = set(server.get("/history"))
    page.evaluate("app.queuePrompt(0)")
    end = time.monotonic() + 120
    while not (new := set(server.get("/history")) - before) and time.monotonic() < end:
        page.wait_for_timeout(200)
    assert len(new) == 1
    assert server.wait(new.pop())["status"]["status_str"] == "success"


def test_a_warning_goes_when_it_is_no_longer_true(page, server):
    page.evaluate("app.loadGraphData.bind(app)", small(json.loads((WORKFLOWS / "text_to_image.json").read_text())))
    shown = []
    for steps in (2, 0):
        page.evaluate(
            """(steps) => {
                const [sampler] = app.graph.nodes.filter((n) => n.type === "SiDFewStepSampler");
                sampler.widgets.find((w) => w.name === "steps").value = steps;
            }""",
            steps,
        )
        queue(page, server)
        shown.append(
            page.evaluate(
                """() => app.graph.nodes.find((n) => n.type === "SiDFewStepSampler").widgets
                    .filter((w) => w.name.includes("text-preview")).map((w) => w.value).join()"""
            )
        )
    assert "Sampling in 2 steps (625 312) what was trained for 4" in shown[0]
    assert shown[1] == "No warnings."


def photograph(page, path: Path) -> None:
    """The whole graph, a pixel of the frontend a pixel of the picture."""
    box = page.evaluate(
        """(margins) => {
            const boxes = app.graph.nodes.map((n) => n.getBounding());
            const from = [0, 1].map((i) => Math.min(...boxes.map((b) => b[i])));
            const to = [0, 1].map((i) => Math.max(...boxes.map((b) => b[i] + b[i + 2])));
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [margins.x - from[0], margins.y - from[1]];
            app.canvas.setDirty(true, true);
            const canvas = app.canvas.canvas.getBoundingClientRect();
            return {
                x: canvas.x + margins.x, y: canvas.y + margins.y, width: to[0] - from[0], height: to[1] - from[1],
            };
        }""",
        MARGINS,
    )
    page.set_viewport_size({"width": int(box["width"]) + 400, "height": int(box["height"]) + 400})
    page.wait_for_timeout(500)
    around = 20
    clip = {"x": box["x"] - around, "y": box["y"] - around}
    clip |= {"width": box["width"] + 2 * around, "height": box["height"] + 2 * around}
    page.screenshot(path=str(path), clip=clip)


@pytest.mark.parametrize(("language", "title"), [("zh", "SiD 少步采样器"), ("ja", "SiD 少数ステップサンプラー")])
def test_nodes_have_names_in_other_languages(page, server, language, title):
    """In the library of nodes, as a user who chose the language sees it."""
    server.post("/settings/Comfy.Locale", language)
    try:
        page.reload()
        page.wait_for_function(
            "(title) => window.LiteGraph?.registered_node_types?.SiDFewStepSampler?.title === title",
            arg=title,
            timeout=60_000,
        )
    finally:
        server.post("/settings/Comfy.Locale", "en")
        page.reload()
        page.wait_for_function("window.LiteGraph?.registered_node_types?.SiDGuidance?.title === 'SiD Guidance'")
