"""The protocols by which few-step models are compared, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How many captions, and what of it differs from the papers that name it.

    pictures: how many captions of the file are taken, from its beginning
    """

    name: str
    pictures: int
    metrics: tuple[str, ...]
    told: str


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco-30k",
            30_000,
            ("fid", "clip"),
            "30,000 captions of COCO-2014's validation set, FID against its pictures, CLIP score by OpenCLIP ViT-g-14 "
            "(few-step SiD, SiD-LSG, DMD2). Which captions, and how real pictures are cut, is not the same in all "
            "papers: here it is what --captions and --reference hold. SDXL's pictures are resized to 299 by "
            "torch-fidelity from their own size; some papers resize them to 256 first, which changes FID.",
        ),
        Protocol(
            "coco-5k",
            5_000,
            ("fid-t", "clip", "hpsv2", "image-reward"),
            "5,000 captions of COCO, FID-T against the teacher's pictures of the same captions (SenseFlow's table). "
            "Which 5,000, and the teacher's sampler and guidance, are what --captions and --teacher-pictures hold. "
            "FID of 5,000 pictures is biased upwards: it compares with others of as many only.",
        ),
    )
}

PUBLISHED = """\
**Published by others, not measured here** (docs/method.md, section 9; other captions, weights and resizing):

| model, 4 steps | FID-T | CLIP score | HPSv2 | ImageReward |
|---|---|---|---|---|
| LCM | 18.5 | 0.323 | 0.282 | 0.57 |
| PCM | 14.4 | 0.324 | 0.292 | 0.69 |
| Lightning | 13.67 | 0.3214 | 0.2931 | 0.780 |
| Hyper-SD | 13.71 | 0.3254 | 0.3000 | 0.978 |
| DMD2 | 15.04 | 0.3277 | 0.2963 | 0.932 |
| SenseFlow | 17.76 | 0.3248 | 0.3010 | 0.995 |
| the teacher, 80 network calls | | 0.3293 | 0.2930 | 0.872 |

| model, COCO-2014, 30,000 captions | steps | FID | CLIP score |
|---|---|---|---|
| SDXL, SiD2a with Zero-CFG | 4 | 13.25 | 0.335 |
| SDXL, DMD2 | 4 | 19.32 | 0.332 |
| SDXL, LCM | 4 | 22.16 | 0.317 |
| SDXL, Turbo | 4 | 23.19 | 0.334 |
| SDXL, Lightning | 4 | 24.46 | 0.323 |
| SDXL teacher, CFG 6 | many | 19.36 | 0.332 |
"""
