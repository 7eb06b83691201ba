"""``python -m sid_train``: the commands. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from .errors import Interrupted, NonFiniteError

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130
RECIPES = Path(__file__).parent / "recipes"


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def demo(args: argparse.Namespace) -> None:
    from .demo.run import demo_folder, run_demo

    out = args.out or demo_folder(args.steps, args.guidance, args.seed, args.minutes)
    run_demo(out, args.steps, args.guidance, args.seed, args.minutes, args.full)


def distill(args: argparse.Namespace) -> None:
    from .callbacks import Callback, Grids, SnapshotScores, best_snapshot
    from .config import load_config
    from .distributed import is_first_process
    from .dry_run import dry_run
    from .export import export_any
    from .plan.command import hardware_of_run, refuse_what_cannot_fit
    from .trainer import Trainer

    config = load_config(args.config, args.set)
    if is_first_process():
        print(config.to_toml(), flush=True)
    hardware = hardware_of_run()
    if hardware is not None and is_first_process() and not args.force:
        refuse_what_cannot_fit(config, hardware)
    if args.dry_run:
        if is_first_process():
            print(dry_run(config, args.out))
        return
    training = config.training
    callbacks: list[Callback] = [Grids(training.grid_every)] if training.grid_every else []
    if training.clip_model:
        callbacks.append(SnapshotScores(training.snapshot_every, training.clip_model))
    trainer = Trainer(config, args.out, callbacks)
    trainer.run()
    if trainer.accelerator.is_main_process:
        file = args.out / "generator.safetensors"
        best = best_snapshot(args.out)
        export_any(args.out, file, iteration=best)
        if best:
            print(f"The snapshot of iteration {best} has the highest CLIP score (clip.jsonl).")
        base = f" --base {config.model.teacher}" if config.adapter.rank and config.model.teacher != "demo" else ""
        print(f"Exported {file}. Sample it: python -m sid_train sample {file}{base} --prompt ...")


def plan(args: argparse.Namespace) -> None:
    from .plan.command import plan_command

    plan_command(args)


def encode(args: argparse.Namespace) -> None:
    from .config import load_config
    from .encode import encode_cache

    encode_cache(load_config(args.config, args.set), args.out, args.shard_size, args.dtype)


def sample(args: argparse.Namespace) -> None:
    import torch

    from .files import replacing
    from .images import image_grid, to_pil
    from .models.bundle import load_generator
    from .models.networks import DTYPES
    from .sample import sample_images

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a name that ends in .png, got {str(args.out)!r}")
    if not 1 <= args.count <= 256:
        raise ValueError(f"--count: expected 1 to 256, got {args.count}")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    bundle, recipe = load_generator(args.model, args.base, args.resolution)
    timesteps = recipe.timesteps_for(args.steps)
    if len(timesteps) != recipe.steps:
        print(f"warning: {args.model} was trained for {recipe.steps} step(s), not {len(timesteps)}", file=sys.stderr)
    prompts = [prompt for prompt in args.prompt for _ in range(args.count)]
    bundle.to(device, DTYPES[args.dtype])
    images = sample_images(bundle, recipe, prompts, args.seed, args.steps)
    with replacing(args.out) as temporary:
        to_pil(image_grid(images, columns=args.count)).save(temporary, format="PNG")
    print(f"{args.out}: {len(images)} picture(s), timesteps {' '.join(map(str, timesteps))}")


def inspect(args: argparse.Namespace) -> None:
    from .core.recipe import read_recipe

    recipe = read_recipe(args.file)
    print(json.dumps(recipe.to_dict(), indent=2) if args.json else recipe.describe())


def evaluate(args: argparse.Namespace) -> None:
    from .demo.report import format_table
    from .demo.run import evaluate_generator

    metrics = evaluate_generator(args.model)
    print(json.dumps(metrics, indent=2) if args.json else format_table(metrics))


def export(args: argparse.Namespace) -> None:
    from .export import export_any

    recipe, notes = export_any(
        args.source, args.out, args.format, args.dtype, args.base, args.vae, args.rank, args.energy, args.iteration
    )
    print("\n".join([str(args.out), *notes, recipe.describe()]))


def convert(args: argparse.Namespace) -> None:
    from .core.recipe import PRESETS
    from .sdxl_export import convert_unet

    if args.recipe not in PRESETS:
        raise ValueError(f"--recipe: expected one of {', '.join(PRESETS)}, got {args.recipe!r}")
    recipe = convert_unet(args.file, args.out, PRESETS[args.recipe], args.dtype)
    print(f"{args.out}\n{recipe.describe()}")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sid_train", description="Few-step distillation by Score identity Distillation.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def command(function, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    sub = command(demo, "distil the embedded teacher, measure it and write a report, in minutes on a CPU")
    sub.add_argument("--out", type=Path, help="folder (default: one under sid-demo/ named by the other options)")
    sub.add_argument("--steps", type=int, default=4, help="network calls of the generator, 1 to 8 (default: 4)")
    sub.add_argument("--guidance", help="none, lsg=1.2, zero-cfg, anti-cfg=-1 or custom=A,B,C (default: the recipe's)")
    sub.add_argument("--seed", type=int, default=0, help="of the distillation (default: 0)")
    sub.add_argument("--minutes", type=float, help="train as long as fits into this many minutes in all")
    sub.add_argument("--full", action="store_true", help="compute the teacher's and the real rows anew (10 minutes)")

    sub = command(distill, "distil a teacher with a recipe; the same command continues an interrupted run")
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    sub.add_argument("--config", required=True, help=f"a TOML file, or a recipe that ships: {shipped}")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    sub.add_argument("--out", type=Path, required=True, help="the run's folder")
    sub.add_argument("--dry-run", action="store_true", help="read and check everything; train and write nothing")
    sub.add_argument("--force", action="store_true", help="start although plan says that GPU memory does not suffice")

    sub = command(plan, "say what a run needs: memory of each GPU, network calls, FLOPs, disk, time; no GPU needed")
    sub.add_argument("--config", help=f"a TOML file, or a recipe that ships: {shipped}")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    sub.add_argument("--gpus", type=int, help="how many (default: those of this machine)")
    sub.add_argument("--gpu-memory", type=float, help="GiB of each, such as 24 or 80 (default: this machine's)")
    sub.add_argument("--reserve", type=float, default=2, help="GiB left free for what is not counted (default: 2)")
    speed = sub.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=float, help="what one GPU sustains, for the time")
    speed.add_argument("--seconds-per-forward", type=float, help="of one picture, as you measured it, for the time")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--table", type=Path, metavar="FILE", help="instead: write the table of all recipes into FILE")

    sub = command(encode, "encode prompts and pairs once, for runs without a text encoder; continues after a stop")
    sub.add_argument("--config", required=True, help="the configuration of the run that will read them")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    sub.add_argument("--out", type=Path, required=True, help="the cache's folder: data.cache of that run")
    sub.add_argument("--shard-size", type=int, default=512, help="prompts or pairs a file (default: 512)")
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: what they are computed in, exact")

    sub = command(sample, "make pictures with a distilled generator")
    sub.add_argument("model", help="a safetensors file that carries a recipe")
    sub.add_argument("--prompt", action="append", required=True, help="may be given more than once: a row each")
    sub.add_argument("--count", type=int, default=8, help="pictures a prompt (default: 8)")
    sub.add_argument("--steps", type=int, help="default: the recipe's")
    sub.add_argument("--base", help="the SDXL model that a LoRA belongs on, or whose text encoders and VAE to use")
    sub.add_argument("--resolution", type=int, default=0, help="of SDXL's pictures (default: what it was trained at)")
    sub.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    sub.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the UNet (default: fp32)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, default=Path("sample.png"), help="default: sample.png")

    sub = command(inspect, "show the recipe inside a checkpoint")
    sub.add_argument("file", type=Path)
    sub.add_argument("--json", action="store_true")

    sub = command(evaluate, "measure a generator of the demo's architecture")
    sub.add_argument("model", help="a safetensors file that carries a recipe")
    sub.add_argument("--json", action="store_true")

    sub = command(export, "write the generator of a run, or of an exported file, in another form, with its recipe")
    sub.add_argument("source", type=Path, help="the run's folder, or an SDXL file with a recipe")
    sub.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file, or a folder for diffusers")
    sub.add_argument(
        "--format",
        choices=["checkpoint", "unet", "lora", "diffusers"],
        default="",
        help="checkpoint: all in one file; unet: ComfyUI's diffusion model; lora: kohya's names; diffusers: a folder "
        "(default: lora for a run with adapters, else checkpoint)",
    )
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32", "fp8"], default="fp16", help="default: fp16")
    sub.add_argument("--vae", type=Path, help="a VAE to put in instead of the teacher's")
    sub.add_argument("--base", help="the model under a LoRA, with the missing parts, or to extract a LoRA against")
    sub.add_argument("--rank", type=int, default=0, help="of the LoRA that is extracted from a whole UNet")
    sub.add_argument("--energy", type=float, default=0, help="instead of --rank: the share to keep, such as 0.95")
    sub.add_argument("--iteration", type=int, default=0, help="of a run's snapshot (default: its last checkpoint)")

    sub = command(convert, "give an SDXL UNet that carries no recipe one of the presets (DMD2, LCM, Lightning ...)")
    sub.add_argument("file", type=Path, help="a safetensors file, named as diffusers or as ldm names it")
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub.add_argument("--recipe", required=True, help="the preset: 'DMD2 (4 steps)', for instance")
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="default: fp16")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. 0 is success, 1 a failed run, 2 a user's mistake, 130 an interrupted and saved run."""
    args = build_parser().parse_args(argv)
    try:
        args.function(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Interrupted as error:
        print(f"{error}. The same command continues it.", file=sys.stderr)
        return INTERRUPTED
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0
