"""The loaders and the recipe nodes in this process: recipes, presets, LoRA names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import conditioning, empty_latent, module, run, text_of
from test_errors import conv_in_lora


class TestDiffusionModel:
    def test_recipe_comes_out_of_the_file(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), noise_mode="fixed", title="mine")
        name = put("diffusion_models", "mine.safetensors", tensors, recipe.to_metadata())
        model, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
        assert read == recipe
        assert model.get_model_object("model_sampling").sigmas.shape == (1000,)

    def test_file_without_a_recipe_takes_a_preset(self, nodes, put, tensors, recipes):
        name = put("diffusion_models", "dmd2.safetensors", tensors)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="DMD2 (4 steps)")
        assert read.timesteps == (999, 749, 499, 249)

    @pytest.mark.parametrize(
        ("file", "preset", "part"),
        [
            ("dmd2_sdxl_4step_unet_fp16", "DMD2 (4 steps)", "dmd2_sdxl_4step"),
            ("sd_xl_turbo_1.0_fp16", "Turbo (4 steps)", "sd_xl_turbo"),
        ],
    )
    def test_published_name_is_known_and_told(self, nodes, put, tensors, recipes, caplog, file, preset, part):
        name = put("diffusion_models", f"{file}.safetensors", tensors)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name)
        assert read == recipes.PRESETS[preset]
        assert f"It is sampled as '{preset}', for its name has '{part}'" in text_of(caplog)

    def test_content_and_header_are_known_and_told(
        self, pack, nodes, put, tensors, recipes, caplog, tmp_path, monkeypatch
    ):
        name = put("diffusion_models", "renamed.safetensors", tensors, {"modelspec.title": "sdxl turbo"})
        assert run(nodes["SiDDiffusionModelLoader"], unet_name=name)[1] == recipes.PRESETS["Turbo (4 steps)"]
        assert "sampled as 'Turbo (4 steps)', for its header has 'sdxl turbo' as modelspec.title" in text_of(caplog)
        published, file = module(pack, "sid_train.core.published"), tmp_path / "diffusion_models" / name
        monkeypatch.setattr(published, "SIZES", {file.stat().st_size})
        sha256 = module(pack, "sid_train.files.hashing").file_sha256(file)
        monkeypatch.setitem(published.FILES, sha256, ("tianweiy/DMD2", "dmd2_sdxl_4step_unet_fp16"))
        assert run(nodes["SiDDiffusionModelLoader"], unet_name=name)[1] == recipes.PRESETS["DMD2 (4 steps)"]
        assert "for its content is that of dmd2_sdxl_4step_unet_fp16 in tianweiy/DMD2" in text_of(caplog)

    def test_recipe_in_the_file_counts_before_its_name(self, nodes, put, tensors, recipes, caplog):
        name = put("diffusion_models", "sdxl-turbo.safetensors", tensors, recipes.SiDRecipe().to_metadata())
        for choice in ("auto", "from the file"):  # the second is what workflows had before there was the first
            assert run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe=choice)[1] == recipes.SiDRecipe()
        assert "its name has" not in text_of(caplog)

    def test_from_the_file_takes_nothing_but_the_file(self, nodes, put, tensors):
        name = put("diffusion_models", "sdxl-turbo.safetensors", tensors)
        with pytest.raises(ValueError, match=r"sampled\. Set 'recipe' to 'auto' \(Turbo"):
            run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="from the file")

    def test_preset_that_replaces_a_recipe_says_so(self, nodes, put, tensors, recipes, caplog):
        name = put("diffusion_models", "mine.safetensors", tensors, recipes.SiDRecipe().to_metadata())
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="SiD 999 (4 steps)")
        assert read.t_init == 999
        assert "replaces the file's own recipe (timesteps 625 468 312 156" in text_of(caplog)

    def test_v_prediction(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), prediction_type="v_prediction")
        metadata = recipe.to_metadata()
        right = put("diffusion_models", "right.safetensors", tensors | {"v_pred": torch.zeros(0)}, metadata)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=right)
        assert read == recipe

    def test_preset_takes_the_prediction_type_from_the_model(self, nodes, put, tensors):
        """A merge of a v-prediction fine-tune carries no recipe, and no preset is made for it."""
        tensors = tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
        name = put("diffusion_models", "merge.safetensors", tensors)
        _, read = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="LCM (4 steps)")
        assert (read.prediction_type, read.zero_terminal_snr) == ("v_prediction", True)
        assert read.timesteps == (999, 759, 499, 259)

    def test_preset_in_place_of_a_recipe_that_cannot_be_read(self, nodes, put, tensors, recipes, caplog):
        metadata = recipes.SiDRecipe().to_metadata() | {"sid.format_version": "99"}
        name = put("diffusion_models", "newer.safetensors", tensors, metadata)
        run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="SiD 625 (4 steps)")
        assert "replaces the file's own recipe, which cannot be read" in text_of(caplog)

    def test_zero_terminal_snr(self, nodes, put, tensors, recipes):
        recipe = replace(recipes.SiDRecipe(), prediction_type="v_prediction", zero_terminal_snr=True)
        v_pred, ztsnr = {"v_pred": torch.zeros(0)}, {"ztsnr": torch.zeros(0)}
        right = put("diffusion_models", "right.safetensors", tensors | v_pred | ztsnr, recipe.to_metadata())
        assert run(nodes["SiDDiffusionModelLoader"], unet_name=right)[1] == recipe


def test_recipe_whose_other_metadata_was_rewritten(nodes, put, tensors, recipes):
    metadata = {k: v for k, v in recipes.SiDRecipe().to_metadata().items() if k.startswith("sid.")}
    for more in ({}, {"modelspec.architecture": "Pony", "modelspec.title": ""}):
        name = put("diffusion_models", "managed.safetensors", tensors, metadata | more)
        assert run(nodes["SiDDiffusionModelLoader"], unet_name=name)[1] == recipes.SiDRecipe()


@pytest.mark.parametrize(
    "said", [("modelspec.predict_key", "v"), ("modelspec.prediction_type", "v"), ("ss_v_parameterization", "True")]
)
def test_file_that_only_says_that_it_is_v_prediction(nodes, put, tensors, recipes, caplog, said):
    """ComfyUI takes it for eps; with the cure that the message names it is sampled as it says."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    name = put("diffusion_models", "v.safetensors", tensors, dict([said]))
    model, recipe = run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="LCM (4 steps)")
    assert (
        f"its header says v_prediction ({said[0]} is {said[1]!r}), but ComfyUI loaded the model as epsilon"
        in text_of(caplog)
    )
    (cured,) = ModelSamplingDiscrete().patch(model, "v_prediction", False)
    (recipe,) = run(nodes["SiDRecipeOverride"], preset="LCM (4 steps)", model=cured)
    assert recipe.prediction_type == "v_prediction"
    assert len(run(nodes["SiDScheduler"], model=cured, recipe=recipe)[0]) == 5


