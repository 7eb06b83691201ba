"""Pickles that do harm where they are obeyed: by name, the bytes of each."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile

import torch


class Reduces:
    """Pickled as a call of ``function`` with ``arguments``."""

    def __init__(self, function: object, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def _call(module: str, name: str, *arguments: str) -> bytes:
    """A call of a function that need not be there."""
    given = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + given + b"tR"


def _ema(content: bytes) -> bytes:
    return b"\x80\x04}\x8c\x03ema" + content + b"s."


def _module(state: bytes, kind: str = "torch.nn.modules.linear", name: str = "Linear") -> bytes:
    return f"c{kind}\n{name}\n".encode() + b")\x81" + state + b"b"


def _with_blob(blob: bytes, call: str = "torch.storage\n_load_from_bytes") -> bytes:
    """A network with one tensor whose numbers are ``blob``."""
    storage = f"c{call}\n".encode() + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85\x89}tR"
    return _ema(_module(b"}\x8c\x0b_parameters}\x8c\x06weight" + tensor + b"ss"))


def storage_blob(tensor: torch.Tensor) -> bytes:
    """A storage as ``torch.save`` writes it into a pickle."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would like other storages
        torch.save(tensor.storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    + b"\x80\x02M\xe9\x03."
    + b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
)
ARCHIVED = (
    b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89}tRs."
)


