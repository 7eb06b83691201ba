"""A run's teacher, opened as its configuration says."""

from __future__ import annotations

from ..config import ModelConfig
from ..models.families import open_model
from ..models.family import OpenedModel


def open_teacher(config: ModelConfig) -> OpenedModel:
    """The teacher, none of it read but headers. ValueError for what cannot be one."""
    return open_model(config.teacher, config.resolution, config.prediction_type)
