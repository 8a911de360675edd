"""Ways to train students, side by side: soft labels as they are, each method, and truth, over several seeds."""

import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path

import softlabel
from softlabel.config import Recipe
from softlabel.errors import TrainingError
from softlabel.evaluation.methods import Student, method_rows
from softlabel.evaluation.run import evaluate_store, numbers, tile_results
from softlabel.imagery.run import tile
from softlabel.labelling.job import LabelJob, label_job, recipe_label_job
from softlabel.labelling.run import label
from softlabel.recipe_file import dump_recipe
from softlabel.report.methods import format_methods, write_methods_report
from softlabel.search.worker_groups import train_side_by_side
from softlabel.store import summary, write_json, write_text
from softlabel.terminal import say
from softlabel.tile_table import read_tiles
from softlabel.training.job import train_job, validation_split
from softlabel.training.targets import WEIGHTS, TrainJob
from softlabel.training.ways import PLAIN, TRUTH, ways
from softlabel.workflows.experiment import Steps
from softlabel.workflows.search import has_teacher, teacher_job
from softlabel.workflows.self_training import self_train

Key = tuple[str, str, int]
"""A student's way, training set and seed."""


def compare(recipe: Recipe, run_dir: Path) -> dict:
    """Train what is not trained yet, write compare.json and compare.html into ``run_dir``, and return the results.

    Each training set in ``compare.splits`` is labelled by a teacher: ``label``'s, or for each seed one that learns from
    the other set's truth, since what helps students of one teacher may do nothing for those of another that was trained
    in the same way. Then students of ``train.student`` learn from these labels, plainly and in each of
    ``compare.methods``' ways, and from truth, with the same seeds. All are judged on the test split.

    Raises:
        RecipeError: No student can be made of a method's values, or nothing can be compared.
        TrainingError: A teacher cannot be trained.
    """
    by_name = ways(recipe)
    steps = Steps(run_dir, total=7)
    write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    with steps.next("tiles"):
        tiles = tile(recipe, run_dir)
    with steps.next("train the teachers"):
        taught = _taught(recipe, run_dir, tiles)
    with steps.next("label the training sets"):
        stores = _label(recipe, run_dir, _label_jobs(by_name, taught, tiles))
    jobs = {key: _job(by_name[key[0]], run_dir, tiles, *key, store) for key, store in stores.items()}
    with steps.next(f"train {len(jobs)} students"):
        failed = train_side_by_side(recipe, list(jobs.values()), run_dir)
        trained = {key: job for key, job in jobs.items() if job.name not in failed}
        rounds = {key: 1 if key[0] == TRUTH else by_name[key[0]].train.soft.rounds for key in trained}

        def again(more: Sequence[TrainJob]) -> set[str]:
            failures = train_side_by_side(recipe, more, run_dir)
            failed.update(failures)
            return set(failures)

        trained = self_train(recipe, run_dir, trained, rounds, again)
    with steps.next("label the test split with every student"):
        found = label(
            recipe, [label_job(recipe, j.name, j.folder / WEIGHTS, tiles, ["test"]) for j in trained.values()], run_dir
        )
    with steps.next("evaluate"):
        for job, store in zip(trained.values(), found, strict=True):
            map50 = numbers(evaluate_store(recipe, job.name, tiles, "test", store, run_dir))["map50"]
            say(f"{job.name}: mAP50 {map50:.3f}")
        rows = _rows(recipe, tiles, dict(zip(trained, found, strict=True)))
    with steps.next("report"):
        results = {
            "name": recipe.name,
            "classes": list(recipe.classes),
            "methods": {name: recipe.compare.methods.get(name, {}) for name in by_name},
            "drop": recipe.compare.drop,
            "seeds": list(_seeds(recipe)),
            "rows": rows,
            "failed": failed,
            "labels": [
                {"method": name, "train_set": split, "seed": seed, **summary(store)}
                for (name, split, seed), store in stores.items()
                if name != TRUTH
            ],
            "train_boxes": _boxes(trained),
            "softlabel_version": softlabel.__version__,
            "date": datetime.date.today().isoformat(),
            "times_s": steps.times(),
        }
        write_json(run_dir / "compare.json", results)
        write_methods_report(run_dir / "compare.html", results)
    say(f"\n{format_methods(results)}\n\nresults: {run_dir / 'compare.json'}\nreport:  {run_dir / 'compare.html'}")
    return results


