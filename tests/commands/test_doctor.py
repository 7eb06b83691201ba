"""``doctor`` on machines that lack things: packages that are stand-ins, folders that are made for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sid_train.commands import doctor
from sid_train.commands.doctor import Findings, try_imports

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_knows_what_the_project_declares():
    declared = [re.match(r"([\w-]+)(?:>=([\d.]+))?", line).groups("") for line in PROJECT["project"]["dependencies"]]
    assert {name: floor for name, floor in declared if name != "tomli"} == doctor.FLOORS
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == f">={doctor.COMFYUI_FLOOR}"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Modules that take the place of packages in other processes: ``stand_ins(name, code)`` makes one."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return lambda name, code: (folder / f"{name}.py").write_text(code)


def test_each_import_is_told_and_none_takes_the_others_with_it(stand_ins):
    stand_ins("good", "__version__ = '1.2'\nprint('hello')\nprint('{\"name\": 1')")
    stand_ins("bad", "raise RuntimeError('libcudart.so.12: no such file')")
    stand_ins("fatal", "import os; os._exit(11)")
    stand_ins("slow", "import time; time.sleep(60)")
    found = try_imports([(name, name) for name in ("good", "bad", "none", "fatal", "good")], 60)
    assert found["good"] == {"state": "works", "version": "1.2"}
    assert found["bad"] == {"state": "broken", "reason": "RuntimeError: libcudart.so.12: no such file"}
    assert found["none"]["reason"] == "ModuleNotFoundError: No module named 'none'"
    assert found["fatal"] == {"state": "broken", "reason": "it ended Python with code 11"}
    found = try_imports([("good", "good"), ("slow", "slow")], 3)
    assert found == {"good": {"state": "works", "version": "1.2"}, "slow": {"state": "not tried"}}


def test_it_runs_and_says_so_where_pytorch_and_diffusers_are_broken(stand_ins, tmp_path):
    for name in ("numpy", "PIL", "transformers", "accelerate", "peft", "tensorboard", "einops", "safetensors"):
        stand_ins(name, "CLIPTextModel = CLIPTextModelWithProjection = CLIPTokenizer = None")  # quick to import
    stand_ins("torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    stand_ins("diffusers", "raise ImportError('cannot import name X\\nfrom transformers')")
    command = [sys.executable, "-m", "sid_train", "doctor", "--json", "--seconds", "60", "--out", str(tmp_path / "new")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    facts = json.loads(run.stdout)
    assert {name: package["state"] for name, package in facts["packages"].items() if package["state"] != "works"} == {
        "torch": "broken",
        "diffusers": "broken",
    }
    problems = {p["what"]: p["cure"] for p in facts["problems"] if p["stops"] == "every run"}
    assert len(problems) == 2
    (torch,) = (what for what in problems if what.startswith("torch "))
    assert torch.endswith("cannot be imported: OSError: libtorch_cpu.so: cannot open shared object file")
    assert problems[torch] == 'pip install "torch>=2.9", again'
    assert any(r"cannot import name X\nfrom transformers" in what for what in problems)
    assert not (tmp_path / "new").exists()


def found_by(examine, *arguments) -> Findings:
    found = Findings()
    examine(found, *arguments)
    return found


@pytest.fixture
def packages(monkeypatch):
    """``packages(versions, **states)``: what doctor makes of these packages; the others are as they should be."""

    def examine(versions, **states) -> Findings:
        works = {name: {"state": "works"} for name in [*doctor.FLOORS, "the trainer", "devices"]}
        monkeypatch.setattr(doctor, "try_imports", lambda *_: works | states)
        monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "99"))
        return found_by(doctor._examine_packages, 1)

    return examine


@pytest.mark.parametrize(
    ("versions", "what", "cure"),
    [
        ({"torch": "2.8.1+cu128"}, "torch is 2.8.1+cu128, older than 2.9", 'pip install "torch>=2.9"'),
        ({"diffusers": "0.9"}, "diffusers is 0.9, older than 0.33", 'pip install "diffusers>=0.33"'),
        ({"torch": "2.10.0a0", "diffusers": "0.33.0.dev0"}, None, None),
    ],
)
def test_old_packages_are_named(versions, what, cure, packages):
    problems = packages(versions).problems
    assert [(p.stops, p.what, p.cure) for p in problems] == ([("every run", what, cure)] if what else [])


def test_missing_and_untried_packages_are_named(packages):
    missing = packages({"peft": None}, peft={"state": "broken", "reason": "ModuleNotFoundError"})
    assert [(p.stops, p.what) for p in missing.problems] == [("every run", "peft is not installed")]
    late = packages({}, torch={"state": "not tried"}, **{"the trainer": {"state": "not tried"}})
    assert [(p.stops, p.what) for p in late.problems] == [("not known", "torch: not imported within 1 seconds")]
    clash = packages({}, **{"the trainer": {"state": "broken", "reason": "ImportError: X"}})
    assert [(p.stops, p.what) for p in clash.problems] == [
        ("every run", "the trainer cannot be imported: ImportError: X")
    ]


@pytest.mark.parametrize(("version", "old"), [("0.3.64", False), ("0.3.9", True), ("0.33.0", False)])
def test_comfyui_is_found_with_its_version_and_the_pack(version, old, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "comfyui_version.py").write_text(f'# made by a script\n__version__ = "{version}"\n')
    found = found_by(doctor._examine_comfyui)
    assert found.facts["comfyui"][0] == {"path": str(tmp_path), "version": version, "has_pack": False}
    assert [p.what for p in found.problems if str(tmp_path) in p.what] == (
        [f"ComfyUI in {tmp_path} is {version}, older than 0.3.64"] if old else []
    )
    (tmp_path / "custom_nodes" / "ours").symlink_to(Path(doctor.__file__).parents[2])
    assert found_by(doctor._examine_comfyui).facts["comfyui"][0]["has_pack"]


def test_a_folder_that_cannot_be_written_to_stops_every_run(tmp_path):
    (tmp_path / "file").touch()
    found = found_by(doctor._examine_folder, tmp_path / "file" / "run")
    assert [p.stops for p in found.problems] == ["every run"]
    assert "it cannot be written to" in found.problems[0].what
    good = found_by(doctor._examine_folder, tmp_path / "new" / "run")
    assert good.facts["folder"]["writable"]
    assert [p for p in good.problems if p.stops == "every run"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_file_system_without_rename_or_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor, "_locks", lambda _: False)
    found = found_by(doctor._examine_folder, tmp_path)
    assert [p.stops for p in found.problems if "locks" in p.what] == ["two runs at once"]
    monkeypatch.setattr(os, "replace", refuse)
    assert [p.stops for p in found_by(doctor._examine_folder, tmp_path).problems] == ["every run"]


def test_the_environment_is_told_without_secrets(tmp_path, monkeypatch):
    for name in [name for name in os.environ if doctor.ENVIRONMENT.fullmatch(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert found_by(doctor._examine_environment).problems == []
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").touch()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # a run ignores it, and says so
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true\x1b[31m")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = found_by(doctor._examine_environment)
    assert "hf_secret" not in str(found)
    first, second, third = found.problems
    assert (first.stops, second.stops) == ("every run", "runs that accelerate launch starts")
    assert (third.stops, third.what) == ("every run", "WORLD_SIZE=2 is set without RANK")
    assert r"ACCELERATE_USE_DEEPSPEED=true\x1b[31m is set" in first.what


def test_the_text_says_all_of_it(tmp_path, capsys):
    assert doctor.doctor(tmp_path, 0, False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")][1:] == [
        "packages",
        "packages for single things",
        "devices",
        "ComfyUI",
        "folders",
        "environment",
        "what would stop a run",
    ]
    assert "  not known: " in "\n".join(lines)
