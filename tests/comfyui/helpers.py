"""Inputs for nodes, and a way to run one as ComfyUI would."""

from __future__ import annotations

import inspect
from importlib import import_module

import torch


def module(pack, name: str):
    """A module of the pack, by its name inside it."""
    return import_module(f"{pack.__name__}.{name}")


def conditioning(seed: int, tokens: int = 77, width: int = 2048, pooled: int = 1280) -> list:
    """CONDITIONING as SDXL's text encoders make it, random."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


def empty_latent(batch: int = 1, size: int = 16) -> dict:
    return {"samples": torch.zeros(batch, 4, size, size)}


def run(node, **inputs) -> tuple:
    """The outputs of a node; inputs that are not given take the defaults of its schema."""
    known = inspect.signature(node.execute).parameters
    defaults = {i.id: getattr(i, "default", None) for i in node.define_schema().inputs}
    return node.execute(**{k: v for k, v in defaults.items() if k in known and v is not None} | inputs).result


def text_of(caplog) -> str:
    """What the pack logged."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "ComfyUI-SiD")