def test_header_that_agrees_says_nothing(nodes, put, tensors, caplog):
    for said in ({"modelspec.predict_key": "epsilon"}, {"ss_v_parameterization": "False"}, {"other": "v"}):
        name = put("diffusion_models", "eps.safetensors", tensors, said)
        run(nodes["SiDDiffusionModelLoader"], unet_name=name, recipe="LCM (4 steps)")
    assert text_of(caplog) == ""


def test_tensors_that_are_not_used_are_counted(nodes, put, tensors, recipes, caplog):
    more = {f"elsewhere.{i}.weight": torch.zeros(1) for i in (1, 2)}
    name = put("diffusion_models", "more.safetensors", tensors | more, recipes.SiDRecipe().to_metadata())
    run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    told = "2 tensors of the file belong to no part of this UNet and are not used; the first is elsewhere.1.weight"
    assert told in text_of(caplog)


def scaled_fp8(tensors: dict, layers: str, ends: tuple[str, str]) -> dict:
    """``tensors`` with the matrices of ``layers`` in fp8, and beside them their scale and a scale of the input."""
    made = dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim == 2 and name.startswith(layers):
            scale = weight.float().abs().max() / 448
            made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            made |= {module + end: torch.tensor(float(v)) for end, v in zip(ends, (scale, 0.5), strict=False)}
    return made


