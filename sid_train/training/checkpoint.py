"""The resumable state of a run: tensors by name, and a few facts. Nothing is pickled, and all of it carries its hash.

Where one process has all of it, it is one safetensors file. The processes of a sharded run write a folder with
torch.distributed.checkpoint, in its safetensors form since its own pickles an index: a file each, with the parts that
the process holds and where they belong. Any number of processes can read it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..files.atomic import put_folder, temporary_path, write_text
from ..files.hashing import file_sha256
from ..files.header import read_safetensors_metadata
from ..files.reading import read_json, reading
from ..files.tensors import DamagedFile, LazyTensor, open_tensors, verify, write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.checkpoint import HuggingFaceStorageReader, Metadata
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Facts = dict[str, int | str]
"""Counters and hashes: what a checkpoint knows besides tensors."""
Networks = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]


class HasState(Protocol):
    """A source of randomness, or another small state that goes with a run (``torch.Generator`` is one)."""

    def get_state(self) -> Tensor: ...

    def set_state(self, state: Tensor) -> object: ...


Generators = Mapping[str, HasState]
FORMAT_VERSION = "2"
FACTS_FILE = "facts.json"
CHECKSUM = "checksum"  # of the rest of that file


def state_of(networks: Networks, optimizers: Optimizers, generators: Generators) -> dict[str, Tensor]:
    """Everything of them that a checkpoint holds, by its name there."""
    tensors: dict[str, Tensor] = {}
    for name, network in networks.items():
        tensors |= {f"{name}.{k}": v for k, v in network.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in _flat(state).items()}
    return tensors | {name: generator.get_state() for name, generator in generators.items()}


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state; bitsandbytes gives its 8-bit part as a dictionary in it, and takes it flat as well."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


# -- writing -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, networks: Networks, optimizers: Optimizers, generators: Generators, facts: Facts
) -> None:
    """Writes all of it to one file, one tensor after another; for one process."""
    state = state_of(networks, optimizers, generators)
    tensors = {k: LazyTensor(tuple(v.shape), v.dtype, v.detach) for k, v in state.items()}
    write_tensors(path, tensors, {"format_version": FORMAT_VERSION, "facts": json.dumps(facts)}, checksum=True)


def save_sharded_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    networks: Networks,
    optimizers: Optimizers,
    generators: Generators,
    facts: Facts,
) -> None:
    """Writes all of it to a new folder, which has its name when it is whole; every rank must call it."""
    from accelerate.utils import broadcast_object_list, gather_object
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    names = [temporary_path(folder).name]
    broadcast_object_list(names)  # the first rank's
    temporary = folder.with_name(names[0])
    if accelerator.is_main_process:
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with _checkpoint_errors(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may write a folder as well
            save(
                state_of(networks, optimizers, generators),
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            )
    except ValueError:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # half of it would stay on a full disk
        raise
    accelerator.wait_for_everyone()
    files = sorted(temporary.glob("*.safetensors"))
    if len(files) != accelerator.num_processes:
        raise ValueError(
            f"{temporary}: expected {accelerator.num_processes} files, one a process, found {len(files)}: the run's "
            "folder must be on a file system that all nodes share"
        )
    file = files[accelerator.process_index]
    hashes = dict(gather_object([(file.name, file_sha256(file))]))
    if accelerator.is_main_process:
        content = {"format_version": FORMAT_VERSION, "facts": facts, "sha256": hashes}
        write_text(temporary / FACTS_FILE, json.dumps(content | {CHECKSUM: _checksum(content)}) + "\n")
        put_folder(temporary, folder)
    accelerator.wait_for_everyone()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path, networks: Networks, optimizers: Optimizers, generators: Generators) -> Facts:
    """Puts a checkpoint's state into networks, optimizers and generators, sharded or whole; returns its facts.

    Every rank must call it. A file goes into whole networks only.
    """
    facts = read_facts(path)
    if path.is_dir():
        tensors = _read_parts(path, networks, optimizers)
    else:
        tensors = {name: tensor.load() for name, tensor in open_tensors(path).items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    for name, network in networks.items():
        network.load_state_dict(under(f"{name}."))
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for key, value in under(f"{name}.").items():
            index, _, field = key.partition(".")
            # Adam's count of steps is a float tensor in PyTorch and a plain integer in bitsandbytes.
            is_count = value.ndim == 0 and not value.is_floating_point()
            state.setdefault(int(index), {})[field] = value.item() if is_count else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, generator in generators.items():
        if name in tensors:  # a run that began before there was this one goes on with a fresh one
            generator.set_state(tensors[name])
    return facts


def _read_parts(folder: Path, networks: Networks, optimizers: Optimizers) -> dict[str, Tensor]:
    """This process's part of everything in a folder; networks get theirs in place."""
    from torch.distributed.checkpoint import load

    reader, index = _open_folder(folder)
    tensors = state_of(networks, {}, {})
    for key, stored in _stored_tensors(index).items():
        if key in tensors:
            continue
        tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        name, _, rest = key.partition(".")
        if name in optimizers:
            (group,) = optimizers[name].param_groups
            parameter = group["params"][int(rest.partition(".")[0])]
            if parameter.shape == stored.size:  # cut as the parameter is; all else is a scalar
                tensors[key] = torch.empty_like(parameter)
    with _checkpoint_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=reader)
    return tensors


