"""What accelerate would take from the environment, and the configuration decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# What it may take: on which device it runs, and how it talks.
KEEPS = {
    "ACCELERATE_USE_CPU",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_DEBUG_MODE",
}
_NEUTRAL = {"", "no", "none", "false", "0", "default"}
_OTHER_TRAINERS = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"}


def foreign_settings() -> dict[str, str]:
    """Variables that ``accelerate launch`` or a shell has set to something that would change a run."""
    neutral = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"", "1"}}
    found = _accelerates().items()
    return {name: value for name, value in found if value.lower() not in neutral.get(name, _NEUTRAL)}


def other_trainers() -> dict[str, str]:
    """Those of them that cannot be ignored: the processes were started for DeepSpeed or its like."""
    return {name: value for name, value in foreign_settings().items() if name in _OTHER_TRAINERS}


def require_no_other_trainer() -> None:
    """ValueError where ``other_trainers`` has something."""
    for name, value in other_trainers().items():
        raise ValueError(
            f"{name}={value}: expected processes that share no model: unset it, or start them with torchrun; "
            "training.sharding is how this trainer splits one"
        )


@contextmanager
def own_settings() -> Iterator[None]:
    """Hides from accelerate, inside, all that it is not to take: it would divide gradients, compile networks or wrap
    them in silence. ValueError as ``require_no_other_trainer``.
    """
    require_no_other_trainer()
    hidden = _accelerates()
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _accelerates() -> dict[str, str]:
    return {k: value for k, value in os.environ.items() if k.startswith("ACCELERATE_") and k not in KEEPS}
