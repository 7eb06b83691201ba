"""Names of tensors: those of Stable Diffusion's single files (ldm) and those of diffusers. Names and shapes only, no
network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...files.reading import shown
from ...files.tensors import LazyTensor

# Where a single file has each network; ``kinds`` knows where the text encoders are.
UNET, VAE = "model.diffusion_model.", "first_stage_model."

MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which ComfyUI knows v-prediction and a zero-terminal-SNR schedule."""
EDM_MARKERS = {
    "edm_vpred.sigma_max": "CosXL and its relatives",
    "edm_vpred.sigma_min": "CosXL and its relatives",
    "edm_mean": "Playground 2.5",
    "edm_std": "Playground 2.5",
}
"""Those of EDM models, and of which."""
SCALED_FP8 = "scaled_fp8"
"""The tensor that says that a file's fp8 weights have scales."""
BESIDE_WEIGHTS = (
    *(".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale"),
    *(".weight_s_rel", ".weight_s_channel", ".weight_codebook", ".comfy_quant"),
)
"""Ends of the names of what stands beside scaled and quantised weights, which mean nothing without it."""

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 64  # channels of an attention head, in the UNets of SDXL and SD 2.x and in all text encoders
SD1_HEADS = 8  # attention heads in the UNet of SD 1.x, at every width
WIDEST_WITHOUT_LABEL = 1024  # SD 2.x: how wide the text of a UNet can be that is told neither size nor pooled text
TIME_ID_WIDTH = 256  # sinusoidal embedding of each of the six time ids

# diffusers' names inside a residual block of the UNet -> ldm's
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


# What diffusers calls the block between the way down and the way up, with a transformer and without.
MIDDLE, MIDDLE_WITHOUT_ATTENTION = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

