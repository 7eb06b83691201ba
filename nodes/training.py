"""Writes the configuration of a distillation; it starts nothing."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
from comfy_api.latest import io, ui

from ..sid_train import configs
from ..sid_train.core.timesteps import MAX_SID_STEPS
from ..sid_train.files.atomic import write_text
from ..sid_train.files.reading import read_text, reading, shown
from ..sid_train.files.tensors import open_tensors
from ..sid_train.models.stable_diffusion.keys import UNET, unet_config
from ..sid_train.models.stable_diffusion.kinds import kind_of_unet
from ..sid_train.models.stable_diffusion.statements import of_settings, of_tensors
from .checks import checked
from .common import StrategyType, full_path, printable, read_header, refuse_other_hosts, schema, show

# What the trainer ships: the settings that this node does not ask for. A second stage, with pairs, also needs the
# generator of the first.
BASES = [name for name in configs.shipped("sd*-*") if not name.endswith("-pairs")]
DEFAULT_BASE = "sdxl-4step-lora-24gb"  # the one that fits a user's card
# The formats of prompts that the trainer reads.
PROMPT_FILES = (".txt", ".jsonl", ".csv", ".parquet")
# The weight of the GAN term where there are real pairs, the SiD term's being 1: SiD-DiT's 1 : 100 (arXiv 2509.25127).
GAN_WEIGHT = 0.01
MAX_NAME, MAX_PATH = 64, 4096  # characters
# How prompts of several words may begin, too: "mood:/ a cat" and "// a cat".
_LIKE_A_HOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]|[/\\]{2,}\s")
# What Windows takes for a device, whatever the suffix.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{device}{number}" for device in ("COM", "LPT") for number in range(10))}


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
                    tooltip="The checkpoint to distil (SDXL, SD 1.x, 2.x): a safetensors file in models/checkpoints.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What it is trained on: one prompt a line, or the path of a .txt, .jsonl, .csv or .parquet "
                    "file with thousands, or of a folder of captions, or hf:owner/name for a data set on the hub.",
                ),
                io.Combo.Input(
                    "base",
                    options=BASES,
                    default=DEFAULT_BASE,
                    tooltip="The shipped configuration that everything else comes from: sizes, learning rates, memory.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=MAX_SID_STEPS,
                    tooltip="Network calls of the generator: 1, 2, 4 ... 8.",
                ),
                StrategyType.Input(
                    "strategy",
                    optional=True,
                    tooltip="From SiD Distillation Guidance; without one: what 'base' says.",
                ),
                io.String.Input(
                    "pairs",
                    default="",
                    tooltip="Empty: data-free, from the prompts alone. Else real image-text pairs for the "
                    "Diffusion-GAN loss: a folder, shards such as path/{0000..0099}.tar, or a .parquet file.",
                ),
                io.String.Input(
                    "name", default="my-sid", tooltip="Name of the run: letters, digits, '-', '_' and '.'."
                ),
            ],
            outputs=[io.String.Output(display_name="command", tooltip="Run it in a terminal, in the pack's folder.")],
        )

    @classmethod
    @checked
    def execute(
        cls, teacher: str, prompts: str, base: str, steps: int, pairs: str, name: str, strategy: str | None = None
    ) -> io.NodeOutput:
        from ..sid_train.config import config_from_dict, read_toml  # ComfyUI need not wait for it when it starts

        check_name(name)
        folder = Path(folder_paths.get_output_directory()) / "sid_train"
        values = read_toml(configs.path_of(base))

        def change(section: str, **settings) -> None:
            values.setdefault(section, {}).update(settings)

        change("model", teacher=_teacher_file(teacher))
        change("data", prompts=_prompt_source(prompts, folder / f"{name}.prompts.txt"))
        change("method", steps=steps)
        if strategy:
            change("method", guidance=strategy)
        if pairs.strip():
            change("data", pairs=_pair_source(pairs.strip()))
            change("gan", generator_weight=GAN_WEIGHT)
        config = config_from_dict(values, "SiD Training Recipe")
        path = _keep(folder / f"{name}.toml", config.to_toml())
        command = f"python -m sid_train distill --config {quoted(str(path))} --out runs/{path.stem}"
        text = f'{command}\n\n(in {Path(__file__).parents[1]}, after pip install -e ".[sdxl]" there)'
        if path.stem != name:
            text += (
                f"\n\nThere is another {name!r} in {folder}, which a run may be using. It is left as it is, and this "
                f"one is called {path.stem!r}."
            )
        show(cls, text)
        return io.NodeOutput(command, ui=ui.PreviewText(printable(text)))


def check_name(name: str) -> None:
    """ValueError for what is no file's name on every system."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name: expected letters, digits, '-', '_' and '.', got {shown(name, 100)!r}")
    if len(name) > MAX_NAME or name.endswith("."):
        raise ValueError(
            f"name: expected at most {MAX_NAME} characters and no '.' at the end, got {shown(name, 100)!r} "
            f"({len(name):,} characters)"
        )
    if name.partition(".")[0].upper() in RESERVED:
        raise ValueError(f"name: expected a name that Windows does not keep for a device, got {name!r}")


