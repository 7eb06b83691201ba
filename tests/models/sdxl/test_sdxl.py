"""SDXL teachers: a small random one in every form it comes in, held against diffusers' own pipeline."""

from __future__ import annotations

import gc
import socket
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from small_sdxl import save_single_file, small_pipeline

from sid_train.core.rng import BatchRNG
from sid_train.data.config import DataConfig
from sid_train.data.rows import load_prompt_table
from sid_train.models.families import load_model
from sid_train.models.sdxl.parts import HUB_FILES

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
        (encoders.clip_l, pipeline.text_encoder),
        (encoders.clip_g, pipeline.text_encoder_2),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file(pipeline, tmp_path, dtype):
    path = save_single_file(tmp_path / "half.safetensors", pipeline, dtype)
    bundle = load_model(str(path), dtype=torch.bfloat16, resolution=SIZE)
    assert {p.dtype for p in bundle.denoiser.parameters()} == {torch.bfloat16}
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(bundle.denoiser.unet.state_dict()[name], tensor.to(dtype).to(torch.bfloat16))


def test_v_prediction_and_zero_terminal_snr(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_single_file(tmp_path / "v.safetensors", small_pipeline(prediction_type="v_prediction"))
    bundle = load_model(str(path), resolution=SIZE)
    assert (bundle.denoiser.schedule.prediction_type, bundle.zero_terminal_snr) == ("v_prediction", False)
    save_file(load_file(path) | {"ztsnr": torch.zeros(0)}, path)
    bundle = load_model(str(path), resolution=SIZE)
    assert bundle.zero_terminal_snr
    assert bundle.denoiser.schedule.sigmas[-1] > 1000


def test_unet_without_text_encoders_says_so_when_they_are_needed(file, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "unet.safetensors"
    prefix = "model.diffusion_model."
    save_file({k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}, path)
    bundle = load_model(str(path), resolution=SIZE)
    with pytest.raises(ValueError, match=r"unet.safetensors: expected CLIP-L under conditioner.*sid_train encode"):
        bundle.conditioner.encode(["a cat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "label_emb" not in k}, "label_emb.* .*SD 1.5"),
        (
            lambda t: {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
            "expected tensors such as input_blocks.0.0.weight",
        ),
        (
            lambda t: t | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)},
            "expected 4 input channels, as SDXL has, got 9",
        ),
    ],
)
def test_files_that_are_not_sdxl(file, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "wrong.safetensors"
    save_file(change(load_file(file)), path)
    with pytest.raises(ValueError, match=rf"wrong.safetensors: .*{message}"):
        load_model(str(path), resolution=SIZE)


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
        encoders.append(weakref.ref(loaded.clip_g))
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
