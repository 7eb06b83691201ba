"""SiD Run: what a distillation on the command line has come to, and its generator for ComfyUI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..sid_train.config import config_from_dict, read_toml
from ..sid_train.evaluation.metric import CLIP_SCORE
from ..sid_train.files.logs import read_log
from ..sid_train.files.reading import shown
from ..sid_train.training.layout import RunLayout
from .checks import checked
from .common import printable, refuse_other_hosts, schema, show
from .distil import free_name, plot
from .training import check_name

LAST_ALARMS = 3
DEMO = "demo"
ENERGY = 0.9999  # of a whole network's difference, in a LoRA that is extracted from it


class SiDRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDRun",
            display_name="SiD Run",
            description="Looks into the folder of a run of 'python -m sid_train distill': how far it is, its newest "
            "pictures, losses and warnings. It can put the run's generator into ComfyUI's model folders.",
            search_aliases=["watch training", "sid run", "distillation progress", "export generator"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input("folder", default="", tooltip="The run's folder, as '--out' of distill had it."),
                io.Boolean.Input(
                    "export",
                    default=False,
                    tooltip="Write the generator: a LoRA into models/loras, a whole network into "
                    "models/diffusion_models. It is the snapshot with the highest CLIP score, where some were scored, "
                    "else the last checkpoint. It needs the trainer's packages in ComfyUI's Python.",
                ),
                io.String.Input("name", default="distilled", tooltip="Of that file; a number is added to it."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What the node shows."),
                io.Image.Output(display_name="grid", tooltip="The newest pictures of the averaged generator."),
                io.Image.Output(display_name="losses", tooltip="The losses by iteration."),
                io.String.Output(display_name="file", tooltip="What was exported, as loaders name it; else empty."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others) -> str:
        """Another where the run went on: a queue then looks again."""
        try:
            refuse_other_hosts("folder", folder)
            run = RunLayout(Path(folder.strip()))
            if not run.config_file.is_file():
                return ""
            places = (run.log, run.alarms, run.scores(CLIP_SCORE), run.grid(0).parent, run.snapshot_folder)
            return str([place.stat().st_mtime_ns for place in places if place.exists()])
        except (TypeError, AttributeError, ValueError, OSError):  # a link, or no folder: the run will say it
            return ""

    @classmethod
    @checked
    def execute(cls, folder: str, export: bool, name: str) -> io.NodeOutput:
        folder = folder.strip()
        refuse_other_hosts("folder", folder)
        check_name(name)
        run = RunLayout(Path(folder))
        if not folder or not run.config_file.is_file():
            raise ValueError(f"folder: expected that of a run, but there is no {run.config_file}")
        entries = read_log(run.log)
        lines = [progress_of(run, entries)]
        if best := run.best_snapshot():
            lines.append(f"The best snapshot by CLIP score is that of iteration {best}.")
        lines += [f"Iteration {a['iteration']:,}: {a.get('alarm')}" for a in read_log(run.alarms)[-LAST_ALARMS:]]
        file = ""
        if export:
            file, notes = _export(run, best, name)
            lines += [f"Written: {file}", *notes]
        text = printable("\n".join(lines))
        show(cls, text)
        losses = [entry["losses"] for entry in entries if entry.get("losses")]
        return io.NodeOutput(text, _grid(run, entries), plot(losses) if losses else _nothing(), file)


def progress_of(run: RunLayout, entries: list[dict]) -> str:
    """How far a run is, for people."""
    total = config_from_dict(read_toml(run.config_file), str(run.config_file)).training
    if not entries:
        return f"Nothing is logged yet, of {total.iterations:,} iterations."
    last = entries[-1]
    done, speed = last["iteration"], float(last.get("images_per_second", 0.0))
    told = f"Iteration {done:,} of {total.iterations:,}"
    if done < total.iterations and speed > 0:
        minutes = (total.iterations - done) * total.batch_size / speed / 60
        told += (
            f", {speed:.1f} images/s: {minutes / 60:.1f} hours left"
            if minutes > 90
            else (f", {speed:.1f} images/s: {minutes:.0f} minutes left")
        )
    losses = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in last.get("losses", {}).items())
    return f"{told}. {losses}"


def _grid(run: RunLayout, entries: list[dict]) -> Tensor:
    path = run.newest_grid(entries[-1]["iteration"]) if entries else None
    if path is None:
        return _nothing()
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255


def _nothing() -> Tensor:
    """IMAGE where there is none: grey."""
    return torch.full((1, 64, 64, 3), 0.5)


def _export(run: RunLayout, iteration: int, name: str) -> tuple[str, list[str]]:
    """The name of the file that was written, and what the user should know."""
    try:
        from ..sid_train.commands.export import export_any
    except ImportError as error:
        raise ValueError(
            f"export: it needs the trainer's packages in ComfyUI's Python ({error}): pip install them as the pack's "
            f"README says, or run: python -m sid_train export {run.path} -o OUT.safetensors"
        ) from None
    config = config_from_dict(read_toml(run.config_file), str(run.config_file))
    teacher = config.model.teacher
    refuse_other_hosts("the run's teacher", teacher)
    if teacher != DEMO and not Path(teacher).exists():
        raise ValueError(
            f"export: the run's teacher, {shown(teacher, 200)}, is no file on this computer. A workflow does not make "
            f"ComfyUI download it: run python -m sid_train export {run.path} -o OUT.safetensors"
        )
    # Of the demo's model ComfyUI has the teacher alone: a whole generator of it becomes a LoRA, too.
    extracted = not config.adapter.rank and teacher == DEMO
    kind = "loras" if config.adapter.rank or extracted else "diffusion_models"
    path = free_name(kind, name)
    format_ = "lora" if kind == "loras" else "unet"
    _, notes = export_any(run.path, path, format_, energy=ENERGY if extracted else 0, iteration=iteration)
    return path.name, notes
