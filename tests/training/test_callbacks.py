"""What a run tells to the trackers themselves."""

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sid_train.files.images import to_pil
from sid_train.training.callbacks import log_image


def log(tracker: str, folder, image: torch.Tensor) -> None:
    accelerator = Accelerator(log_with=tracker, project_dir=str(folder))
    accelerator.init_trackers("run")
    log_image(accelerator, "samples", image, 7)
    accelerator.end_training()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_gets_the_picture(tracker, tmp_path, monkeypatch):
    image = torch.linspace(-1.2, 1.2, 3 * 4 * 8).view(3, 4, 8)  # like a network's, not within [-1, 1] everywhere
    if tracker == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_SILENT", "true")
        log(tracker, tmp_path, image)
        (file,) = tmp_path.rglob("samples_*.png")
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log(tracker, tmp_path, image)
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        (tag,) = events.Tags()["images"]
        (event,) = events.Images(tag)
        assert event.step == 7
        file = tmp_path / "image.png"
        file.write_bytes(event.encoded_image_string)
    assert Image.open(file).convert("RGB").tobytes() == to_pil(image).tobytes()
