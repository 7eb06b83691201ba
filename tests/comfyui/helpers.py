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


def call(node, *args) -> tuple:
    """The outputs of a node of ComfyUI's own: a V1 node on 0.3.64, a V3 node on 0.33.0."""
    execute = getattr(node, "execute", None)
    return execute(*args).result if execute else getattr(node(), node.FUNCTION)(*args)


def native_fallback(model, positive: list, latent: dict, seed: int) -> torch.Tensor:
    """Latents of ``workflows/native_fallback.json``: ComfyUI's own nodes as near as they get to four steps from 625."""
    from comfy_extras import nodes_custom_sampler as nodes

    (sigmas,) = call(nodes.BasicScheduler, model, "simple", 4, 0.63)
    (sampler,) = call(nodes.KSamplerSelect, "lcm")
    (guider,) = call(nodes.BasicGuider, model, positive)
    (noise,) = call(nodes.RandomNoise, seed)
    return call(nodes.SamplerCustomAdvanced, noise, guider, sampler, sigmas, latent)[0]["samples"]


def text_of(caplog) -> str:
    """What the pack logged."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "ComfyUI-SiD")
