"""What is said of few-step distillation, as pairs of rows whose figures can say it or the contrary."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo.report import FIGURES


@dataclass(frozen=True)
class Claim:
    """That one row is better than another, in one figure.

    told: the claim, for people
    source: who makes it; arXiv numbers
    better, worse: a cell and the number of steps that it is measured at
    figure: of ``FIGURES``
    """

    told: str
    source: str
    better: tuple[str, int]
    worse: tuple[str, int]
    figure: str = "frechet"

    def verdict(self, difference: float, half_width: float) -> str:
        """Of ``better`` minus ``worse``: its mean, and half the width of the mean's interval."""
        gain = difference if FIGURES[self.figure][1] == "higher is better" else -difference
        return "better" if gain > half_width else "worse" if -gain > half_width else "not told apart"


SID, SIDA, LSG, FEW, DIT = "2404.04057", "2410.14919", "2406.01561", "2505.12674", "2509.25127"

CLAIMS = (
    Claim("Four steps are as good as the many-step teacher, from prompts alone", FEW, ("k4", 4), ("teacher-30-1", 30)),
    Claim("So is one step", SID, ("k1", 1), ("teacher-30-1", 30)),
    Claim("More steps are better: 2 than 1", FEW, ("k2", 2), ("k1", 1)),
    Claim("4 than 2", FEW, ("k4", 4), ("k2", 2)),
    Claim("8 than 4", FEW, ("k8", 8), ("k4", 4)),
    Claim("Matching a uniform step is better than matching the last", FEW, ("k4", 4), ("final", 4)),
    Claim("Starting at 625 is better than at 999", LSG, ("k4", 4), ("t999", 4)),
    Claim("An alpha of 1.2 is better than 1", SIDA, ("alpha-1.2", 4), ("k4", 4)),
    Claim("The weight 1 - sigma is better than l1", DIT, ("weight-one-minus-sigma", 4), ("k4", 4)),
    Claim("Logit-normal noise levels are better than uniform ones", DIT, ("logit-normal", 4), ("k4", 4)),
    Claim("A running average is better than none", SID, ("k4", 4), ("no-average", 4)),
    Claim("LSG aligns better than no guidance", LSG, ("lsg-1.5", 4), ("k4", 4), "prompt_accuracy"),
    Claim("Zero-CFG is more diverse than LSG", FEW, ("zero-cfg", 4), ("lsg-1.5", 4), "recall"),
    Claim("Anti-CFG is more diverse than LSG", FEW, ("anti-cfg-1", 4), ("lsg-1.5", 4), "recall"),
    Claim("Anti-CFG aligns better than no guidance", FEW, ("anti-cfg-1", 4), ("k4", 4), "prompt_accuracy"),
    Claim("Real pairs improve on prompts alone", SIDA, ("pairs-gan-0.01", 4), ("k4", 4)),
    Claim("They do so under Zero-CFG", FEW, ("pairs-zero-cfg-gan-0.01", 4), ("zero-cfg", 4)),
    Claim("With them, Zero-CFG beats the teacher", FEW, ("pairs-zero-cfg-gan-0.01", 4), ("teacher-30-1", 30)),
    Claim("Two stages (SiD2a) are better than pairs from the start", SIDA, ("sid2a-none", 4), ("pairs-gan-0.01", 4)),
    Claim("SiD's loss is better than DMD2's", FEW, ("k4", 4), ("dmd2", 4)),
    Claim("So it is at one step", SID, ("k1", 1), ("k1-dmd2", 1)),
    Claim("It is better than LCM", FEW, ("k4", 4), ("lcm", 4)),
    Claim("A generator for all numbers of steps is as good as one for 4", DIT, ("any-step", 4), ("k4", 4)),
    Claim("It is as good as one for 1", DIT, ("any-step", 1), ("k1", 1)),
)
