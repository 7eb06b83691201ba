"""The methods that SiD is compared with, in the loop that SiD runs in."""

import pytest
import torch
from safetensors.torch import load_file

from sid_train.config import load_config
from sid_train.core.rng import BatchRNG
from sid_train.files.logs import read_log
from sid_train.method.base import Batch, Setting
from sid_train.method.config import GANConfig, MethodConfig
from sid_train.method.dmd2 import DMD2
from sid_train.method.lcm import ConsistencyDistiller
from sid_train.method.losses import pseudo_huber_loss
from sid_train.method.sid import Distiller
from sid_train.models.conditioning import RealBatch
from sid_train.models.digits.layout import LATENT_SHAPE
from sid_train.training.run import RunFolder
from sid_train.training.trainer import Trainer

SETTINGS = ["training.iterations=2", "training.batch_size=2", "training.tracker=none", "training.log_every=1"]
SETTINGS += ["method.steps=2", "method.alpha=1", "training.fake_score_updates=1"]


def seeded(seed: int) -> BatchRNG:
    return BatchRNG(torch.Generator().manual_seed(seed))


@pytest.fixture
def networks(make_denoiser):
    networks = [make_denoiser(seed) for seed in (1, 2, 3)]
    networks[2].requires_grad_(False)
    return networks


def gradient(network) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("adversarial", [False, True])
def test_dmd2_sends_the_scores_difference_to_the_generator_alone(networks, unconditional, cond, adversarial):
    """Its gradient is SiD's without what passes through teacher and fake score, which keep the GAN term's."""
    generator, fake_score, teacher = networks
    make = (generator, fake_score, teacher, teacher.schedule, unconditional, LATENT_SHAPE)
    gan = GANConfig(generator_weight=1.0)
    losses = DMD2(*make, MethodConfig(weighting="uniform"), gan).generator_loss(cond, 2, seeded(3), adversarial)
    assert set(losses) == ({"dmd2", "gan"} if adversarial else {"dmd2"})
    losses["dmd2"].backward()
    got = gradient(generator)
    assert all(p.grad is None for p in fake_score.parameters())
    generator.zero_grad()

    rng, distiller = seeded(3), Distiller(*make, MethodConfig())
    x_g = distiller.rollout(cond, 2, rng)
    with torch.no_grad():
        x_t, sigma, _ = distiller.perturb(x_g, rng)
        direction = (fake_score(x_t, sigma, cond) - teacher(x_t, sigma, cond)) / len(x_g)
    x_g.backward(direction * (0.5 if adversarial else 1))
    torch.testing.assert_close(got, gradient(generator))


def test_the_gan_term_of_dmd2_reaches_the_generator_through_the_discriminator(networks, unconditional, cond):
    generator, fake_score, teacher = networks
    make = (generator, fake_score, teacher, teacher.schedule, unconditional, LATENT_SHAPE, MethodConfig())
    losses = DMD2(*make, GANConfig(generator_weight=1.0)).generator_loss(cond, 1, seeded(3), adversarial=True)
    losses["gan"].backward()
    assert gradient(generator).abs().sum() > 0


def lcm(networks, unconditional, guidance: str) -> ConsistencyDistiller:
    config = load_config(None, ["method.kind=lcm", "data.pairs=demo", f"method.guidance={guidance}"])
    roles = {"generator": networks[0], "teacher": networks[2]}
    return ConsistencyDistiller(
        Setting(roles, {"generator": networks[0]}, networks[2].schedule, unconditional, LATENT_SHAPE, config)
    )


def test_lcm_compares_two_points_of_one_path_of_the_teacher(networks, unconditional, cond, record_calls):
    generator, _, teacher = networks
    method = lcm(networks, unconditional, "custom=1,1,1.5")
    calls, asked = record_calls(generator), record_calls(teacher)
    real = RealBatch(seeded(1).randn(2, *LATENT_SHAPE), cond)
    loss = method.consistency_loss(Batch(cond, real), seeded(0))["consistency"]
    assert [c.grad_enabled for c in calls] == [True, False]
    assert [len(c.x) for c in asked] == [4]  # with text and without
    upper, lower = calls
    timesteps = [method.schedule.timestep(c.sigma) for c in calls]
    assert (timesteps[0] - timesteps[1]).tolist() == [20, 20]
    assert ((timesteps[0] + 1) % 20).tolist() == [0, 0]
    # What both points lie on: a straight line in x over sigma, whose end is the teacher's guided estimate.
    with torch.no_grad():
        said = teacher(asked[0].x, asked[0].sigma, asked[0].cond)
    without, with_text = said.chunk(2)
    x0 = without + 1.5 * (with_text - without)
    share = (lower.sigma / upper.sigma)[:, None, None, None]
    torch.testing.assert_close(lower.x, x0 + share * (upper.x - x0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        made = [generator(c.x, c.sigma, c.cond) for c in calls[:2]]
    torch.testing.assert_close(loss, pseudo_huber_loss(*made).mean())


def test_lcm_ends_at_the_lowest_noise(networks, unconditional):
    schedule = networks[2].schedule
    method = lcm(networks, unconditional, "none")
    assert schedule.timestep(method.above[[0, 1, -1]]).tolist() == [19, 39, 999]
    assert schedule.timestep(method.below[[0, 1, -1]]).tolist() == [0, 19, 979]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dmd2", ["method.alpha=1.2"], r"method\.alpha: unused by DMD2: expected 1\.0, got 1\.2"),
        ("dmd2", ["data.pairs=demo"], r"data\.pairs: unused while gan\.generator_weight is 0"),
        ("lcm", [], r"lcm distils on real pairs: set data\.pairs"),
        ("lcm", ["data.pairs=demo", "gan.generator_weight=1"], r"gan\.generator_weight: lcm has no GAN branch"),
        ("lcm", ["data.pairs=demo", "method.weighting=snr"], r"method\.weighting: unused by LCM"),
        ("lcm", ["data.pairs=demo", "training.fake_score_updates=2"], r"fake_score_updates: lcm has no fake score"),
        ("lcm", ["data.pairs=demo", "method.guidance=lsg=2"], r"method\.guidance: lcm has no fake score"),
    ],
)
def test_what_a_baseline_would_ignore_is_an_error(kind, options, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"method.kind={kind}", *options])


@pytest.mark.parametrize(
    ("kind", "options", "losses", "title"),
    [
        ("dmd2", [], {"fake_score", "dmd2"}, "DMD2 2-step"),
        (
            "dmd2",
            ["data.pairs=demo", "gan.generator_weight=0.01"],
            {"fake_score", "discriminator", "dmd2", "gan"},
            "DMD2 2-step",
        ),
        ("lcm", ["data.pairs=demo"], {"consistency"}, "LCM 2-step"),
    ],
)
def test_a_baseline_trains_continues_and_exports(kind, options, losses, title, tmp_path):
    values = [*SETTINGS, f"method.kind={kind}", "training.checkpoint_every=1", *options]
    Trainer(load_config("demo", values), tmp_path).run()
    assert [set(entry["losses"]) for entry in read_log(tmp_path / "log.jsonl")] == [losses] * 2
    assert Trainer(load_config("demo", values), tmp_path).iteration == 2
    folder = RunFolder(tmp_path)
    assert folder.open_generator().recipe.title.endswith(title)
    state = load_file(folder.last_checkpoint())
    name = next(name for name in state if name.startswith("generator_ema."))
    assert not torch.equal(state[name], state[name.replace("generator_ema", "generator")])
