"""``sid_train encode``: prompts, and pairs where there are any, through text encoder and latent codec into a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..config import Config, load_config
from ..core.recipe import Unconditional
from ..data.cache import (
    INDEX_FILE,
    UNCONDITIONAL_FILE,
    Facts,
    ShardIndex,
    model_facts,
    pair_facts,
    prompt_facts,
    read_index,
    require_same,
    shard_is_there,
    write_index,
    write_shard,
)
from ..data.lengths import measure, report_long
from ..data.pairs import PicturePairs, caption_lengths
from ..data.picker import RowPicker
from ..data.pictures import open_pictures
from ..data.rows import encode_prompts, prompts_of
from ..files.atomic import remove_leftovers
from ..files.console import unbreakable_output
from ..files.locks import lock_folder
from ..files.tensors import DTYPES
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning
from ..models.families import shipped_by
from ..training.teacher import open_teacher

Tensors = dict[str, Tensor]


@unbreakable_output()
def encode(config: str, overrides: list[str], out: Path, shard_size: int, dtype: str | None) -> None:
    encode_cache(load_config(config, overrides), out, shard_size, dtype)


def encode_cache(config: Config, out: Path, shard_size: int = 512, dtype: str | None = None) -> None:
    """Writes everything that ``config`` draws from, encoded, to the folder ``out``.

    After an interruption the same call leaves finished shards alone and ends with the same files. ``dtype`` (fp16, bf16
    or fp32) is what embeddings and latents are stored in; without it they keep the dtype they are computed in, and a
    run draws the very bits that it would have encoded itself. Time ids are never rounded. A shard that was damaged
    since it was written is encoded again. ValueError while another process encodes into ``out``.
    """
    if shard_size < 1:
        raise ValueError(f"--shard-size: expected 1 or more, got {shard_size}")
    if dtype not in (None, "fp16", "bf16", "fp32"):
        raise ValueError(f"--dtype: expected one of fp16, bf16, fp32, got {dtype!r}")
    if config.data.cache and Path(config.data.cache) != out:
        raise ValueError(f"--out: expected the folder that data.cache names, {config.data.cache}, got {out}")
    if shipped_by(config.data.pairs):
        raise ValueError("data.pairs: the demo's pictures are made anew at each draw: they cannot be cached")
    bundle = open_teacher(config.model).load(None, config.model.resolution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bundle.conditioner.max_tokens = config.data.max_tokens
    bundle.conditioner.to(device)
    bundle.codec.to(device)
    prompts = prompts_of(config.data.prompts, report=True)
    facts: Facts = model_facts(bundle) | {"dtype": dtype or "as encoded", "shard_size": shard_size}
    lengths = measure(bundle.conditioner, prompts)
    report_long(lengths, config.data.prompts)
    facts |= prompt_facts(prompts, lengths)
    pictures = open_pictures(config.data.pairs, report=True) if config.data.pairs else None
    if pictures is None:
        facts["pairs"] = "none"
    else:
        captions = caption_lengths(bundle, pictures)
        report_long(captions, f"{config.data.pairs}, captions")
        facts |= pair_facts(pictures, config.data.buckets, captions)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out, "another process is encoding into this folder")
    try:
        _require_same_index(out, facts)
        remove_leftovers(out)
        shards = _Shards(out, facts, shard_size, None if dtype is None else DTYPES[dtype])
        shards.write(UNCONDITIONAL_FILE, lambda: _unconditional(bundle))
        prompt_index = shards.write_table(
            "prompts",
            lengths.chunks,
            lambda rows: encode_prompts(bundle.conditioner, [prompts[row] for row in rows]).tensors,
        )
        pair_index: ShardIndex = []
        if pictures is not None:
            pairs = PicturePairs(pictures, bundle, config.data.buckets)
            alike = list(zip(pairs.sizes, captions.chunks, strict=True))
            pair_index = shards.write_table("pairs", alike, lambda rows: _encode_pairs(pairs, rows))
        write_index(out, facts, prompt_index, pair_index)
    finally:
        lock.release()
    print(f"{out}: {len(prompts)} prompts, {len(pictures or [])} pairs. Train with --set data.cache={out}", flush=True)


def _require_same_index(out: Path, facts: Facts) -> None:
    """ValueError where ``out`` is a cache of something else."""
    if not (out / INDEX_FILE).is_file():
        return
    try:
        index = read_index(out)
    except ValueError as error:  # the shards know what they are, too
        print(error, flush=True)
    else:
        require_same(index["facts"], facts, str(out))


def _unconditional(bundle: ModelBundle) -> Tensors:
    kinds = {kind: bundle.unconditional(kind).to("cpu") for kind in get_args(Unconditional)}
    return {f"{kind}.{name}": tensor for kind, cond in kinds.items() for name, tensor in cond.tensors.items()}


def _encode_pairs(pairs: PicturePairs, rows: list[int]) -> Tensors:
    latents, conds = zip(*map(pairs.encode, rows), strict=True)
    return {"latents": torch.cat(latents)} | Conditioning.cat(conds).tensors


class _Shards:
    """Writes the shards of one cache, those that are not there yet.

    dtype: of embeddings and latents; None is what they are computed in
    """

    def __init__(self, out: Path, facts: Facts, size: int, dtype: torch.dtype | None):
        self.out, self.facts, self.size, self.dtype = out, facts, size, dtype

    def write_table(self, table: str, kinds: Sequence[Any], compute: Callable[[list[int]], Tensors]) -> ShardIndex:
        """Shards of rows of one kind each, so that they have one shape of a field; their names and sizes."""
        index: ShardIndex = []
        members = RowPicker(kinds).members
        for kind in sorted(members):
            for start in range(0, len(members[kind]), self.size):
                rows = members[kind][start : start + self.size]
                name = f"{table}-{len(index):05d}.safetensors"
                self.write(name, lambda rows=rows: {"row": torch.tensor(rows)} | compute(rows))
                index.append({"file": name, "rows": len(rows)})
        return index

    def write(self, name: str, compute: Callable[[], Tensors]) -> None:
        path = self.out / name
        if shard_is_there(path, self.facts):
            print(f"{path}: already there", flush=True)
            return
        write_shard(path, self._stored(compute()), self.facts)
        print(f"{path}: written", flush=True)

    def _stored(self, tensors: Tensors) -> Tensors:
        """In the dtype asked for, time ids apart: bf16 cannot hold 1,025."""
        if self.dtype is None:
            return tensors
        return {k: v if k.endswith(("row", "time_ids")) else v.to(self.dtype) for k, v in tensors.items()}
