"""With what noise and latent a chain starts, also where another node's sampler calls ours.

ComfyUI's KSAMPLER gives its function an object that knows both. Samplers around samplers (they shift sigmas, or add
detail) hand on a plain function instead, which has ``inner_model`` and ``sigmas`` and nothing else.
"""

from __future__ import annotations

import comfy.model_base
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..sid_train.core.sampling import initial_noise

KEY = "sid_start"
MAX_NESTING = 64


def remember_start(model):
    """A clone of MODEL that notes, where sampling begins, its noise and latent for ``find_start``."""
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _note_start)
    return patched


def _note_start(executor, guider, sigmas, extra_args, callback, noise, latent_image=None, *rest, **more):
    extra_args["model_options"][KEY] = (noise, latent_image)  # a dictionary of this run alone
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, *rest, **more)


def find_network(model):
    """ComfyUI's BaseModel inside whatever a sampler was given as its model; ValueError where there is none."""
    for inner in _nested(model):
        if isinstance(inner, comfy.model_base.BaseModel):
            return inner
    raise ValueError(
        f"model: expected what ComfyUI gives to samplers, got {type(model).__name__} without ComfyUI's model in its "
        "'inner_model'. The sampler around SiD Sampler Select does not hand it on: use SiD Sampler Select without it."
    )


def find_start(model, network, x: Tensor, sigma: Tensor, extra_args: dict) -> tuple[Tensor, Tensor]:
    """The standard normal noise and the latent that ``x`` [B, 4, H, W], noised to ``sigma``, was made of.

    The very tensors where ``model`` knows them or a MODEL of ours noted them. Else ``x`` has to do: its noise is the
    seed's where it holds that (RandomNoise), and where it does not, all of it is taken for noise.
    """
    known = [(getattr(inner, "noise", None), getattr(inner, "latent_image", None)) for inner in _nested(model)]
    sampling = network.model_sampling
    for noise, latent in [*known, extra_args.get("model_options", {}).get(KEY, (None, None))]:
        if isinstance(noise, Tensor) and isinstance(latent, Tensor) and noise.shape == x.shape:
            # KSAMPLER scales the noise of the highest timestep in a way of its own, which ours does not.
            made = (sampling.noise_scaling(sigma, noise.to(x), latent.to(x), is_max) for is_max in (False, True))
            if any(torch.equal(of_both, x) for of_both in made):
                return noise.to(x), latent.to(x)
    is_max = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    scale = (1 + sigma**2).sqrt() if is_max else sigma
    seeded = initial_noise(x.shape, extra_args.get("seed") or 0).to(x)
    share = float((x * seeded).sum() / (seeded * seeded).sum() / scale)
    if abs(share - 1) < 0.2:  # many standard deviations from 1 by chance, and as many from 0 where it is other noise
        return seeded, x - scale * seeded
    return x / scale, torch.zeros_like(x)


def _nested(model):
    """``model``, its ``inner_model``, the inner one's, and so on."""
    for _ in range(MAX_NESTING):
        if model is None:
            return
        yield model
        model = getattr(model, "inner_model", None)
