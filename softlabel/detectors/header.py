"""What a weights file says of its model, read without torch: a driver needs no more, and torch costs it seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from softlabel.errors import WeightsError


@dataclass(frozen=True)
class Header:
    """What a weights file says of its model."""

    yaml: dict
    classes: tuple[str, ...]
    imgsz: int
    train_args: dict


def read_safetensors_header(path: Path | str) -> Header:
    """What a weights file says of its model.

    Raises:
        WeightsError: It is no safetensors file that this project wrote.
    """
    metadata = open_weights(path).metadata() or {}
    if "softlabel" not in metadata:
        raise WeightsError(
            f"{path} holds tensors but not which model they belong to: give it as train.*.weights to start training "
            "from, and label with the weights.safetensors that training or `softlabel import-weights` writes"
        )
    header = json.loads(metadata["softlabel"])
    return Header(header["yaml"], tuple(header["classes"]), header["imgsz"], header["train_args"])


def is_checkpoint(path: Path | str) -> bool:
    """Whether a file is a checkpoint of PyTorch's, by its name."""
    return Path(path).suffix == ".pt"


def open_weights(path: Path | str) -> safe_open:
    """A safetensors file, of which nothing is read yet but its list of tensors.

    Raises:
        WeightsError: It is not there, or is none.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(
            f"no weights at {path}: give an existing .safetensors file, or an original YOLOv5 .pt"
        ) from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a safetensors file ({error}): of others only original YOLOv5 checkpoints, .pt, are read"
        ) from None
