"""A distilled generator in every format: what comes back is what went in."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small_sdxl import save_single_file, small_pipeline

from sid_train.core.recipe import PRESETS, SiDRecipe, read_recipe
from sid_train.files.hashing import file_sha256
from sid_train.files.header import read_safetensors_metadata
from sid_train.files.tensors import HASH_KEY, LazyTensor, open_tensors, write_tensors
from sid_train.models.adapters import Adapter
from sid_train.models.families import export_generator, load_generator, open_generator
from sid_train.models.family import ExportOptions, Generator, merge_lora
from sid_train.models.lora import extract_lora, with_one_alpha
from sid_train.models.stable_diffusion.export import convert_unet, open_network
from sid_train.models.stable_diffusion.lora import kohya_modules
from sid_train.models.stable_diffusion.parts import open_parts
from sid_train.sample import sample_images

SIZE = 64
RECIPE = SiDRecipe(training_resolution=(SIZE, SIZE), base_model="small")
PROMPTS = ["a lighthouse", "a cat"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_single_file(tmp_path_factory.mktemp("teacher") / "small-xl.safetensors", small_pipeline()))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """As if all of the teacher's UNet had been distilled."""
    return str(save_single_file(tmp_path_factory.mktemp("other") / "distilled.safetensors", small_pipeline(seed=1)))


def export(generator: Generator, path: Path, format_: str, dtype: str, **options) -> list[str]:
    return export_generator(generator, path, ExportOptions(format_, dtype, **options))


def random_adapter(parts, rank: int = 4) -> Adapter:
    rng = torch.Generator().manual_seed(0)
    adapter = {}
    for module in kohya_modules(parts.tensors, parts.unet_config):
        shape = parts.tensors[f"{module}.weight"].shape
        if len(shape) >= 2 and ("attn" in module or "conv1" in module or "samplers" in module):
            down, up = torch.randn(rank, *shape[1:], generator=rng), torch.randn(shape[0], rank, generator=rng)
            adapter[module] = (down * 0.05, up * 0.05, float(rank))
    return adapter


@pytest.fixture(scope="module")
def distilled(teacher) -> Generator:
    """A generator that is a LoRA over its teacher."""
    parts = open_parts(teacher)
    return Generator(parts, RECIPE, parts.tensors, random_adapter(parts))


