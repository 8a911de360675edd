"""What a training run keeps on disk after every epoch: enough to go on as if nothing had happened."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import unwrap_model

from softlabel.storage import is_remote
from softlabel.store import commit
from softlabel.training.targets import STATE, WEIGHTS, TrainJob


def read_state(job: TrainJob, scratch: Path) -> dict | None:
    """The state after the last epoch, if any; the best weights so far are put where the trainer will look for them."""
    path = job.folder / STATE
    if not path.is_file():
        return None
    source = io.BytesIO(path.read_bytes()) if is_remote(path) else path
    state = torch.load(source, map_location="cpu", weights_only=True)
    (scratch / WEIGHTS).write_bytes(state.pop("best_weights").numpy().tobytes())
    return state


class StateWriter:
    """Writes the state of a trainer after an epoch, while the next one runs.

    Tensors and plain values only, in full precision. What is on disk is at most one epoch behind.
    """

    def __init__(self, job: TrainJob) -> None:
        self._path = job.folder / STATE
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def write(self, trainer: Any, **more: Any) -> None:
        """Begin to commit the trainer as it is now, once the previous state is committed."""
        self.wait()
        state = {
            "epoch": trainer.epoch,
            "epochs": trainer.epochs,
            "model": unwrap_model(trainer.model).state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "smoothing": None if trainer.smoothing is None else trainer.smoothing.table,
            "best_fitness": float(trainer.best_fitness or 0),
            "stopper": (float(trainer.stopper.best_fitness), int(trainer.stopper.best_epoch)),
            "best_weights": torch.frombuffer(bytearray((trainer.save_dir / WEIGHTS).read_bytes()), dtype=torch.uint8),
            **more,
        }
        self._writing = self._thread.submit(commit, self._path, partial(torch.save, _copied(state)))

    def wait(self) -> None:
        """Wait until the state that was written last is committed.

        Raises:
            OSError: It cannot be committed.
        """
        if self._writing is not None:
            self._writing.result()


def _copied(value: Any) -> Any:
    """A copy with every tensor in CPU memory of its own, which training does not go on changing."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def restore(trainer: Any, state: dict) -> None:
    """Put a trainer that has been set up into a saved state."""
    unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["updates"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the epochs before were trained without one, on a CPU
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.smoothing is not None:
        trainer.smoothing.table = state["smoothing"].to(trainer.device)
    trainer.best_fitness = state["best_fitness"]
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = state["stopper"]
