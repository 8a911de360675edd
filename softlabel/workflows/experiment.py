"""The paper's experiment as a chain of steps: two teachers on truth, students on their labels, one test split.

Ciolino, Rosario, Noever: "Soft Labels for Rapid Satellite Object Detection" (arXiv:2212.00585). A teacher learns from
the truth of one training set and labels the other, a student learns from those labels only; and the other way round.
"""

import datetime
import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import softlabel
from softlabel.config import HARD, Recipe, Train
from softlabel.detectors.engine_choice import resolve
from softlabel.errors import RecipeError
from softlabel.evaluation.quality import drop, loss_difference_percent
from softlabel.evaluation.run import QUALITY_THRESHOLDS, curves, difference, evaluate_store, numbers, quality
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.labelling.job import LabelJob, label_job, open_vocabulary_job
from softlabel.labelling.run import label
from softlabel.recipe_file import dump_recipe
from softlabel.records import LABELLED, Truth, detections_from_row
from softlabel.report import wording
from softlabel.report.figures import Overlay
from softlabel.report.page import write_report
from softlabel.results.run import fuse
from softlabel.shards import read_soft_labels
from softlabel.store import read_json, summary, write_json, write_text
from softlabel.terminal import say
from softlabel.tile_table import read_tiles
from softlabel.training.arguments import check_models, check_soft
from softlabel.training.job import train_job, validation_split
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS, TrainJob
from softlabel.workflows.self_training import in_one_launch, self_train

_OVERLAYS = 8
_OTHER = {1: 2, 2: 1}
_FUSE_ABOVE, _FUSE_IOU = 0.05, 0.55  # as in `softlabel fuse`


@dataclass(frozen=True)
class _Student:
    """A trained model and where it stands in the table."""

    job: TrainJob
    train_set: int
    teacher: str | None = None
    source: str | None = None
    rounds: int = 1

    @property
    def weights(self) -> Path:
        return self.job.folder / WEIGHTS


def experiment(recipe: Recipe, run_dir: Path) -> dict:
    """Run all that is not done, write results.json and report.html into ``run_dir``, and return the results."""
    check_soft(recipe, recipe.train.thresholds)
    _check_models(recipe.train)  # before hours are spent on what they could not be trained on
    cuda = recipe.execution.gpus_per_actor > 0
    resolve(recipe.label.engine, recipe.label.precision, cuda=cuda, with_losses=False)
    steps = Steps(run_dir, total=7)
    write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    with steps.next("tiles"):
        tiles = tile(recipe, run_dir)
    truths, teachers = truth_models(recipe, run_dir, tiles)
    with steps.next(f"train {_names([*teachers.values(), *truths.values()])} on truth"):
        train(recipe, _distinct(teachers, truths), run_dir)
    also = ", and with the open-vocabulary teacher" if _has_open_vocabulary(recipe) else ""
    with steps.next(f"label each training set with the other's teacher{also}"):
        stores = _label(recipe, run_dir, tiles, teachers)
    students = soft_models(recipe, run_dir, tiles, stores)
    with steps.next(f"train {_names(students)} on soft labels"):
        train(recipe, [student.job for student in students], run_dir)
        students = _after_rounds(recipe, run_dir, students)
    models = [*truths.values(), *students, *(t for i, t in teachers.items() if t.job != truths[i].job)]
    with steps.next("label the test split with every model"):
        jobs = [label_job(recipe, model.job.name, model.weights, tiles, ["test"], with_losses=True) for model in models]
        found = dict(zip([model.job.name for model in models], label(recipe, jobs, run_dir), strict=True))
    with steps.next("evaluate"):
        results, all_curves = _results(recipe, run_dir, tiles, models, found, stores)
    with steps.next("report"):
        results["times_s"] = {name: seconds for name, seconds in steps.times().items() if name != "report"}
        write_json(run_dir / "results.json", results)
        overlays = _overlays(recipe, tiles, next(iter(stores.values())))
        write_report(run_dir / "report.html", results, all_curves, overlays)
    files = f"results: {run_dir / 'results.json'}\nreport:  {run_dir / 'report.html'}"
    say(f"\n{wording.format_table(results)}\n\n{files}")
    return results


def _check_models(train: Train) -> None:
    from softlabel.detectors.weights import finds_rotated  # imports PyTorch and ultralytics

    check_models(train)
    if finds_rotated(train.student.model) and not finds_rotated(train.teacher.model):
        raise RecipeError(
            f"train.student.model {train.student.model} learns rotated boxes, and train.teacher.model "
            f"{train.teacher.model} finds upright ones: name an -obb model for both"
        )


