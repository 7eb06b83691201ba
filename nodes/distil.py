"""SiD Distill: makes a few-step generator of the model in the graph, as a LoRA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..sid_train.core.architectures import DIGITS, SDXL, Architecture
from ..sid_train.core.noise_schedule import VPSchedule
from ..sid_train.core.recipe import LORA_SUFFIX, SiDRecipe, TrainingGuidance
from ..sid_train.core.timesteps import MAX_SID_STEPS
from ..sid_train.errors import NonFiniteError
from ..sid_train.files.atomic import write_text
from ..sid_train.files.hashing import file_sha256
from ..sid_train.files.reading import read_text, shown
from ..sid_train.files.tensors import LazyTensor, write_tensors
from ..sid_train.models.conditioning import Conditioning
from ..sid_train.models.digits.data import IMAGE_SIZE, TRAINING_SUBJECTS
from .checks import check_prompt, checked
from .common import RecipeType, StrategyType, read_header, refuse_other_hosts, schema, show
from .loaders import apply_lora
from .models import check_network, has_zero_terminal_snr
from .sampling import fitted
from .start import remember_start
from .training import check_name

PICTURES = 16  # of the grid
SHOWN = 4  # of the preview
SAVE_EVERY = 100
KEPT_STATES = 3
MAX_PROMPTS = 4096


class SiDDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDDistill",
            display_name="SiD Distill",
            description="Distils the model in this graph into a few-step generator, with the LoRAs that are on it, and "
            "writes it as a LoRA with its recipe into models/loras. It needs no pictures: prompts are enough. Stop it "
            "at any time: the same queue goes on from there.",
            search_aliases=["distill", "train few-step lora", "score identity distillation", "accelerate model"],
            is_output_node=True,
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="What to distil: SDXL, SD 1.x, 2.x, or SiD Demo Model."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size to train for: Empty Latent Image, or 'latent' of SiD Demo "
                    "Model.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One a line, the more the better; or the name of a .txt file in ComfyUI's input folder. "
                    "Empty: the demo's own, for SiD Demo Model.",
                ),
                io.Int.Input("steps", default=4, min=1, max=MAX_SID_STEPS, tooltip="Network calls of the generator."),
                io.Int.Input(
                    "iterations", default=1000, min=1, max=1_000_000, tooltip="Look at the preview, and stop or go on."
                ),
                io.Int.Input("rank", default=64, min=1, max=1024, tooltip="Of the LoRA."),
                io.Float.Input(
                    "generator_lr",
                    default=5e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip="Learning rate of the generator.",
                ),
                io.Float.Input(
                    "fake_score_lr",
                    default=5e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip="Learning rate of the fake score, which follows the generator.",
                ),
                io.Int.Input("fake_score_updates", default=1, min=1, max=10, tooltip="Of one iteration."),
                io.Int.Input("batch_size", default=8, min=1, max=4096, tooltip="Pictures of an iteration."),
                io.Int.Input(
                    "micro_batch",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Pictures in memory at once, a divisor of batch_size: more is faster.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    tooltip="Computes blocks again in the backward pass: a third slower, and much less memory.",
                ),
                # Not 'seed', which the frontend changes after each queue: the same queue is to go on.
                io.Int.Input(
                    "training_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Of the noise, the prompts and the adapters.",
                ),
                io.Int.Input("preview_every", default=25, min=1, max=100_000, tooltip="Iterations between previews."),
                io.String.Input("name", default="distilled", tooltip="Of the LoRA's file; a number is added to it."),
                StrategyType.Input(
                    "strategy", optional=True, tooltip="From SiD Distillation Guidance; without one: none."
                ),
                io.Vae.Input("vae", optional=True, tooltip="For true colours in the preview and the grid."),
            ],
            outputs=[
                io.Model.Output(tooltip="'model' with the LoRA: a few-step generator."),
                RecipeType.Output(display_name="recipe", tooltip="How to sample it."),
                io.String.Output(display_name="lora_name", tooltip="The LoRA, as loaders name it."),
                io.Image.Output(display_name="grid", tooltip="Pictures of the averaged generator."),
                io.Image.Output(display_name="losses", tooltip="The losses by iteration."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompts: str = "", **others) -> str:
        """Another where a file of prompts was edited."""
        try:
            path = prompt_file(prompts)
            return "" if path is None else file_sha256(path)
        except (AttributeError, ValueError, OSError):  # a link, or no file: the run will say it
            return ""

    @classmethod
    @checked
    def execute(
        cls,
        model,
        clip,
        latent_image: dict,
        prompts: str,
        steps: int,
        iterations: int,
        rank: int,
        generator_lr: float,
        fake_score_lr: float,
        fake_score_updates: int,
        batch_size: int,
        micro_batch: int,
        checkpointing: bool,
        training_seed: int,
        preview_every: int,
        name: str,
        strategy: str = "none",
        vae=None,
    ) -> io.NodeOutput:
        # Its modules are the trainer's, which a start of ComfyUI is not to wait for.
        from .distillation import Distillation, Settings, conditioning_of, identity_of, run_distillation

        check_name(name)
        settings = Settings(
            steps=steps,
            guidance=strategy,
            iterations=iterations,
            rank=rank,
            generator_lr=generator_lr,
            fake_score_lr=fake_score_lr,
            batch_size=batch_size,
            micro_batch=micro_batch,
            fake_score_updates=fake_score_updates,
            seed=training_seed,
            checkpointing=checkpointing,
        )
        sampling = model.get_model_object("model_sampling")
        architecture, predicts = check_network(model.model, sampling, "model")
        if predicts not in ("epsilon", "v_prediction"):
            raise ValueError(f"model: expected a teacher that predicts epsilon or v, got {predicts}: a generator")
        schedule = VPSchedule.sdxl(has_zero_terminal_snr(sampling), predicts)
        texts = prompts_of(prompts, architecture)
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in [*texts, ""]]
        check_prompt("clip", encoded[0], architecture)
        latent_shape = tuple(fitted(model, latent_image).shape[1:])

        run = None
        try:
            with torch.inference_mode(False):
                patcher = trainable(model)
                device = patcher.load_device
                with torch.no_grad():
                    told = [conditioning_of(patcher.model, one, latent_shape) for one in encoded]
                options = patcher.model_options.get("transformer_options", {})
                run = Distillation(
                    patcher.model, options, schedule, told[:-1], told[-1].to(device), latent_shape, settings, device
                )
                state = _state_file(identity_of(run, told))
                if state.is_file():
                    run.load(state)
                view = View(cls, run, patcher, told[:-1], vae, preview_every)
                with torch.enable_grad():
                    run_distillation(run, state, SAVE_EVERY, view.report)
                grid = view.pictures(PICTURES)
                tensors = _lora_of(run, patcher, architecture)
        except NonFiniteError as error:
            raise ValueError(
                f"Iteration {run.iteration + 1}: {error}. No step was taken with it: lower generator_lr and "
                "fake_score_lr."
            ) from None
        except comfy.model_management.OOM_EXCEPTION:
            comfy.model_management.unload_all_models()
            raise ValueError(
                "The device has too little memory: set micro_batch to 1 and checkpointing on, or lower rank and the "
                "size of latent_image."
            ) from None
        except comfy.model_management.InterruptProcessingException:
            if run is not None and run.iteration:
                show(cls, f"Stopped after iteration {run.iteration} of {iterations}; the same queue goes on. {state}")
            raise
        finally:
            if run is not None:
                run.close()
        recipe = _recipe(settings, schedule, architecture, latent_shape, texts, name)
        path = _finished(state, name)
        if path is None:
            path = free_name("loras", f"{name}-sid-{steps}step")
            _write(path, tensors, recipe, settings)
            write_text(state.with_suffix(".txt"), f"{path}\n")
        _drop_old_states(state.parent)
        patched, _, _ = apply_lora(model, None, str(path), read_header(str(path), str(path)), 1.0, False)
        losses = plot(run.losses)
        return io.NodeOutput(remember_start(patched), recipe, path.name, grid, losses)


def prompts_of(text: str, architecture: Architecture) -> list[str]:
    """One a line; ValueError where there is none, or too many."""
    if (path := prompt_file(text)) is not None:
        text = read_text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines and architecture is DIGITS:
        return [subject.prompt for subject in TRAINING_SUBJECTS]
    if not 0 < len(lines) <= MAX_PROMPTS:
        raise ValueError(f"prompts: expected 1 to {MAX_PROMPTS:,} lines, got {len(lines):,}")
    return list(dict.fromkeys(lines))


def prompt_file(text: str) -> Path | None:
    """The file in ComfyUI's input folder that the prompts are in; ValueError where there is none of that name."""
    name = text.strip()
    if "\n" in name or not name.lower().endswith(".txt"):
        return None
    refuse_other_hosts("prompts", name)
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / name).resolve()
    if folder not in path.parents or not path.is_file():
        raise ValueError(f"prompts: there is no file {shown(name, 100)!r} in ComfyUI's input folder")
    return path


