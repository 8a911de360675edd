"""Models of transformers from a folder, without code from it and without the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from softlabel.errors import WeightsError

logging.disable_progress_bar()


def class_scores(phrasings: torch.Tensor, sizes: Sequence[int], *, mean: bool = False) -> torch.Tensor:
    """Scores of classes (..., K) from those of phrasings (..., P).

    Args:
        phrasings: Class by class, those of background last; in [0, 1].
        sizes: How many phrasings each class has.
        mean: Whether several count as their mean, else as their best. A box that suits background best scores 0.
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
        model: A class of transformers, or one of its Auto classes.
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
