"""What the nodes cost: ``python tests/comfyui/benchmark.py``, with COMFYUI_PATH or ~/comfy/ComfyUI, on the CPU.

Paired runs on one small SDXL-class model, in turn: ComfyUI's KSampler (lcm, K steps, CFG 1), SiD Few-Step Sampler with
guidance none, and with nag. Prints the median time of each and the median of the ratios to KSampler and to none; then
how far the latents of the native fallback workflow are from ours, and for comparison those of another seed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import conftest
from helpers import conditioning, empty_latent, module, native_fallback, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of the latent: 128 for SDXL's 1,024 pixels")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    if conftest.PROBLEM:
        raise SystemExit(conftest.PROBLEM)
    pack = conftest.import_pack()
    import comfy.sd
    import torch
    from small_models import unet_tensors

    import nodes as comfyui_nodes

    model = comfy.sd.load_diffusion_model_state_dict(unet_tensors(), model_options={"dtype": torch.float32})
    recipe = module(pack, "sid_train.core.recipe").SiDRecipe()
    sampler = pack.NODE_CLASS_MAPPINGS["SiDFewStepSampler"]
    positive, negative, latent = conditioning(1), conditioning(2), empty_latent(1, args.size)
    ours = {"model": model, "positive": positive, "latent_image": latent, "recipe": recipe, "steps": args.steps}

    def ksampler(seed: int) -> None:
        comfyui_nodes.common_ksampler(
            model, seed, args.steps, 1.0, "lcm", "simple", positive, negative, latent, denoise=1.0
        )

    candidates = {
        "KSampler": ksampler,
        "SiD none": lambda seed: run(sampler, **ours, seed=seed),
        "SiD nag": lambda seed: run(sampler, **ours, seed=seed, negative=negative, guidance="nag"),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-2, args.pairs):
        names = list(candidates)
        for name in names if turn % 2 else names[::-1]:
            begin = time.perf_counter()
            candidates[name](turn + 2)
            if turn >= 0:  # the first two warm up
                times[name].append(time.perf_counter() - begin)

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))

    for name, taken in times.items():
        print(f"{name:<10} {statistics.median(taken) * 1000:8.1f} ms")
    print(f"SiD none / KSampler  {ratio('SiD none', 'KSampler'):.3f}")
    print(f"SiD nag / SiD none   {ratio('SiD nag', 'SiD none'):.3f}")

    small = empty_latent(1, 16)

    def sid(seed: int) -> torch.Tensor:
        return run(sampler, **ours | {"steps": 4, "latent_image": small}, seed=seed)[0]["samples"]

    def distance(other) -> float:
        """Root mean square difference to our latents over theirs, median of 8 seeds."""
        pairs = [(sid(seed), other(seed)) for seed in range(8)]
        return statistics.median(float((a - b).norm() / a.norm()) for a, b in pairs)

    print(f"native fallback      {distance(lambda seed: native_fallback(model, positive, small, seed)):.2f} from ours")
    print(f"another seed         {distance(lambda seed: sid(seed + 100)):.2f} from ours")


if __name__ == "__main__":
    main()
