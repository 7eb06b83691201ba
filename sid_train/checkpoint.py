"""The resumable state of a run: one safetensors file, replaced as a whole. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing

Facts = dict[str, int | str]
"""Counters and hashes: what a checkpoint knows besides tensors."""
FORMAT_VERSION = "1"


def save_checkpoint(
    path: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    generator_states: dict[str, list[Tensor]],
    facts: Facts,
) -> None:
    """Writes all of it to ``path``. ``generator_states`` has one state a rank."""
    tensors: dict[str, Tensor] = {}
    for name, network in networks.items():
        tensors |= {f"{name}.{k}": v for k, v in network.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    for name, states in generator_states.items():
        tensors |= {f"{name}.{rank}": state for rank, state in enumerate(states)}
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format_version": FORMAT_VERSION, "facts": json.dumps(facts)})


def load_checkpoint(
    path: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    generators: dict[str, tuple[torch.Generator, int, int]],
) -> Facts:
    """Puts a checkpoint's state into networks, optimizers and generators; returns its facts.

    A generator comes with the rank whose state it takes and the number of ranks.
    """
    with _open(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        facts = _facts(file)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    for name, network in networks.items():
        network.load_state_dict(under(f"{name}."))
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in under(f"{name}.").items():
            index, _, field = key.partition(".")
            state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, (generator, rank, ranks) in generators.items():
        states = under(f"{name}.")
        if len(states) != ranks:
            raise ValueError(f"{path}: was written by {len(states)} process(es), not {ranks}: start as many as before")
        generator.set_state(states[str(rank)])
    return facts


def read_network(path: Path, name: str) -> dict[str, Tensor]:
    """The state of one network in a checkpoint, without reading the others."""
    prefix = f"{name}."
    with _open(path) as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  # not a dict
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def read_facts(path: Path) -> Facts:
    """What a checkpoint knows besides tensors."""
    with _open(path) as file:
        return _facts(file)


def _open(path: Path) -> safe_open:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    version = (file.metadata() or {}).get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT_VERSION}, got {version}")
    return file


def _facts(file: safe_open) -> Facts:
    return json.loads(file.metadata()["facts"])
