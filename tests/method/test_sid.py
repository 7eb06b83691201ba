from collections import Counter

import pytest
import torch
from torch import autocast, nn

from sid_train.core.rng import BatchRNG
from sid_train.method.config import GANConfig, MethodConfig
from sid_train.method.sid import Distiller
from sid_train.models.conditioning import RealBatch
from sid_train.models.digits.layout import LATENT_SHAPE


@pytest.fixture
def make(make_denoiser, unconditional):
    """``make(gan=None, prediction_type=..., **method)``: a Distiller over three different tiny UNets."""

    def build(
        gan: GANConfig | None = None, prediction_type: str = "epsilon", zero_snr: bool = False, **method
    ) -> Distiller:
        generator, fake_score, teacher = (make_denoiser(seed, prediction_type, zero_snr) for seed in (1, 2, 3))
        teacher.requires_grad_(False)
        schedule, settings = teacher.schedule, MethodConfig(**method)
        return Distiller(generator, fake_score, teacher, schedule, unconditional, LATENT_SHAPE, settings, gan)

    return build


@pytest.fixture
def rng(rng) -> BatchRNG:
    return BatchRNG(rng)


@pytest.fixture
def real(cond, rng) -> RealBatch:
    return RealBatch(rng.randn(2, *LATENT_SHAPE), cond)


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def seeded(seed: int) -> BatchRNG:
    return BatchRNG(torch.Generator().manual_seed(seed))


# -- the rollout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_mode", ["fresh", "ddim"])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_uniform_matching_differentiates_step_k_alone(step, noise_mode, make, cond, record_calls, rng):
    distiller = make(noise_mode=noise_mode)
    generator = distiller.generator
    calls = record_calls(generator)
    x_g = distiller.rollout(cond, step, rng)
    assert [c.grad_enabled for c in calls] == [False] * (step - 1) + [True]
    assert torch.equal(torch.stack([c.sigma[0] for c in calls]), distiller.chains[step - 1][:-1])

    cotangent = rng.randn(*x_g.shape)
    x_g.backward(cotangent)
    through_chain = [g.clone() for g in gradients(generator)]
    generator.zero_grad()
    last = calls[-1]
    generator(last.x, last.sigma, last.cond).backward(cotangent)
    assert sum(g.abs().sum() for g in through_chain) > 0
    torch.testing.assert_close(through_chain, gradients(generator))


def test_an_any_step_generator_draws_the_chain_and_then_its_step(make, cond, record_calls, rng):
    distiller = make(any_steps="1,2,4")
    ladders = {(625,), (625, 312), (625, 468, 312, 156)}
    counts = Counter(distiller.draw_step(rng.generator) for _ in range(2400))
    assert set(counts) == set(range(1, 8))
    shares = [counts[step] / 2400 for step in range(1, 8)]
    assert shares == pytest.approx([1 / 3, 1 / 6, 1 / 6, *[1 / 12] * 4], abs=0.03)
    calls = record_calls(distiller.generator)
    run = set()
    for step in range(1, 8):
        calls.clear()
        distiller.rollout(cond, step, rng)
        assert [c.grad_enabled for c in calls] == [False] * (len(calls) - 1) + [True]
        run.add(tuple(round(float(distiller.schedule.timestep(c.sigma[0]))) for c in calls))
    assert run == {ladder[: k + 1] for ladder in ladders for k in range(len(ladder))}
    step, more = distiller.planned_step()
    assert len(distiller.chains[step - 1]) - 1 == 2
    calls_of = [len(chain) - 1 for chain in distiller.chains]
    assert 2 + more == pytest.approx(sum(s * c for s, c in zip(shares, calls_of, strict=True)), abs=0.1)


def test_final_matching_differentiates_the_whole_chain(make, cond, record_calls, rng):
    distiller = make(matching="final", steps=3)
    calls = record_calls(distiller.generator)
    x_g = distiller.rollout(cond, distiller.draw_step(rng.generator), rng)
    assert [c.grad_enabled for c in calls] == [True] * 3
    assert [c.x.requires_grad for c in calls] == [False, True, True]
    # A gradient that comes out of the first call went through all the later ones.
    (arrived,) = torch.autograd.grad(x_g.sum(), calls[1].x)
    assert arrived.abs().sum() > 0


@pytest.mark.parametrize("step", [1, 2, 4])
def test_every_parameter_gets_a_gradient_under_autocast(step, make, cond, rng):
    """The steps without gradient must not leave their cast weights to the one that has it."""
    distiller = make()
    with autocast("cpu", torch.bfloat16):
        x_g = distiller.rollout(cond, step, rng)
    x_g.sum().backward()
    assert len(gradients(distiller.generator)) == len(list(distiller.generator.parameters()))


