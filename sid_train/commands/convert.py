"""``convert``: makes of a file that does not say how it is sampled one that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.architectures import STABLE_DIFFUSION
from ..core.noise_schedule import X0
from ..core.published import GUESSED_T_INIT, preset_of_file, recipe_of_name, require_no_guidance_embedding
from ..core.recipe import PRESETS, SiDRecipe
from ..core.timesteps import DEFAULT_T_INIT, LADDERS, timestep_ladder
from ..files.header import read_header, read_safetensors_metadata
from ..files.pickles import is_pickle
from ..files.reading import shown
from ..models.family import refuse_to_overwrite
from ..models.stable_diffusion.export import convert_unet, open_network


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
    if out.suffix != ".safetensors":
        raise ValueError(f"{shown(out)}: expected a name that ends in .safetensors")
    if format_ == "checkpoint" and base is None:
        raise ValueError("--base: expected the model with text encoders and VAE for --format checkpoint")
    if format_ != "checkpoint" and base is not None:
        raise ValueError(f"--base: the format {format_} has no text encoders and no VAE: give --format checkpoint")
    refuse_to_overwrite(out, [file])
    chosen, notes = choose_recipe(file, recipe, steps, t_init)
    if not is_pickle(file):
        require_no_guidance_embedding(read_header(file).tensors, file)
    parts = open_network(file)
    architecture = STABLE_DIFFUSION[parts.architecture]
    notes.append(f"a UNet of {architecture.people}, by its tensors")
    chosen = replace(
        chosen,
        prediction_type=X0 if chosen.prediction_type == X0 else parts.prediction_type,
        zero_terminal_snr=parts.zero_terminal_snr,
        title=shown(file.stem),
    ).for_architecture(architecture)
    print("\n".join([f"{shown(file)}: {len(parts.tensors):,} tensors", *notes, "", chosen.describe()]), flush=True)
    convert_unet(parts, out, chosen, dtype, base)
    print(f"\n{shown(out)}")


def choose_recipe(
    file: Path, preset: str | None, steps: int | None = None, t_init: int | None = None
) -> tuple[SiDRecipe, list[str]]:
    """How a file is to be sampled, and whence each fact is known: what is given, else what the file says."""
    notes: list[str] = []
    stem = shown(file.stem)
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--recipe: expected one of {', '.join(PRESETS)}, got {shown(preset)!r}")
        chosen = PRESETS[preset]
    elif (named := recipe_of_name(stem)) is not None:
        chosen, notes = named
    elif (published := preset_of_file(file, {} if is_pickle(file) else read_safetensors_metadata(file))) is not None:
        chosen, notes = PRESETS[published[0]], [f"recipe: {published[0]}, for {published[1]}"]
    elif steps is None:
        raise ValueError(
            f"{shown(file)}: its name does not say how it is sampled: give --steps (and --t-init), or --recipe with "
            f"one of {', '.join(PRESETS)}"
        )
    else:
        chosen, notes = SiDRecipe(), [f"t_init: {DEFAULT_T_INIT}, {GUESSED_T_INIT}"]
    if steps is None and t_init is None:
        return chosen, notes
    if chosen.ladder in LADDERS and t_init is None:
        return replace(chosen, timesteps=tuple(chosen.timesteps_for(steps))), notes
    if chosen.ladder != "sid":
        raise ValueError("--steps, --t-init: this recipe's timesteps have no rule for others")
    first = chosen.t_init if t_init is None else t_init
    timesteps = tuple(timestep_ladder(chosen.steps if steps is None else steps, first))
    given = {"steps:": steps, "t_init:": t_init}
    kept = [note for note in notes if given.get(note.partition(" ")[0]) is None]
    return replace(chosen, t_init=first, timesteps=timesteps), kept
