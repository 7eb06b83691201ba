"""What GitHub reads: workflows run what the repository has, and issue forms ask for commands that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sid_train.cli import build_parser
from sid_train.commands.doctor import COMFYUI_FLOOR

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

yaml = pytest.importorskip("yaml")  # transformers brings it

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
pytestmark = pytest.mark.skipif(not GITHUB.is_dir(), reason="the registry's archive has no .github")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTED = "\n".join(
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", ".ci/run")
)


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


WORKFLOWS = {path.name: load(path) for path in sorted(GITHUB.glob("workflows/*.yml"))}
STEPS = [step for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() for step in job["steps"]]
FORMS = {path.stem: load(path) for path in sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")) if path.stem != "config"}


@pytest.mark.parametrize("line", [line for step in STEPS for line in step.get("run", "").splitlines()])
def test_workflows_run_what_the_documentation_says(line):
    """Every command is one of README, CONTRIBUTING or .ci/run, a script of .ci, or an installation of our extras."""
    first = line.split()[0]
    if first.startswith(".ci/"):
        assert (ROOT / first).stat().st_mode & 0o111
    elif line not in DOCUMENTED:
        assert line.startswith("pip install ")
        (extras,) = re.findall(r"\[([\w,-]+)\]", line) or [""]
        assert set(filter(None, extras.split(","))) <= PROJECT["optional-dependencies"].keys()
    for path in re.findall(r"\btests/[\w/.]+", line):
        assert (ROOT / path).exists()


def test_actions_are_pinned_by_their_major_version():
    actions = {step["uses"] for step in STEPS if "uses" in step}
    assert {action.partition("@")[0] for action in actions} >= {"actions/checkout", "Comfy-Org/publish-node-action"}
    assert [action for action in actions if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action)] == []
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())


def test_only_a_tag_publishes():
    """Whose name is then the version: what is published can never be replaced."""
    publish = WORKFLOWS["publish.yml"]
    assert publish[True] == {"push": {"tags": ["v*"]}}  # yaml's word for "on"
    (check,) = (step for step in publish["jobs"]["publish"]["steps"] if "tag-is-version" in step.get("run", ""))
    assert "if" not in check


def test_the_nodes_and_the_trainer_need_the_same_comfyui():
    floor = re.search(r'^FLOOR = "([\d.]+)"$', (ROOT / "nodes" / "version.py").read_text("utf-8"), re.MULTILINE)
    assert floor is not None
    assert floor[1] == COMFYUI_FLOOR  # which the doctor's tests compare with pyproject.toml


def test_every_python_that_is_declared_is_tested():
    declared = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert declared == set(WORKFLOWS["tests.yml"]["jobs"]["tests"]["strategy"]["matrix"]["python"])
    assert f">={min(declared, key=lambda v: int(v.split('.')[1]))}" == PROJECT["requires-python"]


def test_the_oldest_comfyui_is_the_one_that_the_pack_requires():
    oldest, _ = WORKFLOWS["tests.yml"]["jobs"]["comfyui"]["strategy"]["matrix"]["comfyui"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest.removeprefix('v')}"


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_forms_and_ask_for_what_tells(name):
    form = FORMS[name]
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    asked = "\n".join(field["attributes"]["label"] for field in form["body"])
    assert "python -m sid_train doctor" in asked
    assert ("inspect" if name != "training" else "plan") in asked
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert set(re.findall(r"sid_train (\w+)", asked)) <= commands.keys()


def test_there_is_a_form_for_each_kind_of_fault():
    assert FORMS.keys() == {"nodes", "training", "pictures"}
    assert all(
        link.keys() == {"name", "url", "about"}
        for link in load(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    )
