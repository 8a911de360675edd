"""Models of transformers from a folder, without code from it and without the network."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from softlabel.errors import WeightsError

logging.disable_progress_bar()


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
