"""What transformers detectors have in common: where they come from, and how they see tiles and name boxes.

Models are loaded from a folder, without running code from it and without the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.utils import logging

from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions
from softlabel.detectors.families import Teacher
from softlabel.detectors.hub import local_folder
from softlabel.detectors.queries import Queries
from softlabel.detectors.selection import Geometry, Image
from softlabel.errors import RecipeError, WeightsError
from softlabel.records import Nms

SIDE = 1000.0
"""Side in pixels of the square that networks give boxes in, instead of fractions of the tile."""

logging.disable_progress_bar()


class PromptedDetector(Detector):
    """An open-vocabulary detector that takes prompts and no example crops, over tiles of any shape.

    Args:
        folder: The model's, as softlabel.detectors.hub.local_folder gives it.
        queries: What it looks for.
        nms: What is kept of a forward pass.
        device: As for Detector.
        options: As for Detector; the engine is pytorch.

    Raises:
        WeightsError: The model cannot be loaded.
        RecipeError: A class has examples and no prompt, or the model cannot read the prompts.
    """

    name: ClassVar[str]
    network: ClassVar[type[Any]]
    """A Network, made from a model, its processor and queries; boxes are in a square of ``SIDE``."""

    def __init__(
        self,
        folder: Path,
        queries: Queries,
        nms: Nms,
        device: torch.device | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        if not all(queries.prompts):
            raise RecipeError(f"label.open_vocabulary.examples: {self.name} takes prompts: give each class some")
        model, processor = from_folder(folder, AutoModelForZeroShotObjectDetection, AutoProcessor)
        network = self.network(model, processor, queries)
        super().__init__(network, queries.num_classes, nms, device, **options)

    @classmethod
    def of(cls, teacher: Teacher, **options: Unpack[EngineOptions]) -> "PromptedDetector":
        """The detector of a folder, or of a name on the hub."""
        assert teacher.queries is not None
        return cls(local_folder(str(teacher.weights)), teacher.queries, teacher.nms, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """Tiles as they are: the model's own processor resizes them."""
        return Shares(tile_hw)


@dataclass(frozen=True)
class Shares:
    """Tiles as they are, and boxes back from a square of 1000 px."""

    tile_hw: tuple[int, int]

    def apply(self, image: Image) -> Image:
        """As it is."""
        return image

    def apply_to_batch(self, tiles: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return tiles

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        """In tile pixels."""
        height, width = self.tile_hw
        return boxes_N4 * np.array([width / SIDE, height / SIDE] * 2, np.float32)


def class_scores(phrasings: torch.Tensor, sizes: Sequence[int], *, mean: bool = False) -> torch.Tensor:
    """Scores of classes (..., K) from those of phrasings (..., P); a box that matches background best scores 0.

    Args:
        phrasings: Class by class, those of background last; in [0, 1].
        sizes: How many phrasings each class has.
        mean: Whether several of a class count as their mean, else as their best.
    """
    *classes, background = phrasings.split([*sizes, phrasings.shape[-1] - sum(sizes)], dim=-1)
    scores = torch.stack([one.mean(-1) if mean else one.amax(-1) for one in classes], -1)
    if background.shape[-1]:
        scores = scores * (scores.amax(-1, keepdim=True) >= background.amax(-1, keepdim=True))
    return scores


def from_folder(folder: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    """A model in float32 and its processor.

    Args:
        folder: As softlabel.detectors.hub.local_folder gives it.
        model: A transformers model class, or one of its Auto classes.
        processor: Likewise.

    Raises:
        WeightsError: They cannot be loaded.
    """
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        loaded = model.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
        return loaded.eval(), processor.from_pretrained(folder, **local)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:300]}): is it whole?") from None
