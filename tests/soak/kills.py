"""Kills ``distill``, ``encode``, ``export`` and ``demo`` with SIGKILL at random, and runs the same command to its end.

    python tests/soak/kills.py --count 200 --seed 0 --minutes 60

A third of the kills come at a random time, a third right before a file operation, a third a moment after one began,
while what it writes is half there. Promised is that what the continued command ends with has the same bytes as that
of one that was never killed.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common
from common import CAPTIONS, Promises, differences, leftovers, small, tail, weights
from processes import Child, Ended, run, start

KINDS = ("at a time", "before a file operation", "in a write")
RESUMES = "the same command continues (0 refusals)"
SAME = "same bytes as a run that was never killed"
WHOLE = "a file with its final name is whole, right after the kill"
ONCE = "the log has each iteration once"
CLEAN = "no leftovers after the next run that ends"


@dataclass
class Command:
    """A command that writes into ``folder``, and what it leaves when nobody kills it.

    kills: how many come one after another before it may end; share: of all kills
    """

    name: str
    arguments: list
    folder: Path
    kills: int
    share: float
    iterations: int = 0

    def measure(self, log: Path) -> None:
        """The reference: bytes, seconds and file operations of a run that is left alone."""
        self.folder.mkdir(parents=True)
        self.reference: Ended = run(self.arguments, log, self.folder)
        if self.reference.code:
            raise SystemExit(f"{self.name}: does not run at all: {tail(self.reference.output)}")
        self.expected = weights(self.folder)
        shutil.rmtree(self.folder)
        self.folder.mkdir()


def commands(work: Path) -> list[Command]:
    prompts = common.write_prompts(work / "prompts.txt", CAPTIONS)
    pairs = common.write_pairs(work / "pairs")
    data = common.settings(f"data.prompts={prompts}", f"data.pairs={pairs}", "gan.generator_weight=0.01")
    demo = ["--config", "demo"]
    distill, encode, export, lora = (work / name for name in ("distill", "encode", "export", "run"))
    made = run(["distill", *demo, *small(2, 2), "--out", lora], work / "made.log", lora)
    if made.code:
        raise SystemExit(f"distill: does not run at all: {tail(made.output)}")
    return [
        Command("distill", ["distill", *demo, *small(6, 2), "--out", distill], distill, 1, 0.35, 6),
        Command(
            "distill, each", ["distill", *demo, *small(4, 1, "training.snapshot_every=2"), "--out", distill / "b"],
            distill / "b", 2, 0.2, 4,
        ),
        Command("encode", ["encode", *demo, *data, "--shard-size", 1, "--out", encode], encode, 1, 0.2),
        Command("export", ["export", lora, "-o", export / "x.safetensors"], export, 1, 0.2),
        Command("demo", ["demo", "--steps", 1, *small(6, 2), "--out", work / "demo"], work / "demo", 5, 0.05, 6),
    ]  # fmt: skip


def kill_once(command: Command, kind: str, rng: random.Random, log: Path) -> Child:
    """Starts the command and kills it; a draw may be later than its end, as a kill may be."""
    operation = rng.randint(1, max(1, command.reference.operations))
    if kind == "before a file operation":
        child = start(command.arguments, log, command.folder, die_at=operation)
        child.wait()
        return child
    child = start(command.arguments, log, command.folder)
    if kind == "at a time":
        until = time.monotonic() + rng.uniform(0, command.reference.seconds)
        while time.monotonic() < until and not child.ended():
            time.sleep(0.001)
    else:
        delay = rng.choice([0, 0.0005, 0.002, 0.005, 0.02, 0.05])
        while operation > 0 and not child.ended():
            operation -= child.seen(0.05)
        time.sleep(delay)
    child.kill()
    return child


def trial(command: Command, rng: random.Random, promises: Promises, work: Path, left: int) -> None:
    """Kills in a row, the same command to its end, and what it must have left."""
    shutil.rmtree(command.folder, ignore_errors=True)
    command.folder.mkdir(parents=True)
    log, history = work / "child.log", []
    for _ in range(min(command.kills, left)):
        kind = rng.choice(KINDS)
        child = kill_once(command, kind, rng, log)
        history.append(kind)
        if child.code != -9:
            promises.figures["kills that came after the end"] += 1
            if not promises.check(child.code == 0, RESUMES, f"{command.name} after {history}: {tail(child.output())}"):
                return
            continue
        promises.figures[f"kills {kind}"] += 1
        promises.figures[f"kills of {command.name}"] += 1
        promises.figures["kills"] += 1
        promises.figures["kills that left a temporary file"] += bool(leftovers(command.folder))
        final = {name: d for name, d in weights(command.folder).items() if "checkpoint" not in name}
        torn = [name for name, d in final.items() if command.expected.get(name) != d]
        promises.check(not torn, WHOLE, f"{command.name} after {history}: {torn}")
    ended = run(command.arguments, log, command.folder)
    if not promises.check(ended.code == 0, RESUMES, f"{command.name} after {history}: {tail(ended.output)}"):
        return
    wrong = differences(weights(command.folder), command.expected)
    promises.check(not wrong, SAME, f"{command.name} after {history}: {wrong}")
    left_over = leftovers(command.folder)
    promises.check(not left_over, CLEAN, f"{command.name} after {history}: {left_over}")
    if command.iterations:
        folder = command.folder / "run" if command.name == "demo" else command.folder
        found = common.logged(folder)
        promises.check(found == [*range(1, command.iterations + 1)], ONCE, f"{command.name} after {history}: {found}")


def main() -> int:
    arguments = common.parser(__doc__.splitlines()[0], count=200, minutes=60)
    arguments.add_argument("--only", action="append", help="distill, encode, export or demo; may be repeated")
    args = arguments.parse_args()
    common.prepare()
    promises, rng = Promises(), random.Random(args.seed)
    with common.work_folder(args.work) as work:
        chosen = [c for c in commands(work) if not args.only or c.name.split(",")[0] in args.only]
        for command in chosen:
            command.measure(work / "child.log")
            told = f"{command.reference.seconds:.1f} s, {command.reference.operations} file operations"
            print(f"{command.name}: {told} when it is left alone", flush=True)
        total = sum(command.share for command in chosen)
        for command in chosen:
            wanted = max(1, round(args.count * command.share / total))
            name = f"kills of {command.name}"
            promises.figures[name] = 0
            tries = 0
            while promises.figures[name] < wanted and tries < 3 * wanted + 3:
                if time.monotonic() - promises.started > 60 * args.minutes:
                    print(f"{command.name}: {args.minutes:g} minutes are over", flush=True)
                    break
                trial(command, rng, promises, work, wanted - promises.figures[name])
                tries += 1
            shutil.rmtree(command.folder, ignore_errors=True)
    return promises.finish(f"kills.py --count {args.count} --seed {args.seed}")


if __name__ == "__main__":
    sys.exit(main())
