"""Feeds every reader of strangers' files with mutated ones.

    python tests/soak/fuzz.py --count 50000 --seed 0 --minutes 60 --out violations
    python tests/soak/fuzz.py --reader "prompts.csv" --count 2000

Promised is that each input is read or refused as a command would refuse it: a ValueError or an OSError in one line of
bounded length that names the input; within 10 seconds, and within 1 GiB of memory. Each kind of violation is told once,
by reader, exception and the innermost function of ours, and its input is kept under ``--out``. An input follows from
the seed, the reader and its number alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import common
from common import Promises
from mutate import Input, Padded, Special, mutate
from reader import Reader
from readers import make_readers

MEMORY, TEXT = 1 << 30, 5000
BATCH = 250
PROMISES = {
    "traceback": "no exception but a refusal",
    "time": "no more than 10 s",
    "memory": f"no more than {MEMORY >> 30} GiB",
    "name": "a refusal names the file",
    "line": f"a refusal is one printable line of at most {TEXT:,} characters",
    "wrong": "what is accepted is what was written",
}


class TooLong(BaseException):
    """Not an Exception: a reader that turns everything into a refusal does not catch it."""


@dataclass
class Tally:
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    worst: float = 0
    peak: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


def write(made: Input, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in made.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Special):
                if content.kind == "fifo":
                    os.mkfifo(path)
                elif content.kind == "link":
                    path.symlink_to(content.target)
                elif content.kind == "folder":
                    path.mkdir()
                else:
                    path.touch()
                    os.truncate(path, content.size)
            elif isinstance(content, Padded):
                path.write_bytes(content.head)
                os.truncate(path, len(content.head) + content.tail)
            else:
                path.write_bytes(content)
        except OSError:
            continue  # such as a file below what was made a file


def input_of(reader: Reader, number: int, seed: int) -> Input:
    """Its mutated input of this number; for numbers below 0 one that is not mutated."""
    rng = random.Random(f"{seed}/{reader.name}/{number}")
    return reader.seeds[number] if number < 0 else mutate(rng, rng.choice(reader.seeds), reader.target)


def status(name: str) -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"{name}:\s+(\d+)", file.read()).group(1)) << 10  # type: ignore[union-attr]


def innermost(error: BaseException) -> str:
    """The last function of ours on the way to an exception."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "sid_train" in f.filename]
    return f"{frames[-1].filename.partition('sid_train/')[2]}:{frames[-1].name}" if frames else "?"


def problem(reader: Reader, target: Path, error: BaseException) -> str:
    """What is wrong with a refusal, "" for nothing."""
    from sid_train.errors import NonFiniteError
    from sid_train.files.reading import shown

    kind, where = type(error).__name__, innermost(error)
    if isinstance(error, TooLong):
        return f"time|{where}"
    if isinstance(error, MemoryError) or "needs more memory than there is" in str(error):
        return f"memory|{kind} in {where}"
    if not isinstance(error, ValueError | OSError | NonFiniteError):
        return f"traceback|{kind} in {where}"
    text = str(error)
    if not any(name in text for name in (target.name, shown(target), *reader.names)):
        return f"name|{kind} in {where}"
    if len(text) > TEXT or not text.isprintable():
        return f"line|{kind} in {where}, {'too long' if len(text) > TEXT else 'unprintable'}"
    return ""