def _seeds(recipe: Recipe) -> range:
    return range(recipe.seed, recipe.seed + recipe.compare.seeds)


def _taught(recipe: Recipe, run_dir: Path, tiles: Path) -> dict[tuple[str, int], Recipe]:
    """The recipe with its teacher, per training set and seed."""
    keys = list(itertools.product(recipe.compare.splits, _seeds(recipe)))
    jobs: dict[tuple[str, int], TrainJob] = {}
    if not has_teacher(recipe):
        for split, seed in keys:
            changes = {"seed": seed, "train": recipe.train.model_copy(update={"split": split})}
            jobs[split, seed] = teacher_job(recipe.model_copy(update=changes), run_dir, tiles, f"_seed{seed}")
        if failed := train_side_by_side(recipe, list(jobs.values()), run_dir):
            raise TrainingError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    found = {}
    for key in keys:
        weights = {"weights": str(jobs[key].folder / WEIGHTS)} if jobs else {}
        labels = recipe.label.model_copy(update={**weights, "splits": (key[0],)})
        found[key] = recipe.model_copy(update={"label": labels})
    return found


def _label_jobs(by_name: dict[str, Recipe], taught: dict[tuple[str, int], Recipe], tiles: Path) -> dict[Key, LabelJob]:
    """The job that labels each student's tiles: its teacher, in the views of its way."""
    jobs = {}
    for (name, way), ((split, seed), by) in itertools.product(by_name.items(), taught.items()):
        labels = by.label.model_copy(update={"augment": way.label.augment})
        jobs[name, split, seed] = recipe_label_job(by.model_copy(update={"label": labels}), tiles)
    return jobs


def _label(recipe: Recipe, run_dir: Path, jobs: dict[Key, LabelJob]) -> dict[Key, Path]:
    """The store of each job, all labelled in one run; one that several students share is labelled once."""
    different = {job.folder(run_dir): job for job in jobs.values()}
    label(recipe, list(different.values()), run_dir)
    return {key: job.folder(run_dir) for key, job in jobs.items()}


def _job(way: Recipe, run_dir: Path, tiles: Path, name: str, split: str, seed: int, store: Path) -> TrainJob:
    on_truth = name == TRUTH
    return train_job(
        way.model_copy(update={"seed": seed}),
        run_dir,
        f"teacher_{split[-1]}_seed{seed}" if on_truth and _is_a_teacher(way, split) else f"{name}_{split}_seed{seed}",
        way.train.student,
        tiles=tiles,
        split=split,
        val_split=validation_split(tiles, split, "truth" if on_truth else "soft"),
        soft_labels=None if on_truth else store,
        threshold=None if on_truth else way.train.threshold,
        drop=0.0 if on_truth else way.compare.drop,
    )


def _is_a_teacher(recipe: Recipe, split: str) -> bool:
    """Whether the student on a split's truth is the other split's teacher, and so is trained already."""
    taught = {"train_1": "train_2", "train_2": "train_1"}.get(split)
    alike = recipe.train.student == recipe.train.teacher
    return alike and taught in recipe.compare.splits and not has_teacher(recipe)


def _rows(recipe: Recipe, tiles: Path, stores: dict[Key, Path]) -> list[dict]:
    groups = {row["tile_id"]: row["group"] for row in read_tiles(tiles, ["test"], ["tile_id", "group", "split"])}
    judged = {key: tile_results(tiles, "test", store) for key, store in stores.items()}
    common = [tile_id for tile_id in groups if all(tile_id in found for found in judged.values())]
    students = [Student(*key, [found[tile_id] for tile_id in common]) for key, found in judged.items()]
    return method_rows(
        students,
        recipe.classes,
        plain=PLAIN,
        truth=TRUTH,
        samples=recipe.evaluate.bootstrap,
        seed=recipe.seed,
        groups=[groups[tile_id] for tile_id in common],
    )


def _boxes(trained: dict[Key, TrainJob]) -> dict[str, dict[str, int]]:
    """Boxes that students learned from, by method and training set."""
    counts: dict[str, dict[str, int]] = {}
    for (name, split, _), job in trained.items():
        counts.setdefault(name, {})[split] = summary(job.folder)["train_boxes"]
    return counts
