"""A folder of encoded prompts and pairs: safetensors shards, and an index that is written when all of them are there.

Each shard has one tensor a field, rows along the first axis: ``row`` (int64, the row's place in the list of prompts or
pairs), the fields of ``Conditioning`` and, for pairs, ``latents``. Its rows are alike in their shapes: texts have
equally many chunks, pictures one size. Facts about what was encoded are in the index and in every shard's header, so
that a cache of something else is never taken for this one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.recipe import Unconditional
from ..core.rng import BatchRNG
from ..files.atomic import write_text
from ..files.header import read_header
from ..files.reading import TEXT_LIMIT, read_json, reading, shown
from ..files.tensors import DamagedFile, LazyTensor, verify, write_tensors
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning, RealBatch, join
from .lengths import Lengths
from .picker import RowPicker
from .pictures import Pictures
from .tables import ROW_LIMIT

INDEX_FILE = "index.json"
UNCONDITIONAL_FILE = "unconditional.safetensors"
FORMAT = 1
ENCODE_AGAIN = "sid_train encode into the same folder makes it again, and leaves alone what is whole"

Facts = dict[str, Any]
"""What a cache was made of, in JSON's types. None is written nowhere, and expected not to be there."""
ShardIndex = list[dict[str, Any]]
"""``{"file": name, "rows": count}`` for each shard of one table."""


def model_facts(bundle: ModelBundle) -> Facts:
    return {"format": FORMAT, "model": f"SHA-256 {bundle.file_hash}", "image_size": list(bundle.image_size)}


def prompt_facts(prompts: list[str], lengths: Lengths) -> Facts:
    """The most chunks of a prompt too: earlier versions read only one, and ``data.max_tokens`` may say so."""
    return {"prompts": prompts_digest(prompts), "prompt_chunks": lengths.most}


def pair_facts(pictures: Pictures, buckets: bool, lengths: Lengths) -> Facts:
    return {"pairs": pairs_digest(pictures), "buckets": buckets, "caption_chunks": lengths.most}


def prompts_digest(prompts: list[str]) -> str:
    """What a list of prompts is, wherever it is kept."""
    return _digest(prompts)


def pairs_digest(pictures: Pictures) -> str:
    """Pictures are told by file name, caption and size in bytes: to read all of them takes too long at every start."""
    return _digest([[entry.file.name, entry.caption, entry.size, entry.offset] for entry in pictures.entries])


def _digest(items: list) -> str:
    return f"{len(items)} rows, SHA-256 {hashlib.sha256(json.dumps(items).encode()).hexdigest()}"


def require_same(found: Facts, expected: Facts, where: str) -> None:
    """ValueError that says which of the ``expected`` facts ``where`` has otherwise."""
    differ = [
        f"{k} ({shown(repr(found.get(k)), 100)} there, {v!r} here)" for k, v in expected.items() if found.get(k) != v
    ]
    if differ:
        raise ValueError(
            f"{where}: was encoded from something else: {', '.join(differ)}. Encode into another folder, or put the "
            f"old data and settings back"
        )


# -- writing -----------------------------------------------------------------------------------------------------


def write_shard(path: Path, tensors: dict[str, Tensor], facts: Facts) -> None:
    """The whole file, with its hash, or none of it. ValueError for a value that is not finite: fp16 holds 65,504."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite in {tensor.dtype}: encode it in another --dtype")
    stored = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_tensors(path, stored, {"facts": json.dumps(_written(facts), sort_keys=True)}, checksum=True)


def shard_is_there(path: Path, facts: Facts) -> bool:
    """Whether an earlier run finished this shard, and nothing damaged it since; ValueError if it did so from something
    else.
    """
    if not path.is_file():
        return False
    try:
        verify(path)
    except DamagedFile as error:
        print(f"{error}: encoding it again", flush=True)
        return False
    with _open_shard(path) as file:
        require_same(_facts_of(file), facts, str(path))
    return True


def write_index(folder: Path, facts: Facts, prompts: ShardIndex, pairs: ShardIndex) -> None:
    content = {"facts": _written(facts), "unconditional": UNCONDITIONAL_FILE, "prompts": prompts, "pairs": pairs}
    write_text(folder / INDEX_FILE, json.dumps(content, indent=1) + "\n")


def _written(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if value is not None}


def read_index(folder: Path) -> dict[str, Any]:
    """ValueError where there is none, or one that ``write_index`` did not write."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: has no {INDEX_FILE}: expected a folder that 'sid_train encode' finished")
    try:
        return _checked_index(read_json(path, TEXT_LIMIT), path)
    except ValueError as error:
        raise ValueError(f"{error}. {ENCODE_AGAIN}") from None


def _checked_index(content: Any, path: Path) -> dict[str, Any]:
    expected = {"facts": dict, "unconditional": str, "prompts": list, "pairs": list}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), kind) for k, kind in expected.items()):
        raise ValueError(f"{path}: not the index of a cache")
    for shard in [{"file": content["unconditional"], "rows": 1}, *content["prompts"], *content["pairs"]]:
        name, rows = (shard.get("file"), shard.get("rows")) if isinstance(shard, dict) else (None, None)
        # No slash, so nothing outside of the folder is opened.
        if not isinstance(name, str) or re.fullmatch(r"[\w-]+\.safetensors", name) is None:
            raise ValueError(f"{path}: expected the name of a shard, got {shown(repr(name), 60)}")
        if type(rows) is not int or not 0 < rows <= ROW_LIMIT:
            raise ValueError(f"{path}: {name}: expected a number of rows, got {shown(repr(rows), 60)}")
    return content


