"""The ways in which a folder is damaged, for ``damage.py``. Each returns the names of which one must be said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EITHER = frozenset({"recovered", "refused"})
REFUSED, RECOVERED = frozenset({"refused"}), frozenset({"recovered"})


@dataclass
class Place:
    """Copies to be damaged, and the files that the run reads (put back afterwards)."""

    run: Path
    cache: Path
    prompts: Path
    pairs: Path
    shop: Any

    def checkpoints(self) -> list[Path]:
        """What the run can continue from, newest first: files, or folders of a run in parts."""
        found = [p for p in self.run.glob("checkpoint*.safetensors") if p.is_file()]
        inside = self.run / "checkpoints"
        found += [p for p in inside.iterdir() if not p.name.startswith(".")] if inside.is_dir() else []
        return sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)


@dataclass
class Damage:
    """do: damages, and says the names of which one has to be told; may: what may come of it; aloud: whether going on
    has to be said; same_end: what going on must end as, the undamaged ``run``, the ``cache``, or ""; command: what is
    run instead of ``distill``; undo: what the next damage needs.
    """

    name: str
    do: Callable[[Place], list[str]]
    may: frozenset[str] = EITHER
    base: str = "plain"
    aloud: bool = True
    same_end: str = "run"
    command: Callable[[Place], list] | None = None
    undo: Callable[[Place], None] | None = None


# -- bytes -----------------------------------------------------------------------------------------------------------


def flip_bits(path: Path, count: int = 2) -> None:
    """In the data, well behind the header."""
    size = path.stat().st_size
    with open(path, "rb+") as file:
        for number in range(count):
            file.seek(size * (2 + number) // (3 + count))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x40]))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 3 // 5)


def make_hole(path: Path) -> None:
    """A sixth of the file is zeros, as where a file system lost blocks."""
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.seek(size // 2)
        file.write(bytes(size // 6))


def zero_page(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(bytes(4096))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(1, 256)) * 3)


def to(name: str, change: Callable[[Path], object]) -> Callable[[Place], list[str]]:
    """``change`` on a file of the run's folder."""

    def do(place: Place) -> list[str]:
        change(place.run / name)
        return [name]

    return do


def to_checkpoint(change: Callable[[Path], object], number: int = 1, part: str = "") -> Callable[[Place], list[str]]:
    """``change`` on the newest checkpoints, in a run in parts on the first file that ``part`` matches in each."""

    def do(place: Place) -> list[str]:
        found = place.checkpoints()[:number]
        for path in found:
            change(sorted(path.glob(part))[0] if path.is_dir() else path)
        return [path.name for path in found]

    return do


def to_shard(change: Callable[[Path], object], pattern: str) -> Callable[[Place], list[str]]:
    def do(place: Place) -> list[str]:
        path = sorted(place.cache.glob(pattern))[0]
        change(path)
        return [path.name]

    return do


