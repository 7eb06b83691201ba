"""Pickled networks are read as data: what is in them, and that nothing of a hostile one runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_pickles import hostile
from torch import nn

from sid_train.files.pickles import is_pickle, open_pickled

HERE = Path(__file__).parent


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    net[0].register_buffer("kept", torch.arange(5))
    net[0].register_buffer("left", torch.arange(5), persistent=False)
    net[0].register_parameter("none", None)
    net.add_module("absent", None)
    shared = torch.randn(40)
    net[2].weight = nn.Parameter(shared[3:11].view(4, 2).T[..., None, None])  # a view, transposed, of what two share
    net[2].bias = nn.Parameter(shared[10:12])
    return net


def equal(path: Path, state: dict[str, torch.Tensor]) -> None:
    found = open_pickled(path)
    assert list(found) == list(state)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, tuple(state[name].shape))
        assert torch.equal(tensor.load(), state[name])
        assert str(path) in tensor.source


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_network_has_its_state_dict(tmp_path, protocol, dtype):
    net = network().to(dtype)
    for name, content in (("ema", {"ema": net, "loss": None, "step": 7}), ("whole", net), ("state", net.state_dict())):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        equal(path, net.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_dictionary_that_torch_saved(tmp_path, zipped, wrapped):
    path, state = tmp_path / "x.pth", network().state_dict()
    torch.save({"state_dict": state, "step": 3} if wrapped else state, path, _use_new_zipfile_serialization=zipped)
    equal(path, state)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(64))), 4))  # 256 MiB
    script = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from sid_train.files.pickles import open_pickled\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "warm = torch.zeros(1 << 20).sum(); before = peak()\n"
        "total = sum(float(t.load().sum()) for t in open_pickled(Path(sys.argv[1])).values())\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04}.", "it holds no network, but a value of type dict"),
        (pickle.dumps({"generator": 1, "epoch": 2}, 4), "a dictionary of generator, epoch"),
        (pickle.dumps(print, 4), "it asks for builtins.print, which no pickled network needs"),
        (pickle.dumps(nn.Linear, 4), "it holds no network, but an object of torch.nn.modules.linear.Linear"),
        (pickle.dumps({"ema": None, "G": None}, 4), "a dictionary of ema, G"),
    ],
)
def test_what_holds_no_network(tmp_path, content, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_pickled(path)
    assert str(error.value).startswith(str(path))


def test_what_torch_saved_whole(tmp_path):
    path, net = tmp_path / "x.pth", network()
    for content in (net, {"ema": net, "step": 1}):
        torch.save(content, path)
        equal(path, net.state_dict())


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(network(), 4))
    tensors = open_pickled(path)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"x\.pkl: .*it ends within a tensor"):
        tensors["2.weight"].load()


def test_safetensors_files_are_no_pickles(tmp_path):
    """Their first bytes are the length of the header, which may be any."""
    for length in (640, 896, 1152, 1408, 19280):
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * (length - 2) + b"}")
        assert not is_pickle(path)
    for content in (pickle.dumps(1, 4), b"PK\x03\x04" + bytes(9)):
        path.write_bytes(content + bytes(9))
        assert is_pickle(path)


AUDIT = """
import json, pickle, sys, time
from pathlib import Path
import encodings.cp437, torch  # the first is zipfile's, for names
from sid_train.files import pickles
from safetensors import safe_open

folder, seen = Path(sys.argv[1]), []
try:  # whatever the first error imports
    pickles.open_pickled(folder / "nothing.pkl")
except ValueError:
    pass
watching = False

def hook(event, arguments):
    if watching and not (event == "open" and Path(str(arguments[0])).parent == folder) and event not in QUIET:
        seen.append([event, str(arguments)[:100]])

QUIET = {"mmap.__new__", "object.__getattr__", "sys._getframe", "os.stat", "code.__new__", "compile"}
sys.addaudithook(hook)
watching = True
pickle.loads(pickle.dumps(len))
watching = False
assert ["pickle.find_class", "('builtins', 'len')"] in seen  # the hook sees what it is for
for path in sorted(folder.glob("*.pkl")):
    begun, seen[:] = time.monotonic(), []
    watching = True
    try:
        pickles.open_pickled(path)
        error = None
    except ValueError as caught:
        error = str(caught)
    except BaseException as caught:
        error = None
        seen.append([type(caught).__name__, str(caught)[:200]])
    watching = False
    print(json.dumps([path.stem, error, seen, time.monotonic() - begun]), flush=True)
"""


def test_nothing_of_a_hostile_pickle_runs(tmp_path):
    """An audit hook sees every import, file and process that the reading of them asks Python for."""
    touched, folder = tmp_path / "touched", tmp_path / "hostile"
    folder.mkdir()
    (folder / "nothing.pkl").write_bytes(b"\x80\x04N.")
    files = hostile(str(touched))
    for number, content in enumerate(files.values()):
        (folder / f"{number:03}.pkl").write_bytes(content)
    done = subprocess.run([sys.executable, "-c", AUDIT, folder], capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (len(results), done.stderr[-2000:])
    assert len(results) == len(files) + 1
    for name, (stem, error, seen, seconds) in zip([*files, "nothing"], results, strict=True):
        assert error is not None, name
        assert error.startswith(str(folder / stem)), (name, error)
        assert "\n" not in error
        assert len(error) < 1000, name
        assert seen == [], name
        assert seconds < 20, (name, seconds)
    assert not touched.exists()
    assert len(files) >= 65
