"""``doctor``: what is installed, what this machine has, and what would stop a run. It works where nothing else does: it
imports the standard library alone, and tries every package in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..files.reading import read_text, shown
from ..training.environment import other_trainers

FLOORS = {
    "numpy": "1.25",
    "Pillow": "10.1",
    "einops": "0.7",
    "tqdm": "",
    "filelock": "3.12",
    "torch": "2.9",
    "safetensors": "0.4.3",
    "transformers": "4.44",
    "diffusers": "0.33",
    "accelerate": "1.0",
    "peft": "0.13",
    "tensorboard": "2.14",
}
"""What the trainer needs, as pyproject.toml says, in the order in which it is tried: what is quick comes first."""
OPTIONAL = {
    "open-clip-torch": "models in single files, whose CLIP vocabulary it ships",
    "bitsandbytes": "optimizer.kind adam8bit",
    "wandb": "training.tracker wandb",
    "datasets": "prompts of the hub (hf:)",
    "pyarrow": "parquet files",
    "scikit-learn": "demo --full",
}
COMFYUI_FLOOR = "0.3.64"
MIB, GIB = 2**20, 2**30
EVERY_RUN = "every run"
ENVIRONMENT = re.compile(
    r"(ACCELERATE_\w+|CUDA_VISIBLE_DEVICES|PYTORCH_\w*ALLOC_CONF|OMP_NUM_THREADS|WORLD_SIZE|RANK|LOCAL_RANK"
    r"|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|COMFYUI_PATH)"
)
"""Variables that change what a run does; none of them holds a secret."""

# Imports what the trainer does, one after the other, and says of each how it went as soon as it knows: whatever ends or
# stops this process, what came before is known.
_TRY = """
import importlib, json, sys

sys.path.append(sys.argv[2])  # where sid_train is, if it is not installed

def say(name, **facts):
    print(json.dumps({"name": name, **facts}), file=out, flush=True)

out, sys.stdout = sys.stdout, sys.stderr
for name, module in json.loads(sys.argv[1]):
    say(name, state="started")
    try:
        found = importlib.import_module(module)
        if name == "diffusers":
            from diffusers import AutoencoderKL, UNet2DConditionModel
        if name == "transformers":
            from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    except BaseException as error:
        say(name, state="broken", reason=f"{type(error).__name__}: {error}")
    else:
        say(name, state="works", version=str(getattr(found, "__version__", "")))
    if name == "torch" and "torch" in sys.modules:
        import torch
        devices = []
        try:
            for i in range(torch.cuda.device_count()):
                card = torch.cuda.get_device_properties(i)
                devices.append({"name": card.name, "gib": round(card.total_memory / 2**30, 1),
                                "capability": f"{card.major}.{card.minor}", "bf16": card.major >= 8})
            say("devices", state="works", cuda=devices, built_for=torch.version.cuda or torch.version.hip or "",
                threads=torch.get_num_threads())
        except BaseException as error:
            say("devices", state="broken", reason=f"{type(error).__name__}: {error}")
"""


@dataclass
class Problem:
    """Something that would stop a run, whose run, and what to do about it."""

    stops: str
    what: str
    cure: str


@dataclass
class Findings:
    """All that doctor found."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, stops: str, what: str, cure: str) -> None:
        self.problems.append(Problem(stops, shown(what, 400), cure))


def doctor(out: Path, seconds: float, as_json: bool) -> int:
    """Prints the findings; 1 if something would stop every run, else 0."""
    found = examine(out, seconds)
    stopped = any(problem.stops == EVERY_RUN for problem in found.problems)
    if as_json:
        print(json.dumps({**found.facts, "problems": [asdict(p) for p in found.problems]}, indent=2))
    else:
        print("\n".join(_lines(found)))
    return int(stopped)


def examine(out: Path, seconds: float) -> Findings:
    """What there is, and what is wrong with it, for a run that would write to the folder ``out``.

    seconds: for trying the packages; a first import from a slow disk may take longer
    """
    found = Findings()
    found.facts["system"] = {
        "sid_train": _version("sid-few-step") or "not installed, run from its folder",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
    }
    _examine_packages(found, seconds)
    _examine_devices(found)
    _examine_comfyui(found)
    _examine_folder(found, out)
    _examine_environment(found)
    return found


