"""Distillation in the graph: an iteration is the trainer's."""

from __future__ import annotations

import pytest
import torch
from helpers import conditioning, module, run
from safetensors.torch import load_file

PROMPTS = ["a red three on a blue ground", "a green seven on a black ground", "a white two on a grey ground"]
SETTINGS = ["adapter.rank=4", "method.steps=2", "method.alpha=1", "training.batch_size=4", "training.seed=3"]
SETTINGS += ["training.tracker=none", "training.iterations=10"]


def encode(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture
def graph(pack):
    return module(pack, "nodes.distillation")


def settings_of(graph, config, guidance: str, micro_batch: int = 4):
    return graph.Settings(
        steps=config.method.steps,
        guidance=guidance,
        iterations=config.training.iterations,
        rank=config.adapter.rank,
        generator_lr=config.optimizer.generator_lr,
        fake_score_lr=config.optimizer.fake_score_lr,
        batch_size=config.training.batch_size,
        micro_batch=micro_batch,
        fake_score_updates=config.training.fake_score_updates,
        seed=config.training.seed,
        checkpointing=micro_batch < 4,
    )


def unet_names(model) -> dict[str, str]:
    """Diffusers' name -> ComfyUI's, of every tensor."""
    import comfy.utils

    return comfy.utils.unet_to_diffusers(model.model_config.unet_config)


def take(optimizers) -> dict:
    """The gradients of each step, by role, once optimizers have taken some."""
    taken = {role: [] for role in optimizers}

    def recording(role, adam):
        step = adam.step

        def recorded(*args, **kwargs):
            taken[role].append([p.grad.clone() for group in adam.param_groups for p in group["params"]])
            return step(*args, **kwargs)

        adam.step = recorded

    for role, adam in optimizers.items():
        recording(role, adam)
    return taken


@pytest.mark.parametrize(("guidance", "micro_batch"), [("none", 4), ("lsg=1.5", 4), ("lsg=1.5", 2)])
def test_an_iteration_on_the_digits_is_the_trainers(nodes, pack, graph, guidance, micro_batch, tmp_path):
    trainers, config_of = (module(pack, f"sid_train.{name}") for name in ("training.trainer", "config"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    asked = [*SETTINGS, f"method.guidance={guidance}", f"data.prompts={tmp_path / 'prompts.txt'}"]
    config = config_of.load_config("demo", asked)
    trainer = trainers.Trainer(config, tmp_path / "run")

    demo = run(nodes["SiDDemoModel"], batch_size=1)
    model = demo[0].model
    conds = [graph.conditioning_of(model, encode(demo[1], text), (12, 8, 8)) for text in [*PROMPTS, ""]]
    settings = settings_of(graph, config, guidance, micro_batch)
    schedule = trainer.teacher.schedule
    distillation = graph.Distillation(
        model, {}, schedule, conds[:-1], conds[-1], (12, 8, 8), settings, torch.device("cpu")
    )
    names = {ldm.removesuffix(".weight"): ours.removesuffix(".weight")
             for ours, ldm in unet_names(model).items()}  # fmt: skip
    for role in ("generator", "fake_score", "average"):
        network = trainer.ema.average if role == "average" else trainer.networks[role]
        with torch.no_grad():
            for name, pair in distillation.adapters.factors[role].items():
                for factor, place in zip(pair, ("lora_A", "lora_B"), strict=True):
                    theirs = network.adapter[f"{names[name]}.{place}".replace(".", "/")]
                    if place == "lora_B":  # not 0, so that every factor has a gradient
                        theirs.copy_(
                            0.02 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(len(name)))
                        )
                    factor.copy_(theirs)
    wanted, found = take(trainer.optimizers), take(distillation.optimizers)
    for _ in range(2):
        theirs, ours = trainer.train_iteration(), distillation.train_iteration()
        trainer.iteration += 1
        assert ours == pytest.approx(theirs, rel=1e-4)
    for role, steps in wanted.items():
        order = [f"{names[name]}.{place}" for place in ("lora_A", "lora_B") for name in distillation.adapters.layers]
        keys = [key.replace("/", ".") for key in trainer.networks[role].adapter]
        for step, (a, b) in enumerate(zip(found[role], steps, strict=True)):
            by_name = dict(zip(keys, b, strict=True))
            scale = max(float(g.abs().max()) for g in b)
            for name, gradient in zip(order, a, strict=True):
                other = by_name[name]
                assert (gradient - other).abs().max() <= (1e-4 if not step else 1e-2) * scale, name


@pytest.mark.parametrize("guidance", ["none", "lsg=1.5"])
def test_the_losses_on_sdxl_are_the_trainers(pack, unet_file, graph, guidance):
    """And their gradients, for adapters on every layer of a small UNet: peft's on diffusers', and ours on ComfyUI's."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(unet_file), model_options={"dtype": torch.float32}).model
    schedule = module(pack, "sid_train.core.noise_schedule").VPSchedule.sdxl()
    shape, encoded = (4, 16, 16), [conditioning(seed) for seed in (1, 2)]
    told = [graph.conditioning_of(model, one, shape) for one in encoded]
    settings = graph.Settings(2, guidance, 1, 4, 1e-4, 1e-4, 1, 1, 1, 0, checkpointing=False)
    ours = graph.Distillation(model, {}, schedule, told[:1], told[1], shape, settings, torch.device("cpu"))

    parts = module(pack, "sid_train.models.stable_diffusion.parts")
    opened = parts.open_parts(str(unet_file))
    unet = parts.build_unet(opened.unet_config, opened.tensors, torch.float32)
    adapters = module(pack, "sid_train.models.adapters")
    config = module(pack, "sid_train.models.adapter_config").AdapterConfig(rank=4, targets="all")
    roles = ("generator", "fake_score")
    shared = adapters.SharedNetwork(module(pack, "sid_train.models.unet").UNetDenoiser(unet, schedule), config, roles)
    names = {ldm.removesuffix(".weight"): name.removesuffix(".weight") for name, ldm in unet_names(model).items()}
    assert {names[name] for name in ours.adapters.layers} == set(shared.layers)
    rng = torch.Generator().manual_seed(0)
    for role in roles:
        parameters = shared.parameters(role)
        with torch.no_grad():
            for name, (down, up) in ours.adapters.factors[role].items():
                up.copy_(0.1 * torch.randn(up.shape, generator=rng))
                parameters[f"{names[name]}.lora_A"].copy_(down)
                parameters[f"{names[name]}.lora_B"].copy_(up)
    conditionings = module(pack, "sid_train.models.conditioning").Conditioning
    size = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
    cond, unconditional = (
        conditionings(text=text, pooled=extra["pooled_output"], time_ids=size) for ((text, extra),) in encoded
    )
    networks = {role: adapters.AdapterDenoiser(shared, role) for role in (*roles, "teacher")}
    for role in roles:
        networks[role].requires_grad_(True)
    theirs = module(pack, "sid_train.method.sid").Distiller(
        *networks.values(), schedule, unconditional, shape, settings.method
    )
    rngs = module(pack, "sid_train.core.rng")
    for loss, role in (("fake_score_loss", "fake_score"), ("generator_loss", "generator")):
        values = []
        for method, told_method in ((ours.method, told[0]), (theirs, cond)):
            draws = rngs.BatchRNG(torch.Generator().manual_seed(1))
            (value,) = getattr(method, loss)(told_method, 2, draws).values()
            value.backward()
            values.append(value.item())
        assert values[0] == pytest.approx(values[1], rel=1e-4)
        gradients = {name: p.grad for name, p in shared.parameters(role).items()}
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, pair in ours.adapters.factors[role].items():
            for factor, place in zip(pair, ("lora_A", "lora_B"), strict=True):
                assert (factor.grad - gradients[f"{names[name]}.{place}"]).abs().max() <= 1e-4 * scale
    ours.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_model_with_a_lora_in_a_small_type(nodes, unet_file, lora, put, places, dtype):
    """What is distilled is the model with what is on it, and it is as it was afterwards."""
    import comfy.sd

    with torch.inference_mode():
        plain = comfy.sd.load_diffusion_model(str(unet_file), model_options={"dtype": dtype})
        name = put("loras", "style.safetensors", lora)
        model, _, *_ = run(nodes["SiDLoRALoader"], model=plain, lora_name=name, recipe="LCM (4 steps)")
    before = {key: value.clone() for key, value in plain.model.state_dict().items()}
    clip = FixedClip()
    settings = SHORT | {"prompts": "one\ntwo", "steps": 1, "iterations": 1, "batch_size": 1, "micro_batch": 1}
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        out, recipe, name, grid, _ = run(
            nodes["SiDDistill"], model=model, clip=clip, latent_image=latent, **settings | {"checkpointing": True}
        )
    assert recipe.architecture == "stable-diffusion-xl-v1-base"
    assert grid.shape == (16, 8, 8, 3)
    assert out.patches.keys() >= model.patches.keys()
    plain.unpatch_model()
    model.unpatch_model()
    assert all(torch.equal(v.float(), before[key].float()) for key, v in plain.model.state_dict().items())


class FixedClip:
    """Prompts of SDXL's widths, by their length."""

    cond_stage_model = clone = add_patches = None

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        return conditioning(len(text))


SHORT = {
    "prompts": "\n".join(PROMPTS),
    "steps": 2,
    "iterations": 3,
    "rank": 4,
    "generator_lr": 1e-3,
    "fake_score_lr": 1e-3,
    "batch_size": 2,
    "micro_batch": 2,
    "checkpointing": False,
    "preview_every": 2,
}


@pytest.fixture
def places(tmp_path, monkeypatch, folders):
    """ComfyUI's folders for LoRAs and for a user's data, empty."""
    monkeypatch.setitem(folders.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folders, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folders, "get_input_directory", lambda: str(tmp_path))
    return tmp_path


def distil(nodes, demo, **settings):
    """As a queue runs it."""
    with torch.inference_mode():
        model, clip, vae, _, latent = demo
        given = {"model": model, "clip": clip, "vae": vae, "latent_image": latent} | SHORT | settings
        return run(nodes["SiDDistill"], **given)


@pytest.fixture
def demo(nodes):
    with torch.inference_mode():
        return run(nodes["SiDDemoModel"], batch_size=2)


def sampled(nodes, demo, model, recipe) -> torch.Tensor:
    with torch.inference_mode():
        asked = {"positive": encode(demo[1], PROMPTS[0]), "latent_image": demo[4], "seed": 1}
        return run(nodes["SiDFewStepSampler"], model=model, recipe=recipe, **asked)[0]["samples"]


def test_the_lora_that_it_writes_is_the_model_that_it_gives(nodes, pack, demo, places):
    before = sampled(nodes, demo, demo[0], demo[3])
    model, recipe, name, grid, losses = distil(nodes, demo)
    assert recipe.timesteps == (625, 312)
    assert grid.shape == (16, 256, 256, 3)
    assert losses.shape == (1, 384, 768, 3)
    found = sampled(nodes, demo, model, recipe)
    with torch.inference_mode():
        loaded, read, *_ = run(nodes["SiDLoRALoader"], model=demo[0], lora_name=name)
    assert torch.equal(sampled(nodes, demo, loaded, read), found)
    assert (found - sampled(nodes, demo, demo[0], recipe)).abs().max() > 1e-3
    assert torch.equal(sampled(nodes, demo, demo[0], demo[3]), before)  # the teacher is as it was
    generator, wanted = module(pack, "sid_train.models.families").load_generator(str(places / "loras" / name))
    cond = generator.conditioner.encode([PROMPTS[0]] * 2)
    latents = module(pack, "sid_train.sample").sample_latents(
        generator.denoiser, cond, generator.latent_shape, wanted, 1
    )
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-4)
    # Nothing is trained again, and no file is replaced.
    assert distil(nodes, demo)[2] == name
    assert distil(nodes, demo, name="other")[2] == "other-sid-2step-001.safetensors"
    (places / "loras" / "other-sid-2step-001.safetensors").rename(places / "loras" / "other-sid-2step-002.safetensors")
    assert distil(nodes, demo, name="other")[2] == "other-sid-2step-001.safetensors"
    assert len(list((places / "loras").iterdir())) == 3


@pytest.mark.parametrize("place", ["between iterations", "in a layer"])
def test_what_was_stopped_goes_on_to_the_same_lora(nodes, demo, places, monkeypatch, pack, place):
    """Wherever ComfyUI was asked to stop: it is after an iteration that it does."""
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    whole = distil(nodes, demo)[2]
    (finished,) = (places / "user" / "sid_distill").glob("*.safetensors")
    finished.unlink()
    told = []

    def show(node, text: str) -> None:
        told.append(text)
        if place == "between iterations" and text.startswith("2 of 3, "):
            interrupt_current_processing()

    def stop(*_) -> None:
        if place == "in a layer" and told and told[-1].startswith("1 of 3, "):
            interrupt_current_processing()

    layer = demo[0].model.diffusion_model.time_embed[0].register_forward_hook(stop)
    with monkeypatch.context() as patch:
        patch.setattr(module(pack, "nodes.distil"), "show", show)
        with pytest.raises(InterruptProcessingException):
            distil(nodes, demo)
    layer.remove()
    assert told[-1].startswith("Stopped after iteration 2 of 3; the same queue goes on.")
    (places / "loras" / whole).rename(places / "whole.safetensors")
    continued = distil(nodes, demo, micro_batch=1, checkpointing=True)[2]  # as the advice for too little memory says
    first, second = (load_file(path) for path in (places / "whole.safetensors", places / "loras" / continued))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=2e-3)  # an iteration of three with other sums
    (places / "loras" / continued).unlink()
    (finished.with_suffix(".txt")).unlink()
    for state in finished.parent.iterdir():
        state.unlink()
    again = distil(nodes, demo)[2]
    assert (places / "loras" / again).read_bytes() == (places / "whole.safetensors").read_bytes()


