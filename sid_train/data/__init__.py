"""Where prompts and real pairs come from: files, pictures, or a cache that ``sid_train encode`` made of them."""

from .pairs import PairSource, load_pairs
from .prompts import load_prompts
from .table import PromptTable, load_prompt_table

__all__ = ["PairSource", "PromptTable", "load_pairs", "load_prompt_table", "load_prompts"]
