import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import sid_train
from sid_train import configs
from sid_train.config import Config, OptimizerConfig, config_from_dict, load_config, read_toml
from sid_train.config_reference import field_docs
from sid_train.method.config import GANConfig


def test_overrides_types_and_round_trip(tmp_path):
    config = load_config(
        "demo", ["method.steps=2", "optimizer.generator_lr=5e-5", "training.iterations=1_000", "method.guidance=lsg=2"]
    )
    assert (config.method.steps, config.optimizer.generator_lr) == (2, 5e-5)
    assert (config.training.iterations, config.method.guidance) == (1000, "lsg=2")
    path = tmp_path / "c.toml"
    path.write_text(config.to_toml())
    assert config_from_dict(read_toml(path), str(path)) == config


SHIPPED = configs.shipped()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load(name):
    assert load_config(name).method.steps == (1 if name.endswith("1step") else 4)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("sdxl-")])
def test_they_say_where_every_value_is_from(name):
    lines = configs.path_of(name).read_text().splitlines()
    values = [line for line in lines if line and not line.startswith(("#", "["))]
    assert len(values) > 10
    assert [line for line in values if not re.search(r"  # \[(paper|family|ours)\]", line)] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.stesp=2", "unknown key 'method.stesp'; did you mean method.steps"),
        ("nonsense.key=2", "unknown key"),
        ("method.steps", "expected section.key=value"),
        ("method.steps=two", "method.steps: expected an integer, got 'two'"),
        ("method.steps=9", "steps: expected 1 to 8, got 9"),
        ("method.steps=true", "expected an integer"),
        ("method.t_init=2", "t_init: expected 4"),
        ("method.guidance=cfg=3", "guidance: expected none"),
        ("method.noise_mode=blue", "expected one of fresh, fixed, ddim"),
        ("data.max_tokens=300", "data.max_tokens: expected 75, 150 or 225, got 300"),
        ("method.t_max=10", "t_min < t_max"),
        ("gan.generator_weight=1", "needs real pairs"),
        ("data.pairs=demo", "unused while gan.generator_weight is 0"),
        ("gan.discriminator_weight=2", "unused while gan.generator_weight is 0"),
        ("training.mixed_precision=fp16", "expected one of no, bf16"),
        ("training.batch_size=0", "expected 1 or more"),
        ("training.accumulate=3", "expected a divisor"),
        ("optimizer.generator_lr=-1", "expected more than 0"),
        ("optimizer.generator_lr=nan", "expected a number, got 'nan'"),
        ("optimizer.generator_lr=NaN", "expected a finite number, got nan"),
        ("optimizer.generator_lr=" + "9" * 5000, "expected a number, got '9999"),
        ("training.iterations=1e400", "expected an integer, got inf"),
        ("training.iterations=" + "[" * 20_000, r"expected an integer, got '\[\[\["),
        ("data.prompts=p\udcff.txt", r"data.prompts: expected text in UTF-8, got 'p\\udcff.txt'"),
        ("x\x1b.y=1", r"unknown key 'x\\x1b.y'"),
        ("y" * 5000, "expected section.key=value"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config("demo", [override])
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("other", ["adapter.rank=4", "optimizer.kind=adam8bit"])
def test_what_does_not_go_with_sharding(other):
    with pytest.raises(ValueError, match=f"training.sharding: 'full' .*{other.split('=')[0]}"):
        load_config(None, ["training.sharding=full", other])


def test_bad_toml_names_the_file(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[method\n")
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML"):
        load_config(str(path))
    path.write_text("[methods]\nsteps = 2\n")
    with pytest.raises(ValueError, match=r"bad\.toml: unknown section \[methods\]"):
        load_config(str(path))


@pytest.mark.parametrize("path", ["p\x7f.txt", "a\x1b[31m\tb\r\nc\x08", 'q"\\u0041\\', "猫 \x85 \u2028 😀.txt"])
def test_text_survives_the_file(path, tmp_path):
    config = load_config(None, [f"data.prompts={path}"])
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8", newline="")
    assert load_config(str(tmp_path / "c.toml")).data.prompts == path


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "notepad.TOML").write_text("[training]\r\niterations = 2\r\n", encoding="utf-8-sig")
    assert load_config(str(tmp_path / "notepad.TOML")).training.iterations == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html>\n<html>", "not valid TOML: it is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "not valid TOML: it is a Git LFS pointer"),
        ("[training]\niterations = 2\n".encode("utf-16"), "expected UTF-8 text"),
        ("training = 5", r"unknown section \[training\].*, got 5 outside"),
        ("[[training]]\niterations = 2", r"unknown section \[training\]"),
        ("iterations = 2", r"unknown section \[iterations\]"),
        ('["a\\u001b\\n"]\nx = 1', r"unknown section \[a\\x1b\\n\]"),
        ("[training]\niterations = " + "[" * 20_000, "nested too deeply"),
        ("[training]\niterations" + ".a" * 20_000 + " = 1", "nested too deeply"),
        ("[training]\niterations" + ".a" * 900 + " = 1", "training.iterations: expected an integer"),
        ("[training]\niterations = 0x" + "f" * 20_000, "training.iterations: expected at most 9,223,"),
        ("[training]\niterations = " + "9" * 20_000, "expected a configuration in TOML"),
        ("[training]\niterations = [0x" + "f" * 20_000 + "]", "expected an integer, got a list that is too large"),
        ("[training]\niterations = " + "9" * 400, "training.iterations: expected at most 9,223,"),
        ("[optimizer]\neps = " + "9" * 400, "optimizer.eps: expected at most 9,223,"),
        ("[optimizer]\neps = inf", "optimizer.eps: expected a finite number, got inf"),
        ("[optimizer]\neps = nan", "optimizer.eps: expected a finite number, got nan"),
        ("[optimizer]\neps = true", "optimizer.eps: expected a number, got True"),
        ("[data]\nprompts = 2020-01-01", "data.prompts: expected text, got datetime.date"),
        ('[data]\nprompts = "a\\u0000b"', "data.prompts: expected text without the character 0"),
        ("#" * 70_000, "expected at most 65,536 bytes"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_what_is_no_configuration_is_said_with_the_file(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"bad\.toml.*: .*{message}") as error:
        load_config(str(path), ["training.seed=1"])
    assert len(str(error.value)) < 600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name, kind in (("folder", "a folder"), ("pipe", "a pipe"), ("zero", "a device")):
        with pytest.raises(ValueError, match=rf"{name}\.toml: expected a regular file, got {kind}"):
            load_config(str(tmp_path / f"{name}.toml"))
    with pytest.raises(ValueError, match=r"does not end in \.toml"):
        load_config(str(tmp_path))


def test_every_field_is_documented_and_read():
    """A config field exists only if code reads it, and a reader learns what it does."""
    code = "".join(p.read_text() for p in Path(sid_train.__file__).parent.rglob("*.py") if p.name != "config.py")
    # Read in their own module, and through these elsewhere.
    code += inspect.getsource(GANConfig.enabled.fget) + inspect.getsource(OptimizerConfig.rate_factor)
    for section, cls in get_type_hints(Config).items():
        documented = field_docs(cls)  # raises for a field without
        for f in dataclasses.fields(cls):
            assert re.search(rf"\.{f.name}\b", code), f"{section}.{f.name} is never read"
            assert len(documented[f.name]) > 15, f"{section}.{f.name}: {documented[f.name]!r} says nothing"
