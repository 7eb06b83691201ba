"""The demo command, shortened: killed half-way, continued, and compared with an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sid_train.training.checkpoint import read_network
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

ROW = {"name", "steps", "guidance_scale", "images", "frechet", "frechet_pixel", "prompt_accuracy", "precision",
       "recall", "high_frequency"}  # fmt: skip

# The real command, shortened; everything else is as shipped.
SHORT = ("training.iterations=12", "training.batch_size=8", "training.log_every=1")
HANG = 1800  # seconds that a busy machine does not need


def start(out) -> subprocess.Popen:
    settings = [part for setting in SHORT for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "sid_train", "demo", "--steps", "1", "--seed", "3", "--out", str(out), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A demo that was killed after some iterations, and that the same command continued."""
    out = tmp_path_factory.mktemp("demo") / "continued"
    process = start(out)
    log = out / "run" / "log.jsonl"
    deadline = time.monotonic() + HANG
    while not (log.is_file() and log.read_text().count("\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=HANG)[0]
    assert process.returncode == 130, text
    assert "The same command continues it" in text
    assert not (out / "metrics.json").exists()

    process = start(out)
    text = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0, text
    assert ", from " in text
    return out, text


def test_the_demo_writes_what_it_promises(continued):
    out, text = continued
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


def test_a_killed_demo_ends_as_an_uninterrupted_run(continued, tmp_path):
    """The figures follow from the generator and the seed."""
    run = RunFolder(continued[0] / "run")
    torch.set_num_threads(1)
    Trainer(run.read_config(), tmp_path).run()
    ours, theirs = (folder.generator_file() for folder in (run, RunFolder(tmp_path)))
    for network in ("generator", "fake_score", "generator_ema"):
        torch.testing.assert_close(read_network(ours, network), read_network(theirs, network), rtol=0, atol=0)
