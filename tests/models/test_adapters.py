"""LoRA adapters over one UNet: the same losses and gradients as three networks of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from sid_train.core.rng import BatchRNG
from sid_train.files.tensors import LazyTensor
from sid_train.method.config import GANConfig, MethodConfig
from sid_train.method.sid import Distiller
from sid_train.models.adapter_config import AdapterConfig
from sid_train.models.adapters import (
    AdapterDenoiser,
    SharedNetwork,
    adapter_from_state,
    copy_adapter,
)
from sid_train.models.conditioning import RealBatch
from sid_train.models.families import load_model
from sid_train.models.family import merge_lora

RANK = 4
ROLES = ("generator", "fake_score")
PROMPTS = ["a red three on a blue ground", "a green one on a blue ground", "a red seven on a black ground"]


@pytest.fixture(scope="module")
def bundle():
    return load_model("demo")


def randomise(denoiser: AdapterDenoiser, seed: int) -> None:
    """As if it had been trained: a new adapter changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.05


def shared_networks(bundle, checkpointing: bool = True):
    shared = SharedNetwork(copy.deepcopy(bundle.denoiser), AdapterConfig(RANK), ROLES)
    if checkpointing:
        shared.use_checkpointing()
    networks = {role: AdapterDenoiser(shared, role) for role in (*ROLES, "teacher")}
    for seed, role in enumerate(ROLES):
        randomise(networks[role].requires_grad_(True), seed)
    return shared, networks


def separate_networks(bundle):
    """Three UNets of their own, two of them with an adapter, nothing recomputed."""
    networks = {"teacher": copy.deepcopy(bundle.denoiser).requires_grad_(False)}
    for seed, role in enumerate(ROLES):
        shared = SharedNetwork(copy.deepcopy(bundle.denoiser), AdapterConfig(RANK), (role,))
        networks[role] = AdapterDenoiser(shared, role).requires_grad_(True)
        randomise(networks[role], seed)
    return networks


def gradients(bundle, networks, method: MethodConfig, adversarial: bool, loss: str) -> dict[str, torch.Tensor]:
    """The loss and every adapter's gradients."""
    cond = bundle.conditioner.encode(PROMPTS)
    distiller = Distiller(
        networks["generator"],
        networks["fake_score"],
        networks["teacher"],
        bundle.denoiser.schedule,
        bundle.unconditional("empty"),
        bundle.latent_shape,
        method,
        GANConfig(generator_weight=0.5),
    )
    rng = BatchRNG(torch.Generator().manual_seed(3))
    if loss == "generator":
        losses = distiller.generator_loss(cond, 2, rng, adversarial)
    else:
        latents = torch.randn(len(PROMPTS), *bundle.latent_shape, generator=torch.Generator().manual_seed(4))
        losses = distiller.fake_score_loss(cond, 2, rng, RealBatch(latents, cond) if adversarial else None)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    found = {
        f"{role} {name}": p.grad
        for role in ROLES
        for name, p in networks[role].named_parameters()
        if p.grad is not None
    }
    return found | {"loss": total.detach()}


@pytest.mark.parametrize("loss", ["generator", "fake score"])
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    ("guidance", "matching"), [("none", "uniform"), ("lsg=1.5", "uniform"), ("zero-cfg", "uniform"), ("none", "final")]
)
def test_gradients_equal_those_of_three_networks(bundle, guidance, adversarial, loss, matching):
    method = MethodConfig(steps=2, guidance=guidance, matching=matching)
    ours = gradients(bundle, shared_networks(bundle)[1], method, adversarial, loss)
    wanted = gradients(bundle, separate_networks(bundle), method, adversarial, loss)
    assert set(ours) == set(wanted)
    learns = "generator" if loss == "generator" else "fake_score"
    assert all(name.startswith(learns) for name in ours if name != "loss")
    assert max(g.abs().max() for g in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_recomputing_as_whoever_is_active_is_wrong(bundle):
    """The mistake that remembering the role prevents: plain checkpointing recomputes the teacher as an adapter."""
    shared, networks = shared_networks(bundle, checkpointing=False)
    shared.denoiser.unet.enable_gradient_checkpointing()
    with pytest.raises(CheckpointError, match="different metadata"):
        gradients(bundle, networks, MethodConfig(steps=2), False, "generator")


def test_new_adapters_change_nothing_and_the_teacher_is_never_changed(bundle):
    shared = SharedNetwork(copy.deepcopy(bundle.denoiser), AdapterConfig(RANK), ROLES)
    networks = {role: AdapterDenoiser(shared, role) for role in (*ROLES, "teacher")}
    cond, sigma = bundle.conditioner.encode(PROMPTS), torch.full((len(PROMPTS),), 2.0)
    x = torch.randn(len(PROMPTS), *bundle.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bundle.denoiser(x, sigma, cond)
        for network in networks.values():
            assert torch.equal(network(x, sigma, cond), expected)
        randomise(networks["generator"], 0)
        assert not torch.allclose(networks["generator"](x, sigma, cond), expected, atol=1e-2)
        assert torch.equal(networks["fake_score"](x, sigma, cond), expected)
        assert torch.equal(networks["teacher"](x, sigma, cond), expected)


def test_only_the_adapters_are_parameters(bundle):
    shared, networks = shared_networks(bundle)
    assert list(networks["teacher"].parameters()) == []
    assert all(p.dtype == torch.float32 and p.requires_grad for p in networks["generator"].parameters())
    assert {id(p) for p in networks["generator"].parameters()}.isdisjoint(
        id(p) for p in networks["fake_score"].parameters()
    )
    assert len(list(networks["generator"].parameters())) == 2 * len(shared.layers)


def test_merged_adapter_is_the_adapter(bundle):
    _, networks = shared_networks(bundle)
    merged = copy.deepcopy(bundle.denoiser)
    lazy = {name: LazyTensor.of(tensor) for name, tensor in merged.unet.state_dict().items()}
    adapter = adapter_from_state(networks["generator"].state_dict())
    merged.unet.load_state_dict({name: tensor.load() for name, tensor in merge_lora(lazy, adapter).items()})
    cond, sigma = bundle.conditioner.encode(PROMPTS), torch.full((len(PROMPTS),), 2.0)
    x = torch.randn(len(PROMPTS), *bundle.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(x, sigma, cond), networks["generator"](x, sigma, cond), rtol=1e-4, atol=1e-4)


def test_copied_adapter_computes_the_same(bundle):
    _, networks = shared_networks(bundle)
    copy_adapter(networks["generator"], networks["fake_score"])
    for ours, theirs in zip(networks["generator"].parameters(), networks["fake_score"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