@pytest.mark.parametrize(
    ("layers", "ends", "marker"),
    [
        ("", [".scale_weight"], torch.zeros(0, dtype=torch.float8_e4m3fn)),
        ("", [".scale_weight", ".scale_input"], torch.zeros(0, dtype=torch.float8_e4m3fn)),
        ("input_blocks.3", [".scale_weight"], torch.zeros(2, dtype=torch.float8_e4m3fn)),
        ("", [".weight_scale"], None),
        ("input_blocks.3", [".weight_scale", ".input_scale"], None),
    ],
    ids=["all layers", "inputs too", "some layers", "by its header", "some layers by its header"],
)
def test_scaled_weights_are_loaded_as_comfyui_loads_them(
    nodes, put, tensors, recipes, model, caplog, layers, ends, marker
):
    import comfy.ops

    metadata = recipes.SiDRecipe().to_metadata()
    made = scaled_fp8(tensors, layers, ends)
    if marker is None:
        if not hasattr(comfy.ops, "mixed_precision_ops"):
            pytest.skip("this ComfyUI does not read such headers")
        scaled = {name.removesuffix(ends[0]): {"format": "float8_e4m3fn"} for name in made if name.endswith(ends[0])}
        metadata["_quantization_metadata"] = json.dumps({"layers": scaled})
    else:
        made["scaled_fp8"] = marker
    loaded, recipe = run(
        nodes["SiDDiffusionModelLoader"], unet_name=put("diffusion_models", "f.safetensors", made, metadata)
    )
    assert text_of(caplog) == ""
    if ".scale_input" in ends or ".input_scale" in ends:
        return  # made up: what the network computes with it means nothing
    inputs = {"positive": conditioning(1), "latent_image": empty_latent(1, 8), "recipe": recipe, "seed": 0, "steps": 1}
    ours = run(nodes["SiDFewStepSampler"], model=loaded, **inputs)[0]["samples"]
    plain = run(nodes["SiDFewStepSampler"], model=model, **inputs)[0]["samples"]
    assert (ours - plain).norm() < 0.5 * plain.norm()


def test_scaled_weights_without_their_own_tensor_are_refused(nodes, put, tensors, recipes):
    made = scaled_fp8(tensors, "", (".scale_weight",)) | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    del made["input_blocks.3.1.proj_out.weight"]
    name = put("diffusion_models", "f.safetensors", made, recipes.SiDRecipe().to_metadata())
    with pytest.raises(
        ValueError, match=r"tensors of this UNet, but 1 are missing; the first is input_blocks.3.1.proj_out"
    ):
        run(nodes["SiDDiffusionModelLoader"], unet_name=name)


def test_names_that_comfyui_reads_are_not_called_missing(nodes, put, tensors, recipes, caplog):
    """With a checkpoint's prefix, and after conversion to diffusers' names as far as they go."""
    whole = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    name = put("diffusion_models", "prefixed.safetensors", whole, recipes.SiDRecipe().to_metadata())
    run(nodes["SiDDiffusionModelLoader"], unet_name=name)
    assert text_of(caplog) == ""


def test_lora_for_other_input_channels_is_applied_without_them(nodes, put, tensors, lora, recipes, caplog):
    first = tensors["input_blocks.0.0.weight"]
    inpainting = tensors | {"input_blocks.0.0.weight": torch.cat([first, first[:, :1].repeat(1, 5, 1, 1)], dim=1)}
    unet = put("diffusion_models", "inpainting.safetensors", inpainting)
    model, _ = run(nodes["SiDDiffusionModelLoader"], unet_name=unet, recipe="LCM (4 steps)")
    name = put("loras", "lora.safetensors", lora | conv_in_lora(4))
    patched, _ = run(nodes["SiDLoRALoader"], model=model, lora_name=name, recipe="LCM (4 steps)", allow_partial=True)
    assert len(patched.patches) == len(lora) // 3
    assert "its weight for conv_in is for a UNet of 4 input channels, and this model has 9" in text_of(caplog)


def test_checkpoint_without_text_encoders_says_so(nodes, put, tensors, recipes, caplog):
    tensors = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    name = put("checkpoints", "unet-only.safetensors", tensors, recipes.SiDRecipe().to_metadata())
    assert run(nodes["SiDCheckpointLoader"], ckpt_name=name)[1] is None
    assert "The file has no text encoders: take CLIP from another checkpoint" in text_of(caplog)


