"""What no user means: wrong values in sockets and widgets, and what strangers put into workflows and files."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import conditioning, empty_latent, module, run, text_of
from test_training import teacher_tensors

NAN, INF = float("nan"), float("inf")


class Thing:
    """Of a type that nobody expects; says nothing of itself."""

    def __repr__(self):
        return "<img src=x onerror=alert(1)>" * 1000


def prompt(text=None, extra=None):
    ((right, facts),) = conditioning(1)
    return [[right if text is None else text, facts if extra is None else extra]]


EVERYWHERE = {"nothing": None, "an object": Thing(), "bytes": b"x"}
WRONG = {
    "MODEL": {"text": "model", "dictionary": {}, "tensor": torch.zeros(1)},
    "CLIP": {"text": "clip", "dictionary": {}, "tensor": torch.zeros(1)},
    "VAE": {"text": "vae", "dictionary": {}, "tensor": torch.zeros(1)},
    "CONDITIONING": {
        "text": "a cat",
        "empty": [],
        "tensor": torch.zeros(1, 77, 2048),
        "no pairs": [torch.zeros(1, 77, 2048)],
        "no tensor": prompt("a cat"),
        "no dictionary": [[torch.zeros(1, 77, 2048), "pooled"]],
        "two axes": prompt(torch.zeros(77, 2048)),
        "integers": prompt(torch.zeros(1, 77, 2048, dtype=torch.int64)),
        "no tokens": prompt(torch.zeros(1, 0, 2048)),
        "NaN": prompt(torch.full((1, 77, 2048), NAN)),
        "NaN pooled": prompt(extra={"pooled_output": torch.full((1, 1280), NAN)}),
        "text pooled": prompt(extra={"pooled_output": "x"}),
        "pooled of one axis": prompt(extra={"pooled_output": torch.zeros(1280)}),
    },
    "LATENT": {
        "tensor": torch.zeros(1, 4, 8, 8),
        "text": "latent",
        "no samples": {},
        "list": {"samples": [[0.0]]},
        "three axes": {"samples": torch.zeros(4, 8, 8)},
        "integers": {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int64)},
        "complex": {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.complex64)},
        "no images": {"samples": torch.zeros(0, 4, 8, 8)},
        "no height": {"samples": torch.zeros(1, 4, 0, 8)},
        "NaN": {"samples": torch.full((1, 4, 8, 8), NAN)},
        "infinity": {"samples": torch.full((1, 4, 8, 8), INF)},
        "text mask": empty_latent() | {"noise_mask": "x"},
        "NaN mask": empty_latent() | {"noise_mask": torch.full((1, 1, 8, 8), NAN)},
        "text places": empty_latent() | {"batch_index": "x"},
        "too few places": empty_latent(2) | {"batch_index": [0]},
        "a place far out": empty_latent() | {"batch_index": [10**9]},
        "a place whose noise takes minutes": empty_latent(1, 128) | {"batch_index": [1 << 13]},
        "a place before the first": empty_latent() | {"batch_index": [-1]},
    },
    "SID_RECIPE": {"text": "SiD 625 (4 steps)", "dictionary": {"timesteps": (625,)}, "list": [625]},
    "SID_STRATEGY": {"unknown": "x", "number": 1.5, "not finite": "lsg=nan", "long": "lsg=" + "9" * 10**6},
    "INT": {
        "NaN": NAN,
        "infinity": INF,
        "text": "4",
        "fraction": 2.5,
        "huge": 10**5000,
        "yes": True,
        "below": -(2**70),
    },
    "FLOAT": {"NaN": NAN, "infinity": INF, "minus infinity": -INF, "text": "1", "huge": 10**5000, "list": [1.0]},
    "STRING": {"number": 1, "list": ["a"], "half an emoji": "a \ud83d"},
    "COMBO": {"number": 1, "list": ["a"], "unhashable": {}, "half an emoji": "\ud83d", "unknown": "x\x1b[2J" * 10**6},
    "BOOLEAN": {"text": "yes", "number": 2, "NaN": NAN},
}
NODES = ("Guidance", "DistillationGuidance", "FewStepSampler", "Scheduler", "SamplerSelect", "RecipeInfo")
NODES += ("RecipeOverride", "CheckpointLoader", "DiffusionModelLoader", "LoRALoader", "TrainingRecipe")
NODES += ("DemoModel", "Distill", "Run")


@pytest.fixture(scope="module")
def right(pack, model, recipes) -> dict:
    """By type of input."""
    from small_models import small_clip

    return {
        "MODEL": model,
        "CLIP": small_clip("SDXL")[1],
        "VAE": SimpleNamespace(decode=None, encode=None),
        "CONDITIONING": conditioning(1),
        "LATENT": empty_latent(1, 8),
        "SID_RECIPE": recipes.SiDRecipe(),
        "SID_STRATEGY": "lsg=2",
        "COMBO": "x.safetensors",
    }


@pytest.mark.parametrize("name", NODES)
def test_a_wrong_value_is_one_line_that_names_the_input(nodes, right, name):
    node = nodes[f"SiD{name}"]
    inputs = node.define_schema().inputs
    good = {}
    for declared in inputs:
        kind = str(declared.get_io_type())
        default = getattr(declared, "default", None)
        good[declared.id] = right[kind] if default is None else default
    tried = 0
    for declared in inputs:
        kind = str(declared.get_io_type())
        for what, value in (EVERYWHERE | WRONG[kind]).items():
            is_file = kind == "COMBO" and declared.default is None  # ComfyUI says that there is none
            if (value is None and declared.optional) or (what == "unknown" and is_file):
                continue
            with pytest.raises(ValueError, match=f"^{declared.id}: ") as error:
                node.execute(**good | {declared.id: value})
            text = str(error.value)
            assert len(text) < 2500, (declared.id, what)
            assert text.isprintable(), (declared.id, what)
            tried += 1
    assert tried > 2


def test_every_node_and_every_type_of_input_is_tried(nodes, pack):
    assert {f"SiD{name}" for name in NODES} == set(nodes)
    assert set(WRONG) == set(module(pack, "nodes.checks").CHECKS)
    for node in nodes.values():
        assert {str(i.get_io_type()) for i in node.define_schema().inputs} <= set(WRONG)


# -- texts -------------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J\u202e\n" + "A" * 20_000_000


@pytest.fixture
def shown(pack, monkeypatch) -> list[str]:
    """What the nodes send to a frontend."""
    sent: list[str] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append(text))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    return sent


def in_the_frontend(node):
    """The node's class as ComfyUI runs it: a clone that knows its place in the graph."""
    return type(f"{node.__name__}Clone", (node,), {"hidden": SimpleNamespace(unique_id="7")})


