"""SDXL teachers: a small random one in every form it comes in, held against diffusers' own pipeline."""

from __future__ import annotations

import gc
import json
import os
import socket
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small_sdxl import save_single_file, small_pipeline

from sid_train.core.rng import BatchRNG
from sid_train.data.config import DataConfig
from sid_train.data.rows import load_prompt_table
from sid_train.files.tensors import LazyTensor
from sid_train.models.families import load_model, open_model
from sid_train.models.stable_diffusion.kinds import SDXL_KIND
from sid_train.models.stable_diffusion.networks import build_text, read_unet, read_vae
from sid_train.models.stable_diffusion.parts import HUB_FILES

PROMPTS = ["a lighthouse at dawn, 35mm", "", "Ünïcode, a cat's 3 hats!", "word " * 100]
SIZE = 64


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def file(pipeline, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("sdxl") / "small-xl.safetensors", pipeline)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "small-xl"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(params=["file", "folder"])
def source(request) -> str:
    return str(request.getfixturevalue(request.param))


def test_every_weight_is_that_of_the_pipeline(source, pipeline):
    bundle = load_model(source, resolution=SIZE)
    encoders = bundle.conditioner._load()
    for ours, theirs in (
        (bundle.denoiser.unet, pipeline.unet),
        (bundle.codec.vae, pipeline.vae),
        (encoders[0], pipeline.text_encoder),
        (encoders[1], pipeline.text_encoder_2),
    ):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in state)


