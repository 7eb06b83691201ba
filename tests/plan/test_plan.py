"""What ``plan`` says, beside real iterations, PyTorch's own counts, and its own changes carried out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plan_against_real import measure, planned
from small_sdxl import UNET_CONFIG, save_single_file, small_pipeline
from torch import autocast, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sid_train import configs
from sid_train.cli import main
from sid_train.commands.plan import refuse_what_cannot_fit
from sid_train.config import load_config
from sid_train.data.rows import EAGER_LIMIT
from sid_train.models.bundle import count_parameters
from sid_train.models.conditioning import Conditioning
from sid_train.models.families import model_shapes
from sid_train.models.networks import build_networks
from sid_train.plan.estimate import Hardware, Plan, Planner, adam8bit_states, make_planner
from sid_train.plan.report import TABLE_BEGIN, TABLE_END, TABLE_HARDWARE, describe, fit_cell, table_configs, write_table
from sid_train.plan.trace import PICTURES, trace_iteration
from sid_train.plan.tracker import Tracker, normalise_as_cuda

MIB = 2**20
ONE_GPU = Hardware(1, 24, 2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_single_file(tmp_path_factory.mktemp("sdxl") / "small-xl.safetensors", small_pipeline()))


@pytest.fixture(scope="module")
def demo() -> Planner:
    return make_planner(load_config("demo"))


# -- counting ------------------------------------------------------------------------------------------------------


def live(tracker: Tracker) -> dict[str, int]:
    sizes = dict.fromkeys(tracker.labels, 0)
    for label, size in tracker.events:
        sizes[tracker.labels[label]] += size
    return sizes


def test_storages_are_counted_once_and_until_they_are_freed():
    with Tracker() as tracker:
        tracker.label = "first"
        x = tracker.empty(torch.empty(1024, 256, device="meta"))
        tracker.label = "second"
        y = x.t() @ x
        view = y.view(-1)[:10]
        y.add_(1)
        assert live(tracker) == {"first": 4 * 1024 * 256, "second": 4 * 256 * 256}
        assert tracker.flops == 2 * 256 * 1024 * 256
        del y
        assert live(tracker)["second"] == 4 * 256 * 256
        tracker.relabel([view], "first")
        del view
        assert live(tracker) == {"first": 4 * 1024 * 256, "second": 0}
        z = torch.ones(10)  # real
        del x, z
    assert set(live(tracker).values()) == {0}


def test_a_tensor_without_data_is_refused_elsewhere():
    with Tracker() as tracker:
        x = tracker.empty(torch.empty(3, device="meta"))
    with pytest.raises(AssertionError, match="outside of a Tracker"):
        x.add(1)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.resolution=128", "training.batch_size=2", "method.steps=2"],
        [
            "model.resolution=128",
            "model.frozen_dtype=bf16",
            "adapter.rank=16",
            "training.batch_size=2",
            "training.accumulate=2",
            "training.gradient_checkpointing=true",
            "training.mixed_precision=bf16",
            "method.guidance=lsg=1.5",
            "method.steps=1",
        ],
    ],
    ids=["whole", "LoRA"],
)
def test_within_15_percent_of_what_a_real_iteration_allocates(teacher, settings, tmp_path):
    (tmp_path / "prompts.txt").write_text("a lighthouse at dawn\n")
    fixed = [f"model.teacher={teacher}", f"data.prompts={tmp_path / 'prompts.txt'}", "training.tracker=none"]
    config = load_config(None, [*fixed, *settings])
    real = measure(config, tmp_path / "run")
    assert real > 20 * MIB
    assert planned(config) == pytest.approx(real, rel=0.15)


def output_types(network: nn.Module) -> dict[str, torch.dtype]:
    """Filled with the type of what each part of ``network`` returns, once it is called."""
    found: dict[str, torch.dtype] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda m, args, out, name=name: found.update({name: out.dtype}) if isinstance(out, torch.Tensor) else None
        )
    return found


@pytest.mark.skipif(torch.__version__ < "2.10", reason="its FakeTensorMode needs a CUDA device")
@pytest.mark.parametrize("rank", [0, 4])
def test_types_are_those_of_autocast_on_cuda(teacher, rank):
    """PyTorch's own autocast for CUDA, on tensors that say they are on a CUDA device."""
    config = load_config(None, [f"adapter.rank={rank}", "model.frozen_dtype=bf16"])

    def build() -> tuple[nn.Module, nn.Module]:
        denoiser = model_shapes(teacher, 64).denoiser
        with torch.device("meta"):
            networks = build_networks(
                denoiser, None, config.adapter, "bf16", False, lambda network: None, ("generator",)
            )
            return networks.trained["generator"], denoiser

    def call(network: nn.Module, unet: nn.Module, make, device: str) -> None:
        for part in (unet, network):
            for module in part.modules():
                for name, old in module._parameters.items():
                    if old is not None and old.is_meta:
                        module._parameters[name] = nn.Parameter(make(old), requires_grad=False)
        width = UNET_CONFIG["projection_class_embeddings_input_dim"] - 6 * 256
        shapes = {"text": (77, 128), "pooled": (width,), "time_ids": (6,)}
        cond = Conditioning(**{name: torch.ones(1, *shape, device=device) for name, shape in shapes.items()})
        network(torch.ones(1, 4, 8, 8, device=device), torch.ones(1, device=device), cond)

    ours, unet = build()
    normalise_as_cuda(ours, unet)
    found = output_types(unet if rank else ours.unet)
    with Tracker() as tracker, autocast("cpu", torch.bfloat16):
        call(ours, unet, tracker.empty, "cpu")
    theirs, unet = build()
    wanted = output_types(unet if rank else theirs.unet)
    # torch.autocast turns itself off where there is no CUDA device.
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            call(theirs, unet, lambda old: torch.empty_like(old, device="cuda"), "cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert len(wanted) > 100
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    assert found == wanted


def test_flops_are_those_of_a_real_call(make_denoiser, cond):
    real = FlopCounterMode(display=False)
    with real, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        make_denoiser()(torch.ones(2, 12, 8, 8), torch.ones(2), cond)
    config = load_config("demo", ["training.batch_size=2"])
    calls = trace_iteration(model_shapes("demo", 0), config, 2).calls
    assert {call.flops for call in calls} == {real.get_total_flops()}


# -- plans ---------------------------------------------------------------------------------------------------------


def test_calls_and_flops_are_the_mean_over_the_drawn_step(demo):
    def plan(*settings: str):
        return demo.plan(load_config("demo", ["training.batch_size=4", *settings]), ONE_GPU)

    one, four = plan("method.steps=1"), plan("method.steps=4")
    calls = {(c.update, c.role, c.with_gradient): c.calls for c in four.calls}
    assert calls == {
        ("fake score", "generator", False): 2 * 2.5,
        ("fake score", "fake score", True): 2,
        ("generator", "generator", False): 1.5,
        ("generator", "generator", True): 1,
        ("generator", "teacher", True): 1,
        ("generator", "fake score", True): 1,
    }
    # Three calls more: 1.5 in each of the two updates of the fake score, and 1.5 in the generator's.
    assert four.flops_per_iteration - one.flops_per_iteration == 4.5 * 4 * four.forward_flops
    parts = plan("method.steps=4", "training.accumulate=2")
    assert parts.flops_per_iteration == pytest.approx(four.flops_per_iteration, rel=1e-6)


def test_recomputing_and_small_states_take_less(demo):
    def plan(*settings: str):
        return demo.plan(load_config("demo", list(settings)), ONE_GPU)

    assert plan("training.gradient_checkpointing=true").peak < plan().peak
    assert plan("training.accumulate=2").peak < plan().peak
    small = plan("optimizer.kind=adam8bit").roles["generator"]
    assert plan().roles["generator"].optimizer / 4.5 < small.optimizer < plan().roles["generator"].optimizer / 3.5
    assert adam8bit_states([4096, 10]) == 2 * (4096 + 4 * 16) + 2 * 4 * 10


def test_8_bit_states_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (129, 257), (63, 65), (10,))]
    optimizer = bitsandbytes.optim.Adam8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # The tables that the codes mean (qmap) are the same tensor for all parameters.
    states = [
        v for state in optimizer.state.values() for k, v in state.items() if torch.is_tensor(v) and "qmap" not in k
    ]
    assert adam8bit_states(p.numel() for p in parameters) == sum(v.nbytes for v in states)


