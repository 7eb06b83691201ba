"""Trains what the demo ships with: the teacher and the classifier of the metrics.

    python -m sid_train.demo.train_assets teacher
    python -m sid_train.demo.train_assets classifier

The teacher takes two hours on two CPU cores, the classifier two minutes. Each sees its own split of the digits only,
and the teacher never sees the held-out digit-colour pairs under their names. The teacher's command continues after a
stop.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..core.noise_schedule import VPSchedule, expand
from ..files.atomic import replacing
from ..models.conditioning import Conditioning
from ..models.digits.data import COLOURS, DIGITS, GROUNDS, SUBJECTS, TRAINING_SUBJECTS, RealDigits, Subject, palette
from ..models.digits.layout import ARCHITECTURE, ASSETS, PREDICTION_TYPE, DigitCodec, DigitConditioner
from ..models.digits.model import build_unet
from ..models.unet import UNetDenoiser
from .classifier import DigitClassifier

PREDICTS = "v_prediction"
UNSAID = 0.05
"""Share of pictures without any text, and of each word that is left out by itself."""
UNNAMED = 0.1
"""Share of digits in a colour that has no name here, so that what a digit looks like is no matter of its colour."""
GUIDED_FROM = 0.6
"""Share of the training after which the network learns its own guided estimates."""
SCALE = 1.5
"""Of that guidance: the one that was best where the teacher had to be guided."""
TEACHER_STEPS, PEAK = 30_000, 2e-3
SAVE_EVERY = 500


def _learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _text(subject: Subject, colour: bool, digit: bool, ground: bool) -> str:
    """A prompt that says some of it; ``subject.prompt`` where it says all."""
    words = ["a"] + [list(COLOURS)[subject.colour]] * colour + [DIGITS[subject.digit]] * digit
    words += ["on", "a", list(GROUNDS)[subject.ground], "ground"] * ground
    return " ".join(words) if colour or digit or ground else ""


class _TeacherData:
    """Pictures of the teacher's split and their prompts, some of whose words are missing."""

    def __init__(self, codec: DigitCodec, conditioner: DigitConditioner, generator: torch.Generator):
        self.codec, self.generator, self.real = codec, generator, RealDigits("teacher")
        ways = list(itertools.product((True, False), repeat=3))
        prompts = list(dict.fromkeys(_text(s, *said) for s in TRAINING_SUBJECTS for said in ways))
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.told = conditioner.encode(prompts)

    def draw(self, batch: int) -> tuple[Tensor, Conditioning]:
        """Latents [batch, ...] and what they show."""
        index = torch.randint(len(TRAINING_SUBJECTS), (batch,), generator=self.generator)
        subjects = [TRAINING_SUBJECTS[i] for i in index.tolist()]
        unnamed, *kept, silent = torch.rand(5, batch, generator=self.generator)
        others = torch.rand(batch, 3, generator=self.generator)
        named = palette(COLOURS)[[s.colour for s in subjects]]
        colours = torch.where((unnamed < UNNAMED)[:, None], others, named)
        images = self.real.draw(subjects, self.generator, colours)
        said = torch.stack(kept) >= UNSAID
        said[0] &= unnamed >= UNNAMED
        said &= silent >= UNSAID
        rows = [self.rows[_text(s, *which)] for s, which in zip(subjects, said.T.tolist(), strict=True)]
        return self.codec.encode(images), self.told[rows]


def train_teacher(path: Path, steps: int, batch: int, seed: int) -> None:
    """The loss on v, which weighs high noise more than one on eps: there a picture's digit is decided. Saves a running
    average in fp16.

    From ``GUIDED_FROM`` on the target has the network's own guidance in it, ``v + (1 - 1 / scale) * (v_c - v_u)``
    ("Diffusion Models without Classifier-free Guidance", arXiv 2502.12154): what the network says with text and without
    guidance is then what guidance at ``scale`` would have made of it.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    codec, conditioner = DigitCodec(), DigitConditioner()
    teacher = UNetDenoiser(build_unet(), VPSchedule.sdxl(prediction_type=PREDICTS))
    schedule = teacher.schedule
    teacher.to(memory_format=torch.channels_last)  # 15% faster on a CPU
    average = [p.detach().clone() for p in teacher.parameters()]
    unconditional = conditioner.encode([""])
    data = _TeacherData(codec, conditioner, generator)
    optimizer = torch.optim.AdamW(teacher.parameters(), betas=(0.9, 0.99), weight_decay=0.01)

    begun, first = path.with_suffix(".begun.pt"), 0
    if begun.is_file():
        state = torch.load(begun, weights_only=True)
        first, average = state["step"], state["average"]
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])

    progress = tqdm(range(first, steps), desc="teacher", mininterval=10, initial=first, total=steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, peak=PEAK)
        x0, cond = data.draw(batch)
        sigma = schedule.sigma(torch.randint(1000, (batch,), generator=generator))
        eps = torch.randn(x0.shape, generator=generator)
        s = expand(sigma, x0)
        x = x0 + s * eps
        said = teacher(x, sigma, cond)
        if step >= GUIDED_FROM * steps:
            with torch.no_grad():
                x0 = x0 + (1 - 1 / SCALE) * (said - teacher(x, sigma, unconditional.expand(batch)))
        loss = ((said - x0) ** 2 * (1 + s**2) / s**2).mean()  # the error in v
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, list(teacher.parameters()), 1 - decay)
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            state = {"step": step + 1, "average": average, "generator": generator.get_state()}
            state |= {"teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(begun) as temporary:
                torch.save(state, temporary)

    for parameter, mean in zip(teacher.parameters(), average, strict=True):
        parameter.data.copy_(mean)
    tensors = {f"unet.{k}": v for k, v in teacher.unet.state_dict().items()}
    tensors |= {f"text_encoder.{k}": v for k, v in conditioner.state_dict().items()}
    facts = {"modelspec.architecture": ARCHITECTURE, PREDICTION_TYPE: PREDICTS}
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path, facts)
    begun.unlink(missing_ok=True)


def train_classifier(path: Path, steps: int, batch: int, seed: int) -> None:
    """Digit, colour and ground from one picture; trained on all combinations, with a little pixel noise."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = DigitClassifier()
    real = RealDigits("classifier")
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    progress = tqdm(range(steps), desc="classifier", mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, peak=2e-3)
        index = torch.randint(len(SUBJECTS), (batch,), generator=generator)
        subjects = [SUBJECTS[i] for i in index.tolist()]
        images = real.draw(subjects, generator)
        noise = torch.rand(batch, 1, 1, 1, generator=generator) * 0.1
        logits = classifier(images + noise * torch.randn(images.shape, generator=generator))
        wanted = torch.tensor([(s.digit, s.colour, s.ground) for s in subjects])
        loss = sum(F.cross_entropy(head, wanted[:, i], label_smoothing=0.05) for i, head in enumerate(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sid_train.demo.train_assets", description=__doc__)
    parser.add_argument("what", choices=["teacher", "classifier"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: the file that the demo loads")
    args = parser.parse_args()
    out = args.out or ASSETS / f"{args.what}.safetensors"
    out.parent.mkdir(exist_ok=True)
    if args.what == "teacher":
        train_teacher(out, args.steps or TEACHER_STEPS, args.batch, args.seed)
    else:
        train_classifier(out, args.steps or 1500, args.batch, args.seed)


if __name__ == "__main__":
    main()
