"""Writes the configuration of a distillation; it starts nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..sid_train.config import RECIPES, config_from_dict, read_toml
from ..sid_train.core.sampling import MAX_STEPS
from ..sid_train.files import write_text
from .common import StrategyType, check_choice, schema, show

# What the trainer ships for SDXL: the settings that this node does not ask for. A second stage, with pairs, also needs
# the generator of the first.
BASES = sorted(path.stem for path in RECIPES.glob("sdxl-*.toml") if not path.stem.endswith("-pairs"))
DEFAULT_BASE = "sdxl-4step-lora-24gb"  # the one that fits a user's card
# The formats of prompts that the trainer reads.
PROMPT_FILES = (".txt", ".jsonl", ".csv", ".parquet")
# The weight of the GAN term against the SiD term where there are real pairs: SiDA's (arXiv 2410.14919).
GAN_WEIGHT = 0.01


class SiDTrainingRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDTrainingRecipe",
            display_name="SiD Training Recipe",
            description="Writes the configuration with which 'python -m sid_train distill' makes a few-step generator, "
            "checks it, and shows the command. It starts nothing by itself.",
            search_aliases=["distill", "train few-step model", "sid_train", "score identity distillation"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "teacher",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="The SDXL checkpoint to distil, in models/checkpoints.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What it is trained on: one prompt a line, or the path of a .txt, .jsonl, .csv or .parquet "
                    "file with thousands, or of a folder of captions.",
                ),
                io.Combo.Input(
                    "base",
                    options=BASES,
                    default=DEFAULT_BASE,
                    tooltip="The shipped recipe that everything else comes from: sizes, learning rates, memory.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=MAX_STEPS, tooltip="Network calls of the generator: 1, 2, 4 ... 8."
                ),
                StrategyType.Input(
                    "strategy",
                    optional=True,
                    tooltip="From SiD Distillation Guidance; without one: what 'base' says.",
                ),
                io.String.Input(
                    "pairs",
                    default="",
                    tooltip="Empty: data-free, from the prompts alone. Else the folder of real image-text pairs for "
                    "the Diffusion-GAN loss.",
                ),
                io.String.Input(
                    "name", default="my-sid", tooltip="Name of the run: letters, digits, '-', '_' and '.'."
                ),
            ],
            outputs=[io.String.Output(display_name="command", tooltip="Run it in a terminal, in the pack's folder.")],
        )

    @classmethod
    def execute(
        cls, teacher: str, prompts: str, base: str, steps: int, pairs: str, name: str, strategy: str | None = None
    ) -> io.NodeOutput:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"name: expected letters, digits, '-', '_' and '.', got {name!r}")
        folder = Path(folder_paths.get_output_directory()) / "sid_train"
        values = read_toml(RECIPES / f"{check_choice('base', base, BASES)}.toml")

        def change(section: str, **settings) -> None:
            values.setdefault(section, {}).update(settings)

        change("model", teacher=folder_paths.get_full_path_or_raise("checkpoints", teacher))
        change("data", prompts=_prompt_source(prompts, folder / f"{name}.prompts.txt"))
        change("method", steps=steps)
        if strategy:
            change("method", guidance=strategy)
        if pairs.strip():
            change("data", pairs=_existing("pairs", pairs.strip(), "a folder of image-text pairs, or nothing"))
            change("gan", generator_weight=GAN_WEIGHT)
        config = config_from_dict(values, "SiD Training Recipe")
        path = folder / f"{name}.toml"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, config.to_toml())
        command = f"python -m sid_train distill --config {shlex.quote(str(path))} --out {shlex.quote(f'runs/{name}')}"
        text = f'{command}\n\n(in {Path(__file__).parents[1]}, after pip install -e ".[sdxl]" there)'
        show(cls, text)
        return io.NodeOutput(command, ui=ui.PreviewText(text))


def _prompt_source(prompts: str, path: Path) -> str:
    """The file or folder that was named, or ``path`` with the prompts that were typed."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not lines:
        raise ValueError("prompts: expected prompts, one a line, or the path of a file of them; got nothing")
    if len(lines) == 1 and (lines[0].lower().endswith(PROMPT_FILES) or Path(lines[0]).is_dir()):
        return _existing("prompts", lines[0], "a file or folder of prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return str(path)


def _existing(name: str, path: str, expected: str) -> str:
    """The absolute path, since the command runs in another folder than ComfyUI; ValueError if nothing is there."""
    if not Path(path).exists():
        raise ValueError(f"{name}: expected {expected}; there is nothing at {path!r}")
    return str(Path(path).resolve())