Block = tuple[str, str]
"""The names of a residual block and of the transformer that may follow it."""


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' ``UNet2DConditionModel`` for a UNet of the class of SD 1.x, 2.x or SDXL, from its tensors
    in either layout. SSD-1B, Vega and KOALA are of SDXL's.

    ValueError for a UNet of another class, and for one whose depths diffusers cannot express.
    """
    is_diffusers = "conv_in.weight" in shapes

    def shape_of(module: str) -> tuple[int, ...] | None:
        return shapes.get(f"{module if is_diffusers else UNET_ENDS[module]}.weight")

    def reject(expected: str, got: object) -> ValueError:
        return ValueError(f"UNet: expected {expected}, as SD 1.x, 2.x and SDXL have, got {got}")

    first, last, label = (shape_of(module) for module in ("conv_in", "conv_out", "add_embedding.linear_1"))
    if first is None or last is None:
        raise reject("tensors such as input_blocks.0.0.weight", f"{', '.join(list(shapes)[:3])} ...")
    if first[1] != 4:
        raise reject("4 input channels", f"{first[1]} (an inpainting or video model?)")
    text = next((shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), None)
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    is_linear = len(projection) == 2
    if text is None:
        raise reject("cross attention", "none")
    if label is None and text[1] > WIDEST_WITHOUT_LABEL:
        raise reject(
            "label_emb.* (size and pooled text) beside cross attention as wide as SDXL's", "a UNet without them"
        )
    if label is not None and not is_linear:
        raise reject("linear projections beside label_emb.*", "convolutions")

    def depth(blocks: list[Block]) -> int | tuple[int, ...]:
        """Of the transformers of a level: one for all, or each block's."""
        depths = tuple(_depth(shapes, transformer) for _, transformer in blocks)
        if len(set(depths)) == 1:
            return depths[0]
        if 0 in depths:
            raise reject("transformers in all blocks of a level, or in none", depths)
        return depths

    lower, upper = _levels_of_diffusers(shapes) if is_diffusers else _levels_of_ldm(shapes)
    if [len(level) for level in upper] != [len(level) + 1 for level in lower[::-1]]:
        raise reject("one more output than input block at each level", [len(level) for level in (*lower, *upper)])
    down, up = [depth(level) for level in lower], [depth(level) for level in upper]
    middles = ("mid_block.resnets.0", "mid_block.attentions.0") if is_diffusers else _blocks_of("middle_block")
    middle_resnet, middle = middles
    conv = "conv1" if is_diffusers else RESNET["conv1"]
    kind = None
    if f"{middle_resnet}.{conv}.weight" in shapes:
        kind = MIDDLE if _depth(shapes, middle) else MIDDLE_WITHOUT_ATTENTION
    if kind == MIDDLE and _depth(shapes, middle) != (down[-1] or 1):
        raise reject(f"{down[-1] or 1} transformer layers in the middle, as in the last level", _depth(shapes, middle))
    sizes = [len(level) for level in lower]
    channels = [shapes[f"{level[-1][0]}.{conv}.weight"][0] for level in lower]
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": sizes[0] if len(set(sizes)) == 1 else tuple(sizes),
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in down),
        "mid_block_type": kind,
        "up_block_types": tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in up),
        # Where there is no transformer the number is not read, but must not be 0.
        "transformer_layers_per_block": tuple(d or 1 for d in down),
        "reverse_transformer_layers_per_block": None if up == down[::-1] else tuple(d or 1 for d in up),
        # diffusers means the number of heads
        "attention_head_dim": tuple(max(c // HEAD_WIDTH, 1) if is_linear else SD1_HEADS for c in channels),
        "cross_attention_dim": text[1],
        "use_linear_projection": is_linear,
        "addition_embed_type": None if label is None else "text_time",
        "addition_time_embed_dim": None if label is None else TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": None if label is None else label[1],
    }


def _blocks_of(ldm_block: str) -> Block:
    return f"{ldm_block}.0", f"{ldm_block}.1"


def _levels_of_ldm(shapes: Shapes) -> tuple[list[list[Block]], list[list[Block]]]:
    """The blocks of each level on the way down and on the way up."""
    lower: list[list[Block]] = [[]]
    for number in range(1, count_parts(shapes, "input_blocks.")):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            lower.append([])
        else:
            lower[-1].append(_blocks_of(f"input_blocks.{number}"))
    upper: list[list[Block]] = [[]]
    count = count_parts(shapes, "output_blocks.")
    for number in range(count):
        upper[-1].append(_blocks_of(f"output_blocks.{number}"))
        upsamples = any(f"output_blocks.{number}.{place}.conv.weight" in shapes for place in (1, 2))
        if upsamples and number < count - 1:
            upper.append([])
    return lower, upper


def _levels_of_diffusers(shapes: Shapes) -> tuple[list[list[Block]], list[list[Block]]]:
    def levels(part: str) -> list[list[Block]]:
        return [
            [
                (f"{part}.{level}.resnets.{layer}", f"{part}.{level}.attentions.{layer}")
                for layer in range(count_parts(shapes, f"{part}.{level}.resnets."))
            ]
            for level in range(count_parts(shapes, f"{part}."))
        ]

    return levels("down_blocks"), levels("up_blocks")


def count_parts(names: Iterable[str], prefix: str) -> int:
    """How many different parts come right after ``prefix``."""
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in names if name.startswith(prefix)})


