"""What the pack costs a user's ComfyUI when it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# ComfyUI's own modules first, as when it starts; then the pack.
SCRIPT = f"""
import json, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
sys.path.insert(0, str(conftest.COMFYUI))
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, comfy_api.latest
earlier, begin = set(sys.modules), time.process_time()
pack = conftest.import_pack()
taken = time.process_time() - begin
new = {{name.partition(".")[0] for name in set(sys.modules) - earlier}} - set(sys.stdlib_module_names)
print(json.dumps({{"milliseconds": 1000 * taken, "packages": sorted(new), "nodes": len(pack.NODE_CLASS_MAPPINGS)}}))
"""


def test_import_is_quick_and_brings_no_other_package():
    best = float("inf")
    for _ in range(5):  # other work on the machine only adds: the best of some is what it costs
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=1800, check=True)
        measured = json.loads(run.stdout.splitlines()[-1])
        print(measured)
        assert measured["nodes"] == 11
        assert measured["packages"] == ["custom_nodes"]  # no diffusers, for one
        best = min(best, measured["milliseconds"])
        if best < 50:
            return
    raise AssertionError(f"importing the pack takes {best:.0f} ms of CPU time, expected less than 50")