@pytest.fixture(scope="module")
def pictures(distilled, tmp_path_factory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("pictures") / "fp32.safetensors"
    export(distilled, path, "checkpoint", "fp32")
    bundle, recipe = load_generator(str(path))
    return sample_images(bundle, recipe, PROMPTS, seed=5)


@pytest.mark.parametrize("format_", ["checkpoint", "unet", "lora", "diffusers"])
def test_every_format_gives_the_same_pictures(distilled, teacher, pictures, tmp_path, format_):
    path = tmp_path / ("folder" if format_ == "diffusers" else "generator.safetensors")
    export(distilled, path, format_, "fp32")
    if format_ == "diffusers":
        pipeline = StableDiffusionXLPipeline.from_pretrained(path)
        path = path / "unet" / "diffusion_pytorch_model.safetensors"
        assert read_recipe(path) == RECIPE
        merged = {k: t.load() for k, t in distilled.merged().items()}
        assert all(torch.equal(pipeline.unet.state_dict()[k], t) for k, t in merged.items())
    bundle, recipe = load_generator(str(path), None if format_ == "checkpoint" else teacher)
    assert recipe == RECIPE
    torch.testing.assert_close(sample_images(bundle, recipe, PROMPTS, seed=5), pictures, rtol=1e-4, atol=1e-4)
    assert pictures.std() > 0.05


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("format_", ["checkpoint", "unet"])
def test_round_trip_is_bit_exact(distilled, tmp_path, format_, dtype):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    export(distilled, first, format_, dtype)
    export(open_generator(str(first)), second, format_, dtype)
    assert first.read_bytes() == second.read_bytes()


def test_lora_round_trip_is_bit_exact(distilled, teacher, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    export(distilled, first, "lora", "fp32")
    export(open_generator(str(first), teacher), second, "lora", "fp32")
    assert first.read_bytes() == second.read_bytes()
    read = distilled.model.read_lora(first)
    assert read.keys() == distilled.adapter.keys()
    for module, (down, up, alpha) in distilled.adapter.items():
        assert torch.equal(read[module][0], down)
        assert torch.equal(read[module][1].flatten(), up.flatten())
        assert read[module][2] == alpha
    said = read_safetensors_metadata(first)
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"


def test_diffusers_reads_the_lora(distilled, tmp_path):
    path = tmp_path / "lora.safetensors"
    export(distilled, path, "lora", "fp32")
    pipeline = small_pipeline()
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora()
    merged = distilled.merged()
    for module in distilled.adapter:
        weight = pipeline.unet.get_submodule(module)
        weight = getattr(weight, "base_layer", weight).weight
        torch.testing.assert_close(weight, merged[f"{module}.weight"].load(), rtol=1e-4, atol=1e-5)


def test_diffusers_reads_a_lora_of_different_ranks(teacher, tmp_path):
    """It finds the ranks of attention in the file, but not alphas that differ."""
    parts = open_parts(teacher)
    adapter = {}
    for number, (module, (down, up, _)) in enumerate(random_adapter(parts, rank=8).items()):
        rank = 1 + number % 8
        adapter[module] = (down[:rank], up[:, :rank], float(rank))
    generator, path = Generator(parts, RECIPE, parts.tensors, adapter), tmp_path / "lora.safetensors"
    export(generator, path, "lora", "fp32")
    pipeline = small_pipeline()
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora()
    merged, again = generator.merged(), merge_lora(parts.tensors, parts.read_lora(path))
    for module in adapter:
        weight = pipeline.unet.get_submodule(module)
        weight = getattr(weight, "base_layer", weight).weight
        for other in (weight, again[f"{module}.weight"].load()):
            torch.testing.assert_close(other, merged[f"{module}.weight"].load(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alphas", [(4.0, 4.0), (2.0, 39.0), (321.0, 321.0), (1e-9, 1e-9), (1e6, 1.0), (0.0, -3.0)])
def test_one_alpha_keeps_every_difference(dtype, alphas):
    adapter = {str(alpha): (torch.ones(2, 3), torch.rand(3, 2) + 0.5, alpha) for alpha in alphas}
    made = with_one_alpha(adapter, dtype)
    (one,) = {alpha for _, _, alpha in made.values()}
    assert float(torch.tensor(one, dtype=dtype)) == one
    for name, (_, up, alpha) in adapter.items():
        torch.testing.assert_close(made[name][1] * one, up * alpha)
    if alphas == (4.0, 4.0):
        assert all(made[name][1] is up for name, (_, up, _) in adapter.items())  # its bytes stay


def test_diffusers_reads_the_single_file(distilled, tmp_path):
    path, folder = tmp_path / "generator.safetensors", tmp_path / "folder"
    export(distilled, path, "checkpoint", "fp32")
    export(distilled, folder, "diffusers", "fp32")
    unet = UNet2DConditionModel.from_single_file(str(path), config=str(folder), subfolder="unet")
    for name, tensor in distilled.merged().items():
        assert torch.equal(unet.state_dict()[name], tensor.load())


def test_markers_of_v_prediction_and_zero_terminal_snr(distilled, tmp_path):
    recipe = replace(RECIPE, prediction_type="v_prediction", zero_terminal_snr=True)
    path = tmp_path / "v.safetensors"
    for format_ in ("unet", "checkpoint"):
        export(replace(distilled, recipe=recipe), path, format_, "fp16")
        assert {name for name in open_tensors(path) if "." not in name} == {"v_pred", "ztsnr"}
        assert open_parts(str(path)).prediction_type == "v_prediction"


def test_fp8_keeps_norms_and_biases_in_fp16(distilled, tmp_path):
    path = tmp_path / "fp8.safetensors"
    export(distilled, path, "checkpoint", "fp8")
    tensors = open_tensors(path)
    kinds = {(len(t.shape) > 1, t.dtype) for name, t in tensors.items() if name.startswith("model.")}
    assert kinds == {(True, torch.float8_e4m3fn), (False, torch.float16)}
    assert {t.dtype for name, t in tensors.items() if not name.startswith("model.")} == {torch.float16}


def test_another_vae(distilled, tmp_path):
    vae = small_pipeline(seed=3).vae
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "generator.safetensors"
    export(distilled, path, "checkpoint", "fp32", vae=tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    loaded = load_generator(str(path))[0].codec.vae.state_dict()
    assert all(torch.equal(loaded[k], t) for k, t in vae.state_dict().items())
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match=r"VAE: expected tensors such as encoder.conv_in"):
        export(distilled, path, "checkpoint", "fp32", vae=tmp_path / "no.safetensors")


class TestExtraction:
    def test_of_a_lora_finds_it(self, distilled):
        adapter, report = extract_lora(distilled.merged(), distilled.tensors, rank=4)
        assert adapter.keys() == distilled.adapter.keys()
        merged, again = distilled.merged(), merge_lora(distilled.tensors, adapter)
        for module in adapter:
            torch.testing.assert_close(
                again[f"{module}.weight"].load(), merged[f"{module}.weight"].load(), rtol=1e-4, atol=1e-5
            )
        assert report[0] == f"{len(adapter)} modules, rank 4 to 4"

    def test_error_falls_with_rank_and_is_what_is_reported(self, other, teacher):
        unet, base = open_parts(other).tensors, open_parts(teacher).tensors
        errors = []
        for options in ({"rank": 2}, {"rank": 16}, {"energy": 0.9}, {"energy": 1.0}):
            adapter, report = extract_lora(unet, base, **options)
            merged = merge_lora(base, adapter)
            lost = sum(float((merged[k].load() - unet[k].load()).double().square().sum()) for k in unet)
            size = sum(float((base[k].load() - unet[k].load()).double().square().sum()) for k in unet)
            errors.append((lost / size) ** 0.5)
            assert f"relative error {errors[-1]:.4f}" in report[1]
        assert errors[0] > errors[1] > errors[2] > errors[3]
        assert errors[2] < 0.33  # the root of 0.1, and the norms and biases
        flat = sum(
            float((base[k].load() - t.load()).double().square().sum()) for k, t in unet.items() if len(t.shape) < 2
        )
        assert errors[3] == pytest.approx((flat / size) ** 0.5, rel=1e-4)  # all but the norms and biases

    def test_through_the_file(self, other, teacher, tmp_path):
        source, path = tmp_path / "full.safetensors", tmp_path / "lora.safetensors"
        parts = open_parts(other)
        export(Generator(parts, RECIPE, parts.tensors), source, "unet", "fp32")
        generator = open_generator(str(source))
        with pytest.raises(ValueError, match="--base"):
            export(generator, path, "lora", "fp16", rank=8)
        report = export(generator, path, "lora", "fp16", rank=8, base=open_parts(teacher))
        assert "rank 4 to 8" in report[0]  # the last convolution has 4 channels
        assert len(parts.read_lora(path)) > 50

    def test_nothing_to_extract(self, teacher):
        unet = open_parts(teacher).tensors
        with pytest.raises(ValueError, match="nothing to extract"):
            extract_lora(unet, unet, rank=4)
        with pytest.raises(ValueError, match=r"--rank .* or --energy"):
            extract_lora(unet, unet)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_convert_gives_a_unet_its_recipe(teacher, tmp_path, layout):
    source, path = tmp_path / f"dmd2-{layout}.safetensors", tmp_path / "converted.safetensors"
    parts = open_parts(teacher)
    if layout == "diffusers":
        save_file({k: t.load().half() for k, t in parts.tensors.items()}, source)
    else:
        prefix = "model.diffusion_model."
        save_file({k.removeprefix(prefix): t for k, t in load_file(teacher).items() if k.startswith(prefix)}, source)
    convert_unet(open_network(source), path, PRESETS["DMD2 (4 steps)"], "fp16")
    generator = open_generator(str(path))
    assert generator.recipe == PRESETS["DMD2 (4 steps)"]
    assert all(torch.equal(t.load(), parts.tensors[k].load().half()) for k, t in generator.tensors.items())
    with pytest.raises(ValueError, match="carries a recipe already"):
        open_network(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x.ckpt", "format_": "unet"}, r"expected a name that ends in .safetensors"),
        ({"format_": "lora", "dtype": "fp8"}, "a LoRA is stored in fp16, bf16 or fp32"),
        ({"format_": "unet", "vae": "x"}, "--vae: the format unet holds none"),
        ({"format_": "unet", "rank": 3}, "--rank, --energy: only for a LoRA that is extracted"),
        ({"format_": "lora", "rank": 3}, "--rank, --energy: only for a LoRA that is extracted"),
        ({"path": ".", "format_": "diffusers"}, "expected a folder that does not exist yet"),
    ],
)
def test_impossible_exports(distilled, tmp_path, options, message):
    values = {"path": "x.safetensors", "dtype": "fp16"} | options
    with pytest.raises(ValueError, match=message):
        export(distilled, tmp_path / values.pop("path"), **values)
    assert list(tmp_path.iterdir()) == []


def test_unet_alone_cannot_be_a_checkpoint(distilled, teacher, tmp_path):
    unet, path = tmp_path / "unet.safetensors", tmp_path / "checkpoint.safetensors"
    export(distilled, unet, "unet", "fp16")
    with pytest.raises(ValueError, match="give a whole checkpoint of SDXL as --base"):
        export(open_generator(str(unet)), path, "checkpoint", "fp16")
    export(open_generator(str(unet), teacher), path, "checkpoint", "fp16")
    assert any(name.startswith("conditioner.") for name in open_tensors(path))


# -- what is not written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["checkpoint", "unet", "diffusers"])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "bf16", "conv_in.bias: expected finite numbers, but 1 of 64 are NaN or infinite"),
        (
            70_000.0,
            "fp16",
            "conv_in.bias: expected values that fp16 can hold, up to 65504, got 70000: use --dtype bf16",
        ),
    ],
)
def test_weights_that_a_file_cannot_hold(distilled, tmp_path, format_, value, dtype, message):
    bias = distilled.tensors["conv_in.bias"].load().clone()
    bias[3] = value
    ruined = {**distilled.tensors, "conv_in.bias": LazyTensor.of(bias, "teacher.safetensors: tensor conv_in.bias")}
    path = tmp_path / ("folder" if format_ == "diffusers" else "x.safetensors")
    with pytest.raises(ValueError, match=f"teacher.safetensors: tensor {message}"):
        export(replace(distilled, tensors=ruined), path, format_, dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_lora_that_is_not_finite_is_not_written(distilled, tmp_path):
    module, (down, up, alpha) = next(iter(distilled.adapter.items()))
    ruined = distilled.adapter | {module: (down * float("inf"), up, alpha)}
    with pytest.raises(ValueError, match=r"lora_down.weight: expected finite numbers"):
        export(replace(distilled, adapter=ruined), tmp_path / "x.safetensors", "lora", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused(distilled, teacher, tmp_path):
    before = Path(teacher).stat()
    hard, soft = tmp_path / "hard.safetensors", tmp_path / "soft.safetensors"
    os.link(teacher, hard)
    soft.symlink_to(teacher)
    spelled = Path(teacher).parent / ".." / Path(teacher).parent.name / Path(teacher).name
    for path in (Path(teacher), hard, soft, spelled):
        with pytest.raises(ValueError, match=r"it would replace .*small-xl.safetensors, which is read for it"):
            export(distilled, path, "checkpoint", "fp16")
    unet = tmp_path / "unet.safetensors"
    export(distilled, unet, "unet", "fp16")
    for out in (unet, Path(teacher)):
        with pytest.raises(ValueError, match="which is read for it"):
            export(open_generator(str(unet), teacher), out, "checkpoint", "fp16")
    with pytest.raises(ValueError, match="which is read for it"):
        export(open_generator(str(unet)), unet, "unet", "fp32")
    with pytest.raises(ValueError, match="which is read for it"):
        convert_unet(open_network(Path(teacher)), soft, PRESETS["DMD2 (4 steps)"], "fp16")
    folder = replace(distilled.model, read_from=(tmp_path,))
    with pytest.raises(ValueError, match="a part of"):
        export(replace(distilled, model=folder), tmp_path / "new.safetensors", "unet", "fp16")
    assert (Path(teacher).stat().st_mtime_ns, Path(teacher).stat().st_size) == (before.st_mtime_ns, before.st_size)


# -- LoRAs and their bases -----------------------------------------------------------------------------------------

MODULE = "lora_unet_input_blocks_3_0_in_layers_2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{MODULE}.lora_up.weight"), rf"module {MODULE}: .lora_up.weight is missing"),
        (lambda t: t.pop(f"{MODULE}.lora_down.weight"), rf"module {MODULE}: .lora_down.weight is missing"),
        (lambda t: t.update({f"{MODULE}.alpha": torch.tensor(float("nan"))}), rf"tensor {MODULE}.alpha: .* finite"),
        (lambda t: t.update({f"{MODULE}.alpha": torch.ones(2)}), "alpha: expected one number, got 2"),
        (lambda t: t.update({f"{MODULE}.lora_up.weight": torch.ones(128, 5, 1, 1)}), "expected factors of its weight"),
        (
            lambda t: t.update(
                {f"{MODULE}.lora_down.weight": torch.ones(0, 64, 3, 3), f"{MODULE}.lora_up.weight": torch.ones(128, 0)}
            ),
            "expected factors of its weight",
        ),
        (lambda t: t.update({f"{MODULE}.dora_scale": torch.ones(1)}), rf"tensor {MODULE}.dora_scale: expected a kohya"),
        (lambda t: t.update({"lora_te1_x.alpha": torch.ones(1)}), "LoRAs with text encoders, are not read"),
    ],
)
def test_lora_files_that_make_no_difference_of_the_unet(distilled, tmp_path, change, message):
    path = tmp_path / "lora.safetensors"
    names = kohya_modules(distilled.tensors, distilled.model.unet_config)
    (module,) = (ours for ours, name in names.items() if name == MODULE)
    export(replace(distilled, adapter={module: distilled.adapter[module]}), path, "lora", "fp32")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"lora.safetensors: .*{message}"):
        distilled.model.read_lora(path)


