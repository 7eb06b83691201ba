"""``convert``: makes of a file that does not say how it is sampled one that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.published import GUESSED_T_INIT, recipe_of_name
from ..core.recipe import PRESETS, SiDRecipe
from ..core.timesteps import DEFAULT_T_INIT, timestep_ladder
from ..files.reading import shown
from ..models.sdxl.export import convert_unet, open_network


def convert(
    file: Path,
    out: Path,
    recipe: str | None,
    steps: int | None,
    t_init: int | None,
    format_: str,
    base: str | None,
    dtype: str,
) -> None:
    chosen, notes = choose_recipe(file, recipe, steps, t_init)
    parts = open_network(file)
    chosen = replace(
        chosen, prediction_type=parts.prediction_type, zero_terminal_snr=parts.zero_terminal_snr, title=file.stem
    )
    print("\n".join([f"{shown(file)}: {len(parts.tensors):,} tensors", *notes, "", chosen.describe()]), flush=True)
    convert_unet(parts, out, chosen, dtype, format_, base)
    print(f"\n{out}")


def choose_recipe(
    file: Path, preset: str | None, steps: int | None = None, t_init: int | None = None
) -> tuple[SiDRecipe, list[str]]:
    """How a file is to be sampled, and whence each fact is known: what is given, else what its name says."""
    notes: list[str] = []
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--recipe: expected one of {', '.join(PRESETS)}, got {shown(preset)!r}")
        chosen = PRESETS[preset]
    elif (named := recipe_of_name(file.stem)) is not None:
        chosen, notes = named
    elif steps is None:
        raise ValueError(
            f"{shown(file)}: its name does not say how it is sampled: give --steps (and --t-init), or --recipe with "
            f"one of {', '.join(PRESETS)}"
        )
    else:
        chosen, notes = SiDRecipe(), [] if t_init else [f"t_init: {DEFAULT_T_INIT}, {GUESSED_T_INIT}"]
    if steps is None and t_init is None:
        return chosen, notes
    if chosen.ladder != "sid":
        raise ValueError(f"--steps, --t-init: only for SiD's timesteps, which {preset} does not have")
    given = {"steps": steps, "t_init": t_init}
    notes = [note for note in notes if not any(given.get(fact) and note.startswith(f"{fact}:") for fact in given)]
    first, count = t_init or chosen.t_init, steps or chosen.steps
    return replace(chosen, t_init=first, timesteps=tuple(timestep_ladder(count, first))), notes
