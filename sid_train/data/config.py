"""The configuration of a run's data."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.conditioning import MAX_TOKENS


@dataclass
class DataConfig:
    """What the generator is asked for, and real examples if there are any."""

    prompts: str = "demo"
    """A .txt (one a line), .jsonl, .json, .csv, .parquet or .tar file, a folder of captions, hf:owner/name, or
    'demo'."""
    pairs: str = ""
    """Real image-text pairs for the GAN branch: a folder of pictures with captions, webdataset shards
    (path/{0000..0099}.tar, or a folder of them), parquet, a list (.jsonl, .csv, or kohya's .json), or 'demo'; empty for
    data-free distillation."""
    buckets: bool = False
    """Cut the pairs' pictures to SDXL's aspect buckets instead of to the generator's own size. Generated pictures keep
    that size, which tells the discriminator something: false is the safe choice."""
    cache: str = ""
    """A folder that `sid_train encode` made of these prompts and pairs, read instead of encoding them; or empty."""
    max_tokens: int = MAX_TOKENS
    """Prompts and captions are read in chunks of 75 tokens, as ComfyUI reads them, and cut after 75, 150 or 225 tokens.
    Long ones take memory: a batch has up to six chunks."""

    def __post_init__(self) -> None:
        # No more: rows of 1 to 3 chunks meet in a batch as 6, those of 1 to 10 would as 2,520.
        if self.max_tokens not in (75, 150, 225):
            raise ValueError(f"data.max_tokens: expected 75, 150 or 225, got {self.max_tokens}")