def test_each_gpu_holds_its_part(demo):
    settings = ["training.batch_size=8"]
    whole = demo.plan(load_config("demo", settings), Hardware(8, 24, 0))
    settings.append("training.sharding=full")
    shared = demo.plan(load_config("demo", settings), Hardware(8, 24, 0))
    count = whole.roles["generator"].parameters
    assert whole.other["DDP's gradient buckets"] == 2 * 4 * count
    for role in ("generator", "EMA", "fake score", "teacher"):
        assert whole.roles[role].weights == 4 * count
        assert shared.roles[role].weights == pytest.approx(4 * count / 8, rel=1e-5)
    assert shared.roles["generator"].optimizer == pytest.approx(8 * count / 8, rel=1e-5)
    assert "gathered weights and gradients" in shared.other
    assert shared.peak < whole.peak
    assert demo.plan(load_config("demo", settings), ONE_GPU).sharding == "none"


@pytest.mark.parametrize(
    ("settings", "gpus", "memory"),
    [([], 1, 0.12), ([], 4, 0.06), (["optimizer.kind=adam8bit"], 4, 0.06)],
)
def test_changes_that_are_named_make_it_fit(demo, settings, gpus, memory):
    config, hardware = load_config("demo", settings), Hardware(gpus, memory, 0)
    assert not demo.plan(config, hardware).fits
    changes = demo.changes_that_fit(config, hardware)
    assert changes
    for change in changes:
        plan = demo.plan(load_config("demo", [*settings, *change.settings]), hardware)
        assert plan.fits
        assert plan.peak == change.peak