def log_garbage(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[1:1] = ["null", "[]", '{"iteration": "x"}', '{"iteration": NaN}', "\x00\x01", "{}", '{"iteration": 1e999}']
    path.write_text("\n".join(lines) + '\n{"iter')


# -- what belongs to another run -------------------------------------------------------------------------------------


def change_prompts(place: Place) -> list[str]:
    place.prompts.write_text(place.prompts.read_text().replace("seven", "nine"))
    return [place.prompts.name, "data.prompts"]


def change_caption(place: Place) -> list[str]:
    (place.pairs / "1.txt").write_text("a red eight on a grey ground")
    return [place.pairs.name, "data.pairs"]


def change_picture(place: Place) -> list[str]:
    from PIL import Image

    Image.effect_noise((40, 40), 90).convert("RGB").save(place.pairs / "2.png")
    return [place.pairs.name, "data.pairs"]


def other_config(place: Place) -> list[str]:
    shutil.copy(place.shop.base("other").folder / "config.toml", place.run / "config.toml")
    return ["training.seed"]


def other_checkpoint(place: Place) -> list[str]:
    other = place.shop.base("other").folder
    for path in place.checkpoints():
        path.unlink()
    for path in Place(other, place.cache, place.prompts, place.pairs, place.shop).checkpoints():
        target = place.run / path.relative_to(other)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return ["checkpoint", "training.seed"]


def index_change(change: Callable[[dict], None]) -> Callable[[Place], list[str]]:
    def do(place: Place) -> list[str]:
        path = place.cache / "index.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return ["index.json", "prompts-missing"]

    return do


# -- what others left ------------------------------------------------------------------------------------------------


def left_by_the_dead(place: Place) -> list[str]:
    (place.run / ".lock").write_text("")
    (place.run / ".checkpoint.safetensors.999999.tmp").write_bytes(b"half")
    (place.run / ".config.toml.some-host.999999.0123abcd.tmp").write_bytes(b"half")
    return []


def read_only(place: Place) -> list[str]:
    """By a mount where this is root, whom permissions do not stop."""
    if os.geteuid():
        for path in [place.run, *place.run.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
    else:
        subprocess.run(["mount", "--bind", place.run, place.run], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place.run], check=True)
    return [place.run.name]


def writable_again(place: Place) -> None:
    if os.geteuid():
        for path in [place.run, *place.run.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o700)
    else:
        subprocess.run(["umount", place.run], check=True)


def export_snapshot(place: Place) -> list:
    return ["export", place.run, "--iteration", 4, "-o", place.shop.work / "x.safetensors"]


def encode_again(place: Place) -> list:
    return ["encode", *place.shop.encoded_data(), "--out", place.cache]


SNAPSHOT = "snapshots/0000004.safetensors"
DAMAGES = [
    Damage("config.toml of 0 bytes", to("config.toml", empty)),
    Damage("config.toml removed", to("config.toml", Path.unlink)),
    Damage("config.toml garbage", to("config.toml", garbage)),
    Damage("config.toml of another run", other_config, REFUSED),
    Damage("log with lines that are no records", to("log.jsonl", log_garbage), RECOVERED),
    Damage("log of 0 bytes", to("log.jsonl", empty), aloud=False),
    Damage("teacher.json garbage", to("teacher.json", garbage), aloud=False),
    Damage("teacher.json of another form", to("teacher.json", lambda p: p.write_text("[1]")), aloud=False),
    *(
        Damage(f"checkpoint {name}", to_checkpoint(change))
        for name, change in (
            ("cut off", cut_off),
            ("with a hole", make_hole),
            ("with a zero page", zero_page),
            ("with two flipped bits", flip_bits),
            ("of 0 bytes", empty),
            ("garbage", garbage),
        )
    ),
    Damage("the last two checkpoints flipped", to_checkpoint(flip_bits, number=2)),
    Damage("all checkpoints cut off", to_checkpoint(cut_off, number=99)),
    Damage("checkpoint of another run", other_checkpoint, REFUSED),
    Damage("part of a checkpoint flipped", to_checkpoint(flip_bits, part="*.safetensors"), base="parts"),
    Damage("part of a checkpoint of 0 bytes", to_checkpoint(empty, part="*.safetensors"), base="parts"),
    Damage("part of a checkpoint removed", to_checkpoint(Path.unlink, part="*.safetensors"), base="parts"),
    Damage("facts of a checkpoint garbage", to_checkpoint(garbage, part="facts.json"), base="parts"),
    Damage("snapshot flipped", to(SNAPSHOT, flip_bits), REFUSED, same_end="", command=export_snapshot),
    Damage("snapshot cut off", to(SNAPSHOT, cut_off), REFUSED, command=export_snapshot),
    Damage("shard of prompts flipped", to_shard(flip_bits, "prompts-*"), base="cached"),
    Damage("shard of pairs flipped", to_shard(flip_bits, "pairs-*"), base="cached"),
    Damage("shard cut off", to_shard(cut_off, "prompts-*"), base="cached"),
    Damage("shard of no text flipped", to_shard(flip_bits, "unconditional*"), base="cached"),
    Damage("index of 0 bytes", to_shard(empty, "index.json"), base="cached"),
    Damage(
        "index with a missing shard",
        index_change(lambda c: c["prompts"].append({"file": "prompts-missing.safetensors", "rows": 2})),
        base="cached",
    ),
    Damage("index of another form", index_change(lambda c: c.update(prompts={"a": 1})), base="cached"),
    Damage("encode again: index of 0 bytes", to_shard(empty, "index.json"), command=encode_again, same_end="cache"),
    Damage("encode again: shard flipped", to_shard(flip_bits, "prompts-*"), command=encode_again, same_end="cache"),
    Damage("encode again: shard of 0 bytes", to_shard(empty, "prompts-*"), command=encode_again, same_end="cache"),
    Damage("changed prompts", change_prompts, REFUSED),
    Damage("changed caption", change_caption, REFUSED, base="pairs"),
    Damage("changed picture", change_picture, REFUSED, base="pairs"),
    Damage("lock and temporaries of dead processes", left_by_the_dead, RECOVERED, aloud=False),
    Damage("read-only folder", read_only, REFUSED, undo=writable_again),
]