def test_a_fault_of_another_pack_keeps_its_traceback(pack, monkeypatch):
    """Where its text has to be escaped: it is what ComfyUI logs."""
    fault = ValueError("other pack\x1b[2J")

    class Node:
        define_schema = staticmethod(lambda: SimpleNamespace(inputs=[]))

        @classmethod
        @module(pack, "nodes.checks").checked
        def execute(cls):
            raise fault

    with pytest.raises(ValueError, match=r"^other pack\\x1b\[2J$") as error:
        Node.execute()
    assert error.value.__cause__ is fault


def check_harmless(text: str) -> None:
    assert len(text) < 250_000
    assert "<" not in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_recipe_of_a_stranger_is_shown_harmlessly(nodes, recipes, shown):
    recipe = replace(recipes.SiDRecipe(), title=HOSTILE, licence=HOSTILE, training_summary={HOSTILE: HOSTILE})
    output = in_the_frontend(nodes["SiDRecipeInfo"]).execute(recipe=recipe)
    (sent,) = shown
    check_harmless(sent)
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[2J" in sent
    assert all(line.isprintable() for line in output.result[0].split("\n"))
    assert len(output.result[0]) < 10_000


def test_what_a_file_says_is_logged_harmlessly(nodes, put, tensors, recipes, shown, caplog):
    metadata = recipes.SiDRecipe().to_metadata() | {"sid.noise_mode": HOSTILE}
    name = put("diffusion_models", "unet.safetensors", tensors, metadata)
    node = in_the_frontend(nodes["SiDDiffusionModelLoader"])
    node.execute(unet_name=name, recipe="SiD 625 (4 steps)", weight_dtype="default")
    (sent,) = shown
    check_harmless(sent)
    assert "cannot be read" in sent
    assert text_of(caplog).isprintable()
    assert text_of(caplog).startswith("SiDDiffusionModelLoader: ")  # not ...Clone
    assert len(text_of(caplog)) < 2000


# -- paths and names ---------------------------------------------------------------------------------------------

ELSEWHERE = (
    *(r"\\host\share", r"\\host\share\p.txt", "//host/share", "/\\host/share", "\\/host/x.txt", r"\\?\UNC\host\share"),
    *(r"\??\UNC\host\share", "http://host/p.txt", "HTTPS://host/p.parquet", "file://host/share", "smb://host/x.csv"),
    *("s3://bucket/x.jsonl", r"file:\\host\x.txt", r"\\host\{0..9}.tar"),
)


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("name", ["prompts", "pairs"])
def test_no_path_contacts_another_host(nodes, put, folders, tmp_path, monkeypatch, name, path):
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path))
    teacher = put("checkpoints", "base.safetensors", teacher_tensors())
    asked: list[str] = []
    for function in ("exists", "isdir", "isfile", "lexists"):
        real = getattr(os.path, function)
        monkeypatch.setattr(os.path, function, lambda p, real=real: asked.append(str(p)) or real(p))
    with pytest.raises(ValueError, match=f"{name}: expected a path on this computer"):
        run(nodes["SiDTrainingRecipe"], **{"teacher": teacher, "prompts": "a cat", name: f" {path}\n"})
    assert not [p for p in asked if "host" in p or "bucket" in p]


