"""The one file format that weights travel in, and what starts from it.

Weights are safetensors (no code runs on loading), with what is needed to rebuild the model in the file's metadata. An
original YOLOv5 checkpoint (.pt) is read by softlabel.detectors.checkpoint wherever weights are.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from softlabel.config import is_anchor_based
from softlabel.detectors.checkpoint import read_checkpoint
from softlabel.detectors.header import Header, is_checkpoint, open_weights, read_safetensors_header
from softlabel.detectors.yolov5 import TRAIN_DEFAULTS, YoloV5, anchor_yaml
from softlabel.errors import RecipeError, WeightsError
from softlabel.store import commit

_ORIGINAL_IMGSZ = 640  # what the releases of YOLOv5 n, s, m, l and x were trained at


def save_weights(path: Path, model: DetectionModel, header: Header) -> None:
    """Write a model as safetensors, by rename. Tensors are stored as float32."""
    _save(path, {key: value.float() for key, value in model.state_dict().items()}, header)


def import_weights(source: Path, target: Path) -> Header:
    """Turn an original YOLOv5 checkpoint into safetensors, and say what it holds.

    Raises:
        WeightsError: ``source`` is no such checkpoint, asks for a name that none needs, or ``target`` exists.
    """
    if target.exists():
        raise WeightsError(f"{target} exists: remove it, or name another file with --output")
    header, tensors = read_original(source)
    _save(target, tensors, header)
    return header


def build_model(model: str | dict, num_classes: int) -> DetectionModel:
    """An untrained model: one of ultralytics' by its yaml name, or yolov5{n,s,m,l,x}-anchor.yaml.

    Raises:
        RecipeError: There is no such model.
    """
    if is_anchor_based(model):
        return YoloV5(anchor_yaml(model) if isinstance(model, str) else model, num_classes)
    try:
        yaml = yaml_model_load(model) if isinstance(model, str) else dict(model)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no model {model}: name an ultralytics model yaml ({_one_line(error)})") from None
    return DetectionModel(yaml, nc=num_classes, verbose=False)


def default_train_args(model: str | dict) -> dict:
    """ultralytics train arguments whose default depends on the model."""
    return dict(TRAIN_DEFAULTS) if is_anchor_based(model) else {}


def load_model(path: Path | str) -> tuple[DetectionModel, Header]:
    """Rebuild a model from a weights file.

    Raises:
        WeightsError: It cannot be read or its tensors do not fit.
    """
    header, tensors = _read(path)
    try:
        model = build_model(header.yaml, len(header.classes))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(f"{path} names what is no layer of a model ({_one_line(error)}): it is refused") from None
    _load_all(model, tensors, path)
    model.names = dict(enumerate(header.classes))
    return model, header


def load_matching(model: torch.nn.Module, path: Path | str) -> tuple[int, int]:
    """Copy into ``model`` the tensors of ``path`` that fit by name and shape, as when a head has other classes.

    Returns:
        How many tensors fitted, and how many the model has.

    Raises:
        WeightsError: The file cannot be read, or nothing fits.
    """
    own = model.state_dict()
    tensors = read_original(path)[1] if is_checkpoint(path) else _read_tensors(path)
    fitting = {k: v.float() for k, v in tensors.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise WeightsError(f"no tensor of {path} fits this model by name and shape: is it for another architecture?")
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


def read_original(path: Path | str) -> tuple[Header, dict[str, torch.Tensor]]:
    """What an original YOLOv5 checkpoint says of its model, and its tensors, which are known to fit it.

    Raises:
        WeightsError: It is none.
    """
    found = read_checkpoint(path)
    yaml = anchor_yaml(found.model)
    model = YoloV5(yaml, len(found.classes))
    _load_all(model, found.tensors, path)
    # The checkpoint's own anchors, which need not be COCO's.
    model.set_anchors(model.anchors_px())
    return Header(model.yaml, found.classes, _ORIGINAL_IMGSZ, dict(TRAIN_DEFAULTS)), found.tensors


def _read(path: Path | str) -> tuple[Header, dict[str, torch.Tensor]]:
    return read_original(path) if is_checkpoint(path) else (read_safetensors_header(path), _read_tensors(path))


def _load_all(model: DetectionModel, tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit its own model: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _save(path: Path, tensors: dict[str, torch.Tensor], header: Header) -> None:
    on_cpu = {key: value.contiguous().cpu() for key, value in tensors.items()}
    data = save(on_cpu, {"softlabel": json.dumps(asdict(header))})
    commit(path, lambda temporary: temporary.write_bytes(data))  # save_file makes files that only their owner can read


def _read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    file = open_weights(path)
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
