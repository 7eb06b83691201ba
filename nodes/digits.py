"""SiD Demo Model: the demo's digits as a model of ComfyUI's, without any download."""

from __future__ import annotations

from typing import ClassVar

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.latent_formats import LatentFormat
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep, UNetModel
from comfy_api.latest import io
from torch import Tensor, nn

from ..sid_train.core.architectures import DIGITS
from ..sid_train.core.recipe import SiDRecipe
from ..sid_train.files.header import read_safetensors_metadata
from ..sid_train.models.digits.data import IMAGE_SIZE
from ..sid_train.models.digits.layout import (
    GROUPS,
    LATENT_SHAPE,
    MAX_TOKENS,
    PREDICTION_TYPE,
    TEACHER_FILE,
    TEXT,
    TEXT_WIDTH,
    TIME_ID_WIDTH,
    WIDTHS,
    DigitCodec,
    DigitConditioner,
    time_ids,
)
from .checks import checked
from .common import RecipeType, schema
from .start import remember_start

SHOWN_SIZE = 256
ENLARGED = SHOWN_SIZE // IMAGE_SIZE
MAX_BATCH = 4096
NETWORK = "unet."  # before the UNet's tensors in the file


class _Ratio(float):
    """A width that is no multiple of the first: 1.5 times 64 is 96, and not 96.0, which no layer takes."""

    def __mul__(self, width: int) -> int:
        return int(float(self) * width)

    __rmul__ = __mul__


class DigitsUNet(UNetModel):
    """ComfyUI's UNet with groups of the demo's size in its normalisations, of which ComfyUI's have 32."""

    def __init__(self, **settings):
        super().__init__(**settings)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = GROUPS


class DigitsLatent(LatentFormat):
    """Three colours of four bands each, of which the first is the mean colour of 2 x 2 pixels."""

    latent_channels = LATENT_SHAPE[0]
    spacial_downscale_ratio = ENLARGED * IMAGE_SIZE // LATENT_SHAPE[-1]
    latent_rgb_factors_bias: ClassVar = [DigitCodec.MEAN / 2] * 3

    def __init__(self):
        self.latent_rgb_factors = [[(c == 4 * colour) / 2 for colour in range(3)] for c in range(self.latent_channels)]


class DigitsConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about a model that it loaded."""

    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}
    latent_format = DigitsLatent
    supported_inference_dtypes: ClassVar = [torch.float32]
    memory_usage_factor = 0.1

    def __init__(self):
        super().__init__(
            {
                "image_size": LATENT_SHAPE[-1],
                "in_channels": LATENT_SHAPE[0],
                "out_channels": LATENT_SHAPE[0],
                "model_channels": WIDTHS[0],
                "channel_mult": [1, _Ratio(WIDTHS[1] / WIDTHS[0])],
                "num_res_blocks": [1, 1],
                "transformer_depth": [0, 1],
                "transformer_depth_output": [0, 0, 1, 1],
                "transformer_depth_middle": 1,
                "context_dim": TEXT_WIDTH,
                "num_classes": "sequential",
                "adm_in_channels": TEXT_WIDTH + 6 * TIME_ID_WIDTH,
                "use_spatial_transformer": True,
                "use_linear_in_transformer": True,
                "legacy": False,
                "use_checkpoint": False,
            }
        )


class DigitsNetwork(comfy.model_base.BaseModel):
    """The demo's network, on SDXL's noise levels."""

    def __init__(self, predicts_v: bool):
        kinds = comfy.model_base.ModelType
        config = DigitsConfig()
        config.set_inference_dtype(torch.float32, None)
        super().__init__(config, kinds.V_PREDICTION if predicts_v else kinds.EPS, unet_model=DigitsUNet)
        self.embedder = Timestep(TIME_ID_WIDTH)

    def encode_adm(self, **kwargs) -> Tensor:
        """A prompt's pooled vector and the one size of picture that there is: [B, 112]."""
        if (size := tuple(kwargs["noise"].shape[-2:])) != LATENT_SHAPE[1:]:
            raise ValueError(
                f"latent_image: the demo's model draws {SHOWN_SIZE} x {SHOWN_SIZE} only (latents of "
                f"{LATENT_SHAPE[1]} x {LATENT_SHAPE[2]}), got latents of {size[0]} x {size[1]}. Connect 'latent' of "
                "SiD Demo Model."
            )
        pooled = kwargs["pooled_output"]
        ids = self.embedder(time_ids()).flatten().to(pooled)
        return torch.cat([pooled, ids.expand(len(pooled), -1)], dim=1)


