"""What an open-vocabulary teacher looks for, per class: words, or example crops.

Reading tasks are given one with their job, so nothing here may import torch.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Crop = NDArray[np.uint8]


@dataclass(frozen=True)
class Queries:
    """For each class its phrasings or its example crops, uint8 (H, W, 3) RGB; one of the two is empty.

    ``combine`` says how several of them count for one class: by the ``mean`` of their embeddings (of their scores in
    Grounding DINO), or the ``max`` of their scores. A box that matches a ``background`` prompt best is dropped.
    """

    prompts: tuple[tuple[str, ...], ...]
    examples: tuple[tuple[Crop, ...], ...] = ()
    combine: Literal["mean", "max"] = "mean"
    background: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes, without background."""
        return len(self.prompts)

    def identity(self) -> dict:
        """All of it, with crops as digests, as it enters a teacher's fingerprint."""
        examples = [[_digest(crop) for crop in crops] for crops in self.examples]
        return {
            "prompts": [list(phrasings) for phrasings in self.prompts],
            "examples": examples,
            "combine": self.combine,
            "background": list(self.background),
        }


def _digest(crop: Crop) -> str:
    return hashlib.sha256(str(crop.shape).encode() + np.ascontiguousarray(crop).tobytes()).hexdigest()[:10]
