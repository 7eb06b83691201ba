"""How SDXL's conditioner reads prompts in chunks; tests/comfyui/test_text.py holds them against ComfyUI's."""

from __future__ import annotations

import random

import pytest
import torch
from small_sdxl import small_pipeline

from sid_train.models.stable_diffusion.text import SDXLConditioner, clip_tokenizers

SHORT = ["a lighthouse at dawn, 35mm", "", "word " * 75, "Ünïcode, a cat's 3 hats!"]


@pytest.fixture(scope="module")
def encoders():
    pipeline = small_pipeline()
    return pipeline.text_encoder, pipeline.text_encoder_2


@pytest.fixture(scope="module")
def tokenizers():
    return clip_tokenizers()


@pytest.fixture
def conditioner(encoders, tokenizers):
    return SDXLConditioner(lambda: encoders, lambda: tokenizers, (64, 64))


@torch.no_grad()
def test_a_batch_of_short_prompts_is_one_window_each_bit_for_bit(conditioner, encoders, tokenizers):
    """What caches and runs hold that are older than chunks."""
    found = []
    for tokenizer, model in zip(tokenizers, encoders, strict=True):
        tokens = tokenizer(SHORT, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        found.append(model(tokens.input_ids, output_hidden_states=True))
    cond = conditioner.encode(SHORT)
    assert torch.equal(cond.text, torch.cat([each.hidden_states[-2] for each in found], dim=-1))
    assert torch.equal(cond.pooled, found[1].text_embeds)


def test_a_long_prompt_is_its_chunks_one_after_another(conditioner):
    parts = ["word " * 75, "cat " * 75, "hat " * 20]
    apart, together = conditioner.encode(parts), conditioner.encode(["".join(parts)])
    torch.testing.assert_close(together.text, apart.text.reshape(1, 3 * 77, -1))
    torch.testing.assert_close(together.pooled, apart.pooled[:1])
    assert together.time_ids.shape == (1, 6)


@pytest.mark.parametrize(("limit", "chunks"), [(75, 1), (150, 2), (225, 3)])
def test_what_comes_after_the_limit_is_cut(conditioner, limit, chunks):
    conditioner.max_tokens = limit
    start = "word " * limit
    cond = conditioner.encode([start, start + "cat", start + "hat " * 500])
    assert cond.text.shape == (3, 77 * chunks, 128)
    torch.testing.assert_close(cond.text, cond.text[:1].expand(3, -1, -1))
    assert conditioner.chunks([start, start + "cat"]) == [chunks, chunks + 1]  # counted all the same


def test_chunks_are_counted_word_by_word_as_the_whole_is_tokenised(conditioner, tokenizers):
    words = "a cat's 35mm photo, (detailed:1.2) don't café cafe\u0301 İstanbul 🐱🐱 日本語 <|endoftext|> x\x1cy \u3000"
    draw = random.Random(0)
    prompts = [" ".join(draw.choices([*words.split(" "), ""], k=draw.randint(0, 120))) for _ in range(200)]
    tokens = [len(ids) for ids in tokenizers[0](prompts, add_special_tokens=False, verbose=False).input_ids]
    found = conditioner.chunks(prompts)
    assert found == [max(1, -(-count // 75)) for count in tokens]
    assert set(found) > {1, 2, 3}
    assert conditioner.chunks([]) == []


def test_counting_loads_no_text_encoder(tokenizers):
    def refuse():
        raise AssertionError("the text encoders were loaded")

    assert SDXLConditioner(refuse, lambda: tokenizers, (64, 64)).chunks(["word " * 100]) == [2]


@pytest.mark.parametrize("prompt", ["a cat \ud83d", "\udcff"])
def test_half_a_character_is_named(conditioner, prompt):
    """Of an emoji that was cut in two, and of bytes on the command line that are no UTF-8."""
    for ask in (conditioner.encode, conditioner.chunks):
        with pytest.raises(
            ValueError, match=r"^prompt .*\\ud.* expected text, got half a character .* after \d"
        ) as info:
            ask(["a dog", prompt])
        assert str(info.value).isascii()
