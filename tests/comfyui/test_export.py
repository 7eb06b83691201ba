"""What sid_train exports, in ComfyUI: every key matched, the same network, the same chain."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import conditioning, empty_latent, module, run
from safetensors.torch import load_file, save_file

SEED = 7


@pytest.fixture(scope="module")
def parts(pack, unet_file):
    return module(pack, "sid_train.models.stable_diffusion.parts").open_parts(str(unet_file))


@pytest.fixture(scope="module")
def generator(pack, parts):
    """A generator that is a LoRA on every kind of module over the small UNet."""
    lora, family = module(pack, "sid_train.models.stable_diffusion.lora"), module(pack, "sid_train.models.family")
    rng = torch.Generator().manual_seed(0)
    adapter = {}
    for name in lora.kohya_modules(parts.tensors, parts.unet_config):
        shape = parts.tensors[f"{name}.weight"].shape
        if len(shape) >= 2 and not name.startswith(("conv_", "time_embedding", "add_embedding")):
            down, up = torch.randn(4, *shape[1:], generator=rng), torch.randn(shape[0], 4, generator=rng)
            adapter[name] = (down * down[0].numel() ** -0.5, up * 0.3, 4.0)
    recipe = module(pack, "sid_train.core.recipe").SiDRecipe()
    return family.Generator(parts, recipe, parts.tensors, adapter)


@pytest.fixture
def put(tmp_path, monkeypatch, pack, generator, folders):
    """Exports into one of ComfyUI's model folders."""

    def write(kind: str, format_: str, dtype: str = "fp32", generator=generator) -> str:
        folder, options = tmp_path / kind, module(pack, "sid_train.models.family").ExportOptions(format_, dtype)
        module(pack, "sid_train.models.stable_diffusion.export").export(generator, folder / "sid.safetensors", options)
        monkeypatch.setitem(folders.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        return "sid.safetensors"

    return write


@pytest.fixture(scope="module")
def unet(pack, generator):
    """The merged UNet in diffusers, fp32."""
    build = module(pack, "sid_train.models.stable_diffusion.parts").build_unet
    return build(generator.model.unet_config, generator.merged(), torch.float32).eval()


@pytest.fixture(scope="module")
def latents(pack, generator, unet) -> torch.Tensor:
    return chain(pack, unet, generator.recipe)


def chain(pack, unet, recipe) -> torch.Tensor:
    """That of ``core.few_step_sample`` over a UNet of diffusers."""
    sampling = module(pack, "sid_train.core.sampling")
    schedule = module(pack, "sid_train.core.noise_schedule").VPSchedule.sdxl()
    schedule = schedule.sampled_as(recipe.prediction_type, recipe.timestep_scale)
    denoiser = module(pack, "sid_train.models.unet").UNetDenoiser(unet, schedule)
    ((text, extra),) = conditioning(1)
    size = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
    cond = module(pack, "sid_train.models.conditioning").Conditioning(
        text=text, pooled=extra["pooled_output"], time_ids=size
    )
    first = sampling.initial_noise((1, 4, 16, 16), SEED)
    sigmas = sampling.ladder_sigmas(schedule, recipe.timesteps)
    noises = sampling.noise_sampler("fresh", first, sampling.seeded_noise(first, SEED))
    with torch.no_grad():
        return sampling.few_step_sample(
            lambda x, sigma: denoiser(x, sigma, cond),
            sigmas,
            first,
            noises,
            unit_variance_start=recipe.unit_variance_start,
        )


def sampled(nodes, model, recipe) -> torch.Tensor:
    inputs = {"positive": conditioning(1), "latent_image": empty_latent(), "seed": SEED}
    (result, _) = run(nodes["SiDFewStepSampler"], model=model, recipe=recipe, **inputs)
    return result["samples"] * model.model.latent_format.scale_factor


def assert_same(ours: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= max(1e-4, relative * expected.abs().max())


def test_unet_gives_the_chain_of_the_trainer(nodes, put, latents, generator):
    import comfy.sd

    name = put("diffusion_models", "unet")
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    assert recipe == generator.recipe
    model = comfy.sd.load_diffusion_model(  # as the loader does it, in fp32 on any machine
        str(put_path(name)), model_options={"dtype": torch.float32}
    )
    assert_same(sampled(nodes, model, recipe), latents, 1e-5)


def test_a_pickle_of_the_authors_gives_the_chain_of_the_object_in_it(pack, nodes, unet, tmp_path, monkeypatch, folders):
    import comfy.sd

    source, out = tmp_path / "SiDA_SDXL_001_lrg0.5_batch256_joint2step_002452.pkl", tmp_path / "sida.safetensors"
    source.write_bytes(pickle.dumps({"ema": unet}, 4))
    module(pack, "sid_train.commands.convert").convert(source, out, None, None, None, "unet", None, "fp32")
    monkeypatch.setitem(folders.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    _, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=out.name)
    assert recipe.timesteps == (625, 312)
    model = comfy.sd.load_diffusion_model(str(out), model_options={"dtype": torch.float32})
    theirs = pickle.loads(source.read_bytes())["ema"]
    assert_same(sampled(nodes, model, recipe), chain(pack, theirs, recipe), 1e-5)


@pytest.mark.parametrize(
    "preset", ["Lightning (1 step)", "NitroFusion Realism (4 steps)", "NitroFusion Vibrant (1 step)"]
)
def test_a_network_that_comfyui_knows_nothing_of_gives_the_chain_of_the_trainer(
    pack, nodes, put, generator, unet, preset
):
    """From a file that says it, and by a preset from one that does not."""
    recipe = module(pack, "sid_train.core.recipe").PRESETS[preset]
    expected = chain(pack, unet, recipe)
    name = put("diffusion_models", "unet", "fp32", replace(generator, recipe=recipe))
    for choice in ("from the file", preset):
        model, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe=choice)
        assert read == recipe
        difference = (sampled(nodes, model, read) - expected).std() / expected.std()
        assert difference < 1e-4, choice  # ComfyUI takes fp32 on a CPU
    (sigmas,) = run(nodes["SiDScheduler"], model=model, recipe=recipe)
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-3)  # of timestep 999, whatever the network is told


