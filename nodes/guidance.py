"""Guidance: how a prompt and a negative prompt steer sampling, and under which strategy a model is distilled."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..sid_train.core.recipe import SAMPLING_GUIDANCES, SiDRecipe
from ..sid_train.method.guidance import DEFAULT_ANTI_CFG_SCALE, DEFAULT_LSG_SCALE, GuidanceStrategy
from .checks import check_prompt, checked
from .common import RecipeType, StrategyType, schema, warn
from .models import check_network
from .nag import NAG_ALPHA, NAG_SCALE, NAG_TAU, patch_nag
from .start import remember_start

AUTO = "auto"
MODES = (AUTO, *SAMPLING_GUIDANCES)
MODE_TOOLTIP = (
    "auto: what the recipe says (none without one).\n"
    "none: the prompt alone, one network call a step: right for every SiD generator.\n"
    "cfg: classifier-free guidance with the negative prompt, two calls a step.\n"
    "cfg first step only: the same on the first step, then the prompt alone.\n"
    "nag: the negative prompt acts inside cross attention, one call a step."
)
CFG_TOOLTIP = "Scale of 'cfg' and 'cfg first step only'. 1 is no guidance; few-step generators take little more."
NAG_TOOLTIP = "Strength of 'nag': how far to move away from the negative prompt. 0 is none."


class FirstStepCFGGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance at the first of the sampler's sigmas, the positive prompt alone after it."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        model_options = model_options or {}
        first = model_options["transformer_options"]["sample_sigmas"][0]
        is_first = bool((timestep.flatten()[0] - first).abs() <= first * 1e-6)
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds.get("negative") if is_first else None,
            self.conds.get("positive"),
            self.cfg if is_first else 1.0,
            model_options=model_options,
            seed=seed,
        )


def make_guider(
    model,
    positive,
    negative,
    recipe: SiDRecipe | None,
    mode: str,
    cfg: float,
    nag_scale: float,
    nag_tau: float = NAG_TAU,
    nag_alpha: float = NAG_ALPHA,
) -> tuple[comfy.samplers.CFGGuider, list[str]]:
    """A GUIDER and what the user should be told.

    ValueError for a model that is not of SD 1.x, 2.x or SDXL, for prompts of another generation than its own, and where
    ``mode`` needs a negative prompt that is missing.
    """
    architecture, _ = check_network(model.model, model.get_model_object("model_sampling"), "model")
    check_prompt("positive", positive, architecture)
    if mode == AUTO:
        mode, cfg = (recipe.sampling_guidance, recipe.sampling_cfg) if recipe else ("none", 1.0)
    if mode != "none" and negative is None:
        raise ValueError(
            f"guidance '{mode}': expected a negative prompt, but 'negative' is not connected. Connect one (its text "
            "may be empty), or set guidance to 'none'."
        )
    if mode != "none":
        check_prompt("negative", negative, architecture)
    if mode == "none":
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        ignored = "The negative prompt is ignored: guidance is 'none'. Set it to 'nag' or 'cfg' to use one."
        return guider, [] if negative is None else [ignored]
    if mode == "nag":
        guider = comfy.samplers.CFGGuider(patch_nag(model, negative, nag_scale, nag_tau, nag_alpha))
        guider.inner_set_conds({"positive": positive})
        return guider, []
    guider = (FirstStepCFGGuider if mode == "cfg first step only" else comfy.samplers.CFGGuider)(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider, []


class SiDGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDGuidance",
            display_name="SiD Guidance",
            description="How prompt and negative prompt steer a few-step generator, for SamplerCustomAdvanced.",
            search_aliases=["negative prompt", "nag", "cfg guider", "normalized attention guidance"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="A few-step generator."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What it must not show; used by every mode except 'none'."
                ),
                RecipeType.Input("recipe", optional=True, tooltip="From the loader; 'auto' does what it says."),
                io.Combo.Input("guidance", options=list(MODES), default=AUTO, tooltip=MODE_TOOLTIP),
                io.Float.Input("cfg", default=1.5, min=0.0, max=100.0, step=0.05, tooltip=CFG_TOOLTIP),
                io.Float.Input("nag_scale", default=NAG_SCALE, min=0.0, max=50.0, step=0.1, tooltip=NAG_TOOLTIP),
                io.Float.Input(
                    "nag_tau",
                    default=NAG_TAU,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="By how much 'nag' may lengthen an attention feature.",
                ),
                io.Float.Input(
                    "nag_alpha",
                    default=NAG_ALPHA,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the guided feature 'nag' blends in; 0 is none.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model,
        positive,
        guidance: str,
        cfg: float,
        nag_scale: float,
        nag_tau: float,
        nag_alpha: float,
        negative=None,
        recipe: SiDRecipe | None = None,
    ) -> io.NodeOutput:
        guider, messages = make_guider(
            remember_start(model), positive, negative, recipe, guidance, cfg, nag_scale, nag_tau, nag_alpha
        )
        warn(cls, messages)
        return io.NodeOutput(guider)


class SiDDistillationGuidance(io.ComfyNode):
    STRATEGIES = ("none", "lsg", "zero-cfg", "anti-cfg", "custom")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDDistillationGuidance",
            display_name="SiD Distillation Guidance",
            description="The guidance strategy that a model is distilled under, for SiD Distill and SiD Training "
            "Recipe. It never changes how the result is sampled.",
            search_aliases=["lsg", "zero-cfg", "anti-cfg", "long-short guidance", "distillation strategy"],
            inputs=[
                io.Combo.Input(
                    "strategy",
                    options=list(cls.STRATEGIES),
                    default="none",
                    tooltip="none: the teacher's own distribution; most diverse, weakest alignment.\n"
                    "lsg: guidance on teacher and fake score; better alignment, less diversity.\n"
                    "zero-cfg: no text in the fake score; fewest network calls, for use with real pairs.\n"
                    "anti-cfg: negative guidance in the fake score; strong alignment, costs calls.\n"
                    "custom: the three scales below.",
                ),
                io.Float.Input(
                    "lsg_scale",
                    default=DEFAULT_LSG_SCALE,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Scale of 'lsg': more aligns better and costs diversity; the papers use 1.5 to 4.5.",
                ),
                io.Float.Input(
                    "anti_cfg_scale",
                    default=DEFAULT_ANTI_CFG_SCALE,
                    min=-10.0,
                    max=-0.05,
                    step=0.05,
                    tooltip="Scale of 'anti-cfg' in the fake score, below 0.",
                ),
                io.Float.Input(
                    "fake_train",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="'custom': the fake score's scale while it learns.",
                ),
                io.Float.Input(
                    "fake_eval",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="'custom': the fake score's scale in the generator's loss.",
                ),
                io.Float.Input(
                    "teacher",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="'custom': the teacher's scale in the generator's loss.",
                ),
            ],
            outputs=[StrategyType.Output(display_name="strategy", tooltip="For SiD Distill and SiD Training Recipe.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        strategy: str,
        lsg_scale: float,
        anti_cfg_scale: float,
        fake_train: float,
        fake_eval: float,
        teacher: float,
    ) -> io.NodeOutput:
        arguments = {
            "lsg": f"={lsg_scale:g}",
            "anti-cfg": f"={anti_cfg_scale:g}",
            "custom": f"={fake_train:g},{fake_eval:g},{teacher:g}",
        }
        text = strategy + arguments.get(strategy, "")
        GuidanceStrategy.parse(text)  # raises on what no strategy can be
        return io.NodeOutput(text)
