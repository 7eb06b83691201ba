"""Figures that a refactor must not change, bit for bit: losses, weights, optimizers, exports, caches, plans, latents.

    python tests/golden.py --out before.txt                            # on the one checkout
    python tests/golden.py --out after.txt                             # on the other, with the same copy of this file
    diff before.txt after.txt                                          # says nothing

It prints sorted lines ``name: value``. With ``--comfyui PATH`` (which may be repeated) it also starts that ComfyUI with
the pack in it, and hashes the latents of every workflow; ComfyUI's requirements must be installed. ``--only PREFIX``
runs one part: demo, sdxl, gloo or comfyui. ``--keep DIR`` leaves all runs in DIR, with some that were interrupted: the
code after a change must continue those with ``distill --config demo`` and the ``--set`` that made them.

Nothing of ``sid_train`` is imported here but by its command line, whose process is forked from this one to save the
imports of torch. What it uses are commands, settings, the files of a run, node ids and ComfyUI's server, so that this
file runs on code whose modules moved. ``--root`` names a checkout other than the one around this file. Compare outputs
of one machine, one PyTorch and one number of threads (one is set): others round differently.

Expected to change with the code: ``demo/two-updates`` (its average and what its log means) and ``demo/late-gan``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIGURES: dict[str, str] = {}
QUIET = ["training.log_every=1", "training.tracker=none", "training.seed=0"]
# Said, since the demo's configurations have another where images are counted once an iteration.
RAMP_UP = "optimizer.ema_rampup=0.05"
PROMPTS = ["a lighthouse at dawn", "a cat in a hat", "an old map", "a harbour town", "a green hill"]
GAN = ["gan.generator_weight=0.01", "gan.start_images=0"]


def record(name: str, value: object) -> None:
    assert name not in FIGURES, name
    FIGURES[name] = str(value)


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# -- commands --------------------------------------------------------------------------------------------------------


def _as_command(arguments: list[str], out: str, err: str) -> None:
    """In the forked process: what ``python -m sid_train`` does."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["sid_train", *arguments]
    runpy.run_module("sid_train", run_name="__main__", alter_sys=True)


def start(*arguments: object) -> multiprocessing.Process:
    """One command of ``sid_train`` in a process of its own, in this folder."""
    process = multiprocessing.get_context("fork").Process(
        target=_as_command, args=([str(a) for a in arguments], "stdout.log", "stderr.log")
    )
    process.start()
    return process


def sid_train(*arguments: object) -> str:
    """Runs one command to its end: what it printed. RuntimeError where it fails."""
    process = start(*arguments)
    process.join()
    if process.exitcode:
        told = "".join(Path(name).read_text() for name in ("stdout.log", "stderr.log"))
        raise RuntimeError(f"sid_train {' '.join(map(str, arguments))}: {process.exitcode}\n{told[-4000:]}")
    return Path("stdout.log").read_text()


