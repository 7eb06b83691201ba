"""``inspect``: the recipe inside a file."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.recipe import read_recipe


def inspect(file: Path, as_json: bool) -> None:
    recipe = read_recipe(file)
    print(json.dumps(recipe.to_dict(), indent=2) if as_json else recipe.describe())