@pytest.mark.parametrize("node", ["CheckpointLoader", "DiffusionModelLoader", "LoRALoader", "TrainingRecipe"])
def test_no_file_is_on_another_host(nodes, model, node):
    file = {"ckpt_name", "unet_name", "lora_name", "teacher"}
    names = {declared.id for declared in nodes[f"SiD{node}"].define_schema().inputs} & file
    more = {"model": model} if node == "LoRALoader" else {}
    with pytest.raises(ValueError, match="expected a path on this computer"):
        run(nodes[f"SiD{node}"], **dict.fromkeys(names, r"\\host\share\x.safetensors"), **more)


@pytest.mark.parametrize(
    "name", ["CON", "nul", "Aux.1", "com1", "LPT9.toml", "a.", "a" * 65, "", ".a", "a/b", "a b", "-a"]
)
def test_names_that_are_no_files_everywhere(pack, name):
    with pytest.raises(ValueError, match="name: expected"):
        module(pack, "nodes.training").check_name(name)


@pytest.mark.parametrize("name", ["console", "com", "com10", "a.con", "my-sid_2.0", "a" * 64])
def test_names_that_are(pack, name):
    module(pack, "nodes.training").check_name(name)


# -- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "is_old"), [("0.3.49", True), ("0.3.63", True), ("0.3.64", False), ("0.33.0", False)]
)
def test_a_comfyui_below_the_floor_is_named(pack, nodes, model, recipes, monkeypatch, caplog, version, is_old):
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    module(pack, "nodes.version").log_if_below_floor()
    assert ("needs ComfyUI 0.3.64 or newer, and this is " + version in text_of(caplog)) == is_old
    nag = module(pack, "nodes.nag")
    if is_old:
        with pytest.raises(ValueError, match=r"guidance 'nag': expected ComfyUI 0\.3\.64 or newer, got " + version):
            nag.patch_nag(model, conditioning(2), 2.0, 2.5, 0.5)
    else:
        assert nag.patch_nag(model, conditioning(2), 2.0, 2.5, 0.5) is not model
    assert logging.getLogger("ComfyUI-SiD").isEnabledFor(logging.WARNING)