class TestLoRA:
    def test_every_module_is_applied(self, nodes, model, put, lora, recipes):
        name = put("loras", "sid.safetensors", lora, recipes.SiDRecipe().to_metadata())
        patched, recipe = run(nodes["SiDLoRALoader"], model=model, lora_name=name)
        assert recipe == recipes.SiDRecipe()
        assert len(patched.patches) == len(lora) // 3
        assert not model.patches
        inputs = {"positive": conditioning(1), "latent_image": empty_latent(), "recipe": recipe, "seed": 0}
        plain = run(nodes["SiDFewStepSampler"], model=model, **inputs)[0]["samples"]
        other = run(nodes["SiDFewStepSampler"], model=patched, **inputs)[0]["samples"]
        again = run(nodes["SiDFewStepSampler"], model=model, **inputs)[0]["samples"]
        assert (plain - other).abs().max() > 1e-2
        assert torch.equal(plain, again)

    def test_partial_match(self, nodes, model, put, lora, recipes, caplog):
        extra = {
            "lora_unet_elsewhere.lora_up.weight": torch.ones(4, 4),
            "lora_unet_elsewhere.lora_down.weight": torch.ones(4, 4),
        }
        name = put("loras", "partial.safetensors", lora | extra, recipes.SiDRecipe().to_metadata())
        patched, _ = run(nodes["SiDLoRALoader"], model=model, lora_name=name, allow_partial=True)
        assert len(patched.patches) == len(lora) // 3
        told = f"applied in part: 2 of its {len(lora) + 2} tensors match nothing in this model: lora_unet_elsewhere"
        assert told in text_of(caplog)

    def test_text_encoders_are_left_alone(self, nodes, model, put, lora, recipes, caplog):
        extra = {f"lora_te1_text_model_encoder.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}
        name = put("loras", "with-text.safetensors", lora | extra, recipes.SiDRecipe().to_metadata())
        patched, _ = run(nodes["SiDLoRALoader"], model=model, lora_name=name)
        assert len(patched.patches) == len(lora) // 3
        assert "2 tensors of the LoRA are for text encoders: connect 'clip' to use them" in text_of(caplog)

    def test_other_kinds_of_adapters(self, nodes, model, put, lora, recipes, caplog):
        """LoHa: what ComfyUI reads is taken, and nothing of it is called missing."""
        tensors = {}
        for key, down in lora.items():
            if key.endswith(".lora_down.weight"):
                module = key.removesuffix(".lora_down.weight")
                up = lora[f"{module}.lora_up.weight"]
                for part in ("w1", "w2"):
                    tensors |= {f"{module}.hada_{part}_a": up.clone(), f"{module}.hada_{part}_b": down.clone()}
        name = put("loras", "loha.safetensors", tensors, recipes.SiDRecipe().to_metadata())
        patched, _ = run(nodes["SiDLoRALoader"], model=model, lora_name=name)
        assert len(patched.patches) == len(lora) // 3
        assert text_of(caplog) == ""

    def test_a_preset_takes_the_prediction_type_of_the_model(self, nodes, v_model, put, lora):
        name = put("loras", "v.safetensors", lora)
        _, recipe = run(nodes["SiDLoRALoader"], model=v_model, lora_name=name, recipe="DMD2 (4 steps)")
        assert recipe.prediction_type == "v_prediction"


LINEAR, CONV = "input_blocks.3.1.proj_in", "input_blocks.3.0.in_layers.2"


def adapters(tensors: dict) -> dict[str, tuple[str, dict]]:
    """For each kind that ComfyUI reads: the module, and small tensors that fit it, by the ends of their names."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int):
        return torch.randn(shape, generator=generator) * 0.1

    (o, i), (co, ci, h, w) = tensors[f"{LINEAR}.weight"].shape, tensors[f"{CONV}.weight"].shape
    alpha, low = torch.tensor(2.0), {"lora_up.weight": made(o, 2), "lora_down.weight": made(2, i)}
    conv = {"lora_up.weight": made(co, 2, 1, 1), "lora_down.weight": made(2, ci, h, w)}
    core = {"lora_up.weight": made(co, 2, 1, 1), "lora_mid.weight": made(2, 2, h, w)}
    hada = {f"hada_w{n}_a": made(o, 2) for n in (1, 2)} | {f"hada_w{n}_b": made(2, i) for n in (1, 2)}
    tucker = {f"hada_w{n}_a": made(2, co) for n in (1, 2)} | {f"hada_w{n}_b": made(2, ci) for n in (1, 2)}
    older = {"a1.weight": made(2, i), "a2.weight": made(i, 2), "b1.weight": made(2, i), "b2.weight": made(o, 2)}
    newer = {"a1.weight": made(ci, 3), "a2.weight": made(3, ci), "b1.weight": made(co, 3), "b2.weight": made(3, 9 * ci)}
    return {
        "a difference": (LINEAR, {"diff": made(o, i)}),
        "a difference of a convolution": (CONV, {"diff": made(co, ci, h, w)}),
        "a weight that is set": (LINEAR, {"set_weight": made(o, i)}),
        "a difference of a bias": (LINEAR, {"diff_b": made(o)}),
        "a norm": ("input_blocks.3.0.in_layers.0", {"w_norm": made(ci), "b_norm": made(ci)}),
        "LoRA with a core": (CONV, core | {"lora_down.weight": made(2, ci, 1, 1)}),
        "LoRA of a given shape": (LINEAR, low | {"reshape_weight": torch.tensor([o, i])}),
        "DoRA": (LINEAR, low | {"dora_scale": made(o, 1) + 1}),
        "DoRA over columns": (LINEAR, low | {"dora_scale": made(1, i) + 1}),
        "DoRA of a convolution": (CONV, conv | {"dora_scale": made(co, 1, 1, 1) + 1}),
        "LoHa": (LINEAR, hada | {"alpha": alpha}),
        "LoHa of a convolution": (CONV, tucker | {"hada_t1": made(2, 2, h, w), "hada_t2": made(2, 2, h, w)}),
        "LoKr": (LINEAR, {"lokr_w1": made(4, 4), "lokr_w2": made(o // 4, i // 4)}),
        "LoKr in factors": (
            LINEAR,
            {
                "lokr_w1_a": made(4, 2),
                "lokr_w1_b": made(2, 4),
                "lokr_w2_a": made(o // 4, 2),
                "lokr_w2_b": made(2, i // 4),
            },
        ),
        "LoKr of a convolution": (CONV, {"lokr_w1": made(4, 4), "lokr_w2": made(co // 4, ci // 4, h, w)}),
        "GLoRA": (LINEAR, older),
        "newer GLoRA of a convolution": (CONV, newer | {"alpha": alpha}),
        "OFT": (LINEAR, {"oft_blocks": made(4, o // 4, o // 4), "alpha": alpha}),
        "BOFT": (CONV, {"oft_blocks": made(2, co // 8, 8, 8), "alpha": alpha}),
    }


def changed(end: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same tensor with a line more along its first and its last axis."""
    if end == "reshape_weight":
        return [tensor + 1]
    axes = {0, tensor.ndim - 1} if tensor.ndim else ()
    return [torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis) for axis in axes]


