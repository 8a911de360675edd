"""Which file runs which detectors. A new family is a file beside this one and a line in FAMILIES.

A family's file has ``load(teacher, **options)``, which returns a Detector (detector.py) with these EngineOptions
(engines.py). Nothing here may import torch: drivers look things up here, and only labelling actors load.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softlabel.detectors.class_map import ClassMap
from softlabel.detectors.queries import Queries
from softlabel.records import Nms

if TYPE_CHECKING:
    from softlabel.detectors.detector import Detector


@dataclass(frozen=True)
class Family:
    """Detectors that one file runs.

    ``libraries`` decide its answers, and their versions are part of a teacher's fingerprint; ``iou`` is for NMS where
    neither the recipe nor the model gives another; an ``open_vocabulary`` family looks for what it is told; a
    ``pytorch_alone`` family runs on no other engine; one with ``own_size`` sees every tile at one size.
    """

    module: str
    libraries: tuple[str, ...]
    iou: float = 0.7
    open_vocabulary: bool = False
    pytorch_alone: bool = False
    own_size: bool = False


_ULTRALYTICS = ("torch", "torchvision", "ultralytics")
_TRANSFORMERS = ("torch", "torchvision", "transformers")
_DETR = Family("detr", _TRANSFORMERS, iou=1.0, pytorch_alone=True, own_size=True)
_GROUNDING_DINO = Family(
    "grounding_dino", _TRANSFORMERS, iou=0.7, open_vocabulary=True, pytorch_alone=True, own_size=True
)
_OWL_VIT = Family("owlvit", _TRANSFORMERS, iou=0.5, open_vocabulary=True, pytorch_alone=True, own_size=True)

FAMILIES = {
    "yolo": Family("yolo", _ULTRALYTICS),
    "rtdetr_ultralytics": Family("rtdetr", _ULTRALYTICS, iou=1.0, pytorch_alone=True, own_size=True),
    "conditional_detr": _DETR,
    "d_fine": _DETR,
    "deformable_detr": _DETR,
    "detr": _DETR,
    "rf_detr": _DETR,
    "rt_detr": _DETR,
    "rt_detr_v2": _DETR,
    "yolos": _DETR,
    "onnx": Family("onnx", ("onnxruntime", "torch", "torchvision"), pytorch_alone=True, own_size=True),
    "grounding-dino": _GROUNDING_DINO,
    "mm-grounding-dino": _GROUNDING_DINO,
    "omdet-turbo": Family(
        "omdet_turbo", _TRANSFORMERS, iou=0.5, open_vocabulary=True, pytorch_alone=True, own_size=True
    ),
    "owlvit": _OWL_VIT,
    "owlv2": _OWL_VIT,
}
"""By name; for transformers models that is the ``model_type`` in their config.json."""


@dataclass(frozen=True)
class Teacher:
    """Which detector labels, and how.

    ``fingerprint`` is all that decides which boxes it finds in given pixels. ``weights`` is a file, or for a
    transformers model a folder or the hub's ``name@revision``; ``num_classes`` counts the recipe's classes; ``imgsz``
    is None where the model fixes its own size; ``queries`` is what an open-vocabulary teacher looks for; ``class_map``
    says how a model's own classes become the recipe's, where they differ; ``augment`` are the views of a tile besides
    the tile as it is.
    """

    family: str
    weights: Path | str
    fingerprint: dict
    num_classes: int
    imgsz: int | None
    nms: Nms
    engine: str
    precision: str
    queries: Queries | None = None
    class_map: ClassMap | None = None
    augment: tuple[str | float, ...] = ()


def load(teacher: Teacher, *, threads: int | None, batch_size: int | None) -> "Detector":
    """A teacher's detector, ready to label.

    Args:
        teacher: Which detector, under which settings.
        threads: As for Detector.
        batch_size: As for Detector.

    Raises:
        WeightsError: It cannot be loaded.
    """
    module = importlib.import_module(f"softlabel.detectors.{FAMILIES[teacher.family].module}")
    options = {"engine": teacher.engine, "precision": teacher.precision, "threads": threads, "batch_size": batch_size}
    detector: Detector = module.load(teacher, **options)
    if teacher.class_map is not None:
        detector.map_classes(teacher.class_map.columns)
    if teacher.augment:
        from softlabel.detectors.augment import AugmentedDetector

        return AugmentedDetector(detector, teacher.augment)
    return detector
