"""Which model to train on what: from a recipe to the TrainJob that fixes it, and the folder that is named after it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from softlabel.calibration import calibration_of
from softlabel.config import Execution, Model, Recipe, Soft, Supplement, Threshold, default_iou
from softlabel.detectors.class_map import ClassMap
from softlabel.errors import RecipeError, WeightsError
from softlabel.storage import location
from softlabel.store import step_dir, summary
from softlabel.training.targets import TrainJob


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
    threshold: Threshold | None = None,
    subset: float = 1.0,
    soft: Soft | None = None,
    drop: float = 0.0,
    class_map: ClassMap | None = None,
) -> TrainJob:
    """One model to train on a split's truth, or on its soft labels above a threshold; ``subset`` is the share of tiles.

    ``soft`` is what the model makes of unsure labels: by default ``train.soft`` on soft labels, and on truth what that
    says about truth. ``drop`` is the share of the objects in the soft labels to remove at random first. ``class_map``
    is for soft labels whose classes are finer than the recipe's.

    Raises:
        WeightsError: The weights to start from do not exist.
        StoreError: There is no calibration where the recipe says.
        RecipeError: ``soft.supplement`` names no other training set.
    """
    weights = location(model.weights).resolve() if model.weights else None
    if weights and not weights.is_file():
        raise WeightsError(f"no weights at {weights}: correct train.*.weights, or set it to null to start from scratch")
    nms = recipe.label.nms(default_iou(model.model))
    calibration = calibration_of(recipe) if soft_labels else None
    if soft is None:
        soft = recipe.train.soft.of_labels() if soft_labels else recipe.train.soft.of_truth()
    if soft.supplement:
        _check_supplement(soft.supplement, tiles, split)
    job = TrainJob(
        name=name,
        folder=run_dir,
        classes=tuple(name for name, _ in class_map.becomes) if class_map else recipe.classes,
        model=model.model,
        weights=weights,
        args=dict(model.args),
        tiles=tiles,
        split=split,
        val_split=val_split,
        soft_labels=soft_labels,
        threshold=threshold,
        calibration=calibration,
        subset=subset,
        seed=recipe.seed,
        nms=nms,
        soft=soft,
        drop=drop,
        class_map=class_map,
    )
    return replace(job, folder=step_dir(run_dir, f"train-{name}", job.identity()))


def recipe_train_job(
    recipe: Recipe, run_dir: Path, tiles: Path, store: Path | None, class_map: ClassMap | None = None
) -> TrainJob:
    """The job that a recipe's own ``train`` section describes; ``store`` holds its soft labels, None means truth.
    ``class_map`` is for labels whose classes are finer than the recipe's."""
    settings = recipe.train
    if store is None:
        check_truth(settings.soft)
    elif class_map:
        check_finer(settings.soft)
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
        soft=None if store else settings.soft,
        class_map=class_map,
    )


def check_finer(soft: Soft) -> None:
    """Refuse what would need truth, or students' labels, in classes finer than the recipe's.

    Raises:
        RecipeError: Naming the key.
    """
    for key, is_set in (("supplement", soft.supplement is not None), ("rounds", soft.rounds > 1)):
        if is_set:
            raise RecipeError(f"train.soft.{key} is of the recipe's classes, and train.store's are finer: remove it")


def _check_supplement(supplement: Supplement, tiles: Path, split: str) -> None:
    other, splits = supplement.of(split), summary(tiles)["splits"]
    if other not in splits:
        raise RecipeError(f"train.soft.supplement.split: no {other} among {', '.join(splits)}: name a split with truth")
    if other == split or other.startswith(("val", "test")):
        raise RecipeError(
            f"train.soft.supplement.split is {other}, which the student learns from or is judged by: name another"
        )


def check_truth(soft: Soft) -> None:
    """Refuse settings that are about soft labels, for a student that learns from truth.

    Raises:
        RecipeError: Naming the key.
    """
    of_labels = Soft(**soft.model_dump(exclude={"ignore_truth", "background_far", "smoothing"}))
    if wrong := of_labels.model_dump(exclude_defaults=True):
        raise RecipeError(f"train.soft.{next(iter(wrong))} is about soft labels, and these are truth: remove it")


def validation_split(tiles: Path, split: str, labels: str) -> str:
    """The validation split, on whose truth choices about a model are made.

    A student on soft labels learns from a set whose truth its user does not have, so its validation split is the
    one carved from the other set, which its teacher learned from. Truth that brings its own ``val`` uses that.

    Raises:
        RecipeError: There is none.
    """
    there = set(summary(tiles)["splits"])
    own, other = ("val_1", "val_2") if split.endswith("_1") else ("val_2", "val_1")
    for candidate in ((own, other) if labels == "truth" else (other, own)) + ("val",):
        if candidate in there:
            return candidate
    raise RecipeError(f"{tiles} has no validation split for {split}: set tiles.split.validation above 0")


def scaling(execution: Execution) -> dict[str, Any]:
    """A worker group, as arguments of Ray Train's ScalingConfig."""
    resources = {"CPU": execution.cpus_per_worker}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    return {
        "num_workers": execution.workers,
        "use_gpu": bool(execution.gpus_per_worker),
        "resources_per_worker": resources,
    }
