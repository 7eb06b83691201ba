import pytest
import torch
from torch import Tensor

from sid_train.core.rng import BatchRNG
from sid_train.method.config import GANConfig, MethodConfig
from sid_train.method.guidance import GuidanceStrategy
from sid_train.method.sid import Distiller
from sid_train.models.conditioning import RealBatch
from sid_train.models.digits.layout import LATENT_SHAPE
from sid_train.models.guided import guided_denoise, guided_denoise_with_logits

STRATEGIES = ["none", "lsg=1.5", "zero-cfg", "anti-cfg=-1", "custom=1,0,2"]


@pytest.mark.parametrize(
    ("text", "name", "scales", "needs_both"),
    [
        ("none", "none", (1, 1, 1), False),
        ("lsg", "lsg", (1.5, 1.5, 1.5), True),
        ("lsg=4.5", "lsg", (4.5, 4.5, 4.5), True),
        ("lsg=1", "lsg", (1, 1, 1), False),
        ("zero-cfg", "zero-cfg", (0, 0, 1), False),
        ("anti-cfg", "anti-cfg", (-1, -1, 1), True),
        ("anti-cfg=-0.5", "anti-cfg", (-0.5, -0.5, 1), True),
        ("custom=1,0,2.5", "custom", (1, 0, 2.5), True),
        ("custom=0,0,7", "custom", (0, 0, 7), False),
        (" custom= 1, 1 ,3 ", "custom", (1, 1, 3), False),
    ],
)
def test_strategies_by_name(text, name, scales, needs_both):
    strategy = GuidanceStrategy.parse(text)
    assert (strategy.name, (strategy.fake_train, strategy.fake_eval, strategy.teacher)) == (name, scales)
    assert strategy.fake_needs_both is needs_both


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected none, lsg=SCALE"),
        ("cfg=3", "expected none, lsg=SCALE"),
        ("none=1", "expected none, lsg=SCALE"),
        ("zero-cfg=0", "expected none, lsg=SCALE"),
        ("lsg=1,2", "expected none, lsg=SCALE"),
        ("custom=1,2", "expected none, lsg=SCALE"),
        ("custom", "expected none, lsg=SCALE"),
        ("anti-cfg=1", "expected a negative scale for anti-cfg, got 1"),
        ("anti-cfg=0", "expected a negative scale for anti-cfg, got 0"),
        ("lsg=strong", "expected numbers after '='"),
        ("lsg=nan", "expected numbers after '='"),
        ("lsg=inf", "expected numbers after '='"),
        ("custom=1,,2", "expected numbers after '='"),
    ],
)
def test_impossible_strategies_are_errors(text, problem):
    with pytest.raises(ValueError, match="guidance: ") as error:
        GuidanceStrategy.parse(text)
    assert problem in str(error.value)
    assert repr(text) in str(error.value) or "anti-cfg, got" in str(error.value)


@pytest.fixture
def rng(rng) -> BatchRNG:
    return BatchRNG(rng)


@pytest.fixture
def x(rng) -> Tensor:
    return rng.randn(2, *LATENT_SHAPE)


@pytest.fixture
def sigma(schedule) -> Tensor:
    return schedule.sigma(torch.tensor([100, 800]))


@pytest.mark.parametrize("scale", [1, 0, 2.5, -1])
@torch.no_grad()
def test_guided_denoise_is_u_plus_scale_times_c_minus_u(
    scale, x, sigma, cond, unconditional, make_denoiser, record_calls
):
    denoiser = make_denoiser()
    c, u = denoiser(x, sigma, cond), denoiser(x, sigma, unconditional.expand(2))
    assert not torch.allclose(c, u, atol=1e-3)
    calls = record_calls(denoiser)
    result = guided_denoise(denoiser, x, sigma, cond, unconditional, scale)
    torch.testing.assert_close(result, u + scale * (c - u), rtol=1e-4, atol=1e-4)
    assert [len(call.x) for call in calls] == [2 if scale in (0, 1) else 4]  # one batch, whatever the scale