# -- packages and devices ------------------------------------------------------------------------------------------


def _examine_packages(found: Findings, seconds: float) -> None:
    modules = [(name, {"Pillow": "PIL"}.get(name, name)) for name in FLOORS]
    tried = try_imports([*modules, ("the trainer", f"{__package__}.distill")], seconds)
    found.facts["devices"] = tried.pop("devices", {"state": "not tried"})
    trainer = tried.pop("the trainer", {"state": "not tried"})
    packages = found.facts["packages"] = {}
    for name, floor in FLOORS.items():
        state = tried.get(name, {"state": "not tried"})
        version = _version(name) or state.get("version") or None
        packages[name] = {"version": version, "needs": floor, "state": state["state"]}
        cure = f'pip install "{name}>={floor}"' if floor else f"pip install {name}"
        not_found = state.get("reason", "ModuleNotFoundError").startswith("ModuleNotFoundError")
        if version is None and state["state"] != "works" and not_found:
            packages[name]["state"] = "missing"
            found.problem(EVERY_RUN, f"{name} is not installed", cure)
        elif state["state"] == "broken":
            what = f"{name} {version or '(unknown version)'} cannot be imported: {state['reason']}"
            found.problem(EVERY_RUN, what, f"{cure}, again")
        elif floor and version is not None and _numbers(version) < _numbers(floor):
            found.problem(EVERY_RUN, f"{name} is {version}, older than {floor}", cure)
    late = [name for name, package in packages.items() if package["state"] == "not tried"]
    if late or trainer["state"] == "not tried":
        what = f"{', '.join(late) or 'the trainer'}: not imported within {seconds:g} seconds"
        found.problem("not known", what, "try longer: --seconds 60")
    if trainer["state"] == "broken" and not found.problems:
        cure = "these versions do not go together: install those of a new virtual environment (pip install -e .)"
        found.problem(EVERY_RUN, f"the trainer cannot be imported: {trainer['reason']}", cure)
    optional = found.facts["optional"] = {name: _version(name) for name in OPTIONAL}
    vocabulary = _clip_vocabulary()
    found.facts["clip_vocabulary"] = str(vocabulary) if vocabulary else None
    if vocabulary is None:
        what = "the CLIP vocabulary is missing" + (
            ", though open-clip-torch is there" * bool(optional["open-clip-torch"])
        )
        found.problem("models in single files", what, "pip install --force-reinstall open-clip-torch")


