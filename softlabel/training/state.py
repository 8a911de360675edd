"""What of a training run is on disk after every epoch: enough to go on as if nothing had happened."""

from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import unwrap_model

from softlabel.store import commit
from softlabel.training.targets import STATE, WEIGHTS, TrainJob


def read_state(job: TrainJob, scratch: Path) -> dict | None:
    """The state after the last epoch, with the best weights so far laid where the trainer will look for them."""
    path = job.folder / STATE
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    (scratch / WEIGHTS).write_bytes(state.pop("best_weights").numpy().tobytes())
    return state


def write_state(job: TrainJob, trainer: Any, **more: Any) -> None:
    """Commit what a trainer consists of after an epoch: tensors and plain values only, in full precision."""
    state = {
        "epoch": trainer.epoch,
        "model": unwrap_model(trainer.model).state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "smoothing": None if trainer.smoothing is None else trainer.smoothing.table.cpu(),
        "best_fitness": float(trainer.best_fitness or 0),
        "stopper": (float(trainer.stopper.best_fitness), int(trainer.stopper.best_epoch)),
        "best_weights": torch.frombuffer(bytearray((trainer.save_dir / WEIGHTS).read_bytes()), dtype=torch.uint8),
        **more,
    }
    commit(job.folder / STATE, lambda path: torch.save(state, path))


def restore(trainer: Any, state: dict) -> None:
    """Put a trainer that was set up into a state."""
    unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["updates"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # nothing where the epochs before were trained without one, on a CPU
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.smoothing is not None:
        trainer.smoothing.table = state["smoothing"].to(trainer.device)
    trainer.best_fitness = state["best_fitness"]
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = state["stopper"]
