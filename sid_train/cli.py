"""``python -m sid_train``: the command line. A command is the function of its name in the module of its name, which is
imported when it is asked for: help and mistakes need not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import io
import math
import sys
from pathlib import Path
from typing import NoReturn

from . import configs
from .errors import Interrupted, NonFiniteError
from .files.console import discard
from .files.reading import half_character, shown

USER_ERROR, FAILED, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141
LONGEST = 2000
"""Characters of an error."""


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{shown(message, LONGEST)} (see {self.prog} --help)")
        raise SystemExit(USER_ERROR)


def _whole(text: str) -> int:
    """An integer that PyTorch can hold."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {text!r}")
    return value


def _number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _text(text: str) -> str:
    """Text that can be written down: half an emoji, or bytes that are no UTF-8, cannot."""
    if half_character(text) >= 0:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {text!r}")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sid_train", description="Few-step distillation by Score identity Distillation.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary)

    def takes_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            dest="overrides",
            help="override one value",
        )

    def takes_config(sub: argparse.ArgumentParser, help_: str, required: bool = True) -> None:
        sub.add_argument("--config", required=required, help=help_)
        takes_overrides(sub)

    sub = command("doctor", "say what is installed, what this machine has, and what would stop a run; for bug reports")
    sub.add_argument("--out", type=Path, default=Path(), help="where a run would write (default: the current folder)")
    sub.add_argument("--seconds", type=_number, default=8, help="for trying the packages (default: 8)")
    sub.add_argument("--json", action="store_true", dest="as_json")

    sub = command("demo", "distil the embedded teacher, measure it and write a report, in minutes on a CPU")
    sub.add_argument("--out", type=Path, help="folder (default: one under sid-demo/ named by the other options)")
    sub.add_argument("--steps", type=_whole, default=4, help="network calls of the generator, 1 to 8 (default: 4)")
    sub.add_argument(
        "--guidance", help="none, lsg=1.2, zero-cfg, anti-cfg=-1 or custom=A,B,C (default: the configuration's)"
    )
    sub.add_argument("--seed", type=_whole, default=0, help="of the distillation (default: 0)")
    sub.add_argument("--minutes", type=_number, help="train as long as fits into this many minutes in all")
    sub.add_argument("--full", action="store_true", help="compute the teacher's and the real rows anew (10 minutes)")
    takes_overrides(sub)

    sub = command("distill", "distil a teacher as a configuration says; the same command continues an interrupted run")
    which = f"a TOML file, or a configuration that ships: {', '.join(configs.shipped())}"
    takes_config(sub, which)
    sub.add_argument("--out", type=Path, required=True, help="the run's folder")
    sub.add_argument("--dry-run", action="store_true", help="read and check everything; train and write nothing")
    sub.add_argument("--force", action="store_true", help="start although plan says that GPU memory does not suffice")

    sub = command("plan", "say what a run needs: memory of each GPU, network calls, FLOPs, disk, time; no GPU needed")
    takes_config(sub, which, required=False)
    sub.add_argument("--gpus", type=_whole, help="how many (default: those of this machine)")
    sub.add_argument("--gpu-memory", type=_number, help="GiB of each, such as 24 or 80 (default: this machine's)")
    sub.add_argument("--reserve", type=_number, default=2, help="GiB left free for what is not counted (default: 2)")
    speed = sub.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=_number, help="what one GPU sustains, for the time")
    speed.add_argument("--seconds-per-forward", type=_number, help="of one picture, as you measured it, for the time")
    sub.add_argument("--json", action="store_true", dest="as_json")
    sub.add_argument("--table", type=Path, metavar="FILE", help="instead: write the table of what fits where into FILE")

    sub = command("encode", "encode prompts and pairs once, for runs without a text encoder; continues after a stop")
    takes_config(sub, "the configuration of the run that will read them")
    sub.add_argument("--out", type=Path, required=True, help="the cache's folder: data.cache of that run")
    sub.add_argument("--shard-size", type=_whole, default=512, help="prompts or pairs a file (default: 512)")
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: what they are computed in, exact")

    sub = command("sample", "make pictures with a distilled generator")
    sub.add_argument("model", help="a safetensors file that carries a recipe")
    sub.add_argument(
        "--prompt",
        type=_text,
        action="append",
        required=True,
        dest="prompts",
        metavar="PROMPT",
        help="may be given more than once: a row each",
    )
    sub.add_argument("--count", type=_whole, default=8, help="pictures a prompt (default: 8)")
    sub.add_argument("--steps", type=_whole, help="default: the recipe's")
    sub.add_argument("--base", help="the model that a LoRA belongs on, or whose text encoders and VAE to use")
    sub.add_argument("--resolution", type=_whole, default=0, help="of the pictures (default: what it was trained at)")
    sub.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    sub.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the UNet (default: fp32)")
    sub.add_argument("--seed", type=_whole, default=0)
    sub.add_argument("--out", type=Path, default=Path("sample.png"), help="default: sample.png")

    sub = command("inspect", "show the recipe inside a checkpoint")
    sub.add_argument("file", type=Path)
    sub.add_argument("--json", action="store_true", dest="as_json")

    sub = command("evaluate", "measure generators, teachers or pictures; continues after a stop")
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file with a recipe, a run's folder, a model that is not distilled (with --steps and --cfg), or a "
        "folder of pictures; several are compared",
    )
    sub.add_argument("--captions", help="a file of prompts, a picture each; without it: the demo's own figures")
    sub.add_argument("--protocol", help="coco-30k or coco-5k: how many captions, and which figures")
    sub.add_argument("--count", type=_whole, help="pictures (default: the protocol's, else one a caption)")
    sub.add_argument("--reference", type=Path, help="a folder of real pictures, for fid, precision and recall")
    sub.add_argument("--teacher-pictures", type=Path, help="a folder of the teacher's pictures, for fid-t")
    sub.add_argument(
        "--metric",
        action="append",
        default=[],
        dest="metrics",
        metavar="NAME",
        help="fid, fid-t, precision, recall, clip, hpsv2, image-reward or aesthetic; may be given more than once "
        "(default: the protocol's, else clip)",
    )
    sub.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="of a metric's network: inception, clip, hpsv2, image-reward, aesthetic or aesthetic-clip",
    )
    sub.add_argument("--steps", type=_whole, help="network calls in time (default: the recipe's)")
    sub.add_argument(
        "--cfg", type=_number, help="guidance at sampling time (default: the recipe's, which is 1 for SiD)"
    )
    sub.add_argument("--base", help="the model that a LoRA belongs on, or whose text encoders and VAE to use")
    sub.add_argument("--resolution", type=_whole, default=0, help="of the pictures (default: what it was trained at)")
    sub.add_argument("--iteration", type=_whole, default=0, help="of a run's snapshot (default: its last checkpoint)")
    sub.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    sub.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the UNet (default: fp32)")
    sub.add_argument("--seed", type=_whole, default=0, help="of the first picture's noise (default: 0)")
    sub.add_argument("--resamples", type=_whole, default=20, help="for the intervals of fid and fid-t (default: 20)")
    sub.add_argument("--out", type=Path, default=Path("sid-evaluation"), help="default: sid-evaluation")
    sub.add_argument("--json", action="store_true", dest="as_json")

    sub = command("study", "distil the demo's teacher under many settings, cell by cell; continues after a stop")
    sub.add_argument("--out", type=Path, default=Path("sid-study"), help="the runs' folder (default: sid-study)")
    sub.add_argument("--results", type=Path, help="the file of figures (default: study.json in the runs' folder)")
    sub.add_argument("--only", action="append", default=[], metavar="NAME", help="a cell; may be given more than once")
    sub.add_argument("--seed", type=_whole, action="append", default=[], dest="seeds", help="default: 0, 1 and 2")
    sub.add_argument("--quick", action="store_true", help="a few cells at a tenth of their length, in minutes")
    sub.add_argument("--workers", type=_whole, help="cells at once, of one thread each (default: one a core)")
    sub.add_argument("--page", type=Path, help="instead: write the page and its plots from the file of figures")

    sub = command("export", "write the generator of a run, or of an exported file, in another form, with its recipe")
    sub.add_argument("source", type=Path, help="the run's folder, or a generator's file with a recipe")
    sub.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file, or a folder for diffusers")
    sub.add_argument(
        "--format",
        choices=["checkpoint", "unet", "lora", "diffusers"],
        default="",
        dest="format_",
        help="checkpoint: all in one file; unet: ComfyUI's diffusion model; lora: kohya's names; diffusers: a folder "
        "(default: lora for a run with adapters, else checkpoint)",
    )
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32", "fp8"], default="fp16", help="default: fp16")
    sub.add_argument("--vae", type=Path, help="a VAE to put in instead of the teacher's")
    sub.add_argument("--base", help="the model under a LoRA, with the missing parts, or to extract a LoRA against")
    sub.add_argument("--rank", type=_whole, default=0, help="of the LoRA that is extracted from a whole UNet")
    sub.add_argument("--energy", type=_number, default=0, help="instead of --rank: the share to keep, such as 0.95")
    sub.add_argument("--iteration", type=_whole, default=0, help="of a run's snapshot (default: its last checkpoint)")

    sub = command("convert", "make a file with a recipe of a UNet without one; reads the SiD authors' pickles")
    sub.add_argument("file", type=Path, help="safetensors, or pickled (.pkl, .pth, .bin, .ckpt), which is never run")
    sub.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file")
    sub.add_argument("--recipe", help="a preset, 'DMD2 (4 steps)' for instance (default: what the file's name says)")
    sub.add_argument("--steps", type=_whole, help="of SiD's timesteps, 1 to 8 (default: what the file's name says)")
    sub.add_argument("--t-init", type=_whole, help="the first of SiD's timesteps (default: the name's, else 625)")
    sub.add_argument(
        "--format",
        choices=["unet", "checkpoint"],
        default="unet",
        dest="format_",
        help="unet: ComfyUI's diffusion model (default); checkpoint: all in one file, with --base",
    )
    sub.add_argument("--base", help="for --format checkpoint: the model with text encoders and VAE")
    sub.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="default: fp16")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. 0 is success, 1 a failed run, 2 a user's mistake, 130 an interrupted and saved run, 141 output
    that nobody reads.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a console or a pipe cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has gone or a full disk can still be told
    except BrokenPipeError:
        discard(sys.stdout)
        return CLOSED_PIPE
    except OSError as error:
        _complain(f"standard output cannot be written: {shown(error)}")
        discard(sys.stdout)
        return FAILED


def _run(argv: list[str] | None) -> int:
    values = vars(build_parser().parse_args(argv))
    name = values.pop("command")
    try:
        run = getattr(importlib.import_module(f".commands.{name}", __package__), name)
        return run(**values) or 0
    except BrokenPipeError:
        raise
    except OSError as error:
        _complain(error, "" if error.filename is not None else f"; {name} was given {_paths(values)}")
        return USER_ERROR
    except ValueError as error:
        _complain(error)
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").startswith(__package__):  # a bug
            raise
        _complain(error, ". python -m sid_train doctor says what is missing")
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Interrupted as error:
        print(f"{shown(error, LONGEST)}. The same command continues it.", file=sys.stderr)
        return INTERRUPTED
    except NonFiniteError as error:
        _complain(error)
        return FAILED


def _complain(message: object, hint: str = "") -> None:
    print(f"error: {shown(message, LONGEST)}{hint}", file=sys.stderr)


def _paths(values: dict[str, object]) -> str:
    """The files that a command was given: an error of a full disk names none."""
    given = {key: value for key, value in values.items() if isinstance(value, Path) or key in ("model", "config")}
    return shown(", ".join(f"{key} {value}" for key, value in given.items() if value), LONGEST) or "no file"