def try_imports(modules: list[tuple[str, str]], seconds: float) -> dict[str, dict[str, Any]]:
    """How the import of each module went, by its name: "works", "broken" with a reason, "not tried" for what the time
    did not suffice for; and under "devices" what PyTorch says of them.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _TRY, json.dumps(modules), str(Path(__file__).parents[2])]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
        output, ended = run.stdout, f"it ended Python with code {run.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ended = late.stdout or b"", ""
    results: dict[str, dict[str, Any]] = {}
    for line in output.decode(errors="replace").splitlines():
        try:
            facts = json.loads(line)
            results[facts.pop("name")] = facts
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a torn line, or something that a package printed itself
    for facts in results.values():
        if facts["state"] == "started":
            facts |= {"state": "broken", "reason": ended} if ended else {"state": "not tried"}
    return results


def _clip_vocabulary() -> Path | None:
    package = importlib.util.find_spec("open_clip")  # found, not imported: it is large
    for folder in (package.submodule_search_locations or []) if package else []:
        if (file := Path(folder) / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return file
    return None


def _examine_devices(found: Findings) -> None:
    devices = found.facts["devices"]
    devices["processors"] = os.cpu_count()
    devices["memory_gib"] = _memory_gib()
    if devices["state"] == "broken":
        cure = "see that the driver fits the PyTorch that is installed (nvidia-smi, python -m torch.utils.collect_env)"
        found.problem("runs on a GPU", f"PyTorch cannot ask for devices: {devices['reason']}", cure)
    elif devices["state"] == "works" and not devices["cuda"]:
        why = "" if devices["built_for"] else ": this PyTorch is a build for the CPU alone"
        cure = "the demo and plan need none; for SDXL use a machine with one, and a PyTorch built for it"
        found.problem("SDXL at its full size", f"there is no CUDA device{why}", cure)
    for card in devices.get("cuda", []):
        if not card["bf16"]:
            cure = "use a card of compute capability 8.0 or higher"
            found.problem("runs in bf16, as the SDXL configurations are", f"{card['name']} has no bf16", cure)


def _memory_gib() -> float | None:
    try:
        import psutil  # accelerate brings it

        return round(psutil.virtual_memory().total / GIB, 1)
    except Exception:  # missing or broken
        pass
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, OSError, ValueError):  # Windows, or a system that does not say
        return None


# -- ComfyUI -------------------------------------------------------------------------------------------------------


def _examine_comfyui(found: Findings) -> None:
    installations = found.facts["comfyui"] = [_comfyui(folder) for folder in _comfyui_folders()]
    for comfyui in installations:
        if comfyui["version"] and _numbers(comfyui["version"]) < _numbers(COMFYUI_FLOOR):
            what = f"ComfyUI in {comfyui['path']} is {comfyui['version']}, older than {COMFYUI_FLOOR}"
            found.problem("the nodes there", what, "update ComfyUI")


def _comfyui_folders() -> list[Path]:
    """Where there is a ComfyUI: around this pack, around the current folder, and in the usual places."""
    pack, here, home = Path(__file__).resolve().parents[2], Path.cwd(), Path.home()
    named = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    usual = [home / "ComfyUI", home / "comfy" / "ComfyUI", home / "Documents" / "ComfyUI", here / "ComfyUI"]
    folders = [*named, *pack.parents, here, *here.parents, *usual]
    return list(dict.fromkeys(f.resolve() for f in folders if (f / "comfyui_version.py").is_file()))


def _comfyui(folder: Path) -> dict[str, Any]:
    try:
        version = re.search(r'__version__ = "([\w.+-]+)"', read_text(folder / "comfyui_version.py", MIB))
    except (OSError, ValueError):
        version = None
    return {"path": str(folder), "version": version[1] if version else None, "has_pack": _has_pack(folder)}


def _has_pack(comfyui: Path) -> bool:
    pack = Path(__file__).resolve().parents[2]
    try:
        packs = sorted((comfyui / "custom_nodes").iterdir())
    except OSError:
        return False
    return any(p.resolve() == pack or (p / "nodes" / "web" / "docs" / "SiDScheduler.md").is_file() for p in packs)


# -- the folder of a run, and the environment ----------------------------------------------------------------------


def _examine_folder(found: Findings, out: Path) -> None:
    folder = next((f for f in _with_parents(out) if f.exists()), Path())
    facts = found.facts["folder"] = {"path": shown(out.absolute()), "free_gib": None, "writable": False, "locks": None}
    try:
        facts["free_gib"] = round(shutil.disk_usage(folder).free / GIB, 1)
        with tempfile.TemporaryDirectory(prefix=".sid-doctor-", dir=folder) as trial:
            for text in ("first", "second"):  # what every file of a run needs: written, synced, put in another's place
                write_text(Path(trial, "file"), text)
            facts["writable"] = True
            facts["locks"] = _locks(Path(trial))
    except OSError as error:
        found.problem(EVERY_RUN, f"{out}: it cannot be written to: {error}", "choose another --out, or its rights")
        return
    if facts["free_gib"] < 1:
        what = f"{out}: {facts['free_gib']} GiB are free"
        found.problem("SDXL runs", what, "free some: python -m sid_train plan says what a run writes")
    if facts["locks"] is False:
        what = f"{out}: its file system has no locks: two runs in one folder would not notice each other"
        found.problem("two runs at once", what, "start one run a folder")


def _with_parents(path: Path) -> Iterator[Path]:
    yield path
    yield from path.absolute().parents


def _locks(folder: Path) -> bool | None:
    """Whether files can be locked; None where that cannot be tried."""
    try:
        from filelock import FileLock

        with FileLock(folder / "lock", timeout=1):
            return True
    except NotImplementedError:
        return False
    except Exception:  # filelock missing or broken, which is told as a package; or a lock that is not got
        return None


def _examine_environment(found: Findings) -> None:
    names = sorted(name for name in os.environ if ENVIRONMENT.fullmatch(name))
    variables = found.facts["environment"] = {name: shown(os.environ[name], 200) for name in names}
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    home = home.expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    accelerate = home / "accelerate" / "default_config.yaml"
    found.facts["hugging_face_cache"] = {"path": shown(cache), "exists": cache.is_dir()}
    found.facts["accelerate_config"] = shown(accelerate) if accelerate.is_file() else None
    for name, value in other_trainers().items():
        found.problem(EVERY_RUN, f"{name}={shown(value, 200)} is set in the environment", "unset it, or use torchrun")
    if found.facts["accelerate_config"]:
        what = f"{accelerate}: accelerate launch would set from it what the run's configuration says"
        found.problem("runs that accelerate launch starts", what, "start with python -m, or torchrun -m, sid_train")
    if variables.get("WORLD_SIZE", "1") != "1" and "RANK" not in variables:
        what = f"WORLD_SIZE={variables['WORLD_SIZE']} is set without RANK"
        found.problem(EVERY_RUN, what, "unset it: torchrun sets both")


# -- telling -------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:  # not there, or what pip left of it cannot be read
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, to compare: 2.10.0+cu128 is above 2.9."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part[:9]) for part in release[0].split(".")) if release else ()


def _lines(found: Findings) -> Iterator[str]:
    facts = found.facts
    system, devices, folder = facts["system"], facts["devices"], facts["folder"]
    yield f"sid_train {system['sid_train']}, Python {system['python']}, {system['platform']}"
    yield "packages"
    for name, package in facts["packages"].items():
        state = {"works": "", "not tried": ", not imported in time"}.get(package["state"], f", {package['state']}")
        yield f"  {name} {package['version'] or ''}{state}"
    yield "packages for single things"
    for name, version in facts["optional"].items():
        yield f"  {name} {version or 'not installed'}: {OPTIONAL[name]}"
    yield f"  CLIP vocabulary: {facts['clip_vocabulary'] or 'missing'}"
    yield "devices"
    memory = f"{devices['memory_gib']} GiB" if devices["memory_gib"] else "unknown"
    yield f"  CPU: {devices['processors']} threads, memory: {memory}"
    for number, card in enumerate(devices.get("cuda", [])):
        bf16 = "bf16" if card["bf16"] else "no bf16"
        yield f"  cuda:{number}: {card['name']}, {card['gib']} GiB, compute capability {card['capability']}, {bf16}"
    if not devices.get("cuda"):
        yield f"  no CUDA device{'' if devices['state'] == 'works' else ' (' + devices['state'] + ')'}"
    yield "ComfyUI"
    for comfyui in facts["comfyui"]:
        has = "this pack is in its custom_nodes" if comfyui["has_pack"] else "this pack is not in its custom_nodes"
        yield f"  {shown(comfyui['path'])}: {comfyui['version'] or 'unknown version'}, {has}"
    if not facts["comfyui"]:
        yield "  none found; COMFYUI_PATH can say where it is"
    yield "folders"
    free = "unknown" if folder["free_gib"] is None else f"{folder['free_gib']} GiB"
    yield f"  runs: {folder['path']}: free: {free}, {'writable' if folder['writable'] else 'not writable'}"
    cache = facts["hugging_face_cache"]
    yield f"  Hugging Face cache: {cache['path']}{'' if cache['exists'] else ' (not there yet)'}"
    yield "environment"
    for name, value in facts["environment"].items():
        yield f"  {name}={value}"
    yield "what would stop a run"
    for problem in found.problems:
        yield f"  {problem.stops}: {problem.what}; {problem.cure}"
    if not found.problems:
        yield "  nothing was found"
