"""What every detector does: tiles of any shape through an engine, NMS, and back to the tile with the class vector."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel import rotated as rotated_math
from softlabel.detectors.engines import Network, Outputs, build
from softlabel.detectors.nms import suppressed
from softlabel.records import Detections, Nms

T = TypeVar("T")
Image = NDArray[np.uint8]


class Geometry(Protocol):
    """How tiles of one shape are brought to what the network takes, and boxes back."""

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Height and width of the tiles in pixels."""
        ...

    def apply(self, image: Image) -> Image:
        """A tile as the network takes it."""
        ...

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes of the network, xyxy, in tile pixels; they may leave the tile."""
        ...


class Detector:
    """Runs a network over tiles of any shape and keeps the class vector of every box.

    What becomes of a tile depends on it alone, never on its batch, so neither do its boxes (but for float rounding).

    Args:
        network: Taken over: it is moved and, for another precision than float32, changed.
        num_classes: Of its score columns.
        nms: What is kept of a forward pass.
        device: Where PyTorch runs; default: CUDA where there is one, else the CPU. OpenVINO always runs on the CPU.
        engine: As softlabel.detectors.engine_choice.resolve gives it, and so is ``precision``.
        precision: Of the convolutions and matrix products; boxes and scores are always decoded in float32.
        threads: CPU threads, None: as many as the engine's library thinks best (softlabel.detectors.engines.build).
        batch_size: Tiles per forward pass; None is found by trying (softlabel.detectors.engines.build).
        rotated: Whether the network ends each box with an angle, as softlabel.rotated has it.
    """

    def __init__(
        self,
        network: Network,
        num_classes: int,
        nms: Nms,
        device: torch.device | None,
        *,
        engine: str = "pytorch",
        precision: str = "float32",
        threads: int | None = None,
        batch_size: int | None = 16,
        rotated: bool = False,
    ) -> None:
        self._rotated, self._suppress = rotated, suppressed
        if rotated:
            from softlabel.detectors.rotated_nms import suppressed_rotated  # imports ultralytics

            self._suppress = suppressed_rotated
        self.engine, self.precision = engine, precision
        self.device = torch.device("cpu") if engine == "openvino" else device or default_device()
        self.nms, self._num_classes = nms, num_classes
        self._columns: Sequence[Sequence[int]] | None = None
        self._engine = build(network.to(self.device).eval(), engine, precision, self.device, threads, batch_size)

    def map_classes(self, columns: Sequence[Sequence[int]]) -> None:
        """From now on find other classes: the score of each is the best of some of the model's, 0 where it has none.

        NMS works on these: boxes of two classes that became one suppress each other.

        Args:
            columns: For each class the places of the model's classes that become it.
        """
        self._columns = columns

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """What this detector does with tiles of a height and width in pixels, at ``scale`` times its own size."""
        raise NotImplementedError

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Soft labels of any number of tiles, in their order.

        Args:
            images: uint8 (H, W, 3) RGB; those of one shape share forward passes.

        Returns:
            Per tile the boxes in tile pixels, clipped to the tile, best first.
        """
        return self.start(images)()

    def start(self, images: Sequence[Image], scale: float = 1.0) -> Callable[[], list[Detections]]:
        """``detect`` in two: once every tile is on its way, what waits for the last ones and gives the soft labels.

        The model sees the tiles at ``scale`` times its own size, if it can at others. One thread at a time may start;
        the next tiles may be started while the last ones are waited for.
        """
        return self._start(images, lambda outputs, geometry, _: self._keep(outputs.decoded, geometry), scale)

    def _start(
        self, images: Sequence[Image], use: Callable[[Outputs, Geometry, list[int]], list[T]], scale: float = 1.0
    ) -> Callable[[], list[T]]:
        """Results in the order of the images. ``use`` gets a forward pass, its geometry and whose it is, as indices."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        started = [
            (indices, self._start_shape(images, indices, self.geometry((height, width), scale), use))
            for (height, width, _), indices in by_shape.items()
        ]

        def finish() -> list[T]:
            results: dict[int, T] = {}
            for indices, finish_shape in started:
                results.update(zip(indices, finish_shape(), strict=True))
            return [results[index] for index in range(len(images))]

        return finish

    def _start_shape(
        self,
        images: Sequence[Image],
        indices: list[int],
        geometry: Geometry,
        use: Callable[[Outputs, Geometry, list[int]], list[T]],
    ) -> Callable[[], list[T]]:
        return self._engine.start(
            (geometry.apply(images[index]) for index in indices),
            lambda outputs: use(outputs, geometry, indices[outputs.first : outputs.first + len(outputs.decoded)]),
        )

    def _keep(self, decoded: torch.Tensor, geometry: Geometry) -> list[Detections]:
        num_classes = self._num_classes
        if self._columns is not None:
            decoded, num_classes = _mapped(decoded, num_classes, self._columns), len(self._columns)
        rows_of = [self._suppress(one, num_classes, self.nms) for one in decoded]
        together = torch.cat(rows_of).cpu().numpy()  # one copy from the device per batch
        most, ends = self.nms.max_det, np.cumsum([len(rows) for rows in rows_of])
        return [self._detections(rows[:most], geometry, len(rows) > most) for rows in np.split(together, ends[:-1])]

    def _detections(self, rows: NDArray[np.float32], geometry: Geometry, saturated: bool) -> Detections:
        """Of (N, 4 + K) or (N, 4 + K + 1) boxes as the network sees them, class scores, and objectness or angle."""
        height, width = geometry.tile_hw
        boxes, xywhr = geometry.undo(rows[:, :4]).astype(np.float32), None
        end = 4 + (self._num_classes if self._columns is None else len(self._columns))
        if self._rotated:
            xywhr = rotated_math.upright(boxes)
            xywhr[:, 4] = rows[:, end]
            xywhr = rotated_math.regularized(xywhr).astype(np.float32)
            boxes = rotated_math.hulls(xywhr)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32)).astype(np.float32)
        inside = np.flatnonzero(
            (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        )  # a box wholly in the padding has no area in the tile
        objectness = rows[:, end].copy() if rows.shape[1] > end and not self._rotated else None
        return Detections(boxes, np.ascontiguousarray(rows[:, 4:end]), saturated, objectness, xywhr).at(inside)


def _mapped(decoded_BCA: torch.Tensor, num_classes: int, columns: Sequence[Sequence[int]]) -> torch.Tensor:
    """Of (B, 4 + K + E, A) the same boxes, and whatever follows the scores, with scores of other classes."""
    boxes, scores, rest = decoded_BCA.split([4, num_classes, decoded_BCA.shape[1] - 4 - num_classes], dim=1)
    none = torch.zeros_like(scores[:, 0])
    mapped = [scores[:, list(places)].amax(1) if places else none for places in columns]
    return torch.cat((boxes, torch.stack(mapped, 1), rest), 1)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