def test_nothing_is_named_where_nothing_helps(demo):
    assert demo.changes_that_fit(load_config("demo"), Hardware(1, 0.01, 0)) == []


def test_adapters_are_not_named_where_a_whole_generator_is_the_start(demo):
    def adapters_named(*settings: str) -> bool:
        changes = demo.changes_that_fit(load_config("demo", list(settings)), Hardware(1, 0.08, 0))
        return any("adapter.rank=64" in change.settings for change in changes)

    assert adapters_named()
    assert not adapters_named("model.init_generator=generator.safetensors")


def test_text_encoders_stay_where_many_pairs_are_encoded_when_drawn(demo, tmp_path):
    def stay(pairs: Path | str, *settings: str) -> bool:
        config = load_config("demo", [f"data.pairs={pairs}", "gan.generator_weight=1", *settings])
        return "text encoders" in demo.plan(config, ONE_GPU).other

    def folder(count: int) -> Path:
        made = tmp_path / str(count)
        made.mkdir()
        for i in range(count):
            (made / f"{i}.png").touch()
            (made / f"{i}.txt").write_text("a lighthouse at dawn")
        return made

    many = folder(EAGER_LIMIT + 1)
    assert stay(many)
    assert not stay(many, "data.cache=cache")
    assert not stay(folder(2))
    assert not stay("demo")
    assert stay(tmp_path / "elsewhere.tar")


def test_pictures_are_made_for_the_clip_score_too(teacher):
    base = [f"model.teacher={teacher}", "model.resolution=64", "training.batch_size=1", "data.cache=cache"]
    base.append("training.snapshot_every=1")
    planner = make_planner(load_config(None, base))

    def plan(*settings: str) -> Plan:
        return planner.plan(load_config(None, [*base, *settings]), ONE_GPU)

    scored = plan("training.clip_model=clip")
    assert scored.phases.keys() >= PICTURES
    assert "VAE" in scored.other
    assert plan("training.grid_every=1") == scored
    assert "VAE" not in plan().other


