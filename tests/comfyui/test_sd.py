"""SD 1.x and 2.x: distilled, converted and exported by ``sid_train``, sampled by the nodes, beside diffusers' UNet."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import call, conditioning, empty_latent, module, run, text_of
from safetensors.torch import load_file, save_file

SEED = 7
SIZE = 16


@pytest.fixture(scope="module", params=["SD1", "SD2"])
def kit(request, pack, tmp_path_factory):
    """A teacher's UNet in a file, a generator that is a LoRA over it, and what a prompt is for it."""
    import small_models

    architecture = getattr(module(pack, "sid_train.core.architectures"), request.param)
    unet = small_models.sd_unet_tensors(getattr(small_models, f"{request.param}_UNET_CONFIG"))
    file = small_models.save(tmp_path_factory.mktemp("sd") / "unet.safetensors", unet)
    parts = module(pack, "sid_train.models.stable_diffusion.parts").open_parts(str(file))
    lora, rng, adapter = module(pack, "sid_train.models.stable_diffusion.lora"), torch.Generator().manual_seed(0), {}
    for name in lora.kohya_modules(parts.tensors, parts.unet_config):
        shape = parts.tensors[f"{name}.weight"].shape
        if len(shape) >= 2 and not name.startswith(("conv_", "time_embedding")):
            down, up = torch.randn(4, *shape[1:], generator=rng), torch.randn(shape[0], 4, generator=rng)
            adapter[name] = (down * down[0].numel() ** -0.5, up * 0.3, 4.0)
    recipe = module(pack, "sid_train.core.recipe").SiDRecipe().for_architecture(architecture)
    generator = module(pack, "sid_train.models.family").Generator(parts, recipe, parts.tensors, adapter)
    width = architecture.text_width
    return SimpleNamespace(
        architecture=architecture,
        file=file,
        generator=generator,
        positive=conditioning(1, width=width, pooled=width),
        negative=conditioning(2, width=width, pooled=width),
    )


@pytest.fixture
def put(tmp_path, monkeypatch, pack, folders):
    """Exports into one of ComfyUI's model folders."""

    def write(kind: str, format_: str, generator, dtype: str = "fp32") -> str:
        folder, options = tmp_path / kind, module(pack, "sid_train.models.family").ExportOptions(format_, dtype)
        module(pack, "sid_train.models.families").export_generator(generator, folder / "sid.safetensors", options)
        monkeypatch.setitem(folders.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        return "sid.safetensors"

    return write


def in_fp32(model):
    """What loader and node make of a file on a CPU may be bf16: the same in fp32."""
    model.model.diffusion_model.float()
    model.model.manual_cast_dtype = None
    return model


def chain(pack, denoiser, cond, recipe, size: int = SIZE) -> torch.Tensor:
    sampling = module(pack, "sid_train.core.sampling")
    first = sampling.initial_noise((1, 4, size, size), SEED)
    sigmas = sampling.ladder_sigmas(denoiser.schedule, recipe.timesteps)
    noises = sampling.noise_sampler(recipe.noise_mode, first, sampling.seeded_noise(first, SEED))
    with torch.no_grad():
        return sampling.few_step_sample(lambda x, sigma: denoiser(x, sigma, cond), sigmas, first, noises)


def of_diffusers(pack, kit, recipe, unet=None) -> torch.Tensor:
    """The chain over diffusers' UNet, with the generator's weights or as given."""
    build = module(pack, "sid_train.models.stable_diffusion.parts").build_unet
    unet = unet or build(kit.generator.model.unet_config, kit.generator.merged(), torch.float32).eval()
    schedule = module(pack, "sid_train.core.noise_schedule").VPSchedule.sdxl(
        recipe.zero_terminal_snr, recipe.prediction_type
    )
    cond = module(pack, "sid_train.models.conditioning").Conditioning(text=kit.positive[0][0])
    return chain(pack, module(pack, "sid_train.models.unet").UNetDenoiser(unet, schedule), cond, recipe)


def sampled(nodes, kit, model, recipe, **inputs) -> torch.Tensor:
    given = {"positive": kit.positive, "latent_image": empty_latent(size=SIZE), "seed": SEED}
    (result, _) = run(nodes["SiDFewStepSampler"], model=model, recipe=recipe, **given | inputs)
    return result["samples"] * model.model.latent_format.scale_factor


def assert_same(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= relative * expected.abs().max()


def test_a_unet_gives_the_chain_over_diffusers_network(pack, nodes, kit, put):
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=put("diffusion_models", "unet", kit.generator))
    assert recipe == kit.generator.recipe
    assert_same(sampled(nodes, kit, in_fp32(model), recipe), of_diffusers(pack, kit, recipe))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_recipe_says_what_a_file_predicts(pack, nodes, kit, put, zero_terminal_snr):
    """ComfyUI reads no marker of SD 1.x and 2.x, and takes these files for eps-prediction."""
    facts = {"prediction_type": "v_prediction", "zero_terminal_snr": zero_terminal_snr}
    wanted = replace(kit.generator.recipe, **facts, timesteps=(999, 749, 499, 249), t_init=999)
    name = put("diffusion_models", "unet", replace(kit.generator, recipe=wanted))
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    assert recipe == wanted
    assert_same(sampled(nodes, kit, in_fp32(model), recipe), of_diffusers(pack, kit, recipe), 1e-4)


def test_a_lora_matches_every_key(pack, nodes, kit, put):
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(kit.file), model_options={"dtype": torch.float32})
    patched, recipe = run(nodes["SiDLoRALoader"], model=model, lora_name=put("loras", "lora", kit.generator))
    assert len(patched.patches) == len(kit.generator.adapter)
    assert_same(sampled(nodes, kit, patched, recipe), of_diffusers(pack, kit, recipe), 1e-4)


