"""SDXL's two text encoders behind the Conditioner interface."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..conditioning import Conditioning

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # those of OpenAI's CLIP; the file holds more


@dataclass
class TextEncoders:
    """CLIP-L and OpenCLIP bigG, each with its tokenizer (they pad differently)."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    clip_l: CLIPTextModel
    clip_g: CLIPTextModelWithProjection


class SDXLConditioner:
    """Encodes prompts as diffusers' SDXL pipeline does: penultimate hidden states of both encoders, the pooled vector
    of the second, and the size of the picture. The encoders are loaded at the first prompt; ``unload`` frees them.
    """

    def __init__(self, load: Callable[[], TextEncoders], image_size: tuple[int, int], batch_size: int = 16):
        self._load, self.image_size, self.batch_size = load, image_size, batch_size
        self._encoders: TextEncoders | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> SDXLConditioner:
        """Where prompts are encoded from now on."""
        self.device = torch.device(device)
        if self._encoders is not None:
            self._place(self._encoders)
        return self

    def unload(self) -> None:
        """Frees the encoders until the next prompt."""
        self._encoders = None

    def _place(self, encoders: TextEncoders) -> TextEncoders:
        for model in (encoders.clip_l, encoders.clip_g):
            model.eval().requires_grad_(False).to(self.device)
        return encoders

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text [B, 77, 2048], pooled [B, 1280], time ids [B, 6]; prompts are cut after 75 tokens, as everywhere."""
        if self._encoders is None:
            self._encoders = self._place(self._load())
        parts = [
            self._encode(list(prompts[i : i + self.batch_size]), self._encoders)
            for i in range(0, len(prompts), self.batch_size)
        ]
        return Conditioning.cat(parts)

    def _encode(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        def run(tokenizer: CLIPTokenizer, model: CLIPTextModel | CLIPTextModelWithProjection) -> Any:
            tokens = tokenizer(
                prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            )
            return model(tokens.input_ids.to(self.device), output_hidden_states=True)

        first = run(encoders.tokenizers[0], encoders.clip_l)
        second = run(encoders.tokenizers[1], encoders.clip_g)
        height, width = map(float, self.image_size)
        return Conditioning(
            text=torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            pooled=second.text_embeds,
            time_ids=torch.tensor([[height, width, 0.0, 0.0, height, width]], device=self.device).repeat(
                len(prompts), 1
            ),
        )


def sdxl_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of CLIP-L (pads with the end token) and OpenCLIP bigG (pads with "!", token 0), without a network.

    Their vocabulary is the one that the package open-clip-torch ships; ValueError if it is not installed.
    """
    package = importlib.util.find_spec("open_clip")  # found, not imported: it is large
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            'the CLIP vocabulary is missing: pip install open-clip-torch, which ships it (or pip install -e ".[sdxl]")'
        )
    with gzip.open(Path(package.submodule_search_locations[0]) / BPE_FILE, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 1 + MERGES]  # the first line is the version
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        settings = {"bos_token": START, "eos_token": END, "unk_token": END, "model_max_length": MAX_TOKENS}
        return (
            CLIPTokenizer.from_pretrained(folder, pad_token=END, **settings),
            CLIPTokenizer.from_pretrained(folder, pad_token="!", **settings),
        )
