"""The training loop in the test's own process, without Ray, with as many loader workers as a test wants."""

from types import SimpleNamespace

import ray.train
import ray.train.torch
from conftest import tiny_recipe
from safetensors.numpy import load_file

from softlabel.training import trainer as training
from softlabel.training.job import train_job
from softlabel.training.targets import WEIGHTS
from softlabel.training.trainer import SoftLabelTrainer

EPOCHS = 5
ARGS = {"epochs": EPOCHS, "imgsz": 64, "batch": 8, "nbs": 8, "close_mosaic": 2, "optimizer": "SGD", "multi_scale": 0.5}


class LoneTraining:
    """Trains models on a device, each by a name; one that was left after some epochs goes on under its name."""

    def __init__(self, tiles, folder, device, monkeypatch):
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train.torch, "get_device", lambda: device)
        monkeypatch.setattr(SoftLabelTrainer, "_say", lambda self, text: None)
        self._tiles, self._folder, self._monkeypatch = tiles, folder, monkeypatch

    def train(self, name, workers, cache, until=EPOCHS, **of_job):
        """Losses by epoch and weights, None if it was left ``until`` then; and what was seen at the end of epochs.

        ``of_job`` is what else its job has, as soft labels.
        """
        model = tiny_recipe().train.student.model_copy(update={"args": {**ARGS, "cache": cache}})
        folder, tiles = self._folder / name, self._tiles
        job = train_job(tiny_recipe(), folder, name, model, tiles=tiles, split="train_1", val_split="val_1", **of_job)
        seen = []

        class WithWorkers(SoftLabelTrainer):
            def __init__(self, *args):
                super().__init__(*args)
                self.args.workers = workers  # ultralytics has none on a CPU
                self.add_callback("on_train_epoch_end", lambda trainer: seen.append(_seen(trainer)))

        self._monkeypatch.setattr(training, "SoftLabelTrainer", WithWorkers)
        try:
            trainer = training.train_model(job, 1, lambda history, seconds: len(history) < until)
        except training.Stopped:
            return None, seen
        losses = [row["losses"] for row in trainer.summary()["history"]]
        return (losses, load_file(job.folder / WEIGHTS)), seen


def _seen(trainer):
    loader = trainer.train_loader
    return SimpleNamespace(
        workers=[worker.pid for worker in getattr(loader.iterator, "_workers", [])],
        pinned=loader.pin_memory,
        scale=trainer.scaler.get_scale() if trainer.scaler.is_enabled() else None,
    )
