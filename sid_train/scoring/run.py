"""Makes the pictures of one or several sources, and measures them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.distances import frechet_distance, precision_recall
from ..evaluation.intervals import Estimate, bootstrap
from ..files.atomic import replacing
from ..models.family import Generator, OpenedModel
from ..training.distributed import check_processes, is_first_process
from .metrics import DISTANCES, INCEPTION, SCORES, Weights, make_inception
from .pictures import claim, made_files, make_pictures, picture_files, read_pictures
from .sources import Sampling, load_source, open_source

BATCH = 16
"""Pictures that a metric's network sees at once."""
MEAN_RESAMPLES = 1000


@dataclass(frozen=True)
class Request:
    """What is measured, and how.

    prompts: one a picture
    captions: how many there were, of which ``prompts`` are the first
    metrics: some of ``METRICS``
    reference, teacher: folders of pictures for FID, precision and recall, and for FID-T
    resamples: of the figures of all pictures together, for their intervals; each costs seconds
    """

    prompts: list[str]
    captions: int
    seed: int
    sampling: Sampling
    metrics: tuple[str, ...]
    weights: Weights
    reference: Path | None = None
    teacher: Path | None = None
    resamples: int = 20


@dataclass
class Evaluated:
    """One source's figures, by metric."""

    name: str
    told: str
    files: list[Path]
    figures: dict[str, Estimate]


def evaluate_sources(sources: Sequence[str], request: Request, out: Path, device: torch.device) -> list[Evaluated]:
    """The figures of each source. Pictures and features are kept in ``out``, so that the same command continues.

    Several processes (``accelerate launch``) share the making of pictures; the first measures. The others get [].
    """
    opened = [open_source(source, request.sampling) for source in sources]
    for source, model in zip(sources, opened, strict=True):
        if model is None:
            _files_for(Path(source), request)
    for folder in filter(None, (request.reference, request.teacher)):
        picture_files(folder)
    if is_first_process():  # the others wait where processes meet first, which may take long
        _require_networks(request)
    state = PartialState()
    check_processes(state)
    device = device if state.num_processes == 1 else state.device
    made = [
        _pictures(source, model, out / _folder(source, place), request, device)
        for place, (source, model) in enumerate(zip(sources, opened, strict=True))
    ]
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    measure = _Measure(request, out, device)
    return [
        Evaluated(source, told, files, measure.figures(files, out / _folder(source, place)))
        for place, (source, (told, files)) in enumerate(zip(sources, made, strict=True))
    ]


def _require_networks(request: Request) -> None:
    """ValueError where the weights of a metric cannot be had: before hours are spent on pictures."""
    cpu = torch.device("cpu")
    if any(name in DISTANCES for name in request.metrics):
        make_inception(request.weights, cpu)
    for name in request.metrics:
        if name in SCORES:
            SCORES[name].make(request.weights, cpu)


def _folder(source: str, place: int) -> str:
    return f"{place}-{Path(source).stem}"


def _pictures(
    source: str, opened: Generator | OpenedModel | None, folder: Path, request: Request, device: torch.device
) -> tuple[str, list[Path]]:
    """What a source is, and the pictures of it: those in its own folder, or those that are made."""
    state = PartialState()
    if opened is None:
        return "pictures", _files_for(Path(source), request)
    model = load_source(opened, request.sampling, device)
    settings: dict[str, object] = {
        "source": model.identity,
        "sampling": model.told,
        "resolution": list(model.bundle.image_size),
        "dtype": str(request.sampling.dtype),
        "seed": request.seed,
        "prompts": hashlib.sha256("\n".join(request.prompts).encode()).hexdigest(),
    }
    if state.is_main_process:
        claim(folder, settings)
    state.wait_for_everyone()
    make_pictures(folder, model, request.prompts, request.seed, state.process_index, state.num_processes)
    return model.told, made_files(folder, len(request.prompts))


def _files_for(folder: Path, request: Request) -> list[Path]:
    """The pictures in a folder, one a prompt. ValueError where they cannot be: one more, and all were mistaken."""
    files = picture_files(folder)
    if len(files) not in (request.captions, len(request.prompts)):
        expected = " or ".join(f"{count:,}" for count in sorted({request.captions, len(request.prompts)}))
        raise ValueError(
            f"{folder}: expected {expected} pictures, one a caption, in the order of their names, found {len(files):,}"
        )
    return files[: len(request.prompts)]


class _Measure:
    """Networks are made when they are first asked, and one is in memory at a time."""

    def __init__(self, request: Request, out: Path, device: torch.device):
        self.request, self.out, self.device = request, out, device

    def figures(self, files: list[Path], folder: Path) -> dict[str, Estimate]:
        figures: dict[str, Estimate] = {}
        wanted = self.request.metrics
        if any(name in DISTANCES for name in wanted):
            figures |= self._distances(self._features(files, folder))
        for name in (name for name in SCORES if name in wanted):
            values = self._values(name, files, folder)
            figures[name] = bootstrap(lambda rows, v=values: float(v[rows].mean()), len(values), MEAN_RESAMPLES)
        return {name: figures[name] for name in wanted}

    def _distances(self, features: Tensor) -> dict[str, Estimate]:
        request, figures = self.request, {}
        count = len(features)
        for name, folder, most in (("fid", request.reference, None), ("fid-t", request.teacher, count)):
            if name in request.metrics and folder is not None:
                other = self._reference(folder, most)
                figures[name] = bootstrap(
                    lambda rows, other=other: frechet_distance(features[rows], other), count, request.resamples
                )
        if request.reference is not None and {"precision", "recall"} & set(request.metrics):
            other = self._reference(request.reference)
            for name, value in zip(("precision", "recall"), precision_recall(other, features), strict=True):
                # Repeated pictures would be their own neighbours: the interval is not estimated.
                figures[name] = Estimate(value, value, value)
        return figures

    def _reference(self, folder: Path, most: int | None = None) -> Tensor:
        return self._features(picture_files(folder)[:most], self.out / "compared-with")

    def _features(self, files: list[Path], folder: Path) -> Tensor:
        def compute() -> Tensor:
            network = make_inception(self.request.weights, self.device)
            parts = [network.features(pictures) for pictures in read_pictures(files, BATCH, INCEPTION)]
            return torch.cat(parts)

        return self._kept(INCEPTION, files, folder, compute)

    def _values(self, name: str, files: list[Path], folder: Path) -> Tensor:
        def compute() -> Tensor:
            scorer, start, parts = SCORES[name].make(self.request.weights, self.device), 0, []
            for pictures in read_pictures(files, BATCH, name):
                parts.append(scorer.values(pictures, self.request.prompts[start : start + len(pictures)]).float())
                start += len(pictures)
            return torch.cat(parts)

        return self._kept(name, files, folder, compute)

    def _kept(self, name: str, files: list[Path], folder: Path, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, or gave for the same files with the same weights."""
        identity = hashlib.sha256()
        networks = (INCEPTION,) if name == INCEPTION else SCORES[name].networks
        weights = [self.request.weights.of(network, "") for network in networks]
        named = (Path(text) for word in weights for text in (word, word.partition(":")[2]))
        for file in (*files, *(path for path in named if path.is_file())):
            status = file.stat()
            identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        identity.update(repr(weights).encode())
        if name != INCEPTION:
            identity.update("\n".join(self.request.prompts).encode())
        path = folder / f"{name}-{identity.hexdigest()[:16]}.safetensors"
        if path.is_file():
            return load_file(path)["values"]
        values = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"values": values}, temporary)
        return values
