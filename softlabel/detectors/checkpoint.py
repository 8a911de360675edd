"""Original YOLOv5 checkpoints (.pt, v6 and v7 releases and what those versions train), read without running them.

Such a file is a pickle: a list of names to import and call. This reader knows the handful of names a YOLOv5 model needs
and gives each a stand-in that only holds what it is given, so neither the original's code nor any other runs; any other
name ends the reading (https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import collections
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from softlabel.errors import WeightsError

_SIZES = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}
_NOT_FOUND = "is not an original YOLOv5 detection checkpoint of version 6 or 7"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: its model (yolov5{n,s,m,l,x}-anchor.yaml), class names, and tensors as float32."""

    model: str
    classes: tuple[str, ...]
    tensors: dict[str, torch.Tensor]


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a .pt file.

    Raises:
        WeightsError: There is no file, it is damaged, it asks for a name that a YOLOv5 model does not need (which is
            named), or it holds something else than a YOLOv5 detection model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED)
        found = content.get("ema") or content["model"]
        tensors = {key: _as_float32(value) for key, value in _tensors(found) if not key.endswith("anchor_grid")}
        names = found.names.values() if isinstance(found.names, dict) else found.names
        classes = tuple(str(name) for name in names)
        size = _SIZES[len(tensors["model.0.conv.weight"])]
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}: give an existing file") from None
    except _UnknownNameError as error:
        raise WeightsError(
            f"{path} asks to import {error}, which no YOLOv5 model needs: it is refused, and nothing of it was run; "
            "give a checkpoint of YOLOv5 v6 or v7, or safetensors"
        ) from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(f"{path} cannot be read as a checkpoint ({_one_line(error)}): is it damaged?") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise WeightsError(f"{path} {_NOT_FOUND} ({type(error).__name__}: {_one_line(error)})") from None
    return Checkpoint(f"yolov5{size}-anchor.yaml", classes, tensors)


class _UnknownNameError(pickle.UnpicklingError):
    """A name that is not in the list below."""


class _StandIn:
    """Holds what a pickled object consists of, and does nothing."""


_KNOWN: dict[str, Any] = {
    "__builtin__.set": set,  # Python 2 names: torch.save writes pickle protocol 2
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **dict.fromkeys(
        [
            "models.yolo.Model",
            "models.yolo.DetectionModel",
            "models.yolo.Detect",
            "models.common.Conv",
            "models.common.Bottleneck",
            "models.common.C3",
            "models.common.SPPF",
            "models.common.Concat",
            "torch.nn.modules.activation.SiLU",
            "torch.nn.modules.batchnorm.BatchNorm2d",
            "torch.nn.modules.container.ModuleList",
            "torch.nn.modules.container.Sequential",
            "torch.nn.modules.conv.Conv2d",
            "torch.nn.modules.pooling.MaxPool2d",
            "torch.nn.modules.upsampling.Upsample",
        ],
        _StandIn,
    ),
}


class _Unpickler(pickle.Unpickler):
    """torch.load builds on this one; it adds how tensors' storages are found, by names that end in Storage."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _KNOWN:
            raise _UnknownNameError(full)
        return _KNOWN[full]


# torch.load takes a module with the parts of `pickle` that it uses.
_RESTRICTED = SimpleNamespace(
    __name__="softlabel.detectors.checkpoint", Unpickler=_Unpickler, load=lambda file, **kwargs: _Unpickler(file).load()
)


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module and all below it, as its state_dict would name them."""
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, value
    for name, child in module._modules.items():
        yield from _tensors(child, f"{prefix}{name}.")


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Releases hold half precision; counters stay integers."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() else tensor


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