def test_every_guidance_and_preset(nodes, kit, recipes, put, caplog):
    """And a preset is of the model's own generation."""
    name = put("diffusion_models", "unet", kit.generator)
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    alone = sampled(nodes, kit, model, recipe)
    for mode in ("nag", "cfg", "cfg first step only"):
        guided = sampled(nodes, kit, model, recipe, guidance=mode, negative=kit.negative)
        assert guided.isfinite().all()
        assert (guided - alone).abs().max() > 1e-3
    for preset, known in recipes.PRESETS.items():
        if known.prediction_type == "x0" or known.timestep_scale != 1:
            continue  # of SDXL alone, and what the loaders have to set up
        (chosen,) = run(nodes["SiDRecipeOverride"], preset=preset, model=model)
        assert (chosen.architecture, chosen.base_model) == (kit.architecture.name, kit.architecture.base_model)
    assert sampled(nodes, kit, model, chosen).isfinite().all()


def test_a_one_step_pickle_of_the_authors(pack, nodes, kit, tmp_path, monkeypatch, folders):
    """SiD-LSG's layout: a whole UNet object, whose name says all but the network."""
    build = module(pack, "sid_train.models.stable_diffusion.parts").build_unet
    unet = build(kit.generator.model.unet_config, kit.generator.merged(), torch.float32).eval()
    generation = "sd21_" if kit.architecture.people == "SD 2.x" else ""
    source = tmp_path / f"batch512_{generation}cfg1.51.51.5_t625_8806_v2.pkl"
    source.write_bytes(pickle.dumps({"ema": unet}, 4))
    out = tmp_path / "lsg.safetensors"
    module(pack, "sid_train.commands.convert").convert(source, out, None, None, None, "unet", None, "fp32")
    monkeypatch.setitem(folders.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=out.name)
    assert (recipe.timesteps, recipe.architecture) == ((625,), kit.architecture.name)
    assert (recipe.guidance.strategy, recipe.guidance.teacher) == ("lsg", 1.5)
    theirs = pickle.loads(source.read_bytes())["ema"]
    assert_same(sampled(nodes, kit, in_fp32(model), recipe), of_diffusers(pack, kit, recipe, theirs))