def _depth(shapes: Shapes, transformer: str) -> int:
    return count_parts(shapes, f"{transformer}.transformer_blocks.")


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' module prefixes -> ldm's, for a UNet with this ``config`` of diffusers."""
    down, up = config["down_block_types"], config["up_block_types"]
    layers = config["layers_per_block"]
    sizes = [layers] * len(down) if isinstance(layers, int) else list(layers)
    found = dict(UNET_ENDS)

    def resnet(ours: str, theirs: str) -> None:
        found.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()})

    number = 1
    for level, kind in enumerate(down):
        for layer in range(sizes[level]):
            resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0")
            if kind.startswith("CrossAttn"):
                found[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < len(down) - 1:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    if middle := config.get("mid_block_type", MIDDLE):
        resnet("mid_block.resnets.0", "middle_block.0")
        if middle == MIDDLE:
            found["mid_block.attentions.0"] = "middle_block.1"
            resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for level, kind in enumerate(up):
        attends = kind.startswith("CrossAttn")
        for layer in range(sizes[::-1][level] + 1):
            resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0")
            if attends:
                found[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if level < len(up) - 1:
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + attends}.conv"
    return found


def rename(names: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """``{name: new name}`` by the longest of the ``modules`` prefixes that a name lies under; ValueError if none."""
    found, strange = {}, []
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        prefix = next((p for p in prefixes if p in modules), None)
        if prefix is None:
            strange.append(name)
        else:
            found[name] = modules[prefix] + name.removeprefix(prefix)
    if strange:
        raise ValueError(
            f"{len(strange):,} tensors do not belong to such a network, such as {shown(strange[0], 120)}: expected "
            f"parts of {', '.join(sorted(modules)[:3])} ..."
        )
    return found


def invert(modules: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in modules.items()}


# -- VAE ---------------------------------------------------------------------------------------------------------------

VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # of diffusers before 0.17


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKL`` from a VAE's tensors in ldm names; ValueError if they are none's."""
    if "encoder.conv_in.weight" not in shapes or "quant_conv.weight" not in shapes:
        raise ValueError(f"VAE: expected tensors such as encoder.conv_in.weight, got {', '.join(list(shapes)[:3])} ...")
    levels, blocks = count_parts(shapes, "encoder.down."), count_parts(shapes, "encoder.down.0.block.")
    channels = tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels))
    return {
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def vae_modules(names: Iterable[str]) -> dict[str, str]:
    """diffusers' module prefixes -> ldm's, for the VAE with tensors of these ``names``, in either layout."""
    names = list(names)
    down, block = ("down_blocks", "resnets") if any(".down_blocks." in name for name in names) else ("down", "block")
    levels, blocks = count_parts(names, f"encoder.{down}."), count_parts(names, f"encoder.{down}.0.{block}.")
    found = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        found |= {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")}
        found[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        for number in range(2):
            found |= {
                f"{part}.mid_block.resnets.{number}.{a}": f"{part}.mid.block_{number + 1}.{b}"
                for a, b in VAE_RESNET.items()
            }
        attention = OLD_VAE_ATTENTION if any(n.endswith(".proj_attn.weight") for n in names) else {}
        found |= {
            f"{part}.mid_block.attentions.0.{a}": f"{part}.mid.attn_1.{b}"
            for a, b in (VAE_ATTENTION | attention).items()
        }
    for level in range(levels):
        for layer in range(blocks + 1):
            for ours, theirs in VAE_RESNET.items():
                if layer < blocks:
                    found[f"encoder.down_blocks.{level}.resnets.{layer}.{ours}"] = (
                        f"encoder.down.{level}.block.{layer}.{theirs}"
                    )
                found[f"decoder.up_blocks.{level}.resnets.{layer}.{ours}"] = (
                    f"decoder.up.{levels - 1 - level}.block.{layer}.{theirs}"
                )
        if level < levels - 1:
            found[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
            found[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - level}.upsample.conv"
    return found


def is_vae_attention(ldm_name: str) -> bool:
    """Whether a VAE's tensor is a 1x1 convolution [out, in, 1, 1] in ldm files and a matrix in diffusers."""
    return ".attn_1." in ldm_name and ldm_name.endswith(".weight") and ".norm." not in ldm_name


# -- OpenCLIP ----------------------------------------------------------------------------------------------------------

OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")


def from_open_clip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """OpenCLIP's text tower as transformers' ``CLIPTextModelWithProjection`` names it (version 4's names), or
    ``CLIPTextModel`` where there is no projection.
    """
    found = {ours: tensors[theirs] for ours, theirs in OPEN_CLIP_ENDS.items()}
    if "text_projection" in tensors:
        found["text_projection.weight"] = tensors["text_projection"].map(lambda matrix: matrix.T.contiguous())
    for number in range(count_parts(tensors, "transformer.resblocks.")):
        ours, theirs = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            found |= {f"{ours}.{a}.{kind}": tensors[f"{theirs}.{b}.{kind}"] for a, b in OPEN_CLIP_LAYER.items()}
            joined = tensors[f"{theirs}.attn.in_proj_{kind}"]
            for place, name in enumerate(QKV):
                found[f"{ours}.{name}.{kind}"] = joined.map(partial(_third, place=place))
    return found


def _third(joined: Tensor, place: int) -> Tensor:
    return joined.chunk(3)[place].clone()


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of ``from_open_clip``, to the bit."""
    found = {theirs: tensors[ours] for ours, theirs in OPEN_CLIP_ENDS.items()}
    if "text_projection.weight" in tensors:
        found["text_projection"] = tensors["text_projection.weight"].T.contiguous()
    for number in range(count_parts(tensors, "text_model.encoder.layers.")):
        ours, theirs = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            found |= {f"{theirs}.{b}.{kind}": tensors[f"{ours}.{a}.{kind}"] for a, b in OPEN_CLIP_LAYER.items()}
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat([tensors[f"{ours}.{name}.{kind}"] for name in QKV])
    return found
