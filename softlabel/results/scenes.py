"""The scenes of a store, one at a time, each with the detections of all its tiles."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from softlabel.results.geo import SceneDetections
from softlabel.results.merge import Method, cut_by_tiles, merge
from softlabel.results.stores import LabelledTile, Store, num_shards, tile_rows, with_labels

_IDENTITY = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@dataclass
class Scene:
    """The tiles of one scene and their detections above a threshold, before seams are merged."""

    scene_id: str
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    windows: list[tuple[int, int, int, int]] = field(default_factory=list)
    boxes: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    xywhr: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, tile: LabelledTile, threshold: float) -> None:
        """Take in one more tile; a rejected or empty one has no boxes, but is a tile of the scene all the same."""
        above = tile.found.above(threshold)
        transform = tile.tile["transform"]
        if transform != _IDENTITY:  # tiles made by an older version may have it, but it is no location
            self.crs, self.transform = tile.tile["crs"], transform
        self.counts[tile.status] += 1
        self.windows.append(tile.tile["window"])
        self.boxes.append(above.boxes)
        self.scores.append(above.scores)
        if above.xywhr is not None:
            self.xywhr.append(above.xywhr)

    def merged(self, method: Method, iou: float) -> SceneDetections:
        """Its objects, each once (softlabel.results.merge)."""
        windows = np.repeat(self.windows, [len(boxes) for boxes in self.boxes], axis=0)
        in_tiles = np.concatenate(self.boxes).astype(np.float64)
        boxes = in_tiles + windows[:, [0, 1, 0, 1]]
        cut = cut_by_tiles(boxes, windows, self._outline())
        turned = None
        if self.xywhr:
            turned = np.concatenate(self.xywhr).astype(np.float64)
            turned[:, :2] += windows[:, :2]
        found = merge(boxes, np.concatenate(self.scores), cut, turned, method=method, iou=iou)
        parts = (found.boxes, found.scores, found.members, self.crs, self.transform, found.xywhr)
        return SceneDetections(self.scene_id, *parts)

    def _outline(self) -> list[int]:
        windows = np.array(self.windows)
        return [*windows[:, :2].min(axis=0), *(windows[:, :2] + windows[:, 2:]).max(axis=0)]


def read_scenes(store: Store, first: int, stop: int, threshold: float) -> Iterator[Scene]:
    """The scenes that begin in the shards from ``first`` up to ``stop``, in their order, each whole.

    A scene that began earlier belongs to whoever reads the shards before; the last one is followed into later shards.
    So any division of the shards gives every scene once, and nobody needs a list of scenes.

    Raises:
        StoreError: A shard is missing or broken.
    """
    tiles = _own_tiles(store, first, stop)
    for scene_id, group in itertools.groupby(tiles, key=lambda tile: tile.tile["scene_id"]):
        scene = Scene(scene_id)
        for tile in group:
            scene.add(tile, threshold)
        yield scene


def _own_tiles(store: Store, first: int, stop: int) -> Iterator[LabelledTile]:
    begun_before = last = _last_scene(store, first)
    for shard in range(first, num_shards(store)):
        if shard >= stop and last == begun_before:
            return
        rows = tile_rows(store, shard)
        scene_ids = [row["scene_id"] for row in rows]
        mine = set(scene_ids) - {begun_before} if shard < stop else set(scene_ids) & {last}
        if mine:
            yield from (tile for tile in with_labels(store, shard, rows) if tile.tile["scene_id"] in mine)
        if shard < stop:
            last = scene_ids[-1] if rows else last
        elif rows and scene_ids[-1] != last:
            return


def _last_scene(store: Store, stop: int) -> str | None:
    """The scene of the last tile before a shard."""
    for shard in reversed(range(stop)):
        if rows := tile_rows(store, shard):
            return rows[-1]["scene_id"]
    return None
