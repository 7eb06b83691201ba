"""What files and folders say of a model's prediction type and schedule: it is followed, or refused by name."""

from __future__ import annotations

import pytest

from sid_train.models.stable_diffusion.statements import Stated, combine, of_scheduler, of_settings, of_tensors

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_max": None,
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_karras_sigmas": True,
}


def header(**metadata: str) -> Stated:
    return combine(of_settings(metadata, "its header", "x.safetensors"), "x.safetensors")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, Stated(None, None)),
        ({"modelspec.predict_key": "v"}, Stated("v_prediction", None)),
        ({"modelspec.predict_key": "epsilon"}, Stated("epsilon", None)),
        ({"modelspec.prediction_type": "v-prediction"}, Stated("v_prediction", None)),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, Stated("v_prediction", True)),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}, Stated("epsilon", None)),
        ({"prediction_type": "V_PRED"}, Stated("v_prediction", None)),
        ({"sid.prediction_type": "v_prediction", "sid.zero_terminal_snr": "false"}, Stated("v_prediction", False)),
        ({"modelspec.predict_key": "unknown", "ss_v_parameterization": "auto", "ztsnr": "n/a"}, Stated(None, None)),
        ({"prediction": "a cat that predicts", "flow": "a workflow", "use_flow_sigmas": "x"}, Stated(None, None)),
        ({"modelspec.prediction": "v"}, Stated("v_prediction", None)),
        ({"modelspec.title": "v_prediction", "modelspec.prediction_type": ""}, Stated(None, None)),
    ],
)
def test_headers_are_followed(metadata, expected):
    assert header(**metadata) == expected


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.prediction_type": "flow"}, r"flow-matching model \(modelspec.prediction_type in its header"),
        ({"modelspec.predict_key": "EDM"}, "is an EDM model"),
        ({"prediction_type": "sample"}, "predicts the picture itself"),
        ({"ss_flow_matching": "True"}, "flow-matching"),
        ({"modelspec.flow": "true"}, "flow-matching"),
        ({"modelspec.predict_key": "magic"}, "expected epsilon or v, got magic: model.prediction_type"),
        ({"ss_v_parameterization": "maybe"}, "ss_v_parameterization in its header: expected true or false"),
        ({"modelspec.predict_key": "v", "ss_v_parameterization": "False"}, "contradicts itself: .* says v_prediction"),
        ({"ztsnr": "true", "ss_zero_terminal_snr": "False"}, "contradicts itself: by ztsnr"),
    ],
)
def test_headers_that_are_refused(metadata, message):
    with pytest.raises(ValueError, match=rf"x.safetensors: .*{message}"):
        header(**metadata)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_marker_tensors(prefix):
    told = of_tensors(["conv_in.weight", f"{prefix}v_pred", f"{prefix}ztsnr"], "x")
    assert combine(told, "x") == Stated("v_prediction", True)
    for name, known in (("edm_vpred.sigma_max", "CosXL"), ("edm_mean", "Playground 2.5")):
        with pytest.raises(ValueError, match=f"EDM model .*{known}"):
            of_tensors([f"{prefix}{name}"], "x")


def test_the_configuration_decides_what_files_leave_open_and_contradicts_nothing():
    v = of_tensors(["v_pred"], "x")
    v_head = of_settings({"ss_v_parameterization": "True"}, "its header", "x")
    eps = of_settings({"modelspec.predict_key": "epsilon"}, "its header", "x")
    assert combine([], "x", "v_prediction", "the configuration") == Stated(None, None)
    with pytest.raises(ValueError, match=r"its tensor v_pred says so.*the configuration says epsilon"):
        combine(v, "x", "epsilon", "the configuration")
    with pytest.raises(
        ValueError,
        match=r"ss_v_parameterization in its header says v_prediction, but modelspec.predict_key in its header",
    ):
        combine(v_head + eps, "x")
    for asked in ("v_prediction", "epsilon"):
        assert combine(v_head + eps, "x", asked, "the configuration").prediction_type == asked
    strange = of_settings({"modelspec.predict_key": "magic"}, "its header", "x")
    assert combine(strange, "x", "v_prediction", "the configuration") == Stated(None, None)


def test_a_tensor_is_right_whatever_the_header_says():
    """As tools leave it that merge models, or fill in epsilon."""
    told = of_settings({"modelspec.predict_key": "epsilon", "ss_zero_terminal_snr": "False"}, "its header", "x")
    told += of_tensors(["v_pred", "ztsnr"], "x")
    for asked in ("", "auto", "v_prediction"):
        assert combine(told, "x", asked) == Stated("v_prediction", True)
    with pytest.raises(
        ValueError, match=r"x: it is a v_prediction model \(its tensor v_pred says so\), but LORA says ep"
    ):
        combine(told, "x", "epsilon", "LORA")


def scheduler(**changes: object) -> Stated:
    """Of SDXL's own configuration with ``changes``; ``...`` is an entry that is not there."""
    config = {key: value for key, value in (SDXL | changes).items() if value is not ...}
    return combine(of_scheduler(config, "scheduler_config.json", "folder"), "folder")


def test_schedulers_that_are_followed():
    assert scheduler() == Stated("epsilon", None)
    assert scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True) == Stated("v_prediction", True)
    assert scheduler(_class_name="DPMSolverMultistepScheduler", use_flow_sigmas=False) == Stated("epsilon", None)
    assert scheduler(_class_name="HeunDiscreteScheduler", beta_start=..., beta_end=...) == Stated("epsilon", None)
    bare = dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"), ...)
    assert scheduler(_class_name="LCMScheduler", **bare) == Stated("epsilon", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler: it is a flow-matching"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "it is an EDM model"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "names ScoreSdeVeScheduler"),
        ({"_class_name": ["x"]}, "names"),
        ({"beta_schedule": "linear"}, "beta_schedule: expected scaled_linear, as all have, got linear"),
        ({"beta_start": 0.0001}, "beta_start: expected 0.00085"),
        ({"beta_end": "0.012"}, "beta_end: expected 0.012"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": ...}, "beta_schedule: expected scaled_linear, as all have, got nothing"),
        ({"beta_end": ...}, "beta_end: expected 0.012, as all have, got nothing"),
        ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": ...}, "beta_schedule"),
        ({"prediction_type": "sample"}, "predicts the picture itself"),
        ({"prediction_type": "flow_prediction"}, "flow-matching"),
        ({"use_flow_sigmas": True}, "flow-matching"),
        ({"sigma_max": 120.0}, "sigma_max is set, as for an EDM model"),
        ({"timestep_type": "continuous"}, "timestep_type: expected discrete"),
        ({"rescale_betas_zero_snr": "often"}, "expected true or false"),
    ],
)
def test_schedulers_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"folder: .*{message}"):
        scheduler(**changes)