def _archive(compression: int, content: bytes) -> bytes:
    """An archive as ``torch.save`` writes it, with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x/data.pkl", content)
    return file.getvalue()


def hostile(touch: str) -> dict[str, bytes]:
    """``touch``: a file that would be there, had one of them been obeyed."""
    command = f"touch {touch}"
    good = storage_blob(torch.ones(1))
    long = b"X" + struct.pack("<I", 1 << 20) + b"torch.nn." + b"a" * ((1 << 20) - 9) + b"\x940X\x01\x00\x00\x00b\x940"
    alike = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(200_000))
    storage = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(good)) + good + b"\x85R"
    many = b"(" + b"\x8a\x06\xff\xff\xff\xff\xff\x7f" * 200_000 + b"K\x00t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85\x89}tR"
    itself = b"ctorch.nn\nLinear\n)\x81\x94}\x8c\x08_modules}("
    itself += b"".join(b"X\x06\x00\x00\x00%06dh\x00" % i for i in range(150_000)) + b"usb"
    nones = b"}(" + b"".join(b"X\x06\x00\x00\x00%06dN" % i for i in range(90_000)) + b"u"
    fat = b"ctorch.nn\nLinear\n)\x81}\x8c\x08_buffers" + nones + b"sb\x94"
    fat = b"ctorch.nn\nLinear\n)\x81}\x8c\x08_modules}(" + b"\x8c\x01a" + fat
    fat += b"".join(b"X\x06\x00\x00\x00%06dh\x00" % i for i in range(3_000)) + b"usb"
    deep = b"\x80\x04" + b")" + b"\x85" * 500_000 + b"."
    key = b"\x80\x04}" + b")" + b"\x85" * 300_000 + b"K\x01s."
    magic, protocol = good[: good.index(b".") + 1], b"\x80\x02M\xe9\x03."
    return {
        "os.system": pickle.dumps({"ema": Reduces(os.system, command)}),
        "eval": pickle.dumps({"ema": Reduces(eval, f"open({touch!r}, 'w')")}),
        "getattr": _ema(_call("builtins", "getattr", "a", "b")),
        "posix.system by an old GLOBAL": _ema(_call("posix", "system", command)),
        "subprocess": _ema(_call("subprocess", "check_output", command)),
        "importlib": _ema(_call("importlib", "import_module", "antigravity")),
        "torch.load": _ema(_call("torch", "load", touch)),
        "torch.hub": _ema(_call("torch.hub", "load", "a", "b")),
        "a name that begins alike": _ema(_call("torch.nnn", "Linear")),
        "os beside torch.nn": _ema(_call("torch", "nn.os.system", command)),
        "a function of torch.nn with arguments": _ema(_call("torch.nn.init", "ones_", "a")),
        "a class of training with arguments": _ema(_call("training.loss", "Loss", command)),
        "__setstate__ of another class": _ema(_module(b"}\x8c\x01aK\x01s", "ctypes", "CDLL")),
        "state of a function": _ema(b"ctorch.nn.init\nones_\n}b"),
        "state of a dictionary": _ema(b"}}b"),
        "persistent id": _ema(b"\x8c\x03keyQ"),
        "old persistent id": _ema(b"Pkey\n"),
        "extension": _ema(b"\x82\x01"),
        "extension of four bytes": _ema(b"\x84\x01\x00\x00\x00"),
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"o.",
        "NEWOBJ with arguments": _ema(b"ctorch.nn\nLinear\nK\x01\x85\x81"),
        "NEWOBJ_EX": _ema(b"ctorch.nn\nLinear\n)}\x92"),
        "out of band buffer": _ema(b"\x97"),
        "nested in a blob: os.system": _with_blob(pickle.dumps(Reduces(os.system, command), 2)),
        "nested in a blob behind the head": _with_blob(magic + protocol + pickle.dumps(Reduces(os.system, command), 2)),
        "nested in a blob: a pickle in a pickle": _with_blob(_with_blob(good)),
        "blob given to pickle.loads": _with_blob(pickle.dumps(Reduces(os.system, command)), "pickle\nloads"),
        "blob cut off": _with_blob(good[:-2]),
        "blob with a huge count": _with_blob(good.replace(b"K\x01Nt", b"\x8a\x05\x00\x00\x00\x00\x7fNt")),
        "empty blob": _with_blob(b""),
        "blobs of many instructions": b"\x80\x04("
        + b"".join(
            b"ctorch.storage\n_load_from_bytes\nB"
            + struct.pack("<I", 2_000_000)
            + magic
            + b"\x80\x02"
            + b"N0" * 900_000
            + b"."
            + bytes(2_000_000 - len(magic) - 1_800_003)
            + b"\x85R"
            for _ in range(4)
        )
        + b"t.",
        "long name of a class, many times": b"\x80\x04" + long + b"h\x00h\x01\x930" * 3000 + b"N.",
        "long name of a tensor": _ema(
            _module(b"}\x8c\x0b_parameters}X" + struct.pack("<I", 5000) + b"a" * 5000 + tensor + b"ss")
        ),
        "long text": b"\x80\x04X" + struct.pack("<I", 20_000_000) + b"a" * 19_999_996 + "\U0001f600".encode() + b".",
        "keys that hash alike": b"\x80\x04}(" + alike + b"u.",
        "a tensor of many dimensions": b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + many
        + many
        + b"\x89}tR.",
        "a module in itself, many times": b"\x80\x04" + itself + b".",
        "buffers that are none, many times": b"\x80\x04" + fat + b".",
        "names left out that are no set": _ema(_module(b"}\x8c\x1b_non_persistent_buffers_set]s")),
        "persistent id of another form": LEGACY + b"\x80\x02K\x01K\x02\x86Q." + b"\x80\x02].",
        "bomb of an archive": _archive(
            zipfile.ZIP_DEFLATED, b"\x80\x02X" + struct.pack("<I", 1 << 28) + bytes(1 << 28) + b"."
        ),
        "archive: os.system": _archive(zipfile.ZIP_STORED, pickle.dumps(Reduces(os.system, command), 2)),
        "archive: a tensor without its numbers": _archive(zipfile.ZIP_STORED, ARCHIVED),
        "archive of nothing": b"PK\x05\x06" + bytes(18),
        "no archive": b"PK\x03\x04" + bytes(100),
        "a tensor larger than its numbers": _with_blob(good).replace(
            b"K\x00K\x01\x85K\x01", b"K\x00J\xff\xff\xff\x0f\x85K\x00"
        ),
        "a tensor that begins behind its numbers": _with_blob(good).replace(b"K\x00K\x01\x85", b"K\x63K\x01\x85"),
        "huge memo index": b"\x80\x04}r\xff\xff\xff\xffh\x00.",
        "huge length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a",
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"a",
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
        "millions of instructions": b"\x80\x04" + b"}0" * 1_100_000 + b"}.",
        "millions of objects": b"\x80\x04" + b"}" * 2_100_000 + b".",
        "deep tuple": deep,
        "deep tuple as a key": key,
        "deep dictionaries": b"\x80\x04" + b"}\x8c\x01a" * 200_000 + b"}" + b"s" * 200_000 + b".",
        "a module in itself": _ema(b"ctorch.nn\nLinear\n)\x81\x94}\x8c\x08_modules}\x8c\x01ah\x00ssb"),
        "modules that double": _ema(
            b"ctorch.nn\nLinear\n)\x81}\x8c\x08_modules}sb"
            + b"".join(
                b"\x94\x8c\x01zctorch.nn\nLinear\n)\x81}\x8c\x08_modules}\x8c\x01ah"
                + bytes([i])
                + b"s\x8c\x01bh"
                + bytes([i])
                + b"ssb"
                for i in range(60)
            )
        ),
        "truncated": pickle.dumps({"ema": {"a": 1}})[:-4],
        "empty stack": b"\x80\x04.",
        "no mark": b"\x80\x04t.",
        "only marks": b"\x80\x04((((.",
        "stop at once": b".",
        "memo that is not there": b"\x80\x04h\x07.",
        "not a pickle": b"\x80\x04\xff\xff\xff",
        "nothing": b"\x80\x04N.",
        "a text": b"\x80\x04\x8c\x01a.",
        "protocol 0": pickle.dumps({"ema": 1}, 0),
        "state that is no dictionary": _ema(_module(b"K\x01")),
        "parameters that are no dictionary": _ema(_module(b"}\x8c\x0b_parametersK\x01s")),
        "a parameter that is a text": _ema(_module(b"}\x8c\x0b_parameters}\x8c\x06weight\x8c\x01ass")),
    }
