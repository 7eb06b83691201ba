"""ComfyUI loads ``sid_train.core`` beside whatever else is installed: torch, safetensors and stdlib must do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sid_train.core

CORE = Path(sid_train.core.__file__).parent
MODULES = sorted(CORE.rglob("*.py"))
LIGHT_FILES = {"files.hashing", "files.header", "files.reading"}
ALLOWED = {"torch", "safetensors", *sys.stdlib_module_names}

IMPORT_ALL = """
import importlib, pkgutil, sys

BLOCKED = {"diffusers", "transformers", "accelerate", "peft"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
try:
    import diffusers
except ImportError:
    pass
else:
    sys.exit("the block does not work")

import sid_train.core
names = [m.name for m in pkgutil.walk_packages(sid_train.core.__path__, "sid_train.core.")]
for name in names:
    importlib.import_module(name)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & BLOCKED, loaded & BLOCKED
# the standard library alone
FILES = {"sid_train.files", "sid_train.files.hashing", "sid_train.files.header", "sid_train.files.reading"}
ours = {name for name in sys.modules if name.startswith("sid_train.") and not name.startswith("sid_train.core")} - FILES
assert not ours, ours
print(len(names))
"""


def test_core_imports_without_the_training_dependencies():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=CORE.parents[1], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(MODULES) - 1  # all but __init__


def foreign_imports(source: str, depth: int) -> list[str]:
    """Imports in a module of core, ``depth`` packages below it (0: directly in it), of anything that core may not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            inside = 1 <= node.level <= depth + 1 or name.lstrip(".") in LIGHT_FILES
            if not inside and (node.level or name.partition(".")[0] not in ALLOWED):
                found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_core_is_written_against_torch_safetensors_and_itself(path):
    assert foreign_imports(path.read_text(), len(path.relative_to(CORE).parts) - 1) == []


@pytest.mark.parametrize(
    "line",
    ["import numpy", "from einops import rearrange", "from ..losses import sid_loss", "import sid_train.method.losses"],
)
def test_the_check_finds_what_it_looks_for(line):
    assert foreign_imports(f"def f():\n    {line}", 0)
