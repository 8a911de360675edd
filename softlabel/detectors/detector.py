"""What every detector does: tiles of any shape through an engine, NMS, and back to the tile with the class vector."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from softlabel.detectors.engines import Network, Outputs, build, pipeline_of
from softlabel.detectors.selection import Geometry, Image, Selection
from softlabel.records import Detections, Nms

T = TypeVar("T")


class Detector:
    """Runs a network over tiles of any shape and keeps the class vector of every box.

    How a tile is prepared depends on that tile alone, never on its batch, and so do its boxes (up to float rounding).

    Args:
        network: Taken over: it is moved and, for a precision other than float32, changed.
        num_classes: How many score columns it has.
        nms: What is kept of a forward pass.
        device: Where PyTorch runs; default: CUDA where available, else the CPU. OpenVINO always runs on the CPU.
        engine: As softlabel.detectors.engine_choice.resolve gives it, and so is ``precision``.
        precision: That of the convolutions and matrix products; scores are always decoded, and boxes scaled to pixels,
            in float32.
        threads: CPU threads; None: as many as the engine's library thinks best (softlabel.detectors.engines.build).
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
        self._rotated = rotated
        self.engine, self.precision = engine, precision
        self.device = torch.device("cpu") if engine == "openvino" else device or default_device()
        self.nms, self._num_classes = nms, num_classes
        self._columns: tuple[tuple[int, ...], ...] | None = None
        self._engine = build(network.to(self.device).eval(), engine, precision, self.device, threads, batch_size)
        self._pipeline = pipeline_of(self._engine, network, self.device)

    def map_classes(self, columns: Sequence[Sequence[int]]) -> None:
        """Find other classes from now on: the score of each is the best of some of the model's, 0 where it has none.

        NMS works on these: boxes of two classes that became one suppress each other.

        Args:
            columns: For each class, the indices of the model's classes that become it.
        """
        self._columns = tuple(tuple(places) for places in columns)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """How this detector sees tiles of a height and width in pixels, at ``scale`` times its own size."""
        raise NotImplementedError

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Soft labels of any number of tiles, in their order.

        Args:
            images: uint8 (H, W, 3) RGB; those of the same shape share forward passes.

        Returns:
            Per tile the boxes in tile pixels, clipped to the tile, best first.
        """
        return self.start(images)()

    def start(self, images: Sequence[Image], scale: float = 1.0) -> Callable[[], list[Detections]]:
        """``detect`` in two steps: returns, once all tiles are on their way, what waits for them and gives soft labels.

        The model sees the tiles at ``scale`` times its own size, if it can take other sizes. One thread at a time may
        start; the next tiles may be started while the last ones are waited for.
        """
        pipeline = self._pipeline
        if pipeline is None:
            return self._start(images, lambda outputs, selection, _: selection.of_each(outputs.decoded), scale)
        return self._by_shape(images, scale, lambda own, selection: pipeline.start([images[i] for i in own], selection))

    def _start(
        self, images: Sequence[Image], use: Callable[[Outputs, Selection, list[int]], list[T]], scale: float = 1.0
    ) -> Callable[[], list[T]]:
        """Results in the order of the images. ``use`` gets a forward pass's outputs, what to keep of them and the
        indices of its images."""

        def start_shape(own: list[int], selection: Selection) -> Callable[[], list[T]]:
            return self._engine.start(
                (selection.geometry.apply(images[i]) for i in own),
                lambda outputs: use(outputs, selection, own[outputs.first : outputs.first + len(outputs.decoded)]),
            )

        return self._by_shape(images, scale, start_shape)

    def _by_shape(
        self,
        images: Sequence[Image],
        scale: float,
        start_shape: Callable[[list[int], Selection], Callable[[], list[T]]],
    ) -> Callable[[], list[T]]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        started = [
            (own, start_shape(own, self._selection(self.geometry((height, width), scale))))
            for (height, width, _), own in by_shape.items()
        ]

        def finish() -> list[T]:
            results: dict[int, T] = {}
            for own, finish_shape in started:
                results.update(zip(own, finish_shape(), strict=True))
            return [results[index] for index in range(len(images))]

        return finish

    def _selection(self, geometry: Geometry) -> Selection:
        return Selection(geometry, self._num_classes, self._columns, self.nms, self._rotated)


def default_device() -> torch.device:
    """CUDA where available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
