"""What is on disk between two epochs is all that the next one needs."""

from types import SimpleNamespace

import pytest
import torch

from softlabel.training.state import read_state, restore, write_state
from softlabel.training.targets import WEIGHTS


def trainer_in(folder, *, mixed):
    """What write_state and restore know of a trainer, in mixed precision or not."""
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"best")
    model = torch.nn.Linear(2, 2)
    return SimpleNamespace(
        epoch=3,
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


@pytest.mark.parametrize("mixed", [False, True])
def test_a_trainer_goes_on_as_if_nothing_had_happened(tmp_path, mixed):
    one, other = (trainer_in(tmp_path / name, mixed=mixed) for name in ("one", "other"))
    job = SimpleNamespace(folder=tmp_path)
    step(one)
    if mixed:
        one.scaler.update(new_scale=1024.0)  # as after gradients that were too large
    write_state(job, one, ended=False)
    restore(other, read_state(job, other.save_dir))
    assert other.scaler.state_dict() == one.scaler.state_dict() and bool(other.scaler.state_dict()) == mixed
    for trainer in (one, other):
        step(trainer)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_training_that_began_without_mixed_precision_goes_on_with_it(tmp_path):
    one, other = trainer_in(tmp_path / "cpu", mixed=False), trainer_in(tmp_path / "gpu", mixed=True)
    job = SimpleNamespace(folder=tmp_path)
    write_state(job, one)
    before = other.scaler.state_dict()
    restore(other, read_state(job, other.save_dir))
    assert other.scaler.state_dict() == before
    assert torch.equal(other.model.weight, one.model.weight)
