"""The Ray Train loop: ultralytics' own trainer, one DDP rank per Ray worker, model after model.

Import this module only inside a Ray Train worker: ultralytics reads RANK and WORLD_SIZE once, when it is imported,
and Ray sets them before it calls the training function.
"""

import copy
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from ultralytics import utils as ultralytics_utils
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import callbacks
from ultralytics.utils.torch_utils import unwrap_model

from softlabel.config import HARD
from softlabel.detectors.header import Header
from softlabel.detectors.smoothing import OnlineSmoothing
from softlabel.detectors.soft_loss import soften
from softlabel.detectors.weights import build_model, default_train_args, finds_rotated, load_matching, save_weights
from softlabel.detectors.yolo import YoloDetector
from softlabel.detectors.yolov5 import YoloV5
from softlabel.errors import TrainingError
from softlabel.evaluation.metrics import evaluate
from softlabel.imagery.scenes import read_tile
from softlabel.store import commit, finish, is_done
from softlabel.terminal import MARK
from softlabel.training.anchors import fit_anchors
from softlabel.training.dataset import TileDataset, looked_up, soft_rows
from softlabel.training.epochs import Mixture, draw_by_epoch
from softlabel.training.ranks import gather, is_first
from softlabel.training.soft_teacher import Relabeller
from softlabel.training.state import StateWriter, read_state, restore
from softlabel.training.targets import STATE, WEIGHTS, Target, TrainJob, num_empty, truth_targets
from softlabel.training.validation import KeptTiles, empty_tiles, training_losses, validate, without_empty

_KEPT_BYTES = 1 << 30
"""What each rank keeps of validation tiles in memory, unless ``cache: ram`` asks for all of them."""

GoesOn = Callable[[list[dict], float], bool]
"""Given a row per epoch so far and the seconds they took, whether to train another."""


class Stopped(Exception):
    """A student was told to stop between two epochs; its state is in its folder, and it can go on from there."""


def train_models(jobs: list[TrainJob], cpu_threads: int) -> None:
    """The training function of a Ray Train worker: train the jobs that are not done, one after the other.

    ``cpu_threads`` is how many threads torch may use on a CPU.

    After a failure Ray calls this again, and the model in flight goes on from its last epoch.
    """
    set_up()
    for job in jobs:
        if not is_done(job.folder):
            trainer = train_model(job, cpu_threads)
            losses = training_losses(job, trainer.targets)
            finish_model(job, {**trainer.summary(), "losses": losses})


def set_up() -> None:
    """What every training function does first.

    Raises:
        TrainingError: ultralytics was imported too early.
    """
    context = ray.train.get_context()
    # To ultralytics a process on its own is rank -1: no distributed sampler, no broadcasts.
    expected = context.get_world_rank() if context.get_world_size() > 1 else -1
    if expected != ultralytics_utils.RANK:
        raise TrainingError("ultralytics was imported before Ray set RANK: import softlabel.training.trainer later")


