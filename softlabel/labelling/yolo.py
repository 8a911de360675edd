"""A YOLO detector that keeps the class vector of every box."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
import torchvision  # noqa: F401 (where it is not loaded, ultralytics' NMS is a loop over boxes in Python)
from numpy.typing import NDArray
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from softlabel.config import is_anchor_based
from softlabel.errors import RecipeError
from softlabel.labelling.engines import LIBRARIES, Outputs, build
from softlabel.labelling.losses import TileLoss, targets_of
from softlabel.labelling.weights import default_train_args, load_model, read_header
from softlabel.records import Detections, Nms, Truth
from softlabel.store import file_digest

T = TypeVar("T")
Image = NDArray[np.uint8]

_PAD_VALUE = 114  # the grey that ultralytics letterboxes with, in training and in inference
_NEVER_S = 1e9  # non_max_suppression empties the rest of a batch when its time is up; ours never is


def check_train_args(args: dict, where: str, model: str) -> None:
    """Refuse train arguments that ultralytics does not know, softlabel sets itself, or the model has no use for.

    Raises:
        RecipeError: Naming the argument.
    """
    taken = sorted(set(args) & _SET_BY_SOFTLABEL)
    if taken:
        raise RecipeError(f"{where}.args.{taken[0]} is set by softlabel: remove it ({_SET_BY_SOFTLABEL_HINT})")
    unknown = sorted(set(args) - set(DEFAULT_CFG_DICT))
    if unknown:
        raise RecipeError(f"{where}.args.{unknown[0]} is no ultralytics train argument: correct or remove it")
    if "dfl" in args and is_anchor_based(model):
        raise RecipeError(f"{where}.args.dfl: {model} has no such loss (its losses are box, obj and cls): remove it")
    try:
        get_cfg(overrides=args)
    except (TypeError, ValueError, SyntaxError) as error:
        raise RecipeError(f"{where}.args: {' '.join(str(error).split())}") from None


_SET_BY_SOFTLABEL = {"data", "model", "device", "project", "name", "save_dir", "resume", "pretrained", "seed"} | {
    "exist_ok", "val", "plots", "save", "task", "mode", "single_cls", "classes", "fraction", "time", "compile", "split"
}  # fmt: skip
_SET_BY_SOFTLABEL_HINT = "model, weights and seed have keys of their own, devices follow from `execution`"


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(weights: Path | str, imgsz: int, nms: Nms, engine: str = "pytorch", precision: str = "float32") -> dict:
    """All that decides which boxes a teacher finds in given pixels (DESIGN, promise 1).

    Args:
        weights: The weights file.
        imgsz: Longer side of a tile as the model sees it, in pixels.
        nms: What is kept of a forward pass.
        engine: As softlabel.labelling.engines.resolve gives it, and so is ``precision``.
        precision: Of the convolutions.
    """
    header = read_header(weights)
    libraries = ["torch", "torchvision", "ultralytics", *([LIBRARIES[engine]] if engine in LIBRARIES else [])]
    return {
        "weights": file_digest(weights),
        "architecture": digest_of_yaml(header.yaml),
        "classes": list(header.classes),
        "imgsz": imgsz,
        "engine": engine,
        "precision": precision,
        "nms": asdict(nms),
        "versions": {name: ".".join(version(name).split(".")[:2]) for name in libraries},
    }


def digest_of_yaml(yaml: dict) -> str:
    """A short name for an architecture."""
    return f"{yaml.get('yaml_file', 'model')}:{yaml.get('scale', '')}:nc={yaml.get('nc')}"


class YoloDetector:
    """Runs a YOLO model over tiles of any size.

    A tile is scaled so that its longer side is ``imgsz`` and padded to a multiple of the stride. The padding depends on
    the tile alone, never on its batch, so neither do its boxes (but for float rounding).

    Args:
        model: Taken over: it is moved, fused and, for another precision than float32, changed.
        imgsz: Longer side of a tile as the model sees it, in pixels.
        nms: What is kept of a forward pass.
        device: Where PyTorch runs; default: CUDA where there is one, else the CPU. OpenVINO always runs on the CPU.
        engine: As softlabel.labelling.engines.resolve gives it, and so is ``precision``.
        precision: Of the convolutions; boxes and scores are always decoded in float32.
        threads: CPU threads, None: as many as the engine's library thinks best (softlabel.labelling.engines.build).
        batch_size: Tiles per forward pass; None is found by trying (softlabel.labelling.engines.build).
    """

    def __init__(
        self,
        model: DetectionModel,
        imgsz: int,
        nms: Nms,
        device: torch.device | None = None,
        *,
        engine: str = "pytorch",
        precision: str = "float32",
        threads: int | None = None,
        batch_size: int | None = 16,
    ) -> None:
        self.device = torch.device("cpu") if engine == "openvino" else device or default_device()
        self.imgsz, self.nms = imgsz, nms
        if hasattr(model.model[-1], "end2end"):
            model.model[-1].end2end = False  # v10 and 26: class vectors and NMS need the one-to-many head
        self._stride, self._num_classes = int(model.stride.max()), int(model.model[-1].nc)
        self._model = model.to(self.device).eval().float().fuse(verbose=False)
        self._engine = build(self._model, engine, precision, self.device, threads, batch_size)
        self._gives_losses = (engine, precision) == ("pytorch", "float32")
        self._loss: TileLoss | None = None

    @classmethod
    def from_weights(
        cls,
        weights: Path | str,
        nms: Nms,
        imgsz: int | None = None,
        *,
        engine: str = "pytorch",
        precision: str = "float32",
        threads: int | None = None,
        batch_size: int | None = 16,
    ) -> "YoloDetector":
        """From a weights file; ``imgsz`` defaults to the size it was trained at, the rest is as for the class.

        Raises:
            WeightsError: The weights cannot be read.
        """
        model, header = load_model(weights)
        imgsz = imgsz or header.imgsz
        gains = {k: v for k, v in header.train_args.items() if k in ("box", "cls", "dfl")}
        model.args = get_cfg(overrides={**default_train_args(header.yaml), **gains, "imgsz": imgsz})
        return cls(model, imgsz, nms, engine=engine, precision=precision, threads=threads, batch_size=batch_size)

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Soft labels of any number of tiles, in their order.

        Args:
            images: uint8 (H, W, 3) RGB; those of one shape share forward passes.

        Returns:
            Per tile the boxes in tile pixels, clipped to the tile, best first.
        """
        return self._run(images, lambda outputs, prepared, _: self._keep(outputs.decoded, prepared))

    def losses(self, images: Sequence[Image], truths: Sequence[Truth]) -> list[list[float]]:
        """Per tile the loss terms against its truth (softlabel.labelling.losses): sums, then normalisers."""
        return [losses for _, losses in self.detect_with_losses(images, truths)]

    def detect_with_losses(
        self, images: Sequence[Image], truths: Sequence[Truth]
    ) -> list[tuple[Detections, list[float]]]:
        """Both, from one forward pass.

        Raises:
            ValueError: The engine is not PyTorch in float32, the only one that gives them.
        """
        if not self._gives_losses:
            raise ValueError("losses need engine pytorch in float32")

        def both(outputs: Outputs, prepared: _Prepared, indices: list[int]) -> list[tuple[Detections, list[float]]]:
            return [
                (kept, self._tile_loss(outputs.raw, position, prepared, truths[index]))
                for position, (index, kept) in enumerate(
                    zip(indices, self._keep(outputs.decoded, prepared), strict=True)
                )
            ]

        return self._run(images, both)

    def loss_names(self) -> list[str]:
        """The loss that each term of ``losses`` is part of, in order."""
        return self._tile_loss_of_model().names()

    def _tile_loss_of_model(self) -> TileLoss:
        if self._loss is None:
            self._loss = TileLoss(self._model)
        return self._loss

    def _tile_loss(self, raw: dict, position: int, prepared: "_Prepared", truth: Truth) -> list[float]:
        boxes, class_ids = targets_of(truth)
        in_input = boxes * prepared.gain + np.array(prepared.pad_xy * 2, np.float32)
        return self._tile_loss_of_model()(raw, position, in_input, class_ids, prepared.size_hw)

    def _run(self, images: Sequence[Image], use: Callable[[Outputs, "_Prepared", list[int]], list[T]]) -> list[T]:
        """Results in the order of the images. ``use`` gets a forward pass, its geometry and whose it is, as indices."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        results: dict[int, T] = {}
        for shape, indices in by_shape.items():
            results.update(zip(indices, self._run_shape(images, indices, shape, use), strict=True))
        return [results[index] for index in range(len(images))]

    def _run_shape(
        self,
        images: Sequence[Image],
        indices: list[int],
        shape: tuple[int, ...],
        use: Callable[[Outputs, "_Prepared", list[int]], list[T]],
    ) -> list[T]:
        prepared = _Prepared.of(shape[:2], self.imgsz, self._stride)
        return self._engine.run(
            (prepared.apply(images[index]) for index in indices),
            lambda outputs: use(outputs, prepared, indices[outputs.first : outputs.first + len(outputs.decoded)]),
        )

    def _keep(self, decoded: torch.Tensor, prepared: "_Prepared") -> list[Detections]:
        # One more than max_det is asked for, to know whether max_det cut anything.
        found, kept_indices = non_max_suppression(
            decoded,
            conf_thres=self.nms.floor,
            iou_thres=self.nms.iou,
            max_det=self.nms.max_det + 1,
            max_time_img=_NEVER_S,
            nc=self._num_classes,
            return_idxs=True,
        )
        most = self.nms.max_det
        vectors = [one[4:, kept.reshape(-1)[:most].long()].T for one, kept in zip(decoded, kept_indices, strict=True)]
        boxes = torch.cat([rows[:most, :4] for rows in found])
        together = torch.cat((boxes, torch.cat(vectors)), 1).cpu().numpy()  # one copy from the device per batch
        ends = np.cumsum([len(one) for one in vectors])
        return [
            self._detections(rows, prepared, len(all_rows) > most)
            for rows, all_rows in zip(np.split(together, ends[:-1]), found, strict=True)
        ]

    def _detections(self, rows: NDArray[np.float32], prepared: "_Prepared", saturated: bool) -> Detections:
        """Of (N, 4 + K) or (N, 4 + K + 1) boxes in input pixels, class scores and objectness."""
        boxes = prepared.undo(rows[:, :4])
        inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # a box wholly in the padding has no area in the tile
        kept, end = rows[inside], 4 + self._num_classes
        return Detections(
            boxes[inside],
            np.ascontiguousarray(kept[:, 4:end]),
            saturated=saturated,
            objectness=kept[:, end].copy() if kept.shape[1] > end else None,
        )


@dataclass(frozen=True)
class _Prepared:
    """How tiles of one shape are brought to the model's input, and boxes back."""

    tile_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    size_hw: tuple[int, int]
    gain: float
    pad_xy: tuple[int, int]

    @classmethod
    def of(cls, tile_hw: tuple[int, ...], imgsz: int, stride: int) -> "_Prepared":
        height, width = tile_hw
        gain = imgsz / max(height, width)
        scaled_h, scaled_w = max(1, round(height * gain)), max(1, round(width * gain))
        size_h, size_w = (-(-side // stride) * stride for side in (scaled_h, scaled_w))
        pad = (size_w - scaled_w) // 2, (size_h - scaled_h) // 2
        return cls((height, width), (scaled_h, scaled_w), (size_h, size_w), gain, pad)

    def apply(self, image: Image) -> Image:
        if self.scaled_hw != self.tile_hw:
            image = cv2.resize(image, self.scaled_hw[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        if self.scaled_hw == self.size_hw:
            return image
        (x, y), (height, width) = self.pad_xy, self.scaled_hw
        canvas = np.full((*self.size_hw, 3), _PAD_VALUE, np.uint8)
        canvas[y : y + height, x : x + width] = image
        return canvas

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        boxes = (boxes_N4 - np.array(self.pad_xy * 2, np.float32)) / np.float32(self.gain)
        height, width = self.tile_hw
        return np.clip(boxes, 0, np.array([width, height] * 2, np.float32)).astype(np.float32)
