"""A model at its full size on a CPU, once, by hand: ``python tests/full_size.py DIR [STEP ...]``. SDXL needs 24 GiB and
hours; ``--kind sd1`` and ``--kind sd2`` are SD 1.5 and 2.1, with which it is minutes.

    model    writes a checkpoint of the true architecture with random weights (SDXL: 2.57B in the UNet, 7 GB)
    train    three iterations of LoRA distillation at the model's own resolution by ``python -m sid_train distill``
    export   the generator as LoRA, UNet and checkpoint by ``python -m sid_train export``
    comfyui  ComfyUI (COMFYUI_PATH or ~/comfy/ComfyUI) loads LoRA and checkpoint with our nodes and samples a picture

Each step prints its time and the peak of its process's memory; ``report.jsonl`` keeps them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from sid_train.models.stable_diffusion.kinds import Kind

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "comfyui")]
PROMPTS = ("a lighthouse on a cliff at dawn", "a cat in a hat", "an old map of a harbour town")
GIB = 2**30


def write_model(path: Path, width: int = 320, kind: str = "sdxl") -> None:
    """Weights of a trained network's size, made one tensor at a time; ``width`` is that of the UNet's first level."""
    from sid_train.files.tensors import LazyTensor, write_tensors
    from sid_train.models.stable_diffusion.base import base_text_encoders, base_unet, base_vae
    from sid_train.models.stable_diffusion.keys import (
        UNET,
        VAE,
        is_vae_attention,
        rename,
        to_open_clip,
        unet_modules,
        vae_modules,
    )

    made_for = kind_called(kind)
    unet, vae = base_unet(made_for, width), base_vae()

    def random(name: str, like: torch.Tensor) -> LazyTensor:
        def make() -> torch.Tensor:
            rng = torch.Generator().manual_seed(hash_of(name))
            if like.ndim < 2:
                return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0).half()
            return (torch.randn(like.shape, generator=rng) * like[0].numel() ** -0.5).half()

        return LazyTensor(tuple(like.shape), torch.float16, make)

    state = unet.state_dict()
    tensors = {UNET + ldm: state[ours] for ours, ldm in rename(state, unet_modules(unet.config)).items()}
    state = vae.state_dict()
    for ours, ldm in rename(state, vae_modules(state)).items():
        tensors[VAE + ldm] = state[ours][..., None, None] if is_vae_attention(ldm) else state[ours]
    for encoder, network in zip(made_for.encoders, base_text_encoders(made_for), strict=True):
        state = network.state_dict()
        named = {k if k.startswith("text_") else f"text_model.{k}": t for k, t in state.items()}
        named = to_open_clip(named) if encoder.is_open_clip else named
        tensors |= {encoder.prefixes[0] + k: t for k, t in named.items()}
    print(f"UNet: {sum(t.numel() for k, t in tensors.items() if k.startswith(UNET)) / 1e9:.3f} billion parameters")
    write_tensors(path, {k: random(k, t) for k, t in tensors.items()}, {})


def kind_called(name: str) -> Kind:
    from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND, SDXL_KIND

    return {"sdxl": SDXL_KIND, "sd1": SD1_KIND, "sd2": SD2_KIND}[name]


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def run(report: Path, step: str, *command: object) -> None:
    """A command in a process of its own, and what it cost."""
    print("+", *command, flush=True)
    begin = time.monotonic()
    # glibc would otherwise keep what is freed in blocks below 32 MB, gigabytes of it here.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child until now
    entry = {"step": step, "seconds": round(time.monotonic() - begin), "peak_gib": round(peak, 2)}
    print(json.dumps(entry), flush=True)
    with report.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def train(base: Path, out: Path, report: Path) -> None:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = {
        "model.teacher": base,
        "data.prompts": prompts,
        "method.guidance": "zero-cfg",  # one network call a side: hours, not a day
        "training.iterations": 3,
        "training.batch_size": 1,
        "training.accumulate": 1,
        "training.grid_every": 0,
        "training.log_every": 1,
        "training.tracker": "none",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run(
        report,
        "train",
        sys.executable,
        "-m",
        "sid_train",
        "distill",
        "--config",
        "sdxl-4step-lora-24gb",
        *overrides,
        "--out",
        out,
    )


def check_run(run_dir: Path) -> None:
    """Finite losses, and both adapters changed: their second factors start at 0."""
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        losses = json.loads(line)["losses"]
        assert all(abs(value) < float("inf") for value in losses.values()), losses
        print(losses)
    with safe_open(run_dir / "checkpoint.safetensors", framework="pt") as file:
        for network in ("generator.", "fake_score.", "generator_ema."):
            ups = [k for k in file.keys() if k.startswith(network) and k.endswith("lora_B")]  # noqa: SIM118
            changed = sum(bool(file.get_tensor(name).any()) for name in ups)
            print(f"{network[:-1]}: {changed} of {len(ups)} modules changed")
            assert changed == len(ups)


def export(run_dir: Path, report: Path) -> None:
    for format_ in ("lora", "unet", "checkpoint"):
        path = run_dir.parent / f"{format_}.safetensors"
        command = [sys.executable, "-m", "sid_train", "export", run_dir, "--format", format_, "-o", path]
        run(report, f"export {format_}", *command)
        print(f"{path.name}: {path.stat().st_size / GIB:.2f} GiB")


def comfyui(folder: Path, base_name: str, resolution: int) -> None:
    """The exported files in a real server, through our own loaders."""
    from comfy_server import Server
    from conftest import find_comfyui, import_pack

    base = folder / "comfyui"
    import_pack()
    for kind, name in (("checkpoints", "checkpoint"), ("checkpoints", base_name), ("loras", "lora")):
        target = base / "models" / kind / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.hardlink_to(folder / f"{name}.safetensors")
    server = Server(find_comfyui(), base, "--bf16-unet")
    workflow = json.loads((ROOT / "workflows" / "api" / "text_to_image.json").read_text())
    lora = json.loads((ROOT / "workflows" / "api" / "lora_on_any_checkpoint.json").read_text())
    files = {"SiDCheckpointLoader": "checkpoint", "CheckpointLoaderSimple": base_name}
    try:
        for name, prompt in (("checkpoint", workflow), ("LoRA on its base", lora)):
            for node in prompt.values():
                if node["class_type"] in files:
                    node["inputs"]["ckpt_name"] = f"{files[node['class_type']]}.safetensors"
                if node["class_type"] == "EmptyLatentImage":
                    node["inputs"] |= {"width": resolution, "height": resolution}
                if node["class_type"] == "SiDLoRALoader":
                    node["inputs"]["lora_name"] = "lora.safetensors"
            begin = time.monotonic()
            entry = server.wait(server.queue(prompt), timeout=3600)
            assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
            pictures = [server.picture(output) for output in entry["outputs"].values() if "images" in output]
            print(f"{name}: {pictures[0]}, {time.monotonic() - begin:.0f} s")
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", nargs="*", default=["model", "train", "export", "comfyui"])
    parser.add_argument("--kind", choices=["sdxl", "sd1", "sd2"], default="sdxl")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    base, run_dir, report = folder / f"{args.kind}-random.safetensors", folder / "run", folder / "report.jsonl"
    if "model" in args.steps:
        write_model(base, kind=args.kind)
    if "train" in args.steps:
        train(base, run_dir, report)
        check_run(run_dir)
    if "export" in args.steps:
        export(run_dir, report)
    if "comfyui" in args.steps:
        comfyui(folder, base.stem, kind_called(args.kind).architecture.epsilon.resolution)


if __name__ == "__main__":
    main()
