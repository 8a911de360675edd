"""Self-training: a student labels the tiles that it learned from and learns again from those labels, round by round.

Rosenberg, Hebert and Schneiderman, "Semi-Supervised Self-Training of Object Detection Models" (WACV 2005), with all
labels used in every round, as by Xie et al. ("Self-training with Noisy Student", arXiv:1911.04252). A round is an
ordinary labelling step and an ordinary training step: what is done is not done again, and what was begun goes on.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from softlabel.config import Model, Recipe
from softlabel.labelling.job import LabelJob, label_job
from softlabel.labelling.run import label
from softlabel.store import summary
from softlabel.terminal import say
from softlabel.training.job import train_job
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS, TrainJob

Key = TypeVar("Key", bound=Hashable)


def self_train(
    recipe: Recipe,
    run_dir: Path,
    students: Mapping[Key, TrainJob],
    rounds: Mapping[Key, int],
    train_all: Callable[[Sequence[TrainJob]], Collection[str]],
) -> dict[Key, TrainJob]:
    """Each student in the round with its best validation mAP50.

    A student goes on as long as that rises. The next round starts from its weights, with the same seed, threshold and
    ``train.soft``; what was removed from the teacher's labels (``compare.drop``) is not removed from its own.

    Args:
        recipe: Its ``label`` section says how to label.
        run_dir: Where everything lies.
        students: The trained students of the first round, by any key.
        rounds: The most rounds for each, the first included.
        train_all: Trains students, and returns the names of those that failed: these end with the round before.
    """
    best, latest, number = dict(students), dict(students), 1
    while rising := {key: job for key, job in latest.items() if best[key] is job and rounds[key] > number}:
        number += 1
        say(f"round {number} of self-training: {len(rising)} students label their tiles and learn again")
        asked = [_label_job(recipe, job) for job in rising.values()]
        stores = label(recipe, asked, run_dir)
        latest = {
            key: _next(recipe, run_dir, job, store, number)
            for (key, job), store in zip(rising.items(), stores, strict=True)
        }
        failed = train_all(list(latest.values()))
        latest = {key: job for key, job in latest.items() if job.name not in failed}
        for key, job in latest.items():
            before, after = (summary(one.folder)["val_map50"] for one in (best[key], job))
            say(f"{job.name}: validation mAP50 {after:.3f}, before {before:.3f}")
            if after > before:
                best[key] = job
    return best


def in_one_launch(recipe: Recipe, run_dir: Path) -> Callable[[Sequence[TrainJob]], Collection[str]]:
    """A ``train_all`` that trains a round's students one after the other, and ends the run if one fails."""

    def again(jobs: Sequence[TrainJob]) -> tuple[str, ...]:
        train(recipe, jobs, run_dir)
        return ()

    return again


def _label_job(recipe: Recipe, job: TrainJob) -> LabelJob:
    """The job in which a student labels the tiles that it learned from."""
    name = f"train_set_by_{job.name}"
    return label_job(recipe, name, job.folder / WEIGHTS, job.tiles, [job.split], teaches=True)


def _next(recipe: Recipe, run_dir: Path, job: TrainJob, store: Path, number: int) -> TrainJob:
    """The student of the next round."""
    first = job.name.removesuffix(f"_round{number - 1}")
    return train_job(
        recipe.model_copy(update={"seed": job.seed}),
        run_dir,
        f"{first}_round{number}",
        Model(model=job.model, weights=str(job.folder / WEIGHTS), args=job.args),
        tiles=job.tiles,
        split=job.split,
        val_split=job.val_split,
        soft_labels=store,
        threshold=job.threshold,
        subset=job.subset,
        soft=job.soft,
    )
