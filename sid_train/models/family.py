"""What the rest of the trainer needs to know of a kind of model. ``families`` lists the kinds that there are."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..core.noise_schedule import X0, VPSchedule
from ..core.recipe import SiDRecipe, split_architecture
from ..files.hashing import file_sha256
from ..files.tensors import DTYPES, LazyTensor, write_tensors
from .adapters import Adapter, lora_difference
from .bundle import ModelBundle, ModelShapes
from .conditioning import PairSource

Tensors = Mapping[str, LazyTensor]
AUTO = "auto"
"""For ``prediction_type``: what the model's files say, or what is usual where they say nothing."""


@dataclass(kw_only=True)
class OpenedModel(ABC):
    """A model of which only headers and configurations were read.

    prefix: of the network's tensors in the state of its ``Denoiser``, and in the files of ``ModelFamily.export``
    name: for people
    tensors: of the network
    weights: the file they are in, by whose SHA-256 runs and caches know the model
    rest: what else its file holds, by its names there
    is_generator: whether it is a few-step generator, with a recipe
    read_from: the files and folders that any of it is in
    """

    prefix: ClassVar[str] = "unet."

    name: str
    tensors: Tensors
    weights: Path
    rest: Tensors = field(default_factory=dict)
    is_generator: bool = False
    read_from: tuple[Path, ...] = ()

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As recipes name it."""

    @abstractmethod
    def load(self, dtype: torch.dtype | None, resolution: int = 0) -> ModelBundle:
        """The model on the CPU, its network in ``dtype``; None leaves the network out where it is large (on the meta
        device).

        resolution: of the square pictures, in pixels; 0 is the model's own
        """

    def check(self, text: bool = True, codec: bool = True) -> None:
        """ValueError, with the file's name, where any of the model's tensors is missing, strange or of another shape
        than it needs. A large model's weights are not read for it.

        text, codec: whether the text encoders and the latent codec are needed; else they may be missing
        """
        self.load(torch.float32)

    def with_tensors(self, tensors: Tensors) -> OpenedModel:
        """The same model with another network."""
        return replace(self, tensors=tensors)

    def is_lora(self, path: Path) -> bool:
        """Whether a file holds a LoRA as ``read_lora`` reads it, by the names of its tensors."""
        return False

    def read_lora(self, path: Path) -> Adapter:
        """A LoRA file for this model's network."""
        raise ValueError(f"{path}: LoRAs for {self.architecture} are not read")


@dataclass
class Generator:
    """A distilled generator that is not in memory.

    model: what it was distilled from, or the file that it is in
    tensors: of its network, an adapter not included
    adapter: a LoRA to go on top of ``tensors``, where it was distilled as one
    source: the file or folder that it is in
    thumbnail: a picture of its own for model managers, a data: URL; empty where there is none
    """

    model: OpenedModel
    recipe: SiDRecipe
    tensors: Tensors
    adapter: Adapter | None = None
    source: Path | None = None
    thumbnail: str = ""

    def metadata(self) -> dict[str, str]:
        """What its files say in their headers."""
        picture = {"modelspec.thumbnail": self.thumbnail} if self.thumbnail else {}
        return self.recipe.to_metadata() | picture

    def merged(self) -> Tensors:
        """The network with its adapter, fp32 where the adapter changes it."""
        return merge_lora(self.tensors, self.adapter) if self.adapter else self.tensors

    def load(self, resolution: int = 0) -> ModelBundle:
        """The generator in fp32 on the CPU, for pictures of the size that it was trained for if none is given."""
        model = self.model.with_tensors(self.merged())
        bundle = model.load(torch.float32, resolution or self.recipe.training_resolution[0])
        recipe, schedule = self.recipe, bundle.denoiser.schedule
        if recipe.prediction_type == X0 or recipe.timestep_scale != 1:  # of which the model under it knows nothing
            assert isinstance(schedule, VPSchedule)
            bundle.denoiser.schedule = schedule.sampled_as(recipe.prediction_type, recipe.timestep_scale)
        return bundle

    def is_on_another_base(self) -> bool:
        """Whether its adapter is over another model than it was distilled from: reads all of that file, about ten
        seconds for SDXL's.
        """
        known = self.recipe.base_model_hash
        return self.adapter is not None and bool(known) and file_sha256(self.model.weights) != known


def refuse_to_overwrite(out: Path, inputs: Iterable[Path]) -> None:
    """ValueError where ``out`` is one of the files that are read to write it, however they are spelled, or in one of
    the folders.
    """
    for path in filter(os.path.exists, inputs):
        if any(os.path.samefile(place, path) for place in (out, *out.absolute().parents) if place.exists()):
            raise ValueError(
                f"-o {out}: it would replace (a part of) {path}, which is read for it: choose another name"
            )