def put_path(name: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise("diffusion_models", name))


def test_lora_matches_every_key_and_gives_the_same(nodes, put, model, latents, generator):
    patched, recipe = run(nodes["SiDLoRALoader"], model=model, lora_name=put("loras", "lora"))
    assert len(patched.patches) == len(generator.adapter)
    assert_same(sampled(nodes, patched, recipe), latents, 1e-4)  # merged in another order of operations


def test_checkpoint_in_fp16_and_fp8(pack, nodes, put, generator, latents):
    """All in one file: with the small VAE and without text encoders, which ComfyUI has no small ones of."""
    from small_models import vae_tensors

    rest = {f"first_stage_model.{k}": v for k, v in vae_tensors().items()}
    for encoder in ("0.transformer", "1.model"):
        rest[f"conditioner.embedders.{encoder}.none"] = torch.zeros(1)
    tensors = module(pack, "sid_train.files.tensors").LazyTensor
    parts = replace(generator.model, load_rest=lambda: {k: tensors.of(v) for k, v in rest.items()})
    whole = replace(generator, model=parts)
    for dtype, relative in (("fp16", 0.02), ("fp8", 0.5)):
        model, _, vae, recipe = run(
            nodes["SiDCheckpointLoader"], ckpt_name=put("checkpoints", "checkpoint", dtype, whole)
        )
        assert vae is not None
        difference = (sampled(nodes, model, recipe) - latents).std() / latents.std()
        assert difference < relative, dtype


def test_v_prediction_survives(nodes, put, generator):
    recipe = replace(generator.recipe, prediction_type="v_prediction", zero_terminal_snr=True)
    name = put("diffusion_models", "unet", "fp16", replace(generator, recipe=recipe))
    _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    assert read == recipe  # the loader raises where ComfyUI loads the file as another kind of model


def test_converted_dmd2_unet_loads(pack, nodes, parts, tmp_path, monkeypatch, folders):
    """diffusers' names, as DMD2 publishes: ComfyUI knows them for full-size SDXL only."""
    export, recipes = module(pack, "sid_train.models.stable_diffusion.export"), module(pack, "sid_train.core.recipe")
    source, path = tmp_path / "dmd2_sdxl_4step_unet_fp16.safetensors", tmp_path / "converted.safetensors"
    save_file({name: tensor.load().half() for name, tensor in parts.tensors.items()}, source)
    export.convert_unet(export.open_network(source), path, recipes.PRESETS["DMD2 (4 steps)"], "fp16")
    monkeypatch.setitem(folders.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name="converted.safetensors")
    assert recipe.timesteps == (999, 749, 499, 249)
    assert recipe.unit_variance_start
    state, expected = model.model.diffusion_model.state_dict(), load_file(path)
    assert all(torch.equal(state[name].half(), tensor) for name, tensor in expected.items())
