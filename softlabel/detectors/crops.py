"""Models that tell crops apart: an image classifier, or a CLIP-like model that compares them with words.

Both are transformers models, from a folder or the hub, whose weights are safetensors: an ultralytics classifier would
need a reader of its own for its checkpoints. Drivers ask here, so nothing may import torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabel.detectors.hub import any_folder, class_names, content_digest, lasting_name, model_type
from softlabel.detectors.queries import Crop
from softlabel.detectors.teachers import library_versions
from softlabel.errors import WeightsError
from softlabel.store import read_json

PROMPTED = ("clip", "siglip")
"""The families, by ``model_type``, that compare images with words."""
_HEAD = "ForImageClassification"


@dataclass(frozen=True)
class CropModel:
    """Which model, and what it tells apart.

    ``weights`` is a folder or the hub's ``name@revision``; ``prompts`` are the phrasings of each name, empty where the
    names are a classifier's own classes.
    """

    weights: Path | str
    digest: str
    architecture: str
    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] = ()

    runs_model = True

    def identity(self) -> dict:
        """All that decides the shares."""
        return {
            "attribute": "prompts" if self.prompts else "classifier",
            "weights": self.digest,
            "architecture": self.architecture,
            "names": list(self.names),
            "prompts": [list(phrasings) for phrasings in self.prompts],
            "versions": library_versions(("torch", "torchvision", "transformers")),
        }

    def prepare(self, tile: Crop) -> Crop:
        """The tile as it is: a model has its own normalisation."""
        return tile

    def shares(self, crops: Iterable[Crop]) -> NDArray[np.float32]:
        """(N, F), the probability that each crop is of each name.

        Args:
            crops: uint8 (H, W, 3) RGB; they are consumed a batch at a time.

        Raises:
            WeightsError: The model cannot be loaded.
            RecipeError: It cannot read a prompt.
        """
        from softlabel.detectors.crop_networks import load

        return load(self.weights, self.prompts).probabilities(crops)


def crop_classifier(model: str) -> CropModel:
    """An image classifier, whose own classes are the names.

    Args:
        model: A folder, or a name on the hub.

    Raises:
        WeightsError: It is not there, cannot be fetched, or is no image classifier.
    """
    folder = any_folder(model)
    made_as = read_json(folder / "config.json").get("architectures") or []
    if not any(str(name).endswith(_HEAD) for name in made_as):
        raise WeightsError(
            f"{model} is {', '.join(made_as) or model_type(folder)}: give an image classifier (*{_HEAD})"
        )
    names = class_names(folder)
    return CropModel(lasting_name(model, folder), content_digest(folder), model_type(folder), names)


def prompted_crops(model: str, vocabulary: Mapping[str, tuple[str, ...]]) -> CropModel:
    """A CLIP-like model, with phrasings of each name to compare crops with.

    Args:
        model: A folder, or a name on the hub.
        vocabulary: Names to their phrasings.

    Raises:
        WeightsError: It is not there, cannot be fetched, or does not compare images with words.
    """
    folder = any_folder(model)
    if model_type(folder) not in PROMPTED:
        raise WeightsError(
            f"{model} is {model_type(folder)}, which compares no images with words: give a CLIP or SigLIP"
        )
    names, prompts = tuple(vocabulary), tuple(vocabulary.values())
    return CropModel(lasting_name(model, folder), content_digest(folder), model_type(folder), names, prompts)