def trainable(model):
    """A clone of MODEL on its device, whose weights can take part in a backward pass: those that ComfyUI made in
    inference mode are copied, one by one. To be called outside of it. ValueError for a model that is not its network
    alone.
    """
    network, memory = model.model, comfy.model_management
    patches = model.model_options.get("transformer_options", {})
    if model.get_model_object("model_sampling").__dict__.get("timestep_scale", 1.0) != 1 or _has_wrappers(model):
        raise ValueError(
            "model: expected a model that is its network alone, but a node changed how the network is called. Connect "
            "the model from its loader, and LoRAs."
        )
    if "patches_replace" in patches:
        raise ValueError("model: expected attention of its own, but a node (an IP adapter, for one) replaced it")
    channels = network.model_config.unet_config["in_channels"]
    if channels != network.latent_format.latent_channels:
        raise ValueError(f"model: expected a text-to-image model, but its network has {channels} input channels")
    if network.model_config.optimizations.get("fp8"):
        raise ValueError("model: fast fp8 passes no gradient: load it with weight_dtype 'fp8_e4m3fn'")
    is_dynamic = getattr(model, "is_dynamic", None)
    try:
        patcher = model.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else model.clone()
    except RuntimeError as error:  # of another pack's loader
        raise ValueError(
            f"model: it cannot be loaded again for training ({error}): use ComfyUI's or SiD's loader"
        ) from None
    compute = patcher.get_model_object("manual_cast_dtype") or network.get_dtype()
    if compute == torch.float16:  # whose range gradients leave
        bf16 = memory.should_use_bf16(patcher.load_device)
        patcher.set_model_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    load(patcher)
    return patcher