def test_shapes_come_from_the_files_header(teacher):
    pipeline = small_pipeline()
    found = model_shapes(teacher, 0)
    assert count_parameters(found.denoiser) == count_parameters(pipeline.unet)
    assert count_parameters(found.vae) == count_parameters(pipeline.vae)
    text = count_parameters(pipeline.text_encoder) + count_parameters(pipeline.text_encoder_2)
    assert found.text_parameters == pytest.approx(text, rel=1e-3)
    assert found.latent_shape == (4, 128, 128)


def test_sdxl_where_the_file_is_not_here():
    found = model_shapes("owner/model", 0)
    assert count_parameters(found.denoiser) == 2_567_463_684
    assert found.conditioning == {"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)}
    assert "no owner/model here" in found.name


@pytest.mark.parametrize("name", configs.shipped())
def test_every_configuration_can_be_planned(name):
    config = load_config(name, ["model.teacher=demo", "training.batch_size=2", "training.accumulate=1"])
    plan = make_planner(config).plan(config, ONE_GPU)
    assert plan.fits
    assert plan.peak == max(plan.phases.values())
    parts = sum(m.weights + m.gradients + m.optimizer + m.activations for m in plan.roles.values())
    assert parts + sum(plan.other.values()) == pytest.approx(plan.peak, abs=1024)
    assert any(call.encoder_only for call in plan.calls) == config.gan.enabled
    assert plan.peak_phase in describe(plan, config, ONE_GPU, None)


# -- commands ------------------------------------------------------------------------------------------------------


def test_command(capsys):
    command = ["plan", "--config", "demo", "--gpus", "2", "--gpu-memory", "1", "--reserve", "0.5"]
    assert main([*command, "--tflops", "1"]) == 0
    text = capsys.readouterr().out
    assert "fits      yes" in text
    assert "240 iterations, at 1.0 TFLOPS a GPU" in text
    assert main([*command, "--json", "--seconds-per-forward", "0.001"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"]
    expected = facts["flops_per_iteration"] * 240 / 2 / facts["forward_flops"] * 0.001
    assert facts["seconds"] == pytest.approx(expected)


def test_command_says_what_does_not_fit(capsys):
    assert main(["plan", "--config", "demo", "--gpu-memory", "0.12", "--reserve", "0"]) == 0
    assert "fits      no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: expected a shipped configuration"),
        (["--config", "demo"], "--gpu-memory: expected the GiB"),
        (["--config", "demo", "--gpu-memory", "1"], "reserve < memory"),
        (["--config", "demo", "--gpu-memory", "24", "--gpus", "0"], "--gpus: expected 1 or more"),
        (["--config", "demo", "--gpu-memory", "24", "--gpus", "3"], "expected a multiple of 3 GPU(s)"),
        (["--config", "demo", "--gpu-memory", "24", "--tflops", "0"], "--tflops: expected more than 0"),
    ],
)
def test_mistakes(arguments, message, capsys):
    if torch.cuda.is_available() and "--gpu-memory" not in arguments:
        pytest.skip("there is a GPU here to ask")
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused():
    config = load_config("demo")
    refuse_what_cannot_fit(config, Hardware(1, 1, 0))
    with pytest.raises(ValueError, match=r"needs 0\.2 GiB on each GPU, which has 0\.1.*--force"):
        refuse_what_cannot_fit(config, Hardware(1, 0.1, 0))


def test_the_table_goes_between_its_markers(tmp_path):
    file = tmp_path / "table.md"
    file.write_text(f"before\n{TABLE_BEGIN}| old |\n{TABLE_END}after\n")
    write_table(file, "| new |\n")
    assert file.read_text() == f"before\n{TABLE_BEGIN}| new |\n{TABLE_END}after\n"
    file.write_text("no table")
    with pytest.raises(ValueError, match="expected the lines"):
        write_table(file, "")


def test_the_readme_has_the_table_of_this_version():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert [row[0] for row in rows] == table_configs()
    cells = {row[0]: dict(zip(TABLE_HARDWARE, row[1:], strict=True)) for row in rows}
    # One of them: all take minutes.
    recipe, (gpus, memory) = "sdxl-4step-zero-cfg", (8, 80)
    planner = make_planner(load_config(recipe))
    assert cells[recipe][gpus, memory] == fit_cell(planner, recipe, Hardware(gpus, memory, 2))
