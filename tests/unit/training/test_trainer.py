"""What the training loop changes of ultralytics' trainer, without Ray."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.data import build
from ultralytics.engine import trainer as engine
from ultralytics.utils import checks, downloads

from softlabel.training.epochs import EpochBatches, Mixture
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


def test_tiles_come_by_epoch_in_pinned_memory_where_there_is_a_gpu(monkeypatch):
    trainer, made = alone("cuda"), []
    trainer.args = SimpleNamespace(workers=2, seed=3, compile=False)
    trainer._mixture = Mixture(9)
    trainer._rank, trainer.world_size, trainer.epoch = 0, 1, 2
    monkeypatch.setattr(build, "get_torch_device_backend", lambda device: SimpleNamespace(device_count=lambda: 1))
    monkeypatch.setattr(SoftLabelTrainer, "build_dataset", lambda self, *args: made.append(args) or list(range(9)))
    loader = trainer.get_dataloader("train_1", 4, rank=-1)
    trainer._begin_epoch()
    assert loader.pin_memory and loader.num_workers and len(loader) == 3
    expected = EpochBatches(Mixture(9), 4, 3, 0, 1)
    expected.epoch = 2
    assert next(iter(loader.batch_sampler)) == next(iter(expected))
    assert isinstance(next(iter(trainer.get_dataloader("val_1", 4, rank=-1, mode="val").batch_sampler))[0], int)
    assert [mode for _, mode, _ in made] == ["train", "val"]


def test_what_the_training_itself_draws_follows_from_the_epoch():
    trainer, drawn = alone("cpu"), []
    trainer.args, trainer._rank, trainer._batches = SimpleNamespace(seed=3), 0, SimpleNamespace()
    for trainer.epoch in (1, 2, 1):
        trainer._begin_epoch()
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[2] != drawn[1]
