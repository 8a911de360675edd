"""One class of a store split by an attribute of what its boxes show: cars into red, white, blue ones.

The paper's outlook (Ciolino, Rosario and Noever, arXiv:2212.00585) splits cars by their colour, as "subtypes".

Shape suffixes: N counts boxes, K the store's classes, F the finer classes of the one that is split.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.detectors.class_map import listed
from softlabel.detectors.queries import Crop
from softlabel.errors import SceneError, StoreError
from softlabel.records import EMPTY, LABELLED, REJECTED, Detections, soft_labels_table
from softlabel.results.crops import cut_out
from softlabel.results.stores import LabelledTile, Store, open_store, read_shard
from softlabel.store import step_dir, summary

_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))


class Attribute(Protocol):
    """What crops are told apart by."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its values."""
        ...

    @property
    def runs_model(self) -> bool:
        """Whether a GPU helps."""
        ...

    def identity(self) -> dict:
        """All that decides the shares."""
        ...

    def prepare(self, tile: Crop) -> Crop:
        """The tile (H, W, 3) as crops of it are looked at, uint8 RGB of the same size."""
        ...

    def shares(self, crops: Iterable[Crop]) -> NDArray[np.float32]:
        """(N, F), how much each crop of a prepared tile, uint8 (H, W, 3) RGB, is of each value; at least 0."""
        ...


@dataclass(frozen=True)
class SubtypeJob:
    """Which class of which store is split, and by what."""

    store: Store
    split_class: str
    attribute: Attribute
    run_dir: Path

    @property
    def finer(self) -> list[str]:
        """The classes that the split class becomes."""
        return [f"{self.split_class}-{name}" for name in self.attribute.names]

    @property
    def place(self) -> int:
        """The index of the class that is split, and of the first of its finer ones."""
        return self.store.classes.index(self.split_class)

    @property
    def classes(self) -> list[str]:
        """All classes, with the finer ones in place of the one that is split."""
        before, after = self.store.classes[: self.place], self.store.classes[self.place + 1 :]
        return [*before, *self.finer, *after]

    def identity(self) -> dict:
        """All that determines the result, the number of rejected tiles included, since labelling may retry them.

        ``parents`` says which class of the recipe each finer class belongs to, also those of earlier splits.
        """
        earlier = {name: parent for name, parent in self.store.parents.items() if name != self.split_class}
        parent = self.store.parents.get(self.split_class, self.split_class)
        teacher = {
            "subtyped": self.store.teacher,
            "class": self.split_class,
            "by": self.attribute.identity(),
            "classes": self.classes,
        }
        return {
            "teacher": teacher,
            "parents": {**earlier, **dict.fromkeys(self.finer, parent)},
            "tiles": self.store.tiles.name,
            "splits": None if self.store.splits is None else list(self.store.splits),
            "with_losses": False,
            "rejected": summary(self.store.folder)[REJECTED],
        }

    @property
    def output(self) -> Path:
        """The folder of the finer store."""
        return step_dir(self.run_dir, "subtypes", self.identity())


def subtype_job(folder: Path, split_class: str, attribute: Attribute) -> SubtypeJob:
    """Check and describe the splitting of a class of a store; the result goes beside the store.

    Raises:
        StoreError: The store is not finished or has no such class, or the finer classes cannot be told apart.
    """
    store = open_store(folder)
    if split_class not in store.classes:
        raise StoreError(f"{store.folder} has no class {split_class}: split one of {listed(store.classes)}")
    job = SubtypeJob(store, split_class, attribute, store.folder.parent)
    if len(job.finer) < 2:
        raise StoreError(f"{split_class} would become {listed(job.finer)} alone: give at least two to tell apart")
    if twice := sorted({name for name in job.classes if job.classes.count(name) > 1}):
        raise StoreError(f"splitting {split_class} would make two classes of one name, {listed(twice)}: rename them")
    return job


def subtype_shard(job: SubtypeJob, read: Callable[[dict], Crop], shard: int) -> pa.Table:
    """The rows of one shard of the finer store: the same tiles and boxes in the same order.

    Only tiles with a box of the class that is split are read. One that can no longer be read is rejected with its
    reason, as retryable.

    Args:
        job: What is split, and by what.
        read: Reads a tile row's pixels, uint8 (H, W, 3) RGB; raises SceneError.
        shard: The shard.

    Raises:
        StoreError: The shard is missing, broken, or about other tiles.
    """
    tiles, unread = read_shard(job.store, shard), dict[str, str]()
    shares_NF = job.attribute.shares(_crops(job, read, tiles, unread))
    found, used = [], 0
    for tile in tiles:
        if tile.status != LABELLED or tile.tile["tile_id"] in unread:
            found.append(_NOTHING)
            continue
        is_split = _is_split(job, tile.found)
        of_tile = shares_NF[used : used + is_split.sum()]
        used += len(of_tile)
        found.append(replace(tile.found, scores=finer_scores(tile.found.scores, job.place, is_split, of_tile)))
    tile_ids = [tile.tile["tile_id"] for tile in tiles]
    return soft_labels_table(
        len(job.classes),
        tile_ids,
        found,
        [None] * len(tile_ids),
        [tile.reason or unread.get(tile.tile["tile_id"]) for tile in tiles],
        [tile.retryable or tile.tile["tile_id"] in unread for tile in tiles],
        {tile.tile["tile_id"] for tile in tiles if tile.status == EMPTY},
    )


def finer_scores(
    scores_NK: NDArray[np.float32], place: int, is_split_N: NDArray[np.bool_], shares: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Class vectors (N, K - 1 + F) with finer classes in place of one.

    A finer class scores what the split class did, times its share relative to the largest share. So the likeliest one
    keeps the whole score, the best score of a box stays what it was, and a threshold keeps the boxes that it kept
    before: scores of classes are independent, and those of the finer ones need not add up to that of the split one. The
    pixels of a box whose best class is another are not looked at: nothing is known of its finer classes, and each has
    the whole score.

    Args:
        scores_NK: Class vectors in [0, 1].
        place: The index of the class that is split.
        is_split_N: The boxes whose best class it is.
        shares: (number of those boxes, F), at least 0. Where all are 0, nothing is known either.
    """
    largest = shares.max(axis=1, keepdims=True)
    relative_NF = np.ones((len(scores_NK), shares.shape[1]), np.float32)
    relative_NF[is_split_N] = np.divide(shares, largest, out=np.ones_like(shares), where=largest > 0)
    finer_NF = scores_NK[:, place : place + 1] * relative_NF
    return np.concatenate([scores_NK[:, :place], finer_NF, scores_NK[:, place + 1 :]], axis=1)


def _is_split(job: SubtypeJob, found: Detections) -> NDArray[np.bool_]:
    return found.class_ids == job.place


def _crops(
    job: SubtypeJob, read: Callable[[dict], Crop], tiles: list[LabelledTile], unread: dict[str, str]
) -> Iterator[Crop]:
    """The boxes to look at, tile after tile, so that a model has full batches; ``unread`` gets why a tile fails."""
    for tile in tiles:
        is_split = _is_split(job, tile.found)
        if not is_split.any():
            continue
        try:
            image = read(tile.tile)
        except SceneError as error:
            unread[tile.tile["tile_id"]] = str(error)
            continue
        yield from cut_out(job.attribute.prepare(image), tile.found.at(is_split))
