"""What makes a run that run: its configuration, its teacher and its data, as files are, not as paths are spelled."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

from ..config import FREE_KEYS, SOURCE_KEYS, Config, config_from_dict
from ..data.cache import prompts_digest
from ..files.reading import reading, shown
from ..models.bundle import ModelBundle
from ..models.conditioning import PairSource
from .checkpoint import Facts


def identity_of(config: Config, bundle: ModelBundle, prompts: list[str], pairs: PairSource | None) -> Facts:
    """What goes into every checkpoint of a run, so that it continues with nothing else."""
    return {
        "teacher": bundle.file_hash,
        "prompts": prompts_digest(prompts),
        "pairs": pairs.identity if pairs is not None else "none",
        "config": json.dumps(config.flat()),
    }


def config_of(facts: Facts, path: Path) -> Config | None:
    """The configuration that a checkpoint at ``path`` was made with; None where it is older than that fact."""
    if "config" not in facts:
        return None
    with reading(path, "a checkpoint that knows its configuration"):
        tables: dict[str, dict] = {}
        for key, value in json.loads(str(facts["config"])).items():
            section, _, name = key.partition(".")
            tables.setdefault(section, {})[name] = value
        return config_from_dict(tables, str(path))


def changes(stored: Config, config: Config, but: Set[str] = frozenset()) -> list[str]:
    """The keys whose values differ, each with both; not those of ``but``."""
    before, after = stored.flat(), config.flat()
    differ = [key for key in after if after[key] != before[key] and key not in but]
    return [f"{key} (was {before[key]!r}, now {after[key]!r})" for key in differ]


def forbidden_changes(stored: Config, config: Config) -> list[str]:
    """Those of ``changes`` with which it would be another run."""
    allowed = FREE_KEYS | SOURCE_KEYS
    if bool(stored.model.init_generator) != bool(config.model.init_generator):
        allowed = allowed - {"model.init_generator"}
    return changes(stored, config, but=allowed)


def require_identity(facts: Facts, identity: Facts, config: Config, path: Path) -> None:
    """ValueError where a checkpoint with ``facts`` was trained from another teacher or other data than ``identity``, or
    as another run than ``config`` continues.
    """
    made_with = config_of(facts, path)
    if made_with is not None and (differ := forbidden_changes(made_with, config)):
        raise ValueError(
            f"{path}: the checkpoint is of a run with another configuration: {', '.join(differ)}: put this run's own "
            "back, or remove it to continue from the one before"
        )
    require_same_teacher(facts, str(identity["teacher"]), path)
    for name, source in (("prompts", config.data.prompts), ("pairs", config.data.pairs or "nothing")):
        there, here = facts.get(name, identity[name]), identity[name]
        if there != here:
            raise ValueError(
                f"{path}: the run was trained on other {name} than data.{name} = {source} has now "
                f"({shown(there, 100)} then, {here} now): put the old ones back, or start another run with "
                "another --out"
            )


def require_same_teacher(facts: Facts, sha256: str, path: Path) -> None:
    """ValueError where a checkpoint with ``facts`` was trained from a teacher with another hash."""
    if facts["teacher"] != sha256:
        raise ValueError(
            f"{path}: the run was distilled from a teacher with SHA-256 {shown(facts['teacher'], 100)}, but the file "
            f"now has {shown(sha256, 100)}: put the old one back, or start another run"
        )
