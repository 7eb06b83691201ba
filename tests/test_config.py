import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import sid_train
from sid_train import configs
from sid_train.config import Config, config_from_dict, load_config, read_toml
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
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("demo", [override])


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


def test_every_field_is_documented_and_read():
    """A config field exists only if code reads it, and a reader learns what it does."""
    code = "".join(p.read_text() for p in Path(sid_train.__file__).parent.rglob("*.py") if p.name != "config.py")
    code += inspect.getsource(GANConfig.enabled.fget)  # read in its own module, and through this elsewhere
    for section, cls in get_type_hints(Config).items():
        documented = field_docs(cls)  # raises for a field without
        for f in dataclasses.fields(cls):
            assert re.search(rf"\.{f.name}\b", code), f"{section}.{f.name} is never read"
            assert len(documented[f.name]) > 15, f"{section}.{f.name}: {documented[f.name]!r} says nothing"