def test_embeddings_equal_those_of_the_pipeline(source, pipeline):
    bundle = load_model(source, resolution=SIZE)
    bundle.conditioner.max_tokens = 75  # where the pipeline cuts
    cond = bundle.conditioner.encode(PROMPTS)
    with torch.no_grad():
        text, empty, pooled, empty_pooled = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=True, negative_prompt=[""] * len(PROMPTS)
        )
    torch.testing.assert_close(cond.text, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cond.pooled, pooled, rtol=1e-5, atol=1e-5)
    expected = pipeline._get_add_time_ids((SIZE, SIZE), (0, 0), (SIZE, SIZE), torch.float32, 64)
    assert torch.equal(cond.time_ids, expected.expand(len(PROMPTS), -1))
    unconditional = bundle.unconditional("empty")
    torch.testing.assert_close(unconditional.text, empty[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unconditional.pooled, empty_pooled[:1], rtol=1e-5, atol=1e-5)
    zeros = bundle.unconditional("zeros")
    assert not zeros.text.any()
    assert not zeros.pooled.any()
    assert torch.equal(zeros.time_ids, unconditional.time_ids)


def test_latents_and_pictures_equal_the_pipelines(source, pipeline):
    codec = load_model(source, resolution=SIZE).codec
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        pictures = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(codec.encode(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(expected), pictures, rtol=1e-4, atol=1e-4)


def test_denoiser_equals_diffusers_prediction(source, pipeline):
    bundle = load_model(source, resolution=SIZE)
    cond = bundle.conditioner.encode(PROMPTS[:2])
    x0 = torch.randn(2, *bundle.latent_shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, *bundle.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([625, 156])
    scheduler = pipeline.scheduler
    noisy = scheduler.add_noise(x0, noise, t)
    with torch.no_grad():
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        eps = pipeline.unet(noisy, t, cond.text, added_cond_kwargs=added).sample
        sigma = bundle.denoiser.schedule.sigma(t)
        ours = bundle.denoiser(x0 + sigma.reshape(-1, 1, 1, 1) * noise, sigma, cond)
    abar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    expected = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


SMALLER = {  # in what these differ from SDXL, at the size of a test
    "SSD-1B": {
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[2, 3], [2, 1], 1],
    },
    "Vega": {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": (1, 1, 2)},
    "KOALA-700M": {"mid_block_type": None},
    "KOALA-1B": {"transformer_layers_per_block": (1, 2, 3)},
}


@pytest.mark.parametrize("name", SMALLER)
def test_smaller_relatives_are_teachers(name, tmp_path):
    """The network and its discriminator, from a file and from a folder."""
    pipeline = small_pipeline(**SMALLER[name])
    pipeline.save_pretrained(tmp_path / "folder")
    rng = torch.Generator().manual_seed(0)
    for source in (save_single_file(tmp_path / "file.safetensors", pipeline), tmp_path / "folder"):
        bundle = load_model(str(source), resolution=SIZE)
        state = bundle.denoiser.unet.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
        cond, x = bundle.conditioner.encode(["a cat"]), torch.randn(1, *bundle.latent_shape, generator=rng)
        with torch.no_grad():
            x0, together = bundle.denoiser.denoise_with_logits(x, torch.ones(1), cond)
            assert torch.equal(bundle.denoiser.logits(x, torch.ones(1), cond), together)
            added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
            t = bundle.denoiser.schedule.timestep(torch.ones(1))
            eps = pipeline.unet(x / 2**0.5, t, cond.text, added_cond_kwargs=added).sample
        torch.testing.assert_close(x0, x - eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file(pipeline, tmp_path, dtype):
    path = save_single_file(tmp_path / "half.safetensors", pipeline, dtype)
    bundle = load_model(str(path), dtype=torch.bfloat16, resolution=SIZE)
    assert {p.dtype for p in bundle.denoiser.parameters()} == {torch.bfloat16}
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(bundle.denoiser.unet.state_dict()[name], tensor.to(dtype).to(torch.bfloat16))


def test_v_prediction_and_zero_terminal_snr(tmp_path):
    path = save_single_file(tmp_path / "v.safetensors", small_pipeline(prediction_type="v_prediction"))
    bundle = load_model(str(path), resolution=SIZE)
    assert (bundle.denoiser.schedule.prediction_type, bundle.zero_terminal_snr) == ("v_prediction", False)
    save_file(load_file(path) | {"ztsnr": torch.zeros(0)}, path)
    bundle = load_model(str(path), resolution=SIZE)
    assert bundle.zero_terminal_snr
    assert bundle.denoiser.schedule.sigmas[-1] > 1000


def test_unet_without_text_encoders_says_so_when_they_are_needed(file, tmp_path):
    path = tmp_path / "unet.safetensors"
    prefix = "model.diffusion_model."
    save_file({k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}, path)
    bundle = load_model(str(path), resolution=SIZE)
    with pytest.raises(ValueError, match=r"unet.safetensors: expected CLIP-L under conditioner.*sid_train encode"):
        bundle.conditioner.encode(["a cat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: torch.zeros(64, 2048) if "attn2" in k else v for k, v in t.items() if "label_emb" not in k},
            "label_emb.* .*got a UNet without them",
        ),
        (
            lambda t: {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
            "expected tensors such as input_blocks.0.0.weight",
        ),
        (
            lambda t: t | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)},
            "expected 4 input channels, as SD 1.x, 2.x and SDXL have, got 9",
        ),
    ],
)
def test_files_that_are_not_sdxl(file, tmp_path, change, message):
    path = tmp_path / "wrong.safetensors"
    save_file(change(load_file(file)), path)
    with pytest.raises(ValueError, match=rf"wrong.safetensors: .*{message}"):
        load_model(str(path), resolution=SIZE)


# -- every tensor is checked ----------------------------------------------------------------------------------------

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
READERS = {
    UNET: lambda tensors: read_unet(tensors, "x.safetensors", UNET),
    VAE: lambda tensors: read_vae(tensors, "x.safetensors", VAE),
    CLIP_L: lambda tensors: build_text(SDXL_KIND.encoders[0], tensors, None, "x.safetensors", CLIP_L),
    CLIP_G: lambda tensors: build_text(SDXL_KIND.encoders[1], tensors, None, "x.safetensors", CLIP_G),
}
ONE_TENSOR = {
    UNET: "middle_block.1.norm.weight",
    VAE: "decoder.mid.attn_1.q.weight",
    CLIP_L: "text_model.encoder.layers.1.mlp.fc2.bias",
    CLIP_G: "transformer.resblocks.1.attn.in_proj_weight",
}


@pytest.fixture(scope="module")
def single(file) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("network", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "expected .* tensors, but 1 are missing, such as {prefix}{name}"),
        ("unexpected", "1 (that|tensors).* do not belong to such a network, such as .*extra.weight"),
        ("misshapen", r"1 tensors have other shapes .*{name}: expected .*, got .*x7"),
        ("int8", r"1 tensors are no floating-point numbers, such as {prefix}{name} \(int8\)"),
        ("scaled", r"scaled or quantised weights \(1 tensors such as .*scale_weight\) are not read"),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_named(single, network, change, message):
    tensors = {k.removeprefix(network): t for k, t in single.items() if k.startswith(network)}
    READERS[network](tensors)
    name = ONE_TENSOR[network]
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["text_model.extra.weight" if network == CLIP_L else "extra.weight"] = LazyTensor.of(torch.zeros(1))
    elif change == "misshapen":
        tensors[name] = LazyTensor.of(torch.zeros(*tensors[name].shape, 7))
    elif change == "int8":
        tensors[name] = LazyTensor.of(torch.zeros(tensors[name].shape, dtype=torch.int8))
    else:
        tensors[f"{name.rpartition('.')[0]}.scale_weight"] = LazyTensor.of(torch.ones(1))
    with pytest.raises(ValueError, match="^x.safetensors: .*" + message.format(prefix=network, name=name)):
        READERS[network](tensors)


@pytest.mark.parametrize("network", READERS)
def test_sizes_that_make_no_network_are_one_line(single, network):
    """Tensors without elements may have any size: nothing of it is allocated."""
    tensors = {k.removeprefix(network): t for k, t in single.items() if k.startswith(network)}
    for name, tensor in tensors.items():
        sizes = (10**12, *[0] * (len(tensor.shape) - 1))
        absurd = LazyTensor(sizes, torch.float32, lambda: pytest.fail("nothing is to be read"))
        with pytest.raises(ValueError, match=r"^x.safetensors: [^\n]*$"):
            READERS[network](tensors | {name: absurd})
        if len(name) % 7:  # a few of them
            break


def test_weights_that_are_not_finite_are_named_by_their_file(file, tmp_path):
    tensors, path = load_file(file), tmp_path / "nan.safetensors"
    needed = {
        "model.diffusion_model.out.2.bias": lambda: load_model(str(path)),
        "first_stage_model.decoder.conv_in.bias": lambda: load_model(str(path), None).codec.vae,
        "conditioner.embedders.1.model.ln_final.weight": lambda: load_model(str(path), None).conditioner.encode(["a"]),
    }
    for name in needed:
        tensors[name][1] = float("nan")
    save_file(tensors, path)
    for name, load in needed.items():
        with pytest.raises(ValueError, match=rf"nan.safetensors: tensor {name}: expected finite numbers, but 1 of"):
            load()


def test_check_reads_all_headers(source):
    model = open_model(source)
    model.check()
    model.unet_config = model.unet_config | {"cross_attention_dim": 192}
    with pytest.raises(ValueError, match=r"its UNet needs embeddings of 192 .*the text encoders give 64 \+ 64"):
        model.check(codec=False)


def test_what_is_not_needed_may_be_incomplete(file, tmp_path):
    tensors, path = load_file(file), tmp_path / "incomplete.safetensors"
    missing = {"codec": f"{VAE}quant_conv.bias", "text": f"{CLIP_L}text_model.final_layer_norm.bias"}
    for name in missing.values():
        del tensors[name]
    save_file(tensors, path)
    model = open_model(str(path))
    model.check(text=False, codec=False)
    for needed, name in missing.items():
        with pytest.raises(ValueError, match=rf"incomplete.safetensors: .*1 are missing, such as {name}"):
            model.check(**{"text": False, "codec": False} | {needed: True})


# -- what is said of the prediction type ------------------------------------------------------------------------------


def test_prediction_type_of_the_header_and_of_the_configuration(file, tmp_path):
    path = tmp_path / "said.safetensors"
    save_file(load_file(file), path, {"modelspec.prediction_type": "v"})
    assert load_model(str(path), None).denoiser.schedule.prediction_type == "v_prediction"
    with pytest.raises(
        ValueError, match=r"modelspec.prediction_type in its header says so.*model.prediction_type says"
    ):
        load_model(str(path), prediction_type="epsilon")
    assert load_model(str(file), None).denoiser.schedule.prediction_type == "epsilon"
    bundle = load_model(str(file), None, prediction_type="v_prediction")
    assert bundle.denoiser.schedule.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="the demo's model predicts epsilon"):
        load_model("demo", prediction_type="v_prediction")


@pytest.mark.parametrize("marker", ["edm_vpred.sigma_max", "edm_mean"])
def test_other_kinds_of_models_are_refused(file, tmp_path, marker):
    save_file(load_file(file) | {marker: torch.ones(1)}, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match=rf"edm.safetensors: it is an EDM model \(tensor {marker}"):
        open_model(str(tmp_path / "edm.safetensors"))


# -- folders get the checks of files --------------------------------------------------------------------------------


@pytest.fixture
def changed(folder, tmp_path) -> Path:
    """The folder again, its files linked: to be replaced or removed, not to be written into."""
    copy = tmp_path / "changed"
    for path in folder.rglob("*.*"):
        if path.is_file():
            place = copy / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)
    return copy


