"""Nothing that only POSIX has is used, or imported, without a look at the system: Windows users import all of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "sid_train").rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"])
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
NAMES = {
    "os": "fchmod fork forkpty geteuid getgid getloadavg getpgid getuid killpg lchown mkfifo mknod nice openpty "
    "posix_fallocate posix_fadvise sched_getaffinity setpgid setsid statvfs sync sysconf sysconf_names uname "
    "wait4 waitpid O_DIRECTORY O_NONBLOCK O_CLOEXEC",
    "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 alarm pthread_sigmask setitimer sigwait",
}
ONLY_POSIX = {f"{module}.{name}" for module, names in NAMES.items() for name in names.split()}


def unguarded(source: str) -> list[str]:
    """What of a module needs POSIX, outside of every ``if`` or function that asks for the system or for the name, and
    every ``try`` that expects it to be missing.
    """
    found: list[str] = []

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.If | ast.IfExp):
            guarded = guarded or asks(node.test)
        elif isinstance(node, ast.Try):
            expected = " ".join(ast.unparse(h.type) for h in node.handlers if h.type)
            guarded = guarded or "AttributeError" in expected or "ImportError" in expected
        elif isinstance(node, ast.FunctionDef):
            guarded = guarded or any(isinstance(line, ast.If) and asks(line.test) for line in node.body)
        used = []
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            used = [module] if module in MODULES else [f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Attribute):
            used = [ast.unparse(node)]
        if not guarded:
            found.extend(name for name in used if name in MODULES | ONLY_POSIX)
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse(source), False)
    return found


def asks(test: ast.expr) -> bool:
    return any(text in ast.unparse(test) for text in ("sys.platform", "os.name", "hasattr("))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_needs_posix(path):
    assert unguarded(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import fcntl",
        "from resource import getrusage",
        "import os\nos.fork()",
        "from os import mkfifo",
        "import signal\nSIGNALS = (signal.SIGINT, signal.SIGHUP)",
        "import os\ndef f():\n    if ready:\n        return 0\n    os.sync()",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert unguarded(source)


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nif sys.platform != 'win32':\n    import fcntl",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "import signal\nif hasattr(signal, 'SIGHUP'):\n    signal.signal(signal.SIGHUP, f)",
        "import os, sys\ndef f():\n    if sys.platform == 'win32':\n        return\n    os.sync()",
        "import os\nos.replace('a', 'b')",
    ],
)
def test_the_check_takes_what_is_guarded(source):
    assert not unguarded(source)