def test_the_same_settings_at_another_size_are_another_run(nodes, unet_file, places, graph):
    """And so is another noise schedule, or another teacher."""
    import comfy.sd

    noise = graph.VPSchedule
    found = set()
    for size, zero_snr, seed in ((8, False, 1), (16, False, 1), (8, True, 1), (8, False, 2)):
        model = comfy.sd.load_diffusion_model(str(unet_file), model_options={"dtype": torch.float32}).model
        told = [graph.conditioning_of(model, conditioning(seed), (4, size, size))]
        settings = graph.Settings(2, "none", 1, 4, 1e-4, 1e-4, 1, 1, 1, 0, checkpointing=False)
        schedule = noise.sdxl(zero_snr)
        run_of = graph.Distillation(model, {}, schedule, told, told[0], (4, size, size), settings, torch.device("cpu"))
        found.add(graph.identity_of(run_of, told))
        run_of.close()
    assert len(found) == 4


def test_what_autograd_cannot_use_is_known(pack):
    """A tensor of inference mode, also after its data were moved outside of it."""
    has_version = module(pack, "nodes.distil").has_version
    with torch.inference_mode():
        layer = torch.nn.Linear(2, 2)
    assert not has_version(layer.weight)
    layer.weight.data = torch.ones(2, 2)
    assert not has_version(layer.weight)
    assert has_version(torch.nn.Linear(2, 2).weight)


