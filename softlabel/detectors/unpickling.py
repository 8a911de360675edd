"""PyTorch checkpoints (.pt) read without running them.

Such a file is a pickle: a list of names to import and call. This reader knows the names that occur in detection models
of ultralytics and YOLOv5 and gives each a stand-in that only holds what it is given, so neither their code nor any
other runs; any other name ends the reading
(https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import collections
import inspect
import pickle
import pickletools
import sys
import tarfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from ultralytics.nn import modules, tasks
from ultralytics.utils import loss, tal

from softlabel.errors import WeightsError
from softlabel.storage import on_disk


class StandIn:
    """Holds what a pickled object consists of, as its attributes, and does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def read_pickle(path: Path | str) -> Any:
    """What a checkpoint holds: plain values, tensors on the CPU, and for anything else a StandIn named after its class.

    Raises:
        WeightsError: There is no file, it is damaged, it is TorchScript, or it asks for a name that does not occur in
            any detection model (the message gives it).
    """
    try:
        _refuse_other_forms(file := on_disk(path))
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED)
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}: give an existing file") from None
    except _UnknownNameError as error:
        raise WeightsError(
            f"{path} asks to import {error}, which no detection model of ultralytics or YOLOv5 consists of: it is "
            "refused, and nothing of it was run; give a checkpoint of one of these, or its tensors as safetensors"
        ) from None
    # A damaged pickle may call harmless things with any arguments, and so end in any exception.
    except Exception as error:  # noqa: BLE001
        said = _one_line(error)
        raise WeightsError(f"{path} cannot be read as a checkpoint ({said}): is it one, or damaged?") from None


def _refuse_other_forms(path: Path | str) -> None:
    """Refuse what else torch.load takes: it would run TorchScript, and unpack a tar file (PyTorch 0.1)."""
    with open(path, "rb") as file:
        if torch.serialization._is_zipfile(file):
            records = torch._C.PyTorchFileReader(str(path)).get_all_records()
            if "constants.pkl" in records:
                raise WeightsError(
                    f"{path} is TorchScript, a program that cannot be read without running it: export the model it "
                    "was made from with format=onnx, or give its checkpoint (best.pt)"
                )
        elif tarfile.is_tarfile(file):
            raise pickle.UnpicklingError("a tar file")


class _UnknownNameError(pickle.UnpicklingError):
    """A name that does not occur in any detection model."""


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: object) -> torch.Tensor:
    """A tensor without the hooks that may come with it."""
    return _rebuild_tensor_v2(storage, offset, size, stride, False, collections.OrderedDict())


def _parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    return data


class _Calls:
    """Calls a function but, unlike one, has no attributes that a pickle could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a function")


_REAL = {
    "builtins.set": set,
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Calls(_tensor),
    "torch._utils._rebuild_parameter": _Calls(_parameter),
}

_PLAIN = {
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{system}Path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    "torch.device",
    "torch.Size",
    "torch.float16",
    "torch.float32",
}
"""What training leaves in a checkpoint besides the model: scores, paths, devices."""

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")
"""Where the parts of DataParallel and DistributedDataParallel are."""

_EARLIER = {
    "IterableSimpleNamespace",
    "Model",  # YOLOv5 before v6.2
    "Loss",  # ultralytics 8.0
    "v10DetectLoss",
    "YOLOv10DetectionModel",
    "Silence",
    "Contract",
    "Expand",
    "CrossConv",
    "MixConv2d",
    "Sum",
}
"""Classes that ultralytics' modules and losses never had, or no longer have."""

_LARGEST_MEMO = 1 << 22
"""Objects in a pickle; the largest checkpoints, with optimizer, have a few hundred thousand."""

_ROOTS = ("ultralytics.", "models.yolo.", "models.common.", "models.experimental.")
"""Where ultralytics and YOLOv5 keep their classes; the folders below these have changed from year to year."""


@cache
def _classes_of(*found: ModuleType) -> set[str]:
    return {name for module in found for name, _ in inspect.getmembers(module, inspect.isclass)}


@cache
def _layers() -> set[str]:
    """Names of ultralytics' layers, models and losses."""
    folders = [getattr(modules, name) for name in ("block", "conv", "head", "transformer")]
    return _classes_of(modules, tasks, loss, tal, *folders) | _EARLIER


def _is_known(module: str, name: str) -> bool:
    full = f"{module}.{name}"
    if module.startswith("torch.nn.modules."):
        return isinstance(getattr(sys.modules.get(module), name, None), type)
    return full in _PLAIN or full.startswith(_WRAPPERS) or (full.startswith(_ROOTS) and name in _layers())


class _Unpickler(pickle.Unpickler):
    """torch.load subclasses this one, to add how tensors' storages are found, by names that end in Storage."""

    def __init__(self, file: Any, **options: Any) -> None:
        start = file.tell()
        for opcode, index, _ in pickletools.genops(file):
            # A memo is as long as its largest index says, and a damaged one may say gigabytes.
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(index, int) and index > _LARGEST_MEMO:
                raise pickle.UnpicklingError(f"a memo of {index} objects")
        file.seek(start)
        super().__init__(file, **options)

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # Python 2's name: torch.save writes pickle protocol 2
        full = f"{module}.{name}"
        if full in _REAL:
            return _REAL[full]
        if not _is_known(module, name):
            raise _UnknownNameError(ascii(full[:200])[1:-1])
        return type(name, (StandIn,), {})  # a new class each time: what one file does to it affects no other


# torch.load takes a module with the parts of `pickle` that it uses.
_RESTRICTED = SimpleNamespace(
    __name__=__name__, Unpickler=_Unpickler, load=lambda file, **kwargs: _Unpickler(file, **kwargs).load()
)


def _one_line(error: Exception) -> str:
    return (type(error).__name__ + ": " + " ".join(str(error).split())[:200]).encode("utf-8", "replace").decode()
