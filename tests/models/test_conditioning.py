"""Rows of texts of different lengths in one batch."""

from __future__ import annotations

import pytest
import torch

from sid_train.models.conditioning import Conditioning


def made(rows: int, chunks: int, seed: int) -> Conditioning:
    rng = torch.Generator().manual_seed(seed)
    return Conditioning(
        text=torch.randn(rows, 8 * chunks, 64, generator=rng),
        pooled=torch.randn(rows, 64, generator=rng),
        time_ids=torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(rows, 1),
    )


def test_texts_meet_at_the_least_common_multiple_of_their_lengths():
    parts = [made(1, 1, 0), made(2, 2, 1), made(1, 3, 2)]
    both = Conditioning.cat(parts)
    assert both.text.shape == (4, 48, 64)
    for row, (text, times) in enumerate([(parts[0].text[0], 6), (parts[1].text[0], 3), (parts[1].text[1], 3)]):
        assert torch.equal(both.text[row], text.repeat(times, 1))
    assert torch.equal(both.pooled, torch.cat([part.pooled for part in parts]))
    same = Conditioning.cat(parts[1:2] * 2)
    assert torch.equal(same.text, parts[1].text.repeat(2, 1, 1))


@pytest.mark.parametrize(("ours", "theirs"), [(1, 2), (2, 1), (2, 3), (1, 1)])
def test_rows_are_replaced_by_others_of_another_length(ours, theirs):
    cond, other = made(3, ours, 0), made(1, theirs, 1)
    mixed = cond.where(torch.tensor([False, True, False]), other)
    expected = Conditioning.cat([cond[:1], other, cond[2:]])
    assert all(torch.equal(mixed.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_a_network_is_told_the_same_by_repeated_texts(make_denoiser, rng):
    """Estimate and discriminator's map, alone and in a batch with a longer and a shorter text."""
    denoiser = make_denoiser()
    rows = [made(1, chunks, chunks) for chunks in (1, 2, 3)]
    x, sigma = torch.randn(3, 12, 8, 8, generator=rng), torch.tensor([0.3, 1.0, 8.0])
    with torch.no_grad():
        for call in ("denoise", "logits"):
            together = denoiser(x, sigma, Conditioning.cat(rows), call=call)
            alone = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1], rows[i], call=call) for i in range(3)])
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
            assert (alone - denoiser(x, sigma, Conditioning.cat(rows[:1] * 3), call=call))[1:].abs().max() > 1e-3