def test_only_a_network_alone_is_distilled(nodes, demo, places, model, pack):
    from comfy.patcher_extension import WrappersMP

    wrapped = demo[0].clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *args: executor(*args))
    replaced = demo[0].clone()
    replaced.set_model_attn2_replace(lambda *args: args, "middle", 0)
    for changed, message in ((wrapped, "network alone"), (replaced, "attention of its own")):
        with pytest.raises(ValueError, match=message):
            distil(nodes, demo, model=changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 3}, r"micro_batch: expected a number that divides batch_size \(2\), got 3"),
        ({"name": "../x"}, "name: expected"),
        ({"prompts": "//host/share/x.txt"}, "prompts: expected a path on this computer"),
        ({"prompts": "../secret.txt"}, "prompts: there is no file '../secret.txt' in ComfyUI's input folder"),
        ({"prompts": "a red dog"}, "does not know 'dog'"),
        ({"latent_image": {"samples": torch.zeros(1, 12, 16, 16)}}, "draws 256 x 256 only"),
        ({"generator_lr": 1.0, "fake_score_lr": 1.0, "iterations": 60}, "lower generator_lr and fake_score_lr"),
    ],
)
def test_mistakes(nodes, demo, places, settings, message):
    with pytest.raises(ValueError, match=message):
        distil(nodes, demo, **settings)
    for layer in demo[0].model.modules():
        assert not layer._forward_hooks
        assert "forward" not in vars(layer)


def test_prompts_of_a_file_and_of_the_demo(places, pack):
    distil_node, architectures = module(pack, "nodes.distil"), module(pack, "sid_train.core.architectures")
    (places / "mine.txt").write_text("a red two\n\na red two\na white three\n", encoding="utf-8-sig")
    seen = module(pack, "nodes.distil").SiDDistill.fingerprint_inputs
    before = seen(prompts="mine.txt")
    assert distil_node.prompts_of("mine.txt", architectures.DIGITS) == ["a red two", "a white three"]
    assert len(distil_node.prompts_of("", architectures.DIGITS)) == 150
    (places / "mine.txt").write_text("a red two\n")
    assert seen(prompts="mine.txt") != before
    assert seen(prompts="a red two") == seen(prompts=None) == seen(prompts="//host/x.txt") == ""
    with pytest.raises(ValueError, match="expected 1 to 4,096 lines, got 0"):
        distil_node.prompts_of(" ", architectures.SDXL)
