"""Sends hostile prompts to a real ComfyUI server with the pack in it.

    COMFYUI_PATH=~/comfy/ComfyUI python tests/soak/server.py --count 3000 --seed 0 --minutes 40

Prompts are the shipped workflows with inputs of the SiD nodes replaced by what no user interface would send, and small
ones that reach a node without a model. Promised is that the server stays up: the same process answers /system_stats
within 5 seconds throughout, each prompt is refused or ended within 30 seconds, memory does not grow by more than 1.5
GiB after the models are loaded, nothing is written outside output/ and temp/, and an error of ours is a ValueError or
an OSError of bounded, printable text. Needs ComfyUI's requirements.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import common
from common import ROOT, Promises
from prompts import bases, hostile

ANSWER, PROMPT, GROWTH, TEXT = 5.0, 30.0, 1 << 30, 5000
UP = "the same process is up"
ANSWERS = f"/system_stats is answered within {ANSWER:g} s"
ENDS = f"a prompt is refused or ended within {PROMPT:g} s"
KINDS = "an exception in the pack is a ValueError or an OSError"
LINES = f"an error of the pack is printable, at most {TEXT:,} characters"
GROWS = f"after a fifth of the prompts the peak of memory grows by at most {GROWTH >> 20:,} MiB"
INSIDE = "nothing is written outside output/ and temp/"
AFTER = "a right prompt still runs in the end"


class Watch(threading.Thread):
    """Asks the server how it is, twice a second: the slowest answer and the largest memory."""

    def __init__(self, url: str, pid: int):
        super().__init__(daemon=True)
        self.url, self.pid = url, pid
        self.slowest, self.asked, self.late, self.peak, self.stopped = 0.0, 0, 0, 0, False

    def run(self) -> None:
        while not self.stopped:
            begun = time.monotonic()
            with contextlib.suppress(OSError):  # that it is down is seen by who sends prompts
                urllib.request.urlopen(self.url + "/system_stats", timeout=60).read()
            seconds = time.monotonic() - begun
            self.asked += 1
            self.late += seconds > ANSWER
            self.slowest, self.peak = max(self.slowest, seconds), max(self.peak, memory(self.pid))
            time.sleep(0.5)


def memory(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found.group(1)) << 10 if found else 0


def outside(base: Path) -> set[str]:
    """The files in and beside the server's folder, without those that it may write."""
    may = [base / name for name in ("output", "temp", "user", "comfyui.log")]
    files = (p for p in base.parent.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p) for p in files if not any(p.is_relative_to(allowed) for allowed in may)}


def judge(server: Any, prompt: dict, promises: Promises, kinds: set[str]) -> None:
    """Sends one prompt and waits for its end."""
    begun = time.monotonic()
    body = json.dumps({"prompt": prompt, "client_id": "soak"}).encode()
    request = urllib.request.Request(server.url + "/prompt", body, {"Content-Type": "application/json"})
    told = json.dumps(prompt)[:300]
    try:
        number = json.loads(urllib.request.urlopen(request, timeout=PROMPT).read())["prompt_id"]
    except urllib.error.HTTPError as error:
        promises.figures[f"refused with {error.code}"] += 1
        promises.check(time.monotonic() - begun < PROMPT, ENDS, told)
        return
    except OSError as error:  # no answer in time, or none at all
        promises.check(False, ENDS, f"{error}: {told}")
        return
    entry = None
    while entry is None and time.monotonic() < begun + PROMPT and server.process.poll() is None:
        try:
            entry = server.get(f"/history/{number}").get(number)
        except OSError:
            continue
        time.sleep(0 if entry else 0.02)
    if not promises.check(entry is not None, ENDS, told) or entry is None:
        let_it_end(server)
        return
    errors = [content for kind, content in entry["status"]["messages"] if kind == "execution_error"]
    promises.figures["ended with an error" if errors else "ran"] += 1
    for error in errors:
        frames = [line for line in error["traceback"] if "ComfyUI-SiD" in line]
        if not frames or not error["node_type"].startswith("SiD"):
            continue
        kind, text = error["exception_type"], error["exception_message"]
        where = re.sub(r"\s+", " ", frames[-1])[-160:]
        fine = kind.rpartition(".")[2] in ("ValueError", "RecipeError", "FileNotFoundError", "OSError", "UnicodeError")
        if f"{kind} {where}" not in kinds or fine:
            promises.check(fine, KINDS, f"{kind} in {where}: {text[:200]}")
        kinds.add(f"{kind} {where}")
        clean = text.strip().replace("\n", "").isprintable() and len(text) <= TEXT
        promises.check(clean, LINES, f"{error['node_type']}: {len(text)} characters: {text[:120]!r}")