def test_sd15_from_a_checkpoint_to_a_picture(pack, nodes, tmp_path, monkeypatch, folders, caplog):
    """Two iterations of the shipped configuration, exported all in one file, and a prompt through ComfyUI's CLIP."""
    from small_models import SD1_UNET_CONFIG, clip_l_tensors, sd_unet_tensors, vae_tensors

    tensors = {f"model.diffusion_model.{k}": v for k, v in sd_unet_tensors(SD1_UNET_CONFIG).items()}
    tensors |= clip_l_tensors() | {f"first_stage_model.{k}": v for k, v in vae_tensors().items()}
    teacher, run_folder, out = tmp_path / "v1-5.safetensors", tmp_path / "run", tmp_path / "sid.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, teacher)
    (tmp_path / "prompts.txt").write_text("a lighthouse at dawn\na cat in a hat\n")
    main = module(pack, "sid_train.cli").main
    values = [
        *(f"model.teacher={teacher}", "model.resolution=128", f"data.prompts={tmp_path / 'prompts.txt'}"),
        *("training.iterations=2", "training.batch_size=1", "training.accumulate=1", "training.grid_every=0"),
        *("training.tracker=none", "optimizer.generator_lr=1e-3"),
    ]
    changes = [part for value in values for part in ("--set", value)]
    assert main(["distill", "--config", "sd15-4step", *changes, "--out", str(run_folder)]) == 0
    ask = ["--format", "checkpoint", "--dtype", "fp32", "-o", str(out)]
    assert main(["export", str(run_folder), *ask]) == 0
    monkeypatch.setitem(folders.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    model, clip, vae, recipe = run(nodes["SiDCheckpointLoader"], ckpt_name=out.name)
    assert recipe.timesteps == (625, 468, 312, 156)
    assert recipe.architecture == "stable-diffusion-v1"
    assert vae is not None
    assert not text_of(caplog)

    from nodes import CLIPTextEncode

    (positive,) = call(CLIPTextEncode, clip, "a cat in a hat")
    bundle, _ = module(pack, "sid_train.models.families").load_generator(str(out))
    cond = bundle.conditioner.encode(["a cat in a hat"])
    torch.testing.assert_close(positive[0][0], cond.text, rtol=1e-4, atol=1e-4)
    before = load_file(teacher)["model.diffusion_model.out.2.weight"].float()
    assert (bundle.denoiser.unet.conv_out.weight - before).abs().max() > 1e-4  # it was trained
    ours = SimpleNamespace(positive=[[cond.text, {}]])
    assert_same(sampled(nodes, ours, in_fp32(model), recipe), chain(pack, bundle.denoiser, cond, recipe))


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_sd2_predicts_v_where_comfyui_takes_it_so(pack, tmp_path, spread):
    from comfy.model_base import ModelType
    from comfy.supported_models import SD20
    from small_sd import sd2_with_spread

    path = sd2_with_spread(tmp_path / "x.safetensors", spread)
    theirs = SD20({"in_channels": 4}).model_type(load_file(path), "model.diffusion_model.")
    ours = module(pack, "sid_train.models.stable_diffusion.parts").open_parts(str(path)).prediction_type
    assert ours == ("v_prediction" if theirs is ModelType.V_PREDICTION else "epsilon")
    assert (theirs is ModelType.V_PREDICTION) == (spread > 0.1)


def test_a_preset_follows_what_the_header_says(pack, nodes, kit, put, caplog):
    """Also where the file's own recipe is replaced."""
    facts = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    name = put("diffusion_models", "unet", replace(kit.generator, recipe=replace(kit.generator.recipe, **facts)))
    _, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="SiD 999 (2 steps)")
    assert (recipe.prediction_type, recipe.zero_terminal_snr) == ("v_prediction", True)
    assert "noise" not in text_of(caplog).replace("noise fresh", "")


def test_a_lora_for_v_says_how_its_model_is_loaded(nodes, kit, put):
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = comfy.sd.load_diffusion_model(str(kit.file), model_options={"dtype": torch.float32})
    facts = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    name = put("loras", "lora", replace(kit.generator, recipe=replace(kit.generator.recipe, **facts)))
    with pytest.raises(ValueError, match="put ModelSamplingDiscrete with 'v_prediction' and zsnr behind"):
        run(nodes["SiDLoRALoader"], model=model, lora_name=name)
    (right,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    assert run(nodes["SiDLoRALoader"], model=right, lora_name=name)[1].prediction_type == "v_prediction"
