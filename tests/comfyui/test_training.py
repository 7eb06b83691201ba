"""What the training recipe node writes for right inputs; wrong ones are in test_errors."""

from __future__ import annotations

import io
import shlex
import tarfile
import time
from pathlib import Path

import pytest
import torch
from helpers import module, run
from PIL import Image

from sid_train.config import load_config
from sid_train.data.pictures import open_pictures


def teacher_tensors(unet: dict | None = None) -> dict:
    """A checkpoint of ``unet`` (ldm names), or of a narrow one of SDXL's class, and a tensor of each text encoder."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from small_models import UNET_CONFIG

    if unet is None:
        config = UNET_CONFIG | {"model_channels": 64, "context_dim": 64}
        unet = UNetModel(**config, dtype=torch.float16, operations=comfy.ops.disable_weight_init).state_dict()
    text = ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "conditioner.embedders.1.model.a")
    return {f"model.diffusion_model.{k}": v for k, v in unet.items()} | {k: torch.zeros(1) for k in text}


@pytest.fixture
def write(nodes, put, folders, tmp_path, monkeypatch):
    """Runs the node in a folder of its own: the command and the configuration that it wrote."""
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path / "put out"))
    monkeypatch.chdir(tmp_path)
    teacher = put("checkpoints", "base.safetensors", teacher_tensors())

    def recipe(**changes):
        (command,) = run(nodes["SiDTrainingRecipe"], **{"teacher": teacher, "prompts": "a cat"} | changes)
        return command, load_config(shlex.split(command)[shlex.split(command).index("--config") + 1])

    return recipe


def test_writes_what_the_trainer_reads(nodes, write, tmp_path):
    (strategy,) = run(nodes["SiDDistillationGuidance"], strategy="lsg", lsg_scale=2.0)
    inputs = {"prompts": "a cat\n\na dog", "strategy": strategy, "steps": 2}
    _, config = write(**inputs)
    base = load_config("sdxl-4step-lora-24gb")
    assert (config.method.steps, config.method.guidance) == (2, "lsg=2")
    assert (config.adapter, config.optimizer, config.training) == (base.adapter, base.optimizer, base.training)
    assert config.model.teacher == str(tmp_path / "checkpoints" / "base.safetensors")
    assert Path(config.data.prompts).read_text() == "a cat\na dog\n"
    (tmp_path / "pairs").mkdir()
    assert write(**inputs, pairs=str(tmp_path / "pairs"))[1].gan.enabled


def test_custom_strategy(nodes):
    (text,) = run(nodes["SiDDistillationGuidance"], strategy="custom", fake_train=1.0, fake_eval=1.0, teacher=1.1)
    assert text == "custom=1,1,1.1"
    assert run(nodes["SiDDistillationGuidance"]) == ("none",)


# One that is longer than a file's name can be, and some that are no paths, near as they come.
@pytest.mark.parametrize("prompt", ["a very old cat " * 30, "a black/white cat", "cat", "a cat: hf:owner/name"])
def test_a_single_prompt_is_written_to_a_file(write, tmp_path, prompt):
    _, config = write(prompts=prompt)
    written = tmp_path / "put out" / "sid_train" / "my-sid.prompts.txt"
    assert config.data.prompts == str(written)
    assert written.read_text() == prompt.strip() + "\n"


def test_data_set_on_the_hub_is_passed_on(write):
    _, config = write(prompts=" hf:owner/prompts-2.0\n")
    assert config.data.prompts == "hf:owner/prompts-2.0"


@pytest.mark.parametrize("source", ["captions", "my captions", "prompts.TXT"])
def test_files_and_folders_are_named_absolutely(write, tmp_path, source):
    path = tmp_path / source
    if path.suffix:
        (tmp_path / "3f2a").write_text("a cat\n")
        path.symlink_to(tmp_path / "3f2a")  # as the hub's cache has its files: only the link has a suffix
    else:
        path.mkdir()
    _, config = write(prompts=source)
    assert config.data.prompts == str(path)


def test_shards_in_braces_are_what_the_trainer_reads(write, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for number in ("09", "10"):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"a cat")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    _, config = write(pairs="{09..10}.tar")
    assert config.data.pairs == str(tmp_path / "{09..10}.tar")
    assert config.gan.generator_weight > 0
    assert len(open_pictures(config.data.pairs)) == 2


def test_command_is_quoted_as_the_terminal_reads_it(pack, write, tmp_path):
    """cmd takes single quotes for part of the path, which here has a space."""
    quoted = module(pack, "nodes.training").quoted
    command, _ = write()
    path = str(tmp_path / "put out" / "sid_train" / "my-sid.toml")
    assert command == f"python -m sid_train distill --config {quoted(path)} --out runs/my-sid"
    assert quoted(path, windows=False) == f"'{path}'"
    assert quoted(path, windows=True) == f'"{path}"'


def test_another_content_is_another_file(write, tmp_path):
    """A run may be using the files: they are never written over."""
    folder = tmp_path / "put out" / "sid_train"
    first, config = write(prompts="a cat")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"my-sid.toml", "my-sid.prompts.txt"}
    assert write(prompts="a cat")[0] == first
    changed, other = write(prompts="a dog")
    assert changed != first
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert Path(other.data.prompts).read_text() == "a dog\n"
    assert config.data.prompts != other.data.prompts
    name = Path(shlex.split(changed)[-1]).name
    assert name.startswith("my-sid-")
    assert (folder / f"{name}.toml").exists()
    assert write(prompts="a dog")[0] == changed
    assert len(list(folder.iterdir())) == 4
    assert write(prompts="a dog", steps=2)[1].data.prompts == other.data.prompts


def test_separators_other_than_newlines_do_not_split_a_prompt(write):
    _, config = write(prompts="a cat\u2028on a mat\r\na dog\x0bin a bog")
    assert Path(config.data.prompts).read_text("utf-8") == "a cat\u2028on a mat\na dog\x0bin a bog\n"


@pytest.mark.parametrize("prompt", ["/" * 100_000 + " a", "a " + "\\" * 100_000, "a/" * 100_000, "{0..1}" * 20_000])
def test_long_prompts_are_read_at_once(write, prompt):
    begin = time.process_time()
    _, config = write(prompts=prompt)
    assert time.process_time() - begin < 5
    assert Path(config.data.prompts).read_text() == prompt + "\n"


@pytest.mark.parametrize("prompt", ["smile:/ a cat", "// a cat", "mood:\\o/ a dog"])
def test_prompts_that_begin_as_other_hosts_do(write, prompt):
    _, config = write(prompts=prompt)
    assert Path(config.data.prompts).read_text() == prompt + "\n"