def test_every_kind_of_adapter_is_applied_or_refused(nodes, model, put, tensors, caplog):
    """ComfyUI itself says which fit: of others it logs a line and leaves the weight as it is, or fails while it
    samples.
    """
    import comfy.lora

    keys, refused = comfy.lora.model_lora_keys_unet(model.model, {}), set()

    def named(target: str, made: dict) -> dict:
        return {f"lora_unet_{target.replace('.', '_')}.{end}": tensor for end, tensor in made.items()}

    def load(target: str, made: dict):
        name = put("loras", "adapter.safetensors", named(target, made))
        return run(nodes["SiDLoRALoader"], model=model, lora_name=name, recipe="LCM (4 steps)")[0]

    def comfyui_applies(target: str, made: dict) -> bool:
        for key, patch in comfy.lora.load_lora(named(target, made), keys, log_missing=False).items():
            weight = tensors[key.removeprefix("diffusion_model.")].float()
            try:
                result = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), key)
            except (RuntimeError, ValueError, UnboundLocalError):
                return False
            if result.shape != weight.shape or torch.equal(result, weight):
                return False
        return True

    for kind, (target, made) in adapters(tensors).items():
        assert comfyui_applies(target, made), kind
        assert load(target, made).patches, kind
        assert "ERROR" not in text_of(caplog), kind
        for end, tensor in made.items():
            for other in changed(end, tensor):
                if comfyui_applies(target, made | {end: other}):
                    assert load(target, made | {end: other}).patches, (kind, end)
                    continue
                refused.add((kind, end))
                with pytest.raises(
                    ValueError, match=rf"adapter.safetensors: expected a LoRA .*{target}.*another model"
                ):
                    load(target, made | {end: other})
        assert {end for of_kind, end in refused if of_kind == kind} == made.keys() - {"alpha"}, kind
        caplog.clear()
    with pytest.raises(ValueError, match="got a BOFT of"):  # without its alpha ComfyUI cannot apply it
        load(CONV, {"oft_blocks": made["oft_blocks"]})
    with pytest.raises(ValueError, match=r"has one for diffusion_model.*to_q.bias, which the model does not have"):
        load("input_blocks.3.1.transformer_blocks.0.attn1.to_q", {"diff_b": torch.ones(3)})


