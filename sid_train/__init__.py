"""Few-step SDXL by Score identity Distillation: ``python -m sid_train --help``."""
