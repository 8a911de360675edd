"""What a labelling job is: one teacher over some splits of one tile set, and the rows it is asked to label.

Reading tasks get a job, so nothing here may import torch, which would cost each of them seconds and half a gigabyte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabel.config import Recipe
from softlabel.detectors.families import Teacher
from softlabel.detectors.teachers import in_views, open_vocabulary_teacher, recipe_teacher, weights_teacher
from softlabel.store import step_dir
from softlabel.tile_table import read_shard, shard_counts


@dataclass(frozen=True)
class LabelJob:
    """One teacher over some splits (null: every tile) of one tile set."""

    name: str
    teacher: Teacher
    tiles: Path
    splits: tuple[str, ...] | None
    with_losses: bool = False

    def identity(self) -> dict:
        """All that determines what the store holds."""
        return {
            "teacher": self.teacher.fingerprint,
            "tiles": self.tiles.name,
            "splits": list(self.splits) if self.splits is not None else None,
            "with_losses": self.with_losses,
        }

    def folder(self, run_dir: Path) -> Path:
        """Where its store is."""
        return step_dir(run_dir, f"label-{self.name}", self.identity())

    def shards(self) -> list[tuple[int, int]]:
        """(shard, number of tiles asked for in it) of each shard that holds any."""
        counts = shard_counts(self.tiles, self.splits)
        return [(int(shard), int(counts[shard])) for shard in np.flatnonzero(counts)]

    def tile_rows(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """The rows of a shard's tiles that are asked for, in their order."""
        return read_shard(self.tiles, shard, columns, self.splits)


def label_job(
    recipe: Recipe,
    name: str,
    weights: Path | str,
    tiles: Path,
    splits: Sequence[str] | None,
    *,
    with_losses: bool = False,
    teaches: bool = False,
) -> LabelJob:
    """The job of a trained detector under a recipe's settings: one to evaluate, or one that ``teaches`` and so also
    looks at tiles in the views of ``label.augment``.

    Raises:
        WeightsError: The weights cannot be read.
        RecipeError: The weights know other classes than the recipe, or the engine cannot run here.
    """
    teacher = weights_teacher(recipe, weights, with_losses=with_losses)
    if teaches:
        teacher = in_views(recipe, teacher)
    return LabelJob(name, teacher, tiles, _split_names(splits), with_losses)


def open_vocabulary_job(recipe: Recipe, name: str, tiles: Path, splits: Sequence[str] | None) -> LabelJob:
    """The job of the open-vocabulary teacher that the recipe describes; raises as ``open_vocabulary_teacher`` does."""
    return LabelJob(name, in_views(recipe, open_vocabulary_teacher(recipe)), tiles, _split_names(splits))


def recipe_label_job(recipe: Recipe, tiles: Path) -> LabelJob:
    """The job that a recipe's own ``label`` section describes; raises as ``recipe_teacher`` does."""
    return LabelJob("labels", recipe_teacher(recipe), tiles, _split_names(recipe.label.splits))


def _split_names(splits: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if splits is None else tuple(splits)