@pytest.mark.parametrize("scale", [1, 0, 2.5, -1])
@torch.no_grad()
def test_logits_see_the_text_at_every_scale(scale, x, sigma, cond, unconditional, make_denoiser):
    denoiser = make_denoiser()
    x0, logits = guided_denoise_with_logits(denoiser, x, sigma, cond, unconditional, scale)
    torch.testing.assert_close(x0, guided_denoise(denoiser, x, sigma, cond, unconditional, scale))
    torch.testing.assert_close(logits, denoiser.logits(x, sigma, cond), rtol=1e-4, atol=1e-5)
    _, others = guided_denoise_with_logits(denoiser, x, sigma, cond[[1, 0]], unconditional, scale)
    assert (others - logits).abs().max() > 1e-4


# Rows through a network, a sample: (teacher and fake score in generator_loss, fake score in fake_score_loss), then the
# same with the GAN branch, where a pass of the encoder alone (+1) counts as "logits".
@pytest.mark.parametrize(
    ("guidance", "plain", "adversarial"),
    [
        ("none", (1, 1, 1), (1, 1, 2)),
        ("lsg=1.5", (2, 2, 2), (2, 2, 3)),
        ("zero-cfg", (1, 1, 1), (1, 2, 3)),
        ("anti-cfg=-1", (1, 2, 2), (1, 2, 3)),
        ("custom=1,0,2", (2, 1, 1), (2, 2, 2)),
    ],
)
def test_network_calls_by_strategy(
    guidance, plain, adversarial, cond, unconditional, schedule, make_denoiser, record_calls, rng
):
    teacher, fake_score = make_denoiser(1), make_denoiser(2)
    of_teacher, of_fake = record_calls(teacher), record_calls(fake_score)
    distiller = Distiller(
        make_denoiser(3),
        fake_score,
        teacher,
        schedule,
        unconditional,
        LATENT_SHAPE,
        MethodConfig(steps=1, guidance=guidance, prompt_dropout=0),
        GANConfig(generator_weight=1),
    )

    def rows(calls):
        count = sum(len(c.x) for c in calls) // len(cond)
        calls.clear()
        return count

    real = RealBatch(rng.randn(2, *LATENT_SHAPE), cond)
    with torch.no_grad():
        for gan, expected in ((False, plain), (True, adversarial)):
            distiller.generator_loss(cond, 1, rng, adversarial=gan)
            counts = (rows(of_teacher), rows(of_fake))
            distiller.fake_score_loss(cond, 1, rng, real if gan else None)
            assert (*counts, rows(of_fake)) == expected
            assert rows(of_teacher) == 0  # the fake score learns without the teacher


@pytest.mark.parametrize("guidance", STRATEGIES)
def test_discriminator_is_told_each_samples_own_text(
    guidance, cond, unconditional, schedule, make_denoiser, record_calls, rng
):
    fake_score = make_denoiser(2)
    distiller = Distiller(
        make_denoiser(3),
        fake_score,
        make_denoiser(1),
        schedule,
        unconditional,
        LATENT_SHAPE,
        MethodConfig(steps=1, guidance=guidance, prompt_dropout=0),
        GANConfig(generator_weight=1),
    )
    calls = record_calls(fake_score)
    real = RealBatch(rng.randn(2, *LATENT_SHAPE), cond[[1, 0]])
    with torch.no_grad():
        distiller.generator_loss(cond, 1, rng, adversarial=True)
        distiller.fake_score_loss(cond, 1, rng, real)
    told = [c.cond[-2:] for c in calls if c.call != "denoise"]  # the second half of a guided batch has the text
    assert len(told) == 3
    for given, expected in zip(told, (cond, cond, real.cond), strict=True):
        assert torch.equal(given.text, expected.text)
        assert torch.equal(given.pooled, expected.pooled)
