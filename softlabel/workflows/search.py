"""The search as a chain of steps: a teacher and its labels if they are missing, then students, one look at the test
split, and the report."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from softlabel.calibration import calibration_of
from softlabel.config import Recipe, Threshold
from softlabel.errors import RecipeError
from softlabel.evaluation.run import (
    QUALITY_THRESHOLDS,
    evaluate_store,
    judged_labels,
    label_scores,
    numbers,
    quality,
)
from softlabel.evaluation.thresholds import at_precision, of_mixture
from softlabel.imagery.run import tile
from softlabel.labelling.job import label_job, recipe_label_job
from softlabel.labelling.run import label
from softlabel.recipe_file import dump_recipe, with_values
from softlabel.records import LABELLED, detections_from_row
from softlabel.report.search import format_answer, write_search_report
from softlabel.search.run import Inputs, check_space, search
from softlabel.search.space import THRESHOLD, Values
from softlabel.shards import read_soft_labels
from softlabel.store import commit, read_json, summary, write_json, write_text
from softlabel.terminal import say
from softlabel.tile_table import read_tiles
from softlabel.training.job import train_job, validation_split
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS, TrainJob
from softlabel.workflows.experiment import Steps


def search_experiment(recipe: Recipe, run_dir: Path, budget_s: float | None, *, resume: bool) -> dict:
    """Find the values whose student is best, and write search.json, search.html, best.yaml and best.safetensors.

    Args:
        recipe: Its ``search`` section says what is tried; ``train.split`` is labelled and learned from. Without
            ``label.weights`` or ``label.open_vocabulary`` a teacher is trained on the other training set's truth first.
        run_dir: Where the results go.
        budget_s: Seconds for the search; what comes before it is not counted.
        resume: Go on with an earlier search.
    """
    check_space(recipe)  # teacher and labels may take hours
    steps = Steps(run_dir, total=7)
    write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    with steps.next("tiles"):
        tiles = tile(recipe, run_dir)
    split, val_split = recipe.train.split, validation_split(tiles, recipe.train.split, "soft")
    with steps.next("train the teacher"):
        teacher = teacher_for(recipe, run_dir, tiles)
    taught = recipe.model_copy(
        update={"label": recipe.label.model_copy(update={**teacher, "splits": (split, val_split)})}
    )
    with steps.next(f"label {split} and {val_split}"):
        (store,) = label(taught, [recipe_label_job(taught, tiles)], run_dir)
    judged = numbers(evaluate_store(taught, "teacher", tiles, val_split, store, run_dir))
    automatic = _automatic(taught, tiles, split, val_split, store)
    if not calibration_of(taught):  # else this threshold, found on the teacher's scores, would meet calibrated ones
        automatic = {"teacher's F1": judged["f1_conf"], **automatic}
    inputs = Inputs(taught, run_dir, tiles, store, val_split, automatic)
    with steps.next("search"):
        folder = search(inputs, budget_s, resume=resume)
    results = read_json(folder / "search.json")
    chosen = [
        trial
        for trial in _complete(results, [results["answer"]["values"], *results["references"]])
        if _weights(folder, trial).exists()  # the search keeps only its leaders' weights
    ]
    examined = chosen if _has_truth(tiles, "test") else []
    with steps.next("label the test split with the best students, once"):
        jobs = [label_job(taught, trial["folder"], _weights(folder, trial), tiles, ["test"]) for trial in examined]
        stores = label(taught, jobs, run_dir) if jobs else []
    with steps.next("evaluate"):
        for trial, found in zip(examined, stores, strict=True):
            evaluated = evaluate_store(taught, trial["folder"], tiles, "test", found, run_dir)
            trial["test_map50"] = numbers(evaluated)["map50"]
        results |= {"name": recipe.name, "test": _test(examined), "teacher": judged, "times_s": steps.times()}
        results["label_quality"] = _label_quality(taught, tiles, split, store)
        results["labels_kept"] = _labels_kept(taught, tiles, split, store)
    with steps.next("report"):
        _write_best(taught, run_dir, folder, results["answer"]["values"], chosen)
        write_json(run_dir / "search.json", results)
        write_search_report(run_dir / "search.html", results)
    say(f"\n{format_answer(results)}\n\nreport: {run_dir / 'search.html'}")
    say(f"train the final student: {_final_command(run_dir)}")
    return results


def _automatic(recipe: Recipe, tiles: Path, split: str, val_split: str, store: Path) -> dict[str, Threshold]:
    """Thresholds that follow from the labels, one for each class where the search varies them by class."""
    per_class = any(key.startswith(f"{THRESHOLD}.") for key in recipe.search.space)
    scores, class_ids = label_scores(recipe, tiles, split, store)
    found = {
        f"precision {recipe.search.precision:g}": at_precision(
            judged_labels(recipe, tiles, val_split, store), recipe.classes, recipe.search.precision, per_class=per_class
        ),
        "mixture of scores": of_mixture(scores, class_ids, recipe.classes, per_class=per_class),
    }
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def has_teacher(recipe: Recipe) -> bool:
    """Whether the label section names a teacher."""
    return recipe.label.open_vocabulary is not None or recipe.label.weights is not None


def teacher_for(recipe: Recipe, run_dir: Path, tiles: Path) -> dict[str, str]:
    """What to add to the recipe's label section so that it names a teacher: nothing if it does, else the weights of
    one that is trained here on the truth of the other training set."""
    if has_teacher(recipe):
        return {}
    job = teacher_job(recipe, run_dir, tiles)
    train(recipe, [job], run_dir)
    return {"weights": str(job.folder / WEIGHTS)}


def teacher_job(recipe: Recipe, run_dir: Path, tiles: Path, suffix: str = "") -> TrainJob:
    """A teacher for the recipe's training set, which learns from the truth of the other set.

    Raises:
        RecipeError: There is no other set.
    """
    other = {"train_1": "train_2", "train_2": "train_1"}.get(recipe.train.split)
    if other not in summary(tiles)["splits"]:
        raise RecipeError(
            "no teacher, and no other training set to train one on: set label.weights or label.open_vocabulary, or set "
            f"train.split to train_1 or train_2 (it is {recipe.train.split})"
        )
    val_split = validation_split(tiles, str(other), "truth")
    name = f"teacher_{str(other)[-1]}{suffix}"
    return train_job(recipe, run_dir, name, recipe.train.teacher, tiles=tiles, split=str(other), val_split=val_split)


def _complete(results: dict, wanted: Sequence[Values]) -> list[dict]:
    """The students of these values that trained to the end."""
    full = [trial for trial in results["trials"] if trial["status"] == "finished" and trial["subset"] == 1]
    return [trial for trial in full if trial["values"] in wanted]


def _weights(folder: Path, trial: dict) -> Path:
    return folder / "students" / trial["folder"] / WEIGHTS


def _test(chosen: Sequence[dict]) -> list[dict[str, Any]]:
    """For each of the values: mAP50 on the test split, mean and standard deviation over seeds."""
    rows: list[dict[str, Any]] = []
    for trial in chosen:
        if trial["values"] not in [row["values"] for row in rows]:
            found = [other["test_map50"] for other in chosen if other["values"] == trial["values"]]
            sd = stdev(found) if len(found) > 1 else None
            rows.append({"values": trial["values"], "students": len(found), "map50": mean(found), "sd": sd})
    return rows


def _label_quality(recipe: Recipe, tiles: Path, split: str, store: Path) -> list[dict]:
    """The labels against truth, where somebody has drawn it; else nothing."""
    return quality(recipe, tiles, split, store, QUALITY_THRESHOLDS) if _has_truth(tiles, split) else []


def _has_truth(tiles: Path, split: str) -> bool:
    return any(summary(tiles)["boxes_by_split"].get(split, {}).values())


def _labels_kept(recipe: Recipe, tiles: Path, split: str, store: Path) -> dict[str, dict[str, int]]:
    """Boxes above each threshold, per best class and in total; scores as ``train.calibration`` maps them, if set."""
    calibration = calibration_of(recipe)
    counts = {threshold: np.zeros(len(recipe.classes), np.int64) for threshold in QUALITY_THRESHOLDS}
    asked = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id"])}
    for row in read_soft_labels(store):
        if row["status"] == LABELLED and row["tile_id"] in asked:
            found = detections_from_row(row)
            found = calibration.apply(found) if calibration else found
            for threshold, total in counts.items():
                total += np.bincount(found.above(threshold).class_ids, minlength=len(recipe.classes))
    return {
        f"{threshold:g}": {**dict(zip(recipe.classes, total.tolist(), strict=True)), "all": int(total.sum())}
        for threshold, total in counts.items()
    }


def _write_best(recipe: Recipe, run_dir: Path, folder: Path, values: Values, chosen: Sequence[dict]) -> None:
    """The recipe of the final student, and the weights of the best one so far."""
    students = [trial for trial in chosen if trial["values"] == values]
    best = max(students, key=lambda trial: max(row["map50"] for row in trial["history"]), default=None)
    final = with_values(recipe, values)
    train = final.train.model_copy(update={"labels": "soft"})
    # The seed stays: it decides scenes and splits, and the labels that exist belong to those.
    final = final.model_copy(update={"name": f"{recipe.name}-best", "train": train})
    header = f"# The final student of the search over {', '.join(values)}: {_final_command(run_dir)}\n"
    write_text(run_dir / "best.yaml", header + dump_recipe(final))
    if best:
        weights = _weights(folder, best).read_bytes()
        commit(run_dir / "best.safetensors", lambda path: path.write_bytes(weights))
    else:
        (run_dir / "best.safetensors").unlink(missing_ok=True)  # it belonged to an earlier answer


def _final_command(run_dir: Path) -> str:
    return f"softlabel train --config {run_dir / 'best.yaml'} --run-dir {run_dir}"
