"""Training tiles as an ultralytics dataset: its augmentation, our pixels and boxes.

Augmentation carries one number per box, its class. Where targets are soft, that number is instead the row of a table
that holds all there is to know about the box (`soft_rows`); after augmentation `looked_up` looks it up again.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from ultralytics.data.augment import BaseMixTransform, Compose, Mosaic
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import NUM_THREADS, IterableSimpleNamespace

from softlabel import rotated
from softlabel.errors import TrainingError
from softlabel.terminal import MARK
from softlabel.training.epochs import Draw, Mixture, seeded
from softlabel.training.packed import PackedTiles, num_bytes
from softlabel.training.targets import Target

_TILES_A_THREAD = 16
"""Neighbouring tiles, which are mostly of one scene: each thread opens scenes for itself."""
_MOST_ROWS = 1 << 24  # float32 can tell whole numbers apart up to here


class TileDataset(YOLODataset):
    """A YOLODataset whose images are windows of scenes and whose labels come from a list, not from files.

    ``read`` gives the pixels of a tile row, uint8 (H, W, 3) RGB; where tiles are cached, several threads call it.
    Under ultralytics' task ``obb`` boxes are rotated. Where targets are soft, a box has its row in `soft_rows` instead
    of its class, and the targets' regions are boxes too. Mosaic and other mixing augmentations choose tiles as
    ``mixture`` does; None leaves that to ultralytics.
    """

    # ultralytics' own, by a tile's number: the pixels that are at hand, its size and the size it is scaled to.
    ims: Any
    im_hw0: list[Any]
    im_hw: list[Any]

    def __init__(
        self,
        targets: Sequence[Target],
        read: Callable[[dict], NDArray[np.uint8]],
        mixture: Mixture | None = None,
        **kwargs: object,
    ) -> None:
        self._targets = list(targets)
        self._read, self._mixture = read, mixture
        super().__init__(img_path="", **kwargs)

    def get_img_files(self, img_path: str) -> list[str]:
        """Tile ids, where ultralytics would list files; ``fraction`` has no meaning here."""
        return [target.tile["tile_id"] for target in self._targets]

    def get_labels(self) -> list[dict]:
        """Labels as ultralytics holds them: normalised xywh, classes as a float column, corners of rotated boxes."""
        sizes = [len(target.boxes) + (len(target.soft.regions) if target.soft else 0) for target in self._targets]
        starts = itertools.accumulate(sizes, initial=0)
        return [_label(t, start, rotated_boxes=self.use_obb) for t, start in zip(self._targets, starts, strict=False)]

    def __getitem__(self, index: int | Draw) -> dict:
        """An augmented tile; the same Draw always gives the same one."""
        if not isinstance(index, Draw):
            return super().__getitem__(index)
        with seeded(index.seed):
            return super().__getitem__(index.tile)

    def build_transforms(self, hyp: IterableSimpleNamespace) -> Compose:
        """ultralytics' transforms, with mosaics of tiles from the whole set, as it makes them when all are in memory.

        Otherwise a mosaic would consist of tiles that the same worker has just read.
        """
        transforms = super().build_transforms(hyp)
        for mix in _mixes(transforms):
            if isinstance(mix, Mosaic):
                mix.buffer_enabled = False
            if self._mixture and self._mixture.truth:
                mix.get_indexes = partial(_partners, self._mixture, mix.n - 1 if isinstance(mix, Mosaic) else None)
        return transforms

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]:
        """Pixels of a tile as BGR, its longer side scaled to imgsz; the last ones read are kept for mosaics."""
        if self.ims[i] is None:
            image = self._read_scaled(i)
            if not self.augment:
                return image, self._size_hw(i), image.shape[:2]
            self._keep_for_mosaic(i, image)
        return self.ims[i], self.im_hw0[i], self.im_hw[i]

    def _keep_for_mosaic(self, i: int, image: NDArray[np.uint8]) -> None:
        self.ims[i], self.im_hw0[i], self.im_hw[i] = image, self._size_hw(i), image.shape[:2]
        self.buffer.append(i)
        if len(self.buffer) > self.max_buffer_length:
            j = self.buffer.pop(0)
            self.ims[j] = self.im_hw0[j] = self.im_hw[j] = None

    def _read_scaled(self, i: int) -> NDArray[np.uint8]:
        target = self._targets[i]
        image = np.ascontiguousarray(target.hide_unknown(self._read(target.tile))[..., ::-1])
        height, width = self._scaled_hw(i)
        if image.shape[:2] == (height, width):
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def _size_hw(self, i: int) -> tuple[int, int]:
        _, _, width, height = self._targets[i].tile["window"]
        return height, width

    def _scaled_hw(self, i: int) -> tuple[int, int]:
        size = self._size_hw(i)
        height, width = (max(min(round(side * self.imgsz / max(size)), self.imgsz), 1) for side in size)
        return height, width

    def cache_images(self) -> None:
        """Read all tiles, in threads: into memory, or for ``disk`` into a file that is gone when training ends."""
        packed = PackedTiles([self._scaled_hw(i) for i in range(self.ni)], on_disk=self.cache == "disk")

        def fill(i: int) -> None:
            packed[i][:] = self._read_scaled(i)

        with ThreadPool(NUM_THREADS) as pool:
            for _ in pool.imap_unordered(fill, range(self.ni), _TILES_A_THREAD):
                pass
        packed.seal()
        self.ims = packed
        self.im_hw0, self.im_hw = ([size(i) for i in range(self.ni)] for size in (self._size_hw, self._scaled_hw))

    def check_cache_ram(self, safety_margin: float = 1.0) -> bool:
        """Whether memory has room for the tiles."""
        return self._has_room("memory", psutil.virtual_memory().available, safety_margin)

    def check_cache_disk(self, safety_margin: float = 0.1) -> bool:
        """Whether the disk for temporary files has room for the tiles."""
        folder = tempfile.gettempdir()
        return self._has_room(folder, shutil.disk_usage(folder).free, safety_margin)

    def _has_room(self, place: str, free: int, safety_margin: float) -> bool:
        needed = sum(num_bytes(self._scaled_hw(i)) for i in range(self.ni)) * (1 + safety_margin)
        if needed <= free:
            return True
        self.cache = None
        print(
            f"{MARK}no room for args.cache: {place} has {free / 1e9:.1f} GB free, not {needed / 1e9:.1f}: "
            "tiles are read every epoch",
            flush=True,
        )
        return False


def _mixes(transform: Any) -> Iterator[BaseMixTransform]:
    """All mixing transforms within a transform, which may be a list of others or have one to be done before it."""
    if isinstance(transform, BaseMixTransform):
        yield transform
    for inner in [*getattr(transform, "transforms", []), getattr(transform, "pre_transform", None)]:
        if inner is not None:
            yield from _mixes(inner)


def _partners(mixture: Mixture, count: int | None) -> int | list[int]:
    """In place of ultralytics' ``get_indexes``: several tile numbers for a mosaic, else one."""
    return mixture.partner() if count is None else [mixture.partner() for _ in range(count)]


