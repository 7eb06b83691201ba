"""Mutations of files, drawn from a ``random.Random``: of any bytes, and of what knows a format.

An input is a folder: ``{path in it: content}``, where a content is bytes, ``Padded`` bytes, or a ``Special`` file.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from formats import of_picture, of_tar, raw
from hostile import DEEP, DIGITS, HUGE, LINES, NAMES, NUMBERS, OTHER_KINDS, SHAPES, TEXTS, TOML


@dataclass(frozen=True)
class Padded:
    """Bytes, and so many zeros behind them that no disk holds: the weights of a model whose header is read."""

    head: bytes
    tail: int


@dataclass(frozen=True)
class Special:
    """What is no regular file: ``fifo``, ``link`` to ``target``, ``folder``, or ``sparse`` of ``size`` bytes."""

    kind: str
    target: str = ""
    size: int = 0


Content = bytes | Padded | Special
Input = dict[str, Content]
Mutation = Callable[[random.Random, bytes], bytes]


def weird(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, SHAPES))))  # nothing comes to hold itself


# -- JSON ------------------------------------------------------------------------------------------------------------


def change_tree(rng: random.Random, tree: Any) -> Any:
    """One value, somewhere: replaced, removed, repeated or wrapped."""
    place, key = None, None
    node = tree
    while isinstance(node, dict | list) and node and (place is None or rng.random() < 0.75):
        place, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = place[key]
    if place is None or rng.random() < 0.05:
        return weird(rng)
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[str(weird(rng))[:1000]] = copy.deepcopy(node)
    elif kind == 2 and isinstance(node, int | float) and not isinstance(node, bool):
        place[key] = rng.choice((node + 1, node - 1, -node, node * 2**32, float(node), str(node), [node]))
    elif kind == 3:
        place[key] = rng.choice(([node], {"a": node}, str(node), f"{node}\x1b"))
    else:
        place[key] = weird(rng)
    return tree


def to_json(rng: random.Random, tree: Any) -> bytes:
    text = json.dumps(tree)
    if rng.random() < 0.05 and text.startswith("{") and isinstance(tree, dict) and tree:
        text = "{" + json.dumps({rng.choice(list(tree)): weird(rng)})[1:-1] + ", " + text[1:]
    depth = rng.choice((500, 20_000, 100_000))
    text = text.replace(f'"{DEEP}"', rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    return text.replace(f'"{HUGE}"', "1e999").replace(f'"{DIGITS}"', "9" * 5000).encode()


def of_json(rng: random.Random, data: bytes) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return raw(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = change_tree(rng, tree)
    return to_json(rng, tree)


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Its header as JSON, with a length that fits in most cases."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + size])
    except (ValueError, struct.error, RecursionError):
        return raw(rng, data)
    if isinstance(tree, dict) and rng.random() < 0.5 and isinstance(tree.get("__metadata__"), dict):
        tree["__metadata__"] = change_tree(rng, tree["__metadata__"])
        if isinstance(tree["__metadata__"], dict) and rng.random() < 0.8:  # as the format's own reader accepts it
            tree["__metadata__"] = {k: v if isinstance(v, str) else str(v) for k, v in tree["__metadata__"].items()}
    else:
        tree = change_tree(rng, tree)
    text = to_json(rng, tree)
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, 2**63, 10**8, 2**32))
    return struct.pack("<Q", length) + text + data[8 + size :]


# -- text ------------------------------------------------------------------------------------------------------------


def of_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        lines.insert(at, rng.choice(LINES))
    elif kind == 1:
        lines[at] = rng.choice(LINES) + lines[at]
    elif kind == 2:
        lines[at] = lines[at] * rng.choice((2, 500))
    elif kind == 3:
        del lines[at]
    else:
        lines[at] = of_json(rng, lines[at])
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", "\u2028".encode())).join(lines)


def of_toml(rng: random.Random, data: bytes) -> bytes:
    lines = data.decode(errors="replace").splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    name = lines[at].partition("=")[0] if lines else "a "
    kind = rng.randrange(6)
    if kind < 3 and lines:
        lines[at] = f"{name}= {rng.choice(TOML)}"
    elif kind == 3 and lines:
        lines.insert(at, lines[at])
    elif kind == 4 and lines:
        lines[at] = rng.choice(("[model]", "[[model]]", "[a.b.c]", "model = 1", "a.b = 2", f"{name}x = 1", "= 1", "[]"))
    elif lines:
        del lines[at]
    text = rng.choice(("\n", "\n", "\r\n")).join(lines)
    return (b"\xef\xbb\xbf" if rng.random() < 0.03 else b"") + text.encode(errors="surrogatepass")


# -- whole inputs ----------------------------------------------------------------------------------------------------

FORMATS: dict[str, Mutation] = {
    ".json": of_json, ".safetensors": of_safetensors, ".toml": of_toml, ".tar": of_tar, ".png": of_picture,
    ".jpg": of_picture, ".jpeg": of_picture, ".webp": of_picture, ".txt": of_lines, ".jsonl": of_lines,
    ".csv": of_lines,
}  # fmt: skip
SPECIALS = [
    Special("fifo"), Special("link", "/dev/zero"), Special("link", "nowhere"), Special("link", "."), Special("folder"),
    Special("sparse", size=1 << 36), Special("link", "/etc/hostname"), Special("link", "/dev/null"),
]  # fmt: skip


def of_content(rng: random.Random, name: str, content: Content) -> Content:
    if isinstance(content, Special):
        return content
    known = FORMATS.get(PurePosixPath(name).suffix, raw)
    change = known if rng.random() < 0.7 else raw
    if isinstance(content, Padded):
        tail = content.tail if rng.random() < 0.9 else rng.choice((0, content.tail // 2, content.tail + 1))
        return Padded(change(rng, content.head), tail)
    return change(rng, content)


def mutate(rng: random.Random, seed: Input, target: str) -> Input:
    """``seed`` with one to three changes; ``target``: the file that is read, "" for all of them."""
    made, names = dict(seed), sorted(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(names) if not target or rng.random() < 0.3 else target
        draw = rng.random()
        if draw < 0.01:
            made[name] = rng.choice(SPECIALS)
        elif draw < 0.03 and not target:
            made.pop(name, None)
        elif draw < 0.06 and not target:
            made[rng.choice(NAMES)] = rng.choice([*SPECIALS[:5], *OTHER_KINDS, made.get(name, b"")])
        elif name in made:
            made[name] = of_content(rng, name, made[name])
    return made