def set_json(path: Path, **values: object) -> None:
    settings = json.loads(path.read_text()) | values
    path.unlink()
    path.write_text(json.dumps(settings))


def set_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    path.unlink()
    save_file(change(tensors), path)


def test_the_fp16_variant_is_read_whole(changed, pipeline):
    for path in changed.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    model = open_model(str(changed))
    model.check()
    assert {name.split(".")[0] for name in model.load_rest()} == {"conditioner", "first_stage_model"}
    vae = load_model(str(changed), None).codec.vae.state_dict()
    assert all(torch.equal(vae[name], tensor) for name, tensor in pipeline.vae.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: set_json(f / "scheduler/scheduler_config.json", beta_schedule="linear"), "beta_schedule: expected"),
        (lambda f: set_json(f / "unet/config.json", attention_head_dim=8), "unet/config.json: attention_head_dim: "),
        (lambda f: set_json(f / "unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim: expected None"),
        (lambda f: set_json(f / "unet/config.json", layers_per_block=10**9), "layers_per_block: expected 1"),
        (lambda f: set_json(f / "vae/config.json", scaling_factor=0.5), "scaling_factor: expected 0.13025"),
        (lambda f: set_json(f / "vae/config.json", latents_mean=[1.0] * 4), "latents_mean: expected none"),
        (lambda f: set_json(f / "text_encoder/config.json", hidden_act="gelu"), "hidden_act: expected quick_gelu"),
        (
            lambda f: set_json(f / "tokenizer/tokenizer_config.json", vocab_file="../../secret"),
            "tokenizer_config.json: vocab_file: expected a file's name in the same folder",
        ),
        (lambda f: (f / "unet/config.json").unlink(), "unet/config.json: expected a diffusers folder"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "expected vae/diffusion_pytorch_model"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(
                f / "unet/diffusion_pytorch_model.safetensors.index.json"
            ),
            "index.json: weights in several files are not read",
        ),
        (
            lambda f: (
                (f / "scheduler/scheduler_config.json").unlink()
                or (f / "scheduler/scheduler_config.json").write_text("[" * 100_000)
            ),
            "scheduler_config.json: expected JSON, .* nested too deeply",
        ),
        (
            lambda f: set_tensors(f / "text_encoder/model.safetensors", lambda t: dict(list(t.items())[1:])),
            "text_encoder/model.safetensors: expected .* tensors, but 1 are missing",
        ),
        (
            lambda f: set_tensors(
                f / "unet/diffusion_pytorch_model.safetensors",
                lambda t: t | {"conv_in.weight": torch.zeros(64, 9, 3, 3)},
            ),
            "diffusion_pytorch_model.safetensors: .*expected 4 input channels, as SD 1.x, 2.x and SDXL have, got 9",
        ),
        (
            lambda f: set_tensors(
                f / "unet/diffusion_pytorch_model.safetensors",
                lambda t: {k: v for k, v in t.items() if "add_embedding" not in k},
            ),
            r"unet/config.json: addition_embed_type: expected None with such tensors, got text_time",
        ),
    ],
)
def test_folders_that_are_refused(changed, change, message):
    change(changed)
    with pytest.raises(ValueError, match=message):
        open_model(str(changed)).check()


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_model(str(tmp_path / "no.safetensors"))
    with pytest.raises(ValueError, match=r"scheduler_config.json: expected a diffusers folder"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"model.resolution: expected a multiple of 64, .* got 100"):
        load_model("a/b", resolution=100)


