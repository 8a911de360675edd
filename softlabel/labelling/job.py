"""What a labelling job is: one teacher over some splits of one tile set, and which rows it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from softlabel.config import Label, Recipe
from softlabel.errors import RecipeError
from softlabel.labelling.engines import resolve
from softlabel.labelling.weights import read_header
from softlabel.labelling.yolo import fingerprint
from softlabel.records import Nms
from softlabel.store import num_tile_shards, read_tile_shard, step_dir


@dataclass(frozen=True)
class LabelJob:
    """One teacher over some splits (null: every tile) of one tile set."""

    name: str
    weights: Path
    tiles: Path
    splits: tuple[str, ...] | None
    num_classes: int
    imgsz: int
    nms: Nms
    engine: str
    precision: str
    with_losses: bool = False

    def identity(self) -> dict:
        """All that determines the store."""
        return {
            "teacher": fingerprint(self.weights, self.imgsz, self.nms, self.engine, self.precision),
            "tiles": self.tiles.name,
            "splits": list(self.splits) if self.splits is not None else None,
            "with_losses": self.with_losses,
        }

    def folder(self, run_dir: Path) -> Path:
        """Where its store is."""
        return step_dir(run_dir, f"label-{self.name}", self.identity())

    def shards(self) -> list[tuple[int, int]]:
        """(shard, tiles asked for in it) of the shards that hold any."""
        counts = ((shard, len(self.tile_rows(shard, ("split",)))) for shard in range(num_tile_shards(self.tiles)))
        return [(shard, count) for shard, count in counts if count]

    def tile_rows(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """The rows of a shard's tiles that are asked for, in their order."""
        return read_tile_shard(self.tiles, shard, columns, self.splits)


def label_job(recipe: Recipe, name: str, weights: Path | str, tiles: Path, splits: Sequence[str] | None,
              *, with_losses: bool = False) -> LabelJob:  # fmt: skip
    """The job of a teacher under a recipe's settings.

    Raises:
        WeightsError: The weights cannot be read.
        RecipeError: The weights know other classes than the recipe, or the engine cannot run here.
    """
    header = read_header(weights)
    if header.classes != recipe.classes:
        raise RecipeError(
            f"{weights} knows the classes {', '.join(header.classes)}, the recipe has {', '.join(recipe.classes)}: "
            "give `classes` as the weights have them, in their order"
        )
    settings: Label = recipe.label
    cuda = recipe.execution.gpus_per_actor > 0
    engine, precision = resolve(settings.engine, settings.precision, cuda=cuda, with_losses=with_losses)
    return LabelJob(
        name,
        Path(weights),
        tiles,
        None if splits is None else tuple(splits),
        len(header.classes),
        settings.imgsz or header.imgsz,
        settings.nms(header.yaml),
        engine,
        precision,
        with_losses,
    )


def recipe_label_job(recipe: Recipe, tiles: Path) -> LabelJob:
    """The job that a recipe's own ``label`` section describes.

    Raises:
        RecipeError: It names no weights.
    """
    if recipe.label.weights is None:
        raise RecipeError("label.weights is not set: name the teacher's .safetensors, --set label.weights=PATH")
    return label_job(recipe, "labels", Path(recipe.label.weights).resolve(), tiles, recipe.label.splits)
