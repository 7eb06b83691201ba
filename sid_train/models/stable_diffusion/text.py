"""CLIP's text encoders behind the Conditioner interface, as each generation of Stable Diffusion reads them."""

from __future__ import annotations

import gzip
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...files.reading import half_character, shown
from ..conditioning import CHUNK_TOKENS, MAX_TOKENS, Conditioning

WINDOW = CHUNK_TOKENS + 2
"""Tokens of a chunk with its start and its end."""
START, END = "<|startoftext|>", "<|endoftext|>"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # those of OpenAI's CLIP; the file holds more


TextEncoders = tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
Tokenizers = tuple[CLIPTokenizer, ...]
"""One for each text encoder: OpenAI's and OpenCLIP's pad differently."""


class CLIPConditioner(ABC):
    """Encodes prompts as diffusers' pipelines do. Prompts of more than 75 tokens are read as ComfyUI reads them: in
    chunks of 75, whose hidden states are put one after another. Prompts are taken literally.

    The encoders are loaded at the first prompt; ``unload`` frees them.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoders],
        load_tokenizers: Callable[[], Tokenizers],
        image_size: tuple[int, int],
        batch_size: int = 16,
    ):
        self._load, self._load_tokenizers = load, load_tokenizers
        self.image_size, self.batch_size = image_size, batch_size
        self._encoders: TextEncoders | None = None
        self.device = torch.device("cpu")
        self.max_tokens = MAX_TOKENS

    @cached_property
    def tokenizers(self) -> Tokenizers:
        return self._load_tokenizers()

    def to(self, device: torch.device) -> CLIPConditioner:
        """Where prompts are encoded from now on."""
        self.device = torch.device(device)
        if self._encoders is not None:
            self._place(self._encoders)
        return self

    def unload(self) -> None:
        """Frees the encoders until the next prompt."""
        self._encoders = None

    def _place(self, encoders: TextEncoders) -> TextEncoders:
        for model in encoders:
            model.eval().requires_grad_(False).to(self.device)
        return encoders

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text [B, 77 * n, width] and what the generation reads besides; n is the least common multiple of the prompts'
        numbers of chunks (see ``equally_long``). Prompts are cut after ``max_tokens``. ValueError for what is no text.
        """
        require_text(prompts)
        if self._encoders is None:
            self._encoders = self._place(self._load())
        parts = [
            self._encode(list(prompts[i : i + self.batch_size]), self._encoders)
            for i in range(0, len(prompts), self.batch_size)
        ]
        return Conditioning.cat(parts)

    def chunks(self, prompts: Sequence[str]) -> list[int]:
        """How many chunks each prompt has, uncut; ValueError for one that is no text.

        The tokenizer splits at spaces, so each distinct word is tokenised once: a million prompts take seconds.
        """
        require_text(prompts)
        # A token of ASCII text is a character at least.
        long = [prompt for prompt in prompts if len(prompt) > CHUNK_TOKENS or not prompt.isascii()]
        words = list({word for prompt in long for word in prompt.split(" ")})
        tokens = dict(zip(words, map(len, _token_ids(self.tokenizers[0], words)), strict=True)) if words else {}
        counts = {prompt: _chunk_count(sum(tokens[word] for word in prompt.split(" "))) for prompt in long}
        return [counts.get(prompt, 1) for prompt in prompts]

    def _encode(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """All chunks in one batch."""
        token_ids = [_token_ids(tokenizer, prompts) for tokenizer in self.tokenizers]
        most = self.max_tokens // CHUNK_TOKENS
        counts = [min(_chunk_count(len(ids)), most) for ids in token_ids[0]]
        outputs = []
        for tokenizer, model, all_ids in zip(self.tokenizers, encoders, token_ids, strict=True):
            windows = [_window(tokenizer, ids, k) for ids, n in zip(all_ids, counts, strict=True) for k in range(n)]
            outputs.append(model(torch.tensor(windows, device=self.device), output_hidden_states=True))
        return Conditioning.cat(self._prompts(outputs, counts))

    @abstractmethod
    def _prompts(self, outputs: list[Any], counts: list[int]) -> list[Conditioning]:
        """What each prompt becomes.

        outputs: of each encoder, for all windows; counts: how many of these each prompt has
        """


class SDConditioner(CLIPConditioner):
    """SD 1.x and 2.x: ``text``, the last hidden states of the one encoder, through its last norm."""

    def _prompts(self, outputs: list[Any], counts: list[int]) -> list[Conditioning]:
        return [Conditioning(text=_joined(text)) for text in outputs[0].last_hidden_state.split(counts)]


class SDXLConditioner(CLIPConditioner):
    """SDXL: ``text`` [B, tokens, 2048], penultimate hidden states of both encoders side by side; ``pooled`` [B, 1280],
    the second's vector for the first chunk; ``time_ids`` [B, 6], the size of the picture.
    """

    def _prompts(self, outputs: list[Any], counts: list[int]) -> list[Conditioning]:
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        height, width = map(float, self.image_size)
        time_ids = torch.tensor([[height, width, 0.0, 0.0, height, width]], device=self.device)
        rows = zip(text.split(counts), outputs[-1].text_embeds.split(counts), strict=True)
        return [Conditioning(text=_joined(t), pooled=p[:1], time_ids=time_ids) for t, p in rows]


def _joined(windows: Tensor) -> Tensor:
    """Hidden states [windows, 77, width] of a prompt, one after another: [1, windows * 77, width]."""
    return windows.flatten(0, 1)[None]


def require_text(prompts: Sequence[str]) -> None:
    """ValueError for a prompt that no tokenizer takes (see ``half_character``)."""
    for prompt in prompts:
        if (place := half_character(prompt)) >= 0:
            raise ValueError(
                f"prompt {shown(prompt, 60)}: expected text, got half a character ({prompt[place]!a}) after "
                f"{place} characters: write it anew in UTF-8"
            )


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Without start, end or padding, uncut."""
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _chunk_count(tokens: int) -> int:
    return max(1, -(-tokens // CHUNK_TOKENS))


def _window(tokenizer: CLIPTokenizer, ids: list[int], number: int) -> list[int]:
    """A chunk of a prompt's ``ids`` as the encoder gets it: start, up to 75 tokens, end, padding."""
    chunk = ids[number * CHUNK_TOKENS : (number + 1) * CHUNK_TOKENS]
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(chunk))
    return [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding]


def clip_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of OpenAI's CLIP (pads with the end token) and OpenCLIP (pads with "!", token 0).

    Nothing is downloaded: their vocabulary is the one that the package open-clip-torch ships; ValueError if it is not
    installed.
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
        settings = {"bos_token": START, "eos_token": END, "unk_token": END, "model_max_length": WINDOW}
        return (
            CLIPTokenizer.from_pretrained(folder, pad_token=END, **settings),
            CLIPTokenizer.from_pretrained(folder, pad_token="!", **settings),
        )