def _label(target: Target, first_row: int, *, rotated_boxes: bool) -> dict:
    _, _, width, height = target.tile["window"]
    boxes, drawn, classes = target.boxes, rotated.drawn(target.boxes, target.xywhr), target.class_ids
    if target.soft:
        boxes = np.concatenate([boxes, rotated.hulls(target.soft.regions)])
        drawn = np.concatenate([drawn, target.soft.regions])
        classes = first_row + np.arange(len(boxes))
    boxes = boxes.astype(np.float32)
    corners = rotated.corners(drawn).astype(np.float32)
    xywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return {
        "im_file": str(Path(target.tile["tile_id"])),
        "shape": (height, width),
        "cls": classes.astype(np.float32).reshape(-1, 1),
        "bboxes": xywh / np.array([width, height, width, height], np.float32),
        "segments": list(corners / np.array([width, height], np.float32)) if rotated_boxes else [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


def soft_rows(targets: Sequence[Target]) -> torch.Tensor:
    """(rows, 4 + K) float32: tile after tile, first its boxes, then its regions.

    A box's row is its class, whether it comes from soft labels, its weight, its box weight and its class vector; a
    region's is -1, whether it comes from soft labels, 0, 0 and what it keeps of each class.

    Raises:
        TrainingError: There are more rows than a float32 can tell apart.
    """
    rows = []
    for target in targets:
        if (soft := target.soft) is not None:
            boxes, regions = len(soft.weights), len(soft.keeps)
            stored = np.full(boxes + regions, not target.supplements)
            rows.append(
                np.column_stack([target.class_ids, stored[:boxes], soft.weights, soft.box_weights, soft.vectors])
            )
            rows.append(np.column_stack([np.full(regions, -1), stored[boxes:], np.zeros((regions, 2)), soft.keeps]))
    found = np.concatenate(rows).astype(np.float32)
    if len(found) > _MOST_ROWS:
        raise TrainingError(
            f"{len(found)} labels with the unsure ones are more than {_MOST_ROWS}: set train.soft aside"
        )
    return torch.from_numpy(found)


def looked_up(batch: dict, rows: torch.Tensor) -> dict:
    """An augmented batch whose ``cls`` are row numbers of `soft_rows`, with what these rows hold.

    Returns:
        The batch with only objects in ``batch_idx``, ``cls`` and ``bboxes``, their ``vectors`` (T, K), ``weights``,
        ``box_weights`` and ``is_stored`` (T,), and ``region_idx``, ``region_bboxes`` and ``region_keeps`` as
        softlabel.detectors.background reads them, with ``region_is_stored``.
    """
    found = rows[batch["cls"].view(-1).long()]
    is_object = found[:, 0] >= 0
    index, boxes = batch["batch_idx"], batch["bboxes"]
    return {
        **batch,
        "batch_idx": index[is_object],
        "cls": found[is_object, :1],
        "bboxes": boxes[is_object],
        "is_stored": found[is_object, 1] > 0,
        "weights": found[is_object, 2],
        "box_weights": found[is_object, 3],
        "vectors": found[is_object, 4:],
        "region_idx": index[~is_object],
        "region_bboxes": boxes[~is_object],
        "region_is_stored": found[~is_object, 1] > 0,
        "region_keeps": found[~is_object, 4:],
    }