def _has_wrappers(model) -> bool:
    """Whether a node put something around the network's calls."""
    kinds = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    return any(wrappers for kind in kinds for wrappers in model.wrappers.get(kind, {}).values())


@torch.no_grad()
def load(patcher) -> None:
    """Puts it on its device, and everything else off it; also after another model took its place there."""
    with torch.inference_mode():  # as ComfyUI does: a weight of that mode is not to be moved out of it
        comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
    for module in patcher.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
                raise ValueError(
                    "model: its weights are quantized in a way that cannot be trained on: load it with weight_dtype "
                    "'default', or an fp8 type"
                )
            if parameter.requires_grad or not has_version(parameter):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not has_version(buffer):
                module._buffers[name] = buffer.clone()


def has_version(tensor: Tensor) -> bool:
    """Whether autograd can use a tensor: one that was made in inference mode has no version, also after it was moved to
    another device outside of it.
    """
    try:
        _ = tensor._version
    except RuntimeError:
        return False
    return True


class View:
    """What is shown while it runs."""

    def __init__(self, node, run, patcher, prompts: Sequence[Conditioning], vae, every: int):
        self.node, self.run, self.patcher, self.vae, self.every = node, run, patcher, vae, every
        self.prompts = prompts
        self.bar = comfy.utils.ProgressBar(run.settings.iterations)
        self.began, self.first = time.monotonic(), run.iteration

    def report(self, run) -> None:
        preview = None
        if run.iteration % self.every == 0:
            preview = ("JPEG", _strip(self.pictures(SHOWN)), 512)
        self.bar.update_absolute(run.iteration, run.settings.iterations, preview)
        left = (time.monotonic() - self.began) / (run.iteration - self.first)
        left *= run.settings.iterations - run.iteration
        losses = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in run.losses[-1].items())
        told = [
            f"{run.iteration} of {run.settings.iterations}, {left / 60:.1f} minutes left: {losses}",
            *run.notes[-3:],
        ]
        show(self.node, "\n".join(told))

    @torch.no_grad()
    def pictures(self, count: int) -> Tensor:
        """IMAGE of the averaged generator: as many prompts, evenly chosen."""
        chosen = [self.prompts[i * len(self.prompts) // count] for i in range(count)]
        parts = [self.run.sample(one.to(self.run.device), seed=place) for place, one in enumerate(chosen)]
        made = torch.cat(parts).float()
        if self.vae is not None:
            latents = self.patcher.model.process_latent_out(made).cpu()
            with torch.inference_mode():
                images = torch.cat([self.vae.decode(latents[i : i + 1]).float().cpu() for i in range(count)])
            load(self.patcher)
            return images
        format_ = self.patcher.get_model_object("latent_format")
        previewer = latent_preview.Latent2RGBPreviewer(
            format_.latent_rgb_factors, getattr(format_, "latent_rgb_factors_bias", None)
        )
        shown = [previewer.decode_latent_to_preview(latent[None]) for latent in made.cpu()]
        return torch.stack([torch.from_numpy(np.array(image)).float() / 255 for image in shown])


def _strip(images: Tensor) -> Image.Image:
    """IMAGE side by side."""
    row = torch.cat(list(images), dim=1)
    return Image.fromarray((row.clamp(0, 1) * 255).byte().numpy())


def plot(losses: Sequence[dict[str, float]], width: int = 768, height: int = 192) -> Tensor:
    """IMAGE with one curve a loss, each between its own extremes."""
    names = list(dict.fromkeys(name for entry in losses for name in entry))
    canvas = Image.new("RGB", (width, height * len(names)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(names):
        values = [entry[name] for entry in losses if name in entry]
        low, high = min(values), max(values)
        top = row * height
        places = [
            (
                10 + (width - 20) * i / max(1, len(values) - 1),
                top + height - 10 - (height - 40) * ((value - low) / (high - low) if high > low else 0.5),
            )
            for i, value in enumerate(values)
        ]
        draw.text((10, top + 6), f"{name.replace('_', ' ')}: {low:.4g} to {high:.4g}", "black")
        draw.line(places, fill=(43, 108, 176), width=2) if len(places) > 1 else None
    return torch.from_numpy(np.array(canvas)).float()[None] / 255


def _lora_of(run, patcher, architecture: Architecture) -> dict[str, Tensor]:
    from .distillation import AVERAGE
    from .graph import kohya_tensors

    config = patcher.model.model_config.unet_config
    return kohya_tensors(run.adapters.factors[AVERAGE], config, ldm_names=architecture is SDXL)


def _recipe(settings, schedule, architecture, latent_shape, texts, name) -> SiDRecipe:
    method = settings.method
    strategy, timesteps = method.strategy, tuple(schedule.ladder(method.steps, method.t_init))
    size = (IMAGE_SIZE, IMAGE_SIZE) if architecture is DIGITS else (8 * latent_shape[1], 8 * latent_shape[2])
    return SiDRecipe(
        base_model=architecture.base_model,
        architecture=architecture.name,
        prediction_type=schedule.prediction_type,
        zero_terminal_snr=bool(schedule.sigmas[-1] > 100),
        timesteps=timesteps,
        t_init=timesteps[0],
        noise_mode=method.noise_mode,
        training_resolution=size,
        title=f"{name}, SiD {method.steps}-step",
        guidance=TrainingGuidance(strategy.name, strategy.fake_train, strategy.fake_eval, strategy.teacher),
        training_summary={
            "iterations": str(settings.iterations),
            "batch size": str(settings.batch_size),
            "generator learning rate": f"{settings.generator_lr:g}",
            "fake score learning rate": f"{settings.fake_score_lr:g}",
            "prompts": f"{len(texts):,}",
            "made in": "ComfyUI",
        },
    )


def _write(path: Path, tensors: dict[str, Tensor], recipe: SiDRecipe, settings) -> None:
    metadata = recipe.to_metadata() | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": str(settings.rank),
        "ss_base_model_version": recipe.kohya_version,
    }
    metadata["modelspec.architecture"] += LORA_SUFFIX
    write_tensors(path, {name: LazyTensor.of(tensor, name) for name, tensor in tensors.items()}, metadata)


def free_name(kind: str, name: str) -> Path:
    """In ComfyUI's folder of that name, or its first one of that kind: a name that is not taken."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    folder = next((folder for folder in folders if folder.name == kind), folders[0])
    number = 1
    while (path := folder / f"{name}-{number:03d}.safetensors").exists():
        number += 1
    return path


def _state_file(identity: str) -> Path:
    return Path(folder_paths.get_user_directory()) / "sid_distill" / f"{identity}.safetensors"


def _finished(state: Path, name: str) -> Path | None:
    """The LoRA that was written of a run under this name, where it is still there."""
    note = state.with_suffix(".txt")
    path = Path(read_text(note).strip()) if note.is_file() else None
    return path if path is not None and path.name.startswith(f"{name}-sid-") and path.is_file() else None


def _drop_old_states(folder: Path) -> None:
    """Leaves the newest few: each has a LoRA's weights many times."""
    states = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    for state in states[:-KEPT_STATES]:
        state.unlink(missing_ok=True)
        state.with_suffix(".txt").unlink(missing_ok=True)
