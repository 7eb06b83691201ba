"""What a prompt becomes in the trainer is what it becomes in ComfyUI, long ones too."""

from __future__ import annotations

import pytest
import small_sd
import small_sdxl
import torch
from helpers import call
from safetensors.torch import load_file

from sid_train.models.families import load_model
from sid_train.models.stable_diffusion.kinds import SD1_KIND, SD2_KIND

# 75 tokens, one more, two whole chunks, the most that is read, more than that, words that are cut in two, and text that
# looks like a token.
PROMPTS = [
    "",
    "a lighthouse at dawn, 35mm",
    "word " * 75,
    "word " * 76,
    "word " * 150,
    "a red cat on a mat, " * 32 + "x",
    "word " * 300,
    "word " * 73 + "incomprehensibilities, in Ünïcode",
    "e" * 900,
    "\n one\t two  \u3000 three " * 20 + "🐱🐱 日本語",
    "an <|endoftext|> in the middle, " * 10,
]


@pytest.fixture(scope="module", params=["SDXL", "SD15", "SD20"])
def generation(request) -> str:
    """By ComfyUI's name."""
    return request.param


@pytest.fixture(scope="module")
def file(generation, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "small.safetensors"
    if generation == "SDXL":
        return small_sdxl.save_single_file(path, small_sdxl.small_pipeline())
    kind = SD1_KIND if generation == "SD15" else SD2_KIND
    return small_sd.save_single_file(path, kind, small_sd.small_pipeline(kind))


@pytest.fixture(scope="module")
def conditioner(file):
    return load_model(str(file), None, 64).conditioner


@pytest.fixture(scope="module")
def clip(pack, generation, file):
    """ComfyUI's CLIP, as small as the file's, with its text encoders."""
    from small_models import small_clip

    family, made = small_clip(generation)
    tensors = {k: v for k, v in load_file(file).items() if k.startswith(("conditioner.", "cond_stage_model."))}
    missing, _ = made.load_sd(family.process_clip_state_dict(tensors), full_model=True)
    unread = ("logit_scale", "clip_l.transformer.text_projection.weight")
    assert all(name.endswith(unread) or ".encoder.layers.3." in name for name in missing)
    return made


@pytest.fixture(scope="module")
def encode(clip):
    """What the node gives for a prompt: hidden states, and a dictionary with the pooled vector."""
    import nodes as comfyui_nodes

    return lambda prompt: call(comfyui_nodes.CLIPTextEncode, clip, prompt)[0][0]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_a_prompt_is_encoded_as_comfyui_encodes_it(encode, conditioner, prompt):
    ours = conditioner.encode([prompt])
    text, extra = encode(prompt)
    assert text.shape[1] == 77 * conditioner.chunks([prompt])[0]
    kept = ours.text.shape[1]
    assert kept == min(text.shape[1], 3 * 77)
    torch.testing.assert_close(ours.text, text[:, :kept], rtol=1e-5, atol=1e-5)
    if "pooled" in ours.tensors:
        torch.testing.assert_close(ours.pooled, extra["pooled_output"], rtol=1e-5, atol=1e-5)


def test_prompts_of_different_lengths_are_batched_as_comfyui_batches_them(encode, conditioner):
    from comfy.conds import CONDCrossAttn

    prompts = ["a cat", "word " * 76, "word " * 151]
    first, *others = [CONDCrossAttn(encode(prompt)[0]) for prompt in prompts]
    ours = conditioner.encode(prompts)
    assert ours.text.shape[1] == 6 * 77
    torch.testing.assert_close(ours.text, first.concat(others), rtol=1e-5, atol=1e-5)
