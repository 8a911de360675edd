"""What is on disk between two epochs is all that the next one needs."""

import threading
from types import SimpleNamespace

import pytest
import torch

from softlabel.training.state import StateWriter, read_state, restore
from softlabel.training.targets import WEIGHTS


def trainer_in(folder, *, mixed):
    """What StateWriter and restore know of a trainer, in mixed precision or not."""
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"best")
    model = torch.nn.Linear(2, 2)
    return SimpleNamespace(
        epoch=3,
        epochs=4,
        model=model,
        ema=SimpleNamespace(ema=torch.nn.Linear(2, 2), updates=7),
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        scaler=torch.amp.GradScaler("cpu", enabled=mixed),
        smoothing=None,
        best_fitness=0.5,
        stopper=SimpleNamespace(best_fitness=0.5, best_epoch=2),
        save_dir=folder,
    )


def step(trainer):
    trainer.optimizer.zero_grad()
    trainer.scaler.scale(trainer.model(torch.ones(1, 2)).sum()).backward()
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()


def written(folder, trainer, meanwhile=lambda: None, **more):
    """The state of a trainer after an epoch, and what it does before the disk has it."""
    writer, done = StateWriter(SimpleNamespace(folder=folder)), threading.Event()
    writer._thread.submit(done.wait)
    try:
        writer.write(trainer, **more)
        meanwhile()
    finally:
        done.set()  # whatever failed: a thread that waits for ever keeps pytest from ending
    writer.wait()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_trainer_goes_on_as_if_nothing_had_happened(tmp_path, mixed):
    one, other = (trainer_in(tmp_path / name, mixed=mixed) for name in ("one", "other"))
    step(one)
    if mixed:
        one.scaler.update(new_scale=1024.0)  # as after gradients that were too large
    scaler = one.scaler.state_dict()
    written(tmp_path, one, lambda: step(one), ended=False)
    state = read_state(SimpleNamespace(folder=tmp_path), other.save_dir)
    assert state["ended"] is False
    restore(other, state)
    assert other.scaler.state_dict() == scaler and bool(scaler) == mixed
    assert not torch.equal(one.model.weight, other.model.weight)
    step(other)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_state_that_cannot_be_written_is_no_secret(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        written(tmp_path / "file", trainer_in(tmp_path / "one", mixed=False))


def test_a_training_that_began_without_mixed_precision_goes_on_with_it(tmp_path):
    one, other = trainer_in(tmp_path / "cpu", mixed=False), trainer_in(tmp_path / "gpu", mixed=True)
    written(tmp_path, one)
    before = other.scaler.state_dict()
    restore(other, read_state(SimpleNamespace(folder=tmp_path), other.save_dir))
    assert other.scaler.state_dict() == before
    assert torch.equal(other.model.weight, one.model.weight)
