"""The Arrow schemas of what passes between the steps, and the row types that go with them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel import rotated

BOX = pa.list_(pa.float32(), 4)
"""xyxy in pixels of the tile, max edges exclusive."""

XYWHR = pa.list_(pa.float32(), 5)
"""A rotated box as in softlabel.rotated, in pixels of the tile; it may extend beyond the tile. Its angle is in
[0, pi / 2)."""

TRUTH_BOX = pa.struct(
    [
        pa.field("box", BOX, nullable=False),
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("visible", pa.float32(), nullable=False),
        pa.field("ignore", pa.bool_(), nullable=False),
        pa.field("xywhr", pa.list_(pa.float32())),
    ]
)
"""One truth box, clipped to its tile. ``visible`` is the share of the whole box's area that lies in the tile, in
(0, 1]; ``ignore`` is set below the recipe's ``min_visible``, for COCO crowds and for boxes whose class cannot be used:
such a box is left out of training and neither rewards nor punishes a detection in evaluation. ``class_id`` is
UNKNOWN_CLASS where it is not one of ours: the box is ignored for every class. ``xywhr`` is the box itself, unclipped,
where it was drawn rotated, and ``box`` is then its hull; null where it was drawn upright."""

TILES = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("scene_id", pa.string(), nullable=False),
        pa.field("scene_uri", pa.string(), nullable=False),
        pa.field("scene_stamp", pa.string()),
        pa.field("window", pa.list_(pa.int32(), 4), nullable=False),
        pa.field("bands", pa.list_(pa.int32(), 3), nullable=False),
        pa.field("stretch", pa.list_(pa.float32())),
        pa.field("split", pa.string()),
        pa.field("group", pa.string(), nullable=False),
        pa.field("truth", pa.list_(TRUTH_BOX)),
        pa.field("labelled_classes", pa.list_(pa.int32())),
        pa.field("crs", pa.string()),
        pa.field("transform", pa.list_(pa.float64())),
    ]
)
"""One tile: numbers, not pixels. ``scene_stamp`` is the size and time of the scene's file when it was tiled, null where
they are not known; ``window`` is (column, row, width, height) in scene pixels; ``bands`` the three 1-based bands read
as red, green, blue; ``stretch`` the (low, high) raw values mapped to 0..255, null for 8 bit; ``truth`` null where
nobody drew boxes; ``labelled_classes`` null where every class was drawn; ``transform`` is the scene's affine
(a, b, c, d, e, f), null without a CRS. (A list that may be null is not of fixed size: PyArrow before 26 could not read
that.)"""


def _tiles_before(truth_box: list[pa.Field]) -> pa.Schema:
    """The schema before format 7, when lists that may be null had a fixed size."""
    then = {
        "stretch": pa.list_(pa.float32(), 2),
        "truth": pa.list_(pa.struct(truth_box)),
        "transform": pa.list_(pa.float64(), 6),
    }
    return pa.schema([field.with_type(then.get(field.name, field.type)) for field in TILES])


TILES_OF_FORMAT_6 = _tiles_before([*[*TRUTH_BOX][:-1], pa.field("xywhr", XYWHR)])
TILES_OF_FORMAT_4 = _tiles_before([*TRUTH_BOX][:-1])
"""Before truth had rotated boxes."""

PAD_VALUE = 114
"""The grey that ultralytics letterboxes with, in training and in inference."""
UNKNOWN_CLASS = -1
"""In truth: a box that somebody drew, of a class that cannot be used."""
LABELLED, EMPTY, REJECTED = "labelled", "empty", "rejected"
"""What became of a tile. An ``empty`` one has no valid pixel: no error, but no example of background either."""
LOSS_NAMES = b"softlabel.losses"
"""Schema metadata of a store with losses: for each term the loss it is part of, comma-separated, in the order of the
column; terms with the same name add up."""


def soft_labels_schema(num_classes: int) -> pa.Schema:
    """One row per tile asked for: labelled (maybe with no boxes), empty, or rejected with a reason.

    ``scores`` holds the whole class vector of each box, float32 in [0, 1], independent per class (rows need not sum
    to 1), objectness already multiplied in; ``objectness`` is null where the model has none. ``xywhr`` is null where
    boxes are upright; else ``boxes`` are their hulls, clipped to the tile. ``agreement`` is that of Detections, NaN or
    null where nothing is known. ``saturated`` says that max_det cut the list. ``losses`` (optional, for evaluation)
    holds the sum over the tile of each loss term, then for each term the normaliser by which a mean over many tiles
    divides.
    """
    return pa.schema(
        [
            pa.field("tile_id", pa.string(), nullable=False),
            pa.field("boxes", pa.list_(BOX), nullable=False),
            pa.field("scores", pa.list_(pa.list_(pa.float32(), num_classes)), nullable=False),
            pa.field("objectness", pa.list_(pa.float32())),
            pa.field("xywhr", pa.list_(XYWHR)),
            pa.field("agreement", pa.list_(pa.float32())),
            pa.field("saturated", pa.bool_(), nullable=False),
            pa.field("losses", pa.list_(pa.float32())),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("retryable", pa.bool_(), nullable=False),
        ]
    )


@dataclass(frozen=True)
class Nms:
    """What is kept of a forward pass: boxes with a best score strictly above ``floor``, after class-wise greedy NMS."""

    floor: float = 0.01
    iou: float = 0.7
    max_det: int = 1000


@dataclass(frozen=True)
class Detections:
    """What a detector found in one tile: boxes (N, 4) and class vectors (N, K), float32, by descending best score.

    ``objectness`` (N,) is already part of the scores; None where the model has none. ``xywhr`` (N, 5) are
    rotated boxes, of which ``boxes`` are the upright hulls; None where boxes are upright. ``agreement`` (N,) in
    [0, 1] is how well the candidates that NMS discarded agreed with a box (softlabel.detectors.agreement): NaN where
    there were none; None where there is no NMS, boxes are fused, or the store is of format 5 or earlier.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    saturated: bool = False
    objectness: NDArray[np.float32] | None = None
    xywhr: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None

    def at(self, index: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "Detections":
        """A selection or reordering of them, by mask or index."""
        others = (None if one is None else one[index] for one in (self.objectness, self.xywhr, self.agreement))
        return Detections(self.boxes[index], self.scores[index], self.saturated, *others)

    @property
    def best(self) -> NDArray[np.float32]:
        """(N,) score of the best class, which every threshold is compared with."""
        return self.scores.max(axis=1) if len(self.scores) else np.zeros(0, np.float32)

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """(N,) best class."""
        return self.scores.argmax(axis=1) if len(self.scores) else np.zeros(0, np.int64)

    def above(self, threshold: float | NDArray[np.float32]) -> "Detections":
        """Those whose best score is strictly above ``threshold``: the same as labelling at that threshold, box for box.

        Their agreement is not the same: candidates below the threshold also count in it. One threshold for all, or (K,)
        one per class, of which that of the best class applies.
        """
        return self.at(self.is_above(threshold))

    def is_above(self, threshold: float | NDArray[np.float32]) -> NDArray[np.bool_]:
        """(N,) which ones `above` keeps."""
        limits = np.asarray(threshold, np.float32)
        return self.best > (limits[self.class_ids] if limits.ndim else limits)


@dataclass(frozen=True)
class Truth:
    """The truth of one tile: boxes (N, 4) float32, class_ids (N,) int32, ignore (N,) bool.

    ``xywhr`` (N, 5) float32 are the boxes as they were drawn, upright ones clipped to the tile and with angle 0, and
    ``boxes`` are their hulls, clipped to the tile; None where none was drawn rotated.
    """

    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    ignore: NDArray[np.bool_]
    xywhr: NDArray[np.float32] | None = None

    @classmethod
    def from_row(cls, truth: list[dict] | None) -> "Truth":
        """From the ``truth`` column of a tile row; null reads as no boxes."""
        rows = truth or []
        boxes = np.array([row["box"] for row in rows], np.float32).reshape(-1, 4)
        return cls(
            boxes,
            np.array([row["class_id"] for row in rows], np.int32),
            np.array([row["ignore"] for row in rows], bool),
            _drawn(boxes, [row.get("xywhr") for row in rows]),  # tiles of format 4 or earlier have none
        )

    def at(self, index: NDArray[np.bool_] | NDArray[np.int64]) -> "Truth":
        """A selection or reordering of it, by mask or index."""
        xywhr = None if self.xywhr is None else self.xywhr[index]
        return Truth(self.boxes[index], self.class_ids[index], self.ignore[index], xywhr)


def _drawn(boxes_N4: NDArray[np.float32], xywhr: Sequence[list[float] | None]) -> NDArray[np.float32] | None:
    if not any(xywhr):
        return None
    drawn_N5 = rotated.upright(boxes_N4)
    for i, box in enumerate(xywhr):
        drawn_N5[i] = drawn_N5[i] if box is None else box
    return drawn_N5


def soft_labels_table(
    num_classes: int,
    tile_ids: Sequence[str],
    found: Sequence[Detections],
    losses: Sequence[list[float] | None],
    reasons: Sequence[str | None],
    retryable: Sequence[bool],
    empty: Collection[str] = (),
) -> pa.Table:
    """Rows of ``soft_labels_schema``, one per tile; a tile with a reason is rejected, ``empty`` are ids of tiles
    without a valid pixel.

    Built from whole arrays: where there are many classes, a list per box costs more than finding the box.
    """
    schema = soft_labels_schema(num_classes)
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(one.boxes for one in found)])
    no_scores = np.zeros((0, num_classes), np.float32)
    scores = np.concatenate([no_scores, *(one.scores for one in found if len(one.boxes))])
    offsets = np.cumsum([0, *(len(one.boxes) for one in found)], dtype=np.int32)
    columns = {
        "tile_id": list(tile_ids),
        "boxes": _lists(offsets, pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4), schema.field("boxes").type),
        "scores": _lists(
            offsets, pa.FixedSizeListArray.from_arrays(scores.ravel(), num_classes), schema.field("scores").type
        ),
        "objectness": [one.objectness for one in found],
        "xywhr": [None if one.xywhr is None else list(one.xywhr) for one in found],
        "agreement": [one.agreement for one in found],
        "saturated": [one.saturated for one in found],
        "losses": list(losses),
        "status": [
            REJECTED if reason else EMPTY if tile_id in empty else LABELLED
            for tile_id, reason in zip(tile_ids, reasons, strict=True)
        ],
        "reason": [reason or None for reason in reasons],
        "retryable": [bool(reason) and retry for reason, retry in zip(reasons, retryable, strict=True)],
    }
    return pa.Table.from_pydict(columns, schema)


def _lists(offsets: NDArray[np.int32], values: pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.cast(kind.value_type), type=kind)


def detections_from_row(row: dict) -> Detections:
    """The detections of one soft-label row."""
    boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
    scores = np.array(row["scores"], np.float32) if len(boxes) else np.zeros((0, 0), np.float32)
    objectness = None if row["objectness"] is None else np.array(row["objectness"], np.float32)
    rotated = row.get("xywhr")  # a store of format 4 or earlier has none
    xywhr = None if rotated is None else np.array(rotated, np.float32).reshape(-1, 5)
    agreed = row.get("agreement")  # a store of format 5 or earlier has none
    agreement = None if agreed is None else np.array(agreed, np.float32)
    return Detections(boxes, scores, row["saturated"], objectness, xywhr, agreement)