def test_single_file_equals_diffusers_own_conversion(file, folder):
    unet = UNet2DConditionModel.from_single_file(str(file), config=str(folder), subfolder="unet")
    vae = AutoencoderKL.from_single_file(str(file), config=str(folder), subfolder="vae")
    bundle = load_model(str(file), resolution=SIZE)
    for ours, theirs in ((bundle.denoiser.unet, unet), (bundle.codec.vae, vae)):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in state)


def test_text_encoders_are_loaded_once_and_freed_before_training(file, tmp_path):
    """They are 3 GB at full size, on the card that trains."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    bundle = load_model(str(file), resolution=SIZE)
    load, encoders = bundle.conditioner._load, []

    def counted():
        loaded = load()
        encoders.append(weakref.ref(loaded[1]))
        return loaded

    bundle.conditioner._load = counted
    table = load_prompt_table(DataConfig(prompts=str(tmp_path / "prompts.txt")), bundle, "empty")
    table.draw(2, BatchRNG(torch.Generator().manual_seed(0)))
    gc.collect()
    assert [alive() for alive in encoders] == [None]


def test_only_what_is_read_is_downloaded():
    """SDXL's repository has every network in several files, and two checkpoints besides."""
    from huggingface_hub.utils import filter_repo_objects

    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    there = ["sd_xl_base_1.0.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors", "model_index.json"]
    there += [f"{name}/{file}" for name in networks for file in ("config.json", "openvino_model.xml", "model.onnx")]
    there += [f"{name}/diffusion_pytorch_model{kind}.safetensors" for name in networks[:2] for kind in ("", ".fp16")]
    there += [f"{name}/model{kind}.safetensors" for name in networks[2:] for kind in ("", ".fp16")]
    there += ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer_2/merges.txt"]
    kept = set(filter_repo_objects(there, allow_patterns=list(HUB_FILES)))
    left_out = {file for file in there if "fp16" in file or file.endswith((".xml", ".onnx"))}
    assert kept == set(there) - left_out - set(there[:2])


def test_of_a_hub_id_the_fp16_variant_is_downloaded_where_there_is_no_other(changed, monkeypatch):
    (changed / "vae/diffusion_pytorch_model.safetensors").rename(
        changed / "vae/diffusion_pytorch_model.fp16.safetensors"
    )
    asked = []

    def snapshot_download(source, allow_patterns):
        asked.append(allow_patterns)
        return str(changed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_model("owner/name").weights == changed / "unet/diffusion_pytorch_model.safetensors"
    assert asked == [list(HUB_FILES), ["vae/diffusion_pytorch_model.fp16.safetensors"]]
