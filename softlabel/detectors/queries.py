"""What an open-vocabulary teacher looks for, per class: words, or example crops.

Reading tasks get one with their job: nothing here may import torch.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Crop = NDArray[np.uint8]


@dataclass(frozen=True)
class Queries:
    """Per class its phrasings or its example crops, uint8 (H, W, 3) RGB; one of the two is empty.

    ``combine`` is what several of them make of one class: ``mean`` of their embeddings, or ``max`` of their scores.
    A box that answers best to a ``background`` prompt is no box.
    """

    prompts: tuple[tuple[str, ...], ...]
    examples: tuple[tuple[Crop, ...], ...] = ()
    combine: Literal["mean", "max"] = "mean"
    background: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes, background not among them."""
        return len(self.prompts)

    def identity(self) -> dict:
        """All of it, crops by their digest, as it enters a teacher's fingerprint."""
        examples = [[_digest(crop) for crop in crops] for crops in self.examples]
        return {
            "prompts": [list(phrasings) for phrasings in self.prompts],
            "examples": examples,
            "combine": self.combine,
            "background": list(self.background),
        }


def _digest(crop: Crop) -> str:
    return hashlib.sha256(str(crop.shape).encode() + np.ascontiguousarray(crop).tobytes()).hexdigest()[:10]
