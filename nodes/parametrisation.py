"""What no file tells ComfyUI of a few generators: that the network predicts the picture itself, or that it is told
other timesteps than those that it is sampled on.
"""

from __future__ import annotations

import functools

import comfy.model_sampling
from comfy.patcher_extension import WrappersMP

from ..sid_train.core.noise_schedule import X0
from ..sid_train.core.recipe import SiDRecipe
from .models import check_sdxl

KEY = "sid_timestep_scale"
KINDS = {
    "epsilon": comfy.model_sampling.EPS,
    "v_prediction": comfy.model_sampling.V_PREDICTION,
    X0: comfy.model_sampling.X0,
}


class ScaledTimesteps:
    """Before ComfyUI's ModelSamplingDiscrete: what the network said means what it means at the timestep that it was
    told, as in ``VPSchedule``. ``timestep`` stays what it is, so that ComfyUI's schedulers and ControlNets do not see
    any of this.
    """

    timestep_scale = 1.0

    def calculate_denoised(self, sigma, model_output, model_input):
        told = self.sigma(_scaled(self.timestep(sigma), self.timestep_scale))
        norm = (1 + comfy.model_sampling.reshape_sigma(told, model_input.ndim) ** 2) ** 0.5
        at_told = self.calculate_input(sigma, model_input) * norm
        return super().calculate_denoised(told, model_output, at_told)


def sampled_as(model, recipe: SiDRecipe, source: str, is_file: bool = False):
    """MODEL with what ``recipe`` says of its network beyond epsilon and v: itself where that is nothing.

    ValueError for a model that is not sampled as SDXL is (see ``check_sdxl``).
    """
    if recipe.prediction_type != X0 and recipe.timestep_scale == 1:
        return model
    sampling = model.get_model_object("model_sampling")
    predicts = check_sdxl(model.model, sampling, source, is_file)
    kind = KINDS[X0 if recipe.prediction_type == X0 else predicts]
    bases: tuple[type, ...] = (comfy.model_sampling.ModelSamplingDiscrete, kind)
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    if recipe.timestep_scale != 1:
        bases = (ScaledTimesteps, *bases)
        tell = functools.partial(_tell_scaled, recipe.timestep_scale)
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, tell)
    ours = type("ModelSampling", bases, {"timestep_scale": recipe.timestep_scale})(model.model.model_config)
    ours.set_sigmas(sampling.sigmas)
    patched.add_object_patch("model_sampling", ours)
    return patched


def _tell_scaled(scale: float, executor, x, timesteps, *rest, **more):
    return executor(x, _scaled(timesteps, scale), *rest, **more)


def _scaled(timesteps, scale: float):
    return (timesteps * scale).floor()
