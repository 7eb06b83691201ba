"""How many of some texts are longer than the text encoder reads at once, and how many are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.conditioning import CHUNK_TOKENS, Conditioner


@dataclass(frozen=True)
class Lengths:
    """Of prompts or captions.

    chunks: how many of 75 tokens each text is read in
    longer: how many texts have more than 75 tokens
    cut: how many have more than ``max_tokens``, after which they are cut
    """

    chunks: list[int]
    longer: int
    cut: int
    max_tokens: int

    @property
    def most(self) -> int | None:
        """The most chunks that a text is read in; None where none is read in more than one, for ``cache.Facts``."""
        most = max(self.chunks, default=1)
        return most if most > 1 else None

    def __str__(self) -> str:
        """As in "12 have more than 75 tokens (read in up to 3 chunks), 2 are cut after 225"."""
        read = f" (read in up to {self.most} chunks)" if self.most else ""
        return f"{self.longer} have more than {CHUNK_TOKENS} tokens{read}, {self.cut} are cut after {self.max_tokens}"


def measure(conditioner: Conditioner, texts: Sequence[str]) -> Lengths:
    """The lengths of ``texts`` for ``conditioner``. ValueError for one that it cannot encode."""
    found = conditioner.chunks(texts)
    most = max(1, conditioner.max_tokens // CHUNK_TOKENS)
    longer, cut = sum(n > 1 for n in found), sum(n > most for n in found)
    return Lengths([min(n, most) for n in found], longer, cut, conditioner.max_tokens)


def report_long(lengths: Lengths, what: str) -> None:
    """Prints how many of ``what``, such as a file's prompts, are long; nothing where none is."""
    if lengths.longer:
        print(f"{what}: {lengths}", flush=True)
