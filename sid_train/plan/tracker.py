"""Counts the bytes and FLOPs of PyTorch code that runs without data.

Its tensors have a shape, a type and a storage of their size on the meta device, but are CPU tensors to PyTorch:
autograd, checkpointing, autocast with its cache of cast weights and the choice of the attention kernel are real.
(PyTorch's FakeTensorMode gives the same figures, in four times the time.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten

# Fused attention has the same inputs, results and FLOPs on every device.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class ShapeTensor(torch.Tensor):
    """A CPU tensor without data: ``meta`` has its shape, strides, type and storage."""

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> ShapeTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        tensor.meta = meta
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise AssertionError(f"{func}: a tensor without data was used outside of a Tracker")


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed, in lists and tuples too: all that PyTorch's operations take and return."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(part, change) for part in value])
    return value


class Tracker(TorchDispatchMode):
    """Runs operations on shapes and records every allocation and release, and the FLOPs.

    ``label`` says what is allocated from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.flops = 0
        self.labels: list[str] = []
        self.events: list[tuple[int, int]] = []
        """In order: the index of a label, and bytes, negative where they are freed."""
        self._known: dict[tuple, tuple[list[tuple], int]] = {}  # an operation's signature -> its results, FLOPs
        self._live: dict[int, tuple[Any, int, int]] = {}  # storage -> its weak reference, label and bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if ShapeTensor not in types:
            # Noise, noise levels, timesteps and optimizers' counters: small, and real.
            return _map(func(*args, **kwargs), self._record)
        inputs: dict[int, Tensor] = {}  # by their meta tensors

        def to_meta(tensor: Tensor) -> Tensor:
            meta = tensor.meta if isinstance(tensor, ShapeTensor) else torch.empty_like(tensor, device=META)
            inputs[id(meta)] = tensor
            return meta

        args = _map(args, to_meta)
        kwargs = {k: META if k == "device" and v is not None else _map(v, to_meta) for k, v in kwargs.items()}
        out, flops = self._run(func, args, kwargs)
        self.flops += flops

        def to_shape(meta: Tensor) -> Tensor:
            return inputs.get(id(meta)) if id(meta) in inputs else ShapeTensor(self._record(meta))

        return _map(out, to_shape)

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int]:
        """The result on the meta device, and FLOPs. A network repeats itself: what gave new tensors before gives the
        same shapes again, without the long way through PyTorch's shape functions.
        """
        key = (func, *_signature(args), *kwargs, *_signature(kwargs.values()))
        if key in self._known:
            made, flops = self._known[key]
            new = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in made]
            return (new[0] if len(new) == 1 else tuple(new)), flops
        out = func(*args, **kwargs)
        formula = FLOP_FORMULAS.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        results = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
        read: list[Tensor] = []
        _map([*args, *kwargs.values()], lambda tensor: read.append(tensor) or tensor)
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        if results and all(isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages for t in results):
            self._known[key] = [(t.size(), t.stride(), t.dtype) for t in results], flops
        return out, flops

    def empty(self, like: Tensor) -> ShapeTensor:
        """A new tensor of the shape and type of ``like``, which is on the meta device."""
        return ShapeTensor(self._record(torch.empty_like(like, device=META)))

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Says what ``tensors`` turned out to be."""
        new = self._index(label)
        for tensor in tensors:
            key = _storage(tensor)._cdata
            reference, old, size = self._live[key]
            self._live[key] = (reference, new, size)
            self.events += [(old, -size), (new, size)]

    def _record(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._live:  # views share a storage
            index, size = self._index(self.label), storage.nbytes()
            self._live[key] = (weakref.ref(storage, lambda _: self._free(key)), index, size)
            self.events.append((index, size))
        return tensor

    def _free(self, key: int) -> None:
        _, index, size = self._live.pop(key)
        self.events.append((index, -size))

    def _index(self, label: str) -> int:
        if label not in self.labels:
            self.labels.append(label)
        return self.labels.index(label)


def _signature(values: Iterable[Any]) -> Iterator[Any]:
    """What an operation's result depends on, hashable: shapes and types instead of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.dtype, value.size(), value.stride()
        elif isinstance(value, (list, tuple)):
            yield tuple(_signature(value))
        else:
            yield type(value), value  # 1, 1.0 and True are equal


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, ShapeTensor) else tensor).untyped_storage()


def normalise_as_cuda(*networks: nn.Module) -> None:
    """Makes autocast on the CPU treat ``networks`` as autocast on CUDA does: there, normalisations run in fp32.

    Of the operations that the two treat differently (https://pytorch.org/docs/stable/amp.html) only these are in the
    networks; a test compares all of them.
    """

    def to_fp32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in args) if torch.is_autocast_enabled("cpu") else args

    for module in {module for network in networks for module in network.modules()}:
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(to_fp32)