def work_through(reader: Reader, numbers: range, seed: int, work: Path, pipe: int) -> None:
    """In a forked process: reads the inputs one after another, and writes a line of JSON for each."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(1000)

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 3 * MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = work / "given-folder"
    expected = None
    if reader.same:
        write(reader.seeds[0], folder)
        expected = reader.read(folder / reader.target)
    with open(pipe, "w") as out:
        for number in numbers:
            write(input_of(reader, number, seed), folder)
            print(json.dumps({"begin": number}), file=out, flush=True)
            target = folder / reader.target
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before, begun, found, accepted, said = status("VmRSS"), time.monotonic(), "", False, ""
            try:
                signal.setitimer(signal.ITIMER_REAL, reader.seconds)
                result = reader.read(target)
                signal.setitimer(signal.ITIMER_REAL, 0)
                accepted = True
                if reader.same and result != expected:
                    found = "wrong|other values than were written"
            except BaseException as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                found, said = problem(reader, target, error), str(error)[:150]
            seconds, peak = time.monotonic() - begun, status("VmHWM") - before
            if not found and seconds > reader.seconds:
                found = "time|in code that cannot be interrupted"
            if not found and peak > MEMORY:
                found = f"memory|{peak >> 20} MiB"
            entry = {"number": number, "accepted": accepted, "found": found, "said": said}
            print(json.dumps(entry | {"seconds": seconds, "peak": peak}), file=out, flush=True)
            if peak > 1 << 28:
                gc.collect()


def batch(reader: Reader, numbers: range, seed: int, work: Path, tally: Tally) -> list[tuple[int, str, str]]:
    """The violations by number; a process that hangs or dies is one, and the next goes on behind it."""
    violations: list[tuple[int, str, str]] = []
    first = numbers.start
    while first < numbers.stop:
        source, sink = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(source)
            errors = os.fdopen(os.dup(2), "w")  # readers write to nothing
            try:
                work_through(reader, range(first, numbers.stop), seed, work, sink)
            except BaseException:  # of this program, since a reader's are caught inside
                traceback.print_exc(file=errors)
                errors.flush()
                os._exit(1)
            os._exit(0)
        os.close(sink)
        current, text, hung = first, b"", False
        while True:
            ready, _, _ = select.select([source], [], [], 2 * reader.seconds)
            if not ready:
                hung = True
                os.kill(pid, signal.SIGKILL)
                break
            data = os.read(source, 1 << 16)
            if not data:
                break
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                entry = json.loads(line)
                if "begin" in entry:
                    current = entry["begin"]
                    continue
                first = entry["number"] + 1
                tally.inputs += 1
                tally.accepted += entry["accepted"]
                tally.refused += not entry["accepted"]
                tally.worst, tally.peak = max(tally.worst, entry["seconds"]), max(tally.peak, entry["peak"])
                if entry["found"]:
                    violations.append((entry["number"], entry["found"], entry["said"]))
        os.close(source)
        _, ended = os.waitpid(pid, 0)
        if first < numbers.stop:  # it did not come to the end
            tally.inputs += 1
            code = os.waitstatus_to_exitcode(ended)
            violations.append((current, "time|hangs" if hung else f"traceback|the process died ({code})", ""))
            first = current + 1
    return violations


def main() -> int:
    arguments = common.parser(__doc__.splitlines()[0], count=50_000, minutes=60)
    arguments.add_argument("--reader", action="append", help="only those whose name has this; may be repeated")
    arguments.add_argument("--out", type=Path, help="a folder for an input of each kind of violation")
    args = arguments.parse_args()
    common.prepare()
    promises, kept = Promises(), args.out and args.out.resolve()
    with common.work_folder(args.work) as work:
        readers = [r for r in make_readers(work) if not args.reader or any(part in r.name for part in args.reader)]
        total, tallies = sum(reader.share for reader in readers), {}
        ends = promises.started + 60 * args.minutes
        for reader in readers:
            tally = tallies[reader.name] = Tally()
            wanted = max(5, round(args.count * reader.share / total))
            batch(reader, range(-min(6, len(reader.seeds)), 0), args.seed, work, right := Tally())
            if not right.accepted:
                print(f"{reader.name}: it reads nothing that is not mutated either", flush=True)
                promises.figures["readers that read nothing"] += 1
            for first in range(0, wanted, BATCH):
                if time.monotonic() > ends:
                    print(f"{reader.name}: {args.minutes:g} minutes are over", flush=True)
                    break
                numbers = range(first, min(first + BATCH, wanted))
                for number, found, said in batch(reader, numbers, args.seed, work, tally):
                    kind = found.partition("|")[0]
                    promises.broken[PROMISES[kind]] += 1
                    tally.kinds[found] += 1
                    if tally.kinds[found] == 1:
                        print(f"BROKEN: {reader.name}: {found} (number {number}): {said!r}", flush=True)
                        if kept:
                            name = re.sub(r"\W+", "-", f"{reader.name} {found}")[:80]
                            write(input_of(reader, number, args.seed), kept / f"{name}-{number}")
            for promise in PROMISES.values():
                promises.tried[promise] += tally.inputs
            promises.figures["inputs"] += tally.inputs
    width = max(len(name) for name in tallies)
    print(f"\n{'reader':<{width}}  inputs  accepted  refused  violations (kinds)  worst s  peak MiB")
    for name, t in tallies.items():
        bad = f"{t.kinds.total()} ({len(t.kinds)})"
        row = f"{t.inputs:>6}  {t.accepted:>8}  {t.refused:>7}  {bad:>18}  {t.worst:>7.2f}  {t.peak >> 20:>8}"
        print(f"{name:<{width}}  {row}")
    return promises.finish(f"fuzz.py --count {args.count} --seed {args.seed}")


if __name__ == "__main__":
    sys.exit(main())