class TestRecipeNodes:
    def test_a_preset_takes_the_prediction_type_of_the_model(self, nodes, v_model, recipes):
        (recipe,) = run(nodes["SiDRecipeOverride"], preset="DMD2 (4 steps)", model=v_model)
        assert recipe == replace(recipes.PRESETS["DMD2 (4 steps)"], prediction_type="v_prediction")
        (sigmas,) = run(nodes["SiDScheduler"], model=v_model, recipe=recipe)
        assert len(sigmas) == 5

    def test_override(self, nodes, recipes):
        (preset,) = run(nodes["SiDRecipeOverride"], preset="LCM (4 steps)")
        assert preset == recipes.PRESETS["LCM (4 steps)"]
        (changed,) = run(nodes["SiDRecipeOverride"], recipe=preset, timesteps="999, 499", noise_mode="ddim")
        assert (changed.timesteps, changed.t_init, changed.ladder, changed.noise_mode) == (
            (999, 499),
            999,
            "sid",
            "ddim",
        )
        (guided,) = run(nodes["SiDRecipeOverride"], recipe=preset, guidance="cfg", cfg=2.0)
        assert (guided.sampling_guidance, guided.sampling_cfg) == ("cfg", 2.0)
        # Prompts that were made before there was this input do not have it.
        inputs = {i.id: i for i in nodes["SiDRecipeOverride"].define_schema().inputs}
        assert inputs["unit_variance_start"].optional
        for choice, has in (("keep", True), ("yes", True), ("no", False)):
            (started,) = run(nodes["SiDRecipeOverride"], recipe=preset, unit_variance_start=choice)
            assert started == replace(preset, unit_variance_start=has)

    def test_info(self, nodes, recipes):
        (text,) = run(nodes["SiDRecipeInfo"], recipe=recipes.SiDRecipe())
        assert "625 468 312 156" in text
        assert "2.5017 1.4553 0.8680 0.4696" in text


TEXT_SPELLINGS = {
    "kohya": ("lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("text_encoder{place}.text_model.encoder.layers.0.self_attn.q_proj", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": (
        "text_encoder{place}.text_model.encoder.layers.0.self_attn.q_proj",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
}


def test_the_part_for_text_encoders_is_applied_whole(nodes, put, model, recipes, lora, caplog):
    """In every spelling the same, and left out aloud where no CLIP is connected."""
    from small_models import initialise, small_clip

    _, clip = small_clip("SDXL")
    initialise(clip.cond_stage_model, seed=0)
    rng, encoded = torch.Generator().manual_seed(1), {}
    factors = {number: (torch.randn(2, 64, generator=rng), torch.randn(64, 2, generator=rng)) for number in (1, 2)}
    for spelling, (module_name, down, up) in TEXT_SPELLINGS.items():
        text = {}
        for number, pair in factors.items():
            name = module_name.format(number=number, place="" if number == 1 else "_2")
            text |= {name + down: pair[0], name + up: pair[1]}
        file = put("loras", f"{spelling}.safetensors", lora | text, recipes.SiDRecipe().to_metadata())
        *_, patched = run(nodes["SiDLoRALoader"], model=model, lora_name=file, clip=clip)
        assert len(patched.patcher.patches) == 2
        encoded[spelling] = patched.encode_from_tokens(patched.tokenize("a cat"))
    assert not text_of(caplog)
    plain = clip.encode_from_tokens(clip.tokenize("a cat"))
    assert (encoded["kohya"] - plain).abs().max() > 1e-2
    for spelling in ("peft", "diffusers"):
        torch.testing.assert_close(encoded[spelling], encoded["kohya"], rtol=1e-3, atol=1e-4)
    assert len(run(nodes["SiDLoRALoader"], model=model, lora_name=file)) == 2
    assert "4 tensors of the LoRA are for text encoders: connect 'clip' to use them" in text_of(caplog)
    strange = {f"lora_te1_elsewhere.lora_{way}.weight": torch.ones(2, 2) for way in ("up", "down")}
    file = put("loras", "strange.safetensors", lora | strange, recipes.SiDRecipe().to_metadata())
    with pytest.raises(ValueError, match=r"2 of its \d+ tensors match nothing in this model: lora_te1_elsewhere"):
        run(nodes["SiDLoRALoader"], model=model, lora_name=file, clip=clip)
    with pytest.raises(ValueError, match="clip: expected a CLIP, got a value of type dict"):
        run(nodes["SiDLoRALoader"], model=model, lora_name=file, clip={})
