"""The training loop in this process, without Ray, with loader workers as on a GPU: they live, and nobody can tell."""

from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch
from conftest import tiny_recipe
from safetensors.numpy import load_file

from softlabel.imagery.scenes import TileReader
from softlabel.training import trainer as training
from softlabel.training.job import train_job
from softlabel.training.targets import WEIGHTS
from softlabel.training.trainer import SoftLabelTrainer

ARGS = {"epochs": 5, "imgsz": 64, "batch": 8, "nbs": 8, "close_mosaic": 2, "optimizer": "SGD", "multi_scale": 0.5}


@pytest.fixture
def train(tiles, tmp_path, monkeypatch):
    """Train a model of a name with a number of loader workers and a cache; its history, and the workers of each epoch.

    ``until`` epochs, and then ``train`` goes on.
    """
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    recipe = tiny_recipe()

    def run(name, workers, cache, until=5):
        model = recipe.train.student.model_copy(update={"args": {**ARGS, "cache": cache}})
        job = train_job(recipe, tmp_path / name, name, model, tiles=tiles, split="train_1", val_split="val_1")
        epochs = []

        class WithWorkers(SoftLabelTrainer):
            def __init__(self, *args):
                super().__init__(*args)
                self.args.workers = workers  # ultralytics has none on a CPU
                self.add_callback("on_train_epoch_end", lambda self: epochs.append(pids(self.train_loader)))

        monkeypatch.setattr(training, "SoftLabelTrainer", WithWorkers)
        monkeypatch.setattr(SoftLabelTrainer, "_say", lambda self, text: None)
        try:
            trainer = training.train_model(job, 1, lambda history, seconds: len(history) < until)
        except training.Stopped:
            return None, epochs
        losses = [row["losses"] for row in trainer.summary()["history"]]
        return (losses, load_file(job.folder / WEIGHTS)), epochs

    return run


def pids(loader):
    return [worker.pid for worker in getattr(loader.iterator, "_workers", [])]


def equal(one, other):
    return one[0] == other[0] and all((one[1][key] == other[1][key]).all() for key in one[1])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The order of a sum decides its last bits."""
    torch.set_num_threads(1)


def test_a_training_is_the_same_with_workers_without_them_and_resumed(train):
    alone, nobody = train("alone", 0, "ram")
    shared, workers = train("shared", 2, None)
    assert len(alone[0]) == 5 and nobody == [[]] * 5
    assert equal(alone, shared)
    first, later = workers[:3], workers[3:]
    assert first == [first[0]] * 3 and later == [later[0]] * 2 and all(workers)
    assert not set(first[0]) & set(later[0])  # only when mosaic was closed they were started anew
    for until in (2, 4):  # in the midst of mosaic, and after it
        assert train(f"resumed-{until}", 2, "disk", until)[0] is None
        resumed, more = train(f"resumed-{until}", 2, "disk")
        assert len(more) == 5 - until and equal(alone, resumed)


def test_validation_reads_no_scene_after_the_first_epoch(train, monkeypatch):
    reads, plainly = [], TileReader.read
    monkeypatch.setattr(TileReader, "read", lambda self, row: reads.append(row["tile_id"]) or plainly(self, row))
    train("kept", 0, "ram")
    assert reads and len(reads) == len(set(reads))
