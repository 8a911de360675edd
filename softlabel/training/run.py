"""The training step: any number of models in one Ray Train launch, since a launch takes half a minute or more."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer

from softlabel.config import Execution, Recipe
from softlabel.errors import TrainingError
from softlabel.recipe_file import dump_recipe
from softlabel.storage import ray_storage, remove_tree
from softlabel.store import digest, is_done, write_text
from softlabel.terminal import say
from softlabel.training.job import scaling
from softlabel.training.targets import TrainJob, truth_targets

# Ray Train repeats every print of a worker in its own log, which goes to the same terminal.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

# Nothing here may import ultralytics at the top: a Ray worker imports this module before Ray sets RANK, which
# ultralytics reads once.


def train(recipe: Recipe, jobs: Sequence[TrainJob], run_dir: Path) -> None:
    """Train the jobs that are not done, each into its own folder: weights.safetensors and done.json.

    A model in training when a launch dies goes on after its last epoch, once the workers restart or at the next call.

    Raises:
        TrainingError: A training set has no boxes, or the workers failed more often than execution.max_failures.
        RecipeError: A model or an argument that `check_trainable` or `check_train_args` refuses.
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
        scaling_config=ray.train.ScalingConfig(**scaling(recipe.execution)),
        run_config=ray.train.RunConfig(
            name=name,
            **ray_storage(storage),
            failure_config=ray.train.FailureConfig(max_failures=recipe.execution.max_failures),
        ),
    )
    _say_what_is_missing(recipe.execution)
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"training failed: {_cause(error)}") from error
    finally:  # Ray Train leaves a handler that would swallow the next Ctrl-C and keeps its controller alive
        signal.signal(signal.SIGINT, before)
    remove_tree(storage / name)


def _worker(config: dict) -> None:
    from softlabel.training.trainer import train_models

    train_models(config["jobs"], config["cpu_threads"])


def _say_what_is_missing(execution: Execution) -> None:
    """Warn if resources are missing: training waits until an autoscaler brings them, and else for ever."""
    there = ray.cluster_resources()
    for resource, each in (("CPU", execution.cpus_per_worker), ("GPU", execution.gpus_per_worker)):
        needed, found = execution.workers * each, there.get(resource, 0.0)
        if needed > found:
            lower = f"execution.workers or execution.{resource.lower()}s_per_worker"
            say(f"warning: training waits for {needed:g} {resource}, there are {found:g}: lower {lower}")


def _check(job: TrainJob) -> None:
    """Raise here, once and early, what would otherwise be raised in every worker."""
    from softlabel.detectors.weights import check_trainable
    from softlabel.training.arguments import check_train_args

    check_trainable(job.model)
    check_train_args(job.args, f"train ({job.name})", job.model)
    targets = job.targets()
    truth_targets(job.tiles, job.val_split)
    partly = sum(target.tile["labelled_classes"] is not None for target in targets)
    if partly and job.soft_labels is None and not job.soft.ignore_truth:
        say(
            f"{job.name}: {partly} of {len(targets)} tiles were labelled for some classes only, and it learns that the "
            "others are absent: set train.soft.ignore_truth to true to treat them as unknown"
        )


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    return " ".join(str(first).split()[-60:])
