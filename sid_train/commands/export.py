"""``export``: the generator of a run, or of an exported file, in another form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.recipe import SiDRecipe
from ..files.header import read_safetensors_metadata
from ..files.images import THUMBNAIL_LIMIT, thumbnail
from ..files.reading import shown
from ..models.families import export_generator, open_generator, open_model
from ..models.family import ExportOptions, Generator, refuse_to_overwrite
from ..training.callbacks import Grids
from ..training.run import RunFolder


def export(
    source: Path,
    out: Path,
    format_: str,
    dtype: str,
    vae: Path | None,
    base: str | None,
    rank: int,
    energy: float,
    iteration: int,
) -> None:
    recipe, notes = export_any(source, out, format_, dtype, base, vae, rank, energy, iteration)
    print("\n".join([str(out), *notes, recipe.describe()]))


def export_any(
    source: Path,
    path: Path,
    format_: str = "",
    dtype: str = "fp16",
    base: str | None = None,
    vae: Path | None = None,
    rank: int = 0,
    energy: float = 0,
    iteration: int = 0,
) -> tuple[SiDRecipe, list[str]]:
    """Writes the generator of a run's folder, or of an exported file, to ``path``: its recipe, and notes.

    ``iteration`` is that of a snapshot of the run; 0 is its last checkpoint. ``format_`` is one of its family's; by
    default a LoRA where the generator is one, else all in one file. ``base`` is the model under a LoRA, the one with
    the parts that a file lacks, or the one that a LoRA is extracted against: a run's own teacher if none is given. For
    a run's folder it is else where the teacher is now, if that was moved.
    """
    if source.is_file():
        if iteration:
            raise ValueError("--iteration: only for a run's folder")
        generator = open_generator(str(source), base)
        picture = read_safetensors_metadata(source).get("modelspec.thumbnail", "")
        if picture.startswith("data:image/") and len(picture) <= THUMBNAIL_LIMIT:
            generator = replace(generator, thumbnail=picture)
        under = open_model(base) if base and format_ == "lora" and not generator.adapter else None
        warnings = [f"warning: {another_base(generator)}"] if generator.is_on_another_base() else []
    else:
        folder = RunFolder(source)
        extracts = format_ == "lora" and not folder.read_config().adapter.rank
        try:
            generator = folder.open_generator(iteration, None if extracts else base)
        except ValueError:
            if not (extracts and base):
                raise
            generator = folder.open_generator(iteration, base)  # it was moved, and is what to extract against too
        under = open_model(base) if base else generator.model
        refuse_to_overwrite(path, [*folder.checkpoints(), folder.snapshot(0, sharded=False).parent])
        generator, warnings = _with_thumbnail(generator, folder)
    options = ExportOptions(format_, dtype, vae, rank, energy, under)
    return generator.recipe, warnings + export_generator(generator, path, options)


def _with_thumbnail(generator: Generator, folder: RunFolder) -> tuple[Generator, list[str]]:
    """``generator`` with pictures of it that the run drew, where it drew some, and what the user should know."""
    grid = folder.newest_grid(int(generator.recipe.training_summary["iterations"]))
    if grid is None:
        return generator, []
    try:
        return replace(generator, thumbnail=thumbnail(grid, Grids.COLUMNS)), []
    except OSError as error:
        return generator, [f"warning: the file has no thumbnail, for {shown(grid)} cannot be read: {shown(error)}"]


def another_base(generator: Generator) -> str:
    """For people: the adapter is over another model than it was distilled from."""
    return (
        f"{generator.model.weights} is another file than the model that the LoRA was distilled from "
        f"({generator.recipe.base_model}, SHA-256 {generator.recipe.base_model_hash}): the pictures may be worse"
    )
