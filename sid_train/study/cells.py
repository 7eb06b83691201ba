"""What the study compares: every cell is the demo's configuration with one thing changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..models.digits.data import Split

SEEDS = (0, 1, 2)
BUDGET = 1_400
"""Network calls of a cell for each picture of its batch: forward passes of the generator, the fake score and the
teacher, two for guidance that asks with text and without. What is one cell's is every cell's."""
BASE = ("method.guidance=none", "method.alpha=1")


@dataclass(frozen=True)
class Cell:
    """One distillation.

    name: in results and on the command line
    group: of the page's table that it is in
    settings: overrides of the demo's configuration, after those of ``BASE``
    told: what differs from the base, for people
    budget: times ``BUDGET``
    sampled: numbers of steps that it is measured at; () is its own
    pairs_of: the split whose digits are its real pairs
    starts_from: the cell whose generator of the same seed it starts from (SiD2a)
    """

    name: str
    group: str
    told: str
    settings: tuple[str, ...] = ()
    budget: float = 1.0
    sampled: tuple[int, ...] = ()
    starts_from: str = ""
    pairs_of: Split = "teacher"

    @property
    def overrides(self) -> list[str]:
        return [*BASE, *self.settings]


@dataclass(frozen=True)
class TeacherCell:
    """The teacher, sampled without a distillation.

    sampler: ``dpm++`` is DPM-Solver++ (2M), ``euler`` the same in first order (DDIM), ``ladder`` our chain with the
        teacher's weights, which knows no guidance
    """

    name: str
    group: str
    told: str
    sampler: str
    steps: int
    scale: float = 1.0


STEPS = "Number of steps"
MATCHING = "Matching, first timestep, noise"
LOSS = "Loss"
OPTIMISER = "Average, updates, dropout"
GUIDANCE = "Guidance"
PAIRS = "Real pairs and the GAN loss"
ANY_STEP = "One generator for several numbers of steps"
BASELINES = "Baselines"
BUDGETS = "Budget"
TEACHER = "The teacher, without a distillation"

PAIRED = ("data.pairs=demo",)
LATE = "gan.start_images=1000"
DIT = "method.weighting=one_minus_sigma"
DMD2 = ("method.kind=dmd2", "method.alpha=1")
LCM = ("method.kind=lcm", "method.alpha=1", "training.fake_score_updates=1", "method.t_init=999", *PAIRED)


def _cells() -> Iterator[Cell]:
    for steps in (1, 2, 4, 8):
        yield Cell(f"k{steps}", STEPS, f"K = {steps}", (f"method.steps={steps}",))

    yield Cell("final", MATCHING, "the last step's output is matched, through the chain", ("method.matching=final",))
    yield Cell("t999", MATCHING, "first timestep 999", ("method.t_init=999",))
    yield Cell("t999-k1", MATCHING, "K = 1, first timestep 999", ("method.steps=1", "method.t_init=999"))
    for mode in ("fixed", "ddim"):
        yield Cell(f"noise-{mode}", MATCHING, f"noise {mode}", (f"method.noise_mode={mode}",))

    for alpha in (0.5, 0.8, 1.2):
        yield Cell(f"alpha-{alpha:g}", LOSS, f"alpha {alpha:g}", (f"method.alpha={alpha:g}",))
    weights = ("one_minus_sigma", "one_minus_sigma_squared", "one_over_sigma", "one_over_sigma_squared")
    for weighting in (*weights, "snr", "snr_sqrt", "uniform"):
        told = f"weight {weighting}".replace("_", " ")
        yield Cell(f"weight-{weighting}".replace("_", "-"), LOSS, told, (f"method.weighting={weighting}",))
    yield Cell("logit-normal", LOSS, "noise levels logit-normal", ("method.noise_levels=logit_normal",))

    yield Cell("no-average", OPTIMISER, "no running average", ("optimizer.ema_halflife_images=0",))
    for updates in (1, 3, 5):
        told = f"{updates} update{'s' * (updates > 1)} of the fake score"
        yield Cell(f"updates-{updates}", OPTIMISER, told, (f"training.fake_score_updates={updates}",))
    lsg = "method.guidance=lsg=1.5"
    yield Cell("lsg-1.5-no-dropout", OPTIMISER, "LSG 1.5, no prompt dropped", (lsg, "method.prompt_dropout=0"))
    kept = (lsg, "method.prompt_dropout_in=fake_score")
    yield Cell("lsg-1.5-dropout-late", OPTIMISER, "LSG 1.5, prompts dropped where the fake score learns only", kept)

    strategies = [f"lsg={scale}" for scale in ("1.2", "1.5", "2", "4.5")]
    strategies += ["zero-cfg", "anti-cfg=-0.5", "anti-cfg=-1", "anti-cfg=-2"]
    strategies += ["custom=1,1,1.05", "custom=1,1,1.2", "custom=1,1,1.5"]
    for strategy in strategies:
        yield Cell(_name(strategy), GUIDANCE, strategy, (f"method.guidance={strategy}",))
    for strategy in ("lsg=1.5", "zero-cfg", "custom=1,1,1.2"):
        settings = ("method.steps=1", f"method.guidance={strategy}")
        yield Cell(f"k1-{_name(strategy)}", GUIDANCE, f"K = 1, {strategy}", settings)

    for name, told, gan in (
        ("sida", "SiDA's weights, 0.01 : 100", ("gan.generator_weight=1e-4",)),
        ("gan-0.001-d10", "0.001 : 1, discriminator 10", ("gan.generator_weight=1e-3", "gan.discriminator_weight=10")),
        ("gan-0.001", "0.001 : 1", ("gan.generator_weight=1e-3",)),
        ("gan-0.01", "SiD-DiT's weights, 1 : 100", ("gan.generator_weight=1e-2",)),
        ("gan-0.1", "0.1 : 1", ("gan.generator_weight=0.1",)),
        (
            "gan-0.01-d0.03",
            "1 : 100, discriminator 0.03",
            ("gan.generator_weight=1e-2", "gan.discriminator_weight=0.03"),
        ),
        ("gan-0.01-dit", "1 : 100, weight one minus sigma", ("gan.generator_weight=1e-2", DIT)),
    ):
        yield Cell(f"pairs-{name}", PAIRS, f"none, {told}", (*PAIRED, *gan, LATE))
        if name in ("gan-0.01", "gan-0.1"):
            settings = ("method.guidance=zero-cfg", *PAIRED, *gan, LATE)
            yield Cell(f"pairs-zero-cfg-{name}", PAIRS, f"Zero-CFG, {told}", settings)
    settings = (*PAIRED, "gan.generator_weight=1e-2", LATE)
    told = "none, 1 : 100, with the digits that the figures are measured against: no fair row"
    yield Cell("pairs-gan-0.01-reference", PAIRS, told, settings, pairs_of="reference")
    for strategy in ("none", "zero-cfg"):
        # Two stages of half the calls each are as much as the other cells have.
        first, own = f"half-{_name(strategy)}", (f"method.guidance={strategy}",)
        yield Cell(first, PAIRS, f"{strategy}, half the calls", own, budget=0.5)
        settings = (*own, *PAIRED, "gan.generator_weight=1e-2")
        told = f"SiD2a: {strategy}, then with 1 : 100"
        yield Cell(f"sid2a-{_name(strategy)}", PAIRS, told, settings, budget=0.5, starts_from=first)

    yield Cell("any-step", ANY_STEP, "K drawn from 1, 2, 4, 8", ("method.any_steps=1,2,4,8",), sampled=(1, 2, 4, 8))

    for steps in (4, 1):
        prefix, told = ("k1-", "K = 1, ") if steps == 1 else ("", "")
        own = (f"method.steps={steps}",)
        yield Cell(f"{prefix}dmd2", BASELINES, f"{told}DMD2's loss", (*DMD2, *own))
        gan = (*PAIRED, "gan.generator_weight=3e-3", "gan.discriminator_weight=0.01", LATE)
        yield Cell(f"{prefix}dmd2-gan", BASELINES, f"{told}DMD2's loss and GAN weights", (*DMD2, *gan, *own))
    yield Cell("dmd2-999", BASELINES, "DMD2's loss, first timestep 999", (*DMD2, "method.t_init=999"))
    guided = "method.guidance=custom=1,1,1.5"
    yield Cell("lcm", BASELINES, "LCM, no guidance", LCM, sampled=(1, 2, 4, 8))
    yield Cell("lcm-1.5", BASELINES, "LCM, CFG 1.5 in the teacher", (*LCM, guided), sampled=(1, 2, 4, 8))

    for budget in (0.5, 2.0):
        told = f"{budget:g} times the calls"
        yield Cell(f"budget-{budget:g}", BUDGETS, told, budget=budget)
        yield Cell(f"k1-budget-{budget:g}", BUDGETS, f"K = 1, {told}", ("method.steps=1",), budget=budget)
        yield Cell(f"dmd2-budget-{budget:g}", BUDGETS, f"DMD2's loss, {told}", DMD2, budget=budget)
        yield Cell(f"lcm-budget-{budget:g}", BUDGETS, f"LCM, {told}", LCM, budget=budget, sampled=(1, 4))


def _name(strategy: str) -> str:
    return strategy.replace("cfg=", "cfg").replace("=", "-").replace(",", "-")


def _teacher_cells() -> Iterator[TeacherCell]:
    for steps in (1, 2, 4, 8, 16, 30):
        for scale in (1.0, 1.5):
            told = f"DPM-Solver++ (2M), {steps} step{'s' * (steps > 1)}" + (f", CFG {scale:g}" if scale != 1 else "")
            yield TeacherCell(f"teacher-{steps}-{scale:g}", TEACHER, told, "dpm++", steps, scale)
    for steps in (1, 2, 4, 8):
        yield TeacherCell(f"ladder-{steps}", TEACHER, f"our timesteps, K = {steps}", "ladder", steps)


CELLS: dict[str, Cell] = {cell.name: cell for cell in _cells()}
TEACHER_CELLS: dict[str, TeacherCell] = {cell.name: cell for cell in _teacher_cells()}
QUICK = ("k4", "k1", "dmd2", "zero-cfg", "any-step", "lcm")
QUICK_BUDGET = 0.1


def quick_cells() -> dict[str, Cell]:
    """A few cells at a tenth of the budget: that everything works, in minutes."""
    return {name: replace(CELLS[name], budget=QUICK_BUDGET * CELLS[name].budget) for name in QUICK}
