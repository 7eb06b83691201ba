"""What the nodes import of ``sid_train``, read from their source: no ComfyUI is needed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
(ALLOWED,) = (c["source_modules"] for c in CONTRACTS if c["name"].startswith("What the nodes import"))


# What a node imports when it is asked for just that, and says what is missing where it cannot.
ON_DEMAND = {("watch", "sid_train.commands.export")}


def imported(source: str) -> set[str]:
    """The modules of ``sid_train`` that a module of ``nodes`` imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sid_train"):
            if node.module == "sid_train":
                found |= {f"sid_train.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda path: path.stem)
def test_nodes_import_only_what_is_light(path):
    for module in imported(path.read_text(encoding="utf-8")):
        is_light = any(module == allowed or module.startswith(f"{allowed}.") for allowed in ALLOWED)
        assert is_light or (path.stem, module) in ON_DEMAND, module


def test_the_check_sees_what_it_looks_for():
    assert imported("def f():\n    from ..sid_train.training.trainer import Trainer") == {"sid_train.training.trainer"}
    assert imported("from ..sid_train import configs") == {"sid_train.configs"}