def merge_lora(network: Tensors, adapter: Adapter) -> Tensors:
    """``network`` with ``up @ down`` added to the weights of the adapter's modules; ValueError if one is not there."""
    merged = dict(network)
    for module, factors in adapter.items():
        name = f"{module}.weight"
        if name not in merged:
            raise ValueError(f"LoRA module {module}: expected a module of this UNet, which has none of that name")
        merged[name] = _added(merged[name], factors, module)
    return merged


def _added(weight: LazyTensor, factors: tuple[Tensor, Tensor, float], module: str) -> LazyTensor:
    source = f"{weight.source or module} with its LoRA"
    return LazyTensor(
        weight.shape, torch.float32, lambda: weight.load_finite().float() + lora_difference(*factors), source
    )


@dataclass(frozen=True)
class ExportOptions:
    """How a generator is to be written.

    format: one of the family's ``export_formats``; empty for its default
    vae: a VAE's file to put in instead of the model's own
    rank, energy: of a LoRA that is extracted from a whole network: one of the two
    base: the model that such a LoRA is extracted against
    """

    format: str = ""
    dtype: str = "fp16"
    vae: Path | None = None
    rank: int = 0
    energy: float = 0
    base: OpenedModel | None = None


class ModelFamily(ABC):
    """A kind of model: how its files are opened, what shapes it has, and what is written of its generators.

    What is not abstract here is for small models, which are opened whole and kept in one file; SDXL replaces it.

    word: a model that this family ships, as the configuration names it; empty where it ships none
    export_formats: what ``export`` writes, the format of a whole generator first
    """

    word: ClassVar[str] = ""
    export_formats: ClassVar[tuple[str, ...]] = ("checkpoint",)

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As recipes name it."""

    def opens(self, source: str, metadata: Mapping[str, str]) -> bool:
        """Whether ``source``, whose safetensors header has ``metadata``, is for this family to open."""
        named, _ = split_architecture(metadata.get("modelspec.architecture", ""))
        return named == self.architecture or (bool(self.word) and source == self.word)

    def check_resolution(self, resolution: int) -> None:
        """ValueError for a size of square pictures, in pixels, that the family's models do not make; 0 is their own."""
        return

    @abstractmethod
    def open(self, source: str, prediction_type: str = AUTO) -> OpenedModel:
        """The model in a file or folder, or under the family's own word. ValueError for what is none of this family.

        prediction_type: what its network predicts, where its files do not say it; ValueError where they say otherwise
        """

    def shapes(self, source: str, resolution: int, prediction_type: str = AUTO) -> ModelShapes:
        """The model's shapes; those of a family's base model where ``source`` is not here, if it has one."""
        model = self.open(source, prediction_type)
        bundle = model.load(torch.float32, resolution)
        prompt = bundle.conditioner.encode([""])
        return ModelShapes(
            name=bundle.name,
            denoiser=bundle.denoiser.to("meta"),
            latent_shape=bundle.latent_shape,
            conditioning={name: tuple(tensor.shape[1:]) for name, tensor in prompt.tensors.items()},
            text_parameters=sum(torch.Size(tensor.shape).numel() for tensor in model.rest.values()),
            vae=None,
        )

    def open_generator(self, path: Path, recipe: SiDRecipe, base: str | None) -> Generator:
        """A generator's file with a recipe. ``base`` is what a LoRA belongs on, or what has the parts that it lacks."""
        if base is not None:
            raise ValueError(f"--base: {path} is a whole {self.architecture} generator, which needs none")
        model = self.open(str(path))
        return Generator(model, recipe, model.tensors, source=path)

    def export(self, generator: Generator, path: Path, options: ExportOptions) -> list[str]:
        """Writes ``generator`` to ``path``; returns what the user should know."""
        foreign = options.base is not None and options.base is not generator.model
        if options.dtype == "fp8" or foreign or options.vae or options.rank or options.energy:
            raise ValueError(
                f"export: generators of {self.architecture} are written as a checkpoint in fp16, bf16 or fp32 only"
            )
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: expected a name that ends in .safetensors")
        model, dtype = generator.model, DTYPES[options.dtype]
        tensors = {model.prefix + name: tensor for name, tensor in generator.merged().items()}
        stored = {name: tensor.narrowed(dtype) for name, tensor in {**tensors, **model.rest}.items()}
        write_tensors(path, stored, generator.metadata())
        return []

    def prompts(self) -> list[str]:
        """Those that the shipped model is distilled with."""
        raise NotImplementedError

    def pairs(self, model: ModelBundle) -> PairSource:
        """The real pairs that the shipped model is distilled with."""
        raise NotImplementedError
