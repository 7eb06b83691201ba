"""ComfyUI's door to the pack; harmless where pytest or a linter imports the folder outside ComfyUI."""

import sys

if __package__ and "comfy" in sys.modules:
    from .nodes.digits import SiDDemoModel
    from .nodes.distil import SiDDistill
    from .nodes.guidance import SiDDistillationGuidance, SiDGuidance
    from .nodes.loaders import SiDCheckpointLoader, SiDDiffusionModelLoader, SiDLoRALoader
    from .nodes.recipe import SiDRecipeInfo, SiDRecipeOverride
    from .nodes.sampling import SiDFewStepSampler, SiDSamplerSelect, SiDScheduler
    from .nodes.training import SiDTrainingRecipe
    from .nodes.version import log_if_below_floor
    from .nodes.watch import SiDRun

    NODE_CLASS_MAPPINGS = {
        "SiDDemoModel": SiDDemoModel,
        "SiDCheckpointLoader": SiDCheckpointLoader,
        "SiDDiffusionModelLoader": SiDDiffusionModelLoader,
        "SiDLoRALoader": SiDLoRALoader,
        "SiDFewStepSampler": SiDFewStepSampler,
        "SiDScheduler": SiDScheduler,
        "SiDSamplerSelect": SiDSamplerSelect,
        "SiDGuidance": SiDGuidance,
        "SiDDistillationGuidance": SiDDistillationGuidance,
        "SiDDistill": SiDDistill,
        "SiDTrainingRecipe": SiDTrainingRecipe,
        "SiDRun": SiDRun,
        "SiDRecipeInfo": SiDRecipeInfo,
        "SiDRecipeOverride": SiDRecipeOverride,
    }
    WEB_DIRECTORY = "./nodes/web"
    log_if_below_floor()
