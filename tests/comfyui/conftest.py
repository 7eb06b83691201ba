"""The tests that need ComfyUI: in this process for single nodes, in a server of its own for whole workflows.

ComfyUI is looked for in COMFYUI_PATH, then around the pack (``custom_nodes/..``), then in ``~/comfy/ComfyUI``. Where
there is none, or its requirements are not installed, nothing here is collected, and the last line of the run says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
PACK = "custom_nodes.ComfyUI-SiD"
sys.path.append(str(Path(__file__).parent))  # for helpers and small_models


def find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named)] if named else [ROOT.parents[1], Path.home() / "comfy" / "ComfyUI"]
    return next((path for path in candidates if (path / "comfy" / "sd.py").is_file()), None)


def _problem(comfyui: Path | None) -> str | None:
    """Why the tests cannot run, or None."""
    if comfyui is None:
        return f"no ComfyUI at {os.environ.get('COMFYUI_PATH') or '~/comfy/ComfyUI'}"
    if importlib.util.find_spec("torchsde") is None or importlib.util.find_spec("aiohttp") is None:
        return f"ComfyUI is at {comfyui}, but its requirements are not installed here"
    return None


COMFYUI = find_comfyui()
PROBLEM = _problem(COMFYUI)
if PROBLEM:
    collect_ignore_glob = ["test_*.py"]


def comfyui_version(path: Path) -> str:
    return (path / "comfyui_version.py").read_text().split('"')[1]


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(
        f"ComfyUI tests: skipped: {PROBLEM}"
        if PROBLEM or COMFYUI is None
        else f"ComfyUI tests: ran on ComfyUI {comfyui_version(COMFYUI)}"
    )


def import_pack():
    """The pack, imported under the name that ComfyUI gives it, with ComfyUI's modules on the path."""
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pack():
    return import_pack()


@pytest.fixture(scope="session")
def nodes(pack) -> dict:
    return pack.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def unet_file(pack, tmp_path_factory) -> Path:
    """A UNet without a recipe, with bare ldm names."""
    from small_models import save, unet_tensors

    return save(tmp_path_factory.mktemp("models") / "unet.safetensors", unet_tensors())


@pytest.fixture(scope="session")
def model(unet_file):
    """The UNet as a MODEL, eps-prediction, fp32."""
    import comfy.sd
    import torch

    return comfy.sd.load_diffusion_model(str(unet_file), model_options={"dtype": torch.float32})


@pytest.fixture(scope="session")
def v_model(tensors):
    """The same weights, taken for v-prediction."""
    import comfy.sd
    import torch

    v_prediction = tensors | {"v_pred": torch.zeros(0)}
    return comfy.sd.load_diffusion_model_state_dict(v_prediction, model_options={"dtype": torch.float32})


@pytest.fixture(scope="session")
def server(pack, tmp_path_factory):
    """A running ComfyUI with small models under the names that the workflows use."""
    from comfy_server import Server
    from helpers import module
    from small_models import make_models

    base = tmp_path_factory.mktemp("comfyui")
    make_models(base, module(pack, "sid_train.core.recipe").SiDRecipe().to_metadata())
    running = Server(COMFYUI, base)
    yield running
    running.close()


@pytest.fixture(scope="session")
def recipes(pack):
    from helpers import module

    return module(pack, "sid_train.core.recipe")


@pytest.fixture
def folders(pack):
    """ComfyUI's, whose lists of files are forgotten after the test: pytest deletes the folders."""
    import folder_paths  # on the path once the pack is imported

    yield folder_paths
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def put(tmp_path, monkeypatch, folders):
    """Puts tensors into a file in one of ComfyUI's model folders."""

    def write(kind: str, name: str, tensors: dict, metadata: dict[str, str] | None = None) -> str:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata)
        monkeypatch.setitem(folders.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        return name

    return write


@pytest.fixture(scope="session")
def tensors(unet_file: Path) -> dict:
    """The UNet's, with ldm names."""
    return load_file(unet_file)


@pytest.fixture(scope="session")
def lora(tensors) -> dict:
    """A LoRA's on the UNet, with kohya names."""
    from small_models import lora_tensors

    return lora_tensors(tensors)
