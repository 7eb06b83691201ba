"""The cache of encoded prompts and pairs: exact, resumable, and refused where it does not belong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sid_train.cli import main
from sid_train.commands.encode import encode_cache
from sid_train.config import load_config
from sid_train.core.rng import BatchRNG
from sid_train.data.cache import Cache, Shards, write_shard
from sid_train.data.pairs import load_pairs
from sid_train.data.rows import load_prompt_table
from sid_train.files.locks import lock_folder
from sid_train.files.logs import read_log
from sid_train.models.digits.data import COLOURS, TRAINING_SUBJECTS
from sid_train.models.digits.layout import ARCHITECTURE, TEACHER_FILE
from sid_train.models.families import load_model
from sid_train.training.callbacks import Grids
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

SMALL = [
    "training.batch_size=4", "training.tracker=none", "training.log_every=1", "method.steps=2",
    "training.fake_score_updates=1", "training.iterations=3", "method.guidance=lsg=1.2",
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    """A file of 20 prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(s.prompt for s in TRAINING_SUBJECTS[:20]))
    return path


@pytest.fixture
def pairs(tmp_path):
    """A folder of ten captioned pictures of three aspects."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        size = [(24, 20), (16, 50), (50, 16)][i % 3]
        Image.effect_noise(size, 40 + i).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(TRAINING_SUBJECTS[7 * i].prompt)
    return folder


def config(prompts, *overrides, pairs=None):
    values = [*SMALL, f"data.prompts={prompts}", *overrides]
    return load_config("demo", [*values, f"data.pairs={pairs}", "gan.generator_weight=0.01"] if pairs else values)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache; the lock stays where it was."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(("kind", "unconditional"), [("prompts", "empty"), ("pairs", "zeros"), ("buckets", "empty")])
def test_cached_and_live_encodings_train_bit_identically(kind, unconditional, prompts, pairs, tmp_path):
    overrides = [f"model.unconditional={unconditional}", f"data.buckets={str(kind == 'buckets').lower()}"]
    real = None if kind == "prompts" else pairs
    live, cached = (config(prompts, *overrides, *more, pairs=real) for more in ([], [f"data.cache={tmp_path / 'c'}"]))
    Trainer(live, tmp_path / "live", [Grids(2)]).run()
    encode_cache(live, tmp_path / "c", shard_size=7)
    Trainer(cached, tmp_path / "cached", [Grids(2)]).run()
    ours, theirs = (load_file(RunFolder(tmp_path / name).last_checkpoint()) for name in ("cached", "live"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    logs = [[entry["losses"] for entry in read_log(tmp_path / name / "log.jsonl")] for name in ("cached", "live")]
    assert logs[0] == logs[1]
    assert set(logs[0][0]) == {"fake_score", "sid"} | ({"discriminator", "gan"} if real else set())
    grids = [(tmp_path / name / "grids" / "000002.png").read_bytes() for name in ("cached", "live")]
    assert grids[0] == grids[1]


def test_a_cache_needs_neither_text_encoder_nor_codec(prompts, pairs, tmp_path):
    settings = config(prompts, f"data.cache={tmp_path / 'c'}", pairs=pairs)
    encode_cache(settings, tmp_path / "c")
    bundle, plain = load_model("demo"), load_model("demo")
    bundle.codec = None
    bundle.conditioner.encode = None  # the tokenizer alone is asked how long prompts are
    for part in range(2):
        ours, theirs = (BatchRNG(torch.Generator().manual_seed(0), part, 2) for _ in range(2))
        cached = load_prompt_table(settings.data, bundle, "empty")
        live = load_prompt_table(config(prompts).data, plain, "empty")
        assert torch.equal(cached.draw(5, ours).text, live.draw(5, theirs).text)
        a = load_pairs(str(pairs), bundle, cache=settings.data.cache).draw(5, ours)
        b = load_pairs(str(pairs), plain).draw(5, theirs)
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.cond.text, b.cond.text)
        assert torch.equal(a.cond.pooled, b.cond.pooled)
        assert torch.equal(a.cond.time_ids, b.cond.time_ids)


def test_shards_cover_every_row_once_and_the_index_comes_last(prompts, pairs, tmp_path):
    encode_cache(config(prompts, "data.buckets=true", pairs=pairs), tmp_path / "c", shard_size=3)
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    for table, count in (("prompts", 20), ("pairs", 10)):
        files = [load_file(tmp_path / "c" / shard["file"]) for shard in index[table]]
        assert sorted(torch.cat([f["row"] for f in files]).tolist()) == list(range(count))
        assert all(len(tensor) == shard["rows"] <= 3 for f, shard in zip(files, index[table], strict=True)
                   for tensor in f.values())  # fmt: skip
    newest = max((tmp_path / "c").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "index.json"
    assert index["facts"]["model"] == f"SHA-256 {load_model('demo').file_hash}"


def test_killed_in_the_middle_it_continues_to_the_same_files(tmp_path, capsys):
    words = list(COLOURS)
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"{a} {b} {c} {d} {e}" for a in words for b in words for c in words for d in words
                                 for e in words[:2]))  # fmt: skip
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    arguments = ["encode", "--config", "demo", "--set", f"data.prompts={prompts}", "--shard-size", "40", "--out"]
    run = subprocess.Popen([sys.executable, "-m", "sid_train", *arguments, str(cut)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (cut / "prompts-00005.safetensors").is_file():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (cut / "index.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in cut.glob("prompts-*.safetensors")}
    assert 6 <= len(finished) < 65
    with pytest.raises(ValueError, match=r"has no index\.json"):
        Cache(cut)
    (cut / ".prompts-00050.safetensors.123.tmp").write_bytes(b"torn")  # as a killed process may leave one

    assert main([*arguments, str(cut)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("already there") == len(finished) + 1  # the unconditional embeddings too
    assert "2592 prompts (0 duplicates and 0 empty ones dropped)" in printed
    assert main([*arguments, str(whole)]) == 0
    assert contents(cut) == contents(whole)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    assert len(contents(cut)) == 65 + 2


def test_another_list_of_prompts_is_refused(prompts, tmp_path, capsys):
    folder = tmp_path / "c"
    encode_cache(config(prompts), folder)
    before = contents(folder)
    prompts.write_text(prompts.read_text().replace("red", "cyan"))
    arguments = ["--config", "demo", "--set", f"data.prompts={prompts}", "--set", "training.iterations=1"]
    assert main(["encode", *arguments, "--out", str(folder)]) == 2
    assert main(["distill", *arguments, "--set", f"data.cache={folder}", "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("was encoded from something else: prompts ('20 rows, SHA-256" in error for error in errors)
    assert contents(folder) == before
    (folder / "index.json").unlink()  # as after an interruption: the shards know what they are too
    with pytest.raises(ValueError, match=r"unconditional\.safetensors: was encoded from something else: prompts"):
        encode_cache(config(prompts), folder)


def test_other_settings_are_refused_by_name(prompts, pairs, tmp_path):
    folder = tmp_path / "c"
    encode_cache(config(prompts), folder)
    with pytest.raises(ValueError, match=r"else: shard_size \(512 there, 9 here\)\. "):
        encode_cache(config(prompts), folder, shard_size=9)
    with pytest.raises(ValueError, match=r"dtype \('as encoded' there, 'fp16' here\)"):
        encode_cache(config(prompts), folder, dtype="fp16")
    with pytest.raises(ValueError, match=r"pairs \('none' there, '10 rows"):
        load_pairs(str(pairs), load_model("demo"), cache=str(folder))

    with_pairs = tmp_path / "d"
    encode_cache(config(prompts, pairs=pairs), with_pairs)
    with pytest.raises(ValueError, match=r"else: buckets \(False there, True here\)"):
        load_pairs(str(pairs), load_model("demo"), buckets=True, cache=str(with_pairs))
    (pairs / "3.txt").write_text("a red one on a blue ground")
    with pytest.raises(ValueError, match=r"else: pairs \('10 rows"):
        load_pairs(str(pairs), load_model("demo"), cache=str(with_pairs))
    load_prompt_table(config(prompts, f"data.cache={with_pairs}").data, load_model("demo"), "empty")  # not its matter


def test_another_model_is_refused(prompts, tmp_path):
    encode_cache(config(prompts), tmp_path / "c")
    tensors = load_file(TEACHER_FILE)
    name = next(name for name in tensors if name.startswith("text_encoder."))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "other.safetensors",
              {"modelspec.architecture": ARCHITECTURE})  # fmt: skip
    other = load_model(str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"else: model \('SHA-256 [0-9a-f]{64}' there"):
        load_prompt_table(config(prompts, f"data.cache={tmp_path / 'c'}").data, other, "empty")


def test_storage_dtype(prompts, pairs, tmp_path):
    encode_cache(config(prompts, "data.buckets=true", pairs=pairs), tmp_path / "c", dtype="bf16")
    expected = {"text": torch.bfloat16, "pooled": torch.bfloat16, "latents": torch.bfloat16, "row": torch.int64,
                "time_ids": torch.float32}  # fmt: skip
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    assert len(files) == 5
    for path in files:
        for name, tensor in load_file(path).items():
            assert tensor.dtype == expected[name.rpartition(".")[2]], (path, name)
    settings = config(prompts, "data.buckets=true", f"data.cache={tmp_path / 'c'}", pairs=pairs)
    Trainer(settings, tmp_path / "run").run()


def test_damaged_caches_are_named(prompts, tmp_path):
    folder = tmp_path / "c"
    encode_cache(config(prompts), folder, shard_size=8)
    table = config(prompts, f"data.cache={folder}").data
    shard = folder / "prompts-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    with pytest.raises(
        ValueError,
        match=r"prompts-00001\.safetensors: .* but the file ends after .*Remove it",
    ):
        load_prompt_table(table, load_model("demo"), "empty")
    shard.unlink()
    with pytest.raises(ValueError, match=r"prompts-00001\.safetensors: there is no such file"):
        load_prompt_table(table, load_model("demo"), "empty")
    encode_cache(config(prompts), folder, shard_size=8)  # and mends it
    assert shard.read_bytes() == whole
    for at in (len(whole) - 9, 300):  # of the data, and of the header
        flipped = bytearray(whole)
        flipped[at] ^= 1
        shard.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"prompts-00001\.safetensors.*"):
            load_prompt_table(table, load_model("demo"), "empty").read(range(20))
        encode_cache(config(prompts), folder, shard_size=8)
        assert shard.read_bytes() == whole
    held = lock_folder(folder, "held")
    with pytest.raises(ValueError, match="another process is encoding into this folder"):
        encode_cache(config(prompts), folder, shard_size=8)
    held.release()
    index = json.loads((folder / "index.json").read_text())
    first = index["prompts"][0]
    for change, message in [
        ([], "not the index of a cache"),
        ({"prompts": {"a": 1}}, "not the index of a cache"),
        ({"prompts": ["a"]}, "expected the name of a shard, got None"),
        ({"prompts": [first | {"file": "../c/prompts-00000.safetensors"}]}, r"name of a shard, got '\.\./c/"),
        ({"unconditional": str(folder / "unconditional.safetensors")}, "expected the name of a shard, got '/"),
        ({"prompts": [first | {"rows": 1.5}]}, r"expected a number of rows, got 1\.5"),
        ({"prompts": [first | {"rows": 10**15}]}, "expected a number of rows, got 1000000000000000"),
        ({"prompts": [first, first]}, "row 8 is in no shard"),
        ({"prompts": [first | {"rows": 10**7}]}, r"prompts-00000\.safetensors: expected 10000000 rows, got 8"),
    ]:
        (folder / "index.json").write_text(json.dumps(index | change if isinstance(change, dict) else change))
        with pytest.raises(ValueError, match=message):
            load_prompt_table(table, load_model("demo"), "empty")
    (folder / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json: expected JSON, but it cannot be read: it is nested too deeply"):
        load_prompt_table(table, load_model("demo"), "empty")


def memory(field: str) -> int:
    """MiB of this process, from Linux."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_a_draw_loads_its_rows_and_not_the_table(tmp_path):
    """Rows as large as SDXL's: 240 of 77 x 2048 floats in three shards, 144 MiB, of which four rows are 2.4 MiB."""
    index = []
    for shard in range(3):
        name = f"prompts-{shard:05d}.safetensors"
        rows = torch.arange(shard, 240, 3)
        write_shard(tmp_path / name, {"row": rows, "text": rows[:, None, None].expand(80, 77, 2048).float()}, {})
        index.append({"file": name, "rows": 80})
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    text = Shards(tmp_path, index, {}).read([200, 7, 7, 239])["text"]
    peak = memory("VmHWM") - before
    assert text[:, 0, 0].tolist() == [200, 7, 7, 239]
    assert torch.equal(text, text[:, :1, :1].expand(4, 77, 2048))
    assert peak < 20, f"{peak} MiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-size", "0"], "--shard-size: expected 1 or more, got 0"),
        (["--set", "data.cache=elsewhere"], "--out: expected the folder that data.cache names, elsewhere"),
        (["--set", "data.pairs=demo", "--set", "gan.generator_weight=1"], "they cannot be cached"),
        (["--set", "data.buckets=true"], "data.buckets: unused without real pairs"),
    ],
)
def test_mistakes_give_one_line_and_nothing_else(arguments, message, tmp_path, capsys):
    assert main(["encode", "--config", "demo", "--out", str(tmp_path / "c"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()