def _keep(path: Path, text: str) -> Path:
    """The file with ``text``: ``path``, or where that holds something else, which a run may be using, one beside it
    whose name has a digest of ``text``. The same text is the same file.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    suffixes = ".toml" if path.suffix == ".toml" else ".prompts.txt"
    stem = path.name.removesuffix(suffixes)
    for length in (0, 8, 64):
        candidate = path.with_name(f"{stem}-{digest[:length]}{suffixes}") if length else path
        try:
            if read_text(candidate).replace("\r\n", "\n") == text:  # as Windows writes it
                return candidate
        except FileNotFoundError:
            write_text(candidate, text)
            return candidate
        except ValueError:
            pass  # no text at all: something else
    raise ValueError(f"name: {shown(path)} and what is kept beside it were changed by hand: choose another name")


def _teacher_file(name: str) -> str:
    """The path of a checkpoint that the trainer can distil, by its header; ValueError for any other file."""
    path = full_path("checkpoints", name)
    metadata = read_header(path, f"teacher: {path}").metadata  # refuses a file that was cut off, too
    with reading(path, "a checkpoint of SDXL, SD 1.x or 2.x"):
        shapes = {key: tensor.shape for key, tensor in open_tensors(Path(path)).items()}
    unet = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    try:
        of_tensors(shapes, path)
        of_settings(metadata, "its header", path)
    except ValueError as error:
        raise ValueError(f"teacher: {shown(error, 600)}. Choose another one.") from None
    try:
        unet_config(unet or shapes)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"teacher: {path}: {shown(error, 600)}. Choose a whole checkpoint.") from None
    kind = kind_of_unet(unet or shapes)
    for encoder in kind.encoders:  # without them no prompt can be encoded
        if not any(key.startswith(encoder.prefixes) for key in shapes):
            raise ValueError(
                f"teacher: {path}: expected the text encoders of {kind.architecture.people} beside the UNet, got no "
                f"tensor named {encoder.prefixes[0]}*. Choose a whole checkpoint."
            )
    return path


def _prompt_source(prompts: str, path: Path) -> str:
    """The data set, file or folder that was named, or ``path`` with the prompts that were typed."""
    # Not splitlines, which would split a prompt at a separator such as U+2028.
    lines = [line.strip() for line in prompts.replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise ValueError("prompts: expected prompts, one a line, or the path of a file of them; got nothing")
    if len(lines) == 1 and lines[0].startswith("hf:"):
        if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", lines[0]):
            raise ValueError(
                f"prompts: expected hf:owner/name, a data set on the Hugging Face hub, got {shown(lines[0], 200)!r}"
            )
        return lines[0]
    if len(lines) == 1 and _is_meant_as_path(lines[0]):
        return _prompt_path(lines[0])
    return str(_keep(path, "\n".join(lines) + "\n"))


def _is_meant_as_path(line: str) -> bool:
    """Whether it cannot be a prompt, be there something at it or not. ValueError for a path on another host."""
    if len(line) > MAX_PATH:
        return False
    is_file = line.lower().endswith(PROMPT_FILES)
    if _LIKE_A_HOST.match(line) and len(line.split()) > 1 and not is_file:
        return False  # nothing looks at it
    refuse_other_hosts("prompts", line)
    return (
        os.path.isdir(line)  # not Path.is_dir, which raises where a prompt is too long for a file's name
        or is_file
        or PurePosixPath(line).is_absolute()
        or PureWindowsPath(line).is_absolute()
        or (len(line.split()) == 1 and ("/" in line or "\\" in line))
    )


def _prompt_path(line: str) -> str:
    """The absolute path, since the command runs in another folder than ComfyUI; ValueError if no prompts are there."""
    if not (os.path.isdir(line) or (os.path.isfile(line) and line.lower().endswith(PROMPT_FILES))):
        found = "this is another file" if os.path.isfile(line) else "there is nothing"
        raise ValueError(
            f"prompts: expected prompts, a {', '.join(PROMPT_FILES)} file or a folder of captions; {found} at "
            f"{shown(line, 200)!r}. Correct the path; if it is a prompt, put it into a .txt file."
        )
    return os.path.abspath(line)  # a link keeps its name: what it points to may have no suffix


def _pair_source(source: str) -> str:
    """The absolute path, shards in braces included; ValueError if one of them is missing."""
    from ..sid_train.data.pictures import expand_braces  # slow to import, and only pairs need it

    if len(source) > MAX_PATH:
        raise ValueError(f"pairs: expected a path of at most {MAX_PATH:,} characters, got {len(source):,}")
    refuse_other_hosts("pairs", source)
    for path in expand_braces(source):  # at most 100,000
        if not os.path.exists(path):
            raise ValueError(
                f"pairs: expected a folder of image-text pairs, .tar shards or a .parquet file, or nothing; there is "
                f"nothing at {shown(path, 200)!r}. Correct the path."
            )
    return os.path.abspath(source)


def quoted(path: str, windows: bool = os.name == "nt") -> str:
    """As one word of a command: Windows' cmd knows no single quotes, and its paths hold no double ones."""
    return f'"{path}"' if windows else shlex.quote(path)
