"""Damages the folders of runs and caches by hand, one way each, and runs the same command again.

    python tests/soak/damage.py --minutes 20          # all of them; --only NAME for one

Every damage must be seen. Either the command goes on from a good state, says so with the file's name, and ends with
the bytes of a run that was never damaged; or it refuses with exit code 2, in one line that names the file and says
what to do. Never is anything trained on that is not what was written, and never is there a traceback.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import damages
from common import Promises, differences, said_in_one_line, settings, small, tail, weights
from processes import Ended, run, start

ITERATIONS = 12
ENDS = "ends with 0 or 2, without a traceback"
NAMES = "the damage is named"
ADVICE = "a refusal is one line with a file and what to do"
BYTES = "what goes on ends with the bytes of an undamaged run"
EXPECTED = "is recovered or refused as it should be"
ADVISES = re.compile(
    r"\b(choose|remove|delete|put|give|copy|download|restore|start|encode|write|set|repair|convert|correct|use|make|"
    r"check|wait|load|lower|replace|move|export|train|point|name|the same values?)\b",
    re.I,
)


@dataclass
class Base:
    """What damages start from: an unfinished run, a finished cache, and how an undamaged run ends."""

    arguments: Callable[[Path], list]
    folder: Path
    expected: dict[str, str]


class Workshop:
    """Undamaged folders, each made once: a run (one file a checkpoint), a run in parts, one that reads a cache."""

    def __init__(self, work: Path):
        self.work, self.bases = work, {}
        self.prompts = common.write_prompts(work / "prompts.txt")
        self.pairs = common.write_pairs(work / "pairs")
        self.data = [f"data.prompts={self.prompts}"]
        self.with_pairs = [*self.data, f"data.pairs={self.pairs}", "gan.generator_weight=0.01", "method.steps=1"]
        self.cache = work / "cache"
        encoded = self.run("encode", *self.encoded_data(), "--out", self.cache)
        if encoded.code:
            raise SystemExit(f"encode: does not run at all: {tail(encoded.output)}")

    def encoded_data(self) -> list:
        return ["--config", "demo", *settings(*self.with_pairs), "--shard-size", 2]

    def run(self, *arguments: object) -> Ended:
        return run(list(arguments), self.work / "child.log", self.work)

    def base(self, kind: str) -> Base:
        """``plain``, ``parts`` (sharded), ``pairs``, ``cached`` (pairs from ``cache``) or ``other`` (another seed)."""
        if kind not in self.bases:
            extra = {
                "plain": [*self.data, "training.snapshot_every=4"],
                "other": [*self.data, "training.snapshot_every=4", "training.seed=7"],
                "parts": [*self.data, "training.sharding=full"],
                "pairs": self.with_pairs,
                "cached": [*self.with_pairs, f"data.cache={self.work / 'trial-cache'}"],
            }[kind]
            values = small(ITERATIONS, 2, *extra)
            shutil.rmtree(self.work / "trial-cache", ignore_errors=True)
            shutil.copytree(self.cache, self.work / "trial-cache")

            def arguments(folder: Path) -> list:
                return ["distill", "--config", "demo", *values, "--out", folder]

            whole, folder = self.work / f"{kind}-whole", self.work / f"{kind}-base"
            ended = self.run(*arguments(whole))
            if ended.code:
                raise SystemExit(f"distill ({kind}): does not run at all: {tail(ended.output)}")
            self._interrupt(arguments(folder), folder)
            self.bases[kind] = Base(arguments, folder, weights(whole))
            shutil.rmtree(whole)
        return self.bases[kind]

    def _interrupt(self, arguments: list, folder: Path) -> None:
        """Killed in the middle of its iterations, when it has some checkpoints behind it."""
        child, log = start(arguments, self.work / "child.log", folder), folder / "log.jsonl"
        while not child.ended() and (not log.is_file() or log.read_text().count("\n") < ITERATIONS // 2 + 1):
            time.sleep(0.005)
        child.kill(signal.SIGKILL)
        if child.code != -signal.SIGKILL:
            raise SystemExit(f"distill: ended before it was killed: {tail(child.output())}")


def judge(damage: damages.Damage, shop: Workshop, promises: Promises) -> str:
    """Damages a copy, runs the command, and checks what it says: a word for the table."""
    base = shop.base(damage.base)
    folder = shop.work / "trial"
    for name, source in (("trial", base.folder), ("trial-cache", shop.cache)):
        shutil.rmtree(shop.work / name, ignore_errors=True)
        shutil.copytree(source, shop.work / name)
    place = damages.Place(folder, shop.work / "trial-cache", shop.prompts, shop.pairs, shop)
    kept = {path: path.read_bytes() for path in [shop.prompts, *sorted(shop.pairs.iterdir())]}
    named = damage.do(place)
    arguments = damage.command(place) if damage.command else base.arguments(folder)
    ended = run(arguments, shop.work / "child.log", folder)
    if damage.undo:
        damage.undo(place)
    for path, content in kept.items():
        path.write_bytes(content)

    told, lines = f"{damage.name}: {ended.code}: {tail(ended.output)}", ended.output.splitlines()
    clean = ended.code in (0, 2) and "Traceback (most recent call last)" not in ended.output
    if not promises.check(clean, ENDS, told):
        return f"ended with {ended.code}"
    outcome = "refused" if ended.code == 2 else "recovered"
    promises.check(outcome in damage.may, EXPECTED, f"{outcome}: {told}")
    told_lines = [line for line in lines if any(name in line for name in named)]
    if damage.aloud or outcome == "refused":
        # Its name in the line that every start prints of its settings is no warning.
        told_lines = [line for line in told_lines if not re.match(r"\w+ = ", line) and "Exported" not in line]
        promises.check(bool(told_lines), NAMES, f"expected one of {named} in: {told}")
    if outcome == "refused":
        line = said_in_one_line(ended.output)
        promises.check(bool(line) and bool(ADVISES.search(line)), ADVICE, told)
    elif damage.same_end == "cache":
        wrong = differences(weights(place.cache), weights(shop.cache))
        promises.check(not wrong, BYTES, f"{damage.name}: {wrong}")
    elif damage.same_end:
        # Not which older checkpoints are kept, which depends on where it went on from.
        wrong = differences(weights(folder), base.expected)
        wrong = ", ".join(n for n in wrong.split(", ") if n in ("generator.safetensors", "checkpoint.safetensors"))
        promises.check(not wrong, BYTES, f"{damage.name}: {wrong} {tail(ended.output)}")
    return outcome


def main() -> int:
    arguments = common.parser(__doc__.splitlines()[0], count=len(damages.DAMAGES), minutes=20)
    arguments.add_argument("--only", action="append", help="a damage's name, or a part of it; may be repeated")
    args = arguments.parse_args()
    common.prepare()
    promises, outcomes = Promises(), []
    chosen = [d for d in damages.DAMAGES if not args.only or any(part in d.name for part in args.only)]
    with common.work_folder(args.work) as work:
        shop = Workshop(work)
        for damage in chosen[: args.count]:
            if time.monotonic() - promises.started > 60 * args.minutes:
                print(f"{args.minutes:g} minutes are over", flush=True)
                break
            outcome = judge(damage, shop, promises)
            outcomes.append((damage.name, outcome))
            promises.figures["damaged folders"] += 1
            promises.figures[outcome] += 1
        subprocess.run(["umount", work / "trial"], capture_output=True)  # of the read-only one, where it was stopped
    width = max(len(name) for name, _ in outcomes) if outcomes else 0
    print("\n" + "\n".join(f"  {name:<{width}}  {outcome}" for name, outcome in outcomes))
    return promises.finish("damage.py")


if __name__ == "__main__":
    sys.exit(main())