def open_network(path: Path, name: str) -> dict[str, LazyTensor]:
    """The state of one network in a checkpoint, none of it read: whole tensors, however many parts they are in."""
    prefix = f"{name}."
    tensors = _open_parts(path) if path.is_dir() else open_tensors(path)
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}


def read_network(path: Path, name: str) -> dict[str, Tensor]:
    """The state of one network in a checkpoint, without reading the others."""
    return {key: tensor.load() for key, tensor in open_network(path, name).items()}


def _open_parts(folder: Path) -> dict[str, LazyTensor]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    _, index = _open_folder(folder)
    files = {str(path): open_tensors(path) for path in folder.glob("*.safetensors")}

    def load(key: str) -> Tensor:
        stored = _stored_tensors(index)[key]
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for part in stored.chunks:
            file = index.storage_data[MetadataIndex(key, part.offsets)].relative_path
            where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            whole[where] = files[file][key].load()
        return whole

    return {
        key: LazyTensor(tuple(stored.size), stored.properties.dtype, partial(load, key))
        for key, stored in _stored_tensors(index).items()
    }


def _stored_tensors(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Everything that is stored is a tensor, though the library could hold other objects."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {k: stored for k, stored in index.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)}


def read_facts(path: Path) -> Facts:
    """What a checkpoint knows besides tensors. ValueError for what is no checkpoint, or of another version."""
    with reading(path, "a run's checkpoint"):
        if path.is_dir():
            content = read_json(path / FACTS_FILE)
            version, facts = content["format_version"], content["facts"]
        else:
            metadata = read_safetensors_metadata(path)
            version, facts = metadata.get("format_version"), json.loads(metadata.get("facts", "{}"))
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: expected a checkpoint of format {FORMAT_VERSION}, got {version}")
        if not {"iteration", "images_seen", "teacher"} <= facts.keys():
            raise ValueError(f"{path}: expected a run's checkpoint, but it does not say its iteration and teacher")
    return facts


def verify_checkpoint(path: Path) -> None:
    """Reads a checkpoint, file or folder, and compares it with the hashes that it carries, which takes about a second a
    gigabyte. DamagedFile where it is not what was written; those of earlier versions are taken as they are.
    """
    if not path.is_dir():
        verify(path)
        read_facts(path)
        return
    try:
        with reading(path, "a checkpoint's folder"):
            content = read_json(path / FACTS_FILE)
            read_facts(path)
            checksum, hashes = content.pop(CHECKSUM, None), dict(content.get("sha256", {}))
            if checksum is not None and checksum != _checksum(content):
                raise ValueError(f"{path / FACTS_FILE}: the file is damaged: it has another SHA-256 than it says")
            for name, expected in hashes.items():
                if not (path / name).is_file() or file_sha256(path / name) != expected:
                    raise ValueError(f"{path / name}: the file is missing or damaged: expected SHA-256 {expected}")
    except (OSError, ValueError) as error:
        raise DamagedFile(str(error)) from None


def _open_folder(folder: Path) -> tuple[HuggingFaceStorageReader, Metadata]:
    """A folder's reader, and which part of what is in which file."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    try:
        return reader, reader.read_metadata()
    except SafetensorError as error:
        raise ValueError(f"{folder}: a file in it is not whole: {error}") from None


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint gathers from the ranks, as an error that names the folder."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder}: {type(reason).__name__}: {reason}") from None
