"""What the Comfy Registry's archive of the pack holds: .comfyignore has git's syntax."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the archive is made of what git tracks")


def git(*arguments: str, text: str = "") -> set[str]:
    run = subprocess.run(["git", *arguments], cwd=ROOT, input=text, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_archive_is_the_pack_and_nothing_else():
    tracked = git("ls-files")
    ignored = git(
        "-c", "core.excludesFile=.comfyignore", "check-ignore", "--no-index", "--stdin", text="\n".join(tracked)
    )
    assert ignored == {
        name
        for name in tracked
        if name.startswith(("tests/", "docs/", ".ci/", ".github/")) or name in ("workflows/build.py", "comfy-test.toml")
    }