def truth_models(recipe: Recipe, run_dir: Path, tiles: Path) -> tuple[dict[int, _Student], dict[int, _Student]]:
    """Per training set, the student's model on truth (the reference) and the teacher; one model if they agree."""

    def on_truth(name: str, number: int, role: str) -> _Student:
        split = f"train_{number}"
        val = validation_split(tiles, split, "truth")
        model = getattr(recipe.train, role)
        return _Student(train_job(recipe, run_dir, name, model, tiles=tiles, split=split, val_split=val), number)

    truths = {number: on_truth(f"truth_{number}", number, "student") for number in _OTHER}
    if recipe.train.teacher == recipe.train.student:
        return truths, truths
    return truths, {number: on_truth(f"teacher_{number}", number, "teacher") for number in _OTHER}


def soft_models(recipe: Recipe, run_dir: Path, tiles: Path, stores: dict[str, dict[int, Path]]) -> list[_Student]:
    """A student per source of labels, threshold and training set, on these labels only; where ``train.soft`` is
    set, one that learns plainly and one that learns by it."""
    students, plain = [], (HARD, 1)
    by_recipe = recipe.train.soft.of_labels(), recipe.train.soft.rounds
    ways = [plain] if by_recipe == plain else [plain, by_recipe]
    for source, threshold, number, way in itertools.product(stores, recipe.train.thresholds, _OTHER, ways):
        split, store = f"train_{number}", stores[source][number]
        name = "soft" if source == wording.TEACHER else source
        job = train_job(
            recipe,
            run_dir,
            f"{name}_{number}_at_{threshold:g}{'' if way == plain else '_softly'}",
            recipe.train.student,
            tiles=tiles,
            split=split,
            val_split=validation_split(tiles, split, "soft"),
            soft_labels=store,
            threshold=threshold,
            soft=way[0],
        )
        students.append(_Student(job, number, summary(store)["name"], source, way[1]))
    return students


def _after_rounds(recipe: Recipe, run_dir: Path, students: list[_Student]) -> list[_Student]:
    """Each student in its best round of self-training."""
    first = {student.job.name: student.job for student in students}
    rounds = {student.job.name: student.rounds for student in students}
    best = self_train(recipe, run_dir, first, rounds, in_one_launch(recipe, run_dir))
    return [replace(student, job=best[student.job.name]) for student in students]


def _label_jobs(recipe: Recipe, tiles: Path, teachers: dict[int, _Student]) -> dict[int, LabelJob]:
    """Per training set, the job in which the other set's teacher labels it."""
    return {
        number: label_job(
            recipe, teachers[other].job.name, teachers[other].weights, tiles, [f"train_{number}"], teaches=True
        )
        for number, other in _OTHER.items()
    }


def _has_open_vocabulary(recipe: Recipe) -> bool:
    """Whether students learn from an open-vocabulary teacher's labels, alone and fused with the trained teachers'."""
    return recipe.label.open_vocabulary is not None


def _label(recipe: Recipe, run_dir: Path, tiles: Path, teachers: dict[int, _Student]) -> dict[str, dict[int, Path]]:
    """The labels that students learn from, by source and then by training set."""
    jobs = _label_jobs(recipe, tiles, teachers)
    if not _has_open_vocabulary(recipe):
        return {wording.TEACHER: dict(zip(jobs, label(recipe, list(jobs.values()), run_dir), strict=True))}
    named = [open_vocabulary_job(recipe, wording.OWLVIT, tiles, [f"train_{number}"]) for number in jobs]
    stores = label(recipe, [*jobs.values(), *named], run_dir)
    halves = stores[: len(jobs)], stores[len(jobs) :]
    by_teacher, by_open_vocabulary = (dict(zip(jobs, half, strict=True)) for half in halves)
    fused = {
        number: fuse([by_open_vocabulary[number], by_teacher[number]], (1.0, 1.0), _FUSE_ABOVE, _FUSE_IOU, run_dir)
        for number in jobs
    }
    return {wording.OWLVIT: by_open_vocabulary, wording.FUSED: fused}


def _distinct(*models: dict[int, _Student]) -> list[TrainJob]:
    jobs = {model.job.folder: model.job for group in models for model in group.values()}
    return list(jobs.values())


def _names(models: list[_Student]) -> str:
    return ", ".join(dict.fromkeys(model.job.name for model in models))


def _results(
    recipe: Recipe,
    run_dir: Path,
    tiles: Path,
    models: list[_Student],
    found: dict[str, Path],
    stores: dict[str, dict[int, Path]],
) -> tuple[dict, dict]:
    evaluated = {name: evaluate_store(recipe, name, tiles, "test", store, run_dir) for name, store in found.items()}
    rows = [_model_row(recipe, model, numbers(evaluated[model.job.name])) for model in models]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        reference = f"truth_{row['train_set'][-1]}"
        if row["labels"] == "soft":
            row["drop"] = difference(recipe, tiles, "test", found[reference], found[row["name"]])
            row["drop"]["per_class"] = _class_drops(by_name[reference], row)
    thresholds = sorted({*QUALITY_THRESHOLDS, *recipe.train.thresholds})
    label_quality = [
        {"train_set": f"train_{number}", "teacher": summary(store)["name"], **row}
        for by_set in stores.values()
        for number, store in by_set.items()
        for row in quality(recipe, tiles, f"train_{number}", store, thresholds)
    ]
    results = {
        "name": recipe.name,
        "seed": recipe.seed,
        "classes": list(recipe.classes),
        "softlabel_version": softlabel.__version__,
        "date": datetime.date.today().isoformat(),
        "machine": _machine(models),
        "tiles": summary(tiles),
        "models": rows,
        "label_quality": label_quality,
    }
    return results, {name: curves(folder) for name, folder in evaluated.items()}


