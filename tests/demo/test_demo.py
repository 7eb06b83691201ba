"""The demo command, shortened: killed half-way, continued, and compared with an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

ROW = {"name", "steps", "guidance_scale", "images", "frechet", "frechet_pixel", "prompt_accuracy", "precision",
       "recall", "high_frequency"}  # fmt: skip

# The real command, shortened; everything else is as shipped.
SHORT = ("training.iterations=12", "training.batch_size=8", "training.log_every=1")
HANG = 1800  # seconds that a busy machine does not need


def start(out) -> subprocess.Popen:
    settings = [part for setting in SHORT for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "sid_train", "demo", "--steps", "1", "--seed", "3", "--out", str(out), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "whole"
    process = start(out)
    text = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0, text
    return out, text


def test_the_demo_writes_what_it_promises(whole):
    out, text = whole
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["seed"], metrics["steps"], metrics["guidance"]) == (3, 1, metrics["guidance"])
    assert metrics["seconds"] > 0
    assert 100 < metrics["peak_memory_mib"] < 2048
    for key in ("rows", "rows_trained_prompts"):
        assert [r["name"] for r in metrics[key]] == ["real_floor", "teacher_many_step", "undistilled", "sid"]
        for row in metrics[key]:
            assert row.keys() == ROW
            assert row["images"] >= 2048
        assert [r["steps"] for r in metrics[key]] == [0, 30, 1, 1]
    assert (out / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "undistilled" not in text  # the table speaks to people
    assert "teacher on our timesteps" in text


def test_a_killed_demo_continues_to_the_same_figures(whole, tmp_path):
    process = start(tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + HANG
    while not (log.is_file() and log.read_text().count("\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=HANG)[0]
    assert process.returncode == 130, text
    assert "The same command continues it" in text
    assert not (tmp_path / "metrics.json").exists()

    process = start(tmp_path)
    text = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0, text
    assert ", from " in text
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, whole[0]))
    for metrics in (ours, theirs):
        del metrics["seconds"], metrics["peak_memory_mib"]
    assert ours == theirs
    assert (tmp_path / "grid.png").read_bytes() == (whole[0] / "grid.png").read_bytes()
