"""Tensors in pickled networks, without running a pickle: the file is read as data.

A pickle is a program, and a reader that obeys it imports what it names and calls what it asks for. Here its
instructions are followed on stand-ins: a class or function of the file is nothing but its name, an object nothing but
its class and its state. Nothing is imported, called, opened or sized as the file says. What is more than data stops
with its name.

Read is what ``pickle.dump`` writes of a ``torch.nn.Module`` or a dictionary of tensors, in protocols 3 to 5. Such
tensors stay in the file until they are loaded. Dictionaries that ``torch.save`` wrote are left to PyTorch.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from .reading import reading, require_file, shown
from .tensors import LazyTensor

MAX_INSTRUCTIONS = 2_000_000
"""Of one pickle: eight times what SDXL's UNet takes. Each takes at most some hundred bytes of memory."""
MAX_PARTS, MAX_DEPTH = 100_000, 100
"""Tensors and modules of one network, and modules in modules."""
# What torch.save wrote before it wrote archives, and what it writes inside a pickled tensor, begins with this number.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

ORDERED_DICT = "collections.OrderedDict"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
NESTED_STORAGE = "torch.storage._load_from_bytes"
SET = "builtins.set"
UNTYPED_STORAGE = "torch.storage.UntypedStorage"
FUNCTIONS = (TENSOR, PARAMETER, NESTED_STORAGE, SET)
STAND_INS = ("torch.nn.", "diffusers.", "training.")
"""Modules whose classes may be named: PyTorch's, diffusers' and those of the SiD authors' code."""
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    UNTYPED_STORAGE: torch.uint8,
}


class PickleError(ValueError):
    """A pickle that asks for more than data."""


# -- what stands for what the file asks for ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Named:
    """A class or a function: nothing but its name."""

    name: str


@dataclass(eq=False)
class Object:
    """An object: its class, the state that it was given, and its entries if it is a dictionary."""

    kind: Named
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bytes:
    """Bytes that stay in the file, from ``start`` on."""

    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers that tensors are views of: ``count`` of them, in the file from ``start`` on."""

    dtype: torch.dtype
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: a part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a list of operands begins on the stack."""


MARK = _Mark()
Persistent = Callable[[Any], Any]
"""What stands for an object that the pickle keeps elsewhere, by how it calls it."""


class _Machine:
    """Follows the instructions of one pickle on stand-ins.

    data: the file, read from where it stands
    end: where in the file the pickle must have ended
    persistent: see ``Persistent``; None for the pickle of a whole file, whose storages are pickles in its bytes
    """

    def __init__(self, data: mmap.mmap, end: int, persistent: Persistent | None = None):
        self.data, self.end, self.persistent = data, end, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[int, Storage] = {}

    def run(self) -> Any:
        """What the pickle stands for."""
        steps = pickletools.genops(cast("IO[bytes]", self.data))  # a map reads as a file does
        for count, (opcode, argument, position) in enumerate(cast("Iterator[tuple[Any, Any, int]]", steps)):
            if count >= MAX_INSTRUCTIONS:
                raise PickleError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            if position >= self.end:
                raise PickleError("a tensor's numbers go on behind its bytes")
            name = opcode.name
            try:
                if name == "STOP":
                    return self.pop()
                if name in _PUSHES_ARGUMENT:
                    self.stack.append(argument)
                elif name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[name]())
                elif name in _BYTES:
                    self.stack.append(Bytes(position + 1 + _BYTES[name], len(argument)))
                elif (step := getattr(self, f"do_{name.lower()}", None)) is not None:
                    step(argument)
                elif name not in ("PROTO", "FRAME"):
                    raise PickleError(f"it has the instruction {name}, which no pickled network needs")
            except (IndexError, KeyError, TypeError, AttributeError):
                raise PickleError(f"its instruction {name} at byte {position:,} has nothing to work on") from None
        raise PickleError("it ends before its last instruction")

    # Operands.

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise IndexError
        return value

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise IndexError

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    # Instructions, by pickletools' names.

    def do_mark(self, _: object) -> None:
        self.stack.append(MARK)

    def do_pop(self, _: object) -> None:
        self.stack.pop()

    def do_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_tuple1(self, _: object) -> None:
        self.stack.append(self.take(1))

    def do_tuple2(self, _: object) -> None:
        self.stack.append(self.take(2))

    def do_tuple3(self, _: object) -> None:
        self.stack.append(self.take(3))

    def do_append(self, _: object) -> None:
        (value,) = self.take(1)
        _list(self.stack[-1]).append(value)

    def do_appends(self, _: object) -> None:
        values = self.pop_to_mark()
        _list(self.stack[-1]).extend(values)

    def do_additems(self, _: object) -> None:
        values = self.pop_to_mark()
        found = self.stack[-1]
        if not isinstance(found, set):
            raise TypeError
        found.update(map(_key, values))

    def do_setitem(self, _: object) -> None:
        self._set_items(list(self.take(2)))

    def do_setitems(self, _: object) -> None:
        self._set_items(self.pop_to_mark())

    def _set_items(self, values: list[Any]) -> None:
        found = self.stack[-1]
        entries = found.entries if isinstance(found, Object) else found
        if not isinstance(entries, dict) or len(values) % 2:
            raise TypeError
        entries.update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def do_binput(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    do_long_binput = do_binput

    def do_memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binget(self, place: int) -> None:
        self.stack.append(self.memo[place])

    do_long_binget = do_binget

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_named(module, name))

    def do_stack_global(self, _: object) -> None:
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self.stack.append(_named(module, name))

    def do_binpersid(self, _: object) -> None:
        if self.persistent is None:
            raise PickleError("it keeps objects outside of the pickle")
        self.stack.append(self.persistent(self.pop()))

    def do_build(self, _: object) -> None:
        (state,) = self.take(1)
        found = self.stack[-1]
        if not isinstance(found, Object):
            raise TypeError
        found.state = state

    def do_newobj(self, _: object) -> None:
        kind, arguments = self.take(2)
        self.stack.append(_object(kind, arguments))

    def do_reduce(self, _: object) -> None:
        kind, arguments = self.take(2)
        if not isinstance(kind, Named) or not isinstance(arguments, tuple):
            raise TypeError
        if kind.name == NESTED_STORAGE:
            self.stack.append(self._nested(*arguments))
        elif kind.name == TENSOR:
            self.stack.append(_view(*arguments[:4]))
        elif kind.name == SET:
            self.stack.append(set(map(_key, _list(*arguments))))
        elif kind.name == PARAMETER:
            if not isinstance(arguments[0], View):
                raise TypeError
            self.stack.append(arguments[0])
        else:
            self.stack.append(_object(kind, arguments))

    def _nested(self, content: Bytes) -> Storage:
        """The storage that ``torch.save`` wrote into a pickle's bytes."""
        if self.persistent is not None:
            raise PickleError("a tensor's numbers hold another pickle")
        if content.start not in self.storages:
            back = self.data.tell()
            self.data.seek(content.start)
            self.storages[content.start] = _legacy_storage(self.data, content.start + content.length)
            self.data.seek(back)
        return self.storages[content.start]


