"""The configuration of a run's data."""

from __future__ import annotations

from dataclasses import dataclass


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
