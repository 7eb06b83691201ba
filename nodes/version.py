"""The oldest ComfyUI that the pack is tried with."""

from __future__ import annotations

import logging
import re

FLOOR = "0.3.64"


def comfyui_version() -> str:
    """As ComfyUI says it; empty where it does not."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def is_below_floor() -> bool:
    return len(_numbers(comfyui_version())) > 0 and _numbers(comfyui_version()) < _numbers(FLOOR)


def log_if_below_floor() -> None:
    if is_below_floor():
        logging.getLogger("ComfyUI-SiD").warning(
            "ComfyUI-SiD needs ComfyUI %s or newer, and this is %s: update it. Guidance 'nag' does not run here, and "
            "nothing is tried on it.",
            FLOOR,
            comfyui_version(),
        )


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d{1,9}(?:\.\d{1,9})*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
