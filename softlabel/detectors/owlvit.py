"""OWL-ViT and OWLv2 as teachers that keep the class vector of every box.

Minderer et al., "Simple Open-Vocabulary Object Detection with Vision Transformers" (arXiv:2205.06230) and "Scaling
Open-Vocabulary Object Detection" (arXiv:2306.09683), through transformers. The text is encoded once; per tile, that
leaves the image tower and its heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, Owlv2ForObjectDetection, OwlViTForObjectDetection

from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions, Network
from softlabel.detectors.families import Teacher
from softlabel.detectors.hub import local_folder
from softlabel.detectors.pretrained import class_scores, from_folder
from softlabel.detectors.queries import Crop, Queries
from softlabel.detectors.selection import Geometry, Image
from softlabel.errors import RecipeError
from softlabel.records import Nms
from softlabel.store import read_json

_MODELS: dict[str, Any] = {"owlvit": OwlViTForObjectDetection, "owlv2": Owlv2ForObjectDetection}


class OwlVitDetector(Detector):
    """An OWL-ViT or OWLv2 over tiles of any shape.

    Args:
        folder: The model's, as softlabel.detectors.hub.local_folder gives it.
        queries: What it looks for.
        nms: What is kept of a forward pass.
        device: As for Detector.
        options: As for Detector; the engine is pytorch.

    Raises:
        WeightsError: The model cannot be loaded.
        RecipeError: A prompt is longer than the model reads.
    """

    def __init__(
        self,
        folder: Path,
        queries: Queries,
        nms: Nms,
        device: torch.device | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        kind = read_json(folder / "config.json")["model_type"]
        model, processor = from_folder(folder, _MODELS[kind], AutoProcessor)
        self._pads = model.config.model_type == "owlv2"
        self._side = int(model.config.vision_config.image_size)
        super().__init__(_OwlVitNetwork(model, processor, queries), queries.num_classes, nms, device, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """OWL-ViT squashes a tile to a square; OWLv2 pads it to one, at the right or the bottom."""
        height, width = tile_hw
        seen_wh = (max(tile_hw),) * 2 if self._pads else (width, height)
        return _Square(tile_hw, (seen_wh[0] / self._side, seen_wh[1] / self._side))


def load(teacher: Teacher, **options: Unpack[EngineOptions]) -> OwlVitDetector:
    """The detector of a folder, or of a name on the hub."""
    assert teacher.queries is not None
    return OwlVitDetector(local_folder(str(teacher.weights)), teacher.queries, teacher.nms, **options)


class _OwlVitNetwork(Network):
    """The image tower and heads, with the queries that they answer."""

    def __init__(self, model: Any, processor: Any, queries: Queries) -> None:
        super().__init__()
        self.model, self._processor, self._dtype = model, processor.image_processor, torch.float32
        self._side = float(model.config.vision_config.image_size)
        per_class = [
            _embed_text(model, processor.tokenizer, phrasings) if phrasings else _embed_crops(self, crops)
            for phrasings, crops in zip(queries.prompts, queries.examples or [()] * queries.num_classes, strict=True)
        ]
        if queries.combine == "mean":
            per_class = [torch.nn.functional.normalize(rows.mean(0, keepdim=True), dim=-1) for rows in per_class]
        self._class_sizes = [len(rows) for rows in per_class]
        if queries.background:
            per_class.append(_embed_text(model, processor.tokenizer, queries.background))
        self.register_buffer("queries", torch.cat(per_class)[None], persistent=False)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        boxes, logits = self.answer(tiles)
        scores = class_scores(logits.sigmoid(), self._class_sizes)
        return torch.cat((boxes * self._side, scores), -1).transpose(1, 2), None

    def answer(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For uint8 tiles (B, H, W, 3): boxes (B, A, 4) as centre and size in 0..1 of the square that the model sees,
        and logits (B, A, Q) of every query."""
        return self.of_pixels(self._pixels(tiles))

    def of_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the model's own input, (B, 3, side, side)."""
        features = self._features(pixels)
        queries = self.get_buffer("queries").expand(len(pixels), -1, -1)
        logits, _ = self.model.class_predictor(features, queries)
        return self.model.box_predictor(features, features), logits

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Image features (B, A, D), float32, of uint8 tiles (B, H, W, 3)."""
        return self._features(self._pixels(tiles))

    def _pixels(self, tiles: torch.Tensor) -> torch.Tensor:
        """By transformers' own preprocessing, on the tiles' device."""
        return self._processor(
            images=list(tiles.permute(0, 3, 1, 2)), input_data_format="channels_first", return_tensors="pt"
        )["pixel_values"]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, self._dtype, enabled=self._dtype != torch.float32):
            found = self.model.image_embedder(pixel_values=pixels)[0]
        return found.float().flatten(1, 2)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """In the image tower only; the heads stay in float32."""
        self._dtype = dtype


def _embed_text(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """(P, D), each of unit length."""
    most = model.config.text_config.max_position_embeddings
    for prompt in prompts:
        length = len(tokenizer(prompt, verbose=False)["input_ids"])
        if length > most:
            raise RecipeError(f"the prompt {prompt!r} has {length} tokens, the model reads {most}: shorten it")
    tokens = tokenizer(list(prompts), padding="max_length", max_length=most, return_tensors="pt")
    base = getattr(model, model.config.model_type)
    with torch.no_grad():
        found = base.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    return torch.nn.functional.normalize(found, dim=-1)


def _embed_crops(network: _OwlVitNetwork, crops: Sequence[Crop]) -> torch.Tensor:
    """(E, D), each of unit length: for each crop, the embedding that transformers' image-guided detection looks for."""
    found = []
    with torch.no_grad():
        for crop in crops:
            features = network.features(torch.from_numpy(np.ascontiguousarray(crop))[None])
            embedded, _, _ = network.model.embed_image_query(features, features)
            found.append(torch.nn.functional.normalize(embedded.reshape(1, -1), dim=-1))
    return torch.cat(found)


@dataclass(frozen=True)
class _Square:
    """Tiles as they are, and boxes back from the square that the model sees, by tile pixels per pixel of the square."""

    tile_hw: tuple[int, int]
    scale_wh: tuple[float, float]

    def apply(self, image: Image) -> Image:
        return image

    def apply_to_batch(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        return boxes_N4 * np.array(self.scale_wh * 2, np.float32)