def test_a_lora_file_says_its_alpha(distilled, tmp_path):
    path = tmp_path / "lora.safetensors"
    for factor, alpha in ((1, "4"), (0.5, "2")):
        adapter = {name: (down, up, len(down) * factor) for name, (down, up, _) in distilled.adapter.items()}
        export(replace(distilled, adapter=adapter), path, "lora", "fp16")
        said = read_safetensors_metadata(path)
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", alpha)


def test_a_lora_needs_a_base_of_its_own_kind(distilled, teacher, tmp_path):
    lora, said, plain, merged = (tmp_path / f"{name}.safetensors" for name in ("lora", "said", "plain", "merged"))
    plain.hardlink_to(teacher)
    save_file(load_file(teacher), said, {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"})

    def opened(base: Path, **facts) -> Generator:
        export(replace(distilled, recipe=replace(RECIPE, **facts)), lora, "lora", "fp16")
        return open_generator(str(lora), str(base))

    with pytest.raises(ValueError, match=r"said.safetensors: it is a v_prediction model .*recipe of .*says epsilon"):
        opened(said)
    with pytest.raises(ValueError, match=r"said.safetensors: its schedule is zero terminal SNR, but the recipe"):
        opened(said, prediction_type="v_prediction")
    # As tools leave it that merge models: what ComfyUI makes of it is the tensor's.
    save_file(load_file(teacher) | {"v_pred": torch.zeros(0)}, merged, {"modelspec.predict_key": "epsilon"})
    with pytest.raises(ValueError, match=r"merged.safetensors: it is a v_prediction model \(its tensor v_pred says so"):
        opened(merged)
    assert opened(merged, prediction_type="v_prediction").model.prediction_type == "v_prediction"
    parts = opened(said, prediction_type="v_prediction", zero_terminal_snr=True).model
    assert (parts.prediction_type, parts.zero_terminal_snr) == ("v_prediction", True)
    # A base that says nothing is epsilon, but it may be the very teacher, of which the configuration said otherwise.
    known = {"prediction_type": "v_prediction", "base_model_hash": file_sha256(Path(teacher))}
    assert opened(plain, **known).model.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="does not say that it is a model with v_prediction"):
        opened(plain, **known | {"base_model_hash": "0" * 64})
    assert not opened(plain, base_model_hash=known["base_model_hash"]).is_on_another_base()
    assert opened(plain, base_model_hash="0" * 64).is_on_another_base()


class TestWriter:
    def test_file_is_read_by_safetensors_and_has_its_hash(self, tmp_path):
        path = tmp_path / "x.safetensors"
        tensors = {
            "b": torch.arange(6).reshape(2, 3),
            "a": torch.randn(3, 5).half(),
            "none": torch.zeros(0),
            "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
            "flag": torch.tensor([True, False, True]),
            "small": torch.randn(7).to(torch.float8_e4m3fn),
            "f": torch.randn(2, 2, 2),
        }
        write_tensors(path, {k: LazyTensor.of(t) for k, t in tensors.items()}, {"title": "x"})
        read = load_file(path)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].float(), tensor.float())
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        assert size % 8 == 0
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        assert metadata["title"] == "x"
        assert metadata[HASH_KEY] == "0x" + hashlib.sha256(content[8 + size :]).hexdigest()

    def test_failure_leaves_nothing(self, tmp_path):
        def fail() -> torch.Tensor:
            raise RuntimeError("disk")

        with pytest.raises(RuntimeError, match="disk"):
            write_tensors(tmp_path / "x.safetensors", {"a": LazyTensor((1,), torch.float32, fail)}, {})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
    def test_memory_is_that_of_one_tensor(self, tmp_path):
        """40 tensors of 8 MiB through a process of its own: the last one and the next at once."""
        script = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from sid_train.files.tensors import LazyTensor, write_tensors\n"
            "status = Path('/proc/self/status')\n"
            "memory = lambda field: int(status.read_text().partition(field)[2].split()[0]) / 1024\n"
            "make = lambda: torch.ones(2, 2**20)\n"
            "tensors = {str(i): LazyTensor((2, 2**20), torch.float32, make) for i in range(40)}\n"
            "write_tensors(Path(sys.argv[1]), {'0': tensors['0']}, {})\n"  # what torch loads at its first use
            "Path('/proc/self/clear_refs').write_text('5')\n"  # the peak starts anew
            "before = memory('VmRSS:')\n"
            "write_tensors(Path(sys.argv[1]), tensors, {})\n"
            "print(memory('VmHWM:') - before)\n"
        )
        path = tmp_path / "large.safetensors"
        # glibc gives memory back at once only below a threshold that it otherwise raises by itself.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", script, path]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert path.stat().st_size > 40 * 2**23
        assert float(run.stdout) < 3 * 8
