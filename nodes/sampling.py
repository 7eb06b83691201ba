"""Sampling: a recipe's timesteps as SIGMAS, its noise as a SAMPLER, and both with guidance in one node."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sid_train.core.recipe import PRESETS, SiDRecipe
from ..sid_train.core.sampling import NOISE_MODES, few_step_sample, implied_shares, noise_sampler, seeded_noise
from ..sid_train.core.timesteps import MAX_STEPS, last_timesteps
from .checks import checked
from .common import RecipeType, schema, warn
from .guidance import AUTO, CFG_TOOLTIP, MODE_TOOLTIP, MODES, NAG_TOOLTIP, make_guider
from .models import check_model, check_network
from .nag import NAG_SCALE
from .start import find_network, find_start

DEFAULT_PRESET = "SiD 625 (4 steps)"
FROM_RECIPE = "from the recipe"
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # in LATENT: for what size it was made
STARTS = ("auto", "noise", "latent")
STEPS_TOOLTIP = (
    "Network calls. 0: as many as it was trained for; another number takes the timesteps of its family's rule."
)
DENOISE_TOOLTIP = (
    "1: a new picture. Below 1: keeps that much less of the given latent's structure, on the last of the trained "
    "timesteps (4 steps at 0.5: the last 2)."
)
NOISE_TOOLTIP = (
    f"The noise between steps. '{FROM_RECIPE}': as it was trained. fresh: new noise a step; fixed: the first noise "
    "again; ddim: the noise that the last step implies; ancestral and tcd: a blend of implied and new noise (Turbo, "
    "TCD). After DisableNoise, new noise is that of seed 0."
)


def make_sigmas(model, recipe: SiDRecipe | None, steps: int, denoise: float) -> tuple[Tensor, list[str]]:
    """The noise levels of a pass, ending in 0 (fp32, [n + 1]), and what the user should be told.

    ``steps`` 0 is the trained number. ValueError for a model that does not fit the recipe and for denoise below 1 at
    one step.
    """
    messages = []
    if recipe is None:
        recipe = PRESETS[DEFAULT_PRESET]
        messages.append(f"No recipe is connected: sampling as '{DEFAULT_PRESET}'.")
        check_network(model.model, model.get_model_object("model_sampling"), "model")
    else:
        check_model(model, recipe, "model")
    timesteps = recipe.timesteps_for(steps or None)
    if not recipe.is_trained_for(len(timesteps)):
        messages.append(
            f"Sampling in {len(timesteps)} steps ({' '.join(map(str, timesteps))}) what was trained for "
            f"{recipe.trained_numbers} ({' '.join(map(str, recipe.timesteps))}): expect a different quality."
        )
    if denoise < 1 and len(timesteps) == 1:
        raise ValueError(
            f"denoise: expected 1 with one step, got {denoise:g}. A one-step generator makes the whole picture in its "
            "only step, so there is no later step to start from: use denoise 1, or more steps."
        )
    sigmas = model.get_model_object("model_sampling").sigmas
    return torch.cat([sigmas[last_timesteps(timesteps, denoise)].float().cpu(), torch.zeros(1)]), messages


def idle_ranges(model, sigmas: Tensor, conditioning) -> list[str]:
    """What the user should be told about prompts and ControlNets of CONDITIONING that are on at none of ``sigmas``.

    Their percentages count timesteps down from 999, and the first of the chain may be 625.
    """
    sampling = model.get_model_object("model_sampling")
    levels = sigmas[:-1].tolist()

    def is_idle(start: float, end: float) -> bool:
        first, last = float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))
        return not any(last <= level <= first for level in levels)

    ranges = set()
    for _, extra in conditioning:
        ranges.add(("prompt", extra.get("start_percent", 0.0), extra.get("end_percent", 1.0)))
        control = extra.get("control")
        while control is not None:
            ranges.add(("ControlNet", *control.timestep_percent_range))
            control = control.previous_controlnet
    places = ", ".join(f"{1 - float(t) / 999:.1%}" for t in sampling.timestep(sigmas[:-1]))
    return [
        f"A {what} that is on from {start:.1%} to {end:.1%} is never used: the steps are at {places}."
        for what, start, end in sorted(ranges)
        if is_idle(start, end)
    ]


def check_sigmas(sigmas: Tensor) -> None:
    """ValueError unless SIGMAS are noise levels that fall to 0."""
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    if len(levels) < 2 or not all(math.isfinite(s) for s in levels) or any(a <= b for a, b in pairwise(levels)):
        got = f"{len(levels)} numbers: {', '.join(f'{s:g}' for s in levels[:8])}" if sigmas.ndim == 1 else sigmas.shape
        raise ValueError(f"sigmas: expected noise levels that fall to 0, got {got}. Connect SiD Scheduler.")
    if levels[-1] != 0:
        raise ValueError(
            f"sigmas: expected to end in 0, got {levels[-1]:g}. The chain predicts the whole picture at every step: do "
            "not split SIGMAS for it; use 'denoise' of SiD Scheduler."
        )


class FewStepSampler(comfy.samplers.KSAMPLER):
    """ComfyUI's KSAMPLER around the few-step chain. The first noise is not rescaled at the highest timestep, as
    KSAMPLER does for samplers that start there: the generator was trained on exactly ``sigma * noise``."""

    def max_denoise(self, model_wrap, sigmas) -> bool:
        return False


def make_sampler(recipe: SiDRecipe | None, noise_mode: str, start: str) -> FewStepSampler:
    """A SAMPLER that runs the chain: ``denoise`` is ComfyUI's own model call, so that masks, ControlNet, LoRA, hooks,
    previews and interrupts work as everywhere.

    start: ``noise`` (x0 = 0, as in training), ``latent`` (x0 = the given latent) or ``auto`` (noise if the sigmas
    begin at the recipe's first timestep and there is any).
    """
    recipe = recipe or PRESETS[DEFAULT_PRESET]
    mode = recipe.noise_mode if noise_mode == FROM_RECIPE else noise_mode

    def sample_sid(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
        extra_args = extra_args or {}
        check_sigmas(sigmas)
        network = find_network(model)
        check_network(network, network.model_sampling, "model")  # of any guider
        noise, latent = find_start(model, network, x, sigmas[0], extra_args)
        draw = seeded_noise(noise, extra_args.get("seed") or 0)
        shares = implied_shares(mode, sigmas, network.model_sampling, recipe.noise_gamma)
        first = network.model_sampling.sigmas[recipe.t_init]
        from_noise = start == "noise"
        if start == "auto":  # without noise (DisableNoise) the latent is all there is
            from_noise = bool(noise.any()) and float(sigmas[0]) >= float(first) * (1 - 1e-5)
        progress = comfy.k_diffusion.sampling.trange(len(sigmas) - 1, disable=disable)

        def report(step: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
            progress.update()
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": x0})

        with progress:
            x0 = few_step_sample(
                lambda x, sigma: model(x, sigma, **extra_args),
                sigmas,
                noise,
                noise_sampler(mode, noise, draw, shares),
                x0=None if from_noise else latent,
                callback=report,
                unit_variance_start=recipe.unit_variance_start,
            )
        if not x0.isfinite().all():
            raise ValueError(
                "model: its prediction holds NaN or infinity, which is a black picture: the weights of the model or of "
                "a LoRA are damaged, or their type is too small for them (try weight_dtype 'default', or start ComfyUI "
                "with --force-fp32)."
            )
        return x0

    return FewStepSampler(sample_sid)


def fitted(model, latent: dict) -> Tensor:
    """The samples of LATENT as MODEL reads them, an empty one's with its channels; ValueError for another model's."""
    # ComfyUI after 0.3.64 also lets an empty latent say what it was made for.
    fix = comfy.sample.fix_empty_latent_channels
    known = [name for name in RATIOS if name in inspect.signature(fix).parameters]
    image = fix(model, latent["samples"], **{name: latent.get(name) for name in known})
    channels = model.get_model_object("latent_format").latent_channels
    if image.is_nested or image.ndim != 4 or image.shape[1] != channels:
        shape = "several latents" if image.is_nested else "x".join(map(str, image.shape))
        raise ValueError(
            f"latent_image: expected a latent (batch x {channels} channels x height x width), got {shape}. Use "
            "Empty Latent Image, or VAE Encode with the model's VAE."
        )
    return image


def sample(guider, sampler, sigmas: Tensor, latent: dict, seed: int) -> tuple[dict, dict]:
    """What SamplerCustomAdvanced does with RandomNoise: (LATENT, the last x0 as LATENT).

    ValueError for a latent of another model.
    """
    model = guider.model_patcher
    image = fitted(model, latent)
    latent = {k: v for k, v in latent.items() if k not in RATIOS} | {"samples": image}

    x0_output: dict[str, Tensor] = {}
    samples = guider.sample(
        comfy.sample.prepare_noise(image, seed, latent.get("batch_index")),
        image,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1, x0_output),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    ).to(comfy.model_management.intermediate_device())
    denoised = model.model.process_latent_out(x0_output["x0"].cpu())
    return latent | {"samples": samples}, latent | {"samples": denoised}


def _steps_input() -> io.Int.Input:
    return io.Int.Input("steps", default=0, min=0, max=MAX_STEPS, tooltip=STEPS_TOOLTIP)


def _denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE_TOOLTIP)


def _noise_mode_input() -> io.Combo.Input:
    return io.Combo.Input("noise_mode", options=[FROM_RECIPE, *NOISE_MODES], default=FROM_RECIPE, tooltip=NOISE_TOOLTIP)


class SiDFewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDFewStepSampler",
            display_name="SiD Few-Step Sampler",
            description="Samples a few-step generator in 1 to 16 steps on exactly the timesteps that it was "
            "trained for. With a recipe connected nothing else has to be set.",
            search_aliases=["sid ksampler", "few-step sampler", "4 steps", "distilled sampler", "dmd2 sampler"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="A few-step generator, from a SiD loader."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Latent.Input("latent_image", tooltip="An empty latent for a new picture, or one to change."),
                RecipeType.Input(
                    "recipe", optional=True, tooltip=f"From the SiD loader. Without one: '{DEFAULT_PRESET}'."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What it must not show. Used by guidance 'nag' and 'cfg', ignored by 'none'.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of all noise, which is the same on every device.",
                ),
                _steps_input(),
                _denoise_input(),
                _noise_mode_input(),
                io.Combo.Input("guidance", options=list(MODES), default=AUTO, tooltip=MODE_TOOLTIP),
                io.Float.Input("cfg", default=1.5, min=0.0, max=100.0, step=0.05, tooltip=CFG_TOOLTIP),
                io.Float.Input("nag_scale", default=NAG_SCALE, min=0.0, max=50.0, step=0.1, tooltip=NAG_TOOLTIP),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The picture's latent."),
                io.Latent.Output(
                    display_name="denoised", tooltip="The last prediction, which in this chain is the picture itself."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model,
        positive,
        latent_image: dict,
        seed: int,
        steps: int,
        denoise: float,
        noise_mode: str,
        guidance: str,
        cfg: float,
        nag_scale: float,
        recipe: SiDRecipe | None = None,
        negative=None,
    ) -> io.NodeOutput:
        sigmas, messages = make_sigmas(model, recipe, steps, denoise)
        sampler = make_sampler(recipe, noise_mode, "noise" if denoise == 1 else "latent")
        guider, more = make_guider(model, positive, negative, recipe, guidance, cfg, nag_scale)
        idle = idle_ranges(model, sigmas, [*positive, *(negative or [])])
        warn(cls, messages + more + idle)
        return io.NodeOutput(*sample(guider, sampler, sigmas, latent_image, seed))


class SiDScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDScheduler",
            display_name="SiD Scheduler",
            description="The noise levels that a few-step generator was trained on: SIGMAS for SamplerCustomAdvanced.",
            search_aliases=["sid sigmas", "few-step scheduler", "trained timesteps"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="Whose timesteps are looked up."),
                RecipeType.Input("recipe", tooltip="From a SiD loader or SiD Recipe Override."),
                _steps_input(),
                _denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(cls, model, recipe: SiDRecipe, steps: int, denoise: float) -> io.NodeOutput:
        sigmas, messages = make_sigmas(model, recipe, steps, denoise)
        if denoise < 1 and len(sigmas) - 1 == len(recipe.timesteps_for(steps or None)):
            messages.append(
                f"denoise {denoise:g} rounds to all {len(sigmas) - 1} steps: set 'start' of SiD Sampler Select to "
                "'latent' to keep something of the given picture."
            )
        warn(cls, messages)
        return io.NodeOutput(sigmas)


class SiDSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDSamplerSelect",
            display_name="SiD Sampler Select",
            description="The few-step chain as a SAMPLER for SamplerCustomAdvanced, with the noise that the generator "
            "was trained with between its steps.",
            search_aliases=["sid sampler", "few-step sampler"],
            inputs=[
                RecipeType.Input("recipe", tooltip="From a SiD loader or SiD Recipe Override."),
                _noise_mode_input(),
                io.Combo.Input(
                    "start",
                    options=list(STARTS),
                    default="auto",
                    tooltip="What the first step adds noise to. noise: nothing, a new picture; latent: the given "
                    "latent; auto: nothing if SIGMAS begin at the recipe's first timestep, else, and after "
                    "DisableNoise, the latent.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(cls, recipe: SiDRecipe, noise_mode: str, start: str) -> io.NodeOutput:
        return io.NodeOutput(make_sampler(recipe, noise_mode, start))
