"""Prints that nobody reads any more."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from sid_train.files.console import unbreakable_output
with unbreakable_output():
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("y" * 100_000, file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as shells do")
def test_a_closed_pipe_ends_nothing(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "out")], stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "went on"
