"""LoRAs in the spellings that are published: applied whole, and equal to the same LoRA in kohya's names."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import conditioning, module, run

PRESET = "SiD 625 (1 step)"
RANK = 4
SPELLINGS = {
    "diffusers, peft's ends": ("unet.{}", "lora_A", "lora_B"),
    "diffusers, its own ends": ("unet.{}", "lora.down", "lora.up"),
    "peft": ("base_model.model.{}", "lora_A", "lora_B"),
    "peft, with the adapter's name": ("base_model.model.{}", "lora_A.default", "lora_B.default"),
    "peft, of a pipeline": ("base_model.model.unet.{}", "lora_A", "lora_B"),
    "no prefix": ("{}", "lora_A", "lora_B"),
}
LDM_SPELLINGS = {
    "ComfyUI": ("diffusion_model.{}", "lora_A", "lora_B"),
    "a checkpoint's": ("model.diffusion_model.{}", "lora_A", "lora_B"),
    "ldm without prefix": ("{}", "lora_A", "lora_B"),
}


@pytest.fixture(scope="module")
def factors(pack, tensors):
    """``{(ldm's name, diffusers'): (down, up)}`` for matrices, convolutions and embeddings."""
    keys = module(pack, "sid_train.models.stable_diffusion.keys")
    config = keys.unet_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    ldm = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim > 1]
    diffusers = keys.rename(ldm, keys.invert(keys.unet_modules(config)))
    generator, made = torch.Generator().manual_seed(0), {}
    for name in ldm:
        shape = tensors[f"{name}.weight"].shape
        down = torch.randn(RANK, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.1
        made[name, diffusers[name]] = down, up
    return made


@pytest.fixture
def latents(nodes, model, put):
    """One step with a LoRA of these tensors and metadata."""

    def sample(tensors: dict, metadata: dict | None = None) -> torch.Tensor:
        name = put("loras", "lora.safetensors", tensors, metadata)
        patched, recipe = run(nodes["SiDLoRALoader"], model=model, lora_name=name, recipe=PRESET)
        inputs = {"positive": conditioning(1), "latent_image": {"samples": torch.zeros(1, 4, 8, 8)}, "seed": 0}
        return run(nodes["SiDFewStepSampler"], model=patched, recipe=recipe, **inputs)[0]["samples"]

    return sample


def kohya(factors, alpha: float | None = None, magnitudes: dict | None = None) -> dict:
    made = {}
    for (ldm, _), (down, up) in factors.items():
        name = "lora_unet_" + ldm.replace(".", "_")
        made |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
        if magnitudes:
            made[f"{name}.dora_scale"] = magnitudes[ldm].reshape(-1, *[1] * (down.ndim - 1))
    return made


def spelled(factors, pattern: str, down_end: str, up_end: str, which: int = 1) -> dict:
    return {
        f"{pattern.format(names[which])}.{end}.weight": tensor
        for names, pair in factors.items()
        for end, tensor in zip((down_end, up_end), pair, strict=True)
    }


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_every_spelling_is_the_same_lora(factors, latents):
    expected, plain = latents(kohya(factors)), latents({k: 0 * v for k, v in kohya(factors).items()})
    assert not close(expected, plain)
    for which, spellings in ((1, SPELLINGS), (0, LDM_SPELLINGS)):
        for name, spelling in spellings.items():
            assert close(latents(spelled(factors, *spelling, which)), expected), name


def test_alpha_in_tensors_and_in_pefts_configuration(factors, latents):
    tensors = spelled(factors, *SPELLINGS["diffusers, peft's ends"])
    half, root = latents(kohya(factors, RANK / 2)), latents(kohya(factors, RANK / 2 * RANK**0.5))
    alphas = {f"unet.{name}.alpha": torch.tensor(RANK / 2) for _, name in factors}
    assert close(latents(tensors | alphas), half)
    peft = {"unet.r": RANK, "unet.lora_alpha": RANK / 2, "unet.use_rslora": False, "unet.alpha_pattern": {}}
    assert close(latents(tensors, {"lora_adapter_metadata": json.dumps(peft)}), half)
    assert close(latents(tensors, {"lora_adapter_metadata": json.dumps(peft | {"unet.use_rslora": True})}), root)
    each = {"unet.lora_alpha": 99, "unet.alpha_pattern": {name: RANK / 2 for _, name in factors}}
    assert close(latents(tensors, {"lora_adapter_metadata": json.dumps(peft | each)}), half)


def test_magnitudes_of_dora(factors, latents, tensors):
    magnitudes = {ldm: 1.1 * tensors[f"{ldm}.weight"].flatten(1).norm(dim=1) for ldm, _ in factors}
    expected = latents(kohya(factors, magnitudes=magnitudes))
    assert not close(expected, latents(kohya(factors)))
    ours = spelled(factors, *SPELLINGS["diffusers, peft's ends"])
    ours |= {f"unet.{name}.lora_magnitude_vector": magnitudes[ldm] for ldm, name in factors}
    assert close(latents(ours), expected)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}']
)
def test_a_configuration_that_cannot_be_read(factors, latents, text):
    with pytest.raises(ValueError, match="lora_adapter_metadata: expected peft's configuration as JSON"):
        latents(spelled(factors, *SPELLINGS["peft"]), {"lora_adapter_metadata": text})


def test_one_lora_in_two_spellings(factors, latents):
    again = {name: tensor.clone() for name, tensor in spelled(factors, *SPELLINGS["no prefix"]).items()}
    both = spelled(factors, *SPELLINGS["peft"]) | again
    with pytest.raises(ValueError, match="is in the file twice, under two spellings"):
        latents(both)