def settings(values: Iterable[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


# -- figures of files ------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def checkpoint_figures(name: str, path: Path) -> None:
    """A hash for each network, optimizer and random state in a checkpoint, a file or a folder with one a process."""
    parts: dict[str, hashlib._Hash] = {}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for number, file_path in enumerate(files):
        with safe_open(file_path, framework="pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key)
                digest = parts.setdefault(key.partition(".")[0], hashlib.sha256())
                digest.update(f"{number} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor))
            facts = json.loads((file.metadata() or {}).get("facts", "null"))
    if path.is_dir():
        facts = json.loads((path / "facts.json").read_text())["facts"]
    for part, digest in parts.items():
        record(f"{name}/{part}", digest.hexdigest())
    record(f"{name}/facts", json.dumps(facts, sort_keys=True))


def log_figures(name: str, folder: Path) -> None:
    """All losses as one hash, and the last iteration's."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(entry["iteration"], entry["images"], sorted(entry["losses"].items())) for entry in entries]
    record(f"{name}/losses", f"{len(losses)} iterations, {sha256(repr(losses))}")
    for part, value in losses[-1][2]:
        record(f"{name}/last/{part}", repr(value))


def run_figures(name: str, folder: Path) -> None:
    """Everything that a finished run's folder says."""
    log_figures(name, folder)
    whole = folder / "checkpoint.safetensors"
    checkpoint_figures(name, whole if whole.is_file() else max((folder / "checkpoints").glob("[0-9]*")))


def safetensors_figures(name: str, path: Path) -> None:
    """Two hashes: the file's metadata, sorted (safetensors writes it in any order), and all of the rest."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    record(f"{name}/metadata", sha256(json.dumps(header.pop("__metadata__", {}), sort_keys=True)))
    record(f"{name}/data", sha256(json.dumps(header).encode() + content[8 + size :]))


def picture_figure(name: str, path: Path) -> None:
    with Image.open(path) as picture:
        record(name, f"{picture.size} {picture.mode} {sha256(picture.tobytes())}")


# -- runs ------------------------------------------------------------------------------------------------------------


def distill(name: str, config: str, *overrides: str) -> Path:
    """A run in the folder ``name``, and its figures."""
    sid_train("distill", "--config", config, *settings([*QUIET, *overrides]), "--out", name)
    run_figures(name, Path(name))
    print(f"  {name}", file=sys.stderr, flush=True)
    return Path(name)


def interrupt(name: str, config: str, *overrides: str, after: int) -> None:
    """A run that is stopped by SIGTERM once it logged ``after`` iterations: it saves and ends with 130."""
    process = start("distill", "--config", config, *settings([*QUIET, *overrides]), "--out", name)
    stop_after(Path(name), after, process.pid, process.is_alive)
    process.join()
    if process.exitcode != 130:
        raise RuntimeError(f"{name}: expected an interrupted run, got {process.exitcode}")


def stop_after(folder: Path, iterations: int, process: int, alive: Callable[[], bool]) -> None:
    log = folder / "log.jsonl"
    while alive() and (not log.is_file() or len(log.read_text().splitlines()) < iterations):
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)


def run_demo() -> None:
    """The embedded model, every branch of the method: 20 iterations; the whole batch of 32 in the first three."""
    once = ["training.iterations=20", "training.fake_score_updates=1", RAMP_UP]
    small = [*once, "training.batch_size=8"]
    pairs = ["data.pairs=demo", *GAN]
    demo = distill("demo/4-steps", "demo", *once)
    distill("demo/1-step", "demo-1step", *once)
    distill("demo/gan", "demo", *once, *pairs)
    distill("demo/lsg", "demo", *small, "method.guidance=lsg=1.5")
    distill("demo/zero-cfg-gan", "demo", *small, *pairs, "method.guidance=zero-cfg")
    distill("demo/anti-cfg", "demo", *small, "method.guidance=anti-cfg=-1")
    distill("demo/final", "demo", *small, "method.matching=final", "method.noise_mode=fixed")
    distill("demo/accumulate", "demo", *small, "training.accumulate=2")
    distill("demo/adapters", "demo", *small, "adapter.rank=4", "training.gradient_checkpointing=true")
    distill("demo/bf16", "demo", *small, "training.mixed_precision=bf16")
    distill("demo/bf16-gan", "demo", *small, *pairs, "training.mixed_precision=bf16", "training.iterations=8")
    distill(
        "demo/others", "demo", *small, "method.guidance=custom=1,1.2,1.5", "method.noise_mode=ddim",
        "method.weighting=one_minus_sigma", "method.prompt_dropout_in=fake_score", "model.unconditional=zeros",
        "optimizer.clip_norm=1", "optimizer.warmup=5", "training.generator_start_images=32", "training.seed=5",
    )  # fmt: skip
    distill(
        "demo/second-stage", "demo", *small, *pairs, "model.init_generator=demo/4-steps/generator.safetensors",
        "training.iterations=8", "training.snapshot_every=4", "training.grid_every=8",
    )  # fmt: skip
    checkpoint_figures("demo/second-stage/snapshot", Path("demo/second-stage/snapshots/0000004.safetensors"))
    picture_figure("demo/second-stage/grid", Path("demo/second-stage/grids/000008.png"))
    distill("demo/two-updates", "demo", *small, "training.fake_score_updates=2")
    distill("demo/late-gan", "demo", *small, *pairs, "gan.start_images=64", "gan.sid_weight=10")

    # Resumed, it has the figures of demo/4-steps.
    interrupt("demo/interrupted", "demo", *once, "training.checkpoint_every=5", after=10)
    shutil.copytree("demo/interrupted", "demo/resumed")
    distill("demo/resumed", "demo", *once, "training.checkpoint_every=5")
    for part in ("losses", "generator", "fake_score", "generator_ema"):
        assert FIGURES[f"demo/resumed/{part}"] == FIGURES[f"demo/4-steps/{part}"], part

    sid_train("export", demo, "-o", "demo-fp32.safetensors", "--dtype", "fp32")
    safetensors_figures("demo/4-steps/generator.safetensors", demo / "generator.safetensors")
    safetensors_figures("demo/export-fp32", Path("demo-fp32.safetensors"))
    ask = ["--prompt", "a red three on a blue ground", "--prompt", "a pink seven", "--count", "2", "--device", "cpu"]
    sid_train("sample", demo / "generator.safetensors", *ask, "--out", "demo.png")
    picture_figure("demo/sample", Path("demo.png"))
    inspected = json.loads(sid_train("inspect", demo / "generator.safetensors", "--json"))
    record("demo/inspect", sha256(json.dumps(inspected, sort_keys=True)))
    for gpus in (1, 8):
        plan_figures(f"demo/plan-{gpus}", gpus, "demo")


def plan_figures(name: str, gpus: int, config: str, *overrides: str) -> None:
    told = sid_train("plan", "--config", config, *settings(overrides), "--gpus", gpus, "--gpu-memory", 24, "--json")
    facts = json.loads(told[told.index("{") :])
    record(name, sha256(json.dumps(facts, sort_keys=True)))
    record(f"{name}/peak", facts["peak"])


# -- a small SDXL ----------------------------------------------------------------------------------------------------


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's, from the vocabulary that open-clip-torch ships."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 1 + 49152 - 256 - 2]
    letters, special = list(bytes_to_unicode().values()), ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in merges), *special]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        start, end = special
        return CLIPTokenizer.from_pretrained(
            name, bos_token=start, eos_token=end, unk_token=end, pad_token=pad, model_max_length=77
        )


def text_config(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1, projection_dim=64,
        hidden_act=activation, eos_token_id=49407,
    )  # fmt: skip


def make_sdxl(folder: str, **scheduler: object) -> None:
    """A whole SDXL, small and random, as a diffusers folder."""
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 32, 32, 64),
            layers_per_block=1,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(text_config("quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config("gelu")),
        tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 128, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=128,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=64 + 6 * 256,
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **scheduler),
    ).save_pretrained(folder)


def make_data() -> None:
    """Prompts in a file, and pictures with captions in a folder."""
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    Path("pairs").mkdir()
    ramp = torch.linspace(0, 255, 96).byte()
    for number, prompt in enumerate(PROMPTS):
        planes = [ramp.expand(80, 96), ramp[:80, None].expand(80, 96), torch.full((80, 96), 50 * number)]
        Image.fromarray(torch.stack(planes, dim=-1).byte().numpy()).save(f"pairs/{number}.png")
        Path(f"pairs/{number}.txt").write_text(prompt)


def run_sdxl() -> None:
    """Training, exports, pictures, caches and plans of a small SDXL: 8 iterations of 2 pictures, 4 in some."""
    make_sdxl("small-xl")
    make_sdxl("small-vpred", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    make_data()
    Path("small.toml").write_text(
        '[model]\nteacher = "small-xl"\nresolution = 64\n\n[data]\nprompts = "prompts.txt"\n\n'
        "[optimizer]\ngenerator_lr = 1e-4\nfake_score_lr = 1e-4\nema_halflife_images = 10\nema_rampup = 1\n\n"
        "[training]\niterations = 8\nbatch_size = 2\n"
    )
    pairs, few = ["data.pairs=pairs", *GAN], "training.iterations=4"
    lora = distill("sdxl/lora", "small.toml", "adapter.rank=4", "method.guidance=zero-cfg")
    whole = distill("sdxl/whole", "small.toml", "method.guidance=lsg=1.5", "training.snapshot_every=4")
    checkpoint_figures("sdxl/whole/snapshot", whole / "snapshots" / "0000004.safetensors")
    distill("sdxl/gan", "small.toml", few, *pairs)
    vpred = distill("sdxl/v-prediction", "small.toml", few, "model.teacher=small-vpred", "method.guidance=lsg=1.5")
    recipe = [few, "model.teacher=small-xl", "model.resolution=64", "data.prompts=prompts.txt", "adapter.rank=4"]
    distill("sdxl/bf16-lora", "sdxl-4step-lora-24gb", *recipe, "training.batch_size=2", "training.accumulate=2")
    lora_file = f"model.init_generator={lora}/generator.safetensors"
    distill("sdxl/second-lora", "small.toml", few, "adapter.rank=4", lora_file, "training.gradient_checkpointing=true")

    cache = [*settings(pairs), "--out", "cache", "--shard-size", "2"]
    sid_train("encode", "--config", "small.toml", *cache)
    for shard in sorted(Path("cache").iterdir()):
        record(f"sdxl/cache/{shard.name}", sha256(shard.read_bytes()))
    sid_train("encode", "--config", "small.toml", "--out", "cache-bf16", "--dtype", "bf16")
    for shard in sorted(Path("cache-bf16").iterdir()):
        record(f"sdxl/cache-bf16/{shard.name}", sha256(shard.read_bytes()))
    distill("sdxl/cached-gan", "small.toml", few, *pairs, "data.cache=cache")

    # Exports, from the whole run's last and from a snapshot, from a LoRA, and from an exported file.
    safetensors_figures("sdxl/lora/generator.safetensors", lora / "generator.safetensors")
    safetensors_figures("sdxl/v-prediction/generator.safetensors", vpred / "generator.safetensors")
    export("lora", lora, "--format", "lora")
    export("lora-fp32", lora, "--format", "lora", "--dtype", "fp32")
    export("lora-unet", lora, "--format", "unet")
    export("lora-checkpoint", lora, "--format", "checkpoint")
    export("unet", whole, "--format", "unet")
    export("unet-fp32", whole, "--format", "unet", "--dtype", "fp32")
    export("unet-fp8", whole, "--format", "unet", "--dtype", "fp8")
    export("checkpoint", whole, "--format", "checkpoint")
    export("extracted-lora", whole, "--format", "lora", "--rank", "4", "--base", "small-xl")
    export("snapshot", whole, "--format", "unet", "--iteration", "4")
    export("again", "checkpoint.safetensors", "--format", "unet")
    export("again-lora", "lora.safetensors", "--format", "unet", "--base", "small-xl")
    sid_train("export", whole, "-o", "folder", "--format", "diffusers")
    for path in sorted(Path("folder").rglob("*.safetensors")):
        safetensors_figures(f"sdxl/export/{path}", path)
    unet = "small-xl/unet/diffusion_pytorch_model.safetensors"
    sid_train("convert", unet, "-o", "converted.safetensors", "--recipe", "DMD2 (4 steps)")
    safetensors_figures("sdxl/convert", Path("converted.safetensors"))

    ask = ["--prompt", PROMPTS[0], "--count", "2", "--device", "cpu"]
    sid_train("sample", lora / "generator.safetensors", "--base", "small-xl", *ask, "--out", "lora.png")
    sid_train("sample", "checkpoint.safetensors", *ask, "--steps", "2", "--out", "checkpoint.png")
    picture_figure("sdxl/sample-lora", Path("lora.png"))
    picture_figure("sdxl/sample-checkpoint", Path("checkpoint.png"))
    for gpus in (1, 8):
        batch = "training.batch_size=16"
        plan_figures(f"sdxl/plan-lora-{gpus}", gpus, "small.toml", "adapter.rank=4", batch)
        plan_figures(f"sdxl/plan-sharded-gan-{gpus}", gpus, "small.toml", *pairs, "training.sharding=full", batch)
    interrupt("sdxl/interrupted-lora", "small.toml", "adapter.rank=4", "training.iterations=20", after=10)


def export(name: str, source: object, *options: str) -> None:
    sid_train("export", source, "-o", f"{name}.safetensors", *options)
    safetensors_figures(f"sdxl/export/{name}", Path(f"{name}.safetensors"))


# -- two processes ---------------------------------------------------------------------------------------------------


def run_gloo(root: Path) -> None:
    """Two processes on the demo's model, replicated and sharded: 6 iterations of 8 pictures, the GAN in the second."""
    common = ["training.iterations=6", "training.batch_size=8", "training.fake_score_updates=1", RAMP_UP, *QUIET]
    kinds = {
        "gloo/replicated": [],
        "gloo/replicated-adapters": ["adapter.rank=4", "training.accumulate=2"],
        "gloo/sharded": ["training.sharding=full"],
        "gloo/sharded-gan": ["training.sharding=full", "training.accumulate=2", "data.pairs=demo", *GAN],
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": python_path(root)}

    def begin(name: str, overrides: list[str]) -> subprocess.Popen:
        command = [*torchrun, "-m", "sid_train", "distill", "--config", "demo"]
        command += [*settings([*common, *overrides]), "--out", name]
        with open("torchrun.log", "w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    for name, overrides in kinds.items():
        if code := begin(name, overrides).wait():
            raise RuntimeError(f"{name}: {code}\n{Path('torchrun.log').read_text()[-4000:]}")
        run_figures(name, Path(name))
        safetensors_figures(f"{name}/generator.safetensors", Path(name) / "generator.safetensors")
        print(f"  {name}", file=sys.stderr, flush=True)
    # To be resumed by hand: it then has the figures of gloo/sharded.
    process = begin("gloo/interrupted-sharded", kinds["gloo/sharded"])
    stop_after(Path("gloo/interrupted-sharded"), 3, process.pid, lambda: process.poll() is None)
    process.wait()


def python_path(root: Path) -> str:
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


# -- ComfyUI ---------------------------------------------------------------------------------------------------------

# What the small models' files carry: a four-step SiD generator's metadata.
RECIPE = {
    "sid.format_version": "1",
    "sid.base_model": "SDXL 1.0",
    "sid.base_model_hash": "",
    "sid.prediction_type": "epsilon",
    "sid.zero_terminal_snr": "false",
    "sid.steps": "4",
    "sid.t_init": "625",
    "sid.ladder": "sid",
    "sid.timesteps": "625,468,312,156",
    "sid.noise_mode": "fresh",
    "sid.unit_variance_start": "false",
    "sid.training_resolution": "1024x1024",
    "sid.licence": "",
    "sid.unconditional": "empty",
    "sid.guidance.strategy": "none",
    "sid.guidance.fake_train": "1.0",
    "sid.guidance.fake_eval": "1.0",
    "sid.guidance.teacher": "1.0",
    "sid.training_summary": "{}",
    "sid.sampling.guidance": "none",
    "sid.sampling.cfg": "1.0",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.implementation": "sgm",
    "modelspec.title": "SDXL 1.0 SiD 4-step",
    "modelspec.resolution": "1024x1024",
    "modelspec.predict_key": "epsilon",
    "modelspec.license": "",
}
MAKE_MODELS = """
import json, sys
from pathlib import Path
small_models, comfyui, base, recipe = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfyui, str(Path(small_models).parent)]
import comfy.cli_args
comfy.cli_args.args.cpu = True
from small_models import make_models
make_models(Path(base), json.loads(recipe))
"""
SIZES = {"width": 128, "height": 128}


@contextmanager
def comfyui_server(comfyui: Path, root: Path, base: Path):
    """A ComfyUI with the pack on a free port; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("input", "output", "temp", "user", "models", "custom_nodes", "frontend"):
        (base / name).mkdir(exist_ok=True)
    (base / "custom_nodes" / "ComfyUI-SiD").symlink_to(root)
    (base / "frontend" / "index.html").write_text("none")  # no package of ComfyUI's frontend is needed
    command = [sys.executable, comfyui / "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", base, "--front-end-root", base / "frontend", "--disable-auto-launch"]
    with (base / "comfyui.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=comfyui, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": python_path(root)}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start:\n{(base / 'comfyui.log').read_text()[-4000:]}")
            try:
                ask(url + "/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, content: dict | None = None):
    data = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
        ) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode()[:4000]}") from None


def queue(url: str, prompt: dict) -> dict:
    """Runs a workflow: its outputs by node id."""
    number = ask(url + "/prompt", {"prompt": prompt, "client_id": "golden"})["prompt_id"]
    while number not in (history := ask(f"{url}/history/{number}")):
        time.sleep(0.1)
    if history[number]["status"]["status_str"] != "success":
        raise RuntimeError(json.dumps(history[number]["status"])[:4000])
    return history[number]["outputs"]


def run_comfyui(comfyui: Path, root: Path, small_models: Path, base: Path) -> None:
    """The latents of every sampler in every workflow, as SaveLatent writes them, and the training recipe's text."""
    version = (comfyui / "comfyui_version.py").read_text().split('"')[1]
    base.mkdir()
    subprocess.run(
        [sys.executable, "-c", MAKE_MODELS, small_models, comfyui, base, json.dumps(RECIPE)], check=True,
        capture_output=True,
    )  # fmt: skip
    with comfyui_server(comfyui, root, base) as url:
        nodes = ask(url + "/object_info")
        record(f"comfyui-{version}/nodes", " ".join(sorted(name for name in nodes if name.startswith("SiD"))))
        for path in sorted((root / "workflows" / "api").glob("*.json")):
            prompt = json.loads(path.read_text())
            for node in prompt.values():
                node["inputs"].update({key: value for key, value in SIZES.items() if key in node["inputs"]})
            saved = {}
            for node, content in list(prompt.items()):
                kind = content["class_type"]
                for slot, output in enumerate(nodes[kind]["output"]):
                    if "Sampler" in kind and output == "LATENT":
                        saved[f"save-{node}-{slot}"] = f"comfyui-{version}/{path.stem}/{node}-{kind}-{slot}"
                        inputs = {"samples": [node, slot], "filename_prefix": f"{path.stem}-{node}-{slot}"}
                        prompt[f"save-{node}-{slot}"] = {"class_type": "SaveLatent", "inputs": inputs}
            outputs = queue(url, prompt)
            for node, name in saved.items():
                (file,) = outputs[node]["latents"]
                with safe_open(base / file["type"] / file["subfolder"] / file["filename"], framework="pt") as latent:
                    tensor = latent.get_tensor("latent_tensor")
                assert tensor.std() > 0.01, name
                record(name, f"{tensor.dtype} {tuple(tensor.shape)} {sha256(tensor_bytes(tensor))}")
            for node, output in outputs.items():
                if "text" in output:
                    text = "\n".join(output["text"]).replace(str(base), "BASE")
                    record(f"comfyui-{version}/{path.stem}/{node}-text", sha256(text))
            print(f"  ComfyUI {version}: {path.stem}", file=sys.stderr, flush=True)
        for path in sorted((base / "output" / "sid_train").glob("*")):
            text = path.read_text().replace(str(base), "BASE")
            record(f"comfyui-{version}/written/{path.name}", sha256(text))


# -- the whole -------------------------------------------------------------------------------------------------------


def check_package(root: Path) -> None:
    """Another ``sid_train`` that is installed must not be the one that is measured."""
    spec = importlib.util.find_spec("sid_train")  # found, not imported
    if spec is None or not Path(spec.origin).is_relative_to(root):
        raise SystemExit(f"expected sid_train in {root}, found {spec and spec.origin}")


def timed(name: str, part, *arguments: object) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    begun = time.monotonic()
    part(*arguments)
    print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the lines into this file")
    parser.add_argument("--only", action="append", choices=["demo", "sdxl", "gloo", "comfyui"], help="default: all")
    parser.add_argument("--comfyui", action="append", default=[], type=Path, help="a ComfyUI; may be repeated")
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is made, left there")
    parser.add_argument("--root", type=Path, default=here, help="the checkout (default: the one around this file)")
    parser.add_argument("--small-models", type=Path, default=here / "tests" / "comfyui" / "small_models.py")
    args = parser.parse_args()
    root, out, only = args.root.resolve(), args.out and args.out.resolve(), args.only or ["demo", "sdxl", "gloo"]
    comfyuis, small_models = [path.resolve() for path in args.comfyui], args.small_models.resolve()
    # What is forked or started from here computes with one thread, and takes this checkout's package.
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path.insert(0, str(root))
    check_package(root)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve() if args.keep is None else args.keep.resolve()
        work.mkdir(parents=True, exist_ok=args.keep is None)
        os.chdir(work)  # the names that commands are given, and write into files, are relative to it
        try:
            for name, part, arguments in (("demo", run_demo, ()), ("sdxl", run_sdxl, ()), ("gloo", run_gloo, (root,))):
                if name in only:
                    timed(name, part, *arguments)
            for number, comfyui in enumerate(comfyuis if args.only is None or "comfyui" in only else []):
                timed(
                    f"comfyui {number}",
                    run_comfyui,
                    comfyui,
                    root,
                    small_models,
                    Path(temporary).resolve() / f"comfyui-{number}",
                )
        finally:
            os.chdir(root)
    lines = [f"{name}: {value}" for name, value in sorted(FIGURES.items())]
    if not comfyuis:
        lines.append("comfyui: skipped, no --comfyui")
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