# -- reading -----------------------------------------------------------------------------------------------------


class Shards:
    """Rows of one table by their place in its list. Files are mapped into memory: only what is read is loaded."""

    def __init__(self, folder: Path, index: ShardIndex, facts: Facts):
        self.files = [folder / shard["file"] for shard in index]
        self._verified: set[int] = set()
        self.latent_shapes: list[tuple[int, ...]] = []  # of each row, where there are latents
        count = sum(shard["rows"] for shard in index)
        tables: list[Tensor] = []
        shapes: dict[int, tuple[int, ...]] = {}
        for number, path in enumerate(self.files):
            with _open_shard(path) as file:
                require_same(_facts_of(file), facts, str(path))
                rows = file.get_tensor("row").clone()
                if "latents" in file.keys():  # noqa: SIM118  # not a dict
                    shapes[number] = tuple(file.get_slice("latents").get_shape()[1:])
            if rows.dtype != torch.int64 or rows.shape != (index[number]["rows"],):
                raise ValueError(
                    f"{path}: expected {index[number]['rows']} rows, got {len(rows) if rows.dim() else rows.dtype}: "
                    f"encode it anew"
                )
            if rows.min() < 0 or rows.max() >= count:
                raise ValueError(f"{path}: expected rows below {count}, got {rows.max()}: encode it anew")
            tables.append(rows)
        self.shard = torch.full((count,), -1)  # once the shards have as many rows as the index claims
        self.position = torch.empty(count, dtype=torch.int64)
        for number, rows in enumerate(tables):
            self.shard[rows] = number
            self.position[rows] = torch.arange(len(rows))
        if (self.shard < 0).any():
            raise ValueError(f"{folder}: row {int((self.shard < 0).nonzero()[0])} is in no shard: encode it anew")
        if shapes:
            self.latent_shapes = [shapes[number] for number in self.shard.tolist()]

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """All fields of ``rows``, in the order given; each shard is opened once. Texts are made ``equally_long``."""
        found: dict[str, list[Tensor]] = {}
        shards = self.shard[list(rows)]
        order = torch.argsort(shards, stable=True).tolist()
        for number in shards.unique().tolist():
            self._verify(number)
            with _open_shard(self.files[number]) as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    for k in order:
                        if shards[k] == number:
                            at = int(self.position[rows[k]])
                            found.setdefault(name, []).append(part[at : at + 1])
        for name, parts in found.items():
            for k, part in zip(order, parts, strict=True):
                if part.is_floating_point() and not part.isfinite().all():
                    shard = self.files[int(shards[k])]
                    raise ValueError(f"{shard}: {name} of row {rows[k]} is not finite: encode into another folder")
        back = torch.argsort(torch.tensor(order))
        return {name: join(parts)[back] for name, parts in found.items()}

    def verify(self) -> None:
        """ValueError where a file is not what was written: about a second a gigabyte."""
        for number in range(len(self.files)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        """Each file once, when something is first read of it: a cache may have hundreds of gigabytes."""
        if number not in self._verified:
            _require_whole(self.files[number])
            self._verified.add(number)


class CachedRows:
    """Encoded prompts from a cache (an ``EncodedRows``)."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def read(self, rows: Sequence[int]) -> Conditioning:
        return _conditioning(self.shards.read(rows))


class CachedPairs:
    """Latents and their own prompts' conditioning from a cache (a ``PairSource``)."""

    def __init__(self, shards: Shards, identity: str):
        self.shards, self.identity = shards, identity
        self.picker = RowPicker(shards.latent_shapes)

    def draw(self, batch: int, rng: BatchRNG) -> RealBatch:
        tensors = self.shards.read(self.picker.draw(batch, rng))
        return RealBatch(tensors["latents"].to(rng.device), _conditioning(tensors).to(rng.device))


class Cache:
    """A finished cache."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = read_index(folder)
        self.facts: Facts = self.index["facts"]

    def expect(self, facts: Facts) -> None:
        """ValueError if the cache was made of something else than ``facts`` say."""
        require_same(self.facts, facts, f"data.cache: {self.folder}")

    def prompts(self) -> CachedRows:
        return CachedRows(Shards(self.folder, self.index["prompts"], self.facts))

    def pairs(self) -> CachedPairs:
        return CachedPairs(Shards(self.folder, self.index["pairs"], self.facts), self.facts["pairs"])

    def unconditional(self, kind: Unconditional) -> Conditioning:
        """The embedding of no text, a single row."""
        path = self.folder / self.index["unconditional"]
        _require_whole(path)
        with _open_shard(path) as file:
            require_same(_facts_of(file), self.facts, str(path))
            prefix = f"{kind}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # not a dict
            return Conditioning(**{name.removeprefix(prefix): file.get_tensor(name).clone() for name in names})


def _require_whole(path: Path) -> None:
    try:
        verify(path)
    except DamagedFile as error:
        raise ValueError(f"{error}. {ENCODE_AGAIN}") from None


def _conditioning(tensors: dict[str, Tensor]) -> Conditioning:
    return Conditioning(**{name: tensor for name, tensor in tensors.items() if name not in ("row", "latents")})


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, but the index lists it: encode into this folder again")
    with reading(path, "a shard of a cache"):
        try:
            read_header(path)  # the format's own reader maps a file of any size first
        except ValueError as error:
            raise ValueError(f"{error}. Remove it and encode again") from None
        with safe_open(path, framework="pt") as file:
            yield file


def _facts_of(file: Any) -> Facts:
    facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    return facts if isinstance(facts, dict) else {}
