"""What a prompt becomes in the trainer is what it becomes in ComfyUI, long ones too."""

from __future__ import annotations

import pytest
import torch
from helpers import call
from safetensors.torch import load_file
from small_sdxl import save_single_file, small_pipeline, text_config

from sid_train.models.families import load_model

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


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("sdxl") / "small-xl.safetensors", small_pipeline())


@pytest.fixture(scope="module")
def conditioner(file):
    return load_model(str(file), None, 64).conditioner


@pytest.fixture(scope="module")
def clip(pack, file):
    """ComfyUI's CLIP of SDXL, as small as the file's, with its text encoders."""
    import comfy.sd
    from comfy.supported_models import SDXL
    from small_models import UNET_CONFIG

    family = SDXL(UNET_CONFIG)
    sizes = {
        f"clip_{name}_model_config": text_config(activation, 49407).to_dict()
        for name, activation in (("l", "quick_gelu"), ("g", "gelu"))
    }
    target = family.clip_target()
    target.params = {}
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **sizes})
    tensors = {k: v for k, v in load_file(file).items() if k.startswith("conditioner.")}
    missing, _ = made.load_sd(family.process_clip_state_dict(tensors), full_model=True)
    assert all(name.endswith(("logit_scale", "clip_l.transformer.text_projection.weight")) for name in missing)
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
    torch.testing.assert_close(ours.pooled, extra["pooled_output"], rtol=1e-5, atol=1e-5)


def test_prompts_of_different_lengths_are_batched_as_comfyui_batches_them(encode, conditioner):
    from comfy.conds import CONDCrossAttn

    prompts = ["a cat", "word " * 76, "word " * 151]
    first, *others = [CONDCrossAttn(encode(prompt)[0]) for prompt in prompts]
    ours = conditioner.encode(prompts)
    assert ours.text.shape[1] == 6 * 77
    torch.testing.assert_close(ours.text, first.concat(others), rtol=1e-5, atol=1e-5)
