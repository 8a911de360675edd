"""What a weights file says of its model, read without torch: a driver needs no more, and torch costs it seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from softlabel.errors import WeightsError
from softlabel.storage import on_disk

_FAMILIES = {"RTDETRDecoder": "rtdetr_ultralytics", "ONNX": "onnx"}
"""Heads that do not belong to a YOLO."""


@dataclass(frozen=True)
class Header:
    """What a weights file says of its model."""

    yaml: dict
    classes: tuple[str, ...]
    imgsz: Annotated[int, Field(gt=0, lt=1 << 16)]
    train_args: dict

    @property
    def family(self) -> str:
        """The name in softlabel.detectors.families of the family that runs it."""
        return _FAMILIES.get(self.yaml["head"][-1][2], "yolo")


def read_safetensors_header(path: Path | str) -> Header:
    """What a weights file says of its model.

    Raises:
        WeightsError: It is not a safetensors file that this project wrote.
    """
    metadata = open_weights(path).metadata() or {}
    if "softlabel" not in metadata:
        raise WeightsError(tensors_alone(path))
    try:
        return TypeAdapter(Header).validate_json(metadata["softlabel"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path} says nothing of its model that can be read ({where}: {first['msg']})") from None


def tensors_alone(path: Path | str) -> str:
    """The message that says what to do with a file of bare tensors."""
    return (
        f"{path} holds tensors but not which model they belong to: say it with softlabel import-weights {path} "
        "--model yolo11n.yaml --classes NAME,NAME, or start training from it as train.*.weights"
    )


def is_checkpoint(path: Path | str) -> bool:
    """Whether a file is a PyTorch checkpoint, by its name."""
    return str(path).endswith(".pt")


def is_onnx(path: Path | str) -> bool:
    """Whether a file is an exported graph, by its name."""
    return str(path).endswith(".onnx")


def open_weights(path: Path | str) -> safe_open:
    """A safetensors file, of which only the list of tensors has been read.

    Raises:
        WeightsError: It is not there, or is not a safetensors file.
    """
    try:
        return safe_open(on_disk(path), framework="pt")
    except FileNotFoundError:
        raise WeightsError(
            f"no weights at {path}: give an existing .safetensors file, or a .pt of ultralytics or YOLOv5"
        ) from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a safetensors file ({error}): give one, or a checkpoint (.pt) of ultralytics or YOLOv5"
        ) from None
