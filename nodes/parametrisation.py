"""What no file tells ComfyUI of some generators: that the network predicts the picture itself, that it is told other
timesteps than those that it is sampled on, or, of SD 1.x and 2.x, that it predicts v.
"""

from __future__ import annotations

import functools

import comfy.model_sampling
from comfy.patcher_extension import WrappersMP

from ..sid_train.core.architectures import SDXL
from ..sid_train.core.noise_schedule import X0
from ..sid_train.core.recipe import SiDRecipe
from ..sid_train.models.stable_diffusion.statements import Stated
from .models import check_network, has_zero_terminal_snr

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


def sampled_as(model, recipe: SiDRecipe, source: str, is_file: bool = False, said: Stated | None = None):
    """MODEL with what ``recipe`` says of its network and ComfyUI does not know: itself where that is nothing.

    Of SDXL, ComfyUI reads from tensors in the file whether it predicts v, and zero terminal SNR. Of SD 1.x it takes all
    files for epsilon, of 2.x it guesses: there it counts what the model's own file says (said).

    ValueError for a model that is not sampled as these are (see ``check_network``).
    """
    sampling = model.get_model_object("model_sampling")
    architecture, predicts = check_network(model.model, sampling, source, is_file)
    zero_snr = has_zero_terminal_snr(sampling)
    known = predicts, zero_snr
    if said is not None and architecture is not SDXL:
        predicts = said.prediction_type if said.prediction_type in KINDS else predicts
        zero_snr = zero_snr if said.zero_terminal_snr is None else said.zero_terminal_snr
    if recipe.prediction_type == X0:
        predicts = X0
    if (predicts, zero_snr) == known and recipe.timestep_scale == 1:
        return model
    bases: tuple[type, ...] = (comfy.model_sampling.ModelSamplingDiscrete, KINDS[predicts])
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    if recipe.timestep_scale != 1:
        bases = (ScaledTimesteps, *bases)
        tell = functools.partial(_tell_scaled, recipe.timestep_scale)
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, tell)
    made = type("ModelSampling", bases, {"timestep_scale": recipe.timestep_scale})
    patched.add_object_patch("model_sampling", made(model.model.model_config, zsnr=zero_snr))
    return patched


def _tell_scaled(scale: float, executor, x, timesteps, *rest, **more):
    return executor(x, _scaled(timesteps, scale), *rest, **more)


def _scaled(timesteps, scale: float):
    return (timesteps * scale).floor()
