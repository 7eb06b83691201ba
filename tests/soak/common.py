"""What the soak's commands share: settings, what is on the disk, and the table of promises that a command ends with.

``prepare()`` comes before anything that imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("distill", "dry_run", "encode", "export", "demo", "sample", "inspect", "plan", "evaluate", "convert")
CAPTIONS = [f"a {c} {n} on a {g} ground" for n in ("three", "seven") for c, g in (("red", "blue"), ("green", "black"))]


def prepare() -> None:
    """This checkout's ``sid_train`` with one thread, no network and no GPU."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    importlib.import_module("sid_train.cli")
    for name in COMMANDS:
        importlib.import_module(f"sid_train.commands.{name}")
    found = Path(sys.modules["sid_train"].__file__ or "")
    if not found.is_relative_to(ROOT):
        raise SystemExit(f"expected sid_train in {ROOT}, found {found}")


# -- what is on the disk ---------------------------------------------------------------------------------------------


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def small(iterations: int, every: int, *values: str) -> list[str]:
    """The settings of a run of the demo that takes a second."""
    return settings(
        f"training.iterations={iterations}", f"training.checkpoint_every={every}", "training.batch_size=2",
        "training.fake_score_updates=1", "training.log_every=1", "training.tracker=none", *values,
    )  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def weights(folder: Path) -> dict[str, str]:
    """Digests of all safetensors files in a folder, by their path in it; what is being written is left out."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*.safetensors"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """Which files of two folders are not the same; "" where all are."""
    names = sorted(found.keys() | expected.keys())
    return ", ".join(name for name in names if found.get(name) != expected.get(name))


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp"))


def logged(folder: Path) -> list[int]:
    """The iterations in a run's log, in its order."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def write_prompts(path: Path, captions: list[str] = CAPTIONS) -> Path:
    path.write_text("\n".join(captions) + "\n")
    return path


def write_pairs(folder: Path, count: int = 4) -> Path:
    """A folder of small pictures with captions."""
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        Image.effect_noise((20, 24), 40 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder


# -- promises --------------------------------------------------------------------------------------------------------


@dataclass
class Promises:
    """Counts what was tried and what was broken; the examples of a broken promise are printed once each."""

    figures: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def check(self, holds: bool, promise: str, example: str | Callable[[], str] = "") -> bool:
        self.tried[promise] += 1
        if not holds:
            self.broken[promise] += 1
            told = example() if callable(example) else example
            print(f"BROKEN: {promise}: {told}", flush=True)
        return holds

    def finish(self, title: str) -> int:
        """The table, and the exit code: 1 where a promise was broken, or where none was tried."""
        rows = [(name, f"{value:,}") for name, value in self.figures.items()]
        rows += [(promise, f"{self.broken[promise]:,} broken of {tried:,}") for promise, tried in self.tried.items()]
        rows.append(("minutes", f"{(time.monotonic() - self.started) / 60:.1f}"))
        width = max(len(name) for name, _ in rows)
        print(f"\n{title}\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows), flush=True)
        return 1 if self.broken or not self.tried else 0


def tail(output: str, lines: int = 2) -> str:
    """The end of what a command printed, in one line."""
    return " | ".join(output.strip().splitlines()[-lines:])[-400:]


def said_in_one_line(output: str) -> str:
    """The line of a refusal; "" where there is none, or a traceback."""
    last = output.strip().splitlines()[-1:] or [""]
    return last[0] if last[0].startswith("error: ") and "Traceback (most recent call last)" not in output else ""


def parser(summary: str, count: int, minutes: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=summary)
    made.add_argument("--count", type=int, default=count, help=f"default: {count}")
    made.add_argument("--seed", type=int, default=0, help="what is drawn follows from it (default: 0)")
    made.add_argument("--minutes", type=float, default=minutes, help=f"no new trial after these (default: {minutes:g})")
    made.add_argument("--work", type=Path, help="a folder for what is written, left there (default: a temporary one)")
    return made


@contextlib.contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """A folder to work in; removed at the end, unless it was named. SIGTERM ends the command so that it is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="sid-soak-")).resolve()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