def train_model(job: TrainJob, cpu_threads: int, goes_on: GoesOn | None = None) -> "SoftLabelTrainer":
    """Train one model, from the state in its folder if there is one, and leave its best weights there.

    After every epoch the first rank alone commits its state to that folder, while the next epoch runs; if there is a
    ``goes_on``, it first waits for the commit, then asks. ``finish_model`` marks the model as done.

    Raises:
        Stopped: ``goes_on`` said no.
        TrainingError: There is nothing to train on, or the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as scratch:
        state = read_state(job, Path(scratch))
        trainer = SoftLabelTrainer(job, Path(scratch), state, goes_on)
        # Ray gives a worker of two CPUs OMP_NUM_THREADS=1, and building an ultralytics trainer sets as many threads as
        # the machine has CPUs, less one, whatever share of them this worker has.
        torch.set_num_threads(cpu_threads)
        if state is None or not state["ended"]:
            trainer.train()
            trainer.state_writer.wait()
            if not trainer.is_complete():
                raise Stopped
        if is_first():  # only the first rank has them in its scratch folder
            commit(job.folder / WEIGHTS, lambda path: shutil.copyfile(Path(scratch) / WEIGHTS, path))
        gather(None)  # wait for it
    return trainer


def finish_model(job: TrainJob, summary: dict) -> None:
    """Mark a trained model as done."""
    if is_first():
        finish(job.folder, summary)
        (job.folder / STATE).unlink(missing_ok=True)


class SoftLabelTrainer(DetectionTrainer):
    """ultralytics' DetectionTrainer as one rank of a Ray Train worker group.

    Its augmentation, EMA, warm-up, schedule and optimizer are untouched. Ours are: where the pixels and boxes come
    from, the process group (Ray's), the validation (the project's own metric, on the validation split's truth) and
    the checkpoint (tensors and plain values only, in full precision, one file in the model's folder).
    """

    stop: bool  # ultralytics' own: the current epoch is the last
    best_fitness: float | None

    def __init__(
        self,
        job: TrainJob,
        scratch: Path,
        state: dict | None,
        goes_on: GoesOn | None,
    ) -> None:
        context = ray.train.get_context()
        self._job, self._state, self._goes_on = job, state, goes_on
        self.state_writer = StateWriter(job)
        self._ended = bool(state and state["ended"])
        self._started, self._seconds_before = time.monotonic(), state["seconds"] if state else 0.0
        self._val = without_empty(truth_targets(job.tiles, job.val_split), job.tiles, job.val_split)
        self.targets, self._mixture = _targets(job)
        self._history: list[dict] = list(state["history"]) if state else []
        self.smoothing = OnlineSmoothing(job.soft.smoothing, len(job.classes)) if job.soft.smoothing else None
        self._rows = soft_rows(self.targets) if job.soft != HARD else None
        self._relabeller = _relabeller(job)
        device = ray.train.torch.get_device()
        overrides = {
            **default_train_args(job.model),
            **job.args,
            "model": job.model,
            "task": "obb" if finds_rotated(job.model) else "detect",
            "device": "cpu" if device.type == "cpu" else str(device.index),
            "save_dir": str(scratch),
            "seed": job.seed,
            "plots": False,
            "pretrained": False,
        }
        no_integrations = mock.patch.object(callbacks, "add_integration_callbacks", lambda trainer: None)
        with no_integrations:  # they report to other services, and unasked to Ray Tune
            super().__init__(overrides=overrides)
        self._val_tiles = KeptTiles(math.inf if _in_memory(self.args.cache) else _KEPT_BYTES)
        self.device, self.ddp = device, False
        self._rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.add_callback("on_train_start", SoftLabelTrainer._make_criterion)
        self.add_callback("on_train_epoch_start", SoftLabelTrainer._begin_epoch)
        self.add_callback("on_train_epoch_end", SoftLabelTrainer._end_smoothing)
        self.add_callback("on_fit_epoch_end", SoftLabelTrainer._report)

    def get_dataset(self) -> dict:
        """What ultralytics reads from a data.yaml; the tiles themselves come from the job."""
        names = dict(enumerate(self._job.classes))
        return {"train": self._job.split, "val": self._job.val_split, "names": names, "nc": len(names), "channels": 3}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> TileDataset:
        """The training set, or the validation set (whose loader only ultralytics' bookkeeping looks at)."""
        return TileDataset(
            self.targets if mode == "train" else self._val,
            read_tile,
            self._mixture if mode == "train" else None,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            task=self.args.task,
            cache=(self.args.cache or None) if mode == "train" else None,
            stride=self.stride,
            data=self.data,
        )

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """ultralytics' loader, whose workers live through all epochs; for training it draws reproducibly, by epoch."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if mode == "train":
            self._batches = draw_by_epoch(loader, self._mixture, self.args.seed, self._rank, self.world_size)
        return loader

    def get_model(self, cfg: str | None = None, weights: object = None, verbose: bool = False) -> DetectionModel:
        """The job's model, starting from the job's weights where they match it, with anchors that fit the boxes."""
        model = build_model(self._job.model, len(self._job.classes))
        if self._job.weights is not None:
            fitting, total = load_matching(model, self._job.weights)
            self._say(f"{fitting} of {total} tensors from {self._job.weights.name}")
        if isinstance(model, YoloV5):
            self._fit_anchors(model)
        return model

    def _fit_anchors(self, model: YoloV5) -> None:
        sizes = np.concatenate([_sizes_px(target, self.args.imgsz) for target in self.targets])
        anchors, recall, before = fit_anchors(sizes, model.anchors_px(), self._job.seed)
        model.set_anchors(anchors)
        fitted = "" if recall == before else f", which the anchors it came with had at {before:.3f}: fitted by k-means"
        self._say(f"anchors: best possible recall {recall:.3f}{fitted}")

    def resume_training(self, ckpt: dict | None) -> None:
        """Go on from the state that was committed last."""
        state = self._state
        if state is None:
            return
        restore(self, state)
        self.start_epoch = state["epoch"] + 1
        self._say(f"resumed after epoch {self.start_epoch}/{self.epochs}")

    def _begin_epoch(self) -> None:
        """Seed by epoch, so that a resumed run draws what the undisturbed one would have drawn."""
        self._batches.epoch = self.epoch  # for loader workers that start now: on resuming, and when mosaic is closed
        seed = self.args.seed + self._rank + 1000 * (self.epoch + 1)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _make_criterion(self) -> None:
        """Make the loss, softened if the job says so, and bring it up to date with the epochs that are done.

        (For an end-to-end model it weights the two heads' losses, and these weights change from epoch to epoch.)
        """
        model = unwrap_model(self.model)
        model.criterion = criterion = model.init_criterion()
        if self.start_epoch and hasattr(criterion, "update"):
            criterion.updates = self.start_epoch - 1
            criterion.update()
        if self._rows is not None:
            soften(criterion, self._job.soft, self.smoothing)

    def preprocess_batch(self, batch: dict) -> dict:
        """ultralytics' batch, with what the labels are worth."""
        if self._rows is None:
            return super().preprocess_batch(batch)
        batch = super().preprocess_batch(looked_up(batch, self._rows))
        if self._relabeller is None or self.epoch < self._relabeller.begins(self.epochs):
            return batch
        return self._relabeller(self.ema.ema, batch)

    def get_class_counts(self) -> np.ndarray:
        """Boxes per class, for ``cls_pw``; a dataset's label may be the row of a table instead."""
        counted = np.concatenate([target.class_ids for target in self.targets])
        return np.bincount(counted, minlength=len(self._job.classes)).astype(np.float32)

    def _end_smoothing(self) -> None:
        if self.smoothing is not None:
            sums = [part.to(self.device) for part in gather(self.smoothing.sums.cpu())]
            self.smoothing.end_epoch(torch.stack(sums).sum(0))

    def validate(self) -> tuple[dict | None, float | None]:
        """mAP of the EMA model on the validation split's truth, by the metric that all tables show.

        Where the student's classes are finer than the truth's, a class has the best score of its finer ones.
        """
        for buffer in self.ema.ema.buffers() if self.world_size > 1 else ():
            dist.broadcast(buffer, src=0)
        detector = YoloDetector(copy.deepcopy(self.ema.ema), self.args.imgsz, self._job.nms, self.device)
        classes = self._job.classes
        if self._job.class_map is not None:
            classes = self._job.class_map.classes
            detector.map_classes(self._job.class_map.columns)
        metrics = evaluate(validate(detector, self._val, self._val_tiles), classes)
        if self.best_fitness is None or self.best_fitness < metrics.map50:
            self.best_fitness = metrics.map50
        return {"map50": metrics.map50, "map50_95": metrics.map50_95}, metrics.map50

    def save_model(self) -> bool:
        """Write the EMA weights if they beat all epochs before (of equal ones the first counts, as in the summary)."""
        if all(self.fitness > row["map50"] for row in self._history):
            save_weights(self.save_dir / WEIGHTS, self.ema.ema, self._header())
        return True

    def final_eval(self) -> None:
        """Nothing: the evaluation step does this on the test split, which a trainer never sees."""

    def is_complete(self) -> bool:
        """Whether all epochs are done or patience has run out; not if it was told to stop."""
        return self._ended

    def summary(self) -> dict:
        """What happened, for the results table."""
        args, epochs = self.args, len(self._history)
        with_mosaic = epochs if not args.close_mosaic else min(epochs, max(self.epochs - args.close_mosaic, 0))
        best = max(self._history, key=lambda row: row["map50"])
        last = self._history[-1]
        return {
            "name": self._job.name,
            "optimizer": last["optimizer"],
            "lr0": last["lr0"],
            "epochs": epochs,
            "epochs_with_mosaic": with_mosaic if args.mosaic else 0,
            "best_epoch": best["epoch"],
            "val_map50": best["map50"],
            "soft": self._job.soft.model_dump(mode="json", exclude_defaults=True),
            "seed": self._job.seed,
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "train_tiles": len(self.targets),
            "supplement_tiles": self._mixture.truth,
            "empty_tiles": self._num_empty(),
            "train_boxes": sum(len(target.boxes) for target in self.targets),
            "rank_digests": last["rank_digests"],
            "history": self._history,
            "seconds": self._seconds(),
        }

    def _num_empty(self) -> dict[str, int]:
        """Tiles of each split that were left out because they have no valid pixel."""
        job = self._job
        val = len(empty_tiles(job.tiles, job.val_split))
        if job.soft_labels:
            return {job.split: num_empty(job.soft_labels, job.tiles, job.split), job.val_split: val}
        return {job.split: len(empty_tiles(job.tiles, job.split)), job.val_split: val}

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _setup_ddp(self) -> None:
        """Ray Train has set up the process group already."""

    def _setup_train(self) -> None:
        with _amp_without_a_trial(), _ddp_without_device_ids() if self.device.type == "cpu" else nullcontext():
            super()._setup_train()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if not bool(torch.isfinite(self.loss)):
            raise TrainingError(f"{self._job.name}: the loss is {float(self.loss)} in epoch {epoch + 1}: lower lr0")
        return False

    def _header(self) -> Header:
        args = {**default_train_args(self._job.model), **self._job.args}
        args |= {"optimizer": self.args.optimizer, "lr0": self.args.lr0}
        return Header(unwrap_model(self.model).yaml, self._job.classes, self.args.imgsz, args)

    def _report(self) -> None:
        """Record the epoch, and let the first rank write and print it.

        Nothing is reported to Ray Train: its queue takes one report and is emptied every two seconds, so no epoch could
        be shorter than that. What Ray Train would do with a checkpoint, softlabel.training.state does.
        """
        losses = {key.removesuffix("_loss"): float(value) for key, value in self.tloss.items()}
        epoch = {
            "epoch": self.epoch + 1,
            "optimizer": self.args.optimizer,
            "lr0": self.args.lr0,
            "losses": losses,
            "seconds": self.epoch_time,
            "rank_digests": self._rank_digests(),
        }
        self._ended = bool(self.stop)
        if not is_first():
            self._history.append({**epoch, "map50": 0.0})
            self._share_end()
            return
        metrics = {"map50": float(self.fitness), "map50_95": float(self.metrics["map50_95"])}
        self._history.append({**epoch, **metrics})
        self._say(
            f"epoch {self.epoch + 1}/{self.epochs}, "
            + ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            + f", validation mAP50 {self.fitness:.3f} (best {self.best_fitness:.3f}), {self.epoch_time:.0f} s"
        )
        self.state_writer.write(self, ended=self._ended, history=list(self._history), seconds=self._seconds())
        if self._goes_on and not self.stop and self.epoch + 1 < self.epochs:  # a model that is done need not ask
            self.state_writer.wait()
            self.stop = not self._goes_on(self._history, self._seconds())
        self._share_end()

    def _share_end(self) -> None:
        """Tell all ranks whether training is complete: only the first knows whether patience has run out."""
        self._ended = gather(self._ended)[0]

    def _rank_digests(self) -> list[float]:
        """A number per rank, which differs where the ranks' parameters differ; DDP must not let that happen."""
        parameters = unwrap_model(self.model).parameters()
        digests = gather(float(sum(p.detach().double().abs().sum() for p in parameters)))
        if len(set(digests)) > 1:
            raise TrainingError(f"{self._job.name}: the ranks differ after epoch {self.epoch + 1}: {digests}")
        return digests

    def _say(self, text: str) -> None:
        if is_first():
            print(f"{MARK}{self._job.name}: {text}", flush=True)


def _targets(job: TrainJob) -> tuple[list[Target], Mixture]:
    """The training set, without empty tiles, and how it is mixed."""
    targets = job.targets()
    if job.soft_labels is None:
        targets = without_empty(targets, job.tiles, job.split)
        return targets, Mixture(len(targets))
    # Labelling has already looked at the pixels of tiles with soft labels.
    soft, truth = ([one for one in targets if one.supplements is which] for which in (False, True))
    if job.soft.supplement is None:
        return soft, Mixture(len(soft))
    truth = without_empty(truth, job.tiles, job.soft.supplement.of(job.split))
    return [*soft, *truth], Mixture(len(soft), len(truth), job.soft.supplement.share)


def _relabeller(job: TrainJob) -> Relabeller | None:
    if job.soft.soft_teacher is None:
        return None
    is_rotated = finds_rotated(job.model)
    return Relabeller(job.soft.soft_teacher, job.soft, len(job.classes), job.nms, is_rotated=is_rotated)


def _in_memory(cache: bool | str | None) -> bool:
    """Whether a recipe's ``cache`` asks for tiles to be kept in memory."""
    return cache is True or str(cache).lower() == "ram"


def _sizes_px(target: Target, imgsz: int) -> np.ndarray:
    """Width and height of a tile's boxes in pixels of the model's input."""
    gain = imgsz / max(target.tile["window"][2:])
    return (target.boxes[:, 2:] - target.boxes[:, :2]) * gain


@contextmanager
def _amp_without_a_trial() -> Iterator[None]:
    """Mixed precision where ultralytics has it: on CUDA, except on some GPUs. It would download a model for a trial,
    and takes a failed download as a pass.
    """
    with mock.patch("ultralytics.YOLO", side_effect=ConnectionError):
        yield


@contextmanager
def _ddp_without_device_ids() -> Iterator[None]:
    """On a CPU DDP takes no device ids, but ultralytics passes some, and unwraps by isinstance: hence a subclass."""
    original = nn.parallel.DistributedDataParallel

    class CpuDistributedDataParallel(original):  # type: ignore[misc, valid-type]
        def __init__(self, module: nn.Module, device_ids: object = None, **kwargs: Any) -> None:
            super().__init__(module, **kwargs)

    with mock.patch.object(nn.parallel, "DistributedDataParallel", CpuDistributedDataParallel):
        yield
