"""Tensors in pickled networks, without running a pickle: the file is read as data.

A pickle is a program, and a reader that obeys it imports what it names and calls what it asks for. Here its
instructions are followed on stand-ins: a class or function of the file is nothing but its name, an object nothing but
its class and its state. Nothing is imported, called, opened or sized as the file says. What is more than data stops
with its name.

Read is what ``pickle.dump`` (protocols 3 to 5) and ``torch.save`` write of a ``torch.nn.Module`` or of a dictionary of
tensors. The tensors stay in the file until they are loaded, and their numbers are not looked at before. Time and memory
are bounded by ``MAX_INSTRUCTIONS``, ``MAX_TEXT`` and ``MAX_PARTS``, whatever the file's size.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from .reading import PICKLE_STARTS, reading, require_file, shown
from .tensors import LazyTensor

MAX_INSTRUCTIONS = 2_000_000
"""Of all pickles of a file: eight times what SDXL's UNet takes. Each takes at most some hundred bytes of memory."""
MAX_TEXT = 10_000
"""Bytes of a text. What is longer and no text is left in the file."""
MAX_GLOBAL, MAX_NAME = 200, 1000
"""Characters of the name of a class, and of a tensor."""
MAX_PARTS, MAX_DEPTH, MAX_DIMENSIONS = 100_000, 100, 8
"""Tensors and modules of one network, modules in modules, and dimensions of a tensor."""
LARGEST = 2**48
# What torch.save wrote before it wrote archives, and what it writes inside a pickled tensor, begins with this number.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

ORDERED_DICT = "collections.OrderedDict"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
NESTED_STORAGE = "torch.storage._load_from_bytes"
SETS = ("builtins.set", "__builtin__.set")
UNTYPED_STORAGE = "torch.storage.UntypedStorage"
FUNCTIONS = (TENSOR, PARAMETER, NESTED_STORAGE, *SETS)
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
    """A pickle that asks for more than data, or for more of it than a network has."""


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


@dataclass(eq=False)
class Storage:
    """The numbers that tensors are views of: ``count`` of them, in the file from ``start`` on."""

    dtype: torch.dtype
    count: int
    start: int = -1


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


@dataclass(frozen=True)
class _LeftInFile:
    """Stands for that many bytes, where ``pickletools`` expects them; it makes no text of it."""

    length: int

    def __len__(self) -> int:
        return self.length