_PUSHES_ARGUMENT = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# Instructions with bytes, and of how many bytes their length is.
_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}


def _named(module: str, name: str) -> Named:
    full = f"{module}.{name}"
    if full not in (ORDERED_DICT, *FUNCTIONS, *STORAGES) and not full.startswith(STAND_INS):
        raise PickleError(f"it asks for {shown(full, 120)}, which no pickled network needs")
    return Named(full)


def _object(kind: Any, arguments: Any) -> Object:
    if not isinstance(kind, Named) or kind.name in (*FUNCTIONS, *STORAGES):
        raise TypeError
    if arguments != ():
        raise PickleError(f"it calls {shown(kind.name, 120)} with arguments")
    return Object(kind)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _key(value: Any) -> Any:
    """A key that hashes at once: a tuple of tuples of tuples would not."""
    if not isinstance(value, str | int | float | None):
        raise TypeError
    return value


# -- tensors -----------------------------------------------------------------------------------------------------------


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """A tensor within its storage. PickleError for one that is larger: it would take more memory than the file."""
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not isinstance(storage, Storage) or not sizes or not all(_is_size(n) for n in (offset, *shape, *strides)):
        raise TypeError
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.count or count > storage.count):
        raise PickleError(f"a tensor of {shown(shape, 80)} is larger than the {storage.count:,} numbers that it is of")
    return View(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _storage_dtype(kind: Any) -> torch.dtype:
    if not isinstance(kind, Named):
        raise TypeError
    if kind.name not in STORAGES:
        raise PickleError(f"a tensor's numbers are of {shown(kind.name, 80)}, which is none of PyTorch's storages")
    return STORAGES[kind.name]


def _legacy_storage(data: mmap.mmap, end: int) -> Storage:
    """One storage as ``torch.save`` wrote it before it wrote archives, from where the file stands to ``end``.

    https://github.com/pytorch/pytorch/blob/main/torch/serialization.py, ``_legacy_save``: four pickles (a number, a
    version, facts of the machine, the object), a list of keys, and for each key its count and its numbers.
    """

    def persistent(found: Any) -> Any:
        _, kind, _, _, count, *_ = found
        if not _is_size(count):
            raise TypeError
        return Storage(_storage_dtype(kind), 0, count)

    magic, _, facts, storage, keys = (_Machine(data, end, persistent).run() for _ in range(5))
    if magic != LEGACY_MAGIC or not isinstance(facts, dict):
        raise PickleError("a tensor's numbers are not as torch.save writes them")
    if facts.get("little_endian") is not True:
        raise PickleError("its numbers are those of a big-endian machine")
    if not isinstance(storage, Storage) or not isinstance(keys, list) or len(keys) != 1:
        raise PickleError("a tensor's numbers are not as torch.save writes them")
    (count,) = struct.unpack("<q", data.read(8))
    if count != storage.count:
        raise PickleError(f"a tensor has {count:,} numbers for the {storage.count:,} that it should have")
    start = data.tell()
    if start + count * storage.dtype.itemsize > end:
        raise PickleError("a tensor's numbers go on behind its bytes")
    return Storage(storage.dtype, start, count)


def _load(data: mmap.mmap, view: View) -> Tensor:
    storage = view.storage
    if not math.prod(view.shape):
        return torch.empty(view.shape, dtype=storage.dtype)
    end = storage.start + storage.count * storage.dtype.itemsize
    numbers = torch.frombuffer(bytearray(memoryview(data)[storage.start : end]), dtype=storage.dtype)
    return numbers.as_strided(view.shape, view.strides, view.offset).contiguous()


# -- files -------------------------------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Whether a file begins as ``pickle`` or ``torch.save`` write one."""
    require_file(path)
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_pickled(path: Path) -> dict[str, LazyTensor]:
    """The tensors by name of a network, or of a dictionary of tensors, in a file of ``pickle.dump`` or ``torch.save``.
    ValueError for a file that holds none, or that asks for more than data.

    Of a dictionary of networks, as training codes keep them, it is ``ema``; of one with a ``state_dict``, that.
    """
    with reading(path, "a pickled network"):
        require_file(path)
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
        if start.startswith(b"PK") or start == LEGACY_START:
            return _saved_by_torch(path)
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        views = dict(_views(_Machine(data, len(data)).run()))
        if not views:
            raise PickleError("it holds no tensors")
        return {
            name: LazyTensor(view.shape, view.storage.dtype, partial(_load, data, view), _source(path, name))
            for name, view in views.items()
        }


def _source(path: Path, name: str) -> str:
    return f"{shown(path)}: tensor {shown(name, 120)}"


def _views(root: Any) -> Iterator[tuple[str, View]]:
    """The tensors of the network in ``root``, as its ``state_dict`` would name them."""
    entries = _entries(root)
    for key in ("ema", "state_dict"):
        if isinstance(root, dict) and key in entries:
            root, entries = entries[key], _entries(entries[key])
            break
    if entries and all(isinstance(value, View) for value in entries.values()):
        yield from ((str(name), view) for name, view in entries.items())
        return
    if not isinstance(root, Object) or not isinstance(root.state, dict):
        raise PickleError(f"it holds no network, but {_described(root, entries)}")
    parts, waiting = 0, [("", root, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        state = module.state if isinstance(module, Object) else None
        if not isinstance(state, dict) or depth > MAX_DEPTH:
            raise PickleError(f"{shown(prefix, 120) or 'its network'} is no module of PyTorch")
        left_out = state.get("_non_persistent_buffers_set") or set()
        tensors, modules = (_named_in(state, prefix, *kinds) for kinds in (("_parameters", "_buffers"), ("_modules",)))
        parts += 1 + len(tensors)
        if parts > MAX_PARTS:
            raise PickleError(f"its network has more than {MAX_PARTS:,} parts")
        for name, view in tensors.items():
            if not isinstance(view, View):
                raise PickleError(f"{shown(prefix + name, 120)} is no tensor")
            if name not in left_out:
                yield prefix + name, view
        waiting += [(f"{prefix}{name}.", below, depth + 1) for name, below in reversed(modules.items())]


def _named_in(state: dict[Any, Any], prefix: str, *kinds: str) -> dict[str, Any]:
    """What a module's state has of these ``kinds``, by name, without what is None."""
    found: dict[str, Any] = {}
    for kind in kinds:
        named = state.get(kind, {})
        if named and not isinstance(named, dict | Object):
            raise PickleError(f"{kind} of {shown(prefix, 120) or 'its network'} are no dictionary")
        found |= {str(name): value for name, value in _entries(named).items() if value is not None}
    return found


def _entries(value: Any) -> dict[Any, Any]:
    return value.entries if isinstance(value, Object) else value if isinstance(value, dict) else {}


def _described(root: Any, entries: dict[Any, Any]) -> str:
    if entries:
        return f"a dictionary of {shown(', '.join(map(str, list(entries)[:5])), 200)}"
    return f"an object of {shown(root.kind.name, 120)}" if isinstance(root, Object) else f"a {type(root).__name__}"


def _saved_by_torch(path: Path) -> dict[str, LazyTensor]:
    """A dictionary of tensors that ``torch.save`` wrote, by PyTorch's own reader of data alone."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # its message advises to run the file
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise PickleError(
            f"it asks for {shown(asked[1], 120)}, which no dictionary of tensors needs"
            if asked
            else f"PyTorch cannot read it as data: {shown(str(error).partition(chr(10))[0], 200)}"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise PickleError(f"it holds no tensors by name, but {_described(found, _entries(found))}")
    return {str(name): LazyTensor.of(tensor, _source(path, str(name))) for name, tensor in found.items()}
