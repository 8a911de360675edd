"""Crops through an image classifier, or a CLIP-like model whose text is encoded once.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020), and Zhai et
al., "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343), through transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor

from softlabel.detectors.detector import default_device
from softlabel.detectors.hub import any_folder
from softlabel.detectors.pretrained import from_folder
from softlabel.detectors.queries import Crop
from softlabel.errors import RecipeError
from softlabel.records import PAD_VALUE

_BATCH = 64


class CropNetwork(ABC):
    """Probabilities for crops, a batch at a time; on CUDA where available."""

    def __init__(self, model: Any, processor: Any, num_names: int) -> None:
        self._device = default_device()
        self._model, self._processor, self._num_names = model.to(self._device), processor, num_names

    def probabilities(self, crops: Iterable[Crop]) -> NDArray[np.float32]:
        """(N, F) for crops, uint8 (H, W, 3) RGB, each padded to a square: squashing or cutting hides what it shows."""
        found = [np.zeros((0, self._num_names), np.float32)]
        waiting = iter(crops)
        while squares := [_square(crop) for crop in islice(waiting, _BATCH)]:
            inputs = self._processor(images=squares, input_data_format="channels_last", return_tensors="pt")
            with torch.inference_mode():
                answer = self._answer(inputs["pixel_values"].to(self._device))
            found.append(answer.float().cpu().numpy())
        return np.concatenate(found)

    @abstractmethod
    def _answer(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, F) for a batch of the model's input."""


@lru_cache(maxsize=1)  # a process has one model for all its shards
def load(weights: Path | str, prompts: tuple[tuple[str, ...], ...]) -> CropNetwork:
    """The network of a CropModel.

    Raises:
        WeightsError: The model cannot be loaded.
        RecipeError: It cannot read a prompt.
    """
    folder = any_folder(str(weights))
    if not prompts:
        return _Classifier(*from_folder(folder, AutoModelForImageClassification, AutoImageProcessor))
    return _Prompted(*from_folder(folder, AutoModel, AutoProcessor), prompts)


class _Classifier(CropNetwork):
    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor, model.config.num_labels)
        self._independent = model.config.problem_type == "multi_label_classification"

    def _answer(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self._model(pixel_values=pixels).logits
        return logits.sigmoid() if self._independent else logits.softmax(-1)


class _Prompted(CropNetwork):
    """Several phrasings of a name count as the mean of their embeddings."""

    def __init__(self, model: Any, processor: Any, prompts: Sequence[Sequence[str]]) -> None:
        super().__init__(model, processor.image_processor, len(prompts))
        means = [self._embed(processor.tokenizer, phrasings).mean(0) for phrasings in prompts]
        self._names_FD = normalize(torch.stack(means), dim=-1)

    def _embed(self, tokenizer: Any, phrasings: Sequence[str]) -> torch.Tensor:
        """(P, D), each of unit length."""
        most = self._model.config.text_config.max_position_embeddings
        for phrasing in phrasings:
            length = len(tokenizer(phrasing, verbose=False)["input_ids"])
            if length > most:
                raise RecipeError(f"the prompt {phrasing!r} has {length} tokens, the model reads {most}: shorten it")
        tokens = tokenizer(list(phrasings), padding="max_length", max_length=most, return_tensors="pt")
        if self._model.config.model_type == "siglip":
            tokens.pop("attention_mask", None)  # it was trained without one, whatever its tokenizer gives
        with torch.inference_mode():
            return normalize(self._model.get_text_features(**tokens.to(self._device)).pooler_output, dim=-1)

    def _answer(self, pixels: torch.Tensor) -> torch.Tensor:
        images_BD = normalize(self._model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        logits = images_BD @ self._names_FD.T * self._model.logit_scale.exp()
        if self._model.config.model_type == "siglip":
            return (logits + self._model.logit_bias).sigmoid()
        return logits.softmax(-1)


def _square(crop: Crop) -> Crop:
    height, width = crop.shape[:2]
    top, left = (max(0, width - height) // 2, max(0, height - width) // 2)
    bottom, right = max(0, width - height) - top, max(0, height - width) - left
    grey = (PAD_VALUE,) * 3
    return np.asarray(cv2.copyMakeBorder(crop, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey), np.uint8)
