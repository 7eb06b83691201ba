"""Which rows of a table make a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ..core.rng import BatchRNG


class RowPicker:
    """Which rows make a batch: all from one group, whose latents have one shape."""

    def __init__(self, groups: Sequence[Hashable]):
        self.groups = groups
        self.members: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            self.members.setdefault(group, []).append(row)

    def draw(self, batch: int, rng: BatchRNG) -> list[int]:
        """``batch`` rows, uniformly with replacement from the group of a uniformly drawn row."""
        members = self.members[self.groups[rng.integer(len(self.groups))]]
        return [members[i] for i in rng.indices(len(members), batch)]