def _model_row(recipe: Recipe, model: _Student, test: dict) -> dict[str, Any]:
    trained = summary(model.job.folder)
    losses = {"train": trained["losses"], "test": test["losses"]}
    losses["difference_percent"] = {
        name: loss_difference_percent(losses["train"][name], losses["test"][name]) for name in trained["losses"]
    }
    keys = ("optimizer", "lr0", "epochs", "epochs_with_mosaic", "best_epoch", "seed", "world_size")
    return {
        "name": model.job.name,
        "train_set": model.job.split,
        "labels": "soft" if model.teacher else "truth",
        "teacher": model.teacher,
        "source": model.source,
        "threshold": model.job.threshold,
        "soft": model.job.soft.model_dump(mode="json", exclude_defaults=True) if model.teacher else {},
        "model": model.job.model,
        **{key: test[key] for key in ("map50", "map50_95", "precision", "recall", "f1", "f1_conf")},
        "losses": losses,
        "per_class": test["per_class"],
        "rotated": test.get("rotated", False),  # missing where a run of an earlier release goes on
        "drop": None,
        **{key: trained[key] for key in (*keys, "train_tiles", "train_boxes", "val_map50", "seconds")},
    }


def _class_drops(reference: dict, row: dict) -> dict[str, dict | None]:
    """AP50 per class against the truth-trained model; null for a class without truth in the test split."""
    drops: dict[str, dict | None] = {}
    for name, numbers_of_class in row["per_class"].items():
        truth, soft = reference["per_class"][name]["ap50"], numbers_of_class["ap50"]
        drops[name] = None if truth is None or soft is None else drop(truth, soft)
    return drops


def _overlays(recipe: Recipe, tiles: Path, stores: dict[int, Path]) -> list[Overlay]:
    """Truth against soft labels on tiles with many objects, the classes in turn, both training sets."""
    threshold, reader, overlays = min(recipe.train.thresholds), TileReader(), []
    for number, store in stores.items():
        labels = {row["tile_id"]: row for row in read_soft_labels(store) if row["status"] == LABELLED}
        rows = [row for row in read_tiles(tiles, [f"train_{number}"]) if row["tile_id"] in labels]
        for row in _crowded(rows, len(recipe.classes), _OVERLAYS // 2):
            soft = detections_from_row(labels[row["tile_id"]]).above(threshold)
            title = f"{row['scene_id']}: {summary(store)['name']}'s labels above {threshold:g}"
            overlays.append(Overlay(title, reader.read(row), Truth.from_row(row["truth"]), soft, recipe.classes))
    reader.close()
    return overlays


def _crowded(rows: list[dict], num_classes: int, count: int) -> list[dict]:
    """Class by class, the tile with the most objects of it among those not chosen yet."""
    chosen: list[dict] = []
    drawn = [Truth.from_row(row["truth"]) for row in rows]
    per_class = np.array([np.bincount(truth.class_ids[~truth.ignore], minlength=num_classes) for truth in drawn])
    for turn in range(min(count, len(rows))):
        order = np.argsort(-per_class[:, turn % num_classes], kind="stable")
        chosen.append(next(rows[i] for i in order if rows[i] not in chosen))
    return chosen


def _machine(models: list[_Student]) -> dict:
    devices = sorted({summary(model.job.folder)["device"] for model in models} - {"cpu"})
    libraries = {name: version(name) for name in ("torch", "ray", "ultralytics")}
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": devices, "python": platform.python_version(), **libraries}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


class Steps:
    """Says which step runs, and remembers how long each took.

    A rerun that finds a step done keeps the time of the run that did it; a step resumed after a kill is timed from
    then on.
    """

    def __init__(self, run_dir: Path, total: int) -> None:
        self._path, self._total, self._count = run_dir / "times.json", total, 0

    @contextmanager
    def next(self, name: str) -> Iterator[None]:
        self._count += 1
        say(f"[{self._count}/{self._total}] {name}")
        started = time.monotonic()
        yield
        times = self.times()
        times.setdefault(name, round(time.monotonic() - started, 1))
        write_json(self._path, times)

    def times(self) -> dict[str, float]:
        """Seconds per step so far."""
        return read_json(self._path) if self._path.exists() else {}
