"""The training step: any number of models in one Ray Train launch, since starting one costs half a minute and more."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

from softlabel.config import Execution, Model, Recipe, dump_recipe
from softlabel.errors import RecipeError, TrainingError, WeightsError
from softlabel.store import digest, file_digest, is_done, step_dir, summary, write_text
from softlabel.training.targets import TrainJob, truth_targets

# Ray Train repeats every print of a worker in its own log, which comes to the same terminal.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

# Nothing here may import ultralytics at the top: a Ray worker imports this module before Ray sets RANK, which
# ultralytics reads once.


def train_job(
    recipe: Recipe,
    run_dir: Path,
    name: str,
    model: Model,
    *,
    tiles: Path,
    split: str,
    val_split: str,
    soft_labels: Path | None = None,
    threshold: float | None = None,
) -> TrainJob:
    """One model to train on a split's truth, or on its soft labels above a threshold.

    Raises:
        WeightsError: The weights to start from do not exist.
    """
    weights = Path(model.weights).resolve() if model.weights else None
    if weights and not weights.is_file():
        raise WeightsError(f"no weights at {weights}: correct train.*.weights, or set it to null to start from scratch")
    nms = recipe.label.nms(model.model)
    inputs = {
        "nms": asdict(nms),  # decides validation mAP, and by it the epoch that is kept
        "model": model.model,
        "weights": file_digest(weights) if weights else None,
        "args": model.args,
        "tiles": tiles.name,
        "split": split,
        "val_split": val_split,
        "soft_labels": soft_labels.name if soft_labels else None,
        "threshold": threshold,
        "seed": recipe.seed,
    }
    return TrainJob(
        name=name,
        folder=step_dir(run_dir, f"train-{name}", inputs),
        classes=recipe.classes,
        model=model.model,
        weights=weights,
        args=dict(model.args),
        tiles=tiles,
        split=split,
        val_split=val_split,
        soft_labels=soft_labels,
        threshold=threshold,
        seed=recipe.seed,
        nms=nms,
    )


def recipe_train_job(recipe: Recipe, run_dir: Path, tiles: Path, store: Path | None) -> TrainJob:
    """The job that a recipe's own ``train`` section describes; ``store`` holds its soft labels, None is truth."""
    settings = recipe.train
    return train_job(
        recipe,
        run_dir,
        "student",
        settings.student,
        tiles=tiles,
        split=settings.split,
        val_split=validation_split(tiles, settings.split, settings.labels),
        soft_labels=store,
        threshold=settings.threshold if store else None,
    )


def validation_split(tiles: Path, split: str, labels: str) -> str:
    """The split on whose truth a model's choices are made.

    A student of soft labels learns from a set whose truth its user does not have, so it chooses on the validation
    split carved from the other set, the one its teacher learned from. Truth that brings its own ``val`` uses that.

    Raises:
        RecipeError: There is none.
    """
    there = set(summary(tiles)["splits"])
    own, other = ("val_1", "val_2") if split.endswith("_1") else ("val_2", "val_1")
    for candidate in ((own, other) if labels == "truth" else (other, own)) + ("val",):
        if candidate in there:
            return candidate
    raise RecipeError(f"{tiles} has no validation split for {split}: set tiles.split.validation above 0")


def train(recipe: Recipe, jobs: Sequence[TrainJob], run_dir: Path) -> None:
    """Train the jobs that are not done, each into its own folder: weights.safetensors and done.json.

    A launch that died is taken up again at its last checkpoint, by the workers' restart or by the next call.

    Raises:
        TrainingError: A training set has no boxes, or the workers failed more often than execution.max_failures.
        RecipeError: An argument that ultralytics does not know.
    """
    missing = [job for job in jobs if not is_done(job.folder)]
    if not missing:
        return
    for job in missing:
        _check(job)
        write_text(job.folder / "recipe.yaml", dump_recipe(recipe))
    name = f"train-{digest(sorted(job.folder.name for job in missing))}"
    storage = run_dir / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"jobs": missing, "cpu_threads": max(1, int(recipe.execution.cpus_per_worker))},
        scaling_config=_scaling(recipe.execution),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=recipe.execution.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"training failed: {_cause(error)}") from error
    shutil.rmtree(storage / name, ignore_errors=True)


def _worker(config: dict) -> None:
    from softlabel.training.trainer import train_models

    train_models(config["jobs"], config["cpu_threads"])


def _check(job: TrainJob) -> None:
    """What would fail in every worker fails here, once and at once."""
    from softlabel.labelling.weights import build_model
    from softlabel.labelling.yolo import check_train_args

    check_train_args(job.args, "train.teacher or train.student", job.model)
    build_model(job.model, len(job.classes))
    job.targets()
    truth_targets(job.tiles, job.val_split)


def _scaling(execution: Execution) -> ray.train.ScalingConfig:
    resources = {"CPU": execution.cpus_per_worker}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=execution.workers, use_gpu=bool(execution.gpus_per_worker), resources_per_worker=resources
    )


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    return " ".join(str(first).split()[-60:])