def let_it_end(server: Any) -> None:
    """Interrupts what runs, so that the next prompt does not wait for it."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(urllib.request.Request(server.url + "/interrupt", b"", method="POST"), timeout=60)
        end = time.monotonic() + 120
        while time.monotonic() < end and server.get("/prompt")["exec_info"]["queue_remaining"]:
            time.sleep(0.2)


def forget(server: Any) -> None:
    """Clears ComfyUI's list of what it ran."""
    body = json.dumps({"clear": True}).encode()
    request = urllib.request.Request(server.url + "/history", body, {"Content-Type": "application/json"})
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=60)


def main() -> int:
    arguments = common.parser(__doc__.splitlines()[0], count=3000, minutes=40)
    arguments.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    args = arguments.parse_args()
    comfyui = args.comfyui.expanduser()
    if not (comfyui / "main.py").is_file():
        raise SystemExit(f"--comfyui: expected ComfyUI's folder, found no main.py in {comfyui}")
    common.prepare()
    sys.path += [str(ROOT / "tests" / "comfyui")]
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    from comfy_server import Server
    from small_models import make_models

    from sid_train.core.recipe import SiDRecipe

    rng, promises, prompts = random.Random(args.seed), Promises(), bases()
    with common.work_folder(args.work) as work:
        base = work / "comfyui"
        base.mkdir()
        make_models(base, SiDRecipe().to_metadata())
        server = Server(comfyui, base)
        try:
            right = next(p for p in prompts if len(p) > 4)
            server.run(right)  # models are loaded
            for prompt in prompts[:5]:
                server.run(prompt)
            files, before = outside(base), memory(server.process.pid)
            watch, kinds = Watch(server.url, server.process.pid), set()
            watch.start()
            for number in range(args.count):
                if time.monotonic() - promises.started > 60 * args.minutes:
                    print(f"{args.minutes:g} minutes are over after {number} prompts", flush=True)
                    break
                if number == args.count // 5:  # by now ComfyUI holds each of the checkpoints
                    before = watch.peak
                if number % 50 == 0:  # ComfyUI keeps its last 10,000 prompts, with texts of 5 MB as they are
                    forget(server)
                prompt = hostile(rng, rng.choice(prompts))
                judge(server, prompt, promises, kinds)
                promises.figures["prompts"] += 1
                if not promises.check(server.process.poll() is None, UP, json.dumps(prompt)[:500]):
                    break
            watch.stopped = True
            watch.join(70)
            promises.tried[ANSWERS], promises.broken[ANSWERS] = watch.asked, watch.late
            promises.broken += type(promises.broken)()  # without zeros
            promises.figures["slowest answer, ms"] = round(1000 * watch.slowest)
            promises.figures["growth, MiB"] = (watch.peak - before) >> 20
            promises.check(watch.peak - before <= GROWTH, GROWS, f"{(watch.peak - before) >> 20} MiB")
            more = sorted(outside(base) - files)
            promises.check(not more, INSIDE, ", ".join(more[:5]))
            if server.process.poll() is None:
                try:
                    server.run(right)
                    promises.check(True, AFTER)
                except (RuntimeError, OSError) as error:
                    promises.check(False, AFTER, str(error)[:300])
        finally:
            server.close()
    return promises.finish(f"server.py --count {args.count} --seed {args.seed}")


if __name__ == "__main__":
    sys.exit(main())
