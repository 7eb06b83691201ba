"""Draws of a batch that is split into parts."""

import torch

from sid_train.core.rng import BatchRNG


def parts(count: int, on_host: list[list[int]] | None) -> list[BatchRNG]:
    return [BatchRNG(torch.Generator().manual_seed(0), part, count, on_host) for part in range(count)]


def test_parts_share_what_they_draw_on_the_host():
    """The device is asked once, and every part's generator moves on all the same."""
    whole, split = parts(1, None)[0], parts(4, shared := [])
    drawn = (whole.indices(100, 8), whole.integer(9), whole.indices(5, 4), whole.randn(4, 2))
    theirs = [(rng.indices(100, 2), rng.integer(9), rng.indices(5, 1), rng.randn(1, 2)) for rng in split]
    assert [i for rows, _, _, _ in theirs for i in rows] == drawn[0]
    assert {number for _, number, _, _ in theirs} == {drawn[1]}
    assert [i for _, _, rows, _ in theirs for i in rows] == drawn[2]
    assert torch.equal(torch.cat([noise for *_, noise in theirs]), drawn[3])
    assert len(shared) == 3
