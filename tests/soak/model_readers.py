"""The readers of models, and small models for them."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import common
from mutate import Input
from processes import run
from reader import Reader, content_of, folder_of


def model_readers(work: Path) -> list[Reader]:
    import torch
    from diffusers.utils.logging import disable_progress_bar
    from safetensors.torch import save_file

    from sid_train.commands.inspect import inspect
    from sid_train.core.recipe import SiDRecipe
    from sid_train.files.pickles import open_pickled
    from sid_train.files.tensors import LazyTensor, open_tensors
    from sid_train.models.families import model_shapes, open_generator, open_model
    from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND
    from sid_train.models.stable_diffusion.lora import kohya_modules

    sys.path.append(str(Path(__file__).parents[1]))
    import small_sd
    from small_sdxl import save_single_file, small_pipeline

    disable_progress_bar()
    pipeline = small_pipeline()
    whole = save_single_file(work / "sdxl.safetensors", pipeline, torch.float16)
    pipeline.save_pretrained(work / "sdxl")
    older = []
    for kind in (SD1_KIND, SD2_KIND):
        path = work / f"{kind.architecture.name}.safetensors"
        older.append(small_sd.save_single_file(path, kind, small_sd.small_pipeline(kind), torch.float16))
    teacher = open_model(str(whole))
    lora: dict[str, torch.Tensor] = {}
    for ours, name in [*kohya_modules(teacher.tensors, teacher.unet_config).items()][:40:8]:
        shape = teacher.tensors[f"{ours}.weight"].shape
        if len(shape) == 2:
            lora |= {
                f"{name}.lora_down.weight": torch.ones(2, shape[1]),
                f"{name}.lora_up.weight": torch.ones(shape[0], 2),
            }
            lora[f"{name}.alpha"] = torch.tensor(2.0)
    recipe = SiDRecipe().to_metadata()
    save_file(lora, work / "lora.safetensors", recipe)
    unet = {k: v for k, v in pipeline.unet.state_dict().items() if k.startswith(("conv_in", "time_embedding"))}
    save_file(unet, work / "part.safetensors", recipe)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    types += [torch.float8_e4m3fn, torch.uint16]
    save_file({str(t): torch.zeros(3, 2).to(t) for t in types[:8]}, work / "types.safetensors", {"a": "b"})
    save_file({str(t): torch.zeros(3, 2).to(t) for t in types}, work / "types-2.safetensors")
    generator = work / "generator"
    made = run(["distill", "--config", "demo", *common.small(1, 1), "--out", generator], work / "log", generator)
    assert not made.code, made.output
    generator_file = content_of(generator / "generator.safetensors", data=False)
    shutil.rmtree(generator)

    pickled = [
        {
            "given.pkl": pickle.dumps(
                {"ema": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GroupNorm(1, 3))}, number
            )
        }
        for number in (3, 4, 5)
    ]

    def one(*paths: Path, data: bool = True) -> list[Input]:
        return [{"given.safetensors": content_of(path, data)} for path in paths]

    folder = [folder_of(work / "sdxl", data=False, leave_out=("vocab.json", "merges.txt", "tokenizer.json"))]
    sdxl, digits = one(whole, data=False), [{"given.safetensors": generator_file}]
    file = "given.safetensors"

    def load_all(path: Path, opened: Callable[[Path], dict[str, LazyTensor]] = open_tensors) -> None:
        for tensor in opened(path).values():
            tensor.load()

    def load_rest(path: Path) -> None:
        parts = open_model(str(path))
        parts.load_vae()
        parts.load_text()

    return [
        Reader("recipe (inspect)", [*one(work / "lora.safetensors", work / "part.safetensors"), *digits],
               file, lambda p: (inspect(p, False), inspect(p, True)), 3),
        Reader("tensors", one(work / "types.safetensors", work / "types-2.safetensors"), file, load_all, 3),
        Reader("pickle", pickled, "given.pkl", lambda p: load_all(p, open_pickled), 2),
        Reader("digits file", digits, file, lambda p: open_model(str(p)).load(torch.float32), 0.5),
        Reader("sdxl file", sdxl, file, lambda p: open_model(str(p)).load(None), 0.7),
        Reader("sdxl file, text and vae", sdxl, file, load_rest, 0.02),
        Reader("sd 1.x and 2.x files", one(*older, data=False), file, lambda p: open_model(str(p)).load(None), 0.7),
        Reader("sdxl folder", folder, "", lambda p: open_model(str(p)).load(None), 0.4),
        Reader("plan's shapes of a file", [*sdxl, *digits], file, lambda p: model_shapes(str(p), 0), 0.15),
        Reader("plan's shapes of a folder", folder, "", lambda p: model_shapes(str(p), 0), 0.15),
        Reader("lora", one(work / "lora.safetensors"), file, lambda p: teacher.read_lora(p), 2),
        Reader("generator", digits, file, lambda p: open_generator(str(p)).load(), 0.5),
    ]  # fmt: skip
