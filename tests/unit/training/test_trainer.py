"""What the training loop changes of ultralytics' trainer, without Ray."""

from types import SimpleNamespace

import pytest
import torch
from ultralytics.engine import trainer as engine
from ultralytics.utils import checks, downloads

from softlabel.training.trainer import SoftLabelTrainer


def alone(device):
    """A trainer with nothing but a device."""
    trainer = object.__new__(SoftLabelTrainer)
    trainer.device = torch.device(device)
    return trainer


@pytest.mark.parametrize(
    ("device", "gpu", "mixed"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", True),
        ("cuda", "NVIDIA GeForce GTX 1660 Ti", False),
        ("cpu", "", False),
    ],
)
def test_mixed_precision_is_decided_without_a_download(device, gpu, mixed, monkeypatch):
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))
    decided, asked = [], []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(downloads, "attempt_download_asset", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(engine.BaseTrainer, "_setup_train", lambda self: decided.append(checks.check_amp(model)))
    alone(device)._setup_train()
    assert decided == [mixed] and not asked