class _Source:
    """A file as ``pickletools`` reads one; what is long is skipped. Counts the instructions of all its pickles."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.instructions = file, size, 0

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int) -> None:
        self.file.seek(place)

    def read(self, count: int) -> bytes | _LeftInFile:
        if count <= MAX_TEXT:
            return self.file.read(count)
        if self.tell() + count > self.size:
            return b""
        self.file.seek(count, 1)
        return _LeftInFile(count)

    def readline(self) -> bytes:
        return self.file.readline(MAX_TEXT)


class _Machine:
    """Follows the instructions of one pickle on stand-ins.

    source: the file, read from where it stands
    end: where in the file the pickle must have ended
    persistent: see ``Persistent``; None for a pickle whose storages are pickles in its bytes
    """

    def __init__(self, source: _Source, end: int, persistent: Persistent | None = None):
        self.source, self.end, self.persistent = source, end, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Named] = {}
        self.storages: dict[int, Storage] = {}

    def run(self) -> Any:
        """The object that the pickle makes, of stand-ins."""
        steps = pickletools.genops(cast("IO[bytes]", self.source))
        try:
            for opcode, argument, position in cast("Iterator[tuple[Any, Any, int]]", steps):
                self.source.instructions += 1
                if self.source.instructions > MAX_INSTRUCTIONS:
                    raise PickleError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
                if position >= self.end:
                    raise PickleError("a tensor's numbers go on behind its bytes")
                if opcode.name == "STOP":
                    return self.pop()
                self.try_to_follow(opcode.name, argument, position)
        except TypeError:  # of pickletools, which was given no bytes to make a text of
            raise PickleError(f"it has a text of more than {MAX_TEXT:,} bytes") from None
        raise PickleError("it ends before its last instruction")

    def try_to_follow(self, name: str, argument: Any, position: int) -> None:
        try:
            self.follow(name, argument, position)
        except PickleError:
            raise
        except (IndexError, KeyError, TypeError, AttributeError, ValueError):
            raise PickleError(f"its instruction {name} at byte {position:,} has nothing to work on") from None

    def follow(self, name: str, argument: Any, position: int) -> None:
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

    # Operands.

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise PickleError("it takes more than it has made")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise IndexError

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def named(self, module: str, name: str) -> Named:
        """The stand-in of a class or function; each name has one."""
        if len(module) > MAX_GLOBAL or len(name) > MAX_GLOBAL:
            raise PickleError(f"it asks for {shown(module, 60)}..., a name that no class has")
        if (module, name) not in self.names:
            full = f"{module}.{name}"
            if full not in (ORDERED_DICT, *FUNCTIONS, *STORAGES) and not full.startswith(STAND_INS):
                raise PickleError(f"it asks for {shown(full, 120)}, {_why_not(full)}")
            self.names[module, name] = Named(full)
        return self.names[module, name]

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
        self.stack.append(self.named(module, name))

    def do_stack_global(self, _: object) -> None:
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self.stack.append(self.named(module, name))

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
        elif kind.name in SETS:
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
            back = self.source.tell()
            self.source.seek(content.start)
            storage = _legacy(self.source, content.start + content.length)
            if not isinstance(storage, Storage):
                raise TypeError
            self.storages[content.start] = storage
            self.source.seek(back)
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
    """A key that hashes at once, which a tuple of tuples of tuples would not, and unlike others: integers beyond 2**61
    can be made to hash alike.
    """
    if not isinstance(value, str | None) and not (isinstance(value, int) and 0 <= value < 2**32):
        raise TypeError
    return value


def _why_not(name: str) -> str:
    if name.startswith(("_codecs.", "copy_reg.")):
        return "as pickles of protocol 2 and older do: save it again with pickle's default protocol"
    if name.startswith("torch."):
        return "which is not read: save the network's state_dict() instead"
    return "which no pickled network needs"


# -- tensors -----------------------------------------------------------------------------------------------------------


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """A tensor within its storage. PickleError for one that is larger: it would take more memory than the file."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise TypeError
    if not all(_is_size(n) for n in (offset, *shape, *strides)) or math.prod(max(n, 1) for n in shape) >= LARGEST:
        raise TypeError
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.count or count > storage.count):
        raise PickleError(f"a tensor of {shown(shape, 80)} is larger than the {storage.count:,} numbers that it is of")
    return View(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _storage(kind: Any, count: Any) -> Storage:
    """One that is not found yet."""
    if not isinstance(kind, Named) or not _is_size(count):
        raise TypeError
    if kind.name not in STORAGES:
        raise PickleError(f"a tensor's numbers are of {shown(kind.name, 80)}, which is none of PyTorch's storages")
    return Storage(STORAGES[kind.name], count)


def _legacy(source: _Source, end: int) -> Any:
    """What ``torch.save`` wrote before it wrote archives, from where the file stands to ``end``.

    https://github.com/pytorch/pytorch/blob/main/torch/serialization.py, ``_legacy_save``: four pickles (a number, a
    version, facts of the machine, the object), a list of keys, and for each key its count and its numbers.
    """
    storages: dict[str, Storage] = {}

    def persistent(found: Any) -> Storage:
        _, kind, key, _, count, *view = found
        if view not in ([], [None]):
            raise PickleError("a tensor's numbers are a part of another's, as PyTorch before 0.4 wrote them")
        if key not in storages:
            storages[key] = _storage(kind, count)
        return storages[key]

    magic, _, facts, content, keys = (_Machine(source, end, persistent).run() for _ in range(5))
    if magic != LEGACY_MAGIC or not isinstance(facts, dict) or keys != sorted(storages):
        raise PickleError("a tensor's numbers are not as torch.save writes them")
    if facts.get("little_endian") is not True:
        raise PickleError("its numbers are those of a big-endian machine")
    for key in keys:
        storage, head = storages[key], source.file.read(8)
        (count,) = struct.unpack("<q", head) if len(head) == 8 else (-1,)
        if count != storage.count:
            raise PickleError(f"a tensor has {count:,} numbers for the {storage.count:,} that it should have")
        storage.start = source.tell()
        source.seek(storage.start + count * storage.dtype.itemsize)
        if source.tell() > end:
            raise PickleError("a tensor's numbers go on behind its bytes")
    return content


def _archive(file: BinaryIO) -> Any:
    """What ``torch.save`` writes: an archive of the object's pickle and, as they are, the numbers of each storage."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickleError("it is an archive, but none that torch.save writes")
        root, storages = pickles[0].removesuffix("data.pkl"), dict[str, Storage]()
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise PickleError("its members are compressed, which torch.save's are not")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder")[:10] != b"little":
            raise PickleError("its numbers are those of a big-endian machine")

        def persistent(found: Any) -> Storage:
            _, kind, key, _, count = found
            if key not in storages:
                storages[key] = _storage(kind, count)
                storages[key].start, size = _place(file, members[f"{root}data/{key}"])
                if size != count * storages[key].dtype.itemsize:
                    raise PickleError(f"a tensor has {size:,} bytes for the {count:,} numbers that it should have")
            return storages[key]

        size = members[pickles[0]].file_size
        with archive.open(pickles[0]) as pickled:
            return _Machine(_Source(cast("BinaryIO", pickled), size), size, persistent).run()


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member of an archive starts, behind a head with two names of its own lengths, and its bytes."""
    back = file.tell()
    file.seek(info.header_offset)
    head = file.read(30)
    file.seek(back)
    if len(head) < 30:
        raise PickleError("it is an archive that was cut off: copy or download it again")
    return info.header_offset + 30 + sum(struct.unpack("<HH", head[26:])), info.file_size


def _load(path: Path, view: View) -> Tensor:
    """The tensor, with nothing else of its storage in memory."""
    dtype = view.storage.dtype
    if not math.prod(view.shape):
        return torch.empty(view.shape, dtype=dtype)
    count = 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    with reading(path, "a pickled network"), open(path, "rb") as file:
        file.seek(view.storage.start + view.offset * dtype.itemsize)
        data = bytearray(count * dtype.itemsize)
        if file.readinto(data) != len(data):
            raise ValueError("it ends within a tensor: copy or download it again")
    return torch.frombuffer(data, dtype=dtype).as_strided(view.shape, view.strides).contiguous()


# -- files -------------------------------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Whether a file begins as ``pickle`` or ``torch.save`` write one."""
    require_file(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # a safetensors file, which begins with any number
        return False
    return start.startswith(PICKLE_STARTS)


def open_pickled(path: Path) -> dict[str, LazyTensor]:
    """The tensors by name of a network, or of a dictionary of tensors, in a file of ``pickle.dump`` or ``torch.save``.
    ValueError for a file that holds none, or that asks for more than data.

    Of a dictionary of networks, as training codes keep them, it is ``ema``; of one with a ``state_dict``, that.
    """
    size = require_file(path)
    with reading(path, "a pickled network"), open(path, "rb") as file:
        try:
            start = file.read(len(LEGACY_START))
            file.seek(0)
            if start.startswith(b"PK"):
                root = _archive(file)
            elif start == LEGACY_START:
                root = _legacy(_Source(file, size), size)
            else:
                root = _Machine(_Source(file, size), size).run()
            views = dict(_views(root))
            if not views:
                raise PickleError("it holds no tensors")
        except PickleError as error:
            raise ValueError(f"{shown(path)}: expected a pickled network, but {error}") from None
    return {
        name: LazyTensor(
            view.shape, view.storage.dtype, partial(_load, path, view), f"{shown(path)}: tensor {shown(name, 120)}"
        )
        for name, view in views.items()
    }


def _views(root: Any) -> Iterator[tuple[str, View]]:
    """The tensors of the network in ``root``, as its ``state_dict`` would name them."""
    entries = _entries(root)
    for key in ("ema", "state_dict"):
        if isinstance(entries.get(key), dict | Object):
            root, entries = entries[key], _entries(entries[key])
            break
    if entries and all(isinstance(value, View) for value in entries.values()):
        yield from ((str(name), view) for name, view in entries.items())
        return
    if not isinstance(root, Object) or not isinstance(root.state, dict):
        raise PickleError(f"it holds no network, but {_described(root, entries)}")
    parts, waiting = 1, [("", root, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        state = module.state if isinstance(module, Object) else None
        if not isinstance(state, dict) or depth > MAX_DEPTH:
            raise PickleError(f"{shown(prefix, 120) or 'its network'} is no module of PyTorch")
        left_out = state.get("_non_persistent_buffers_set", set())
        if not isinstance(left_out, set):
            raise PickleError(f"_non_persistent_buffers_set of {shown(prefix, 120) or 'its network'} is no set")
        parameters, buffers, modules = (
            _named_in(state, prefix, kind) for kind in ("_parameters", "_buffers", "_modules")
        )
        parts += len(parameters) + len(buffers) + len(modules)
        if parts > MAX_PARTS:
            raise PickleError(f"its network has more than {MAX_PARTS:,} parts")
        for name, view in [*parameters.items(), *((n, b) for n, b in buffers.items() if n not in left_out)]:
            if view is not None:
                if not isinstance(view, View):
                    raise PickleError(f"{shown(prefix + name, 120)} is no tensor")
                yield prefix + name, view
        below = [(f"{prefix}{name}.", module, depth + 1) for name, module in modules.items() if module is not None]
        waiting += reversed(below)


def _named_in(state: dict[Any, Any], prefix: str, kind: str) -> dict[str, Any]:
    """What a module's state has of this ``kind``, by name."""
    named = state.get(kind, {})
    if not isinstance(named, dict | Object):
        raise PickleError(f"{kind} of {shown(prefix, 120) or 'its network'} are no dictionary")
    found = {str(name): value for name, value in _entries(named).items()}
    if any(len(prefix) + len(name) > MAX_NAME for name in found):
        raise PickleError(f"a name in {shown(prefix, 120) or 'its network'} has more than {MAX_NAME:,} characters")
    return found


def _entries(value: Any) -> dict[Any, Any]:
    return value.entries if isinstance(value, Object) else value if isinstance(value, dict) else {}


def _described(root: Any, entries: dict[Any, Any]) -> str:
    if entries:
        return f"a dictionary of {shown(', '.join(map(str, list(entries)[:5])), 200)}"
    if isinstance(root, Object | Named):
        return f"an object of {shown(root.kind.name if isinstance(root, Object) else root.name, 120)}"
    return "nothing" if root is None else f"a value of type {type(root).__name__}"
