"""Power cuts on ext4: a loop device is shut down under a command, as xfstests does, and mounted again.

    sudo python tests/soak/powercuts.py --count 40 --seed 0 --minutes 40

The shutdown (EXT4_IOC_SHUTDOWN) drops what the kernel had not written: the journal's running transaction, and file
data that waits for its blocks. Half of the mounts have noauto_da_alloc, without ext4's help for programs that rename
without fsync. Needs root, Linux, mkfs.ext4 and loop devices; where they are missing it says so and ends with 3.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common
from common import CAPTIONS, Promises, differences, leftovers, small, tail, weights
from processes import run, start

SHUTDOWN = 0x8004587D
KEEPS_JOURNAL, LOSES_JOURNAL = 1, 2
"""Flags of the shutdown: the log is flushed before, or not: as where the power is cut."""
OPTIONS = ("defaults", "commit=1", "noauto_da_alloc", "noauto_da_alloc,commit=1")
MEBIBYTES = 1024
CANNOT = 3
REFUSED = "the same command continues after the cut (0 runs refused)"
LOST = "what was said to be written is whole after the cut (0 exports lost)"
SAME = "same bytes as without a cut"
CLEAN = "no leftovers after the next run that ends"
ONCE = "the log has each iteration once"


class Disk:
    """An ext4 file system in a file, whose power can be cut."""

    def __init__(self, work: Path):
        self.image, self.folder = work / "disk.img", work / "disk"
        self.folder.mkdir()

    def make(self, options: str) -> None:
        self.image.unlink(missing_ok=True)
        with open(self.image, "wb") as file:
            file.truncate(MEBIBYTES << 20)
        self._do("mkfs.ext4", "-q", "-E", "lazy_itable_init=1", self.image)
        self.mount(options)

    def mount(self, options: str) -> None:
        self._do("mount", "-o", f"loop,{options}", self.image, self.folder)

    def cut(self, flag: int) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(folder)

    def unmount(self) -> None:
        for _ in range(50):
            if not self.folder.is_mount():
                return
            if subprocess.run(["umount", self.folder], capture_output=True).returncode:
                time.sleep(0.1)
        raise RuntimeError(f"{self.folder}: cannot be unmounted")

    @staticmethod
    def _do(*command: object) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@dataclass
class Command:
    name: str
    arguments: list
    share: float
    says: str
    """What it prints of a file when it is written, which must then be there."""
    iterations: int = 0
    seconds: float = 0
    operations: int = 0


def commands(work: Path, disk: Disk) -> list[Command]:
    prompts = common.write_prompts(work / "prompts.txt", CAPTIONS)
    demo, out = ["--config", "demo"], disk.folder / "out"
    lora = work / "run"
    made = run(["distill", *demo, *small(2, 2), "--out", lora], work / "made.log", lora)
    if made.code:
        raise SystemExit(f"distill: does not run at all: {tail(made.output)}")
    encode = ["encode", *demo, *common.settings(f"data.prompts={prompts}"), "--shard-size", 1, "--out", out]
    return [
        Command("distill", ["distill", *demo, *small(6, 2), "--out", out], 0.6, "Exported", 6),
        Command("encode", encode, 0.2, "Train with"),
        Command("export", ["export", lora, "-o", out / "x.safetensors"], 0.2, "x.safetensors"),
    ]


def trial(command: Command, expected: dict, disk: Disk, rng: random.Random, promises: Promises, log: Path) -> None:
    options = rng.choice(OPTIONS)
    flag = LOSES_JOURNAL if rng.random() < 0.8 else KEEPS_JOURNAL
    when = rng.choice(("at a time", "in a write", "after the end"))
    disk.make(options)
    out = disk.folder / "out"
    out.mkdir()
    disk._do("sync", "-f", out)  # the folder is the user's, and was there before
    child = start(command.arguments, log, out)
    if when == "at a time":
        until = time.monotonic() + rng.uniform(0, command.seconds)
        while time.monotonic() < until and not child.ended():
            time.sleep(0.001)
    elif when == "in a write":
        operation = rng.randint(1, max(1, command.operations))
        while operation > 0 and not child.ended():
            operation -= child.seen(0.05)
        time.sleep(rng.choice([0, 0.001, 0.005, 0.02, 0.1]))
    else:
        child.wait()
        time.sleep(rng.choice([0, 0, 0.1, 1.5]))  # a journal is committed every few seconds
    said = command.says in child.output()
    disk.cut(flag)
    child.kill()
    said_late = command.says in child.output()
    disk.unmount()
    disk.mount(options)

    told = f"{command.name}, {options}, flag {flag}, {when}"
    promises.figures["power cuts"] += 1
    promises.figures[f"power cuts {when}"] += 1
    promises.figures[f"power cuts of {command.name}"] += 1
    if said or said_late:
        promises.figures["power cuts after it had said that it is done"] += 1
    if said:
        lost = differences(weights(out) if out.is_dir() else {}, expected)
        promises.check(not lost, LOST, f"{told}: {lost}")
    there = sorted(f"{p.name} ({p.stat().st_size})" for p in out.iterdir()) if out.is_dir() else "nothing"
    ended = run(command.arguments, log, out)
    if promises.check(ended.code == 0, REFUSED, f"{told}: {tail(ended.output)}; found {there}"):
        wrong = differences(weights(out), expected)
        promises.check(not wrong, SAME, f"{told}: {wrong}; found {there}")
        promises.check(not leftovers(out), CLEAN, f"{told}: {leftovers(out)}")
        if command.iterations:
            found = common.logged(out)
            promises.check(found == [*range(1, command.iterations + 1)], ONCE, f"{told}: {found}")
    disk.unmount()


def main() -> int:
    arguments = common.parser(__doc__.splitlines()[0], count=40, minutes=40)
    args = arguments.parse_args()
    if os.geteuid() or not shutil.which("mkfs.ext4") or not Path("/dev/loop-control").exists():
        print("powercuts.py needs root, mkfs.ext4 and loop devices: nothing was tried", file=sys.stderr)
        return CANNOT
    promises, rng = Promises(), random.Random(args.seed)
    with common.work_folder(args.work) as work:
        disk = Disk(work)
        try:
            disk.make(OPTIONS[0])
            disk.cut(LOSES_JOURNAL)
        except OSError as error:
            print(f"powercuts.py: a file system cannot be mounted or shut down here: {error}", file=sys.stderr)
            return CANNOT
        finally:
            disk.unmount()
        common.prepare()
        try:
            chosen, references = commands(work, disk), {}
            for command in chosen:
                disk.make(OPTIONS[0])
                whole = run(command.arguments, work / "child.log", disk.folder / "out")
                if whole.code or command.says not in whole.output:
                    raise SystemExit(f"{command.name}: does not run at all: {tail(whole.output)}")
                command.seconds, command.operations = whole.seconds, whole.operations
                references[command.name] = weights(disk.folder / "out")
                disk.unmount()
                print(f"{command.name}: {whole.seconds:.1f} s, {whole.operations} file operations", flush=True)
            for number in range(args.count):
                if time.monotonic() - promises.started > 60 * args.minutes:
                    print(f"{args.minutes:g} minutes are over after {number} cuts", flush=True)
                    break
                (command,) = rng.choices(chosen, [c.share for c in chosen])
                trial(command, references[command.name], disk, rng, promises, work / "child.log")
        finally:
            disk.unmount()
    return promises.finish(f"powercuts.py --count {args.count} --seed {args.seed}")


if __name__ == "__main__":
    sys.exit(main())