class DigitsTokenizer:
    """Words of the demo's vocabulary, with ComfyUI's weights: ``a (red:1.2) three``."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        weighted = [
            (word, weight)
            for part, weight in comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
            for word in comfy.sd1_clip.unescape_important(part).split()
        ]
        tokens = DigitConditioner.tokenize(" ".join(word for word, _ in weighted))
        weights = [weight for _, weight in weighted] + [1.0] * (MAX_TOKENS - len(weighted))
        return {"digits": [[(*pair, place) for place, pair in enumerate(zip(tokens, weights, strict=True))]]}

    def untokenize(self, pairs):
        return pairs

    def state_dict(self) -> dict:
        return {}


class DigitsText(nn.Module):
    """The demo's text conditioner as ComfyUI asks a text encoder."""

    def __init__(self, dtype=None, device=None, model_options=None):
        super().__init__()
        self.conditioner = DigitConditioner()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """There are no layers to choose from."""

    def reset_clip_options(self) -> None:
        """See ``set_clip_options``."""

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, Tensor]:
        """Hidden states [1, 8, 64] and a pooled vector [1, 64]. A weight moves a word away from no word."""
        (row,) = tokens["digits"]
        device = self.conditioner.words.weight.device
        told = self.conditioner.embed(torch.tensor([[token for token, *_ in row]], device=device))
        nothing = self.conditioner.embed(torch.zeros(1, len(row), dtype=torch.long, device=device))
        weights = torch.tensor([weight for _, weight, *_ in row], device=device)[None, :, None]
        text = nothing + weights * (told - nothing)
        out = comfy.model_management.intermediate_device()
        return text.to(out), self.conditioner.pool(told).to(out)

    def load_sd(self, state: dict):
        return self.conditioner.load_state_dict(state)


class DigitsVAE(comfy.sd.VAE):
    """The demo's transform of pixels, which has no weights. Pictures are enlarged from 16 x 16 to 256 x 256."""

    def __init__(self):
        self.codec = DigitCodec()
        self.first_stage_model = self.patcher = None
        self.latent_channels, self.latent_dim, self.output_channels = LATENT_SHAPE[0], 2, 3
        self.downscale_ratio = self.upscale_ratio = DigitsLatent.spacial_downscale_ratio

    def throw_exception_if_invalid(self) -> None:
        """It has no weights that could be missing."""

    def decode(self, samples: Tensor, vae_options: dict | None = None) -> Tensor:
        pixels = self.codec.decode(samples.float())
        size = [ENLARGED * side for side in pixels.shape[-2:]]
        shown = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        return ((shown + 1) / 2).clamp(0, 1).movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        small = F.interpolate(pixels.movedim(-1, 1).float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        return self.codec.encode(2 * small - 1)

    def decode_tiled(self, samples: Tensor, **tiles) -> Tensor:
        return self.decode(samples)

    def encode_tiled(self, pixels: Tensor, **tiles) -> Tensor:
        return self.encode(pixels)

    def get_sd(self) -> dict:
        raise ValueError("vae: the demo's has no weights to save")


def load_demo_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, DigitsVAE, SiDRecipe]:
    """The embedded teacher: MODEL, CLIP, VAE, and a recipe that says what it predicts."""
    path = str(TEACHER_FILE)
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    predicts = read_safetensors_metadata(TEACHER_FILE).get(PREDICTION_TYPE, "epsilon")

    network = DigitsNetwork(predicts == "v_prediction")
    names = comfy.utils.unet_to_diffusers(network.model_config.unet_config)
    state = {ours: tensors[NETWORK + theirs].float() for theirs, ours in names.items() if NETWORK + theirs in tensors}
    network.diffusion_model.load_state_dict(state)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = comfy.model_patcher.ModelPatcher(network, *devices)

    target = comfy.supported_models_base.ClipTarget(DigitsTokenizer, DigitsText)
    # On the CPU, since ComfyUI would else load it before it has its weights.
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "initial_device": torch.device("cpu")})
    text = {name.removeprefix(TEXT): tensor.float() for name, tensor in tensors.items() if name.startswith(TEXT)}
    clip.cond_stage_model.load_sd(text)
    recipe = SiDRecipe(architecture=DIGITS.name, prediction_type=predicts, base_model=DIGITS.base_model)
    return model, clip, DigitsVAE(), recipe


class SiDDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SiDDemoModel",
            display_name="SiD Demo Model",
            description="A small text-to-image model that comes with the pack, for a first picture without a "
            "download: coloured handwritten digits such as 'a red three on a blue ground'. It is the undistilled "
            "teacher: SiD LoRA Loader makes a few-step generator of it.",
            search_aliases=["sid demo", "try sid", "digits", "example model"],
            inputs=[
                io.Int.Input(
                    "batch_size", default=1, min=1, max=MAX_BATCH, tooltip="How many pictures 'latent' is for."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The teacher."),
                io.Clip.Output(tooltip="Knows 23 words; others are refused, with a list of those that it knows."),
                io.Vae.Output(tooltip="Turns latents into pictures and back: 16 x 16 pixels, enlarged to 256 x 256."),
                RecipeType.Output(
                    display_name="recipe", tooltip="Its own architecture on SiD's four timesteps, without a training."
                ),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the only size that it draws."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, batch_size: int) -> io.NodeOutput:
        model, clip, vae, recipe = load_demo_model()
        device = comfy.model_management.intermediate_device()
        latent = {"samples": torch.zeros(batch_size, *LATENT_SHAPE, device=device)}
        return io.NodeOutput(remember_start(model), clip, vae, recipe, latent)
