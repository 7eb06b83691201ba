"""The prompts of a run as encoded rows: encoded at the start, when they are drawn, or by ``sid_train encode``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from ..core.recipe import Unconditional
from ..core.rng import BatchRNG
from ..files.reading import shown
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioner, Conditioning
from ..models.families import shipped_by
from .cache import Cache, model_facts, prompt_facts
from .config import DataConfig
from .lengths import measure, report_long
from .prompts import load_prompts

EAGER_LIMIT = 4096
"""Up to this many prompts are encoded once and kept (2.6 GB in fp32 for SDXL); more are encoded when drawn."""


def prompts_of(source: str, report: bool = False) -> list[str]:
    """As ``load_prompts``; also those that a model family ships under its word."""
    family = shipped_by(source)
    return family.prompts() if family else load_prompts(source, report)


class EncodedRows(Protocol):
    """Encoded prompts by their place in the list."""

    def read(self, rows: Sequence[int]) -> Conditioning: ...


def encode_prompts(conditioner: Conditioner, prompts: Sequence[str]) -> Conditioning:
    """The prompts' conditioning on the CPU, encoded one by one: a matrix product rounds differently in another batch,
    and a prompt's embedding must not depend on which others it was drawn or cached with. ValueError for one whose
    encoding is not finite.
    """
    with torch.no_grad():
        rows = [conditioner.encode([prompt]).to("cpu") for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not all(tensor.isfinite().all() for tensor in row.tensors.values()):
            raise ValueError(
                f"the prompt {shown(prompt, 80)!r} is encoded as numbers that are not finite: the text encoders are "
                "damaged: get the teacher's file anew"
            )
    return Conditioning.cat(rows)


class LiveRows:
    """Prompts encoded by the text encoder: all at the start if they are few, else those that are read."""

    def __init__(self, prompts: list[str], conditioner: Conditioner):
        self.prompts, self.conditioner = prompts, conditioner
        self.encoded: list[Conditioning] | None = None  # apart, since they may be of different lengths
        if len(prompts) <= EAGER_LIMIT:
            self.encoded = [encode_prompts(conditioner, [prompt]) for prompt in prompts]
            conditioner.unload()

    def read(self, rows: Sequence[int]) -> Conditioning:
        if self.encoded is not None:
            return Conditioning.cat([self.encoded[row] for row in rows])
        return encode_prompts(self.conditioner, [self.prompts[row] for row in rows])


class PromptTable:
    """The prompts of a run, in batches.

    unconditional: the embedding of no text, a single row on ``device``
    """

    def __init__(
        self,
        prompts: list[str],
        encoded: EncodedRows,
        unconditional: Conditioning,
        device: torch.device | str = "cpu",
    ):
        self.prompts, self.encoded, self.device = prompts, encoded, device
        self.unconditional = unconditional.to(device)

    def read(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of any prompts of the run, by their place in ``prompts``."""
        return self.encoded.read(rows).to(self.device)

    def draw_rows(self, batch: int, rng: BatchRNG) -> list[int]:
        """``batch`` rows, uniformly with replacement: the generator is all the state."""
        return rng.indices(len(self.prompts), batch)

    def draw(self, batch: int, rng: BatchRNG) -> Conditioning:
        """The conditioning of ``batch`` prompts."""
        return self.read(self.draw_rows(batch, rng))


def load_prompt_table(
    data: DataConfig,
    bundle: ModelBundle,
    unconditional: Unconditional,
    device: torch.device | str = "cpu",
    report: bool = True,
) -> PromptTable:
    """The prompts that ``data`` names, from its cache where it has one; ``bundle.conditioner`` then encodes nothing.
    ``report`` prints how many were dropped, and how many are long.
    """
    prompts = prompts_of(data.prompts, report)
    lengths = measure(bundle.conditioner, prompts)
    if report:
        report_long(lengths, data.prompts)
    if not data.cache:
        no_text = bundle.unconditional(unconditional)  # first: LiveRows frees the text encoders when it is done
        encoded = LiveRows(prompts, bundle.conditioner)
        return PromptTable(prompts, encoded, no_text, device)
    cache = Cache(Path(data.cache))
    cache.expect(model_facts(bundle) | prompt_facts(prompts, lengths))
    return PromptTable(prompts, cache.prompts(), cache.unconditional(unconditional), device)
