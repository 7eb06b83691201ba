"""Nodes that show and change a recipe."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui

from ..sid_train.core.recipe import PRESETS, SAMPLING_GUIDANCES, RecipeError, SiDRecipe
from ..sid_train.core.sampling import NOISE_MODES
from ..sid_train.core.timesteps import timestep_ladder
from ..sid_train.files.reading import shown
from .checks import checked
from .common import RecipeType, printable, schema, show
from .models import fit_preset

KEEP = "keep"
STARTS = {"yes": True, "no": False}


class SiDRecipeInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDRecipeInfo",
            display_name="SiD Recipe Info",
            description="Shows what a recipe says: timesteps, noise levels, guidance and how the model was trained.",
            search_aliases=["show recipe", "sid metadata", "timesteps"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[RecipeType.Input("recipe", tooltip="From a SiD loader or SiD Recipe Override.")],
            outputs=[io.String.Output(display_name="text", tooltip="The recipe, a line a fact.")],
        )

    @classmethod
    @checked
    def execute(cls, recipe: SiDRecipe) -> io.NodeOutput:
        text = printable(recipe.describe())
        show(cls, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class SiDRecipeOverride(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDRecipeOverride",
            display_name="SiD Recipe Override",
            description="Changes how a generator is sampled, for those who experiment; or makes a recipe from a preset "
            "for a model that came through another loader.",
            search_aliases=["edit recipe", "custom timesteps", "recipe preset"],
            inputs=[
                RecipeType.Input("recipe", optional=True, tooltip="The recipe to change; not needed with a preset."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="With a preset: the model that is sampled, whose prediction type the recipe takes. Without "
                    "it the preset is for eps-prediction.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[KEEP, *PRESETS],
                    default=KEEP,
                    tooltip=f"'{KEEP}' starts from the connected recipe, a preset replaces it.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    tooltip="1 to 16 falling integers between 999 and 0, such as '625 468 312 156'. Empty: as they "
                    "are.",
                ),
                io.Combo.Input(
                    "noise_mode",
                    options=[KEEP, *NOISE_MODES],
                    default=KEEP,
                    tooltip="fresh: new noise a step; fixed: the first noise again; ddim: what the last step implies; "
                    "ancestral and tcd: a blend of implied and new noise (Turbo, TCD).",
                ),
                io.Combo.Input(
                    "guidance",
                    options=[KEEP, *SAMPLING_GUIDANCES],
                    default=KEEP,
                    tooltip="What guidance 'auto' means for this recipe.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Scale of that guidance; read only where 'guidance' is changed.",
                ),
                io.Combo.Input(  # workflows made before there was this input do not have it
                    "unit_variance_start",
                    options=[KEEP, *STARTS],
                    default=KEEP,
                    optional=True,
                    tooltip="What the first step is given. yes: noise of unit variance (DMD2, LCM, TCD, Hyper-SD); no: "
                    "noise of the first timestep's level (SiD, Lightning, Turbo). The lower that timestep, the more "
                    "they differ.",
                ),
            ],
            outputs=[RecipeType.Output(display_name="recipe", tooltip="The changed recipe.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        preset: str,
        timesteps: str,
        noise_mode: str,
        guidance: str,
        cfg: float,
        unit_variance_start: str = KEEP,
        recipe: SiDRecipe | None = None,
        model=None,
    ) -> io.NodeOutput:
        if preset != KEEP:
            recipe = PRESETS[preset] if model is None else fit_preset(model, PRESETS[preset], "model")
        if recipe is None:
            raise ValueError("recipe: expected a connected recipe or a preset, got neither.")
        changes: dict = {}
        if timesteps.strip():
            chosen = _integers(timesteps)
            changes |= {"timesteps": chosen, "t_init": chosen[0], "ladder": _ladder(chosen), "trained_steps": ()}
        if noise_mode != KEEP:
            changes["noise_mode"] = noise_mode
        if guidance != KEEP:
            changes |= {"sampling_guidance": guidance, "sampling_cfg": cfg}
        if unit_variance_start != KEEP:
            changes["unit_variance_start"] = STARTS[unit_variance_start]
        return io.NodeOutput(replace(recipe, **changes))


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise RecipeError(f"timesteps: expected integers such as '625 468 312 156', got {shown(text, 100)!r}") from None


def _ladder(timesteps: tuple[int, ...]) -> str:
    """``sid`` if ``timesteps`` are the SiD ladder of their first, else ``explicit``."""
    try:
        return "sid" if list(timesteps) == timestep_ladder(len(timesteps), timesteps[0]) else "explicit"
    except ValueError:
        return "explicit"