def test_rollout_without_gradient_has_none_and_is_the_same(make, cond):
    distiller = make()
    with torch.no_grad():
        without = distiller.rollout(cond, 3, seeded(4))
    assert not without.requires_grad
    assert torch.equal(without, distiller.rollout(cond, 3, seeded(4)))
    assert without.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_uniform_matching_draws_every_step_equally(steps, make, rng):
    distiller = make(steps=steps)
    counts = Counter(distiller.draw_step(rng.generator) for _ in range(400 * steps))
    assert sorted(counts) == list(range(1, steps + 1))
    assert all(300 < n < 500 for n in counts.values())
    assert make(steps=steps, matching="final").draw_step(rng.generator) == steps


def test_noise_levels_are_drawn_within_the_configured_timesteps(make, schedule, rng):
    distiller = make(t_min=20, t_max=30)
    x_g = rng.randn(2000, *LATENT_SHAPE)
    x_t, sigma, eps = distiller.perturb(x_g, rng)
    assert set(schedule.timestep(sigma).tolist()) == set(range(20, 30))
    torch.testing.assert_close(x_t, x_g + sigma.reshape(-1, 1, 1, 1) * eps)
    assert abs(eps.std() - 1) < 0.01


# -- who learns from what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["none", "lsg=2", "zero-cfg"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_generator_loss_teaches_the_generator_alone(adversarial, guidance, make, cond, rng):
    distiller = make(GANConfig(generator_weight=1), guidance=guidance, steps=2)
    losses = distiller.generator_loss(cond, 2, rng, adversarial=adversarial)
    assert set(losses) == ({"sid", "gan"} if adversarial else {"sid"})
    assert all(loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert len(gradients(distiller.generator)) == len(list(distiller.generator.parameters()))
    assert sum(g.abs().sum() for g in gradients(distiller.generator)) > 0
    assert gradients(distiller.fake_score) == []
    assert gradients(distiller.teacher) == []
    distiller.fake_score_loss(cond, 2, rng)
    assert all(p.requires_grad for p in distiller.fake_score.parameters())  # it can learn again
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


def test_generator_gradient_goes_through_both_networks(make, cond):
    """The three-way split of method.md, section 4: every cotangent in its place, summed, one backward pass."""
    distiller = make(steps=1, alpha=1.2, weighting="uniform")
    distiller.generator_loss(cond, 1, seeded(0))["sid"].backward()
    expected = [g.clone() for g in gradients(distiller.generator)]

    distiller.generator.zero_grad()
    rng = seeded(0)
    x_g = distiller.rollout(cond, 1, rng)
    x_t, sigma, _ = distiller.perturb(x_g.detach(), rng)
    x_t.requires_grad_()
    a, b = distiller.teacher(x_t, sigma, cond), distiller.fake_score(x_t, sigma, cond)
    d, r = (a - b).detach(), (a - x_g).detach()
    of_teacher = torch.autograd.grad(a, x_t, r + (1 - 2 * 1.2) * d)[0]
    of_fake = torch.autograd.grad(b, x_t, -r + 2 * 1.2 * d)[0]
    x_g.backward((of_teacher + of_fake - d) / len(cond))
    torch.testing.assert_close(gradients(distiller.generator), expected, rtol=1e-3, atol=1e-4)
    assert of_teacher.abs().sum() > 0
    assert of_fake.abs().sum() > 0


@pytest.mark.parametrize("network", ["generator", "teacher", "fake_score"])
def test_gradient_checkpointing_changes_no_gradient(network, make, cond):
    results = []
    for checkpointing in (False, True):
        distiller = make(steps=2)
        if checkpointing:
            getattr(distiller, network).train().unet.enable_gradient_checkpointing()
        distiller.generator_loss(cond, 2, seeded(0))["sid"].backward()
        results.append(gradients(distiller.generator))
        assert gradients(distiller.fake_score) == []
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gan", [False, True])
def test_fake_score_loss_teaches_the_fake_score_alone(gan, make, cond, real, rng):
    distiller = make(GANConfig(generator_weight=1), steps=2)
    losses = distiller.fake_score_loss(cond, 2, rng, real if gan else None)
    assert set(losses) == ({"fake_score", "discriminator"} if gan else {"fake_score"})
    sum(losses.values()).backward()
    assert len(gradients(distiller.fake_score)) == len(list(distiller.fake_score.parameters()))
    assert gradients(distiller.generator) == []
    assert gradients(distiller.teacher) == []


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_mode", ["fresh", "fixed", "ddim"])
def test_losses_depend_on_the_seed_alone(noise_mode, make, cond, real):
    distiller = make(GANConfig(generator_weight=1), noise_mode=noise_mode, guidance="lsg=2", prompt_dropout=0.5)

    @torch.no_grad()
    def losses(seed):
        rng = seeded(seed)
        step = distiller.draw_step(rng.generator)
        return distiller.fake_score_loss(cond, step, rng, real) | distiller.generator_loss(cond, step, rng, True)

    assert losses(5) == losses(5)
    assert losses(5).keys() == losses(6).keys() == {"fake_score", "discriminator", "sid", "gan"}
    assert all(a != b for a, b in zip(losses(5).values(), losses(6).values(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["none", "lsg=2", "zero-cfg"])
def test_prompts_captions_and_no_text_of_different_lengths_meet(guidance, make, cond, unconditional, rng):
    """One, two and three chunks, against all of them repeated to six beforehand."""

    def repeated(cond, times):
        return cond.replace(text=cond.text.repeat(1, times, 1))

    words = [rng.randn(2, 8 * chunks, 64) for chunks in (2, 3)]
    latents = rng.randn(2, *LATENT_SHAPE)

    def losses(*times):
        told, captions = (repeated(cond.replace(text=text), n) for text, n in zip(words, times[1:], strict=True))
        distiller = make(GANConfig(generator_weight=0.1), guidance=guidance, prompt_dropout=0.5)
        distiller.unconditional = repeated(unconditional, times[0])
        real = RealBatch(latents, captions)
        return distiller.fake_score_loss(told, 2, seeded(1), real) | distiller.generator_loss(told, 2, seeded(2), True)

    apart, beforehand = losses(1, 1, 1), losses(6, 3, 2)
    assert apart.keys() == beforehand.keys() == {"fake_score", "discriminator", "sid", "gan"}
    for name, loss in apart.items():
        torch.testing.assert_close(loss, beforehand[name], rtol=1e-4, atol=1e-6)


def test_gan_weights_scale_their_terms(make, cond, real):
    def losses(**weights):
        distiller = make(GANConfig(**weights))
        return distiller.fake_score_loss(cond, 2, seeded(1), real) | distiller.generator_loss(cond, 2, seeded(2), True)

    one = losses(generator_weight=1.0)
    other = losses(generator_weight=3.0, sid_weight=100.0, discriminator_weight=0.5)
    for name, factor in {"gan": 3.0, "sid": 100.0, "discriminator": 0.5, "fake_score": 1.0}.items():
        torch.testing.assert_close(other[name], factor * one[name])
    plain = make().generator_loss(cond, 2, seeded(2))
    torch.testing.assert_close(one["sid"], 0.5 * plain["sid"])  # mixed half and half with the GAN term
    assert one["gan"] > 0


def test_gan_term_changes_the_generators_gradient(make, cond):
    distiller = make(GANConfig(generator_weight=1.0))
    totals = []
    for adversarial in (False, True):
        distiller.generator.zero_grad()
        losses = distiller.generator_loss(cond, 1, seeded(0), adversarial)
        (losses["sid"] * (2 if adversarial else 1) + losses.get("gan", 0)).backward()
        totals.append(torch.cat([g.flatten() for g in gradients(distiller.generator)]))
    assert (totals[1] - totals[0]).norm() > 1e-3 * totals[0].norm()


@pytest.mark.parametrize("where", ["generator", "fake_score"])
@torch.no_grad()
def test_dropped_prompts(where, make, cond, unconditional, record_calls, rng):
    distiller = make(guidance="lsg=2", steps=1, prompt_dropout=0.4, prompt_dropout_in=where)
    of_generator, of_fake = record_calls(distiller.generator), record_calls(distiller.fake_score)
    many = type(cond).cat([cond] * 20)
    distiller.fake_score_loss(many, 1, rng)
    told = of_fake[0].cond[40:]  # after the unconditional half
    dropped = (told.text == unconditional.text).flatten(1).all(1)
    assert 6 < dropped.sum() < 28
    assert torch.equal(told.text[~dropped], many.text[~dropped])
    assert torch.equal(told.pooled[dropped], unconditional.pooled.expand(int(dropped.sum()), -1))
    generated_from = told if where == "generator" else many
    assert torch.equal(of_generator[0].cond.text, generated_from.text)

    of_fake.clear()
    distiller.fake_score_loss(many, 1, rng, RealBatch(torch.zeros(40, *LATENT_SHAPE), many))
    generated, real = of_fake[0].cond[40:], of_fake[1].cond  # real pairs lose theirs too: no text is no tell
    assert torch.equal(generated.text, real.text)
    assert (real.text == unconditional.text).flatten(1).all(1).any()

    of_generator.clear()
    distiller.generator_loss(many, 1, rng)
    assert torch.equal(of_generator[0].cond.text, many.text)  # the generator itself always learns with text


@pytest.mark.parametrize("guidance", ["none", "zero-cfg"])
def test_prompts_are_kept_where_the_fake_score_is_asked_one_way(guidance, make, rng):
    assert not make(guidance=guidance, prompt_dropout=0.9).draw_dropped(100, rng).any()
    assert make(guidance="lsg=2", prompt_dropout=0.9).draw_dropped(100, rng).float().mean() > 0.7


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_runs(zero_snr, make, cond, real, rng):
    t_init = 999 if zero_snr else 625
    distiller = make(GANConfig(generator_weight=1), "v_prediction", zero_snr, t_init=t_init, guidance="lsg=2")
    losses = distiller.fake_score_loss(cond, 4, rng, real) | distiller.generator_loss(cond, 4, rng, True)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(g.isfinite().all() for g in gradients(distiller.generator) + gradients(distiller.fake_score))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_fake_score_learns_what_the_generator_makes(prediction_type, make, cond):
    distiller = make(prediction_type=prediction_type, steps=1)
    many = type(cond).cat([cond] * 4)

    @torch.no_grad()
    def validate():
        return distiller.fake_score_loss(type(cond).cat([cond] * 8), 1, seeded(99))["fake_score"].item()

    before, rng = validate(), seeded(0)
    optimizer = torch.optim.Adam(distiller.fake_score.parameters(), lr=1e-3, betas=(0.0, 0.999))
    for _ in range(20):
        optimizer.zero_grad()
        distiller.fake_score_loss(many, 1, rng)["fake_score"].backward()
        optimizer.step()
    assert validate() < 0.92 * before  # measured: 0.83 (eps), 0.84 (v)


# -- the network wrapper -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_encoders_logits_are_the_whole_networks(prediction_type, make_denoiser, cond, schedule, rng):
    denoiser = make_denoiser(0, prediction_type)
    x = rng.randn(2, *LATENT_SHAPE)
    sigma = schedule.sigma(torch.tensor([30, 900]))
    x0, logits = denoiser.denoise_with_logits(x, sigma, cond)
    assert torch.equal(denoiser.logits(x, sigma, cond), logits)
    assert torch.equal(denoiser(x, sigma, cond), x0)
    assert x0.shape == x.shape
    assert logits.shape == (2, 4, 4)
    assert not denoiser.unet.mid_block._forward_hooks
    assert not torch.allclose(denoiser.logits(x, sigma, cond.replace(pooled=cond.pooled.flip(0))), logits)


def test_encoder_pass_teaches_the_encoder_alone(make_denoiser, cond, schedule, rng):
    denoiser = make_denoiser()
    x = rng.randn(2, *LATENT_SHAPE)
    denoiser.logits(x, schedule.sigma(torch.tensor([30, 900])), cond).sum().backward()
    without = {name.split(".")[0] for name, p in denoiser.unet.named_parameters() if p.grad is None}
    assert without == {"up_blocks", "conv_norm_out", "conv_out"}


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 9}, "steps: expected 1 to 8, got 9"),
        ({"t_init": 1000}, "t_init: expected"),
        ({"noise_mode": "none"}, r"method\.noise_mode: expected one of fresh, fixed, ddim, got 'none'"),
        ({"matching": "all"}, r"method\.matching: expected one of uniform, final, got 'all'"),
        ({"guidance": "cfg"}, "guidance: expected none, lsg=SCALE"),
        ({"weighting": "snr2"}, r"method\.weighting: expected one of l1"),
        ({"prompt_dropout_in": "teacher"}, r"method\.prompt_dropout_in: expected one of generator, fake_score"),
        ({"noise_levels": "normal"}, r"method\.noise_levels: expected one of uniform, logit_normal, got 'normal'"),
        ({"any_steps": "1,2"}, r"method\.any_steps: expected different numbers, method\.steps \(4\) among them"),
        ({"any_steps": "4,4"}, r"method\.any_steps: expected different numbers, .*got '4,4'"),
        ({"any_steps": "4;2"}, r"method\.any_steps: expected numbers such as 1,2,4,8, got '4;2'"),
        ({"any_steps": "4,9"}, r"steps: expected 1 to 8, got 9"),
        ({"any_steps": "1,4", "matching": "final"}, r"method\.any_steps: goes with method\.matching uniform only"),
        ({"t_min": 980}, r"method\.t_min, method\.t_max: expected 0 <= t_min < t_max <= 1000, got 980, 980"),
        ({"prompt_dropout": 1}, r"method\.prompt_dropout: expected 0 to below 1, got 1"),
    ],
)
def test_impossible_methods_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options)


@pytest.mark.parametrize("field", ["generator_weight", "sid_weight", "discriminator_weight", "start_images"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_negative_gan_weights_are_errors(field, value):
    with pytest.raises(ValueError, match=rf"gan\.{field}: expected 0 or more"):
        GANConfig(**{field: value})


def test_gan_is_off_unless_it_has_a_weight():
    assert not GANConfig().enabled
    assert GANConfig(generator_weight=0.01).enabled
